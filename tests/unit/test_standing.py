"""Whether a recording is still its process's own: told from the file, and from /proc where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from memtrack.collectors.procfs import start_ticks
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.standing import DEAD, FRESH_S, LIVE, STOPPED, boot_id, pid_namespace, standing
from memtrack.recording.writer import RecordingWriter

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)


@pytest.fixture
def stands(make_recording):
    """``stands(state, age_s, stop, **fields)``: the standing of such a recording, of this process unless told."""

    def look(state, *, age_s=0.0, stop=False, **fields):
        own = {"pid": str(os.getpid()), "start_ticks": str(start_ticks(os.getpid()))}
        path = make_recording(**{**own, "boot_id": boot_id(), "pid_ns": pid_namespace(), **fields})
        marks = MarkWriter(path)
        if stop:
            marks.request_stop()
        writer = RecordingWriter(path)
        head = Head()
        head.state = state
        writer.publish(head)
        writer.close()
        marks.close()
        os.utime(path, (time.time() - age_s,) * 2)
        with RecordingReader(path) as reader:
            return standing(reader)

    return look


@pytest.fixture
def zombie():
    """Fields of a process that has died and that nobody has collected."""
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    fields = {"pid": str(child.pid), "start_ticks": str(start_ticks(child.pid))}
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    yield fields
    child.wait()
    child.stdin.close()


def test_of_a_process_that_lives(stands):
    """It is live, however old the file; stopped only if it was told to, not if its agent has failed."""
    assert stands(layout.STARTING) == LIVE
    assert stands(layout.RUNNING, age_s=1e6) == LIVE
    assert stands(layout.STOPPED) == LIVE
    assert stands(layout.STOPPED, stop=True) == STOPPED


def test_of_a_process_that_is_dead(stands, zombie):
    """It is dead at once, also as a zombie, and when another process has got its pid."""
    for fields in (zombie, {"start_ticks": "1"}, {"pid": "4194303"}):
        assert stands(layout.RUNNING, **fields) == DEAD
        assert stands(layout.STARTING, **fields) == DEAD
        assert stands(layout.STOPPED, **fields) == DEAD
    assert stands(layout.ENDED) == DEAD


@pytest.mark.parametrize("elsewhere", [{"boot_id": "another"}, {"pid_ns": "pid:[1]"}], ids=["machine", "container"])
def test_of_a_process_that_cannot_be_seen(stands, elsewhere):
    """In a shared folder it counts as alive as long as its file is written; a window may take its time."""
    gone = {"pid": "4194303", **elsewhere}
    assert stands(layout.RUNNING, **gone) == LIVE
    assert stands(layout.RUNNING, age_s=FRESH_S - 5, **gone) == LIVE
    assert stands(layout.RUNNING, age_s=FRESH_S + 5, **gone) == DEAD
    assert stands(layout.RUNNING, age_s=FRESH_S + 5, interval_s="3600.0", **gone) == LIVE
    assert stands(layout.ENDED, **gone) == DEAD
    assert stands(layout.STOPPED, stop=True, **gone) == STOPPED
