"""Making a recording, and writing the agent's part of it."""

from __future__ import annotations

import mmap
import os

from memtrack.errors import RecordingError
from memtrack.recording import layout
from memtrack.recording.epochs import Epoch, EpochWriter
from memtrack.recording.layout import Head, Layout, pack_header, pack_name, pack_row
from memtrack.recording.marks_view import MarkReader
from memtrack.recording.records import Event, newest_text, pack_event
from memtrack.sampling.window import NO_STEP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.recording.reader import RecordingReader
    from memtrack.recording.records import Stack, Verdict
    from memtrack.sampling.window import Row

_PEAK_WORD = layout.CONTROL // 8 + layout.PEAK


def create(path: str, size: int, fields: dict[str, str]) -> None:
    """Make an empty recording of ``size`` bytes, mode 0600, all of it allocated.

    A sparse file on a disk that fills up later would kill the training process with SIGBUS at the next write to its
    map; here a full disk is an error before anything has started. Raises RecordingError.
    """
    header = pack_header(fields)
    try:
        # O_EXCL also refuses a symbolic link of that name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise RecordingError(
            f"cannot make the recording {path}: {exc.strerror}. Choose a folder with MEMTRACK_DIR."
        ) from exc
    try:
        if hasattr(os, "fchmod"):
            os.fchmod(fd, 0o600)  # a umask may have taken bits away
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:  # macOS, Windows: writing is the only way to be sure of the space
            for _ in range(0, size, 1 << 16):
                os.write(fd, bytes(min(1 << 16, size)))
            os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, header)
        os.pwrite(fd, layout.NOW_BODY.pack(NO_STEP, NO_STEP), layout.NOW)
    except OSError as exc:
        os.unlink(path)
        raise RecordingError(
            f"cannot allocate {size} bytes for the recording {path}: {exc.strerror}. "
            "Free some space, choose another folder with MEMTRACK_DIR, or a smaller MEMTRACK_RECORDING_SIZE."
        ) from exc
    finally:
        os.close(fd)


def put_verdict(fd: int, verdict: Verdict) -> None:
    """Store a verdict in the recording behind ``fd``: on the page that is not the newest."""
    pages = [os.pread(fd, layout.PAGE, layout.VERDICT + turn * layout.PAGE) for turn in (0, 1)]
    newest = newest_text(pages)
    turn = 1 if newest is None else newest[0] + 1
    os.pwrite(fd, verdict.pack(turn), layout.VERDICT + (turn & 1) * layout.PAGE)


class RecordingWriter:
    """The agent's hand in a recording: head, windows, phase rows, events, metric names. One writer, one thread.

    The newest windows stand in a ring, one page each. When the ring is full, its oldest window moves into the history,
    where each page holds ``bin_width`` windows merged into one. When the history is full, pages are merged pairwise and
    the width doubles: the file never grows, resolution falls, and minima, maxima and their marks stay exact. Pairs are
    merged a few at a time with each window, so that no tick is late because of it.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._layout = Layout(os.fstat(self._fd).st_size)
        self._map = mmap.mmap(self._fd, layout.METRICS)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self.marks = MarkReader(self._map)
        """The trainer's part, to be read."""
        self._turn = 0
        self._beat = 0
        self._peak, self._peak_mib = 0, float("nan")
        self._events = 0
        self.metric_ids: dict[str, int] = {}
        self.merged = 0
        self.dropped = 0
        self.windows = 0
        self.bin_width = 1
        self._bin: Row | None = None  # the newest page of history, still growing
        self._bin_page = -1
        self._bins: list[tuple[int, int]] = []
        """(first window, page) of each page of history but the growing one, oldest first."""
        self._free = list(range(self._layout.bins))
        self._narrow = 0  # bins from this position on have not been merged to bin_width yet
        self._epochs = EpochWriter(self._fd)
        self._phase_slots: dict[int, int] = {}
        self._phase_turns = [0] * layout.PHASE_COUNT

    @property
    def fresh(self) -> bool:
        """Whether no agent has published anything in this recording yet."""
        return self._words[layout.HEAD // 8] == self._words[(layout.HEAD + layout.HEAD_SLOT) // 8] == 0

    def go_on(self, reader: RecordingReader) -> None:
        """Take up where another agent has stopped, wherever it was killed. ``reader`` reads the same recording."""
        head, words = reader.head(), self._words
        self._turn = max(words[layout.HEAD // 8], words[(layout.HEAD + layout.HEAD_SLOT) // 8])
        self._beat = max(words[layout.PULSE // 8], words[(layout.PULSE + layout.LINE) // 8])
        self._events = max((event.number + 1 for event in reader.events()), default=0)
        self.metric_ids = {metric: number for number, metric in enumerate(reader.metrics())}
        self.merged, self.dropped, self.bin_width = head.merged, head.dropped, head.bin_width
        self.windows = reader.newest_number() + 1
        self._epochs.go_on(reader.epochs())
        for slot in range(layout.PHASE_COUNT):
            pages = [os.pread(self._fd, layout.PAGE, Layout.phase_offset(slot, turn)) for turn in (0, 1)]
            whole = [page for page in pages if layout.row_span(page) is not None]
            if not whole:
                break
            phase = layout.row_span(whole[0])
            self._phase_slots[phase[0] if phase else 0] = slot
            # the page that was written last is the one of its parity; a torn one is written again
            turns = [layout.row_turn(page) for page in whole]
            newer = len(turns) == 2 and (turns[1] - turns[0]) & 0xFFFF == 1
            self._phase_turns[slot] = turns[1] if newer else turns[0]
        bins = [(first, (offset - self._layout.bins_start) // layout.PAGE) for (first, _), offset in reader.history()]
        taken = {page for _, page in bins}
        self._free = [page for page in range(self._layout.bins) if page not in taken]
        if bins:
            *self._bins, (_, self._bin_page) = bins
            self._bin = layout.unpack_row(
                os.pread(self._fd, layout.PAGE, self._layout.bin_offset(self._bin_page)), list(self.metric_ids)
            )

    def publish(self, head: Head) -> None:
        """Make ``head`` the newest, after filling in what the writer knows: windows and merging."""
        head.windows = self.windows
        head.bin_width = self.bin_width
        head.merged = self.merged
        self._turn += 1
        self._put(layout.HEAD + (self._turn & 1) * layout.HEAD_SLOT, self._turn, head.pack())

    def pulse(self, now_ns: int, rss_mib: float, usage_mib: float, headroom_pct: float, asked: int = 0) -> None:
        """Leave the last sample, and the highest since the trainer last asked for a new one.

        ``asked`` is ``peak_asked`` as it was before the sample was taken: one that was taken before the trainer asked
        is none of what comes after.
        """
        self._beat += 1
        if asked != self._peak:
            self._peak, self._peak_mib = asked, rss_mib
        elif not rss_mib <= self._peak_mib:
            self._peak_mib = rss_mib
        body = layout.PULSE_BODY.pack(now_ns, rss_mib, usage_mib, headroom_pct, self._peak, self._peak_mib)
        self._put(layout.PULSE + (self._beat & 1) * layout.LINE, self._beat, body)

    def beat(self, now_ns: int) -> None:
        """The last sample still holds. One word is written, which a kill leaves old or new."""
        self._words[(layout.PULSE + (self._beat & 1) * layout.LINE) // 8 + 1] = now_ns

    @property
    def peak_asked(self) -> int:
        """How often the trainer has asked for a new highest sample to be begun."""
        return self._words[_PEAK_WORD]

    @property
    def peak_begun(self) -> int:
        """Which of these requests the highest sample has been begun for."""
        return self._peak

    def set_quiet(self, quiet: bool) -> None:
        """Tell the trainer whether to leave the agent alone when phases begin and end."""
        self._words[layout.QUIET // 8] = quiet

    def _put(self, at: int, turn: int, body: bytes) -> None:
        self._words[at // 8] = 0
        self._bytes[at + 8 : at + 8 + len(body)] = body
        self._words[at // 8] = turn

    def append(self, row: Row) -> None:
        """Store a finished window. Numbers must follow each other."""
        self._name_metrics(row)
        ring = self._layout.ring
        if row.first >= ring:
            self._move_to_history(row.first - ring)
        os.pwrite(self._fd, pack_row(row, self.metric_ids), self._layout.ring_offset(row.first))
        self.windows = row.first + 1

    def put_phase(self, row: Row) -> None:
        """Store what is known of a phase so far. ``row.first`` is the phase's id; 0 is everything, and comes first."""
        slot = self._phase_slots.setdefault(row.first, len(self._phase_slots))
        if slot >= layout.PHASE_COUNT:
            return
        self._name_metrics(row)
        self._phase_turns[slot] += 1
        turn = self._phase_turns[slot]
        os.pwrite(self._fd, pack_row(row, self.metric_ids, turn), Layout.phase_offset(slot, turn))

    def put_epoch(self, row: Row, epoch: int, number: int) -> None:
        """Store what is known so far of an epoch, which is the ``number``-th that there was, counted from 0."""
        self._epochs.put(Epoch(row, epoch, number))

    def event(self, kind: str, time_ns: int, step: int = -1, value: float = 0.0, text: str = "") -> None:
        """Note that something happened. The newest 512 events are kept."""
        event = Event(self._events, kind, time_ns, step, value, text)
        offset = layout.EVENTS + (self._events % layout.EVENT_COUNT) * layout.EVENT_SIZE
        os.pwrite(self._fd, pack_event(event), offset)
        self._events += 1

    def put_stack(self, stack: Stack, slot: int) -> None:
        """Store a stack in one of ``STACK_COUNT`` slots."""
        os.pwrite(self._fd, stack.pack(), layout.STACKS + slot * layout.PAGE)

    def stacks(self) -> dict[int, Stack]:
        """The stacks that are stored, by slot."""
        from memtrack.recording.records import Stack

        pages = (os.pread(self._fd, layout.PAGE, layout.STACKS + n * layout.PAGE) for n in range(layout.STACK_COUNT))
        found = enumerate(map(Stack.unpack, pages))
        return {slot: stack for slot, stack in found if stack is not None}

    def put_verdict(self, verdict: Verdict) -> None:
        """Store how the process ended."""
        put_verdict(self._fd, verdict)

    def sync(self) -> None:
        """Put everything on the disk, for the end of a recording: the page cache outlives processes, not machines."""
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)

    def close(self) -> None:
        """Unmap and close."""
        self.marks.close()
        self._words.release()
        self._bytes.release()
        self._map.close()
        os.close(self._fd)

    # -- history ----------------------------------------------------------------------------------------------------

    def _move_to_history(self, number: int) -> None:
        """Copy the window that is about to be overwritten in the ring."""
        page = os.pread(self._fd, layout.PAGE, self._layout.ring_offset(number))
        row = layout.unpack_row(page, list(self.metric_ids))
        if row is None or row.first != number:
            return
        growing = self._bin
        if growing is not None and growing.last >= number:
            return  # an agent that was killed before it had stored the next window has moved it already
        if growing is not None and growing.first // self.bin_width == number // self.bin_width:
            growing.merge(row)
            self.merged += 1
            self._rewrite_bin(growing)
        else:
            if growing is not None:
                if self._narrow == len(self._bins):
                    self._narrow += 1  # no doubling is under way: this bin is as wide as it should be
                self._bins.append((growing.first, self._bin_page))
            self._bin = row
            self._bin_page = self._take_page()
            self._write_bin(self._bin_page, row)
        self._widen_some()

    def _take_page(self) -> int:
        if not self._free:
            self._widen_some(len(self._bins))
        # the page that was freed first: who is reading the history finds what it listed for as long as can be
        return self._free.pop(0)

    def _write_bin(self, page: int, row: Row) -> None:
        os.pwrite(self._fd, pack_row(row, self.metric_ids), self._layout.bin_offset(page))

    def _rewrite_bin(self, row: Row) -> None:
        """On another page than it stands on, so that a kill half-way through leaves the old one."""
        page = self._take_page()
        self._write_bin(page, row)
        self._free.append(self._bin_page)
        self._bin_page = page

    def _widen_some(self, pairs: int = 4) -> None:
        """Merge a few pairs of bins, if the history is nearly full or a doubling is under way."""
        if self._narrow >= len(self._bins):
            if len(self._free) > self._layout.bins // 8:
                return
            self.bin_width *= 2
            self._narrow = 0
        ids = list(self.metric_ids)
        for _ in range(pairs):
            at = self._narrow
            if at >= len(self._bins):
                break
            self._narrow += 1
            if at + 1 < len(self._bins) and self._same_bin(self._bins[at][0], self._bins[at + 1][0]):
                self._merge_pair(at, ids)

    def _same_bin(self, first: int, second: int) -> bool:
        return first // self.bin_width == second // self.bin_width

    def _merge_pair(self, at: int, ids: list[str]) -> None:
        (first, left_page), (_, right_page) = self._bins[at], self._bins[at + 1]
        left = layout.unpack_row(os.pread(self._fd, layout.PAGE, self._layout.bin_offset(left_page)), ids)
        right = layout.unpack_row(os.pread(self._fd, layout.PAGE, self._layout.bin_offset(right_page)), ids)
        if left is None or right is None:
            return
        left.merge(right)
        page = self._free.pop(0)
        self._write_bin(page, left)
        self._free += [left_page, right_page]
        self._bins[at : at + 2] = [(first, page)]
        self.merged += 1

    def _name_metrics(self, row: Row) -> None:
        """Give an id to each metric that is new. Beyond 255 they are left out and counted."""
        for metric in row.cells:
            if metric not in self.metric_ids:
                if len(self.metric_ids) >= layout.NAME_COUNT:
                    self.dropped += 1
                    continue
                number = len(self.metric_ids)
                os.pwrite(self._fd, pack_name(metric), layout.METRICS + number * layout.LINE)
                self.metric_ids[metric] = number
        if len(row.cells) > layout.MAX_CELLS:
            self.dropped += len(row.cells) - layout.MAX_CELLS
