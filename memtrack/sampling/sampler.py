"""The body of the clock loop: asks collectors when they are due, and folds what they say into windows and phases.

What is done at every tick is kept to a minimum. Between two ticks the processor's caches have gone cold, which makes
the same code ten times dearer than in a tight loop: each line in ``tick`` counts.
"""

from __future__ import annotations

from memtrack import metrics
from memtrack.sampling.cadence import CALM_S, UNLIMITED_MIB, Budget, Cadence
from memtrack.sampling.scopes import Scopes, keys
from memtrack.sampling.source import COST_FACTOR, Source
from memtrack.sampling.window import BOUND, ESTIMATED, EXACT, SAMPLED, Cell, Place, Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Protocol

    from memtrack.collectors.base import Collector
    from memtrack.recording.layout import Mark

    class Marks(Protocol):
        """Where the training stands: what :class:`memtrack.recording.marks_view.MarkReader` gives."""

        def place(self) -> Place:
            """Now."""

        def written(self) -> int:
            """How many marks there are."""

        def drain(self) -> list[Mark]:
            """Those that are new since the last call."""


HIGH_WATER_TOLERANCE_MIB = 1.0
"""The kernel keeps its high-water mark in counters that are summed lazily: it may be off by some 100 KiB a CPU pair."""

HIGH_WATER_NS = 10**9
"""How often high-water marks are read, besides at the ends of windows and phases."""

APART_NS = 2_000_000
"""Windows are at least so long. Trackers keep times in milliseconds: two windows that end in the same one would be one
point with two values there, or the same point twice."""

ROOMY_PCT = 25.0
"""Above this headroom a process that stands still is only glanced at."""


class Sampler:
    """Folds the readings of collectors into windows of ``interval_s`` and into one row a phase and an epoch.

    ``on_window`` gets each finished window, ``on_phase`` and ``on_epoch`` what :class:`Scopes` hands over. Not
    thread-safe. The caller calls ``tick`` when ``due_ns`` has come; time is the caller's, and so is ``cpu_clock_ns``,
    which tells the CPU time of the process: tests run in virtual time.
    """

    def __init__(
        self,
        collectors: Sequence[Collector],
        marks: Marks,
        *,
        interval_s: float,
        tick_s: float,
        budget: Budget,
        now_ns: int,
        cpu_clock_ns: Callable[[], int],
        on_window: Callable[[Row], None],
        on_phase: Callable[[Row], None],
        on_epoch: Callable[[Row, int, int], None],
        on_marks: Callable[[list[Mark]], None] | None = None,
        phase_limit: int = 31,
    ) -> None:
        sources = [Source(collector, now_ns) for collector in collectors]
        self._every_tick = [source for source in sources if source.collector.period_s == 0.0]
        self._slower = [source for source in sources if source.collector.period_s > 0.0]
        self._slower_due_ns = now_ns
        self._marks = marks
        self._marks_seen = -1
        self._interval_ns = int(interval_s * 1e9)
        self._cadence = Cadence(min(tick_s, interval_s))
        self._calm_ns = int(max(CALM_S, min(tick_s, interval_s)) * 1e9)
        self._budget = budget
        self._cpu_clock_ns = cpu_clock_ns
        self._on_window = on_window
        self._on_marks = on_marks
        self._tick_due_ns = now_ns
        self._window_due_ns = now_ns + self._interval_ns
        self._high_water_due_ns = now_ns
        self._last_ns = now_ns
        self._wall_ns = 0
        self._place = marks.place()
        self._scopes = Scopes(on_phase, on_epoch, phase_limit)
        self._row = Row(0, now_ns)
        self._span_start_ns = now_ns
        self._span: dict[str, Cell] = {}
        """The cells since the window began or the phases changed; merged into the window and the phases at its end."""
        self._full_due_ns = 0
        self._glanced_ns = 0
        self._glances = 0
        self.due_ns = now_ns
        """When ``tick`` wants to be called next."""
        self.latest: dict[str, float] = {}
        """The newest value of each metric."""
        self.ticks = 0
        self.late_max_ms = 0.0

    @property
    def dropped(self) -> int:
        """Phases that found no room."""
        return self._scopes.dropped

    def go_on(self, first: int, phases: Iterable[Row], epochs: int) -> None:
        """Before the first tick: number windows from ``first`` on, and go on with the rows of phases known so far,
        after so many ``epochs``."""
        self._row.first = self._row.last = first
        self._scopes.go_on(phases, epochs)

    def glance(self, now_ns: int) -> bool:
        """Whether this tick needs no more than a glance: nothing is due, and the process has not moved.

        That costs a fifth of a tick. What is read at every tick, besides, is then as old as the last one: a second.
        """
        if now_ns >= self._full_due_ns or self._marks.written() != self._marks_seen:
            return False
        for source in self._every_tick:
            if source.collector.moved():
                return False
        self._note_lateness(now_ns)
        self.ticks += 1
        self._glances += 1
        self._glanced_ns = now_ns
        self.due_ns = self._tick_due_ns = min(now_ns + self._calm_ns, self._full_due_ns)
        return True

    def tick(self, now_ns: int, wall_ns: int) -> None:
        """Take what is due."""
        self.ticks += 1
        self._wall_ns = wall_ns
        self._note_lateness(now_ns)
        if self._glances:
            self._account_for_glances()
        places = None
        if self._marks.written() != self._marks_seen:
            places = self._pass_marks(now_ns)
        if places is not None or now_ns >= self._window_due_ns:
            self._high_water_due_ns = now_ns
        for source in self._every_tick:
            self._ask(source, now_ns, places)
        if places is not None:
            # only this sample shows how much was left of what was there before
            self._scopes.grow(places[0], self.latest.get(metrics.RSS))
            self._note_unseen(places, now_ns)
            self._scopes.leave(places, self._place)
        if now_ns >= self._high_water_due_ns:
            self._high_water_due_ns = now_ns + HIGH_WATER_NS
        if now_ns >= self._slower_due_ns:
            self._ask_slower(now_ns)
        self._last_ns = now_ns
        if now_ns >= self._window_due_ns:
            self.cut(now_ns, wall_ns)
        self._plan(now_ns)

    def cut(self, now_ns: int, wall_ns: int) -> None:
        """Finish the current window, if anything was sampled in it, and begin the next.

        Held values stand in for collectors that were not due in it.
        """
        self._wall_ns = wall_ns
        row = self._row
        if self._span or row.cells:
            for source in self._slower:
                if not source.ran:
                    self._hold(source)
                source.ran = False
            self._end_span(now_ns)
            row.end_ns = now_ns
            row.end_wall_ns = wall_ns
            row.step = self._marks.place().step
            self._scopes.grow(self._place, self.latest.get(metrics.RSS))
            self._scopes.store(self._place, now_ns)
            self._on_window(row)
            self._row = Row(row.last + 1, now_ns)
        # absolute deadlines: windows do not drift; those that were missed (machine asleep), or nearly, are skipped
        soonest_ns = now_ns + APART_NS
        if self._window_due_ns <= soonest_ns:
            missed = (soonest_ns - self._window_due_ns) // self._interval_ns
            self._window_due_ns += (missed + 1) * self._interval_ns

    def cut_on_request(self, now_ns: int, wall_ns: int) -> None:
        """Finish the current window with a last sample, store every phase, and count windows from now on."""
        self._high_water_due_ns = now_ns
        self.tick(now_ns, wall_ns)
        self._ask_last(now_ns)
        self.cut(now_ns, wall_ns)
        self._scopes.store_all()
        self._window_due_ns = now_ns + self._interval_ns
        self._plan(now_ns)

    def finish(self, now_ns: int, wall_ns: int) -> None:
        """Finish the last window as it stands, and store every phase and epoch."""
        self._wall_ns = wall_ns
        if self._glances:
            self._account_for_glances()
        if self._marks.written() != self._marks_seen:
            self._pass_marks(now_ns)
        self._ask_last(now_ns)
        self.cut(now_ns, wall_ns)
        self._scopes.store_all()
        for source in (*self._every_tick, *self._slower):
            source.collector.close()

    # -- ticks ------------------------------------------------------------------------------------------------------

    def _note_lateness(self, now_ns: int) -> None:
        late_ms = (now_ns - self.due_ns) / 1e6
        if late_ms > self.late_max_ms:
            self.late_max_ms = late_ms

    def _account_for_glances(self) -> None:
        """What stood still up to the last glance was sampled up to then."""
        glanced_ns, now = self._glanced_ns, self._marks.place()
        place = Place(now.step, now.epoch, self._place.phases)
        for source in self._every_tick:
            seconds = (glanced_ns - max(source.last_ns, self._row.start_ns)) / 1e9
            for metric, value in source.last:
                cell = self._span.get(metric)
                if cell is None:
                    cell = self._span[metric] = Cell(value, glanced_ns, place, seconds)
                else:
                    cell.add(value, glanced_ns, self._marks, seconds)
                cell.count += self._glances - 1
            source.last_ns = glanced_ns
        self._last_ns = glanced_ns
        self._glances = 0

    # -- folding ----------------------------------------------------------------------------------------------------

    def _ask(self, source: Source, now_ns: int, places: list[Place] | None) -> None:
        collector = source.collector
        try:
            samples = collector.collect(now_ns)
            # a sample stands for the time since the last one, but not for time before this window
            seconds = (now_ns - max(source.last_ns, self._row.start_ns)) / 1e9 if source.last_ns else 0.0
            span, latest, marks = self._span, self.latest, self._marks
            kept = []
            for sample in samples:
                metric, value = sample
                latest[metric] = value
                kept.append(sample)
                cell = span.get(metric)
                if cell is None:
                    span[metric] = Cell(value, now_ns, marks.place(), seconds)
                else:
                    cell.add(value, now_ns, marks, seconds)
            source.last = kept
            if now_ns >= self._high_water_due_ns:
                for metric, value in collector.high_water():
                    before = source.high_water.get(metric)
                    source.high_water[metric] = value
                    if before is not None and value > before + HIGH_WATER_TOLERANCE_MIB:
                        self._raise(metric, value, now_ns, places)
        except Exception:  # the others go on, whatever is wrong with this one
            source.errors += 1
            source.last = ()
        source.ran = True
        source.last_ns = now_ns

    def _ask_slower(self, now_ns: int) -> None:
        exhausted = self._budget.spend(now_ns, self._cpu_clock_ns())
        due_ns = now_ns + 10**9
        for source in self._slower:
            if source.is_due(now_ns):
                began_ns = self._cpu_clock_ns()
                self._ask(source, now_ns, None)
                source.cost_ns = self._cpu_clock_ns() - began_ns
                period_ns = max(source.period_ns * (2 if exhausted else 1), COST_FACTOR * source.cost_ns)
                source.due_ns = max(source.due_ns, now_ns - source.period_ns) + period_ns
            due_ns = min(due_ns, source.due_ns)
        self._slower_due_ns = due_ns

    def _ask_last(self, now_ns: int) -> None:
        for source in self._slower:
            if source.collector.asked_at_end:
                self._ask(source, now_ns, None)

    def _raise(self, metric: str, value: float, now_ns: int, places: list[Place] | None) -> None:
        """The kernel's high-water mark rose: the metric stood so high since the last look, whether sampled or not."""
        cell = self._span.get(metric)
        if cell is None:
            return
        if value > cell.max + HIGH_WATER_TOLERANCE_MIB:
            self._cadence.spike_seen(now_ns)
        if places is None:
            if value > cell.max:
                cell.raise_max(value, now_ns, self._marks.place(), EXACT)
            return
        # The phases or the epoch changed since the last look. The maximum of the window, and of phases that were open
        # all the time, is ascribed to where the training was longest. For the others the height is an upper bound, as
        # nobody can tell in which it stood; the one that is open now needs none if the sample has that height.
        _raise_row(self._row, metric, cell.last, value, now_ns, places[0], EXACT)
        for place in places:
            for row in self._open(place, now_ns):
                if all(row.first in keys(other) for other in places):
                    _raise_row(row, metric, cell.last, value, now_ns, places[0], EXACT)
                elif value > cell.max or row.first not in keys(self._place):
                    seen = row.cells.get(metric)
                    if seen is None or value > seen.max + HIGH_WATER_TOLERANCE_MIB:
                        _raise_row(row, metric, cell.last, value, now_ns, place, BOUND)

    def _pass_marks(self, now_ns: int) -> list[Place] | None:
        """Take in the marks since the last tick. Returns where the training has been, if its phases or epoch changed.

        Each set of phases in an epoch comes once, the one that lasted longest first.
        """
        self._marks_seen = self._marks.written()
        marks = self._marks.drain()
        if self._on_marks is not None:
            self._on_marks(marks)
        place = self._marks.place()
        at, since_ns = (self._place.epoch, self._place.phases), self._last_ns
        stays: dict[tuple[int, tuple[int, ...]], int] = {at: 0}
        for mark in marks:
            stays[at] = stays.get(at, 0) + max(mark.time_ns - since_ns, 0)
            at, since_ns = (mark.place.epoch, mark.place.phases), max(mark.time_ns, since_ns)
        at = place.epoch, place.phases
        stays[at] = stays.get(at, 0) + max(now_ns - since_ns, 0)
        if len(stays) == 1:
            return None
        self._end_span(now_ns)
        self._place = place
        places = {stay: Place(place.step, *stay) for stay in stays}
        for stay in places.values():
            self._open(stay, now_ns)  # in the order in which they came
        return [places[stay] for stay in sorted(stays, key=lambda stay: -stays[stay])]

    def _note_unseen(self, places: list[Place], now_ns: int) -> None:
        """A phase or an epoch that has passed between two samples counts all the same: at about what there is now."""
        rss_mib = self.latest.get(metrics.RSS)
        if rss_mib is None:
            return
        for place in places:
            for row in self._open(place, now_ns):
                if metrics.RSS not in row.cells and row.first not in keys(self._place):
                    cell = row.cells[metrics.RSS] = Cell(rss_mib, now_ns, place, label=ESTIMATED)
                    cell.count = 0

    def _end_span(self, now_ns: int) -> None:
        """Merge the cells since the last change of place into the window and into the rows of phases and epoch."""
        span = Row(self._row.first, self._row.start_ns)
        span.cells = self._span
        span.end_ns, span.end_wall_ns = now_ns, self._wall_ns
        for row in self._open(self._place, now_ns):
            row.merge(span)
        if self._row.cells:
            self._row.merge(span)
        else:
            self._row.cells = span.cells
        self._span, self._span_start_ns = {}, now_ns

    def _open(self, place: Place, now_ns: int) -> list[Row]:
        return self._scopes.open(place, self._span_start_ns, now_ns, self._wall_ns)

    def _hold(self, source: Source) -> None:
        """Show the last known values, or estimates, in a window in which the collector was not due: count 0."""
        estimates = source.collector.between()
        for metric, value in estimates or source.last:
            if metric not in self._span and metric not in self._row.cells:
                cell = Cell(value, source.last_ns, self._place, label=ESTIMATED if estimates else SAMPLED)
                cell.count = 0
                self._row.cells[metric] = cell

    # -- planning ---------------------------------------------------------------------------------------------------

    def _plan(self, now_ns: int) -> None:
        latest = self.latest
        if self._budget.exhausted:
            interval_s = CALM_S
        else:
            headroom_pct = latest.get(metrics.CONTAINER_HEADROOM)
            limit_mib = latest.get(metrics.CONTAINER_LIMIT)
            headroom_mib = UNLIMITED_MIB
            if headroom_pct is not None and limit_mib is not None:
                headroom_mib = limit_mib * headroom_pct / 100.0
            interval_s = self._cadence.next_interval_s(now_ns, latest.get(metrics.RSS, 0.0), headroom_mib)
        # a tick before its time (the window's end, a request) counts from now, or each would put off the next ones
        self._tick_due_ns = max(min(self._tick_due_ns, now_ns) + int(interval_s * 1e9), now_ns)
        self.due_ns = min(self._tick_due_ns, self._window_due_ns)
        is_calm = interval_s >= CALM_S and latest.get(metrics.CONTAINER_HEADROOM, 100.0) > ROOMY_PCT
        next_ns = min(self._window_due_ns, self._slower_due_ns, self._high_water_due_ns)
        self._full_due_ns = next_ns if is_calm else 0


def _raise_row(row: Row, metric: str, sampled: float, value: float, now_ns: int, place: Place, label: int) -> None:
    """Raise a maximum, also where nothing was sampled yet."""
    if metric not in row.cells:
        row.cells[metric] = cell = Cell(sampled, now_ns, place)
        cell.count = 0
        cell.label = label
    row.raise_max(metric, value, now_ns, place, label)
