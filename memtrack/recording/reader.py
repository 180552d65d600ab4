"""Reading a recording: live from another process, or after everybody is dead. Tolerant of whatever a kill leaves.

A recording may come from a stranger. Whatever stands in it, reading it runs nothing, writes nothing, and raises nothing
but RecordingError and RecordingFormatError. It holds one window at a time, and beside it at most a list of the pages of
the history, which takes 40 MiB for the largest recording that is read (``layout.MAX_SIZE``) and 0.2 MiB for one of the
default size. It looks at each page at most ``PASSES`` times, three unless the file is being written.
"""

from __future__ import annotations

import os
import stat

from memtrack.errors import RecordingError, RecordingFormatError
from memtrack.recording import layout
from memtrack.recording.descriptor import Descriptor
from memtrack.recording.epochs import Epoch, unpack_epochs
from memtrack.recording.layout import Head, Layout, Mark, Pulse
from memtrack.recording.marks_view import MarkReader
from memtrack.recording.records import Event, Feed, Stack, Verdict, newest_text, unpack_event, unpack_text
from memtrack.sampling.window import Place, Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from memtrack.sampling.window import Cell


TRIES = 3
"""How often windows that are not found are looked for: they may have moved, or be damaged."""

AHEAD = 16
"""Windows that are held in memory while the history is read: so many may be written meanwhile."""

PASSES = 200
"""How often windows that move on are followed, before what is found counts as all there is."""


class RecordingReader:
    """The parts of a recording, read with ``pread`` so that no more memory is held than what was asked for.

    Opening raises RecordingError or RecordingFormatError; reading never raises for damaged content: what is damaged is
    left out, and so is what was cut off. RecordingError if the disk fails. Safe to use from several threads.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = Descriptor(_open(path))
        try:
            size = os.fstat(self._file.fd).st_size
            try:
                self.fields = layout.unpack_header(os.pread(self._file.fd, layout.PAGE, 0), path)
            except RecordingFormatError:
                # once more: a process that takes the recording over may just be writing its header
                self.fields = layout.unpack_header(os.pread(self._file.fd, layout.PAGE, 0), path)
            if size < layout.MIN_SIZE or self.fields.get("size", str(size)) != str(size):
                raise RecordingFormatError(f"{path}: {size} bytes, its header says {self.fields.get('size')}")
            if size > layout.MAX_SIZE:
                raise RecordingFormatError(f"{path}: {size} bytes; recordings have {layout.MAX_SIZE} at the most")
        except OSError as exc:
            self._file.close()
            if isinstance(exc, RecordingError):
                raise
            raise RecordingError(f"cannot read the recording {path}: {exc.strerror}") from exc
        self.layout = Layout(size)
        self._metrics: list[str] = []

    def fileno(self) -> int:
        """The descriptor that is read from; -1 if it is closed."""
        return self._file.fd if self._file.is_ours else -1

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> RecordingReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- head, names, events ----------------------------------------------------------------------------------------

    def head(self) -> Head:
        """What the agent published last; an empty head if it has published nothing."""
        body = self._newest(layout.HEAD, layout.HEAD_SLOT, layout.HEAD_BODY)
        return Head() if body is None else Head.unpack(body)

    def pulse(self) -> Pulse:
        """The last sample."""
        return Pulse(self._newest(layout.PULSE, layout.LINE, layout.PULSE_BODY.size))

    def _newest(self, start: int, size: int, body: int) -> bytes | None:
        """The body of the newer of two slots."""
        for _ in range(8):
            slots = self._read(start, 2 * size)
            turns = [int.from_bytes(slots[at : at + 8], "little") for at in (0, size)]
            at = 0 if turns[0] > turns[1] else size
            if max(turns) == 0:
                break
            # pread is no snapshot: the slot counts only if its turn still stands after its body was read
            if int.from_bytes(self._read(start + at, 8), "little") == max(turns):
                return slots[at + 8 : at + 8 + body]
        return None

    def metrics(self) -> list[str]:
        """Metric names by id."""
        self._metrics = layout.unpack_names(self._read(layout.METRICS, layout.NAME_COUNT * layout.LINE))
        return self._metrics

    def names(self) -> list[str]:
        """Names of phases, marks and gauges by id; id 0 is nameless."""
        return ["", *layout.unpack_names(self._read(layout.NAMES, layout.NAME_COUNT * layout.LINE))]

    def events(self) -> list[Event]:
        """The newest events, oldest first."""
        ring = self._read(layout.EVENTS, layout.EVENT_COUNT * layout.EVENT_SIZE)
        found = (unpack_event(ring[at : at + layout.EVENT_SIZE]) for at in range(0, len(ring), layout.EVENT_SIZE))
        return sorted((event for event in found if event is not None), key=lambda event: event.number)

    def marks(self) -> list[Mark]:
        """The newest marks of the trainer, oldest first: at most 512, of phases, epochs and what it named."""
        return self._marks(layout.METRICS).drain()

    def place(self) -> Place:
        """Step, epoch and open phases as the trainer marked them last."""
        return self._marks(layout.NAMES).place()

    def _marks(self, size: int) -> MarkReader:
        part = self._read(0, size)
        return MarkReader(part, self._read(0, size))

    # -- windows ----------------------------------------------------------------------------------------------------

    def window(self, number: int) -> Row | None:
        """Window ``number`` if it is still among the newest, at full resolution."""
        row = self._row(self.layout.ring_offset(number))
        return row if row is not None and row.first == row.last == number else None

    def cell(self, number: int, metric: str) -> Cell | None:
        """One metric of window ``number``, as ``window`` has it, for a fifth of the time."""
        page = self._read(self.layout.ring_offset(number), layout.PAGE)
        if layout.row_span(page) != (number, number) or metric not in (self._metrics or self.metrics()):
            return None
        return layout.unpack_cell(page, self._metrics.index(metric))

    def windows(self, since: int = 0) -> Iterator[Row]:
        """All windows from number ``since`` on, oldest first: merged history, then the newest at full resolution.

        A merged row that ends at or after ``since`` is included whole. A few rows are in memory at a time. The
        recording may be written meanwhile: windows that move on are followed to where they went. None is left out;
        should one that was given already be merged with one that was not yet, the merged row is given.
        """
        self.metrics()
        ring = self.layout.ring
        done, tries, passes = since - 1, 0, 0
        while True:
            passes += 1
            newest = self.newest_number()
            first = max(done + 1, newest - ring + 1, 0)
            index, ahead = [], {}
            # who follows the recording finds all that is new in the ring, and need not look through the history
            if tries or done < newest - ring:
                # read now what will move into the history while that is read
                ahead = {number: self.window(number) for number in range(first, min(first + AHEAD, newest + 1))}
                index = self.history(done + 1)
            patient = tries < TRIES and passes < PASSES
            start, moved = done, False
            for span, offset in index:
                row = self._row(offset)
                same = row is not None and (row.first, row.last) == span
                moved = patient and (not same or span[0] > done + 1)
                if moved:
                    break
                if row is not None and same:
                    yield row
                    done = row.last
            moved = moved or (patient and done + 1 < first)
            for number in () if moved else range(max(done + 1, first), newest + 1):
                row = ahead.pop(number, None) or self.window(number)
                if row is not None:
                    yield row
                    done = number
                elif patient and number <= self.newest_number() - ring + 1:
                    moved = True
                    break
            if not moved:
                return
            tries = 1 if done > start else tries + 1

    def _row(self, offset: int) -> Row | None:
        return self._unpack(self._read(offset, layout.PAGE))

    def _unpack(self, page: bytes) -> Row | None:
        row = layout.unpack_row(page, self._metrics or self.metrics())
        if row is not None and len(row.cells) < layout.row_cells(page):
            # metrics that came after the names were read
            row = layout.unpack_row(page, self.metrics())
        return row

    def history(self, since: int = 0) -> list[tuple[tuple[int, int], int]]:
        """First and last window, and offset, of the pages of history that count: of those that overlap, the fullest."""
        pages = []
        for index in range(self.layout.bins):
            offset = self.layout.bin_offset(index)
            span = layout.row_span(self._read(offset, layout.PAGE))
            if span is not None and since <= span[1] >= span[0]:
                pages.append((span[0], -span[1], offset))
        pages.sort()
        kept: list[tuple[tuple[int, int], int]] = []
        end = -1
        for first, last, offset in pages:
            if -last > end:
                kept.append(((first, -last), offset))
                end = -last
        return kept

    def newest_number(self) -> int:
        """Number of the newest window, -1 if there is none.

        From the head, or a window or two further if the agent died between writing a window and its head.
        """
        newest = self.head().windows - 1
        for _ in range(AHEAD):
            span = layout.row_span(self._read(self.layout.ring_offset(newest + 1), layout.PAGE))
            if span != (newest + 1, newest + 1):
                break
            newest += 1
        return newest

    def phases(self) -> dict[str, Row]:
        """What is known of each phase, by its path such as ``train/forward``; ``""`` is the whole recording."""
        self.metrics()
        names = self.names()
        found: dict[str, Row] = {}
        for slot in range(layout.PHASE_COUNT):
            pages = [self._read(Layout.phase_offset(slot, turn), layout.PAGE) for turn in (0, 1)]
            even, odd = (self._unpack(page) for page in pages)
            newest = odd if even is None else even
            if even is not None and odd is not None:
                # written in turn, so that the later one is one ahead
                newest = odd if (layout.row_turn(pages[1]) - layout.row_turn(pages[0])) & 0xFFFF == 1 else even
            if newest is not None and newest.first < len(names):
                found[names[newest.first]] = newest
        return found

    def epochs(self) -> list[Epoch]:
        """What is known of each epoch, oldest first; of more than 64, of several that follow each other."""
        return unpack_epochs(self._read(layout.EPOCHS, layout.EPOCH_COUNT * layout.EPOCH_SIZE))

    # -- feeds, stacks, the end -------------------------------------------------------------------------------------

    def feeds(self) -> list[Feed]:
        """Every run of a tracker that gets a part of the recording, in the order in which they were added."""
        table = self._read(layout.FEEDS, layout.FEED_COUNT * 2 * layout.FEED_SIZE)
        found = []
        for slot in range(layout.FEED_COUNT):
            at = 2 * slot * layout.FEED_SIZE
            records = (
                Feed.unpack(table[at : at + layout.FEED_SIZE]),
                Feed.unpack(table[at + layout.FEED_SIZE : at + 2 * layout.FEED_SIZE]),
            )
            whole = [record for record in records if record is not None]
            if whole:
                found.append(max(whole, key=lambda record: record[0])[1])
        return found

    def stacks(self) -> list[Stack]:
        """Stacks of the training process that were taken at peaks, oldest first."""
        pages = (self._read(layout.STACKS + slot * layout.PAGE, layout.PAGE) for slot in range(layout.STACK_COUNT))
        found = [stack for stack in map(Stack.unpack, pages) if stack is not None]
        return sorted(found, key=lambda stack: stack.number)

    def verdict(self) -> Verdict | None:
        """How the process ended; None while it runs, or if nobody was there to tell."""
        newest = newest_text([self._read(layout.VERDICT + turn * layout.PAGE, layout.PAGE) for turn in (0, 1)])
        return None if newest is None else Verdict.from_fields(newest[1])

    def control(self, word: int) -> int:
        """A control word of the trainer's, such as ``layout.STOP``."""
        return int.from_bytes(self._read(layout.CONTROL + 8 * word, 8), "little")

    def farewell(self) -> dict[str, str]:
        """What Python knew of the end of the process, see ``records.pack_farewell``; empty if it said nothing."""
        found = unpack_text(self._read(layout.FAREWELL, layout.FAREWELL_SIZE))
        return {} if found is None else found[1]

    def _read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes: zeros stand for what is missing from a file that somebody has cut meanwhile."""
        if not self._file.is_ours:
            self._reopen()
        try:
            return os.pread(self._file.fd, size, offset).ljust(size, b"\0")
        except OSError as exc:
            raise RecordingError(f"cannot read the recording {self.path}: {exc.strerror}") from exc

    def _reopen(self) -> None:
        """Somebody in this process has closed the descriptor, as programs do that become daemons."""
        if self._file.fd < 0:
            raise RecordingError(f"cannot read the recording {self.path}: it has been closed")
        again = Descriptor(_open(self.path))
        if not again.is_as(self._file):
            again.close()
            raise RecordingError(f"cannot read the recording {self.path}: it is another file by now")
        self._file = again


def _open(path: str) -> int:
    """A descriptor of a regular file; RecordingError otherwise. Opening anything else might wait, or do something."""
    try:
        _check_regular(os.stat(path), path)
        # not waiting, should it have become a pipe by now
        flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        fd = os.open(path, flags)
    except RecordingError:
        raise
    except OSError as exc:
        raise RecordingError(f"cannot open the recording {path}: {exc.strerror}") from exc
    except ValueError as exc:  # a null character
        raise RecordingError(f"cannot open the recording {path!r}: {exc}") from None
    try:
        _check_regular(os.fstat(fd), path)
    except RecordingError:
        os.close(fd)
        raise
    return fd


def _check_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise RecordingError(f"cannot open the recording {path}: {what}")
