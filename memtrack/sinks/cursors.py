"""Cursors: how far each sink has got, kept in the recording by whoever delivers."""

from __future__ import annotations

import os

from memtrack.recording import layout


class CursorWriter:
    """Writes the cursors of one recording. One writer at a time; not thread-safe."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._slots: dict[str, int] = {}
        self._turn = 0

    def put(self, key: str, delivered: int) -> None:
        """Note that all windows before number ``delivered`` have arrived. Of more than 32 sinks the oldest goes."""
        slot = self._slots.setdefault(key, len(self._slots) % layout.CURSOR_COUNT)
        self._turn += 1
        offset = layout.CURSORS + (2 * slot + (self._turn & 1)) * layout.LINE
        os.pwrite(self._fd, layout.pack_cursor(self._turn, delivered, key), offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
