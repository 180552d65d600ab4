"""Selective logging: of each series only those points that its chart needs.

A chart joins its points by straight lines. A point is sent when the chart without it would be off by more than 1 % of
the range that the series has covered so far, or by 0.1 MiB, percent or millisecond where that is more. What stands
still or rises evenly costs a point a minute, what jumps is sent as it is. The idea is the swinging door of process
historians (E. H. Bristol, "Swinging door trending: adaptive trend recording", ISA 1990); here the ends of the lines are
points that were measured.
"""

from __future__ import annotations

from math import inf, isfinite
from operator import attrgetter
from typing import TYPE_CHECKING

from memtrack.metrics import has_peak, peak_name, selected, unit_of
from memtrack.sinks.base import Point

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memtrack.sampling.window import Row

SHARE = 0.01
"""What the redrawn chart may differ from the full one, as a share of the range that the series has covered so far."""

RESOLUTION = {"MiB": 0.1, "%": 0.1, "ms": 0.1}
"""What it may differ in any case, by the unit of the series; in others, nothing."""

HOLD_S = 60.0
"""How long a series goes without a point if it needs none, at first."""


def hold_s(age_s: float) -> float:
    """How long a series that needs no point goes without one, in seconds, ``age_s`` after its first.

    A minute; after five hours a three-hundredth of its age, so that a week takes some 1,400 points and not 10,000.
    """
    return max(HOLD_S, age_s / 300.0)


class Selection:
    """Chooses the points of one feed, window by window. Not thread-safe.

    Of every line between two points that are sent, its highest and its lowest value are sent too where they stand out
    by more than the ``RESOLUTION``: the height of a spike is exact, however short.
    """

    def __init__(self, metrics: str | tuple[str, ...]) -> None:
        self._metrics = metrics
        self._lines: dict[str, _Line | None] = {}
        """By the name of the metric; None: not wanted."""
        self._peaks: dict[str, _Line] = {}
        """Of the metrics that have a twin."""

    def copy(self) -> Selection:
        """An independent copy, to try a delivery with that may fail."""
        twin = Selection(self._metrics)
        twin._lines = {name: line and line.copy() for name, line in self._lines.items()}
        twin._peaks = {name: line.copy() for name, line in self._peaks.items()}
        return twin

    def take(self, rows: Iterable[Row]) -> list[Point]:
        """The points that are certain to be needed now that these windows are known, in the order of time."""
        found: list[Point] = []
        for row in rows:
            timestamp_ms = round(row.end_wall_ns / 1e6)
            for name, cell in row.cells.items():
                if name not in self._lines:
                    self._add_line(name)
                line = self._lines[name]
                if line is not None:
                    line.add(found, row.end_ns, timestamp_ms, cell.mean)
                    if name in self._peaks:
                        self._peaks[name].add(found, row.end_ns, timestamp_ms, cell.max)
            if len(row.cells) < len(self._lines):
                for name in self._lines.keys() - row.cells.keys():
                    self._end_line(found, name)
        return sorted(found, key=attrgetter("timestamp_ms"))

    def rest(self) -> list[Point]:
        """The newest point of each series, if it has been held back. Afterwards nothing is."""
        found: list[Point] = []
        for line in self._wanted():
            line.close(found)
        return sorted(found, key=attrgetter("timestamp_ms"))

    def _wanted(self) -> Iterator[_Line]:
        yield from (line for line in self._lines.values() if line is not None)
        yield from self._peaks.values()

    def _add_line(self, name: str) -> None:
        if not selected(name, self._metrics):
            self._lines[name] = None
            return
        self._lines[name] = _Line(name)
        if has_peak(name):
            self._peaks[name] = _Line(peak_name(name))

    def _end_line(self, found: list[Point], name: str) -> None:
        """A series is not measured any more, as that of a worker that has ended."""
        for line in (self._lines.pop(name), self._peaks.pop(name, None)):
            if line is not None:
                line.close(found)


class _Line:
    """One series: the line that is being drawn, from the last point that was sent, its start, to the newest.

    ``floor`` and ``roof`` are the slopes between which a line from the start passes all points since then within the
    tolerance. That is half of what is allowed: the highest and the lowest of them, which bend the line, may cost the
    other half.
    """

    __slots__ = (
        *("begin_ns", "bottom", "floor", "high", "low", "name", "newest", "newest_ns"),
        *("resolution", "roof", "start", "start_ns", "top"),
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.resolution = RESOLUTION.get(unit_of(name), 0.0)
        self.start: Point | None = None
        self.newest: Point | None = None
        self.top: Point | None = None
        self.bottom: Point | None = None
        self.start_ns = self.newest_ns = self.begin_ns = 0
        self.low, self.high = inf, -inf
        self.floor, self.roof = -inf, inf

    def copy(self) -> _Line:
        twin = _Line(self.name)
        for slot in self.__slots__:
            setattr(twin, slot, getattr(self, slot))
        return twin

    def add(self, found: list[Point], now_ns: int, timestamp_ms: int, value: float) -> None:
        """Take in the next value; what has to be sent is added to ``found``."""
        point = Point(self.name, value, timestamp_ms)
        if not isfinite(value):  # no line can be drawn to it
            self.close(found)
            found.append(point)
            self._start_at(None, now_ns)
            return
        self.low, self.high = min(self.low, value), max(self.high, value)
        if self.start is None:
            self.begin_ns = self.begin_ns or now_ns
            found.append(point)
            self._start_at(point, now_ns)
            return
        if now_ns <= max(self.start_ns, self.newest_ns):
            return
        if not self.floor <= self._slope(value, now_ns) <= self.roof:
            self.close(found)
        self._extend(point, now_ns)
        if now_ns - self.start_ns >= 1e9 * hold_s((now_ns - self.begin_ns) / 1e9):
            self.close(found)

    def close(self, found: list[Point]) -> None:
        """End the line at the newest point, and begin the next one there."""
        start, end = self.start, self.newest
        if start is None or end is None:
            return
        low = min(start.value, end.value) - self.resolution
        high = max(start.value, end.value) + self.resolution
        found += [point for point in (self.top, self.bottom) if point is not None and not low <= point.value <= high]
        found.append(end)
        self._start_at(end, self.newest_ns)

    def _start_at(self, point: Point | None, now_ns: int) -> None:
        self.start, self.start_ns = point, now_ns
        self.newest, self.newest_ns = None, now_ns
        self.top = self.bottom = None
        self.floor, self.roof = -inf, inf

    def _slope(self, value: float, now_ns: int) -> float:
        assert self.start is not None
        return (value - self.start.value) / (now_ns - self.start_ns)

    def _extend(self, point: Point, now_ns: int) -> None:
        slope = self._slope(point.value, now_ns)
        tolerance = max(SHARE * (self.high - self.low), self.resolution) / 2.0 / (now_ns - self.start_ns)
        self.floor, self.roof = max(self.floor, slope - tolerance), min(self.roof, slope + tolerance)
        self.newest, self.newest_ns = point, now_ns
        if self.top is None or point.value > self.top.value:
            self.top = point
        if self.bottom is None or point.value < self.bottom.value:
            self.bottom = point
