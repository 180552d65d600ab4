"""Feeds: which sink gets which part of a recording and how far it has got, kept in it by whoever delivers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memtrack.recording import layout
from memtrack.recording.records import Feed

if TYPE_CHECKING:
    from collections.abc import Iterator


class FeedWriter:
    """Writes the feeds of one recording. One writer at a time; not thread-safe."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._slots: dict[str, int] = {}
        self._lines: dict[int, int] = {}
        """The newest of the two records of each slot."""
        self._done: set[str] = set()
        self._turn = 0
        turns: dict[int, int] = {}
        for line, turn, feed in self._table():
            self._turn = max(self._turn, turn)
            slot = line // 2
            if turn > turns.get(slot, 0):
                turns[slot], self._lines[slot] = turn, line
                self._slots = {key: other for key, other in self._slots.items() if other != slot}
                self._slots[feed.key] = slot
                self._done.discard(feed.key)
                if feed.done:
                    self._done.add(feed.key)

    def put(self, feed: Feed) -> None:
        """Note how far a feed has got. Of more than 32, the first that is done gives way, else the first."""
        slot = self._slots.get(feed.key)
        if slot is None:
            slot = self._slots[feed.key] = self._free_slot()
        self._turn += 1
        # the record of the two that is not the newest
        line = self._lines[slot] = self._lines.get(slot, 2 * slot) ^ 1
        os.pwrite(self._fd, feed.pack(self._turn), layout.FEEDS + line * layout.FEED_SIZE)
        if feed.done:
            self._done.add(feed.key)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _table(self) -> Iterator[tuple[int, int, Feed]]:
        size = layout.FEED_SIZE
        table = os.pread(self._fd, layout.FEED_COUNT * 2 * size, layout.FEEDS)
        for line in range(layout.FEED_COUNT * 2):
            found = Feed.unpack(table[line * size : (line + 1) * size])
            if found is not None:
                yield line, *found

    def _free_slot(self) -> int:
        taken = set(self._slots.values())
        for slot in range(layout.FEED_COUNT):
            if slot not in taken:
                return slot
        oldest = next((key for key in self._slots if key in self._done), next(iter(self._slots)))
        self._done.discard(oldest)
        return self._slots.pop(oldest)
