"""Workers of the training process, as DataLoaders have them: shared pages count once."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtrack import metrics
from memtrack.recording.reader import RecordingReader


def pss_mib(pid):
    """PSS of a process as the kernel tells it now; 0 once it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


def follow(path, pids, worker_mib, tools):
    """The newest PSS, sum of RSS and workers once they have settled, and the sum of PSS read here at that moment."""
    with RecordingReader(path) as reader:

        def settled():
            expected = sum(map(pss_mib, pids))
            rows = list(reader.windows())
            if not rows or metrics.TREE_PROCESSES not in rows[-1].cells:
                return None
            cells = rows[-1].cells
            if cells[metrics.TREE_PROCESSES].last != len(pids) or metrics.TREE_PSS not in cells:
                return None
            workers = [cell.last for name, cell in cells.items() if name.startswith("memory/worker/")]
            if len(workers) != len(pids) - 1 or min(workers) < worker_mib:
                return None  # seen while they were still filling their memory
            found = cells[metrics.TREE_PSS].last
            return (cells, found, expected) if abs(found - expected) <= 0.05 * expected else None

        return tools.wait_until(settled, 60.0, 0.2)


FORKED = """
import os, time, memtrack
monitor = memtrack.start(interval=0.5)
monitor.wait_ready()
held = bytearray(400 << 20)
for at in range(0, len(held), 4096):
    held[at] = 1
pids = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        total = 0
        for at in range(0, len(held), 4096):
            total += held[at]
        sys.stdin.buffer.raw.read(1)
        os._exit(0)
    pids.append(pid)
print(monitor.path, os.getpid(), *pids, flush=True)
sys.stdin.buffer.raw.read(1)
"""

SPAWNED = """
import os, subprocess, memtrack
monitor = memtrack.start(interval=0.5)
code = '''
import sys
held = bytearray(300 << 20)
for at in range(0, len(held), 4096):
    held[at] = 1
print("ready", flush=True)
sys.stdin.read()
'''
children = []
for _ in range(4):
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    children.append(child)
for child in children:
    child.stdout.readline()
print(monitor.path, os.getpid(), *(child.pid for child in children), flush=True)
sys.stdin.readline()
for child in children:
    child.kill()
    child.wait()
print("ended", flush=True)
sys.stdin.readline()
"""


def test_forked_workers_share_their_pages(run_child, tools):
    """Four forked readers of 400 MiB: PSS is that of the kernel to 5 %, the sum of RSS several times as high."""
    child = run_child(FORKED)
    path, *numbers = child.stdout.readline().split()
    pids = [int(number) for number in numbers]
    cells, found, expected = follow(path, pids, 350, tools)
    assert found == pytest.approx(expected, rel=0.05)
    assert 400 < found < 600
    assert cells[metrics.TREE_RSS_SUM].last > 4 * 400
    assert "upper bound" in metrics.BY_NAME[metrics.TREE_RSS_SUM].meaning
    workers = {name: cell.last for name, cell in cells.items() if name.startswith("memory/worker/")}
    assert set(workers) == {metrics.WORKER_RSS.format(number) for number in range(4)}
    assert min(workers.values()) > 350
    child.communicate("xxxxx", timeout=20)


def test_spawned_workers(run_child, tools):
    """Four workers with 300 MiB of their own: PSS and the sum of RSS agree; when they end, they are gone."""
    child = run_child(SPAWNED)
    path, *numbers = child.stdout.readline().split()
    pids = [int(number) for number in numbers]
    cells, found, expected = follow(path, pids, 290, tools)
    assert found == pytest.approx(expected, rel=0.05)
    assert 1140 < found < 1400
    assert cells[metrics.TREE_RSS_SUM].last == pytest.approx(found, rel=0.05)
    for number in range(4):
        assert cells[metrics.WORKER_RSS.format(number)].last == pytest.approx(305, abs=15)
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "ended\n"
    with RecordingReader(path) as reader:

        def alone():
            *_, row = reader.windows()
            return row if row.cells[metrics.TREE_PROCESSES].last == 1 else None

        cells = tools.wait_until(alone, 20.0, 0.2).cells
    assert cells[metrics.TREE_RSS_SUM].last < 40
    assert cells[metrics.TREE_PSS].last < 40, "the estimate lets go of processes that are gone"
    assert not [name for name, cell in cells.items() if name.startswith("memory/worker/") and cell.count]
