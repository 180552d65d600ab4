"""A spike between two windows shows at its full height, however long the windows are."""

from __future__ import annotations

import pytest

import memtrack
from memtrack import metrics
from memtrack.sampling.window import EXACT, SAMPLED

SPIKE_MIB = 300


@pytest.mark.alone
@pytest.mark.parametrize("interval", [0.2, 1.0, 5.0])
def test_short_spike_shows(run_child, interval):
    """300 MiB that live for 50 ms are in the maximum of their window to within 10 %, and of no other."""
    child = run_child(
        """
import mmap, time, memtrack
with memtrack.start(interval=float(sys.argv[1])) as monitor:
    monitor.wait_ready()
    time.sleep(0.6)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) / 256
    began = time.time()
    block = mmap.mmap(-1, int(sys.argv[2]) << 20)
    for at in range(0, len(block), 4096):
        block[at] = 1
    time.sleep(max(0.05 - (time.time() - began), 0.0))
    with open("/proc/self/statm") as file:
        top = int(file.read().split()[1]) / 256
    block.close()
    ended = time.time()
    time.sleep(0.6)
print(monitor.path, before, top, began, ended)
""",
        interval,
        SPIKE_MIB,
    )
    out, _ = child.communicate(timeout=30)
    path, *numbers = out.split()
    before, top, began, ended = map(float, numbers)
    assert top - before > 0.95 * SPIKE_MIB
    with memtrack.open_recording(path) as recording:
        windows = list(recording.windows())
        whole = recording.phases()[""].cells[metrics.RSS]
    # the look that tells of a spike may come a tick after it
    inside = [row for row in windows if row.end_wall_ns / 1e9 >= began and row.start_wall_ns / 1e9 <= ended + 0.3]
    peak = max((row.cells[metrics.RSS] for row in inside), key=lambda cell: cell.max)
    assert peak.max == pytest.approx(top, rel=0.10)
    assert peak.label in (EXACT, SAMPLED)
    assert whole.max == peak.max
    outside = [row.cells[metrics.RSS].max for row in windows if row not in inside]
    assert all(value < before + 0.1 * SPIKE_MIB for value in outside)


@pytest.mark.alone
def test_burst_of_spikes(run_child):
    """Of twenty spikes of 50 ms and different height, each higher than the one before shows exactly."""
    child = run_child(
        """
import mmap, time, memtrack
with memtrack.start(interval=0.2) as monitor:
    monitor.wait_ready()
    time.sleep(0.3)
    for number in range(10):
        memtrack.step(number)
        block = mmap.mmap(-1, (50 + 10 * number) << 20)
        for at in range(0, len(block), 4096):
            block[at] = 1
        with open("/proc/self/statm") as file:
            top = int(file.read().split()[1]) / 256
        time.sleep(0.02)
        block.close()
        time.sleep(0.25)
        print(number, top)
print(monitor.path)
""",
    )
    *tops, path = child.communicate(timeout=30)[0].splitlines()
    highest = dict(line.split() for line in tops)
    with memtrack.open_recording(path) as recording:
        cells = [row.cells[metrics.RSS] for row in recording.windows()]
    for step, top in highest.items():
        of_step = [cell.max for cell in cells if cell.step == int(step)]
        assert max(of_step) == pytest.approx(float(top), rel=0.05), step
