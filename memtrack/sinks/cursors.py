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
        table = os.pread(self._fd, layout.CURSOR_COUNT * 2 * layout.LINE, layout.CURSORS)
        newest: dict[int, tuple[int, int]] = {}  # slot -> (turn, line)
        for line in range(layout.CURSOR_COUNT * 2):
            cursor = layout.unpack_cursor(table[line * layout.LINE : (line + 1) * layout.LINE])
            if cursor is not None:
                newest[line // 2] = max(newest.get(line // 2, (0, 0)), (cursor[0], line))
                self._slots[cursor[2]] = line // 2
        self._turn = max((turn for turn, _ in newest.values()), default=0)
        self._lines = {slot: line for slot, (_, line) in newest.items()}

    def put(self, key: str, delivered: int) -> None:
        """Note that all windows before number ``delivered`` have arrived. Of more than 32 sinks the oldest goes."""
        slot = self._slots.setdefault(key, len(self._slots) % layout.CURSOR_COUNT)
        self._turn += 1
        # the line of the two that is not the newest
        line = self._lines[slot] = self._lines.get(slot, 2 * slot) ^ 1
        os.pwrite(self._fd, layout.pack_cursor(self._turn, delivered, key), layout.CURSORS + line * layout.LINE)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
