"""The trainer's hand in a recording: steps, epochs, phases, named marks, gauges, and requests to the agent."""

from __future__ import annotations

import mmap
import os
import threading
from time import monotonic_ns

from memtrack.recording import layout
from memtrack.recording.layout import GAUGE_BODY, MARK_BODY, MARK_PATH, NOW_BODY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_pack_now = NOW_BODY.pack
_pack_mark = MARK_BODY.pack
_pack_gauge = GAUGE_BODY.pack
_COUNT = layout.MARK_COUNT


def _lines(start: int, count: int, size: int) -> list[tuple[int, slice]]:
    """Word index of the sequence word, and place of the body, of consecutive lines."""
    return [((at := start + i * layout.LINE) // 8, slice(at + 8, at + 8 + size)) for i in range(count)]


# where the slots lie, worked out once instead of at each mark
_NOW = _lines(layout.NOW, 2, NOW_BODY.size)
_MARKS = _lines(layout.MARKS, layout.MARK_COUNT, MARK_BODY.size + MARK_PATH.size)
_CUT_WORD = layout.CONTROL // 8 + layout.CUT
_STOP_WORD = layout.CONTROL // 8 + layout.STOP
_WRITTEN_WORD = layout.CONTROL // 8 + layout.MARKS_WRITTEN
_REFUSED_WORD = layout.CONTROL // 8 + layout.MARKS_REFUSED

WAKE_NS = 20_000_000


class Phase:
    """A phase as a place in the tree of phases: the same name inside another phase is another place."""

    __slots__ = ("children", "depth", "id", "packed", "parent", "path")

    def __init__(self, number: int, path: str, parent: Phase | None) -> None:
        self.id = number
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

    Every call that writes holds one lock, because a slot has one writer at a time. A forked child must not use its
    parent's writer: it drops it without touching the lock, which may be held (``memtrack.monitor`` sees to that).
    """

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, layout.METRICS)
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._lock = threading.RLock()  # re-entrant: a signal handler may mark while the main thread is marking
        self._turn = 0
        self._step = -1
        self._epoch = -1
        self._marks = 0
        self._root = self._phase = Phase(0, "", None)
        self._names: dict[str, int] = {"": 0}
        self._gauges: dict[str, int] = {}
        self._gauge_turn = 0
        self._woke_ns = 0
        self.wake: Callable[[], None] | None = None
        """Called when a phase begins or ends, at most every 20 ms: a sample there keeps phases apart."""

    def step(self, step: int) -> None:
        """The training has reached this step."""
        with self._lock:
            self._step = step
            self._turn = turn = self._turn + 1
            words = self._words
            word, at = _NOW[turn & 1]
            words[word] = 0
            self._bytes[at] = _pack_now(step, self._epoch)
            words[word] = turn

    def epoch(self, epoch: int) -> None:
        """The training has reached this epoch."""
        with self._lock:
            self._epoch = epoch
            self._mark(layout.EPOCH, 0, 0.0)
        self.step(self._step)

    def begin(self, name: str) -> Phase | None:
        """Enter a phase inside those that are open. Returns what ``end`` wants; None if there is no room for it."""
        with self._lock:
            phase = self._phase.children.get(name) or self._new_phase(self._phase, name)
            if phase is not None:
                self._phase = phase
                self._wake_after(self._mark(layout.PHASE_BEGIN, phase.id, 0.0))
            return phase

    def end(self, phase: Phase) -> None:
        """Leave a phase. When threads leave theirs in another order than they entered, the others stay open."""
        with self._lock:
            if self._phase is phase and phase.parent is not None:
                self._phase = phase.parent
            else:
                self._phase = self._without(self._phase, phase)
            self._wake_after(self._mark(layout.PHASE_END, phase.id, 0.0))

    def mark(self, name: str, value: float = 0.0) -> None:
        """Something worth a note has happened."""
        with self._lock:
            self._mark(layout.MARK, self._name(name), value)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge, which the agent samples from then on."""
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

    def close(self) -> None:
        """Unmap. Later calls raise ValueError, so whoever hands out the writer takes it back first."""
        with self._lock:
            self._words.release()
            self._bytes.release()
            self._map.close()

    # The rest is called with the lock held.

    def _mark(self, kind: int, name: int, value: float) -> int:
        """Returns the time that the mark carries."""
        self._marks = number = self._marks + 1
        words = self._words
        word, at = _MARKS[number % _COUNT]
        phase = self._phase
        words[word] = 0
        self._bytes[at] = (
            _pack_mark(kind, phase.depth, name, self._epoch, self._step, now_ns := monotonic_ns(), value) + phase.packed
        )
        words[word] = number
        words[_WRITTEN_WORD] = number
        return now_ns

    def _wake_after(self, now_ns: int) -> None:
        if now_ns - self._woke_ns > WAKE_NS and self.wake is not None:
            self._woke_ns = now_ns
            self.wake()

    def _name(self, name: str) -> int:
        """Id of a name, given at its first use; 0, the nameless, when the table is full."""
        number = self._names.get(name)
        if number is None:
            if len(self._names) > layout.NAME_COUNT:
                self._words[_REFUSED_WORD] += 1
                return 0
            number = self._names[name] = len(self._names)
            at = layout.NAMES + (number - 1) * layout.LINE
            self._bytes[at : at + layout.LINE] = layout.pack_name(name)
        return number

    def _new_phase(self, parent: Phase, name: str) -> Phase | None:
        path = f"{parent.path}/{name}" if parent.path else name
        number = self._name(path) if parent.depth < layout.MAX_DEPTH else 0
        if number == 0:
            self._words[_REFUSED_WORD] += 1
            return None
        phase = parent.children[name] = Phase(number, path, parent)
        return phase

    def _without(self, current: Phase, phase: Phase) -> Phase:
        """The place that is left when ``phase`` goes from the path of ``current``, which it may not be on."""
        if current is phase or current.parent is None:
            return current.parent or current
        rest = self._without(current.parent, phase)
        if rest is current.parent:
            return current
        name = current.path[len(current.parent.path) + 1 :] if current.parent.path else current.path
        return rest.children.get(name) or self._new_phase(rest, name) or rest
