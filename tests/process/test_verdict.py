"""How real processes end, and what the verdict says of it, whoever collects them and when."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from memtrack.agent.exit_status import wait_status
from memtrack.analysis.summary import summarise
from memtrack.analysis.verdict import verdict_of
from memtrack.collectors.procfs import start_ticks
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader

PROGRAM = """
import os, signal, time, memtrack
monitor = memtrack.start(interval=0.1)
monitor.wait_ready()
memtrack.step(5)
print(monitor.path, flush=True)
how = sys.stdin.readline().strip()
def inner():
    if how == "exception":
        raise LookupError("a secret")
    if how == "memory":
        return bytearray(1 << 60)
    if how == "exit 4":
        sys.exit(4)
    if how == "_exit 3":
        os._exit(3)
    if how == "abort":
        os.abort()
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(20)
inner()
"""

ENDINGS = {
    "end": ("clean", 0, None, "exit code 0"),
    "exit 4": ("failed", 4, None, "exit code 4"),
    "_exit 3": ("failed", 3, None, "exit code 3"),
    "exception": ("failed", 1, None, "LookupError at "),
    "memory": ("memory_error", 1, None, "MemoryError at "),
    "abort": ("killed", None, 6, "SIGABRT"),
    "SIGTERM": ("killed", None, 15, "SIGTERM"),
    "SIGKILL": ("unknown_sigkill", None, 9, "SIGKILL"),
    "SIGSEGV": ("killed", None, 11, "SIGSEGV"),
    "SIGINT": ("killed", None, 2, "interrupted (SIGINT)"),
}

# Starts the program as its child, and collects it at once, late, never, or leaves it to another parent.
PARENT = """
import os, subprocess, time
how = sys.argv[2]
child = subprocess.Popen([sys.executable, "-I", "-S", sys.argv[1]], stdin=0, stderr=subprocess.DEVNULL)
if how == "orphan":
    os._exit(0)
if how == "at once":
    child.wait()
else:
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.3 if how == "late" else 30)
"""


def no_core():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@pytest.fixture
def program(run_child, tmp_path, tools):
    """The program below a parent that treats it in its way: gives its standard input and the path of the recording."""
    script = tmp_path / "program.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(tools.root)!r})\n{PROGRAM}")

    def start(how):
        parent = run_child(PARENT, script, how, preexec_fn=no_core)
        return parent, parent.stdout.readline().strip()

    return start


def tell(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def ended(path, tools):
    with RecordingReader(path) as reader:
        tools.wait_until(lambda: reader.head().state == layout.ENDED, 10.0)
        return reader.verdict()


def test_endings(program, tools):
    """Each way to end, each collected at once by a parent that is not the agent: all at the same time."""
    started = {ending: program("at once") for ending in ENDINGS}
    for ending, (parent, _) in started.items():
        tell(parent, ending)
    for ending, (kind, code, number, words) in ENDINGS.items():
        verdict = ended(started[ending][1], tools)
        assert (verdict.kind, verdict.exit_code, verdict.signal) == (kind, code, number), (ending, verdict)
        assert words in verdict.text, ending
        assert "secret" not in verdict.text + "".join(verdict.evidence)
        assert abs(verdict.wall_ns / 1e9 - time.time()) < 60


@pytest.mark.parametrize("how", ["late", "never", "orphan"])
@pytest.mark.parametrize("ending", ["exit 4", "SIGKILL"])
def test_whoever_collects_it(program, tools, how, ending):
    """A zombie tells its status; init collects an orphan in its own time."""
    parent, path = program(how)
    tell(parent, ending)
    kind, code, number, _ = ENDINGS[ending]
    verdict = ended(path, tools)
    assert (verdict.kind, verdict.exit_code, verdict.signal) == (kind, code, number)


def test_place_of_an_exception(program, tools):
    """File, line and function where it was raised."""
    parent, path = program("at once")
    tell(parent, "exception")
    verdict = ended(path, tools)
    assert "program.py:" in verdict.text
    assert " inner, exit code 1" in verdict.text
    assert any("step 5" in line for line in verdict.evidence)


def test_address_space_limit(run_child, tools):
    """A MemoryError below RLIMIT_AS names that limit."""
    child = run_child("""
import resource, memtrack
monitor = memtrack.start(interval=0.1)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
import time
time.sleep(0.1)
print(monitor.path, flush=True)
sys.stdin.readline()
bytearray(2 << 30)
""")
    path = child.stdout.readline().strip()
    tell(child, "")
    child.wait(timeout=10)
    verdict = ended(path, tools)
    assert (verdict.kind, verdict.exit_code) == ("memory_error", 1)


def test_status_is_told_in_time():
    """By pidfd right after somebody else has collected the process; by the zombie before; bounded if nobody does."""
    for code, late in ((3, False), (0, False), (7, True)):
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", f"input(); raise SystemExit({code})"], stdin=-1)
        pid_fd, ticks = os.pidfd_open(process.pid), start_ticks(process.pid)
        try:
            process.stdin.write(b"\n")
            process.stdin.close()
            if late:
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            else:
                process.wait(timeout=10)
            began = time.monotonic()
            status = wait_status(process.pid, ticks, pid_fd)
            took_s = time.monotonic() - began
            if status is None and not late:
                pytest.skip("this kernel does not tell the status by pidfd (Linux 6.15)")
            assert os.waitstatus_to_exitcode(status) == code
            assert took_s < 0.2
        finally:
            os.close(pid_fd)
            process.wait(timeout=10)
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=-1)
    pid_fd = os.pidfd_open(process.pid)
    began = time.monotonic()
    assert wait_status(process.pid, start_ticks(process.pid), pid_fd, 0.05) is None, "it is alive"
    assert time.monotonic() - began < 0.3
    process.kill()
    process.communicate()
    os.close(pid_fd)


def test_agent_without_pidfd(run_child, tools, tmp_path):
    """Before Linux 5.3 there is none: a zombie is seen to be dead all the same, before anybody collects it."""
    child = run_child("import memtrack, time\nsys.stdin.readline()\nsys.exit(6)")
    from memtrack.config import Settings
    from memtrack.monitor import Monitor

    path = Monitor(Settings(directory=str(tmp_path / "first")), pid=child.pid).path
    tools.wait_until(lambda: tools.agent_of(path))
    code = f"""
import os
del os.pidfd_open
from memtrack.agent.loop import Agent
Agent({path!r}, 0).run()
"""
    os.kill(tools.agent_of(path), signal.SIGKILL)
    agent = run_child(code)
    with RecordingReader(path) as reader:
        tools.wait_until(lambda: reader.head().agent_pid == agent.pid)
        tell(child, "")
        tools.wait_until(lambda: reader.head().state == layout.ENDED, 5.0)
        verdict = reader.verdict()
    assert (verdict.kind, verdict.exit_code) == ("failed", 6)
    assert child.wait(timeout=5) == 6


# -- when the agent dies, too ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["end", "SIGKILL"])
def test_agent_that_died_as_well(run_child, tools, ending):
    """Killed together, as with memory.oom.group: unknown, with what was seen last; never out of memory for that."""
    child = run_child(PROGRAM)
    path = child.stdout.readline().strip()
    agent = tools.agent_of(path)
    with RecordingReader(path) as reader:
        tools.wait_until(lambda: reader.head().windows)
        assert verdict_of(reader) is None, "it runs"
        os.kill(agent, signal.SIGKILL)
        tell(child, ending)
        child.wait(timeout=10)
        tools.wait_until(lambda: tools.is_gone(agent))
        verdict = verdict_of(reader)
        text = str(summarise(reader))
    if ending == "end":
        assert (verdict.kind, verdict.confidence) == ("clean", "likely")
        assert "verdict" not in text
    else:
        assert (verdict.kind, verdict.confidence) == ("unknown", "none")
        assert any("memory.oom.group" in line for line in verdict.evidence)
        assert "  verdict   unknown: the process has ended, and memtrack's agent at the same moment" in text


# -- memtrack run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("sleep 0.4; exit 3", 3, "verdict   failed: the process ended with exit code 3"),
        ("sleep 0.4; kill -9 $$", -9, "verdict   unknown SIGKILL: the process was killed by SIGKILL; nothing tells"),
        ("sleep 0.4", 0, ""),
        ("exit 5", 5, ""),
    ],
)
def test_last_words(tmp_path, tools, command, status, words):
    """``memtrack run`` tells anything but a clean end; and is not held up by the agent's finding out."""
    pytest.importorskip("typer")
    environment = {**os.environ, "PYTHONPATH": str(tools.root), "MEMTRACK_DIR": str(tmp_path / "r")}
    run = [sys.executable, "-m", "memtrack"]
    done = subprocess.run(
        [*run, "run", "--", "sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status
    if words:
        assert words in done.stderr
    if status == 0:
        assert "verdict" not in done.stderr
    shown = subprocess.run([*run, "report", "--json"], env=environment, capture_output=True, text=True, timeout=60)
    verdict = json.loads(shown.stdout)["verdict"]
    if status != 5:  # it may have been too short for the agent to see
        assert verdict["exit_code"] == (status if status >= 0 else None)
        assert verdict["signal"] == (-status if status < 0 else None)
