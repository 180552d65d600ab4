"""The archive of an offline experiment whose process has died: made of what Comet has left in its temporary folder, and
of the windows in the recording. Needs nothing of Comet's.

An archive is a zip with ``experiment.json``, ``messages.json`` (a JSON object a line, in the order they were logged),
and a file for each asset, which a line names. Comet makes it when the experiment ends; until then it is an empty zip.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from time import time
from typing import IO, TYPE_CHECKING, Any

from memtrack.errors import DeliveryError, RejectedError
from memtrack_comet._figures import UNSAVED_S, others_of, series_name, tags_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memtrack.sinks import Batch, RunFigures

    Point = tuple[str, int]  # name of the series, time

EXPERIMENT, MESSAGES = "experiment.json", "messages.json"

_LONGEST = 1 << 20
_RESUME = ("create", "get", "get_or_create")


class Archive:
    """A sink for an experiment that was offline. What it is given waits beside the archive until ``finish``.

    ``finish`` puts a new archive in the place of the old one, at once and whole. One that is complete already gets what
    it lacks. Comet's temporary folder stays as it is.

    Raises RejectedError if the archive is no longer there, or no archive; DeliveryError if it cannot be read.
    """

    name = "comet"
    unsaved_s = UNSAVED_S  # what has been written of it is found, and not written again

    def __init__(self, target: dict[str, str]) -> None:
        self._target = target
        self._experiment_key = target.get("key", "")
        self._path = target.get("archive", "").replace("*", self._experiment_key)
        self._waiting = f"{self._path}.memtrack"
        if re.fullmatch("[A-Za-z0-9]{32,50}", self._experiment_key) is None:
            raise RejectedError("the recording names no experiment of Comet's", run_gone=True)
        try:
            _check_place(self._path)
            self._known = self._find_known()
        except RejectedError:
            raise
        except FileNotFoundError:
            raise RejectedError(f"{self._path} is no longer there", run_gone=True) from None
        except OSError as exc:
            raise _unreadable(self._path, exc) from exc

    @property
    def key(self) -> str:
        return f"comet:{self._experiment_key[-34:]}"

    def write(self, batch: Batch) -> None:
        try:
            with _open_own(self._waiting, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
                for name, value, timestamp_ms in batch.points():
                    point = (series_name(name), timestamp_ms)
                    # a batch may come again, and the last one before a kill may have arrived
                    if point not in self._known:
                        file.write(_line("metric_msg", _metric(*point, value)))
                        self._known.add(point)
        except OSError as exc:
            raise _unreadable(self._waiting, exc) from exc

    def finish(self, figures: RunFigures) -> None:
        new = f"{self._path}.new"
        try:
            with _open_own(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
                with (
                    zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
                    Left(self._path, self._target) as left,
                ):
                    self._compose(archive, left, figures)
                file.flush()
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(self._path).st_mode))
                os.fsync(file.fileno())
            os.replace(new, self._path)
        except OSError as exc:
            raise _unreadable(self._path, exc) from exc
        _remove(self._waiting)

    def close(self) -> None:
        """Nothing is held; what waits is there for the next."""

    def _compose(self, archive: zipfile.ZipFile, left: Left, figures: RunFigures) -> None:
        assets: dict[str, None] = {}
        with archive.open(MESSAGES, "w", force_zip64=True) as file:
            there = set()
            for line, names in left.messages():
                file.write(line)
                assets.update(dict.fromkeys(names))
                there.add(_point(line))
            for line in _lines(self._waiting):
                # a kill may have come between the new archive and the end of what waits
                if _point(line) not in there:
                    file.write(line)
            for name, value in others_of(figures).items():
                file.write(_line("log_other", {"key": name, "value": value}))
        for name in assets:
            left.copy(name, archive)
        archive.writestr(EXPERIMENT, json.dumps(self._describe(left.experiment, figures)))

    def _describe(self, found: dict[str, Any], figures: RunFigures) -> dict[str, Any]:
        """What Comet writes of an experiment at its end, and how it ended."""
        target = self._target
        stop_ms = round(1000 * (figures.end_wall_s or time()))
        how = target.get("how", "").split()
        description: dict[str, Any] = found or {
            "offline_id": self._experiment_key,
            "project_name": target.get("project"),
            "workspace": target.get("workspace"),
            "start_time": int(target["start"]) if target.get("start", "").isdigit() else stop_ms,
            "stop_time": stop_ms,
            "tags": [],
            "resume_strategy": next((word for word in how if word in _RESUME), "create"),
            "user_provided_experiment_key": "own_key" in how,
            "comet_start_sourced": "comet_start" in how,
            "customer_error_reported": False,
            "customer_error_message": None,
        }
        if figures.is_bad_end:
            # where Comet itself notes an exception that ended the script
            description["customer_error_reported"] = True
            description["customer_error_message"] = figures.verdict_text or tags_of(figures)[0]
        description["tags"] = list(dict.fromkeys([*description.get("tags", ()), *tags_of(figures)]))
        return description

    def _find_known(self) -> set[Point | None]:
        """The points of memtrack's that are there already."""
        _cut_torn_line(self._waiting)
        with Left(self._path, self._target) as left:
            known = {_point(line) for line, _ in left.messages()}
        return known | {_point(line) for line in _lines(self._waiting)}


class Left:
    """What is left of an experiment: a complete archive, else the folder that Comet makes it of, else nothing.

    Usable as a context manager.
    """

    def __init__(self, path: str, target: dict[str, str]) -> None:
        self._archive: zipfile.ZipFile | None = None
        self._folder = target.get("folder", "")
        self.experiment: dict[str, Any] = {}
        """The archive's own description; empty if there is no complete archive."""
        try:
            self._archive = zipfile.ZipFile(path)
            with self._archive.open(EXPERIMENT) as file:
                self.experiment = dict(json.loads(file.read(_LONGEST)))
            self._archive.getinfo(MESSAGES)
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError):
            # empty, or torn
            self.close()
            self._archive, self.experiment = None, {}

    def __enter__(self) -> Left:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def messages(self) -> Iterator[tuple[bytes, list[str]]]:
        """Each whole line, with the names of the assets that it is about. Lines about assets that are not there are
        left out: where one is, Comet's readers skip all the rest."""
        try:
            file = self.open(MESSAGES)
        except FileNotFoundError:
            return
        with file:
            for line in file:
                try:
                    payload = json.loads(line)["payload"]
                    items = payload.get("items") or ()
                    named = [payload.get("file_path"), payload.get("thumbnail_path"), *(i["file_path"] for i in items)]
                except (AttributeError, KeyError, TypeError, ValueError):
                    continue  # torn by the kill
                names = [name for name in named if name]
                if all(map(self._has, names)):
                    yield line.rstrip() + b"\n", names

    def copy(self, name: str, archive: zipfile.ZipFile) -> None:
        """Copy an asset into an archive."""
        with self.open(name) as source, archive.open(name, "w", force_zip64=True) as file:
            while part := source.read(1 << 20):
                file.write(part)

    def _has(self, name: str) -> bool:
        try:
            self.open(name).close()
        except (KeyError, OSError):
            return False
        return name not in (EXPERIMENT, MESSAGES)

    def size(self, name: str) -> int:
        """The size of an asset in bytes. Raises KeyError or OSError."""
        if self._archive is not None:
            return self._archive.getinfo(name).file_size
        return os.path.getsize(os.path.join(self._folder, os.path.basename(name)))

    def open(self, name: str) -> IO[bytes]:
        """A file of the experiment's, to be read. Raises KeyError or OSError."""
        if self._archive is not None:
            return self._archive.open(name)
        if not self._folder or os.path.basename(name) != name:
            raise FileNotFoundError(name)
        return _open_own(os.path.join(self._folder, name), os.O_RDONLY)


def _check_place(path: str) -> None:
    """Only an archive is replaced: the recording that names it may be a stranger's."""
    with _open_own(path, os.O_RDONLY) as file:
        if not path.endswith(".zip") or file.read(2) != b"PK":
            raise RejectedError(f"{path} is no archive of Comet's", run_gone=True)


def _open_own(path: str, flags: int) -> IO[bytes]:
    """Open a regular file of this user's, and no link to one. Raises OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or (hasattr(os, "geteuid") and status.st_uid != os.geteuid()):
        os.close(fd)
        raise RejectedError(f"{path} is no file of this user's", run_gone=True)
    return os.fdopen(fd, "rb" if flags == os.O_RDONLY else "r+b" if flags & os.O_RDWR else "ab")


def _lines(path: str) -> Iterator[bytes]:
    try:
        with _open_own(path, os.O_RDONLY) as file:
            yield from file
    except FileNotFoundError:
        return


def _cut_torn_line(path: str) -> None:
    size = sum(len(line) for line in _lines(path) if line.endswith(b"\n"))
    if os.path.exists(path):
        os.truncate(path, size)


def _point(line: bytes) -> Point | None:
    """Series and time that a line is about; None if it is about something else."""
    if b'"sys.' not in line:
        return None
    try:
        payload = json.loads(line)["payload"]
        return str(payload["metric"]["metricName"]), int(payload["local_timestamp"])
    except (KeyError, TypeError, ValueError):
        return None


def _metric(name: str, timestamp_ms: int, value: float) -> dict[str, Any]:
    """A point as Comet writes it; like Comet, it has words for what JSON has no number for."""
    number: Any = value
    if value != value:
        number = "NaN"
    elif value in (float("inf"), float("-inf")):
        number = "Infinity" if value > 0 else "-Infinity"
    metric = {"epoch": None, "metricName": name, "metricValue": number, "step": None}
    return {"local_timestamp": timestamp_ms, "metric": metric}


def _line(kind: str, payload: dict[str, Any]) -> bytes:
    return json.dumps({"payload": payload, "type": kind}, separators=(",", ":")).encode() + b"\n"


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _unreadable(path: str, exc: OSError) -> DeliveryError:
    return DeliveryError(f"cannot read or write {path}: {exc.strerror or exc}")
