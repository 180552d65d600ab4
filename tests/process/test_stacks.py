"""The stack at the peak, taken from real processes: which function allocated, and that the process notices nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from memtrack.agent.frames import SHAPES, StackReader
from memtrack.analysis.stacks import headline, peak_stack
from memtrack.recording.reader import RecordingReader

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"

if VERSION not in SHAPES:
    pytest.skip("no stacks of this Python", allow_module_level=True)

GROW = """
import itertools, memtrack, os, time
monitor = memtrack.start(tick=0.02)
assert monitor.wait_ready()
time.sleep(0.1)
keep = []

def caught():
    return [line for line in open("/proc/self/status") if line.startswith(("SigCgt", "SigIgn", "SigBlk"))]

def grow(pieces):
    for _ in range(pieces):
        keep.append(b"x" * (10 << 20))
        time.sleep(0.01)

"""


def recorded(tools, folder):
    (path,) = tools.recordings(folder)
    return RecordingReader(str(path))


def test_the_peak_names_the_function_that_allocated(run_child, tools, tmp_path):
    child = run_child(GROW + "memtrack.step(7)\ngrow(40)\nkeep.clear()\n")
    assert child.wait(30) == 0
    with recorded(tools, tmp_path) as recording:
        stack = peak_stack(recording)
        texts = [one.text.splitlines() for one in recording.stacks()]
        peaks = [event for event in recording.events() if event.kind == "new_peak"]
    in_grow = [text for text in texts if text[0].endswith(" grow")]
    assert len(in_grow) >= 2
    lines = {text[0].rpartition(":")[2] for text in in_grow}
    assert lines <= {"14 grow", "15 grow", "16 grow"}, texts
    assert all(text[-1].endswith(" <module>") for text in texts)
    assert stack.rss_mib >= 300
    assert stack.place.step == 7
    assert peaks
    assert peaks[0].value >= 30


def test_while_c_code_holds_the_gil(run_child, tools, tmp_path):
    """A call that never returns to the interpreter: no thread of the process could have looked."""
    code = "def hoard():\n    return list(map((b'x').__mul__, itertools.repeat(1 << 20, 700)))\n\nkept = hoard()\n"
    child = run_child(GROW + code)
    assert child.wait(30) == 0
    with recorded(tools, tmp_path) as recording:
        assert any(" hoard" in headline(stack.text) for stack in recording.stacks()), recording.stacks()


def test_signals_are_left_alone(run_child, tools, tmp_path):
    """The user's own handlers stay, none is added, and a stack is there all the same."""
    code = """
import faulthandler, signal, sys
sys.path.insert(0, {root!r})
faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
signal.signal(signal.SIGURG, lambda *_: os._exit(3))
signal.signal(signal.SIGRTMAX, lambda *_: os._exit(4))
before = [line for line in open("/proc/self/status") if line.startswith(("SigCgt", "SigIgn", "SigBlk"))]
"""
    child = run_child(
        code.format(root=str(tools.root)) + GROW + "grow(20)\nassert caught() == before\nmonitor.stop()\n"
    )
    assert child.wait(30) == 0
    with recorded(tools, tmp_path) as recording:
        assert recording.stacks()


def test_a_trainer_that_becomes_another_program(run_child, tools, tmp_path):
    """After exec its memory is another one: no more stacks, and nothing happens to the program."""
    after = "keep = [b'x' * (10 << 20) for _ in range(50)]; import time; time.sleep(0.5); print('survived')"
    code = f"grow(10)\nos.execv(sys.executable, [sys.executable, '-I', '-S', '-c', {after!r}])\n"
    child = run_child(GROW + code)
    assert child.communicate(timeout=30)[0] == "survived\n"
    assert child.returncode == 0
    with recorded(tools, tmp_path) as recording:
        texts = [stack.text for stack in recording.stacks()]
    assert texts
    assert not [text for text in texts if "<string>" in text]


@pytest.mark.parametrize("mode", ["main", "off"])
def test_off_never_opens_the_memory(run_child, tools, tmp_path, mode):
    env = {**os.environ, "MEMTRACK_STACKS": mode}
    child = run_child(GROW + "grow(20)\ntime.sleep(0.2)\nprint('grown', flush=True)\ninput()\n", env=env)
    assert child.stdout.readline() == "grown\n"
    (path,) = tools.recordings(tmp_path)
    agent = tools.agent_of(path)
    opened = [os.readlink(f"/proc/{agent}/fd/{fd}") for fd in os.listdir(f"/proc/{agent}/fd")]
    assert (f"/proc/{child.pid}/mem" in opened) == (mode == "main")
    # handed over by the process itself: the kernel may not let the agent open it
    handed_over = os.readlink(f"/proc/{agent}/fd/3")
    assert handed_over == (f"/proc/{child.pid}/mem" if mode == "main" else os.devnull)
    with RecordingReader(str(path)) as recording:
        assert bool(recording.stacks()) == (mode == "main")


def test_a_process_that_did_not_ask_for_it_is_not_read(tools, tmp_path):
    """``attach`` and ``run`` watch from outside: they get figures, no stacks."""
    from memtrack import config
    from memtrack.monitor import Monitor

    child = subprocess.Popen(
        [sys.executable, "-c", "k = [b'x' * (10 << 20) for _ in range(20)]\nimport time\ntime.sleep(20)"]
    )
    monitor = Monitor(config.resolve({"directory": str(tmp_path)}), pid=child.pid)
    try:
        assert monitor.wait_ready()
        time.sleep(0.5)
        agent = tools.agent_of(monitor.path)
        opened = [os.readlink(f"/proc/{agent}/fd/{fd}") for fd in os.listdir(f"/proc/{agent}/fd")]
        assert f"/proc/{child.pid}/mem" not in opened
    finally:
        monitor.stop()
        child.kill()
        child.wait()


def test_a_sawtooth_is_bounded(run_child, tools, tmp_path):
    code = "end = time.monotonic() + 3\nwhile time.monotonic() < end:\n    grow(8)\n    keep.clear()\n"
    child = run_child(GROW + code)
    assert child.wait(30) == 0
    with recorded(tools, tmp_path) as recording:
        assert 1 <= max(stack.number for stack in recording.stacks()) + 1 <= 6


CHURN = """
import threading, time
def deep(n): return deep(n - 1) if n else [[i] for i in range(200)]
def churn():
    end = time.monotonic() + 4
    while time.monotonic() < end:
        list(map(deep, range(20)))
        list(deep(i) for i in range(5))
threads = [threading.Thread(target=churn) for _ in range(2)]
print("go", flush=True)
for thread in threads: thread.start()
churn()
for thread in threads: thread.join()
print("done", flush=True)
"""


def test_reading_a_busy_process_harms_nobody(run_child):
    """Thousands of stacks of threads that never rest: the process ends as it should, and hardly any is cut short."""
    child = run_child(CHURN)
    assert child.stdout.readline() == "go\n"
    reader = StackReader(child.pid, VERSION)
    whole = cut = 0
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        for thread in reader.threads():
            stack = reader.stack(thread)
            if stack and stack[-1][2].rpartition(".")[2] in ("<module>", "_bootstrap"):
                whole += 1
            else:
                cut += 1
    assert child.wait(30) == 0
    assert child.stdout.read() == "done\n"
    assert whole > 200
    assert cut < whole / 10
    with pytest.raises(OSError, match="gone"):
        reader.threads()
    reader.close()


def test_a_stopped_process_can_be_read(run_child):
    child = run_child("import time\ndef wait():\n    print('go', flush=True)\n    time.sleep(60)\nwait()\n")
    assert child.stdout.readline() == "go\n"
    reader = StackReader(child.pid, VERSION)
    child.send_signal(signal.SIGSTOP)
    stack = reader.stack(reader.threads()[0])
    reader.close()
    child.send_signal(signal.SIGCONT)
    assert [frame[2] for frame in stack] == ["wait", "<module>"]
    assert [frame[1] for frame in stack] in ([6, 7], [5, 7])


def test_no_python_has_no_stacks():
    child = subprocess.Popen(["sleep", "20"])
    try:
        time.sleep(0.1)
        with pytest.raises(ValueError, match="runs no Python"):
            StackReader(child.pid, VERSION)
    finally:
        child.kill()
        child.wait()
