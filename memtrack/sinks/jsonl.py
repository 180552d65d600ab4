"""JSON lines: for people without a tracker, and for ``tail -f``."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

from memtrack.errors import DeliveryError, RecordingError, RejectedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.sinks.base import Batch
    from memtrack.sinks.figures import RunFigures


_BEGINNINGS = (b'{"figures": ', b'{"name": ')
_LONGEST = 1 << 16
"""More than a line may have, in bytes."""


class JsonLinesSink:
    """Appends one JSON object a point to a file: ``{"name", "value", "timestamp_ms"}``, and one with the final figures.

    ``path`` defaults to the recording's with ``.jsonl``; the file gets mode 0600. A repeated batch is written again:
    tell repeated points by name and time stamp. Raises RecordingError if the file cannot be opened.
    """

    name = "jsonl"

    def __init__(self, *, path: str | None = None, recording: str = "memtrack.mtk") -> None:
        self.path = os.path.abspath(path if path is not None else os.path.splitext(recording)[0] + ".jsonl")
        try:
            os.close(self._open())
        except OSError as exc:
            raise RecordingError(f"cannot open {self.path} for the 'jsonl' sink: {exc.strerror}") from exc

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @property
    def key(self) -> str:
        return f"jsonl:{os.path.basename(self.path)}"[-40:]

    @property
    def target(self) -> dict[str, str]:
        return {"path": self.path}

    @classmethod
    def reopen(cls, target: dict[str, str]) -> JsonLinesSink:
        """Go on in the file, behind its last whole line. Only in one of this sink's: a recording may be a stranger's.

        Raises RejectedError if there is no such file, or not of that kind; DeliveryError if it cannot be opened.
        """
        path = target.get("path", "")
        try:
            _cut_torn_line(path)
            return cls(path=path)
        except RejectedError:
            raise
        except FileNotFoundError:
            raise RejectedError(f"{path} is no longer there", run_gone=True) from None
        except OSError as exc:
            raise DeliveryError(f"cannot open {path}: {exc.strerror or exc}") from exc

    def write(self, batch: Batch) -> None:
        self._append(json.dumps(point._asdict()) for point in batch.points())

    def finish(self, figures: RunFigures) -> None:
        self._append([json.dumps({"figures": figures._asdict()})])

    def _append(self, lines: Iterable[str]) -> None:
        # opened each time: a descriptor that is held may be closed by the training, and be its own file's by now
        try:
            with os.fdopen(self._open(), "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as exc:
            raise DeliveryError(f"cannot write to {self.path}: {exc.strerror}") from exc

    def close(self) -> None:
        """Nothing is held."""


def _cut_torn_line(path: str) -> None:
    """Take away a last line that a kill has left without its end: the batch that it belongs to comes again."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(fd, "r+b") as file:
        status = os.fstat(fd)
        head = file.read(len(_BEGINNINGS[0]))
        if not stat.S_ISREG(status.st_mode) or not any(part.startswith(head[: len(part)]) for part in _BEGINNINGS):
            raise RejectedError(f"{path} is no file of the 'jsonl' sink", run_gone=True)
        end = max(status.st_size - _LONGEST, 0)
        file.seek(end)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(end + tail.rfind(b"\n") + 1)
