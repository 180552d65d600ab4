"""Taking over the recording that ``memtrack run`` has begun of this very process, instead of making a second one.

The process goes on in it with an agent of its own, which relieves the launcher's: see ``relief``.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from memtrack.config import Settings, check_directory
from memtrack.errors import RecordingError
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader

VARIABLE = "MEMTRACK_RUN"
"""Set below ``memtrack run``: the launcher's pid, a colon, the folder of its recording."""

PATIENCE_S = 1.0
"""How long the launcher may take to make the recording, which it can only once this process runs."""

_SAME_PROCESS = ("pid", "start_ticks", "boot_id", "pid_ns")
_SAME_SETTINGS = ("size", "interval_s", "tick_s", "cpu_budget_pct")
_OURS = ("own", "program", "launcher", "end_run", "keep", "keep_days", "metrics", "selective", "stacks", "python")
"""Fields of the header that become those of the process."""


class Adopted:
    """A recording whose header has become that of this process."""

    def __init__(self, path: str, fields: dict[str, str]) -> None:
        """Raises OSError."""
        self.path = path
        with RecordingReader(path) as reader:
            self._before = reader.fields
        self._put({**self._before, **{key: fields[key] for key in _OURS}, "adopted": "1"})

    def give_back(self) -> None:
        """It did not work: leave the recording to the launcher's agent. Never raises."""
        try:
            self._put(self._before)
        except OSError:
            pass

    def _put(self, fields: dict[str, str]) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            # at once, and within a page: a kill leaves this header or the one before
            os.pwrite(fd, layout.pack_header(fields), 0)
        finally:
            os.close(fd)


def announcement(folder: str) -> str:
    """What the launcher, this process, puts into ``VARIABLE``."""
    return f"{os.getpid()}:{folder}"


def adopt(settings: Settings, fields: dict[str, str]) -> Adopted | None:
    """Make the launcher's recording that of this process, whose own would have a header with ``fields``.

    None if there is none of this process, or it was begun with other settings. Never raises.
    """
    launcher, _, folder = os.environ.get(VARIABLE, "").partition(":")
    try:
        if not folder or (settings.directory != Settings().directory and os.path.abspath(settings.directory) != folder):
            return None
        check_directory(folder)
        deadline = monotonic() + PATIENCE_S
        while True:
            path = _find(folder, fields)
            if path is not None:
                return Adopted(path, fields) if path else None
            if str(os.getppid()) != launcher or monotonic() > deadline:
                return None
            sleep(0.005)
    except (OSError, ValueError):
        return None


def _find(folder: str, fields: dict[str, str]) -> str | None:
    """Path of the recording; "" if it has other settings; None if there is none, or none yet."""
    for name in os.listdir(folder):
        if f"-{fields['pid']}" not in name or not name.endswith(".mtk"):
            continue
        path = os.path.join(folder, name)
        try:
            with RecordingReader(path) as reader:
                found, state = reader.fields, reader.head().state
        except RecordingError:
            continue  # it is being made
        if any(found.get(key) != fields[key] for key in _SAME_PROCESS) or state in (layout.STOPPED, layout.ENDED):
            continue
        if found.get("own") == "0" or "adopted" in found:
            return path if all(found.get(key) == fields[key] for key in _SAME_SETTINGS) else ""
    return None
