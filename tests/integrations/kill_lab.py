"""Training processes that are killed at a given time, and the delivery of what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from memtrack.recording.reader import RecordingReader
from memtrack.recording.standing import waiting
from tests.integrations.mlflow_lab import environment


def recording_of(script):
    """The one recording of a script that has a folder of its own."""
    (path,) = script._folder.glob("*.mtk")
    return path


def kill_at(script, time_s, *, agent_too=False):
    """Kill a training at a time, and its agent before it sees that, if ``agent_too``. Returns when, in Unix time."""
    with RecordingReader(str(recording_of(script))) as reader:
        agent = reader.head().agent_pid
    assert agent > 0, "there is no agent"
    time.sleep(max(time_s - time.time(), 0.0))
    assert script.process.poll() is None, "it has ended by itself"
    if agent_too:
        script.process.send_signal(signal.SIGSTOP)
        os.kill(agent, signal.SIGKILL)
    script.process.kill()
    died = time.time()
    assert script.process.wait() == -signal.SIGKILL
    return died


def await_delivery(recording, timeout_s=60.0):
    """Wait until nothing of a recording is left to deliver."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with RecordingReader(str(recording)) as reader:
            feeds = reader.feeds()
            if feeds and not waiting(reader):
                return
        time.sleep(0.1)
    raise AssertionError(f"not delivered: {feeds}")


def sync(recording, **env):
    """Run ``memtrack sync`` on a recording that waits; it must deliver all of it. Returns what it says."""
    with RecordingReader(str(recording)) as reader:
        assert waiting(reader), "somebody has delivered it already"
    done = subprocess.run(
        [sys.executable, "-m", "memtrack", "sync", str(recording)],
        env=environment(COLUMNS="200", **env),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
