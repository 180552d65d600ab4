"""The sampler in virtual time: when it looks, and how it folds what it sees into windows and phases."""

from __future__ import annotations

import itertools

import pytest

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.recording import layout
from memtrack.recording.layout import Mark
from memtrack.sampling.cadence import CALM_S, Budget
from memtrack.sampling.sampler import Sampler
from memtrack.sampling.source import COST_FACTOR
from memtrack.sampling.window import BOUND, ESTIMATED, EXACT, SAMPLED, Place
from memtrack.testing import FakeClock

SECOND_NS = 10**9
SLOW = "memory/test/slow_mib"
HELD = "memory/test/held_mib"


class Curve(Collector):
    """RSS as a function of virtual time, and the high-water mark that a kernel would keep of it."""

    period_s = 0.0

    def __init__(self, clock, value, peaks=()):
        self.clock = clock
        self.value = value
        self.peaks = peaks  # (seconds, MiB) of spikes too short to be sampled
        self.highest = 0.0
        self.closed = 0

    def collect(self, now_ns):
        rss = self.value(self.clock.seconds)
        self.highest = max([self.highest, rss, *(mib for at, mib in self.peaks if at <= self.clock.seconds)])
        return ((metrics.RSS, rss),)

    def high_water(self):
        return ((metrics.RSS, self.highest),)

    def close(self):
        self.closed += 1


class Watched(Curve):
    """The same, which can tell cheaply whether it has moved."""

    def collect(self, now_ns):
        self.asked = getattr(self, "asked", 0) + 1
        self.last = self.value(self.clock.seconds)
        return super().collect(now_ns)

    def moved(self):
        return self.value(self.clock.seconds) != self.last


class Slow(Collector):
    """Something that is asked now and then, which takes ``cost_s`` of the processor."""

    def __init__(self, clock, period_s, metric=SLOW, cost_s=0.0):
        self.clock = clock
        self.period_s = period_s
        self.metric = metric
        self.cost_s = cost_s
        self.stale = False
        self.asked = []
        self.broken = None

    def collect(self, now_ns):
        self.asked.append(self.clock.seconds)
        self.clock.spend_cpu(self.cost_s)
        if self.broken is not None:
            raise self.broken
        return ((self.metric, float(len(self.asked))),)


class VirtualMarks:
    """The trainer's marks, in virtual time."""

    def __init__(self, clock):
        self.clock = clock
        self.now = Place()
        self.all = []
        self.read = 0

    def move(self, *phases, step=-1, epoch=-1):
        """Enter or leave phases, so that these are open."""
        self.now = Place(step, epoch, phases)
        body = layout.MARK_BODY.pack(layout.PHASE_BEGIN, len(phases), 1, epoch, step, self.clock.now_ns, 0.0)
        path = layout.MARK_PATH.pack(*phases, *(0,) * (layout.MAX_DEPTH - len(phases)))
        self.all.append(Mark(body + path))

    def place(self):
        return self.now

    def written(self):
        return len(self.all)

    def drain(self):
        found, self.read = self.all[self.read :], len(self.all)
        return found


class Bench:
    """A sampler with virtual time, and what it has handed over."""

    def __init__(self, *collectors, interval_s=1.0, tick_s=0.1, share=1.0, **options):
        self.clock = collectors[0].clock
        self.start_ns = self.clock.now_ns
        self.marks = VirtualMarks(self.clock)
        self.windows = []
        self.phases = {}
        self.epochs = {}
        self.seen_marks = []
        self.ticks = []
        self.sampler = Sampler(
            collectors,
            self.marks,
            interval_s=interval_s,
            tick_s=tick_s,
            budget=Budget(share, self.clock.now_ns, 0),
            now_ns=self.clock.now_ns,
            cpu_clock_ns=self.clock.process_time_ns,
            on_window=self.windows.append,
            on_phase=lambda row: self.phases.__setitem__(row.first, row.copy()),
            on_epoch=lambda row, epoch, number: self.epochs.__setitem__((number, epoch), row.copy()),
            on_marks=self.seen_marks.extend,
            **options,
        )

    def tick(self):
        self.ticks.append(self.clock.seconds)
        if not self.sampler.glance(self.clock.now_ns):
            self.sampler.tick(self.clock.now_ns, self.clock.wall_ns)

    def run(self, until_s, late_s=0.0, script=()):
        """Tick whenever the sampler wants, ``late_s`` late, up to ``until_s``; ``script`` is (seconds, call) pairs."""
        pending = sorted(script, key=lambda entry: entry[0])
        end_ns = self.start_ns + round(until_s * SECOND_NS)
        while True:
            due_ns = self.sampler.due_ns + round(late_s * SECOND_NS)
            if pending and self.start_ns + round(pending[0][0] * SECOND_NS) <= min(due_ns, end_ns):
                at_s, call = pending.pop(0)
                self.clock.advance_to(self.start_ns + round(at_s * SECOND_NS))
                call()
                continue
            if due_ns > end_ns:
                break
            self.clock.advance_to(due_ns)
            self.tick()
        self.clock.advance_to(end_ns)

    def finish(self):
        self.sampler.finish(self.clock.now_ns, self.clock.wall_ns)

    def seconds(self, ns):
        return (ns - self.start_ns) / 1e9


class Clock(FakeClock):
    def __init__(self):
        super().__init__()
        self.zero_ns = self.now_ns

    @property
    def seconds(self):
        return (self.now_ns - self.zero_ns) / 1e9


@pytest.fixture
def clock():
    return Clock()


# -- glances --------------------------------------------------------------------------------------------------------


def steps(seconds):
    """Stands still for seconds at a time: up, down, up a little."""
    return 100.0 if seconds < 5.05 else 900.0 if seconds < 9.31 else 110.0


def test_glances_change_nothing():
    """What stands still is only glanced at; the windows are the same as if each tick had been a full one."""
    benches = []
    for kind in (Curve, Watched):
        clock = Clock()
        bench = Bench(kind(clock, steps), Slow(clock, 1.0))
        script = [
            (2.31, lambda bench=bench: bench.marks.move(1, step=3)),
            (7.0, lambda bench=bench: bench.marks.move()),
        ]
        bench.run(14.5, script=script)
        bench.finish()
        benches.append(bench)
    full, glancing = benches
    assert len(full.windows) == len(glancing.windows) == 15
    for one, other in zip(full.windows, glancing.windows, strict=True):
        a, b = one.cells[metrics.RSS], other.cells[metrics.RSS]
        assert (a.min, a.max, a.last, a.phase) == (b.min, b.max, b.last, b.phase)
        # when exactly it moved between two ticks nobody can tell
        assert b.mean == pytest.approx(a.mean, abs=800 * CALM_S if one.first in (5, 9) else 1e-6)
        assert b.seconds == pytest.approx(a.seconds, abs=0.25)
        assert b.count >= 4 or one.first == 14
        assert one.end_ns == other.end_ns
    assert full.phases[1].cells[metrics.RSS].max == glancing.phases[1].cells[metrics.RSS].max == 900.0
    assert glancing.phases[1].cells[metrics.RSS].seconds == pytest.approx(4.7, abs=0.5)
    assert glancing.sampler.ticks == len(glancing.ticks)
    assert glancing.windows[0].cells[SLOW].count == full.windows[0].cells[SLOW].count
    assert glancing.clock.seconds == 14.5
    collector = glancing.sampler._every_tick[0].collector
    # besides the windows' ends: a second's worth of ticks after each move, until it is calm again
    assert collector.asked < len(glancing.ticks) * 0.6


def test_a_move_is_seen_at_a_glance():
    """The tick at which the process has moved is a full one, and the cadence quickens as ever."""
    clock = Clock()
    bench = Bench(Watched(clock, lambda seconds: 100.0 if seconds < 5.0 else 100.0 + 800.0 * (seconds - 5.0)))
    bench.run(5.6)
    moving = [at for at in bench.ticks if at > 5.25]
    assert len(moving) >= 3
    assert max(later - earlier for earlier, later in itertools.pairwise(moving)) <= 0.1
    quiet = [at for at in bench.ticks if 2.0 < at < 5.0]
    assert len(quiet) <= 3 / CALM_S + 4


@pytest.mark.parametrize("headroom_pct", [10.0, 90.0])
def test_no_glances_when_the_limit_is_near(headroom_pct):
    """The limit may be reached by others in the container while the process stands still."""
    clock = Clock()

    class Container(Curve):
        def collect(self, now_ns):
            self.asked = getattr(self, "asked", 0) + 1
            return ((metrics.CONTAINER_HEADROOM, headroom_pct), (metrics.CONTAINER_LIMIT, 1000.0))

        def high_water(self):
            return ()

        def moved(self):
            return False

    container = Container(clock, steps)
    bench = Bench(Watched(clock, lambda _: 100.0), container)
    bench.run(20.0)
    is_full = container.asked == len(bench.ticks)
    assert is_full == (headroom_pct < 25.0)


# -- windows --------------------------------------------------------------------------------------------------------


def test_window_boundaries_do_not_drift(clock):
    """A thousand windows, each tick 7 ms late: the last one ends where it should, give or take one lateness."""
    bench = Bench(Curve(clock, lambda t: 100.0 + 3 * (t % 7)))
    bench.run(1000.0, late_s=0.007)
    assert len(bench.windows) == 999
    for number, row in enumerate(bench.windows):
        assert row.first == row.last == number
        assert bench.seconds(row.end_ns) == pytest.approx(number + 1.007, abs=0.0071)
    for earlier, later in zip(bench.windows, bench.windows[1:], strict=False):
        assert earlier.end_ns == later.start_ns


def test_wall_clock_of_windows(clock):
    """The wall clock of a window's end is that of its last sample."""
    bench = Bench(Curve(clock, lambda t: 100.0))
    bench.run(3.0)
    assert [row.end_wall_ns - row.end_ns for row in bench.windows] == [clock.wall_ns - clock.now_ns] * 3


def test_missed_windows_are_skipped(clock):
    """After the machine slept for an hour there is one long window, not 3600 short ones, and then the old rhythm."""
    bench = Bench(Curve(clock, lambda t: 100.0))
    bench.run(5.0)
    assert len(bench.windows) == 5
    clock.advance(3600.3)
    bench.run(clock.seconds + 3.0)
    assert len(bench.windows) == 9
    assert bench.windows[5].seconds == pytest.approx(3600.3, abs=0.3)
    assert [bench.seconds(row.end_ns) % 1.0 for row in bench.windows[6:]] == pytest.approx([0.0] * 3)
    assert [row.first for row in bench.windows] == list(range(9))


def test_late_windows_end_apart(clock):
    """A tick that is late by nearly a window, half a millisecond before the next deadline: trackers would have two
    points in one millisecond."""
    bench = Bench(Curve(clock, lambda t: 100.0))
    bench.run(5.0)
    clock.advance(1.9995)
    bench.run(clock.seconds + 3.0)
    assert [bench.seconds(row.end_ns) for row in bench.windows[5:]] == pytest.approx([6.9995, 8.0, 9.0])


def test_no_burst_after_being_late(clock):
    """Ticks that were missed are not made up for."""
    bench = Bench(Curve(clock, lambda t: 100.0 + 10 * t))
    bench.run(2.0)
    clock.advance(60.0)
    before = len(bench.ticks)
    bench.run(clock.seconds + 1.0)
    assert len(bench.ticks) - before <= 13


def test_lateness_is_reported(clock):
    """The largest lateness of a tick stands until it was told."""
    bench = Bench(Curve(clock, lambda t: 100.0))
    bench.run(2.0, late_s=0.03)
    assert bench.sampler.late_max_ms == pytest.approx(30.0)


def test_window_holds_what_was_sampled(clock):
    """Minimum, maximum, last and the time-weighted mean of a ramp."""
    bench = Bench(Curve(clock, lambda t: 100.0 + 10.0 * t))
    bench.run(2.0)
    cell = bench.windows[1].cells[metrics.RSS]
    assert (cell.max, cell.last, cell.label) == (120.0, 120.0, SAMPLED)
    assert 110.0 < cell.min <= 112.5
    assert cell.mean == pytest.approx(115.0, abs=1.3)
    assert cell.count >= 4


def test_held_values(clock):
    """In a window in which a collector was not due, its last value stands in, marked as held."""
    curve, slow = Curve(clock, lambda t: 100.0), Slow(clock, 3.0, HELD)
    bench = Bench(curve, slow)
    bench.run(7.0)
    counts = [row.cells[HELD].count for row in bench.windows]
    assert counts == [1, 0, 1, 0, 0, 1, 0]
    assert [row.cells[HELD].last for row in bench.windows] == [1, 1, 2, 2, 2, 3, 3]
    assert bench.windows[1].cells[HELD].max_ns < bench.windows[1].start_ns


def test_cut_on_request(clock):
    """A request ends the window at once with a last sample, and windows count from there on."""
    bench = Bench(Curve(clock, lambda t: 100.0 + t), Slow(clock, 3.0))
    bench.run(1.4)
    bench.sampler.cut_on_request(clock.now_ns, clock.wall_ns)
    assert [bench.seconds(row.end_ns) for row in bench.windows] == pytest.approx([1.0, 1.4])
    assert bench.windows[1].cells[metrics.RSS].last == pytest.approx(101.4)
    bench.run(4.0)
    assert [bench.seconds(row.end_ns) for row in bench.windows] == pytest.approx([1.0, 1.4, 2.4, 3.4])


def test_cut_when_a_window_has_just_ended(clock):
    """A request at the very end of a window makes no second, empty window."""
    bench = Bench(Curve(clock, lambda t: 100.0), Slow(clock, 3.0))
    bench.run(0.999)
    clock.advance_to(bench.start_ns + SECOND_NS)
    bench.sampler.cut_on_request(clock.now_ns, clock.wall_ns)
    bench.sampler.cut_on_request(clock.now_ns, clock.wall_ns)
    assert all(row.cells[metrics.RSS].count for row in bench.windows)
    bench.finish()
    assert all(row.seconds > 0 or row.cells[metrics.RSS].count for row in bench.windows)
    assert bench.windows[0].seconds == 1.0


def test_finish(clock):
    """The last window ends as it stands, every collector is closed once, and nothing empty is handed over."""
    curve = Curve(clock, lambda t: 100.0)
    bench = Bench(curve, Slow(clock, 3.0))
    bench.run(1.3)
    bench.finish()
    assert [bench.seconds(row.end_ns) for row in bench.windows] == pytest.approx([1.0, 1.3])
    assert curve.closed == 1


def test_finish_with_nothing_new(clock):
    """A process that dies just after a window has ended leaves no window of held values only."""
    bench = Bench(Curve(clock, lambda t: 100.0), Slow(clock, 3.0))
    bench.run(2.0)
    clock.advance(0.05)
    bench.finish()
    assert len(bench.windows) == 2


# -- how often ------------------------------------------------------------------------------------------------------


def test_calm_process_is_left_alone(clock):
    """Where nothing moves, some ticks a second are enough."""
    bench = Bench(Curve(clock, lambda t: 100.0))
    bench.run(60.0)
    assert len(bench.ticks) / 60 == pytest.approx(1 / CALM_S, rel=0.2)


def test_moving_process_is_watched(clock):
    """While memory moves, the sampler looks at least every ``tick_s``; when it moves fast, every 20 ms."""
    bench = Bench(Curve(clock, lambda t: 100.0 + 20 * t))
    bench.run(20.0)
    assert len(bench.ticks) / 20 == pytest.approx(10, abs=1)
    fast = Bench(Curve(Clock(), lambda t: 100.0 + 5000 * t))
    fast.run(5.0)
    assert len(fast.ticks) / 5 == pytest.approx(50, abs=3)


def test_ticks_out_of_turn_do_not_put_off_the_next(clock):
    """After a second of requests to look now, the next look comes as soon as ever."""
    bench = Bench(Curve(clock, lambda t: 100.0))
    bench.run(5.0)
    for _ in range(100):
        clock.advance(0.01)
        bench.tick()
    assert bench.sampler.due_ns - clock.now_ns <= CALM_S * SECOND_NS + 1
    before = clock.now_ns
    bench.run(clock.seconds + 2.0)
    assert len([at for at in bench.ticks if at > (before - clock.zero_ns) / 1e9]) >= 8


def test_interval_that_is_no_multiple_of_the_tick(clock):
    """The window's end is a tick out of turn, and does not slow down the others."""
    bench = Bench(Curve(clock, lambda t: 100.0 + t), interval_s=0.33)
    bench.run(33.0)
    gaps = [later - earlier for earlier, later in zip(bench.ticks, bench.ticks[1:], strict=False)]
    assert max(gaps) <= CALM_S + 1e-6
    assert len(bench.windows) == 100


def test_exhausted_budget_stretches(clock):
    """When the agent has used more of the processor than it may, it looks as in calm times, and asks less."""

    class Costly(Curve):
        def collect(self, now_ns):
            clock.spend_cpu(0.002)
            return super().collect(now_ns)

    slow = Slow(clock, 1.0)
    bench = Bench(Costly(clock, lambda t: 100.0 + 30 * t), slow, share=0.002)
    bench.run(120.0)
    late = [at for at in bench.ticks if at > 60.0]
    assert len(late) / 60 < 6
    asked = [at for at in slow.asked if at > 60.0]
    assert len(asked) <= 60 / 2 + 1
    thrifty = Bench(Curve(Clock(), lambda t: 100.0 + 30 * t), share=0.002)
    thrifty.run(120.0)
    assert len([at for at in thrifty.ticks if at > 60.0]) / 60 > 9


def test_expensive_collector_is_asked_rarely(clock):
    """A collector that takes 20 ms is asked every 60 s only: no more than 0.03 % of a core."""
    slow = Slow(clock, 1.0, cost_s=0.02)
    bench = Bench(Curve(clock, lambda t: 100.0), slow)
    bench.run(400.0)
    gaps = [later - earlier for earlier, later in zip(slow.asked, slow.asked[1:], strict=False)]
    assert min(gaps) >= 0.02 * COST_FACTOR - 1.5
    assert len(slow.asked) == pytest.approx(400 / 60, abs=2)


def test_stale_collector_is_asked_early(clock):
    """One that knows its value is out of date is asked again soon, though it is expensive, and pays later."""
    slow = Slow(clock, 2.0, cost_s=0.005)
    bench = Bench(Curve(clock, lambda t: 100.0), slow)
    bench.run(3.0)
    assert len(slow.asked) == 1
    slow.stale = True
    bench.run(4.5)
    assert len(slow.asked) == 2
    bench.run(14.0)
    assert len(slow.asked) == 2, "it is one call ahead of its time already"
    slow.stale = False
    bench.run(50.0)
    assert len(slow.asked) <= 5


def test_estimates_stand_in_where_there_are_some(clock):
    """Between two calls of an expensive collector its own estimate is shown, as estimated and with a count of 0."""

    class Estimating(Slow):
        def between(self):
            return ((SLOW, 7.0),)

    bench = Bench(Curve(clock, lambda t: 100.0), Estimating(clock, 3.0))
    bench.run(6.0)
    cells = [row.cells[SLOW] for row in bench.windows]
    assert {(cell.mean, cell.label) for cell in cells if cell.count == 0} == {(7.0, ESTIMATED)}
    assert ESTIMATED not in {cell.label for cell in cells if cell.count}


# -- peaks ----------------------------------------------------------------------------------------------------------


def test_spike_that_no_sample_saw(clock):
    """A rise of the kernel's high-water mark is the exact maximum of the window it came in, and of no other."""
    bench = Bench(Curve(clock, lambda t: 100.0, peaks=[(2.55, 400.0)]))
    bench.run(5.0)
    assert [row.cells[metrics.RSS].max for row in bench.windows] == [100.0, 100.0, 400.0, 100.0, 100.0]
    cell = bench.windows[2].cells[metrics.RSS]
    assert cell.label == EXACT
    assert 2.55 <= bench.seconds(cell.max_ns) <= 3.05
    assert cell.mean == pytest.approx(100.0)


def test_spike_just_before_a_window_ends(clock):
    """It belongs to the window that ends, not to the next."""
    bench = Bench(Curve(clock, lambda t: 100.0, peaks=[(2.999, 400.0)]))
    bench.run(5.0)
    assert [row.cells[metrics.RSS].max for row in bench.windows] == [100.0, 100.0, 400.0, 100.0, 100.0]


def test_first_high_water_mark_is_history(clock):
    """What the process had reached before memtrack looked for the first time is not ascribed to any window."""
    curve = Curve(clock, lambda t: 100.0, peaks=[(0.0, 900.0)])
    bench = Bench(curve)
    bench.run(3.0)
    assert max(row.cells[metrics.RSS].max for row in bench.windows) == 100.0


def test_small_lag_of_the_high_water_mark(clock):
    """A difference within the kernel's own inaccuracy makes no exact peak."""
    bench = Bench(Curve(clock, lambda t: 100.0, peaks=[(1.5, 100.9)]))
    bench.run(3.0)
    assert {row.cells[metrics.RSS].max for row in bench.windows} == {100.0}
    assert {row.cells[metrics.RSS].label for row in bench.windows} == {SAMPLED}


def test_second_lower_spike_is_caught_by_looking_faster(clock):
    """After one spike, a lower one of 60 ms within the minute is sampled, though it is no new high-water mark."""
    bench = Bench(Curve(clock, lambda t: 300.0 if 20.30 <= t < 20.36 else 100.0, peaks=[(5.1, 400.0)]))
    bench.run(25.0)
    assert bench.windows[20].cells[metrics.RSS].max == 300.0


# -- places ---------------------------------------------------------------------------------------------------------


def test_step_and_phase_of_a_maximum(clock):
    """The maximum carries where the training stood."""
    bench = Bench(Curve(clock, lambda t: 100.0 + (50.0 if 1.5 <= t < 2.1 else 0.0)))
    bench.run(
        4.0, script=[(0.2, lambda: bench.marks.move(1, 2, step=7)), (1.2, lambda: bench.marks.move(1, 3, step=8))]
    )
    cell = bench.windows[1].cells[metrics.RSS]
    assert (cell.max, cell.step, cell.phase) == (150.0, 8, 3)
    assert bench.windows[0].step == 7
    assert bench.windows[3].step == 8


def test_phase_rows(clock):
    """Each phase has a row of its own, also the outer ones, and phase 0 is everything."""
    levels = [(0.0, 100.0), (2.0, 200.0), (4.0, 300.0), (6.0, 150.0)]
    bench = Bench(Curve(clock, lambda t: [mib for at, mib in levels if at <= t][-1]))
    marks = bench.marks
    script = [(2.0, lambda: marks.move(1)), (4.0, lambda: marks.move(1, 2)), (6.0, lambda: marks.move())]
    bench.run(8.0, script=[(at - 0.01, call) for at, call in script])
    bench.finish()
    maxima = {phase: row.cells[metrics.RSS].max for phase, row in bench.phases.items()}
    assert maxima == {0: 300.0, 1: 300.0, 2: 300.0}
    assert bench.phases[2].cells[metrics.RSS].min >= 200.0
    assert bench.phases[1].cells[metrics.RSS].seconds == pytest.approx(4.0, abs=0.3)
    assert bench.phases[2].cells[metrics.RSS].seconds == pytest.approx(2.0, abs=0.3)
    assert bench.phases[0].cells[metrics.RSS].seconds == pytest.approx(8.0, abs=0.3)
    assert bench.phases[0].cells[metrics.RSS].count == sum(row.cells[metrics.RSS].count for row in bench.windows)


def test_phase_rows_know_the_wall_clock(clock):
    """However a row of a phase came to be stored, its wall clock belongs to its end."""
    bench = Bench(Curve(clock, lambda t: 100.0 + t))
    bench.run(3.3, script=[(1.1, lambda: bench.marks.move(1)), (1.9, lambda: bench.marks.move()), (3.2, lambda: None)])
    bench.finish()
    shift_ns = clock.wall_ns - clock.now_ns
    assert {phase: row.end_wall_ns - row.end_ns for phase, row in bench.phases.items()} == {0: shift_ns, 1: shift_ns}


def test_spike_when_phases_changed_in_between(clock):
    """Between two looks the training was in two phases: the height is exact for the run and a bound for each phase."""
    curve = Curve(clock, lambda t: 100.0, peaks=[(2.1, 500.0)])
    bench = Bench(curve)
    marks = bench.marks
    marks.move(1)
    bench.run(2.05)
    clock.advance_to(bench.start_ns + round(2.12 * SECOND_NS))
    marks.move(2)
    clock.advance_to(bench.start_ns + round(2.2 * SECOND_NS))
    bench.tick()
    bench.run(4.0)
    bench.finish()
    assert (bench.windows[2].cells[metrics.RSS].max, bench.windows[2].cells[metrics.RSS].label) == (500.0, EXACT)
    found = {phase: (row.cells[metrics.RSS].max, row.cells[metrics.RSS].label) for phase, row in bench.phases.items()}
    assert found == {0: (500.0, EXACT), 1: (500.0, BOUND), 2: (500.0, BOUND)}
    assert [row.cells[metrics.RSS].max for row in bench.windows if row.first != 2] == [100.0] * (len(bench.windows) - 1)


def test_phase_too_short_to_be_sampled(clock):
    """A phase between two looks, in which the high-water mark rose, is known by the bound."""
    bench = Bench(Curve(clock, lambda t: 100.0, peaks=[(2.1, 500.0)]))
    bench.run(2.05)
    for at, phases in ((2.06, (5,)), (2.24, ())):
        clock.advance_to(bench.start_ns + round(at * SECOND_NS))
        bench.marks.move(*phases)
    bench.run(3.0)
    bench.finish()
    assert (bench.phases[5].cells[metrics.RSS].max, bench.phases[5].cells[metrics.RSS].label) == (500.0, BOUND)
    assert bench.windows[2].cells[metrics.RSS].phase == 5, "where the training was longest"


def test_level_that_rises_with_a_phase(clock):
    """Memory that is there at the first look in a new phase was sampled in that one, and bounds the one before."""
    bench = Bench(Curve(clock, lambda t: 100.0 if t < 2.1 else 300.0))
    bench.marks.move(1)
    bench.run(4.0, script=[(2.08, lambda: bench.marks.move(2))])
    bench.finish()
    found = {phase: (row.cells[metrics.RSS].max, row.cells[metrics.RSS].label) for phase, row in bench.phases.items()}
    assert found == {0: (300.0, EXACT), 1: (300.0, BOUND), 2: (300.0, SAMPLED)}
    assert bench.phases[1].cells[metrics.RSS].last == 100.0


def test_outer_phase_of_a_spike_is_exact(clock):
    """Of a phase that was open all the time, the height is exact, though the inner ones changed."""
    bench = Bench(Curve(clock, lambda t: 100.0, peaks=[(2.1, 500.0)]))
    bench.marks.move(1, 2)
    bench.run(4.0, script=[(2.08, lambda: bench.marks.move(1, 3))])
    bench.finish()
    labels = {phase: row.cells[metrics.RSS].label for phase, row in bench.phases.items()}
    assert labels == {0: EXACT, 1: EXACT, 2: BOUND, 3: BOUND}
    assert {row.cells[metrics.RSS].max for row in bench.phases.values()} == {500.0}


def test_spike_inside_one_phase_is_exact(clock):
    """Where the phase did not change in between, its peak is exact."""
    bench = Bench(Curve(clock, lambda t: 100.0, peaks=[(2.1, 500.0)]))
    bench.marks.move(1)
    bench.run(4.0)
    bench.finish()
    assert (bench.phases[1].cells[metrics.RSS].max, bench.phases[1].cells[metrics.RSS].label) == (500.0, EXACT)


def test_phase_limit(clock):
    """Phases beyond the limit get no row; each is counted once, and windows go on as ever."""
    bench = Bench(Curve(clock, lambda t: 100.0), phase_limit=3)
    for number in range(1, 7):
        bench.marks.move(number)
        bench.run(number * 2.0)
    bench.finish()
    assert set(bench.phases) == {0, 1, 2, 3}
    assert bench.sampler.dropped == 3
    assert len(bench.windows) == 12


def test_marks_are_handed_over(clock):
    """Each mark once, in order; also those that came after the last look, before the process died."""
    bench = Bench(Curve(clock, lambda t: 100.0))
    bench.run(2.5, script=[(0.5, lambda: bench.marks.move(1)), (1.7, lambda: bench.marks.move(2))])
    bench.marks.move(3, step=99)
    bench.finish()
    assert [mark.place.phases for mark in bench.seen_marks] == [(1,), (2,), (3,)]
    assert bench.windows[-1].step == 99


# -- collectors that fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("odd"), IndexError("surprise"), KeyError("surprise")])
def test_collector_that_raises_is_skipped_and_recovers(clock, error):
    """One that fails is left out of the windows, the others go on, and it is back when it works again."""
    slow, other = Slow(clock, 1.0), Slow(clock, 1.0, HELD)
    bench = Bench(Curve(clock, lambda t: 100.0), slow, other)
    bench.run(3.0)
    slow.broken = error
    bench.run(6.0)
    slow.broken = None
    bench.run(9.5)
    with_slow = [SLOW in row.cells for row in bench.windows]
    assert with_slow[:2] == [True, True]
    assert not any(with_slow[4:6])
    assert all(with_slow[7:])
    assert all(HELD in row.cells and metrics.RSS in row.cells for row in bench.windows)


def test_first_collector_fails_for_a_while(clock):
    """Even without RSS, windows go on with what there is."""
    curve = Curve(clock, lambda t: 100.0)
    good, curve.value = curve.value, lambda t: 1 / 0
    bench = Bench(curve, Slow(clock, 1.0))
    bench.run(3.0)
    assert [set(row.cells) for row in bench.windows] == [{SLOW}] * 3
    curve.value = good
    bench.run(4.0)
    assert metrics.RSS in bench.windows[3].cells
