"""The process with its descendants, on a made-up /proc."""

from __future__ import annotations

import os

import pytest

from memtrack import collectors, metrics
from memtrack.collectors import tree as tree_module
from memtrack.collectors.tree import MAX_PROCESSES, RELIST_TICKS, WORKERS, PssCollector, TreeCollector
from memtrack.testing import FakeProc

PID = 4242


@pytest.fixture(params=[True, False], ids=["children files", "scan"])
def proc(tmp_path, request):
    """With and without CONFIG_PROC_CHILDREN."""
    made = FakeProc(tmp_path, children_files=request.param)
    made.add(1, rss_mib=5.0)
    made.add(PID, rss_mib=400.0)
    return made


def look(collector, times=1):
    found = {}
    for _ in range(times):
        found = dict(collector.collect(0))
    return found


def workers_of(found):
    return {name.split("/")[2]: value for name, value in found.items() if name.startswith("memory/worker/")}


def test_alone(proc):
    """A process without children is a tree of one."""
    tree = TreeCollector(PID, proc=proc.path)
    assert look(tree) == {metrics.TREE_RSS_SUM: 400.0, metrics.TREE_PROCESSES: 1.0}
    tree.close()


def test_children_and_grandchildren(proc):
    """All descendants are found, others are not, and workers are numbered from 0."""
    for pid, parent, rss in ((5000, PID, 100.0), (5001, 5000, 50.0), (5002, 5001, 25.0), (6000, 1, 999.0)):
        proc.add(pid, parent=parent, rss_mib=rss)
    found = look(TreeCollector(PID, proc=proc.path))
    assert found[metrics.TREE_RSS_SUM] == 575.0
    assert found[metrics.TREE_PROCESSES] == 4.0
    assert workers_of(found) == {"0": 100.0, "1": 50.0, "2": 25.0}


def test_agent_is_left_out(proc):
    """The agent may stand below the process, and is not part of what it uses."""
    proc.add(5000, parent=PID, rss_mib=9.0)
    proc.add(5001, parent=PID, rss_mib=70.0)
    found = look(TreeCollector(PID, exclude=5000, proc=proc.path))
    assert (found[metrics.TREE_RSS_SUM], workers_of(found)) == (470.0, {"0": 70.0})


def test_worker_numbers_are_kept_and_reused(proc):
    """A worker keeps its number while it lives; a new one gets the lowest that is free."""
    tree = TreeCollector(PID, proc=proc.path)
    for pid in (5000, 5001, 5002):
        proc.add(pid, parent=PID, rss_mib=pid - 4990.0)
    assert workers_of(look(tree)) == {"0": 10.0, "1": 11.0, "2": 12.0}
    proc.kill(5001)
    assert workers_of(look(tree)) == {"0": 10.0, "2": 12.0}
    proc.add(5003, parent=PID, rss_mib=13.0)
    assert workers_of(look(tree)) == {"0": 10.0, "1": 13.0, "2": 12.0}


def test_more_workers_than_numbers(proc):
    """The ninth and later workers are summed."""
    for pid in range(5000, 5012):
        proc.add(pid, parent=PID, rss_mib=10.0)
    found = look(TreeCollector(PID, proc=proc.path))
    assert len(workers_of(found)) == WORKERS + 1
    assert workers_of(found)["rest"] == 40.0
    assert found[metrics.TREE_PROCESSES] == 13.0


def test_children_of_threads(proc):
    """The kernel lists children by the thread that forked them: all threads are looked at."""
    proc.processes[PID].threads.update({4300: [], 4301: []})
    proc.add(5000, parent=PID, thread=4300, rss_mib=10.0)
    proc.add(5001, parent=PID, thread=4301, rss_mib=20.0)
    assert workers_of(look(TreeCollector(PID, proc=proc.path))).keys() == {"0", "1"}


def test_children_of_a_thread_that_took_the_place_of_another(proc):
    """A thread ended and another began, so that their number is the same: children of the new one are found."""
    proc.processes[PID].threads[4300] = []
    proc.update(PID)
    tree = TreeCollector(PID, proc=proc.path)
    look(tree)
    proc.end_thread(PID, 4300)
    proc.processes[PID].threads[4301] = []
    proc.add(5000, parent=PID, thread=4301, rss_mib=10.0)
    assert workers_of(look(tree, RELIST_TICKS + 1)) == {"0": 10.0}


def test_process_that_is_gone(proc):
    """When the training process has died there is no tree any more, and that is an error, not zero."""
    tree = TreeCollector(PID, proc=proc.path)
    look(tree)
    proc.kill(PID)
    with pytest.raises(ValueError, match="no memory"):
        look(tree)


def test_pid_that_was_reused(proc):
    """A process that got the pid of a dead worker, but is not of the tree, is not counted."""
    proc.add(5000, parent=PID, rss_mib=10.0)
    tree = TreeCollector(PID, proc=proc.path)
    assert look(tree)[metrics.TREE_PROCESSES] == 2.0
    proc.kill(5000)
    proc.add(5000, parent=1, rss_mib=999.0)
    found = look(tree)
    assert (found[metrics.TREE_RSS_SUM], found[metrics.TREE_PROCESSES]) == (400.0, 1.0)


def test_number_of_processes_is_bounded(proc, monkeypatch):
    """A fork bomb does not make the agent hold more than so many descriptors."""
    assert MAX_PROCESSES <= 512
    monkeypatch.setattr(tree_module, "MAX_PROCESSES", 40)
    before = len(os.listdir("/proc/self/fd"))
    for pid in range(5000, 5060):
        proc.add(pid, parent=PID, rss_mib=1.0)
    tree = TreeCollector(PID, proc=proc.path)
    assert look(tree)[metrics.TREE_PROCESSES] == 40
    tree.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- PSS ------------------------------------------------------------------------------------------------------------


def test_pss_of_the_tree(proc):
    """The sum of what smaps_rollup says: shared pages count once."""
    proc.update(PID, pss_mib=150.0)
    for pid in (5000, 5001):
        proc.add(pid, parent=PID, rss_mib=400.0, pss_mib=130.0)
    tree = TreeCollector(PID, proc=proc.path)
    assert look(tree)[metrics.TREE_RSS_SUM] == 1200.0
    assert look(PssCollector(tree, proc.path)) == {metrics.TREE_PSS: 410.0}


def test_pss_that_may_not_be_read(proc):
    """A process whose smaps_rollup may not be read counts with its RSS."""
    proc.add(5000, parent=PID, rss_mib=70.0, pss_mib=1.0)
    tree = TreeCollector(PID, proc=proc.path)
    look(tree)
    os.unlink(f"{proc.path}/5000/smaps_rollup")
    assert look(PssCollector(tree, proc.path)) == {metrics.TREE_PSS: 470.0}


def test_pss_of_the_training_process_that_may_not_be_read(proc):
    """Without that of the training process there is no PSS: RSS must not pass for it, not even between readings."""
    proc.add(5000, parent=PID, rss_mib=70.0, pss_mib=1.0)
    tree = TreeCollector(PID, proc=proc.path)
    look(tree)
    os.unlink(f"{proc.path}/{PID}/smaps_rollup")
    pss = PssCollector(tree, proc.path)
    assert look(pss) == {}
    assert list(pss.between()) == []


def test_pss_is_stale_when_the_tree_has_changed(proc):
    """Processes that come or go, or memory that moves by a twentieth, ask for a new reading; smaller moves do not."""
    tree = TreeCollector(PID, proc=proc.path)
    pss = PssCollector(tree, proc.path)
    look(tree), look(pss)
    assert not pss.stale
    proc.update(PID, rss_mib=410.0)
    look(tree)
    assert not pss.stale
    proc.update(PID, rss_mib=430.0)
    look(tree)
    assert pss.stale
    look(pss)
    assert not pss.stale
    proc.add(5000, parent=PID, rss_mib=1.0)
    look(tree)
    assert pss.stale
    look(pss)
    proc.kill(5000)
    look(tree)
    assert pss.stale


def test_meaning_of_the_sums():
    """The sum of RSS says that it is an upper bound; PSS says that shared pages count once."""
    assert "upper bound" in metrics.BY_NAME[metrics.TREE_RSS_SUM].meaning
    assert "counted once" in metrics.BY_NAME[metrics.TREE_PSS].meaning


def test_all_collectors_of_this_process():
    """On the real /proc, everything that is on by default and can be had here is there after one look at each."""
    found, sight = collectors.build(os.getpid())
    latest = {}
    for collector in found:
        latest.update(collector.collect(10**9))
        collector.close()
    assert {metrics.RSS, metrics.TREE_PSS, metrics.TREE_RSS_SUM, metrics.TREE_PROCESSES} <= set(latest)
    assert {metrics.HOST_AVAILABLE, metrics.CONTAINER_LIMIT, metrics.CONTAINER_HEADROOM} <= set(latest)
    assert latest[metrics.TREE_PSS] <= latest[metrics.TREE_RSS_SUM] + 1.0
    assert sight.limit_source()


def test_pss_between_two_readings(proc):
    """Each process is taken to have grown as its RSS did; one that is gone counts no more, one that is new not yet."""
    proc.update(PID, rss_mib=400.0, pss_mib=150.0)
    proc.add(5000, parent=PID, rss_mib=400.0, pss_mib=130.0)
    tree = TreeCollector(PID, proc=proc.path)
    pss = PssCollector(tree, proc.path)
    assert list(pss.between()) == []
    list(tree.collect(0))
    list(pss.collect(0))
    assert dict(pss.between()) == {metrics.TREE_PSS: 280.0}
    proc.update(PID, rss_mib=450.0, pss_mib=0.0)
    proc.add(5001, parent=PID, rss_mib=300.0)
    list(tree.collect(1))
    assert dict(pss.between()) == {metrics.TREE_PSS: 330.0}
    proc.kill(5000)
    list(tree.collect(2))
    assert dict(pss.between()) == {metrics.TREE_PSS: 200.0}
    tree.close()
