"""The store of artifacts: files of one MLflow run, through the client that the process has loaded."""

from __future__ import annotations

import os
import posixpath
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from memtrack.artifacts.store import ROOT, checked
from memtrack.errors import ArtifactNotFoundError, DeliveryError, MissingDependencyError, RejectedError, SettingsError
from memtrack_mlflow._autolog import followed_run_id
from memtrack_mlflow._files import files_at
from memtrack_mlflow._run import run_writer, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memtrack.artifacts.store import Pack
    from memtrack_mlflow._files import Files


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
        self._found: Files | None = None

    @property
    def key(self) -> str:
        return f"mlflow:{self._run_id}"

    def source(self, name: str) -> str:
        return f"{self.key}/{name}"

    def before_end(self, wait: Callable[[], None]) -> None:
        """MLflow takes files after the end of a run as well."""

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

    def _files(self, _checked: str = "") -> Files:
        if self._found is None:
            client = translate(import_module("mlflow").MlflowClient, tracking_uri=self._tracking_uri)
            # not client.log_artifact(): it asks for the run first, and goes on for minutes if the server is down
            artifact_uri = run_writer(client, self._run_id).state().artifact_uri
            self._found = translate(files_at, artifact_uri, self._tracking_uri)
        return self._found
