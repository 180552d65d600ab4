"""The agent as a process: how it starts, what it loads, how it ends, and what it does when it cannot start."""

from __future__ import annotations

import os
import signal
import stat
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memtrack
from memtrack.errors import AgentError, RecordingError
from memtrack.monitor import active
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader

FEW = {
    "__future__", "_collections_abc", "_stat", "_struct", "binascii", "gc", "genericpath", "mmap", "os", "os.path",
    "posixpath", "select", "stat", "struct",
}  # fmt: skip
RSS_MIB = 10.0


@pytest.mark.alone
def test_start_takes_little_of_the_callers_time(tools):
    """``start()`` returns within 50 ms (median): it does not wait for the agent to sample."""
    times = []
    for _ in range(9):
        began = time.perf_counter()
        monitor = memtrack.start()
        times.append(time.perf_counter() - began)
        assert monitor.wait_ready()
        monitor.stop()
    assert statistics.median(times) <= 0.050, times


def test_agent_loads_nothing_of_others(tools):
    """No shared library outside the interpreter's own is mapped, and no package of somebody else."""
    with memtrack.start() as monitor:
        assert monitor.wait_ready()
        maps = Path(f"/proc/{tools.agent_of(monitor.path)}/maps").read_text()
    libraries = {line.split()[-1] for line in maps.splitlines() if ".so" in line}
    assert libraries, "cannot see what is mapped"
    assert not [path for path in libraries if "site-packages" in path or "dist-packages" in path]
    assert not [path for path in libraries for name in ("psutil", "numpy", "torch") if name in path]


def test_agent_loads_few_modules(tools):
    """What the agent imports is memtrack's own and a handful of small modules: each costs memory for the whole run."""
    code = f"""
import sys
before = {{*sys.modules}}
sys.path.append({str(tools.root)!r})
import os
from memtrack import collectors
from memtrack.agent import loop
collectors.build(os.getpid())
print(*sorted({{*sys.modules}} - before))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.partition(".")[0] != "memtrack"}
    assert loaded <= FEW


def test_agent_is_no_child(tools):
    """It has detached itself: another parent, a session of its own, and no descriptor of the caller."""
    read_fd, write_fd = os.pipe()
    os.set_inheritable(write_fd, True)
    with memtrack.start() as monitor:
        agent = tools.agent_of(monitor.path)
        assert int(tools.status(agent, "PPid")) != os.getpid()
        assert os.getsid(agent) == agent or os.getsid(agent) != os.getsid(0)
        held = set()
        for fd in os.listdir(f"/proc/{agent}/fd"):
            try:
                held.add(os.readlink(f"/proc/{agent}/fd/{fd}"))
            except FileNotFoundError:
                continue  # a file that it was reading
        assert not [target for target in held if target.startswith(("pipe:", "socket:"))]
        os.close(write_fd)
        assert os.read(read_fd, 1) == b"", "the agent holds the other end open"
    os.close(read_fd)


def test_out_of_memory_takes_others_first(tools):
    """Where it may, the agent asks not to be killed: the kernel would, in the milliseconds after its first victim."""
    with memtrack.start() as monitor:
        agent = tools.agent_of(monitor.path)
        own = Path("/proc/self/oom_score_adj").read_text()
        capabilities = int(tools.status(agent, "CapEff"), 16)
        expected = "-1000\n" if capabilities >> 24 & 1 else own  # CAP_SYS_RESOURCE
        tools.wait_until(lambda: Path(f"/proc/{agent}/oom_score_adj").read_text() == expected)
        assert Path("/proc/self/oom_score_adj").read_text() == own


def test_waiting_for_any_child_is_not_disturbed(run_child):
    """A program that waits for all its children sees its own, and nothing else."""
    child = run_child("""
import os, memtrack
with memtrack.start() as monitor:
    try:
        print("waited for", os.wait())
    except ChildProcessError:
        print("no children")
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-I", "-S", "-c", "raise SystemExit(7)"])
    print(os.wait() == (pid, 7 << 8))
    try:
        print("waited for", os.wait())
    except ChildProcessError:
        print("no children")
""")
    assert child.communicate(timeout=20)[0].split("\n") == ["no children", "True", "no children", ""]


def test_start_where_children_are_ignored(run_child, fault):
    """A program that ignores SIGCHLD, so that its children are collected by the kernel, can be monitored."""
    child = run_child("""
import signal, memtrack
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with memtrack.start() as monitor:
    print(monitor.wait_ready())
""")
    assert child.communicate(timeout=20)[0] == "True\n"
    fault("SIGCHLD is ignored in the training")


@pytest.mark.parametrize("ending", ["SIGKILL", "os._exit", "sys.exit", "end", "SIGTERM"])
def test_agent_ends_with_the_trainer(run_child, tools, tmp_path, ending):
    """However the trainer ends, the agent is gone half a second later, and the recording says how things stand."""
    child = run_child("""
import os, time, memtrack
monitor = memtrack.start(interval=0.1)
monitor.wait_ready()
memtrack.step(41)
print(monitor.path, flush=True)
how = sys.stdin.readline().strip()
if how == "os._exit":
    os._exit(3)
if how == "sys.exit":
    sys.exit(4)
""")
    path = child.stdout.readline().strip()
    agent = tools.agent_of(path)
    if ending.startswith("SIG"):
        child.send_signal(getattr(signal, ending))
    else:
        child.stdin.write(f"{ending}\n")
        child.stdin.flush()
    child.wait(timeout=10)
    died = time.monotonic()
    tools.wait_until(lambda: tools.is_gone(agent), 5.0)
    assert time.monotonic() - died <= 0.5
    with RecordingReader(path) as reader:
        assert reader.head().state == layout.ENDED
        assert reader.farewell() == ({"how": "exit"} if ending in ("sys.exit", "end") else {})
        assert reader.events()[-1].kind == "exit"
        assert reader.place().step == 41
        assert len(list(reader.windows())) == reader.head().windows >= 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_agent_outlives_what_ends_a_job(tools, name):
    """Signals that go to all processes of a job or a terminal do not stop it from seeing the end."""
    with memtrack.start() as monitor, RecordingReader(monitor.path) as reader:
        assert monitor.wait_ready()
        agent = tools.agent_of(monitor.path)
        os.kill(agent, getattr(signal, name))
        before = reader.head().ticks, reader.pulse().mono_ns
        tools.wait_until(lambda: reader.pulse().mono_ns > before[1] + 10**8)
        assert not tools.is_gone(agent)


def test_agent_stays_small(tools):
    """After five seconds of training with a hundred phases and gauges, the agent's RSS is at most 10 MiB."""
    with memtrack.start(interval=0.2) as monitor:
        assert monitor.wait_ready()
        deadline = time.monotonic() + 5.0
        step, held = 0, []
        while time.monotonic() < deadline:
            step += 1
            memtrack.step(step)
            memtrack.gauge(f"memory/test/g{step % 60}_mib", step)
            with memtrack.phase(f"phase {step % 100}"):
                held.append(bytearray(1 << 18))
                time.sleep(0.002)
            if len(held) > 400:
                held.clear()
        rss = int(tools.status(tools.agent_of(monitor.path), "VmRSS").split()[0]) / 1024
    assert rss <= RSS_MIB, f"{rss:.1f} MiB"


def test_agent_that_dies_hurts_nobody(tools):
    """When somebody kills the agent, training goes on, and stopping is as quick as ever."""
    with memtrack.start(interval=0.1) as monitor:
        assert monitor.wait_ready()
        agent = tools.agent_of(monitor.path)
        os.kill(agent, signal.SIGKILL)
        tools.wait_until(lambda: tools.is_gone(agent))
        for step in range(1000):
            memtrack.step(step)
        began = time.monotonic()
    assert time.monotonic() - began <= 2.0
    with RecordingReader(monitor.path) as reader:
        assert reader.place().step == 999


# -- where it cannot start ------------------------------------------------------------------------------------------


def test_files_are_private(tmp_path):
    """The folder is made 0700, the recording 0600, whatever the umask."""
    before = os.umask(0)
    try:
        with memtrack.start(directory=str(tmp_path / "new")) as monitor:
            assert stat.S_IMODE(os.stat(monitor.path).st_mode) == 0o600
            assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o700
    finally:
        os.umask(before)


def test_full_disk(small_disk, fault):
    """A disk without room for the recording is an error at start that says so; nothing is left, nothing is running."""
    folder = small_disk("size=2m")
    with pytest.raises(RecordingError, match=r"cannot allocate 4194304 bytes .*No space left.*MEMTRACK_RECORDING_SIZE"):
        memtrack.start(directory=str(folder))
    assert os.listdir(folder) == []
    assert active.monitor is None
    with memtrack.start(directory=str(folder), recording_size="1MiB") as monitor:
        assert monitor.wait_ready()
    fault("the disk is full at the start", "nothing: start() is refused in a sentence")


def test_disk_that_fills_up_later(small_disk, run_child, tools, fault):
    """The space was allocated up front: a disk that is full afterwards stops neither the trainer nor the agent."""
    folder = small_disk("size=3m")
    child = run_child(f"""
import time, memtrack
with memtrack.start(directory={str(folder)!r}, recording_size="1MiB", interval=0.05) as monitor:
    monitor.wait_ready()
    try:
        with open({str(folder / "filler")!r}, "wb") as file:
            while True:
                file.write(bytes(65536))
                file.flush()
    except OSError as exc:
        print(exc.errno)
    for step in range(300):
        memtrack.step(step)
        with memtrack.phase(str(step % 50)):
            time.sleep(0.003)
print(monitor.summary().figures.windows > 10)
""")
    assert child.communicate(timeout=30)[0] == "28\nTrue\n"
    assert child.returncode == 0
    fault("the disk fills up after the start")


def test_read_only_folder(small_disk, fault):
    """A folder that cannot be written to is an error at start that names it."""
    folder = small_disk("size=1m,ro")
    for directory in (folder, folder / "below"):
        with pytest.raises(RecordingError, match="MEMTRACK_DIR") as caught:
            memtrack.start(directory=str(directory))
        assert str(folder) in str(caught.value)
    assert os.listdir(folder) == []
    assert active.monitor is None
    fault("the folder of the recordings is read-only", "nothing: start() is refused in a sentence")


def test_folder_without_permission(tmp_path):
    """As is one that this user may not write to."""
    if os.geteuid() == 0:
        pytest.skip("needs another user than root")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(RecordingError, match="cannot write to the recordings folder"):
        memtrack.start(directory=str(folder))


def test_no_interpreter(monkeypatch, tmp_path):
    """An embedded interpreter that does not know its own program, with none on the path, is an AgentError."""
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(AgentError, match="no Python interpreter"):
        memtrack.start()
    assert list(tmp_path.glob("*.mtk")) == []
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python-that-is-not-there"))
    with pytest.raises(AgentError, match="python-that-is-not-there"):
        memtrack.start()
    assert list(tmp_path.glob("*.mtk")) == []
    assert active.monitor is None


def test_no_process_to_spare(run_child, tmp_path):
    """Where no more processes may be started, start() raises an AgentError, and the program goes on."""
    if os.geteuid() == 0:
        pytest.skip("needs another user than root: the limit does not bind root")
    child = run_child("""
import resource, memtrack
from memtrack.errors import AgentError
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    memtrack.start()
except AgentError as exc:
    print("AgentError")
""")
    assert child.communicate(timeout=20)[0] == "AgentError\n"


def test_no_descriptor_to_spare(run_child, fault):
    """Where no more files may be opened, start() raises one of memtrack's errors, and leaves nothing open."""
    child = run_child("""
import os, resource, memtrack
from memtrack.errors import MemtrackError
import memtrack.monitor, memtrack.config
limit = len(os.listdir("/proc/self/fd"))
outcomes = set()
for spare in (0, 1, 2, 3, 5, 12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        memtrack.start().stop()
        outcomes.add("started")
    except MemtrackError:
        outcomes.add("refused")
    except OSError as exc:
        outcomes.add(repr(exc))
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(sorted(outcomes), len(os.listdir("/proc/self/fd")) - limit, memtrack.monitor.active.monitor)
""")
    assert child.communicate(timeout=60)[0] == "['refused', 'started'] 0 None\n"
    fault("no descriptor is left at the start", "nothing: start() is refused in a sentence")
