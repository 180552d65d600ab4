"""The files of one MLflow run: straight through the tracking server, or through MLflow's repository for the place."""

from __future__ import annotations

import copy
import json
import os
import posixpath
import sys
import tempfile
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from memtrack.artifacts.store import Body, write_whole
from memtrack.errors import ArtifactError, DeliveryError, RejectedError
from memtrack_mlflow import _where
from memtrack_mlflow._run import reason, refusal, translate

if TYPE_CHECKING:
    from collections.abc import Callable

LISTING = "/mlflow-artifacts/artifacts"
"""The end of where a tracking server lists the artifacts that it hands on (``HttpArtifactRepository``)."""


class Entry(NamedTuple):
    """A file, or a folder, of a run."""

    path: str
    is_folder: bool
    size: int
    """In bytes; -1 if MLflow does not say."""


class Files(Protocol):
    """What can be done with the files of a run. All raise DeliveryError."""

    def send(self, path: str, name: str) -> None: ...

    def list(self, folder: str) -> list[Entry]: ...

    def fetch(self, name: str, path: str) -> None: ...

    def remove(self, name: str) -> None: ...


def files_at(artifact_uri: str, tracking_uri: str) -> Files:
    uris, registry = map(import_module, ("mlflow.utils.uri", "mlflow.store.artifact.artifact_repository_registry"))
    artifact_uri = uris.add_databricks_profile_info_to_artifact_uri(artifact_uri, tracking_uri)
    find: Callable[..., Any] = registry.get_artifact_repository
    try:
        repository = find(artifact_uri, tracking_uri=tracking_uri)
    except TypeError:  # before MLflow 3
        repository = find(artifact_uri)
    http = sys.modules.get("mlflow.store.artifact.http_artifact_repo")
    # a repository that uploads in a way of its own is left to it
    if http is not None and getattr(type(repository), "log_artifact", None) is http.HttpArtifactRepository.log_artifact:
        return _ServerFiles(repository)
    return _RepositoryFiles(repository)


class _ServerFiles:
    """Files that the tracking server hands on. One request a call, which fails at once when the server does.

    MLflow repeats a request for minutes, inside the call; see ``ServerRun``. A file is sent as it is read.
    """

    def __init__(self, repository: Any) -> None:
        self._repository = repository
        self._request = import_module("mlflow.utils.rest_utils").http_request
        base, _, root = repository.artifact_uri.partition(LISTING)
        self._base, self._root = base, root.strip("/")

    def send(self, path: str, name: str) -> None:
        with open(path, "rb") as file:
            headers = {"Content-Type": "application/octet-stream"}
            self._call("PUT", f"/{name}", data=file, extra_headers=headers)

    def list(self, folder: str) -> list[Entry]:
        answer = self._call("GET", LISTING, base=self._base, params={"path": posixpath.join(self._root, folder)})
        try:
            return [
                Entry(
                    posixpath.join(folder, posixpath.basename(one["path"])),
                    one["is_dir"],
                    int(one.get("file_size", -1)),
                )
                for one in json.loads(answer.text).get("files", ())
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise DeliveryError(f"what answers at {_where.public(self._base)} is no tracking server") from exc

    def fetch(self, name: str, path: str) -> None:
        answer = self._call("GET", f"/{name}", stream=True)
        try:
            write_whole(Body(answer), path)
        except Exception as exc:
            raise DeliveryError(f"cannot fetch {name}: {reason(exc)}") from exc
        finally:
            answer.close()

    def remove(self, name: str) -> None:
        self._call("DELETE", f"/{name}")

    def _call(self, method: str, endpoint: str, *, base: str = "", **what: Any) -> Any:
        try:
            creds = self._repository._host_creds
            if base:
                creds = copy.copy(creds)
                creds.host = base
            response = self._request(
                creds, endpoint, method, max_retries=0, retry_codes=frozenset(), raise_on_status=False, **what
            )
        except Exception as exc:
            raise DeliveryError(f"no answer from the tracking server: {reason(exc)}") from exc
        if response.status_code == 200:
            return response
        try:
            answer = json.loads(response.text)
        except ValueError:
            answer = None
        if response.status_code == 413:
            raise RejectedError(
                "HTTP 413: what is in front of the tracking server takes no file of this size; "
                "let it take bodies of 33 MiB (nginx: client_max_body_size)"
            )
        hint = _where.refusal_hint(response.status_code, creds)
        raise refusal(response, answer if isinstance(answer, dict) else {}, hint)


class _RepositoryFiles:
    """Files in any other place, through the methods that every artifact repository of MLflow's has."""

    def __init__(self, repository: Any) -> None:
        self._repository = repository

    def send(self, path: str, name: str) -> None:
        folder, base = posixpath.split(name)
        if os.path.basename(path) == base:
            self._call(self._repository.log_artifact, path, folder)
            return
        # a repository calls a file as it is called here
        with tempfile.TemporaryDirectory() as beside:
            link = os.path.join(beside, base)
            os.symlink(os.path.abspath(path), link)
            self._call(self._repository.log_artifact, link, folder)

    def list(self, folder: str) -> list[Entry]:
        found = self._call(self._repository.list_artifacts, folder)
        return [Entry(one.path, one.is_dir, -1 if one.file_size is None else one.file_size) for one in found]

    def fetch(self, name: str, path: str) -> None:
        part = f"{path}.part"
        try:
            self._call(self._repository._download_file, name, part)
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.unlink(part)

    def remove(self, name: str) -> None:
        try:
            self._repository.delete_artifacts(name)
        except NotImplementedError as exc:
            raise ArtifactError(
                f"MLflow cannot delete {name} from where this run's artifacts are; delete it there, with the tools of "
                "that store"
            ) from exc
        except Exception as exc:
            raise DeliveryError(f"cannot delete {name}: {reason(exc)}") from exc

    def _call(self, call: Any, *args: Any) -> Any:
        try:
            return translate(call, *args)
        except DeliveryError as exc:
            missing = exc.__cause__
            if isinstance(missing, ImportError):
                raise RejectedError(
                    f"MLflow needs a package that is not installed to get to this run's artifacts: {missing.name}"
                ) from missing
            raise
