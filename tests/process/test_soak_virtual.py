"""A week of training in minutes: the real sampler, collectors, recording and a follower of it, in virtual time."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from array import array
from pathlib import Path

import pytest

from memtrack import collectors, metrics
from memtrack.collectors.procfs import field_kib
from memtrack.recording import layout, marks
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter, create
from memtrack.sampling.cadence import Budget
from memtrack.sampling.sampler import Sampler
from memtrack.sampling.window import Row
from memtrack.testing import FakeClock, FakeProc

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

SECOND_NS = 10**9
HOUR = 3600
WEEK = 7 * 24 * HOUR
WINDOWS = int(os.environ.get("MEMTRACK_TEST_SOAK_WINDOWS", WEEK))
"""Fewer, to try the test itself."""

PID = 4242
LATE_NS = 30_000_000
"""How late the sampler is called at the most."""
OUTAGE = range(30 * HOUR, 60 * HOUR)
"""Windows in which nothing is delivered."""


class Machine:
    """A training process with workers in a container whose limit changes; memory moves every ten seconds."""

    def __init__(self, folder: Path) -> None:
        self.proc = FakeProc(folder)
        self.proc.add(PID, rss_mib=300.0)
        self._container = folder / "sys/fs/cgroup/train"
        self._container.mkdir(parents=True)
        self._write(f"{self.proc.path}/{PID}/cgroup", "0::/train\n")
        self._write(f"{self.proc.path}/{PID}/mountinfo", "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        self._write(f"{self.proc.path}/{PID}/limits", "")
        for name, text in (("max", "8589934592"), ("current", "0"), ("events", "oom_kill 0"), ("stat", "anon 1")):
            self._write(str(self._container / f"memory.{name}"), f"{text}\n")
        self._random = random.Random(1)
        self._workers: list[int] = []
        self._pids = 5000
        self.rss_mib = 300.0

    def live(self, second: int) -> None:
        """What happens in one second."""
        if second % 10 == 0:
            self.rss_mib = 300.0 + self._random.randrange(4096) / 16
            if second % HOUR == 10 * (second // HOUR % 300):
                self.rss_mib += 1000.0 + second // HOUR  # once an hour, each time a little higher than ever
            self.proc.update(PID, rss_mib=self.rss_mib)
            self._write(str(self._container / "memory.current"), f"{int(self.rss_mib * metrics.MIB)}\n")
        if second % 1200 == 600:
            for _ in range(self._random.randrange(1, 12)):
                self._pids += 1
                self._workers.append(self._pids)
                self.proc.add(self._pids, parent=PID, rss_mib=50.0)
        elif second % 1200 == 1100:
            while self._workers:
                self.proc.kill(self._workers.pop())
        if second % (6 * HOUR) == 6 * HOUR - 7:
            self._write(str(self._container / "memory.max"), f"{(6 << 30) + (second % 7 << 28)}\n")

    @staticmethod
    def _write(path: str, text: str) -> None:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)


class Follower:
    """Takes windows as the relay does, every ten seconds, but not during the outage, and keeps what they say."""

    def __init__(self, path: str) -> None:
        self._reader = RecordingReader(path)
        self._next = 0
        self.highest = array("d", bytes(8 * WEEK))
        """For each window the maximum of the delivered row that holds it."""
        self.windows = 0
        self.rows = 0

    def look(self) -> None:
        """Take what is new."""
        for row in self._reader.windows(self._next):
            first = max(row.first, self._next)
            highest = row.cells[metrics.RSS].max
            for number in range(first, row.last + 1):
                self.highest[number] = highest
            self.windows += row.last + 1 - first
            self._next = row.last + 1
            self.rows += 1


def rss_mib() -> float:
    """Resident memory of this process."""
    with open("/proc/self/status", "rb") as file:
        return field_kib(file.read(), b"VmRSS:") or 0.0


@pytest.fixture
def folder():
    """A folder in memory, if there is one: files are written a million times."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


@pytest.mark.timeout(1800)
def test_a_week(folder, monkeypatch):
    """604,800 windows through 4 MiB: memory and file stay as they were, windows end on time, extremes are exact."""
    clock, machine, late = FakeClock(), Machine(folder), random.Random(2)
    monkeypatch.setattr(marks, "monotonic_ns", clock.monotonic_ns)
    path = str(folder / "week.mtk")
    create(path, layout.DEFAULT_SIZE, {"size": str(layout.DEFAULT_SIZE)})
    trainer, writer, head, follower = MarkWriter(path), RecordingWriter(path), Head(), Follower(path)
    start_ns = clock.now_ns
    stored: list[int] = []
    """Of the windows that were stored since the last look, how late they ended."""

    def store(row: Row) -> None:
        stored.append(row.end_ns - start_ns - (row.last + 1) * SECOND_NS)
        writer.append(row)
        head.mono_ns, head.wall_ns = clock.now_ns, clock.wall_ns
        writer.publish(head)

    found, _ = collectors.build(PID, proc=machine.proc.path, root=str(folder))
    sampler = Sampler(
        found,
        writer.marks,
        interval_s=1.0,
        tick_s=1.0,
        budget=Budget(0.01, clock.now_ns, 0),
        now_ns=clock.now_ns,
        cpu_clock_ns=clock.process_time_ns,
        on_window=store,
        on_phase=writer.put_phase,
        on_epoch=writer.put_epoch,
    )
    expected = array("d", bytes(8 * WEEK))
    status, sizes, latest = os.stat(path), [], 0
    phase = None
    for second in range(WINDOWS):
        machine.live(second)
        expected[second] = machine.rss_mib
        if second % 50 == 0:
            trainer.step(second)
        if second % 600 == 0:
            if phase is not None:
                trainer.end(phase)
            phase = trainer.begin("even" if second % 1200 else "odd")
            writer.event("mark", clock.now_ns, second, text="turn")
            if second % HOUR == 0:
                trainer.epoch(second // HOUR)
        while len(stored) == 0:
            clock.advance_to(sampler.due_ns + late.randrange(LATE_NS))
            sampler.tick(clock.now_ns, clock.wall_ns)
        assert len(stored) == 1
        assert 0 <= stored[0] < LATE_NS
        latest = max(latest, stored.pop())
        if second % 10 == 0 and second not in OUTAGE:
            follower.look()
        if second % (WINDOWS // 100) == 0:
            sizes.append(rss_mib())
            now = os.stat(path)
            assert now.st_size == status.st_size
            # a file system may need a few blocks of its own to say where the file lies
            assert abs(now.st_blocks - status.st_blocks) * 512 <= 1 << 16
    sampler.finish(clock.now_ns, clock.wall_ns)
    follower.look()
    print(
        f"memory {sizes[10]:.1f} MiB after a tenth, {sizes[-1]:.1f} MiB in the end; late {latest / 1e6:.1f} ms at most"
    )
    print(f"{follower.rows} rows delivered of {WINDOWS} windows; a page of the history holds {writer.bin_width}")
    assert max(sizes[10:]) - sizes[10] < 1.0
    assert follower.windows == WINDOWS

    with RecordingReader(path) as reader:
        covered = 0
        for row in reader.windows():
            assert row.first == covered
            covered = row.last + 1
            _check(row, expected)
        assert covered == WINDOWS
        whole = reader.phases()[""].cells[metrics.RSS]
        assert whole.max == max(expected)
        assert whole.step == _step(max(range(WINDOWS), key=expected.__getitem__))
        assert (writer.dropped, sampler.dropped) == (0, 0)
        assert len(reader.events()) == min(layout.EVENT_COUNT, -(-WINDOWS // 600))
        names = set(reader.metrics())
        assert {metrics.CONTAINER_LIMIT, metrics.TREE_PROCESSES, metrics.TREE_PSS} <= names
    if OUTAGE.stop < WINDOWS:
        # merged while nobody took them, and yet nothing that stood out is lost
        for first in range(0, WINDOWS, HOUR):
            hour = range(first, first + HOUR)
            assert max(follower.highest[number] for number in hour) >= max(expected[number] for number in hour)
        assert max(follower.highest) == max(expected)


def _step(second: int) -> int:
    return second - second % 50


def _check(row: Row, expected: array[float]) -> None:
    cell, numbers = row.cells[metrics.RSS], range(row.first, row.last + 1)
    assert cell.max == max(expected[number] for number in numbers)
    assert cell.min == min(expected[number] for number in numbers)
    assert cell.last == expected[row.last]
    since_start_ns = cell.max_ns - FakeClock().now_ns
    # the last sample of a window comes a little after its end
    latest = min(since_start_ns // SECOND_NS, WINDOWS - 1)
    possible = {latest, max(latest - 1, 0)}
    assert cell.max in [expected[number] for number in possible]
    assert cell.step in [_step(number) for number in possible]
