"""The store of artifacts: files of one MLflow run, through the client that the process has loaded."""

from __future__ import annotations

import copy
import json
import os
import posixpath
import sys
import tempfile
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from memtrack.artifacts.store import ROOT, checked, write_whole
from memtrack.errors import (
    ArtifactError,
    ArtifactNotFoundError,
    DeliveryError,
    MissingDependencyError,
    RejectedError,
    SettingsError,
)
from memtrack_mlflow import _where
from memtrack_mlflow._autolog import followed_run_id
from memtrack_mlflow._run import reason, refusal, run_writer, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memtrack.artifacts.store import Pack

LISTING = "/mlflow-artifacts/artifacts"
"""The end of where a tracking server lists the artifacts that it hands on (``HttpArtifactRepository``)."""

_PART_BYTES = 1 << 18


def active_store() -> MlflowStore | None:
    """The store of the run that is active in this thread, else of the last one that ``memtrack.autolog()`` follows.

    None if there is none. Imports nothing of MLflow, asks no server.
    """
    mlflow = sys.modules.get("mlflow")
    active_run = getattr(mlflow, "active_run", None)
    if mlflow is None or active_run is None:
        return None
    run = active_run()
    run_id = run.info.run_id if run is not None else followed_run_id()
    return None if run_id is None else MlflowStore(run_id, mlflow.get_tracking_uri())


def open_store(reference: str) -> tuple[MlflowStore, str]:
    """The store of the run that ``RUN_ID/NAME`` names, and the name. Raises SettingsError or MissingDependencyError."""
    run_id, _, name = reference.partition("/")
    if not run_id or not name:
        raise SettingsError("source", f"mlflow:{reference}", "it has to be mlflow:RUN_ID/NAME.")
    try:
        mlflow = import_module("mlflow")
    except ImportError as exc:
        raise MissingDependencyError("reading artifacts from 'mlflow'", "mlflow") from exc
    return MlflowStore(run_id, mlflow.get_tracking_uri()), name


class MlflowStore:
    """The artifacts of one run, wherever MLflow keeps them: a folder, a bucket, behind the tracking server.

    Args:
        run_id: The run.
        tracking_uri: Where it is.
    """

    keeps_files = False
    folder = ""

    def __init__(self, run_id: str, tracking_uri: str) -> None:
        self._run_id = run_id
        self._tracking_uri = tracking_uri
        self._found: _Files | None = None

    @property
    def key(self) -> str:
        return f"mlflow:{self._run_id}"

    def put(self, path: str, name: str, md5: str) -> None:
        try:
            size = os.path.getsize(path)
        except OSError as exc:
            raise RejectedError(f"{path} is no longer there") from exc
        files = self._files(checked(name))
        files.send(path, name)
        stored = {one.path: one.size for one in files.list(posixpath.dirname(name))}.get(name, 0)
        if stored not in (size, -1):
            raise DeliveryError(f"MLflow has {stored} bytes of {name}, which has {size}")

    def commit(self, path: str, name: str, md5: str, packs: Mapping[str, Pack]) -> None:
        self.put(path, name, md5)

    def names(self) -> dict[str, int]:
        found: dict[str, int] = {}
        folders = [ROOT]
        while folders:
            for one in self._files().list(folders.pop()):
                if one.is_folder:
                    folders.append(one.path)
                else:
                    found[one.path] = one.size
        return found

    def get(self, name: str, path: str) -> None:
        files = self._files(checked(name))
        try:
            files.fetch(name, path)
        except DeliveryError as exc:
            # stores have many ways to say so
            if any(one.path == name and not one.is_folder for one in files.list(posixpath.dirname(name))):
                raise
            raise ArtifactNotFoundError(f"the MLflow run {self._run_id} has no artifact {name}") from exc

    def delete(self, name: str) -> None:
        files = self._files(checked(name))
        if any(one.path == name for one in files.list(posixpath.dirname(name))):
            files.remove(name)

    def close(self) -> None:
        """The connection is MLflow's."""

    def _files(self, _checked: str = "") -> _Files:
        if self._found is None:
            client = translate(import_module("mlflow").MlflowClient, tracking_uri=self._tracking_uri)
            # not client.log_artifact(): it asks for the run first, and goes on for minutes if the server is down
            artifact_uri = run_writer(client, self._run_id).state().artifact_uri
            self._found = translate(_files_at, artifact_uri, self._tracking_uri)
        return self._found


class _Entry(NamedTuple):
    """A file, or a folder, of a run."""

    path: str
    is_folder: bool
    size: int
    """In bytes; -1 if MLflow does not say."""


class _Files(Protocol):
    """What can be done with the files of a run. All raise DeliveryError."""

    def send(self, path: str, name: str) -> None: ...

    def list(self, folder: str) -> list[_Entry]: ...

    def fetch(self, name: str, path: str) -> None: ...

    def remove(self, name: str) -> None: ...


def _files_at(artifact_uri: str, tracking_uri: str) -> _Files:
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

    def list(self, folder: str) -> list[_Entry]:
        answer = self._call("GET", LISTING, base=self._base, params={"path": posixpath.join(self._root, folder)})
        try:
            found = json.loads(answer.text).get("files", ())
            entries = [(one["path"], bool(one["is_dir"]), int(one.get("file_size", -1))) for one in found]
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise DeliveryError(f"what answers at {_where.public(self._base)} is no tracking server") from exc
        return [_Entry(posixpath.join(folder, posixpath.basename(name)), *rest) for name, *rest in entries]

    def fetch(self, name: str, path: str) -> None:
        answer = self._call("GET", f"/{name}", stream=True)
        try:
            write_whole(_Body(answer), path)
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


class _Body:
    """The body of an answer, as a file to be read."""

    def __init__(self, answer: Any) -> None:
        self._parts = answer.iter_content(_PART_BYTES)

    def read(self, _size: int = -1) -> bytes:
        return next(self._parts, b"")


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

    def list(self, folder: str) -> list[_Entry]:
        found = self._call(self._repository.list_artifacts, folder)
        return [_Entry(one.path, one.is_dir, -1 if one.file_size is None else one.file_size) for one in found]

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
