"""The trainer's marks as the agent and readers see them."""

from __future__ import annotations

from memtrack.recording import layout
from memtrack.recording.layout import Mark
from memtrack.recording.records import unpack_text
from memtrack.sampling.window import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_WRITTEN = layout.CONTROL // 8 + layout.MARKS_WRITTEN


class MarkReader:
    """The trainer's part of a recording, seen by the agent: ``part`` is the recording's memory up to METRICS.

    Reading is validated by sequence numbers: a slot that is being written is passed over for the other one. A slot
    counts if its number still stands after its body was read; where ``part`` is a copy of a recording that is being
    written, ``again`` is a second copy, taken afterwards, to compare the numbers with.
    """

    def __init__(self, part: Any, again: Any = None) -> None:
        self._bytes = memoryview(part)
        self._words = self._bytes.cast("Q")
        self._later = self._words if again is None else memoryview(again).cast("Q")
        self._next_mark = 0
        self._names: list[str] = [""]
        self.overrun = 0
        """Marks that were overwritten before they were read."""

    def close(self) -> None:
        """Release the views, so that the map can be closed."""
        self._later.release()
        self._words.release()
        self._bytes.release()

    def control(self, word: int) -> int:
        """A control word: CUT or STOP, or one of the counters."""
        return self._words[layout.CONTROL // 8 + word]

    def written(self) -> int:
        """How many marks have been written so far."""
        return self._words[_WRITTEN]

    def place(self) -> Place:
        """Where the training stands now."""
        step, epoch = layout.NOW_BODY.unpack(bytes(self._bytes[layout.NOW : layout.NOW + layout.NOW_BODY.size]))
        phases: tuple[int, ...] = ()
        written = self._words[_WRITTEN]
        # the newest mark, or the one before it should it be in the making
        for number in range(written, max(written - 2, 0), -1):
            mark = self._mark(number)
            if mark is not None:
                phases = mark.place.phases
                break
        return Place(step, epoch, phases)

    def drain(self) -> list[Mark]:
        """The marks written since the last call, oldest first."""
        written = self._words[_WRITTEN]
        first = max(self._next_mark, written - layout.MARK_COUNT)
        self.overrun += first - self._next_mark
        self._next_mark = written
        found = (self._mark(number) for number in range(first + 1, written + 1))
        return [mark for mark in found if mark is not None]

    def farewell(self) -> dict[str, str]:
        """What Python knew of the end of the process; empty if it said nothing."""
        found = unpack_text(bytes(self._bytes[layout.FAREWELL : layout.FAREWELL + layout.FAREWELL_SIZE]))
        return {} if found is None else found[1]

    def gauges(self) -> Iterator[tuple[str, float]]:
        """Name and value of each gauge that was set."""
        line = layout.GAUGES // 8
        for _ in range(layout.GAUGE_COUNT):
            turn = self._words[line]
            at = line * 8 + 8
            value, set_ns, name = layout.GAUGE_BODY.unpack(bytes(self._bytes[at : at + layout.GAUGE_BODY.size]))
            if set_ns == 0:
                return
            # 0: it is being set, or was when the process was killed
            if turn != 0 and self._later[line] == turn:
                yield self.name(name), value
            line += layout.LINE // 8

    def name(self, number: int) -> str:
        """The name with this id."""
        if number >= len(self._names):
            start = layout.NAMES
            end = start + layout.NAME_COUNT * layout.LINE
            self._names = ["", *layout.unpack_names(bytes(self._bytes[start:end]))]
        return self._names[number] if 0 <= number < len(self._names) else ""

    def _mark(self, number: int) -> Mark | None:
        """Mark ``number``, counted from 1; None if it is being written or was overwritten."""
        at = layout.MARKS + (number % layout.MARK_COUNT) * layout.LINE
        if self._words[at // 8] != number:
            return None
        body = bytes(self._bytes[at + 8 : at + layout.LINE])
        return Mark(body) if self._later[at // 8] == number else None
