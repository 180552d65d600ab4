"""An agent that is killed is started again, and goes on in the same recording."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time

import pytest

import memtrack
from memtrack.agent import keeper
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from memtrack.testing import RecordingSink

LOST_S = 3.0


def kill_agent(reader, tools):
    """Kill it, and return its pid once it has gone."""
    pid = reader.head().agent_pid
    os.kill(pid, signal.SIGKILL)
    tools.wait_until(lambda: tools.is_gone(pid))
    return pid


def numbers(reader):
    """The numbers of all windows."""
    return [number for row in reader.windows() for number in range(row.first, row.last + 1)]


@pytest.mark.parametrize("by", ["the relay", "a phase"])
def test_a_killed_agent_comes_back(tools, fault, by):
    """Noticed by the relay, or by phases where there is no sink: windows go on by number, and the gap is an event."""
    sink = RecordingSink()
    sinks = [sink] if by == "the relay" else []
    with (
        memtrack.start(sinks=sinks, interval=0.1, flush_interval=0.5) as monitor,
        RecordingReader(monitor.path) as reader,
    ):
        tools.wait_until(lambda: reader.head().windows >= 5)
        memtrack.mark("before")
        tools.wait_until(lambda: any(event.text == "before" for event in reader.events()))
        before = len(numbers(reader))
        first = kill_agent(reader, tools)
        slowest = 0.0
        deadline = time.monotonic() + 15.0
        while reader.head().agent_pid == first and time.monotonic() < deadline:
            start = time.monotonic()
            with memtrack.phase("work") if by == "a phase" else contextlib.nullcontext():
                memtrack.step(7)
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.1 if by == "a phase" else 0.5)
        second = reader.head().agent_pid
        assert second not in (0, first)
        memtrack.mark("after")
        tools.wait_until(lambda: len(numbers(reader)) >= before + 5)
        assert monitor.flush()
        summary = monitor.summary()
    with RecordingReader(monitor.path) as reader:
        assert reader.head().state == layout.STOPPED
        found = numbers(reader)
        assert found == list(range(len(found)))
        events = [(event.kind, event.text) for event in reader.events()]
        assert [kind for kind, _ in events] == ["start", "mark", "gap", "start", "mark", "stop"]
        gap = next(event for event in reader.events() if event.kind == "gap")
        assert LOST_S <= gap.value <= LOST_S + 3.0
        ends = [row.end_ns for row in reader.windows()]
        holes = [later - earlier for earlier, later in itertools.pairwise(ends)]
        assert sum(hole > 1e9 for hole in holes) == 1
    assert len(found) - 5 <= summary.figures.windows <= len(found)
    assert slowest <= 0.1, "a phase must not wait for a process to start"
    if sinks:
        delivered = [row.first for row in sink.windows]
        # what comes between the last delivery and the stop of the agent is not the sink's
        assert delivered == list(range(delivered[0], len(found)))[: len(delivered)]
        assert delivered[-1] >= len(found) - 6
    fault(f"the agent is killed; noticed by {by}", f"samples of {gap.value:.1f} s, marked as a gap", slowest)
    assert tools.wait_until(lambda: tools.is_gone(second))


def test_an_agent_that_keeps_dying_is_given_up(tools, fault, monkeypatch, notices):
    """After some restarts it stays dead, which is said; the training goes on, and to stop takes no longer."""
    monkeypatch.setattr(keeper, "SILENT_NS", 200_000_000)
    with memtrack.start(interval=0.05) as monitor, RecordingReader(monitor.path) as reader:
        assert monitor.wait_ready()
        seen = set()
        deadline = time.monotonic() + 20.0
        while len(seen) <= keeper.RESTARTS and time.monotonic() < deadline:
            pid = reader.head().agent_pid
            if pid and pid not in seen:
                seen.add(pid)
                os.kill(pid, signal.SIGKILL)
            with memtrack.phase("work"):
                time.sleep(0.06)
        while not notices and time.monotonic() < deadline + 10.0:
            with memtrack.phase("work"):
                time.sleep(0.06)
        assert len(seen) == keeper.RESTARTS + 1
        assert tools.is_gone(reader.head().agent_pid)
        start = time.monotonic()
    took = time.monotonic() - start
    assert [notice for notice in notices if "killed again and again" in notice] == notices != []
    fault("the agent is killed again and again", "samples after the last restart", took)


def test_an_agent_that_stands_still_is_not_doubled(tools, fault):
    """Stopped for a while, it seems dead: the one started in its place finds the recording locked and leaves."""
    with memtrack.start(interval=0.1) as monitor, RecordingReader(monitor.path) as reader:
        tools.wait_until(lambda: reader.head().windows >= 2)
        agent = reader.head().agent_pid
        os.kill(agent, signal.SIGSTOP)
        try:
            until = time.monotonic() + LOST_S + 1.5
            while time.monotonic() < until:
                with memtrack.phase("work"):
                    time.sleep(0.1)
        finally:
            os.kill(agent, signal.SIGCONT)
        before = reader.head().windows
        tools.wait_until(lambda: reader.head().windows >= before + 5)
        assert reader.head().agent_pid == agent
        assert [event.kind for event in reader.events()] == ["start"]
        found = numbers(reader)
        assert found == list(range(len(found)))
    fault("the agent is stopped for 5 s and continued", "samples of 5 s")
