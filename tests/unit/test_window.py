"""Windows merge exactly: what a merged window says is what sampling the joint interval would have said."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrack.sampling.window import BOUND, EXACT, NO_STEP, NOWHERE, SAMPLED, Cell, Place, Row

places = st.builds(
    Place,
    st.integers(-1, 1000),
    st.integers(-1, 10),
    st.lists(st.integers(1, 31), max_size=3).map(tuple),
)
samples = st.tuples(
    st.floats(0.0, 1e6),
    st.sampled_from([0.0, 0.02, 0.1, 0.25, 1.0, 3.7]),
    places,
    st.none() | st.tuples(st.floats(0.0, 1e6), st.sampled_from([EXACT, BOUND])),
)


def take(row, number, sample, metric="memory/process/rss_mib"):
    """One sample into a row, and what the kernel said of a spike that no sample saw."""
    value, seconds, place, raised = sample
    now_ns = (number + 1) * 10**7
    row.add(metric, value, now_ns, place, seconds)
    if raised is not None:
        row.raise_max(metric, raised[0], now_ns, place, raised[1])
    row.end_ns, row.end_wall_ns = now_ns, now_ns + 10**18
    row.step = place.step


def fields(cell):
    return {
        name: getattr(cell, name)
        for name in ("min", "max", "max_ns", "step", "epoch", "phase", "label", "last", "count")
    }


@given(st.lists(samples, min_size=1, max_size=60), st.data())
def test_merging_any_split_equals_sampling_it_whole(series, data):
    """However a series is cut into windows, and in whatever order neighbours are merged, the result is the same."""
    whole = Row(0, 0)
    for number, sample in enumerate(series):
        take(whole, number, sample)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(series)), max_size=8)) | {0, len(series)})
    rows = []
    for window, (start, end) in enumerate(itertools.pairwise(cuts)):
        row = Row(window, start * 10**7)
        for number in range(start, end):
            take(row, number, series[number])
        rows.append(row)
    while len(rows) > 1:
        at = data.draw(st.integers(0, len(rows) - 2))
        rows[at].merge(rows.pop(at + 1))
    merged = rows[0]
    assert (merged.first, merged.last) == (0, len(cuts) - 2)
    assert (merged.start_ns, merged.end_ns, merged.end_wall_ns) == (0, whole.end_ns, whole.end_wall_ns)
    for metric, cell in whole.cells.items():
        other = merged.cells[metric]
        assert fields(other) == fields(cell)
        assert other.mean == pytest.approx(cell.mean, rel=1e-9, abs=1e-9)
        assert other.seconds == pytest.approx(cell.seconds, rel=1e-9)


@given(st.lists(samples, min_size=1, max_size=30))
def test_mean_is_weighted_by_time(series):
    """The mean is that of the curve, not of the samples, which come faster when memory moves."""
    row = Row(0, 0)
    for number, sample in enumerate(series):
        take(row, number, sample)
    cell = row.cells["memory/process/rss_mib"]
    seconds = sum(sample[1] for sample in series)
    if seconds:
        expected = sum(sample[0] * sample[1] for sample in series) / seconds
        assert cell.mean == pytest.approx(expected, rel=1e-9, abs=1e-9)
    else:
        assert cell.mean == series[-1][0]


def test_metric_of_one_side_only():
    """A metric that only one of two windows has is taken over as it is, and is a copy."""
    left, right = Row(0, 0), Row(1, 10)
    left.add("a", 1.0, 5, NOWHERE, 1.0)
    right.add("b", 2.0, 15, NOWHERE, 1.0)
    left.merge(right)
    assert set(left) == {"a", "b"}
    right.add("b", 9.0, 16, NOWHERE, 1.0)
    assert left.cells["b"].max == 2.0


def test_of_equal_maxima_the_first_stands():
    """The time of a maximum is when it was reached, not when it was last held."""
    left, right = Cell(5.0, 100, Place(1)), Cell(5.0, 200, Place(2))
    left.merge(right)
    assert (left.max_ns, left.step) == (100, 1)


def test_held_value_yields_to_a_measured_one():
    """A value that was only held over from an earlier window does not say when the maximum stood."""
    held, measured = Cell(5.0, 100, Place(1)), Cell(5.0, 200, Place(2), 0.5)
    held.count = 0
    held.merge(measured)
    assert (held.max_ns, held.step, held.count, held.mean) == (200, 2, 1, 5.0)


def test_held_value_does_not_move_the_mean():
    """A held value carries no time, so the mean of measured ones stays."""
    measured, held = Cell(4.0, 100, NOWHERE, 2.0), Cell(8.0, 50, NOWHERE)
    held.count = 0
    measured.merge(held)
    assert (measured.mean, measured.count, measured.last) == (4.0, 1, 8.0)


def test_raised_maximum_leaves_the_mean():
    """A maximum that the kernel told of says nothing about how long it stood."""
    row = Row(0, 0)
    row.add("m", 10.0, 5, NOWHERE, 1.0)
    row.raise_max("m", 90.0, 7, Place(3, 1, (4, 6)), EXACT)
    cell = row.cells["m"]
    assert (cell.max, cell.mean, cell.last, cell.label, cell.phase) == (90.0, 10.0, 10.0, EXACT, 6)
    row.raise_max("m", 50.0, 8, Place(4), EXACT)
    assert (cell.max, cell.max_ns) == (90.0, 7)
    row.raise_max("unknown", 50.0, 8, Place(4), EXACT)
    assert set(row.cells) == {"m"}


def test_step_of_a_row_is_the_last_known():
    """Windows in which no step was marked do not erase the last one."""
    left, right = Row(0, 0), Row(1, 10)
    left.step = 7
    left.merge(right)
    assert left.step == 7
    right.step = 9
    left.merge(right)
    assert left.step == 9


def test_copy_is_independent():
    """A copy says the same, and goes its own way afterwards."""
    row = Row(3, 10)
    take(row, 1, (5.0, 1.0, Place(1, 2, (3,)), None))
    twin = row.copy()
    before = fields(row.cells["memory/process/rss_mib"])
    assert fields(twin.cells["memory/process/rss_mib"]) == before
    assert (twin.first, twin.last, twin.start_ns, twin.end_ns, twin.step) == (3, 3, 10, row.end_ns, 1)
    twin.add("memory/process/rss_mib", 99.0, 99, NOWHERE, 1.0)
    assert fields(row.cells["memory/process/rss_mib"]) == before


def test_times_of_a_row():
    """Length and wall clock follow from the monotonic times."""
    row = Row(0, 2 * 10**9)
    row.end_ns, row.end_wall_ns = 5 * 10**9, 1000 * 10**9
    assert row.seconds == 3.0
    assert row.start_wall_ns == 997 * 10**9


def test_place():
    """A place knows its innermost phase, and stands for itself where something that knows the place is wanted."""
    place = Place(4, 2, (5, 9))
    assert (place.phase, place.place()) == (9, place)
    assert (NOWHERE.phase, NOWHERE.step, NOWHERE.epoch) == (0, NO_STEP, NO_STEP)
    assert Cell(1.0, 0, place).label == SAMPLED
