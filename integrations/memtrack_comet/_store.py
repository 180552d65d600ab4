"""The store of artifacts: assets of one Comet experiment, through the client that the process has loaded."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from importlib import import_module
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from memtrack.artifacts.store import checked
from memtrack.errors import DeliveryError, MissingDependencyError, RejectedError, SettingsError
from memtrack.sinks.following import Ends
from memtrack_comet._archive import MESSAGES
from memtrack_comet._assets import ArchivedAssets, CometReader, UploadedAssets
from memtrack_comet._autolog import end_of
from memtrack_comet._sink import first_line, is_running, target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Log = Callable[[Any, str, str, "_Upload"], Any]

WRITTEN_S = 60.0
"""How long Comet's thread may take, offline, to write what it was given; it also copies the user's assets."""

UPLOADED_S = 600.0
"""How long Comet may take, online, to upload a file of 33 MiB, and what it has to upload before."""

_KEY = re.compile("[A-Za-z0-9]{32,50}")


def active_store() -> CometStore | None:
    """The store of the experiment that is running in this process; None if none is. Imports nothing of Comet."""
    find = getattr(sys.modules.get("comet_ml"), "get_running_experiment", None)
    experiment = find() if find is not None else None
    return CometStore(experiment) if experiment is not None and is_running(experiment) else None


def open_store(reference: str) -> tuple[CometReader, str]:
    """The store of the experiment that is named, and the name of the artifact.

    ``reference`` is ``KEY/NAME`` or ``WORKSPACE/PROJECT/KEY/NAME``, or ``PATH.zip/NAME`` for the archive of an offline
    experiment, which is read without Comet. Raises SettingsError, MissingDependencyError or ArtifactNotFoundError.
    """
    path, is_archive, name = reference.rpartition(".zip/")
    if is_archive and name:
        return ArchivedAssets(f"{path}.zip", {}), name
    parts = reference.split("/")
    at = next((at for at in (0, 2) if len(parts) > at + 1 and _KEY.fullmatch(parts[at])), None)
    if at is None or not parts[at + 1]:
        raise SettingsError(
            "source",
            f"comet:{reference}",
            "it has to be comet:KEY/NAME, comet:WORKSPACE/PROJECT/KEY/NAME or comet:PATH/ARCHIVE.zip/NAME.",
        )
    try:
        import_module("comet_ml")
    except ImportError as exc:
        raise MissingDependencyError("reading artifacts from 'comet'", "comet") from exc
    return UploadedAssets(parts[at], None), "/".join(parts[at + 1 :])


_ends = Ends()


class CometStore(CometReader):
    """The assets of an experiment that is running. Comet has copied a file, or uploaded it, when ``put`` returns.

    Args:
        experiment: Any of Comet's, online or offline.
    """

    def __init__(self, experiment: Any) -> None:
        super().__init__(experiment.get_key())
        self._experiment = experiment
        self._target = target_of(experiment, self.experiment_key)
        self._log: Log = _log_without_step if _knows_assets(experiment) else _log_publicly

    def source(self, name: str) -> str:
        if self._target.get("mode") == "offline":
            return f"comet:{self._target['archive'].replace('*', self.experiment_key)}/{name}"
        return super().source(name)

    def before_end(self, wait: Callable[[], None]) -> None:
        _ends.add(*end_of(import_module("comet_ml")), self._experiment, wait)

    def put(self, path: str, name: str, md5: str) -> None:
        checked(name)
        experiment = self._experiment
        if not is_running(experiment):
            raise RejectedError("the experiment has ended", run_gone=True)
        if not os.path.exists(path):
            raise RejectedError(f"{path} is no longer there")
        size, limit = os.path.getsize(path), getattr(experiment, "asset_upload_limit", None)
        if isinstance(limit, (int, float)) and size > limit:
            raise RejectedError(f"Comet takes assets of {limit} bytes at the most, and {name} has {size}")
        messages = os.path.join(self._target.get("folder", ""), MESSAGES)
        is_offline = self._target.get("mode") == "offline"
        upload = _Upload()
        try:
            offset = os.path.getsize(messages) if is_offline else 0
            made = self._log(experiment, path, name, upload)
            asset_id = made["assetId"]
        except Exception as exc:
            raise DeliveryError(f"Comet does not take {name}: {first_line(exc)}") from exc
        if is_offline:
            _await_written(messages, offset, asset_id, size)
        elif self._log is _log_without_step and self._target:
            upload.wait(name)
        elif not experiment.flush():
            raise DeliveryError(f"Comet has not uploaded {name} in time")

    def names(self) -> dict[str, int]:
        return self._reader().names()

    def get(self, name: str, path: str) -> None:
        self._reader().get(name, path)

    def delete(self, name: str) -> None:
        self._reader().delete(name)

    def _reader(self) -> CometReader:
        if self._target.get("mode") == "offline":
            return ArchivedAssets(self._target["archive"].replace("*", self.experiment_key), self._target)
        return UploadedAssets(self.experiment_key, getattr(self._experiment, "api_key", None))


class _Upload:
    """What becomes of an upload, as Comet's threads tell."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._failure = ""

    def succeeded(self, _answer: object) -> None:
        self._over.set()

    def failed(self, answer: object) -> None:
        self._failure = first_line(answer) if isinstance(answer, BaseException) else "the upload failed"
        self._over.set()

    def wait(self, name: str) -> None:
        if not self._over.wait(UPLOADED_S):
            raise DeliveryError(f"Comet has not uploaded {name} within {UPLOADED_S:.0f} s")
        if self._failure:
            raise DeliveryError(f"Comet has not uploaded {name}: {self._failure}")


def _knows_assets(experiment: Any) -> bool:
    uploader = sys.modules.get("comet_ml.file_uploader")
    parts = (getattr(uploader, "preprocess_asset_file", None), getattr(uploader, "FileUpload", None))
    return all(map(callable, (*parts, getattr(experiment, "_log_preprocessed_asset", None))))


def _log_without_step(experiment: Any, path: str, name: str, upload: _Upload) -> Any:
    """Log a file without a step. ``log_asset`` reads the experiment's step, and sets it a moment later: from another
    thread that could set back the step of the user's."""
    uploader = import_module("comet_ml.file_uploader")
    asset = uploader.preprocess_asset_file(
        dispatched=uploader.FileUpload(path),
        upload_type="asset",
        file_name=name,
        metadata=None,
        overwrite=True,
        copy_to_tmp=True,
        step=None,
    )
    made = experiment._log_preprocessed_asset(
        asset, on_asset_upload=upload.succeeded, on_failed_asset_upload=upload.failed
    )
    if made is None:
        raise DeliveryError("it could not be copied to Comet's temporary folder")
    return made


def _log_publicly(experiment: Any, path: str, name: str, _upload: _Upload) -> Any:
    """The way that every version of Comet has."""
    return experiment.log_asset(path, file_name=name, overwrite=True)


def _await_written(messages: str, offset: int, asset_id: str, size: int) -> None:
    """Wait until Comet has the file in its folder and has noted it, which it does in that order."""
    deadline = monotonic() + WRITTEN_S
    while True:
        with open(messages, "rb") as file:
            file.seek(offset)
            while (line := file.readline()).endswith(b"\n"):
                offset += len(line)
                if asset_id.encode() in line:
                    stored = os.path.join(os.path.dirname(messages), json.loads(line)["payload"]["file_path"])
                    if os.path.getsize(stored) != size:
                        raise DeliveryError(f"Comet has {os.path.getsize(stored)} bytes of {size}")
                    return
        if monotonic() > deadline:
            raise DeliveryError(f"Comet has not written it within {WRITTEN_S:.0f} s")
        sleep(0.01)
