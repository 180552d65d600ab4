"""A quarter of an hour of a restless training: agent, file and clock are in the end as they were after a minute."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time

import pytest

import memtrack
from memtrack.collectors.procfs import field_kib

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

SECONDS = float(os.environ.get("MEMTRACK_TEST_SOAK_SECONDS", 900))
"""Less, to try the test itself."""

INTERVAL_S = 1.0
WARM_S = min(60.0, SECONDS / 5)
LOOK_S = min(5.0, SECONDS / 40)


def rss_mib(pid):
    with open(f"/proc/{pid}/status", "rb") as file:
        return field_kib(file.read(), b"VmRSS:")


class Watch:
    """Looks at the agent and at the newest windows every few seconds."""

    def __init__(self, monitor, recording):
        self.recording = recording
        self.path = monitor.path
        self.agent = recording.head().agent_pid
        self.sizes: list[tuple[float, float]] = []
        """Seconds since the start, and the agent's RSS in MiB."""
        self.ends: dict[int, int] = {}
        """Number of a window, and when it ended, monotonic."""
        self.files: set[int] = set()
        self.blocks: list[int] = []
        self.start = time.monotonic()
        self._due = self.start
        self._newest = 0
        self.cpu: list[tuple[float, int]] = []

    @property
    def seconds(self):
        return time.monotonic() - self.start

    def look(self):
        """Look if it is time to."""
        if time.monotonic() < self._due:
            return
        self._due += LOOK_S
        head, status = self.recording.head(), os.stat(self.path)
        self.files.add(status.st_size)
        self.blocks.append(status.st_blocks)
        for number in range(self._newest, head.windows):
            row = self.recording.window(number)
            if row is not None:
                self.ends[number] = row.end_ns
        self._newest = head.windows
        if self.seconds > WARM_S:
            self.sizes.append((self.seconds, rss_mib(self.agent)))
            self.cpu.append((self.seconds, head.agent_cpu_ns))


def late_ms(ends):
    """How far behind the beat of the first of them these windows ended, in ms, in the middle."""
    interval_ns = round(INTERVAL_S * 1e9)
    # half an interval more and less again, so that a little before the beat is not nearly an interval behind it
    half_ns = interval_ns // 2
    return statistics.median((end_ns + half_ns) % interval_ns - half_ns for end_ns in ends) / 1e6


@pytest.mark.timeout(SECONDS + 120)
def test_a_quarter_of_an_hour():
    """Some 200,000 steps and phases, 900 windows through 1 MiB, delivered as they come."""
    with (
        memtrack.start(interval=INTERVAL_S, recording_size="1MiB", sinks=["jsonl"]) as monitor,
        memtrack.open_recording(monitor.path) as recording,
    ):
        assert monitor.wait_ready()
        watch, step = Watch(monitor, recording), 0
        while watch.seconds < SECONDS:
            step += 1
            memtrack.step(step)
            with memtrack.phase("even" if step % 2 else "odd"):
                block = bytearray((step % 40) << 20)
                time.sleep(0.003)
                del block
            watch.look()
        agent = recording.head().agent_pid
        monitor.flush()
        rows, head = list(recording.windows()), recording.head()

    times, sizes = zip(*watch.sizes, strict=True)
    slope, _ = statistics.linear_regression(times, sizes)
    growth_mib = slope * (times[-1] - times[0])
    (early_s, early_ns), (end_s, end_ns) = watch.cpu[0], watch.cpu[-1]
    share = (end_ns - early_ns) / 1e9 / (end_s - early_s)
    first_ns = min(watch.ends.values())
    ends = [end_ns - first_ns for _, end_ns in sorted(watch.ends.items())]
    tenth = len(ends) // 10
    drift_ms = late_ms(ends[-tenth:]) - late_ms(ends[:tenth])
    print(f"{step} steps, {head.windows} windows; agent {sizes[0]:.2f} MiB, then {sizes[-1]:.2f}")
    print(f"growth {growth_mib:+.3f} MiB by its slope; {100 * share:.3f} % of a core; drift {drift_ms:+.2f} ms")

    assert agent == watch.agent, "the agent was started again"
    assert abs(growth_mib) < 0.25
    assert max(sizes) - min(sizes) < 0.5
    assert share <= 0.003
    assert len(watch.files) == 1
    # a file system may need a few blocks of its own to say where the file lies
    assert (max(watch.blocks) - min(watch.blocks)) * 512 <= 1 << 16
    assert abs(drift_ms) < 20.0
    assert head.windows > 0.9 * SECONDS / INTERVAL_S
    assert head.bin_width > 1 or SECONDS < 60
    assert rows[0].first == 0
    assert all(after.first == before.last + 1 for before, after in itertools.pairwise(rows))
