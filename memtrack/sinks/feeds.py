"""Feeds: which sink gets which part of a recording, how it gets there, and how far it has got: that is kept in the
recording by whoever delivers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memtrack.errors import RejectedError
from memtrack.notices import warn_once
from memtrack.recording import layout
from memtrack.recording.descriptor import Descriptor
from memtrack.recording.records import Feed
from memtrack.sinks.base import Batch
from memtrack.sinks.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from memtrack.recording.reader import RecordingReader
    from memtrack.sampling.window import Row
    from memtrack.sinks.base import Sink
    from memtrack.sinks.figures import RunFigures

BATCH_WINDOWS = 64


class Halted(Exception):
    """The delivery is no longer ours: whoever comes next goes on from the last note."""


class Delivery:
    """One feed on its way from the recording to its sink: the relay walks it, or a process that comes later.

    ``note`` keeps the record after each step and raises Halted if that is not wanted any more. A batch that was taken
    but not noted is sent again by whoever comes next.
    """

    def __init__(
        self,
        reader: RecordingReader,
        sink: Sink,
        record: Feed,
        metrics: str | tuple[str, ...],
        note: Callable[[Feed], None],
        *,
        selective: bool,
    ) -> None:
        self.sink = sink
        self.record = record
        self.windows = 0
        """Windows that the sink has taken."""
        self.merged = 0
        """Those of them that came merged, because the recording was full."""
        self.refusal = ""
        """What the sink said when it refused something for good last."""
        self._reader = reader
        self._metrics = metrics
        self._selection = Selection(metrics) if selective else None
        self._note = note

    def holds(self, row: Row) -> bool:
        """Whether a window is this feed's."""
        return holds(self.record, row)

    def send(self) -> None:
        """Deliver the windows that are there. Raises what the sink does, but for refusals: those windows are lost,
        and counted."""
        for rows in self._batches():
            mine = [row for row in rows if self.holds(row)]
            # counted when all of it is through: a batch that fails half-way is repeated as a whole
            batch, selection = self._choose(mine)
            refused = self._write(batch)
            self._selection = selection
            self.record.dropped += refused
            self.windows += _count(mine) - refused
            self.merged += _count(row for row in mine if row.last > row.first)
            self.record.next = rows[-1].last + 1
            self._note(self.record)

    def send_rest(self) -> None:
        """Deliver the points that are held back because later ones might make them superfluous. Raises as ``send``."""
        if self._selection is not None:
            selection = self._selection.copy()
            self.record.dropped += self._write(Batch((), self._metrics, selection.rest()))
            self._selection = selection

    def finish(self, figures: RunFigures, *, conclude: bool = False) -> None:
        """Deliver the final figures, and end the run if ``conclude``; afterwards the feed has everything."""
        figures = figures._replace(dropped=figures.dropped + self.record.dropped)
        try:
            self.sink.finish(figures)
            end = getattr(self.sink, "conclude", None)
            if conclude and end is not None:
                end(figures)
        except RejectedError as exc:
            self.refusal = f"the final figures: {exc}"
        self.close()
        self.record.done = True
        self._note(self.record)

    def close(self) -> None:
        """Close the sink. Never raises."""
        try:
            self.sink.close()
        except Exception as exc:  # a sink should not, but it is not the training's fault
            key = self.record.key
            warn_once(f"closing {key}", f"{key} could not be closed ({type(exc).__name__}: {exc}).")

    def _batches(self) -> Iterator[list[Row]]:
        rows: list[Row] = []
        for row in self._reader.windows(self.record.next):
            rows.append(row)
            if len(rows) == BATCH_WINDOWS:
                yield rows
                rows = []
        if rows:
            yield rows

    def _choose(self, rows: list[Row]) -> tuple[Batch, Selection | None]:
        """What of these windows is to be sent, and the selection as it stands afterwards."""
        if self._selection is None:
            return Batch(rows, self._metrics), None
        selection = self._selection.copy()
        return Batch(rows, self._metrics, selection.take(rows)), selection

    def _write(self, batch: Batch) -> int:
        """Send a batch, by halves if it is refused, so that a bad window costs no other. Returns how many it cost."""
        if not batch.windows and next(batch.points(), None) is None:
            return 0
        try:
            self.sink.write(batch)
        except RejectedError as exc:
            halves = None if exc.run_gone else batch.halves()
            if halves is None:
                lost = max(_count(batch.windows), 1)
                self.refusal = f"{lost} windows: {exc}"
                return lost
            return self._write(halves[0]) + self._write(halves[1])
        return 0


def holds(feed: Feed, row: Row) -> bool:
    """Whether a window's middle lies between the feed's start and its end."""
    middle = (row.start_ns + row.end_ns) // 2
    return middle >= feed.start_ns and (feed.end_ns is None or middle < feed.end_ns)


def undelivered(reader: RecordingReader, feed: Feed) -> int:
    """How many windows of a feed its sink has not got."""
    return _count(row for row in reader.windows(feed.next) if holds(feed, row))


def _count(rows: Iterable[Row]) -> int:
    return sum(row.last - row.first + 1 for row in rows)


class FeedWriter:
    """Writes the feeds of one recording. One writer at a time; not thread-safe."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = Descriptor(os.open(path, os.O_RDWR | os.O_CLOEXEC))
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
        if not self._file.is_ours:  # somebody in this process has closed it, and may have another file there
            self._reopen()
        os.pwrite(self._file.fd, feed.pack(self._turn), layout.FEEDS + line * layout.FEED_SIZE)
        if feed.done:
            self._done.add(feed.key)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _reopen(self) -> None:
        again = Descriptor(os.open(self._path, os.O_RDWR | os.O_CLOEXEC))
        if not again.is_as(self._file):
            again.close()
            raise FileNotFoundError(f"{self._path} is another file by now")
        self._file = again

    def _table(self) -> Iterator[tuple[int, int, Feed]]:
        size = layout.FEED_SIZE
        table = os.pread(self._file.fd, layout.FEED_COUNT * 2 * size, layout.FEEDS)
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
