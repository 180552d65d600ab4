"""Windows: what is kept of the samples of an interval. Two windows merge exactly.

A window is a :class:`Row` of cells, one a metric. A cell keeps the smallest, largest and last value, the mean
weighted by time (samples come faster when memory moves, so a plain mean would lean towards the spikes), and when and
at which step, epoch and phase the largest value stood. Merging two rows gives the same row as sampling their joint
interval would have given, but for the rounding of the mean.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class Where(Protocol):
        """Something that knows where the training stands."""

        def place(self) -> Place:
            """Now."""


NO_STEP = -1

EXACT, SAMPLED, BOUND, ESTIMATED = 1, 2, 3, 4
LABELS = {EXACT: "exact", SAMPLED: "sampled", BOUND: "bound", ESTIMATED: "estimated"}


class Place:
    """Where the training stood: step, epoch (``NO_STEP``: none marked), ids of the phases, outermost first."""

    __slots__ = ("epoch", "phases", "step")

    def __init__(self, step: int = NO_STEP, epoch: int = NO_STEP, phases: tuple[int, ...] = ()) -> None:
        self.step = step
        self.epoch = epoch
        self.phases = phases

    @property
    def phase(self) -> int:
        """Id of the innermost phase, 0 if none."""
        return self.phases[-1] if self.phases else 0

    def place(self) -> Place:
        """Itself: a place serves where something that knows the place is wanted."""
        return self


NOWHERE = Place()


class Cell:
    """One metric over one interval, in the metric's unit. ``count`` is 0 when the value was only held over."""

    __slots__ = ("count", "epoch", "label", "last", "max", "max_ns", "mean", "min", "phase", "seconds", "step")

    def __init__(self, value: float, now_ns: int, place: Place, seconds: float = 0.0, label: int = SAMPLED) -> None:
        self.min = self.max = self.mean = self.last = value
        self.seconds = seconds
        self.count = 1
        self.max_ns = now_ns
        self.step = place.step
        self.epoch = place.epoch
        self.phase = place.phase
        self.label = label

    def add(self, value: float, now_ns: int, where: Where, seconds: float) -> None:
        """Take in a sample that stands for the last ``seconds``. ``where`` is asked only if it is a new maximum."""
        if value > self.max:
            self.raise_max(value, now_ns, where.place(), SAMPLED)
        if value < self.min:
            self.min = value
        total = self.seconds + seconds
        if total > 0.0:
            self.mean += (value - self.mean) * (seconds / total)
        else:
            self.mean = value
        self.seconds = total
        self.last = value
        self.count += 1

    def raise_max(self, value: float, now_ns: int, place: Place, label: int) -> None:
        """A larger value than any before, seen at ``now_ns``; the mean stays."""
        self.max = value
        self.max_ns = now_ns
        self.step = place.step
        self.epoch = place.epoch
        self.phase = place.phase
        self.label = label

    def merge(self, later: Cell) -> None:
        """Take in the cell of a later interval. Of equal maxima the earlier one stays, unless it was only held over."""
        if later.max > self.max or (later.max == self.max and self.count == 0 and later.count > 0):
            self.max = later.max
            self.max_ns = later.max_ns
            self.step = later.step
            self.epoch = later.epoch
            self.phase = later.phase
            self.label = later.label
        if later.min < self.min:
            self.min = later.min
        total = self.seconds + later.seconds
        if total > 0.0:
            self.mean += (later.mean - self.mean) * (later.seconds / total)
        else:
            self.mean = later.mean
        self.seconds = total
        self.last = later.last
        self.count += later.count

    def copy(self) -> Cell:
        """An independent copy."""
        twin = Cell.__new__(Cell)
        twin.min, twin.max, twin.mean, twin.last = self.min, self.max, self.mean, self.last
        twin.seconds, twin.count, twin.label = self.seconds, self.count, self.label
        twin.max_ns, twin.step, twin.epoch, twin.phase = self.max_ns, self.step, self.epoch, self.phase
        return twin


class Row:
    """One window, or several merged: the windows ``first`` to ``last`` by number, from ``start_ns`` to ``end_ns``.

    Times are monotonic nanoseconds; ``end_wall_ns`` is the wall clock at the end. ``cells`` maps metric names to cells.
    """

    __slots__ = ("cells", "end_ns", "end_wall_ns", "first", "last", "start_ns", "step")

    def __init__(self, number: int, start_ns: int) -> None:
        self.first = self.last = number
        self.start_ns = self.end_ns = start_ns
        self.end_wall_ns = 0
        self.step = NO_STEP
        self.cells: dict[str, Cell] = {}

    @property
    def start_wall_ns(self) -> int:
        """Wall clock at the start, reckoned from the end's."""
        return self.end_wall_ns - (self.end_ns - self.start_ns)

    @property
    def seconds(self) -> float:
        """Length of the interval."""
        return (self.end_ns - self.start_ns) / 1e9

    def add(self, metric: str, value: float, now_ns: int, place: Place, seconds: float) -> None:
        """Take in a sample."""
        cell = self.cells.get(metric)
        if cell is None:
            self.cells[metric] = Cell(value, now_ns, place, seconds)
        else:
            cell.add(value, now_ns, place, seconds)

    def raise_max(self, metric: str, value: float, now_ns: int, place: Place, label: int) -> None:
        """A maximum that no sample saw but that is known to have stood in the interval."""
        cell = self.cells.get(metric)
        if cell is not None and value > cell.max:
            cell.raise_max(value, now_ns, place, label)

    def merge(self, later: Row) -> None:
        """Take in the row of a later interval."""
        for metric, cell in later.cells.items():
            mine = self.cells.get(metric)
            if mine is None:
                self.cells[metric] = cell.copy()
            else:
                mine.merge(cell)
        self.last = later.last
        self.end_ns = later.end_ns
        self.end_wall_ns = later.end_wall_ns
        if later.step != NO_STEP:
            self.step = later.step

    def copy(self) -> Row:
        """An independent copy."""
        twin = Row(self.first, self.start_ns)
        twin.last, twin.end_ns, twin.end_wall_ns, twin.step = self.last, self.end_ns, self.end_wall_ns, self.step
        twin.cells = {metric: cell.copy() for metric, cell in self.cells.items()}
        return twin

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)
