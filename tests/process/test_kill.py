"""``kill -9`` at any moment leaves a recording that opens, in which nothing that is accepted is torn or wrong."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memtrack
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.marks_view import MarkReader
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import Place, Row

ROOT = Path(memtrack.__file__).parent.parent
INTERVAL_S = 0.1

BUSY = """
import sys
sys.path.insert(0, sys.argv[1])
import memtrack

monitor = memtrack.start(directory=sys.argv[2], interval=float(sys.argv[3]), recording_size="1MiB")
monitor.wait_ready()
print(monitor.path, flush=True)
step = 0
while True:
    step += 1
    memtrack.step(step)
    memtrack.epoch(step * 3 % 1_000_003)
    memtrack.gauge("seven", step * 7)
    with memtrack.phase("even" if step % 2 == 0 else "odd"):
        memtrack.mark("square", step * step)
"""


def start_busy(folder):
    return subprocess.Popen(
        [sys.executable, "-I", "-c", BUSY, str(ROOT), str(folder), str(INTERVAL_S)], stdout=subprocess.PIPE, text=True
    )


def check_marks(path):
    """Every mark, gauge and slot that is accepted is one that was written, whole. Returns the number of marks."""
    with open(path, "rb") as file:
        marks = MarkReader(file.read(layout.METRICS))
    place = marks.place()
    names = [marks.name(number) for number in range(1, 5)]
    assert set(names) <= {"seven", "even", "odd", "square", ""}
    assert place.step == -1 or place.epoch in (place.step * 3 % 1_000_003, (place.step - 1) * 3 % 1_000_003, -1)
    for name, value in marks.gauges():
        assert name == "seven"
        assert place.step - 1 <= value / 7 <= place.step
        assert value % 7 == 0
    found = marks.drain()
    for mark in found:
        step = mark.place.step
        assert mark.place.epoch in (step * 3 % 1_000_003, (step - 1) * 3 % 1_000_003, -1)
        if mark.kind == layout.MARK:
            assert marks.name(mark.name) == "square"
            assert mark.value == float(step * step)
            assert [marks.name(phase) for phase in mark.place.phases] == ["even" if step % 2 == 0 else "odd"]
        elif mark.kind in (layout.PHASE_BEGIN, layout.PHASE_END):
            assert marks.name(mark.name) == ("even" if step % 2 == 0 else "odd")
    times = [mark.time_ns for mark in found]
    assert times == sorted(times)
    marks.close()
    return len(found)


def check_windows(path, died_ns):
    """The windows are whole and follow each other. Returns the ages of the last sample and window, in seconds."""
    with memtrack.open_recording(path) as recording:
        rows = list(recording.windows())
        for before, after in itertools.pairwise(rows):
            assert after.first == before.last + 1
            assert after.start_ns == before.end_ns
        for row in rows:
            for cell in row.cells.values():
                assert cell.min <= cell.mean * (1 + 1e-9) + 1e-9
                assert cell.mean <= cell.max * (1 + 1e-9) + 1e-9
                assert cell.min <= cell.last <= cell.max
        recording.phases()
        recording.events()
        started_ns = recording.events()[0].time_ns
        # an agent that outlives the trainer finishes one more window after the death, which does not count
        newest_ns = max([row.end_ns for row in rows if row.end_ns <= died_ns], default=started_ns)
        return (died_ns - recording.pulse().mono_ns) / 1e9, (died_ns - newest_ns) / 1e9


@pytest.mark.alone
@pytest.mark.parametrize("agent_too", [False, True], ids=["trainer", "trainer and agent"])
@pytest.mark.parametrize("kills", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_at_random_moments(tmp_path, kills, agent_too, fault):
    """Also of the whole lot, as a container's OOM kill is: it opens, nothing is torn, nothing is old."""
    rng = random.Random(kills)
    ages = []
    for first in range(0, kills, 6):
        children = [start_busy(tmp_path) for _ in range(min(6, kills - first))]
        for child in children:
            path = child.stdout.readline().strip()
            time.sleep(rng.uniform(0.0, 0.06))
            if agent_too:
                with RecordingReader(path) as reader:
                    agent = reader.head().agent_pid
                os.kill(child.pid, signal.SIGSTOP)  # so that the agent is not told first
                os.kill(agent, signal.SIGKILL)
            died_ns = time.monotonic_ns()
            child.kill()
            child.wait()
            child.stdout.close()
            assert check_marks(path) > 0
            if not agent_too:
                wait_for_end(path)
            ages.append(check_windows(path, died_ns))
            os.unlink(path)
    samples, windows = (sorted(age) for age in zip(*ages, strict=True))
    for what, found in (("sample", samples), ("window", windows)):
        print(f"age of the last {what} at death: median {found[len(found) // 2]:.3f} s, largest {found[-1]:.3f} s")
    assert samples[int(0.95 * len(samples))] <= INTERVAL_S, samples[-20:]
    # an interval, and half of one for a tick that a loaded machine makes late
    assert windows[int(0.95 * len(windows))] <= 1.5 * INTERVAL_S, windows[-20:]
    fault(
        f"kill -9 of the training{' and its agent' if agent_too else ''} at any moment, {kills} times",
        f"what came after the last sample: {samples[len(samples) // 2] * 1000:.0f} ms (median)",
    )


def wait_for_end(path):
    """The agent finishes the recording after the death of the trainer."""
    deadline = time.monotonic() + 5.0
    with RecordingReader(path) as reader:
        while time.monotonic() < deadline:
            if reader.head().state == layout.ENDED:
                return
            time.sleep(0.002)
    raise AssertionError("the agent did not finish the recording within 5 s")


class Killed(BaseException):
    """What stands for SIGKILL inside one process."""


def test_kill_between_any_two_writes_of_the_agent(make_recording, monkeypatch, tmp_path):
    """After each single write, and after half of each, the file reads as a consistent whole."""
    path = make_recording()
    writer = RecordingWriter(path)
    real_pwrite = os.pwrite
    ring = layout.Layout(1 << 20).ring
    bins = layout.Layout(1 << 20).bins
    total = ring + bins + 60
    snapshot = tmp_path / "killed.mtk"
    done = -1

    def check():
        shutil.copyfile(path, snapshot)
        with RecordingReader(str(snapshot)) as reader:
            rows = list(reader.windows())
        numbers = [number for row in rows for number in range(row.first, row.last + 1)]
        assert numbers == list(range(len(numbers))), "a window is missing or told twice"
        assert len(numbers) in (done + 1, done + 2)
        for row in rows:
            assert row.cells["m"].max == float(row.last)
            assert row.cells["m"].min == float(row.first)

    def pwrite(fd, data, offset):
        if watching:
            real_pwrite(fd, data[: len(data) // 2], offset)
            check()
        written = real_pwrite(fd, data, offset)
        if watching:
            check()
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    head = Head()
    for number in range(total):
        # the interesting stretches: the first windows, the ring's first wrap, and the history's first doubling
        watching = number < 3 or ring - 1 <= number < ring + 3 or number >= ring + bins - 20
        row = Row(number, number)
        row.end_ns = number + 1
        row.add("m", float(number), number, Place(number), 1.0)
        writer.append(row)
        done = number
        writer.publish(head)
    assert writer.bin_width > 1
    writer.event("start", 1)
    monkeypatch.undo()
    writer.close()


def test_kill_between_any_two_stores_of_the_trainer(make_recording):
    """A mark that was cut short anywhere is not accepted, and the one before it still stands."""
    for stores in range(1, 40):
        path = make_recording()
        marks = MarkWriter(path)
        marks.step(1)
        with_phase = marks.begin("train")
        assert with_phase is not None
        marks._words = Stopping(marks._words, stores)
        marks._bytes = Stopping(marks._bytes, stores, shared=marks._words)
        reached = 1
        try:
            for step in range(2, 30):
                marks.step(step)
                reached = step
                marks.mark("square", float(step * step))
        except Killed:
            pass
        with RecordingReader(path) as reader:
            assert reader.place().step in (reached, reached + 1)
            assert reader.place().phases == with_phase.ids()
        with open(path, "rb") as file:
            view = MarkReader(file.read(layout.METRICS))
        for mark in view.drain():
            if mark.kind == layout.MARK:
                assert mark.value == float(mark.place.step**2)
        view.close()


class Stopping:
    """A memoryview that takes so many stores and no more; of the last one only the first half arrives."""

    def __init__(self, view, stores, shared=None):
        self.view, self.left = view, [stores] if shared is None else shared.left

    def __getitem__(self, at):
        return self.view[at]

    def __setitem__(self, at, value):
        if self.left[0] <= 0:
            raise Killed
        self.left[0] -= 1
        if self.left[0] == 0 and isinstance(at, slice):
            half = len(value) // 2
            self.view[at.start : at.start + half] = value[:half]
            raise Killed
        self.view[at] = value
