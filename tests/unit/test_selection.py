"""Selective logging: the chart that is drawn of the chosen points, against the one of all windows."""

from __future__ import annotations

import bisect
import csv
import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrack import metrics
from memtrack.sampling.window import Cell, Place, Row
from memtrack.sinks.selection import HOLD_S, RESOLUTION, SHARE, Selection, hold_s

SECOND_NS = 10**9
WALL_NS = 1_700_000_000 * SECOND_NS
TRACES = sorted((Path(__file__).parents[1] / "data" / "traces").glob("*.csv.gz"))
PEAK = metrics.peak_name(metrics.RSS)
WEEK_S = 7 * 86400


def row_at(number, cells, interval_s=1.0):
    """A window that ends ``number + 1`` intervals after the start; ``cells`` are (mean, max) by name."""
    row = Row(number, round(number * interval_s * SECOND_NS))
    row.end_ns = round((number + 1) * interval_s * SECOND_NS)
    row.end_wall_ns = WALL_NS + row.end_ns
    for name, (mean, highest) in cells.items():
        cell = row.cells[name] = Cell(mean, row.end_ns, Place(), interval_s)
        cell.max = highest
    return row


def rows_of(values, name=metrics.TREE_PSS, interval_s=1.0):
    return [row_at(number, {name: (value, value)}, interval_s) for number, value in enumerate(values)]


def chosen(rows, choice="all", flush=10):
    """The points of each series, chosen as a delivery does it: some windows at a time, the rest in the end."""
    selection = Selection(choice)
    found = [point for first in range(0, len(rows), flush) for point in selection.take(rows[first : first + flush])]
    series = {}
    for point in found + selection.rest():
        series.setdefault(point.name, []).append((point.timestamp_ms, point.value))
    return series


def drawn(points, timestamp_ms):
    """What a chart of straight lines shows at a time."""
    at = bisect.bisect_left(points, (timestamp_ms, float("-inf")))
    (later_ms, later) = points[at]
    if later_ms == timestamp_ms:
        return later
    earlier_ms, earlier = points[at - 1]
    return earlier + (later - earlier) * (timestamp_ms - earlier_ms) / (later_ms - earlier_ms)


def check_chart(points, full, unit="MiB"):
    """Assert the bound of the error, and that every point is one of the windows. Returns the greatest error."""
    assert points == sorted(points), "out of order"
    assert set(points) <= set(full), "a point that was not measured"
    assert len(set(points)) == len(points), "a point came twice"
    values = [value for _, value in full]
    bound = max(SHARE * (max(values) - min(values)), RESOLUTION.get(unit, 0.0)) * (1 + 1e-9)
    worst = max(abs(drawn(points, timestamp_ms) - value) for timestamp_ms, value in full)
    assert worst <= bound
    for pick in (min, max):
        assert abs(pick(value for _, value in points) - pick(values)) <= RESOLUTION.get(unit, 0.0)
    return worst


def full_series(rows, name):
    return [(round(row.end_wall_ns / 1e6), row.cells[name].mean) for row in rows]


LEVELS = st.floats(0, 5000, allow_nan=False, width=32)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(LEVELS, st.integers(1, 30), st.floats(-3, 3), st.floats(0, 2)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_error_is_bounded(parts, dice):
    """Plateaus, ramps and noise in any order: the redrawn chart is off by 1 % of the range at the most."""
    values = [
        level + slope * second + dice.uniform(-noise, noise)
        for level, seconds, slope, noise in parts
        for second in range(seconds)
    ]
    rows = rows_of(values)
    check_chart(chosen(rows)[metrics.TREE_PSS], full_series(rows, metrics.TREE_PSS))


@settings(max_examples=50, deadline=None)
@given(st.lists(LEVELS, min_size=2, max_size=60), st.integers(1, 60))
def test_how_often_it_is_flushed_changes_nothing(values, flush):
    rows = rows_of(values)
    assert chosen(rows, flush=flush) == chosen(rows, flush=1)


@pytest.mark.parametrize("name", ["memory/cache/share", metrics.TREE_PROCESSES])
def test_units_without_a_resolution(name):
    """A gauge between 0 and 1 is drawn as closely as one in MiB."""
    dice = random.Random(3)
    rows = rows_of([0.5 + 0.4 * dice.random() * (second % 7 == 0) for second in range(300)], name)
    check_chart(chosen(rows)[name], full_series(rows, name), metrics.unit_of(name))


def test_a_series_that_stands_still():
    """The first point, then one a minute, then the last."""
    (points,) = chosen(rows_of([300.0] * 601)).values()
    seconds = [(stamp - points[0][0]) / 1000 for stamp, _ in points]
    assert seconds == [60.0 * minute for minute in range(11)]


def test_a_steady_slope():
    """A line needs its ends, and a point a minute to grow while it is watched."""
    (points,) = chosen(rows_of([100.0 + 2.5 * second for second in range(601)])).values()
    assert len(points) == 11


def test_a_step():
    """The point before it and the point after it are there, and where it was seen is where it is drawn."""
    rows = rows_of([100.0] * 30 + [900.0] * 30)
    points = chosen(rows)[metrics.TREE_PSS]
    assert [((stamp - WALL_NS // 10**6) // 1000, value) for stamp, value in points] == [
        (1, 100.0),
        (30, 100.0),
        (31, 900.0),
        (60, 900.0),
    ]


def test_heights_of_spikes_with_ripple_on_top():
    """A spike that lasts is as high in the chart as it was, also if it is not the highest."""
    values = [400.0] * 50 + [2000.0] + [400.0] * 50 + [1000.0, 1003.0, 1001.0] + [400.0] * 50
    (points,) = chosen(rows_of(values)).values()
    assert {2000.0, 1003.0} <= {value for _, value in points}
    assert len(points) <= 14


def test_a_series_that_ends_and_begins_again():
    """What is not measured any more, as of a worker that has ended, has its last point at once."""
    worker = metrics.WORKER_RSS.format(1)
    cells = {metrics.TREE_PSS: (300.0, 300.0)}
    rows = [row_at(n, {**cells, worker: (50.0, 50.0)} if n < 10 or n >= 20 else cells) for n in range(30)]
    selection = Selection("all")
    assert [p.timestamp_ms for p in selection.take(rows[:10]) if p.name == worker] == [WALL_NS // 10**6 + 1000]
    assert [p.timestamp_ms for p in selection.take(rows[10:11]) if p.name == worker] == [WALL_NS // 10**6 + 10000]
    assert [p.timestamp_ms for p in selection.take(rows[11:]) if p.name == worker] == [WALL_NS // 10**6 + 21000]


def test_what_is_no_number():
    """NaN and infinity are sent as they are, and what surrounds them too."""
    values = [1.0, 1.0, 1.0, float("nan"), 1.0, 1.0, float("inf"), 1.0, 1.0]
    (points,) = chosen(rows_of(values)).values()
    seconds = [(stamp - WALL_NS // 10**6) // 1000 for stamp, _ in points]
    assert seconds == [1, 3, 4, 5, 6, 7, 8, 9]


def test_which_series():
    """The choice of metrics is respected, and a peak is chosen apart from its mean."""
    rows = [row_at(n, {metrics.RSS: (100.0, 900.0 if n == 30 else 100.0), metrics.SWAP: (n, n)}) for n in range(50)]
    series = chosen(rows, choice="default")
    assert set(series) == {metrics.RSS, PEAK}
    assert [value for _, value in series[metrics.RSS]] == [100.0, 100.0]
    assert [value for _, value in series[PEAK]] == [100.0, 100.0, 900.0, 100.0, 100.0]


def test_a_copy_is_independent():
    """A delivery that fails is tried again as if it had not been: with the same points."""
    rows = rows_of([100.0, 100.0, 500.0, 100.0, 700.0, 100.0])
    selection = Selection("all")
    first = selection.take(rows[:2])
    trial = selection.copy()
    assert trial.take(rows[2:]) == selection.copy().take(rows[2:])
    assert first == selection.copy().take([]) + first
    assert trial.rest() != selection.rest()


def test_holding_back():
    assert [hold_s(age_s) for age_s in (0.0, 3600.0, 5 * 3600.0)] == [HOLD_S] * 3
    assert hold_s(WEEK_S) == pytest.approx(2016.0)


def test_a_week():
    """A week at a window a second, flat but for ten spikes of a second: at most 2,000 points a series, every height
    and its time exact."""
    dice = random.Random(11)
    spikes = {dice.randrange(WEEK_S): 500.0 + 37.3 * number for number in range(10)}
    selection = Selection("default")
    series = {}
    for first in range(0, WEEK_S, 600):
        rows = []
        for second in range(first, first + 600):
            mean = 400.0 + dice.uniform(-0.02, 0.02)
            rows.append(row_at(second, {metrics.RSS: (mean, spikes.get(second, mean))}))
        for point in selection.take(rows):
            series.setdefault(point.name, []).append((point.timestamp_ms, point.value))
    for point in selection.rest():
        series[point.name].append((point.timestamp_ms, point.value))
    for name in (metrics.RSS, PEAK):
        assert len(series[name]) <= 2000
        pauses_s = [
            (later - earlier) / 1000 for (earlier, _), (later, _) in zip(series[name], series[name][1:], strict=False)
        ]
        assert max(pauses_s) <= hold_s(WEEK_S)
    found = {((stamp - WALL_NS // 10**6) // 1000 - 1, value) for stamp, value in series[PEAK]}
    assert set(spikes.items()) <= found


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name.partition(".")[0])
def test_recorded_traces(path):
    """Real programs: the bound holds for every series, and a chart takes a fraction of the windows."""
    series = {}
    with gzip.open(path, "rt", newline="") as file:
        for name, end_s, mean, highest in csv.reader(file):
            series.setdefault(name, []).append((float(end_s), float(mean), float(highest)))
    assert len(series) >= 12
    sent = windows = 0
    for name, readings in series.items():
        rows = []
        for number, (end_s, mean, highest) in enumerate(readings):
            row = row_at(number, {name: (mean, highest)})
            row.end_ns = round(end_s * SECOND_NS)
            row.end_wall_ns = WALL_NS + row.end_ns
            rows.append(row)
        found = chosen(rows)
        sent += len(found[name])
        windows += len(rows)
        check_chart(found[name], full_series(rows, name), metrics.unit_of(name))
        if metrics.has_peak(name):
            highs = [(round(row.end_wall_ns / 1e6), row.cells[name].max) for row in rows]
            check_chart(found[metrics.peak_name(name)], highs)
    assert sent <= 0.5 * windows


def test_there_are_traces():
    assert len(TRACES) >= 2
