"""A recording never grows, and loses resolution but no extremes, however long the run."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import memtrack
from memtrack.recording.layout import Head
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.cadence import Budget
from memtrack.sampling.sampler import Sampler
from memtrack.sampling.window import Place, Row

ROOT = Path(memtrack.__file__).parent.parent
METRICS = ("memory/process/rss_mib", "memory/container/usage_mib")
PHASES = {1: "train", 2: "evaluate", 3: "save"}

READ = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from memtrack.recording.reader import RecordingReader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with RecordingReader(sys.argv[1]) as reader:
    rows = sum(1 for _ in reader.windows())
    reader.phases(), reader.events(), reader.feeds()
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


class Extremes:
    """What was really fed in: smallest value, largest value, and the step at which the largest stood first."""

    def __init__(self):
        self.low, self.high, self.step = float("inf"), float("-inf"), -1

    def add(self, value, step):
        self.low = min(self.low, value)
        if value > self.high:
            self.high, self.step = value, step

    def check(self, cell):
        assert (cell.min, cell.max, cell.step) == (self.low, self.high, self.step)


@pytest.mark.parametrize("windows", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_windows(make_recording, windows):
    """10^5 or 10^6 of them through 4 MiB: not a byte more, all extremes exact with their steps, every one accounted
    for."""
    path = make_recording(4 << 20)
    stat = os.stat(path)
    writer = RecordingWriter(path)
    rng = random.Random(1)
    truth = {metric: Extremes() for metric in METRICS}
    for number in range(windows):
        row = Row(number, number * 10**9)
        row.end_ns = row.end_wall_ns = (number + 1) * 10**9
        for metric in METRICS:
            value = rng.random() * 1000.0
            row.add(metric, value, row.end_ns, Place(number), 1.0)
            truth[metric].add(value, number)
        writer.append(row)
    writer.publish(Head())
    writer.close()

    after = os.stat(path)
    assert after.st_size == 4 << 20
    # ext4 counts a page of its own list of the parts once that does not fit into the inode any more
    assert after.st_blocks - stat.st_blocks in (0, 8)
    with RecordingReader(path) as reader:
        total, numbers = None, 0
        for row in reader.windows():
            assert row.first == numbers, "no window is missing or told twice"
            numbers = row.last + 1
            if total is None:
                total = row
            else:
                total.merge(row)
        assert numbers == windows
        newest = list(reader.windows(windows - 100))
        assert [(row.first, row.last) for row in newest] == [(n, n) for n in range(windows - 100, windows)]
    assert total is not None
    for metric in METRICS:
        truth[metric].check(total.cells[metric])

    done = subprocess.run(
        [sys.executable, "-I", "-c", READ, path, str(ROOT)], capture_output=True, text=True, check=True, timeout=60
    )
    rows, grown_kib = map(int, done.stdout.split())
    assert rows > 300
    assert grown_kib < 64 * 1024


class Walk:
    """A collector in virtual time: a value that the test knows for each moment."""

    period_s = 0.0
    stale = False

    def __init__(self):
        self.value = 0.0

    def collect(self, now_ns):
        return ((METRICS[0], self.value),)

    def high_water(self):
        return ()

    def close(self):
        pass


class Marks:
    """Where the training stands, as the test says."""

    def __init__(self):
        self.now, self.count, self.news = Place(), 0, []

    def place(self):
        return self.now

    def written(self):
        return self.count

    def drain(self):
        news, self.news = self.news, []
        return news


def test_sampler_through_a_full_recording(make_recording):
    """50,000 windows through the real sampler: global and per-phase extremes are exact in the file."""
    path = make_recording(1 << 20)
    writer = RecordingWriter(path)
    walk, marks, rng = Walk(), Marks(), random.Random(2)
    sampler = Sampler(
        [walk],
        marks,
        interval_s=1.0,
        tick_s=1.0,
        budget=Budget(1.0, 0, 0),
        now_ns=0,
        cpu_clock_ns=lambda: 0,
        on_window=writer.append,
        on_phase=writer.put_phase,
        on_epoch=writer.put_epoch,
    )
    everything, phases = Extremes(), {phase: Extremes() for phase in PHASES}
    now_ns = step = 0
    while writer.windows < 50_000:
        now_ns = sampler.due_ns
        step += 1
        phase = 1 + (step // 100) % 3
        if marks.now.phases != (phase,):
            marks.count += 1
        marks.now = Place(step, -1, (phase,))
        walk.value = rng.random() * (100.0 + 50.0 * phase)
        everything.add(walk.value, step)
        phases[phase].add(walk.value, step)
        sampler.tick(now_ns, now_ns)
    sampler.finish(now_ns, now_ns)
    writer.publish(Head())

    with RecordingReader(path) as reader:
        merged = list(reader.windows())
        total = merged[0].copy()
        for row in merged[1:]:
            total.merge(row)
        stored = _phase_rows(reader)
    writer.close()
    assert os.path.getsize(path) == 1 << 20
    assert writer.merged > 0
    everything.check(total.cells[METRICS[0]])
    everything.check(stored[0].cells[METRICS[0]])
    for phase, extremes in phases.items():
        extremes.check(stored[phase].cells[METRICS[0]])


def _phase_rows(reader):
    """The rows of the phases by id: their names are the trainer's, who is not here."""
    reader.names = lambda: ["", *PHASES.values()]
    ids = {name: phase for phase, name in PHASES.items()} | {"": 0}
    return {ids[name]: row for name, row in reader.phases().items()}
