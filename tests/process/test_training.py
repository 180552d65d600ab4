"""What the callbacks of all frameworks stand on, with a real agent: phases that follow each other, peaks of rows."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

import memtrack
from memtrack.errors import SettingsError
from memtrack.monitor import active
from memtrack.recording.reader import RecordingReader
from memtrack.training import STEP_PEAK, Training

np = pytest.importorskip("numpy")


@pytest.fixture
def training():
    """A training that has begun, in a process that nobody else monitors."""
    made = Training(tick="20ms")
    assert made.begin()
    assert active.monitor.wait_ready()
    yield made
    made.end()


def phases_of(path):
    """The phases as they were entered and left, from the marks."""
    from memtrack.recording.layout import PHASE_BEGIN

    with RecordingReader(path) as reader:
        names = reader.names()
        return [
            ("+" if mark.kind == PHASE_BEGIN else "-") + names[mark.name] for mark in reader.marks() if names[mark.name]
        ]


def highest_ever(more_mib):
    """How much to allocate to stand so much higher than this process, which has run other tests, ever has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        rss_mib = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - rss_mib) + more_mib


def spike(mib, seconds=0.3):
    held = np.ones(mib << 17)
    time.sleep(seconds)
    return held.nbytes


# -- rows -----------------------------------------------------------------------------------------------------------


def test_each_row_has_the_peak_of_its_steps(training):
    """A peak that is the highest ever is exact, however short; a lower one later is what was sampled; a row without a
    spike has none of its neighbours'."""
    rest = training.row()[STEP_PEAK]
    heights, highest = [], highest_ever(300)
    for mib, seconds in ((0, 0.3), (highest, 0.0), (0, 0.3), (200, 0.3), (0, 0.3), (250, 0.3), (0, 0.3)):
        if mib:
            spike(mib, seconds)
        else:
            time.sleep(seconds)
        heights.append(training.row()[STEP_PEAK] - rest)
    assert heights[1::2] == pytest.approx([highest, 200.0, 250.0], rel=0.1)
    # what was freed stands in no later row, though the agent saw it between two rows
    assert max(heights[::2]) < 20.0


def test_rows_faster_than_the_agent(training):
    """Rows that come faster than samples have what the process stands at; a spike comes in a row, if not in its own."""
    rest = training.row()[STEP_PEAK]
    for _ in range(1000):
        assert abs(training.row()[STEP_PEAK] - rest) < 20.0
    spike(300, 0.2)
    spiked = [training.row()[STEP_PEAK] - rest for _ in range(1000)]
    assert spiked[0] == pytest.approx(300.0, rel=0.1)
    assert max(spiked[1:]) < 20.0
    spike(200, 0.3)
    assert max(training.row()[STEP_PEAK] - rest for _ in range(1000)) == pytest.approx(200.0, rel=0.1)


def test_a_row_without_a_monitor(training):
    """Nothing, and no complaint."""
    active.monitor.stop()
    assert training.row() == {}
    training.enter("train")
    training.leave("train")
    training.step(1)


def test_the_agent_is_gone(training):
    """The row has what the process itself knows."""
    rest = training.row()[STEP_PEAK]
    with RecordingReader(active.monitor.path) as reader:
        os.kill(reader.head().agent_pid, signal.SIGKILL)
    highest = highest_ever(300)
    spike(highest, 0.0)
    assert training.row()[STEP_PEAK] - rest == pytest.approx(highest, rel=0.1)
    assert math.isfinite(training.row()[STEP_PEAK])


# -- phases ---------------------------------------------------------------------------------------------------------


def test_phases_follow_each_other(training):
    """Validation within training is no part of it; the program's own phases lie inside; the end leaves everything."""
    training.enter("train")
    with memtrack.phase("forward"):
        pass
    training.enter("validation")
    training.leave("validation")
    training.leave("never entered")
    training.enter("checkpoint")
    training.end()
    path = active.monitor.path
    active.monitor.flush()
    assert phases_of(path) == [
        "+train", "+train/forward", "-train/forward", "-train", "+validation", "-validation",
        "+train", "-train", "+checkpoint", "-checkpoint",
    ]  # fmt: skip
    with RecordingReader(path) as reader:
        assert reader.place().phases == ()


def test_no_epoch_after_the_end(training):
    """What comes after a training is in none of its epochs; the next may count from 0 again."""
    for _ in range(2):
        training.epoch(0)
        training.step(7)
        time.sleep(0.1)
        training.end()
        time.sleep(0.1)
    summary = active.monitor.summary()
    assert [epoch.name for epoch in summary.epochs] == ["0", "0"]
    with RecordingReader(active.monitor.path) as reader:
        assert (reader.place().epoch, reader.place().step) == (-1, 7)


# -- beginning ------------------------------------------------------------------------------------------------------


def test_it_joins_what_is_there():
    """A program that monitors already is monitored as it wants."""
    with memtrack.start(interval=0.25) as monitor:
        training = Training(interval=5.0)
        assert training.begin()
        assert active.monitor is monitor
    assert not Training(automatic=True).begin()


def test_wrong_settings():
    """They are an error where the callback is made, before anything has begun."""
    with pytest.raises(SettingsError, match="interval=-1"):
        Training(interval=-1)
    with pytest.raises(SettingsError, match="intervall"):
        Training(intervall=1)
    assert active.monitor is None


def test_switched_off(monkeypatch):
    """With MEMTRACK_DISABLE=1 callbacks do nothing."""
    monkeypatch.setenv("MEMTRACK_DISABLE", "1")
    training = Training()
    assert not training.begin()
    training.enter("train")
    assert training.row() == {}
    training.end()
    assert active.monitor is None


WORKER = """
import multiprocessing, sys
import memtrack
from memtrack.training import Training

def work(queue):
    training = Training(automatic=True)
    queue.put([training.begin(), bool(training.row())])

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    memtrack.autolog()
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get(timeout=30))
    process.join()
else:
    memtrack.autolog()
"""


def test_a_worker_that_trains(tmp_path):
    """A spawned worker, as of ddp_spawn, monitors itself from the moment that a training begins in it."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[True, True]"
    assert len(list(tmp_path.glob("*.mtk"))) == 2
