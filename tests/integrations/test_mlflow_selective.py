"""What a run has by default: the points that its charts need, drawn as all windows would be."""

from __future__ import annotations

import pytest

from memtrack import metrics
from tests.integrations.mlflow_lab import points, rows
from tests.integrations.test_mlflow_sync import delivered, kill, recordings, until
from tests.unit.test_selection import check_chart

pytest.importorskip("mlflow")

TRAIN = """
import memtrack, mlflow
memtrack.autolog(interval=0.05, flush_interval=0.3)
with mlflow.start_run() as run:
    print("STARTED", run.info.run_id, flush=True)
    time.sleep(1.5)
    block = bytearray(300 << 20)
    block[::4096] = bytes(len(block[::4096]))
    del block
    print("SPIKE", flush=True)
    time.sleep({seconds})
    print("QUIET", flush=True)
    {end}
"""


def check(store, run_id, recording):
    """Assert that each chart is within the bound of what the recording has, and up to the newest window that any chart
    has. Returns the windows, the points and the time of the newest in milliseconds."""
    with_windows = points(rows(recording))
    series = store.series(run_id)
    assert set(series) == set(with_windows)
    sent = windows = 0
    end_ms = max(stamp for found in series.values() for stamp, *_ in found)
    for name, found in series.items():
        chart = sorted((stamp, value) for stamp, _, value in found)
        # the recording begins before the run, and ends after it
        full = [point for point in with_windows[name] if chart[0][0] <= point[0] <= end_ms]
        assert chart[-1][0] == full[-1][0], f"{name} ends early"
        check_chart(chart, full, metrics.unit_of(name))
        sent += len(chart)
        windows += len(full)
    return windows, sent, end_ms


def test_a_run(mlflow_server, train):
    """A quarter of the points, no chart off by more than 1 %, and the spike as high as it was."""
    done = train(TRAIN.format(seconds=4, end=""), mlflow_server, MEMTRACK_SELECTIVE="1")
    run_id = done.stdout.split()[1]
    windows, sent, _ = check(mlflow_server, run_id, done.recording)
    assert windows >= 14 * 80
    assert sent <= 0.35 * windows
    peaks = [value for _, _, value in mlflow_server.series(run_id)[metrics.peak_name(metrics.RSS)]]
    assert max(peaks) == max(row.cells[metrics.RSS].max for row in rows(done.recording) if metrics.RSS in row.cells)
    assert max(peaks) >= min(peaks) + 280


def test_a_run_that_is_killed(mlflow_server, train):
    """What was held back when the process died is delivered after it: the charts go up to the last window."""
    script = train(TRAIN.format(seconds=2, end="time.sleep(100)"), mlflow_server, wait=False, MEMTRACK_SELECTIVE="1")
    run_id = script.wait_for("STARTED")
    script.wait_for("QUIET")
    kill(script)
    (recording,) = recordings(script)
    until(lambda: delivered(recording))
    windows, sent, end_ms = check(mlflow_server, run_id, recording)
    assert sent <= 0.5 * windows
    assert end_ms == round(rows(recording)[-1].end_wall_ns / 1e6)
