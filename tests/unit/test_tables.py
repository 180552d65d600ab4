"""A recording as numpy arrays, a data frame, an Arrow table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import memtrack
from memtrack import metrics
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import EXACT, Place, Row

SECOND_NS = 10**9
WALL_NS = 1_700_000_000 * SECOND_NS


@pytest.fixture
def path(make_recording):
    """Five windows with a phase; a second metric in the last three; the fourth holds its value over."""
    made = make_recording()
    marks, writer = MarkWriter(made), RecordingWriter(made)
    phase = marks.begin("train")
    for number in range(5):
        row = Row(number, number * SECOND_NS)
        row.end_ns, row.end_wall_ns, row.step = row.start_ns + SECOND_NS, WALL_NS + (number + 1) * SECOND_NS, number
        place = Place(number, 1, (phase.id,) if number else ())
        row.add(metrics.RSS, 100.0 + number, row.start_ns + SECOND_NS // 2, place, 1.0)
        row.add(metrics.RSS, 50.0, row.start_ns + SECOND_NS, place, 1.0)
        row.raise_max(metrics.RSS, 200.0 + number, row.start_ns + SECOND_NS // 4, place, EXACT)
        if number >= 2:
            row.add(metrics.TREE_PSS, 300.0, row.start_ns, place, 0.0)
            if number == 3:
                row.cells[metrics.TREE_PSS].count = 0
        writer.append(row)
    writer.publish(Head())
    writer.close()
    marks.close()
    return made


def test_numpy(path):
    """One structured array a metric, oldest first, with the documented fields and values."""
    np = pytest.importorskip("numpy")
    with memtrack.open_recording(path) as recording:
        arrays = recording.to_numpy()
    assert {name: array.shape for name, array in arrays.items()} == {metrics.RSS: (5,), metrics.TREE_PSS: (3,)}
    rss = arrays[metrics.RSS]
    assert rss.dtype.names == (
        "start", "end", "min", "max", "mean", "last", "count", "max_time", "step", "epoch", "phase", "label",
    )  # fmt: skip
    np.testing.assert_array_equal(rss["max"], [200, 201, 202, 203, 204])
    np.testing.assert_array_equal(rss["min"], [50] * 5)
    np.testing.assert_array_equal(rss["mean"], [75.0, 75.5, 76.0, 76.5, 77.0])
    np.testing.assert_array_equal(rss["last"], [50] * 5)
    np.testing.assert_array_equal(rss["step"], range(5))
    np.testing.assert_array_equal(rss["epoch"], [1] * 5)
    np.testing.assert_array_equal(rss["phase"], [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(rss["label"], [EXACT] * 5)
    np.testing.assert_allclose(rss["start"], 1_700_000_000 + np.arange(5), atol=1e-6)
    np.testing.assert_allclose(rss["end"] - rss["start"], 1.0, atol=1e-6)
    np.testing.assert_allclose(rss["max_time"] - rss["start"], 0.25, atol=1e-6)
    np.testing.assert_array_equal(arrays[metrics.TREE_PSS]["count"], [1, 0, 1])


def test_pandas(path):
    """One row a window and metric, times as UTC time stamps, phase and label in words."""
    pd = pytest.importorskip("pandas")
    with memtrack.open_recording(path) as recording:
        table = recording.to_pandas()
    assert len(table) == 8
    assert list(table.columns)[:4] == ["metric", "start", "end", "min"]
    assert table["metric"].value_counts().to_dict() == {metrics.RSS: 5, metrics.TREE_PSS: 3}
    rss = table[table["metric"] == metrics.RSS]
    assert rss["phase"].tolist() == ["", "train", "train", "train", "train"]
    assert set(rss["label"]) == {"exact"}
    assert set(table[table["metric"] == metrics.TREE_PSS]["label"]) == {"sampled"}
    assert abs(rss["start"].iloc[0] - pd.Timestamp(1_700_000_000, unit="s", tz="UTC")) < pd.Timedelta("1ms")


@pytest.mark.filterwarnings("ignore:Series.values returning")  # pyarrow 25 with pandas 3.1, among themselves
def test_arrow(path):
    """The same as an Arrow table, without an index column."""
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    with memtrack.open_recording(path) as recording:
        table = recording.to_arrow()
    assert table.num_rows == 8
    assert "__index_level_0__" not in table.column_names
    assert table.column("max").to_pylist()[:5] == [200, 201, 202, 203, 204]


def test_empty_recording(make_recording):
    """No windows are empty tables, not errors."""
    pytest.importorskip("numpy")
    with memtrack.open_recording(make_recording()) as recording:
        assert recording.to_numpy() == {}
        pytest.importorskip("pandas")
        table = recording.to_pandas()
        assert len(table) == 0
        assert "metric" in table.columns


@pytest.mark.parametrize("method", ["to_numpy", "to_pandas", "to_arrow"])
def test_without_the_extra(path, method):
    """Where numpy and the others are not installed, the error says what to install."""
    root = Path(memtrack.__file__).parents[1]
    code = f"""
import sys
sys.path.insert(0, {str(root)!r})
sys.modules.update(numpy=None, pandas=None, pyarrow=None)
import memtrack
from memtrack.errors import MissingDependencyError
recording = memtrack.open_recording({path!r})
try:
    recording.{method}()
except MissingDependencyError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == (
        f"{method}() needs a package that is not installed. Install it with: pip install 'memtrack[data]'\n"
    )
