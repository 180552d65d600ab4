"""JSON lines: for people without a tracker, and for ``tail -f``."""

from __future__ import annotations

import json
import os
from typing import IO, TYPE_CHECKING

from memtrack.errors import DeliveryError, RecordingError

if TYPE_CHECKING:
    from memtrack.sinks.base import Batch, RunFigures


class JsonLinesSink:
    """Appends one JSON object a point to a file: ``{"name", "value", "timestamp_ms"}``, and one with the final figures.

    ``path`` defaults to the recording's with ``.jsonl``; the file gets mode 0600. A repeated batch is written again:
    tell repeated points by name and time stamp. Raises RecordingError if the file cannot be opened.
    """

    def __init__(self, *, path: str | None = None, recording: str = "memtrack.mtk") -> None:
        self.path = path if path is not None else os.path.splitext(recording)[0] + ".jsonl"
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise RecordingError(f"cannot open {self.path} for the 'jsonl' sink: {exc.strerror}") from exc
        self._file: IO[str] = os.fdopen(fd, "w", encoding="utf-8")

    @property
    def key(self) -> str:
        return f"jsonl:{os.path.basename(self.path)}"[-40:]

    def write(self, batch: Batch) -> None:
        self._append(json.dumps(point._asdict()) for point in batch.points())

    def finish(self, figures: RunFigures) -> None:
        self._append([json.dumps({"figures": figures._asdict()})])

    def _append(self, lines: object) -> None:
        try:
            for line in lines:  # type: ignore[attr-defined]
                self._file.write(line + "\n")
            self._file.flush()
        except OSError as exc:
            raise DeliveryError(f"cannot write to {self.path}: {exc.strerror}") from exc

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass
