"""Ten minutes of a restless training: the agent does not grow nor exceed its budget, and neither does the file."""

import itertools
import os
import sys
import time

import pytest

import memtrack
from memtrack.collectors.procfs import field_kib

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

SECONDS = 600


def rss_mib(pid):
    with open(f"/proc/{pid}/status", "rb") as file:
        return field_kib(file.read(), b"VmRSS:")


@pytest.mark.timeout(SECONDS + 60)
def test_ten_minutes(tmp_path):
    """200,000 steps, 8,000 windows through 1 MiB; the agent's memory after a minute is its memory after ten."""
    with memtrack.start(interval=0.075, recording_size="1MiB", sinks=["jsonl"]) as monitor:
        assert monitor.wait_ready()
        size = os.path.getsize(monitor.path)
        with memtrack.open_recording(monitor.path) as recording:
            agent = recording.head().agent_pid
            early = early_ns = early_cpu_ns = 0
            start = time.monotonic()
            step = 0
            while time.monotonic() - start < SECONDS:
                step += 1
                memtrack.step(step)
                with memtrack.phase("even" if step % 2 else "odd"):
                    block = bytearray((step % 40) << 20)
                    time.sleep(0.003)
                    del block
                if not early and time.monotonic() - start > 60:
                    early, early_ns = rss_mib(agent), time.monotonic_ns()
                    early_cpu_ns = recording.head().agent_cpu_ns
            monitor.flush()
            head = recording.head()
            share = (head.agent_cpu_ns - early_cpu_ns) / (time.monotonic_ns() - early_ns)
            print(f"agent {early:.1f} MiB, then {rss_mib(agent):.1f} MiB; {100 * share:.3f} % of a core")
            assert rss_mib(agent) <= early + 0.25
            assert share <= 0.003
            assert head.bin_width > 1
            rows = list(recording.windows())
            assert rows[0].first == 0
            assert all(after.first == before.last + 1 for before, after in itertools.pairwise(rows))
        assert os.path.getsize(monitor.path) == size
