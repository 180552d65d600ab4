"""Real out-of-memory kills, in memory cgroups made for the test, of processes that memtrack watches."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from memtrack.agent.kernel_log import KernelLog
from memtrack.collectors.procfs import pids_are_true
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from tests.cgroup_lab import make_group

__all__ = ["make_group"]

LIMIT_MIB = 160

# Goes into the cgroup before anything else, so that the agent is in it as well.
HEAD = """
import os, time
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
import memtrack
monitor = memtrack.start(interval=0.1)
monitor.wait_ready()
print(monitor.path, flush=True)
def touch(mib):
    return b"x" * (mib << 20)
"""

# What it starts by exec, the agent that is, has no CAP_SYSLOG: PR_CAPBSET_DROP takes it from the bounding set.
WITHOUT_LOG = """
import ctypes
assert ctypes.CDLL(None).prctl(24, 34, 0, 0, 0) == 0
"""

TRAINING = (
    HEAD
    + """
sys.stdin.readline()
held = []
memtrack.epoch(3)
with memtrack.phase("train"):
    for step in range(10_000):
        memtrack.step(step)
        held.append(touch(2))
        time.sleep(0.01)
"""
)

WORKERS = (
    HEAD
    + """
import multiprocessing
from multiprocessing.connection import wait

def work(mib):
    held = []
    time.sleep(2.2)  # by then it is known by name
    for _ in range(mib // 2):
        held.append(touch(2))
        time.sleep(0.02)
    time.sleep(30)

fork = multiprocessing.get_context("fork")
workers = [fork.Process(target=work, args=(mib,), daemon=True) for mib in (4, 1000, 4)]
for worker in workers:
    worker.start()
print(*[worker.pid for worker in workers], flush=True)
with memtrack.phase("load"):
    memtrack.step(7)
    sentinel = wait([worker.sentinel for worker in workers])[0]
    (dead,) = [worker for worker in workers if worker.sentinel == sentinel]
    dead.join()
    print(dead.pid, dead.exitcode, flush=True)
    sys.stdin.readline()
    raise RuntimeError("a worker was killed")
"""
)

EATER = """
import time
with open(sys.argv[1], "w") as file:
    file.write("0")
held = []
while True:
    held.append(b"x" * (8 << 20))
    time.sleep(0.002)
"""

WAITING = (
    HEAD
    + """
memtrack.step(1)
held = [touch(int(sys.argv[2]))]
print("held", flush=True)
time.sleep(60)
"""
)


# Fills the cgroup up to 97 % of its limit.
NEARLY_FULL = (
    HEAD
    + """
memtrack.step(1)
held, usage = [], sys.argv[2]
while int(open(usage).read()) < 0.97 * int(sys.argv[3]):
    held.append(touch(1))
print("held", flush=True)
time.sleep(60)
"""
)


@pytest.fixture
def group(make_group):
    return make_group(LIMIT_MIB)


def verdict_of(path, tools):
    """The verdict, and the events, once the agent has written them."""
    with RecordingReader(path) as reader:
        tools.wait_until(lambda: reader.head().state == layout.ENDED)
        return reader.verdict(), reader.events()


def go(child):
    """Let it go on."""
    child.stdin.write("\n")
    child.stdin.flush()


def test_training_is_killed(run_child, group, tools):
    """Confirmed, with the limit, the phase, the epoch and the step; the agent in the same cgroup survives."""
    child = run_child(TRAINING, group.procs)
    path = child.stdout.readline().strip()
    agent = tools.agent_of(path)
    assert str(agent) in group.procs.read_text().split()
    go(child)
    assert child.wait(timeout=30) == -signal.SIGKILL
    died_ns = time.monotonic_ns()
    assert group.kills() == 1
    verdict, events = verdict_of(path, tools)

    assert (verdict.kind, verdict.confidence, verdict.signal) == ("out_of_memory", "confirmed", 9)
    with RecordingReader(path) as reader:
        step = reader.place().step
        last_ns = reader.pulse().mono_ns
    limit = f"{LIMIT_MIB}.0 MiB (cgroup v{group.version} {group.name} "
    assert limit in verdict.text
    assert f"in phase train, epoch 3, step {step}" in verdict.text
    assert (died_ns - last_ns) / 1e9 <= 0.5
    evidence = "\n".join(verdict.evidence)
    counter = "memory.oom_control" if group.version == 1 else "memory.events"
    assert re.search(rf"oom_kill in \S*{counter}\S* rose from 0 to 1", evidence)
    last = re.search(r"^RSS ([\d., ]+) MiB in the last (\d+) ms$", evidence, re.MULTILINE)
    assert last is not None, evidence
    values = [float(value) for value in last[1].split(", ")]
    assert values == sorted(values), "the zero of a dead process, or what was left of it, is among them"
    assert values[-1] > LIMIT_MIB / 2
    grew = re.search(r"RSS grew by (\d+) MiB/s", evidence)
    assert grew is not None
    assert 20 <= int(grew[1]) <= 400
    if KernelLog().readable and pids_are_true():
        assert f"process {child.pid} (" in evidence
        assert "anon-rss" in evidence
    assert not [event for event in events if event.kind == "oom_kill"]


@pytest.mark.parametrize("reads_log", [True, False])
def test_worker_is_killed(run_child, group, tools, reads_log):
    """The event names the worker while the trainer lives; the trainer's own end is laid to it."""
    if not reads_log and Path("/proc/sys/kernel/dmesg_restrict").read_text() != "1\n":
        pytest.skip("everybody may read the kernel log here")
    child = run_child(WORKERS if reads_log else WITHOUT_LOG + WORKERS, group.procs)
    path = child.stdout.readline().strip()
    pids = [int(word) for word in child.stdout.readline().split()]
    pid, status = (int(word) for word in child.stdout.readline().split())
    died = time.monotonic()
    assert (pid, status) == (pids[1], -9)
    with RecordingReader(path) as reader:
        (event,) = tools.wait_until(lambda: [event for event in reader.events() if event.kind == "oom_kill"], 5.0)
        assert time.monotonic() - died <= 3.0
        assert f"({pid})" in event.text
        assert event.text.endswith("was killed out of memory")
        assert event.step == 7
        assert event.value > LIMIT_MIB / 4
    go(child)
    assert child.wait(timeout=20) == 1
    verdict, _ = verdict_of(path, tools)
    assert (verdict.kind, verdict.confidence, verdict.exit_code) == ("failed", "certain", 1)
    assert "RuntimeError" in verdict.text
    assert re.search(rf"[\d.]+ s before, its worker \S+ \({pid}\) was killed out of memory \(confirmed\)", verdict.text)
    assert f"{LIMIT_MIB}.0 MiB (cgroup v{group.version} {group.name} " in verdict.text


def test_kill_by_hand(run_child, group, tools):
    """``kill -9`` in the cgroup, with the limit near: unknown, and the evidence says that memory was short."""
    child = run_child(NEARLY_FULL, group.procs, group.usage, LIMIT_MIB << 20)
    path = child.stdout.readline().strip()
    assert child.stdout.readline() == "held\n"
    with RecordingReader(path) as reader:
        tools.wait_until(lambda: reader.pulse().headroom_pct < 5)
    child.kill()
    child.wait(timeout=10)
    verdict, _ = verdict_of(path, tools)
    assert (verdict.kind, verdict.confidence, verdict.signal) == ("unknown_sigkill", "none", 9)
    evidence = "\n".join(verdict.evidence)
    assert re.search(r"oom_kill in \S+ stayed at 0", evidence)
    assert re.search(r"memory was short all the same: [\d.]+ MiB in use, [0-4]\.\d % left at the last sample", evidence)


@pytest.mark.parametrize("is_same", [True, False], ids=["same cgroup", "another cgroup"])
def test_kill_by_hand_after_somebody_elses_oom_kill(run_child, make_group, group, tools, is_same):
    """A neighbour has just been killed out of memory: that does not make ours one."""
    if is_same and not (KernelLog().readable and pids_are_true()):
        pytest.skip("without the kernel log nobody can tell which of the two it was")
    child = run_child(WAITING, group.procs, 60)
    path = child.stdout.readline().strip()
    assert child.stdout.readline() == "held\n"
    where = group if is_same else make_group()
    eater = run_child(EATER, where.procs)
    assert eater.wait(timeout=20) == -signal.SIGKILL
    child.kill()
    child.wait(timeout=10)
    assert where.kills() == 1
    verdict, _ = verdict_of(path, tools)
    assert (verdict.kind, verdict.confidence) == ("unknown_sigkill", "none")
    assert "out of memory" not in verdict.text
    assert any("rose from 0 to 1, by kills of other" in line for line in verdict.evidence) is is_same


def test_neighbour_is_told_of(run_child, group, tools):
    """An OOM kill of a process that is not ours, in our cgroup, is an event; nobody of ours is accused."""
    child = run_child(WAITING, group.procs, 60)
    path = child.stdout.readline().strip()
    assert child.stdout.readline() == "held\n"
    eater = run_child(EATER, group.procs)
    assert eater.wait(timeout=20) == -signal.SIGKILL
    with RecordingReader(path) as reader:
        (event,) = tools.wait_until(lambda: [event for event in reader.events() if event.kind == "oom_kill"], 6.0)
        assert "of the cgroup" in event.text
    time.sleep(0.3)  # it is acquitted by then, whatever was counted
    child.kill()
    child.wait(timeout=10)
    verdict, _ = verdict_of(path, tools)
    assert verdict.kind == "unknown_sigkill"
    assert any("killed out of memory" in line for line in verdict.evidence)
