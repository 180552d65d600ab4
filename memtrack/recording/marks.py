"""The trainer's hand in a recording: steps, epochs, phases, named marks, gauges, and requests to the agent."""

from __future__ import annotations

import os
import threading
from struct import Struct
from time import monotonic_ns

from memtrack.recording import layout, records
from memtrack.recording.descriptor import FileMap
from memtrack.recording.layout import GAUGE_BODY, MARK_BODY, MARK_PATH
from memtrack.sampling.window import NO_STEP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.recording.rank import Rank

_pack_mark = Struct(f"{MARK_BODY.format}{MARK_PATH.size}s").pack
_pack_gauge = GAUGE_BODY.pack

# looking these up as attributes of a module takes as long as the rest of a mark
_BEGIN, _END = layout.PHASE_BEGIN, layout.PHASE_END
_COUNT, _LINE, _MARKS = layout.MARK_COUNT, layout.LINE, layout.MARKS
_MARK_SIZE = MARK_BODY.size + MARK_PATH.size
_STEP, _EPOCH = 0, 1
"""The words of the line that tells where the training stands."""

_CUT_WORD = layout.CONTROL // 8 + layout.CUT
_EXITING_WORD = layout.CONTROL // 8 + layout.EXITING
_QUIET_WORD = layout.QUIET // 8
_PEAK_WORD = layout.CONTROL // 8 + layout.PEAK
_PULSE_WORD = layout.PULSE // 8
_NEXT_PULSE_WORD = _PULSE_WORD + layout.LINE // 8
_PULSE_PEAK = 1 + 4
"""Which word of a pulse has the number of the request; the peak is the one after it. See ``layout.PULSE_BODY``."""
_RANK_WORD = layout.CONTROL // 8 + layout.RANK
_STOP_WORD = layout.CONTROL // 8 + layout.STOP
_WRITTEN_WORD = layout.CONTROL // 8 + layout.MARKS_WRITTEN
_REFUSED_WORD = layout.CONTROL // 8 + layout.MARKS_REFUSED

_NAN = float("nan")
WAKE_NS = 50_000_000


class Phase:
    """A phase as a place in the tree of phases: the same name inside another phase is another place."""

    __slots__ = ("children", "depth", "id", "name", "packed", "parent", "path")

    def __init__(self, number: int, name: str, path: str, parent: Phase | None) -> None:
        self.id = number
        self.name = name
        self.path = path
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[str, Phase] = {}
        ids = () if parent is None else (*parent.ids(), number)
        self.packed = MARK_PATH.pack(*ids, *(0,) * (layout.MAX_DEPTH - len(ids)))

    def ids(self) -> tuple[int, ...]:
        """Ids from the outermost phase to this one."""
        return MARK_PATH.unpack(self.packed)[: self.depth]


class MarkWriter:
    """Writes marks into the mapped part of a recording; each call takes less than a microsecond. Thread-safe.

    Every call that writes a line holds one lock, because a line has one writer at a time. A forked child must not use
    its parent's writer: it drops it without touching the lock, which may be held (``memtrack.monitor`` sees to that).
    """

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = FileMap(fd, layout.METRICS)
        finally:
            os.close(fd)
        self._bytes = self._map.view
        self._words = self._bytes.cast("Q")
        self._doubles = self._bytes.cast("d")
        self._lock = threading.RLock()  # re-entrant: a signal handler may mark while the main thread is marking
        self._now = self._bytes[layout.NOW : layout.NOW + layout.NOW_BODY.size].cast("q")
        self._marks = 0
        self._root = self._phase = Phase(0, "", "", None)
        self._open: list[Phase] = []  # what ``begin`` gave and ``end`` has not got back, in the order of entering
        self._names: dict[str, int] = {"": 0}
        self._gauges: dict[str, int] = {}
        self._gauge_turn = 0
        self._wake_due_ns = self._epoch_wake_due_ns = 0
        self.wake: Callable[[bool], None] | None = None
        """Called when a phase begins or ends, at most every 50 ms, and when the epoch changes, as seldom: a sample
        there keeps them apart. It is told whether the agent wants to be left alone."""

    def go_on(self) -> None:
        """Before the first mark: go on with the numbers and names that are there, of an earlier program or monitor of
        this process; what was open then is not any more."""
        part, words = self._bytes, self._words
        with self._lock:
            self._marks = words[_WRITTEN_WORD]
            table = bytes(part[layout.NAMES : layout.NAMES + layout.NAME_COUNT * _LINE])
            self._names.update((name, number) for number, name in enumerate(layout.unpack_names(table), 1))
            names = {number: name for name, number in self._names.items()}
            for at in range(layout.GAUGES, layout.GAUGES + layout.GAUGE_COUNT * _LINE, _LINE):
                _, set_ns, number = GAUGE_BODY.unpack_from(part, at + 8)
                if set_ns:
                    self._gauges[names.get(number, "")] = at
                    self._gauge_turn = max(self._gauge_turn, words[at // 8])
            if self._marks or self._now[_STEP] != NO_STEP or self._now[_EPOCH] != NO_STEP:
                self._now[_STEP] = self._now[_EPOCH] = NO_STEP
                self._mark(layout.EPOCH, 0, 0.0)

    @property
    def last_step(self) -> int:
        """The step that was marked last, by whomever; -1 if none was."""
        return self._now[_STEP]

    def step(self, step: int) -> None:
        """The training has reached this step."""
        # One store of eight bytes: neither a signal nor the end of the process can come in between, so that there is
        # nothing to lock. It is called cold, in each step, and takes as long as what it touches takes to fetch.
        self._now[_STEP] = step

    def epoch(self, epoch: int) -> None:
        """The training has reached this epoch."""
        with self._lock:
            before = self._now[_EPOCH]
            self._now[_EPOCH] = epoch
            try:
                now_ns = self._mark(layout.EPOCH, 0, 0.0)
            except BaseException:
                self._now[_EPOCH] = before
                raise
            # whether or not a phase that has just ended has woken it already
            if now_ns > self._epoch_wake_due_ns:
                self._epoch_wake_due_ns = now_ns + WAKE_NS
                self._wake(now_ns)

    def begin(self, name: str) -> Phase | None:
        """Enter a phase inside those that are open. Returns what ``end`` wants; None if there is no room for it."""
        with self._lock:
            phase = self._phase.children.get(name) or self._new_phase(self._phase, name)
            if phase is not None:
                self._phase = phase
                self._open.append(phase)
                now_ns = self._mark(_BEGIN, phase.id, 0.0)
                if now_ns > self._wake_due_ns:
                    self._wake(now_ns)
            return phase

    def end(self, phase: Phase) -> None:
        """Leave a phase. When threads leave theirs in another order than they entered, the others stay open.

        One that is not open, or is another writer's, is ignored.
        """
        with self._lock:
            if self._phase is phase and phase.parent is not None and self._open[-1] is phase:
                self._open.pop()
                self._phase = phase.parent
            elif not self._close(phase):
                return
            now_ns = self._mark(_END, phase.id, 0.0)
            if now_ns > self._wake_due_ns:
                self._wake(now_ns)

    def mark(self, name: str, value: float = 0.0) -> None:
        """Something worth a note has happened."""
        with self._lock:
            self._mark(layout.MARK, self._name(name), value)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge, which the agent samples from then on."""
        value = float(value)  # raises before anything has changed
        with self._lock:
            at = self._gauges.get(name)
            if at is None:
                if len(self._gauges) >= layout.GAUGE_COUNT:
                    self._words[_REFUSED_WORD] += 1
                    return
                at = self._gauges[name] = layout.GAUGES + len(self._gauges) * layout.LINE
            self._gauge_turn += 1
            body = _pack_gauge(value, monotonic_ns(), self._name(name))
            self._words[at // 8] = 0
            self._bytes[at + 8 : at + 8 + len(body)] = body
            self._words[at // 8] = self._gauge_turn

    def request_cut(self) -> int:
        """Ask the agent to finish the current window now. Returns the request's number; see ``Head.cut``."""
        with self._lock:
            self._words[_CUT_WORD] += 1
            return self._words[_CUT_WORD]

    def request_stop(self) -> None:
        """Ask the agent to finish the recording and exit."""
        self._words[_STOP_WORD] = 1

    def tell_rank(self, rank: Rank | None) -> None:
        """Which rank of a distributed training this process is, for the agents of all of them."""
        if rank is not None:
            self._words[_RANK_WORD] = rank.pack()

    def silence_ns(self) -> int:
        """How long ago the agent took its last sample; huge before the first one."""
        at = self._pulse_at()
        return monotonic_ns() - int.from_bytes(self._bytes[at : at + 8], "little")

    def take_peak_mib(self) -> float:
        """The highest RSS that the agent has sampled since the last call; NaN if it has not looked since.

        What it sees from now on, or was not asked for yet, is for the next call. A microsecond.
        """
        words = self._words
        first, second = words[_PULSE_WORD], words[_NEXT_PULSE_WORD]
        at, turn = (_PULSE_WORD, first) if first > second else (_NEXT_PULSE_WORD, second)
        peak, peak_mib = words[at + _PULSE_PEAK], self._doubles[at + _PULSE_PEAK + 1]
        if turn == 0 or words[at] != turn or peak != words[_PEAK_WORD]:
            return _NAN
        words[_PEAK_WORD] = peak + 1
        return peak_mib

    def _pulse_at(self) -> int:
        """Where the body of the agent's newest pulse lies."""
        first, second = self._words[_PULSE_WORD], self._words[_NEXT_PULSE_WORD]
        return layout.PULSE + 8 if first > second else layout.PULSE + layout.LINE + 8

    def say_farewell(self, fields: dict[str, str]) -> None:
        """Leave what Python knows of the end of the process, see ``records.pack_farewell``."""
        record = records.pack_farewell(fields)
        self._bytes[layout.FAREWELL : layout.FAREWELL + len(record)] = record
        self._words[_EXITING_WORD] = 1

    def close(self) -> None:
        """Unmap. Later calls raise ValueError, so whoever hands out the writer takes it back first."""
        with self._lock:
            for view in (self._now, self._words, self._doubles):
                view.release()
            self._map.close()

    # The rest is called with the lock held.

    def _mark(self, kind: int, name: int, value: float) -> int:
        """Returns the time that the mark carries."""
        phase = self._phase
        now_ns = monotonic_ns()
        step, epoch = self._now
        body = _pack_mark(kind, phase.depth, name, epoch, step, now_ns, value, phase.packed)
        self._marks = number = self._marks + 1
        words = self._words
        at = _MARKS + number % _COUNT * _LINE
        words[at // 8] = 0
        self._bytes[at + 8 : at + 8 + _MARK_SIZE] = body
        words[at // 8] = number
        words[_WRITTEN_WORD] = number
        return now_ns

    def _wake(self, now_ns: int) -> None:
        self._wake_due_ns = now_ns + WAKE_NS
        wake = self.wake
        if wake is not None:
            wake(self._words[_QUIET_WORD] != 0)

    def _name(self, name: str) -> int:
        """Id of a name, given at its first use; 0, the nameless, when the table is full."""
        number = self._names.get(name)
        if number is None:
            if len(self._names) > layout.NAME_COUNT:
                self._words[_REFUSED_WORD] += 1
                return 0
            line = layout.pack_name(name)
            number = self._names[name] = len(self._names)
            at = layout.NAMES + (number - 1) * layout.LINE
            self._bytes[at : at + layout.LINE] = line
        return number

    def _new_phase(self, parent: Phase, name: str) -> Phase | None:
        path = f"{parent.path}/{name}" if parent.path else name
        number = self._name(path) if parent.depth < layout.MAX_DEPTH else 0
        if number == 0:
            self._words[_REFUSED_WORD] += 1
            return None
        phase = parent.children[name] = Phase(number, name, path, parent)
        return phase

    def _close(self, phase: Phase) -> bool:
        """Take ``phase`` out of the open ones and find the place that the others make. Whether it was open."""
        at = len(self._open) - 1
        while at >= 0 and self._open[at] is not phase:
            at -= 1
        if at < 0:
            return False
        del self._open[at]
        place = self._root
        for other in self._open:
            place = place.children.get(other.name) or self._new_phase(place, other.name) or place
        self._phase = place
        return True
