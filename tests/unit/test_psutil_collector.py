"""What other systems than Linux get, through psutil, which runs here, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("psutil")

from memtrack import collectors, metrics
from memtrack.collectors.psutil_ import PsutilCollector, exists


@pytest.fixture
def child():
    """A process that waits for its stdin to end."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.communicate(timeout=20)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_platforms(platform):
    """One collector; what these systems do not have is absent, not zero."""
    found, sight = collectors.build(os.getpid(), platform=platform)
    (collector,) = found
    assert isinstance(collector, PsutilCollector)
    values = dict(collector.collect(10**9))
    assert set(values) == {
        metrics.RSS, metrics.TREE_RSS_SUM, metrics.TREE_PROCESSES, metrics.HOST_AVAILABLE, metrics.HOST_SWAP,
        metrics.CONTAINER_LIMIT, metrics.CONTAINER_HEADROOM,
    }  # fmt: skip
    assert 5 < values[metrics.RSS] <= values[metrics.TREE_RSS_SUM]
    assert 0 < values[metrics.CONTAINER_HEADROOM] < 100
    assert sight.limit_source() == "physical memory"
    assert list(collector.high_water()) == []
    collector.close()


def test_slow_values_come_once_a_second():
    """RSS at every look, the rest once a second."""
    collector = PsutilCollector(os.getpid())
    counts = [len(list(collector.collect(at * 10**8))) for at in range(10, 31)]
    assert [at for at, count in enumerate(counts) if count > 1] == [0, 10, 20]
    assert min(counts) == 1


def test_children_are_counted(child):
    """The sum and the number are those of the tree, without the agent."""
    with_child = dict(PsutilCollector(os.getpid()).collect(10**9))
    without = dict(PsutilCollector(os.getpid(), exclude=child.pid).collect(10**9))
    assert with_child[metrics.TREE_PROCESSES] - without[metrics.TREE_PROCESSES] == 1
    assert with_child[metrics.TREE_RSS_SUM] > without[metrics.TREE_RSS_SUM]


def test_process_that_is_gone(child):
    """psutil's errors come out as OSError, which the sampler bears."""
    collector = PsutilCollector(child.pid)
    list(collector.collect(10**9))
    assert exists(child.pid)
    child.communicate(timeout=20)
    with pytest.raises(OSError, match=str(child.pid)):
        collector.collect(2 * 10**9)
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        PsutilCollector(child.pid)
    assert not exists(child.pid)
