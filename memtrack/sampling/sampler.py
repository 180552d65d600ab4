"""The clock loop's body: asks collectors when they are due, and folds what they say into windows and phases."""

from __future__ import annotations

from memtrack import metrics
from memtrack.sampling.cadence import SLOWEST_S, Budget, Cadence
from memtrack.sampling.window import BOUND, EXACT, NOWHERE, Place, Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memtrack.collectors.base import Collector
    from memtrack.recording.layout import Mark

HIGH_WATER_TOLERANCE_MIB = 1.0
"""The kernel keeps its high-water mark in counters that are summed lazily: it may be off by some 100 KiB a CPU pair."""

COST_FACTOR = 1000
"""A collector that took t is asked again no sooner than after 1000 t: no more than 0.1 % of a core each."""


UNLIMITED_MIB = float("inf")


class Source:
    """A collector, when it is due, and what it said last."""

    __slots__ = ("collector", "cost_ns", "due_ns", "errors", "last", "last_ns", "marks", "period_ns", "ran")

    def __init__(self, collector: Collector, now_ns: int) -> None:
        self.collector = collector
        self.period_ns = int(collector.period_s * 1e9)
        self.cost_ns = 0
        """CPU time of the last call."""
        self.due_ns = now_ns
        self.last_ns = 0
        self.last: list[tuple[str, float]] = []
        self.marks: dict[str, float] = {}
        """High-water marks as they were at the last call."""
        self.ran = False
        """Whether it ran in the current window."""
        self.errors = 0

    def is_due(self, now_ns: int) -> bool:
        """At its time; sooner, but for at most a hundredth of a core, if its values are known to be out of date."""
        if now_ns >= self.due_ns:
            return True
        return self.collector.stale and now_ns >= self.last_ns + max(self.period_ns, COST_FACTOR // 10 * self.cost_ns)


class Sampler:
    """Folds the readings of collectors into windows of ``interval_s`` and into one row a phase.

    ``on_window`` gets each finished window. Not thread-safe. The caller calls ``tick`` when ``due_ns`` has come; time is
    the caller's, and so is ``cpu_clock_ns``, which tells the CPU time of the process: tests run in virtual time.
    """

    def __init__(
        self,
        collectors: Sequence[Collector],
        *,
        interval_s: float,
        tick_s: float,
        budget: Budget,
        now_ns: int,
        cpu_clock_ns: Callable[[], int],
        on_window: Callable[[Row], None],
        phase_limit: int = 31,
    ) -> None:
        self._sources = [Source(collector, now_ns) for collector in collectors]
        self._every_tick = [source for source in self._sources if source.collector.period_s == 0.0]
        self._slower = [source for source in self._sources if source.collector.period_s > 0.0]
        self._interval_ns = int(interval_s * 1e9)
        self._cadence = Cadence(min(tick_s, interval_s))
        self._budget = budget
        self._cpu_clock_ns = cpu_clock_ns
        self._on_window = on_window
        self._phase_limit = phase_limit
        self._tick_due_ns = now_ns
        self._window_due_ns = now_ns + self._interval_ns
        self._place = NOWHERE
        self._last_ns = now_ns
        self._exhausted = False
        self.row = Row(0, now_ns)
        self.latest: dict[str, float] = {}
        """The newest value of each metric."""
        self.phases: dict[int, Row] = {0: Row(0, now_ns)}
        """A row a phase id, 0 for everything; ``first`` is the phase's id."""
        self.touched: set[int] = {0}
        """Ids of the phases that got samples since the last window was finished."""
        self.ticks = 0
        self.late_max_ms = 0.0
        self.dropped = 0

    @property
    def due_ns(self) -> int:
        """When ``tick`` wants to be called next."""
        return min(self._tick_due_ns, self._window_due_ns)

    def tick(self, now_ns: int, wall_ns: int, place: Place, marks: Sequence[Mark] = ()) -> None:
        """Take what is due. ``place`` is where the training stands; ``marks``, what it has passed since the last tick."""
        self.late_max_ms = max(self.late_max_ms, (now_ns - self.due_ns) / 1e6)
        self.ticks += 1
        places = self._places_since(now_ns, place, marks)
        for source in self._every_tick:
            self._ask(source, now_ns, place, places)
        for source in self._slower:
            if source.is_due(now_ns):
                began_ns = self._cpu_clock_ns()
                self._ask(source, now_ns, place, places)
                source.cost_ns = self._cpu_clock_ns() - began_ns
                period_ns = max(source.period_ns * (4 if self._exhausted else 1), COST_FACTOR * source.cost_ns)
                source.due_ns = max(source.due_ns, now_ns - source.period_ns) + period_ns
        self._place = place
        self._last_ns = now_ns
        if now_ns >= self._window_due_ns:
            self.cut(now_ns, wall_ns)
        self._plan(now_ns)

    def cut(self, now_ns: int, wall_ns: int) -> None:
        """Finish the current window and begin the next. Held values stand in for collectors that did not run in it."""
        row = self.row
        row.end_ns = now_ns
        row.end_wall_ns = wall_ns
        row.step = self._place.step
        for source in self._slower:
            if not source.ran:
                self._hold(row, source)
            source.ran = False
        for phase in self.touched:
            self.phases[phase].end_wall_ns = wall_ns
        self._on_window(row)
        self.touched.clear()
        self.row = Row(row.last + 1, now_ns)
        # absolute deadlines: windows do not drift. Those that were missed (machine asleep) are skipped, not made up for.
        if self._window_due_ns <= now_ns:
            missed = (now_ns - self._window_due_ns) // self._interval_ns
            self._window_due_ns += (missed + 1) * self._interval_ns

    def restart_windows(self, now_ns: int) -> None:
        """Let the windows count from now, after a cut that somebody asked for."""
        self._window_due_ns = now_ns + self._interval_ns

    def close(self) -> None:
        """Close the collectors."""
        for source in self._sources:
            source.collector.close()

    # -- folding ----------------------------------------------------------------------------------------------------

    def _ask(self, source: Source, now_ns: int, place: Place, places: list[Place]) -> None:
        collector = source.collector
        try:
            samples = list(collector.collect(now_ns))
            marks = list(collector.high_water())
        except (OSError, ValueError):
            source.errors += 1
            samples = marks = []
        # a sample stands for the time since the last one, but not for time before this window
        seconds = (now_ns - max(source.last_ns, self.row.start_ns)) / 1e9 if source.last_ns else 0.0
        rows = [self.row, *self._open(place, now_ns)]
        for metric, value in samples:
            self.latest[metric] = value
            for row in rows:
                row.add(metric, value, now_ns, place, seconds)
        for metric, value in marks:
            self._raise(source, metric, value, now_ns, places)
        source.ran = True
        source.last = samples
        source.last_ns = now_ns

    def _raise(self, source: Source, metric: str, value: float, now_ns: int, places: list[Place]) -> None:
        """The kernel's high-water mark: if it rose, the metric stood so high since the last look, sampled or not."""
        before = source.marks.get(metric)
        source.marks[metric] = value
        cell = self.row.cells.get(metric)
        if before is None or cell is None or value <= before + HIGH_WATER_TOLERANCE_MIB or value <= cell.max:
            return
        if value > cell.max + HIGH_WATER_TOLERANCE_MIB:
            self._cadence.spike_seen(now_ns)
        self.row.raise_max(metric, value, now_ns, places[0], EXACT)
        # which of several phases since the last look it was cannot be told: for each of them it is an upper bound
        label = EXACT if len(places) == 1 else BOUND
        for place in places:
            for row in self._open(place, now_ns):
                row.raise_max(metric, value, now_ns, place, label if row.first else EXACT)

    def _places_since(self, now_ns: int, place: Place, marks: Sequence[Mark]) -> list[Place]:
        """Where the training was since the last tick, each set of phases once; the longest stay first."""
        if not marks and place.phases == self._place.phases:
            return [place]
        stays: dict[tuple[int, ...], int] = {}
        at, since_ns = self._place.phases, self._last_ns
        for mark in marks:
            stays[at] = stays.get(at, 0) + max(mark.time_ns - since_ns, 0)
            at, since_ns = mark.place.phases, mark.time_ns
        stays[at] = stays.get(at, 0) + max(now_ns - since_ns, 0)
        return [Place(place.step, place.epoch, phases) for phases in sorted(stays, key=lambda key: -stays[key])]

    def _open(self, place: Place, now_ns: int) -> list[Row]:
        """The rows that a sample here belongs to: of everything, and of each open phase."""
        rows = []
        for phase in (0, *place.phases):
            row = self.phases.get(phase)
            if row is None:
                if len(self.phases) > self._phase_limit:
                    self.dropped += 1
                    continue
                row = self.phases[phase] = Row(phase, now_ns)
            row.end_ns = now_ns
            self.touched.add(phase)
            rows.append(row)
        return rows

    def _hold(self, row: Row, source: Source) -> None:
        """Show the last known values in a window in which the collector was not due, as held: count 0."""
        for metric, value in source.last:
            if metric not in row.cells:
                row.add(metric, value, source.last_ns, self._place, 0.0)
                row.cells[metric].count = 0

    # -- planning ---------------------------------------------------------------------------------------------------

    def _plan(self, now_ns: int) -> None:
        self._exhausted = self._budget.spend(now_ns, self._cpu_clock_ns())
        latest = self.latest
        headroom_mib = latest.get(metrics.CONTAINER_LIMIT, 0.0) * latest.get(metrics.CONTAINER_HEADROOM, 0.0) / 100.0
        interval_s = self._cadence.next_interval_s(now_ns, latest.get(metrics.RSS, 0.0), headroom_mib or UNLIMITED_MIB)
        if self._exhausted:
            interval_s = SLOWEST_S
        self._tick_due_ns = max(self._tick_due_ns + int(interval_s * 1e9), now_ns)
