"""What becomes of processes: they stop, fork, become daemons or other programs, lose their files, get another's pid."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

import memtrack
from memtrack.agent.keeper import RESTARTS
from memtrack.monitor import active
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from memtrack.testing import RecordingSink
from tests.faults.lab import Child, check_delivered, check_whole, ended, lines_of, until

SELF_RUNNING = {
    "closing": ("CLOSING", "alive"),
    "closing, agent killed": ("CLOSING", "killed"),
    "closing, with a sink": ("CLOSING", "fed"),
    "workers": ("WORKERS", "fine"),
    "worker killed": ("WORKERS", "worker killed"),
    "pid reused": ("REUSED",),
    "exec": ("REPLACED", 2),
    "exec of another": ("OTHER",),
}
"""Programs that need nobody: they run beside the first test, which waits most of the time."""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """They are started: name -> child."""
    folder = tmp_path_factory.mktemp("running")
    started = {}
    for number, (name, (source, *words)) in enumerate(SELF_RUNNING.items()):
        prefix = ["unshare", "--pid", "--fork", "--mount-proc"] if source == "REUSED" and can_unshare() else ()
        started[name] = Child(folder / str(number), globals()[source], *words, prefix=prefix)
    yield started
    for one in started.values():
        one.kill()


def can_unshare():
    """Whether processes may be put into a pid namespace of their own."""
    command = ["unshare", "--mount", "--pid", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def namespaces():
    """What ``unshare`` needs is there."""
    if not can_unshare():
        pytest.skip("needs the right to make namespaces")


def events(path):
    with RecordingReader(path) as reader:
        return [event.kind for event in reader.events()]


# -- stopped and continued ------------------------------------------------------------------------------------------

STEPS = """
monitor = memtrack.start(sinks=["jsonl"], interval=0.1, flush_interval=0.2)
monitor.wait_ready()
print("ready", flush=True)
number = 0
deadline = time.monotonic() + 30
while not os.path.exists("stop") and time.monotonic() < deadline:
    number += 1
    memtrack.step(number)
    with memtrack.phase("train"):
        time.sleep(0.01)
print(number, monitor._keeper.restarts_left)
"""


def test_suspended_processes(child, running, fault):
    """SIGSTOP of the training, Ctrl-Z of its group, and a freeze of everything, the agent too, for longer than an agent
    may be silent: no window is lost, and no agent is started in vain."""
    names = ["SIGSTOP", "Ctrl-Z", "frozen"]
    trainings = {name: child(STEPS, start_new_session=True) for name in names}
    agents = {}
    for name, training in trainings.items():
        assert training.read() == "ready"
        with RecordingReader(training.recording) as reader:
            agents[name] = until(lambda reader=reader: reader.head().agent_pid)
    time.sleep(0.5)
    trainings["SIGSTOP"].process.send_signal(signal.SIGSTOP)
    # nobody else is in the session: a terminal's SIGTSTP would be ignored as the group is an orphan
    os.killpg(trainings["Ctrl-Z"].process.pid, signal.SIGSTOP)
    trainings["frozen"].process.send_signal(signal.SIGSTOP)
    os.kill(agents["frozen"], signal.SIGSTOP)
    before = {name: windows_of(training) for name, training in trainings.items()}
    time.sleep(4.0)
    during = {name: windows_of(training) for name, training in trainings.items()}
    trainings["frozen"].process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    os.kill(agents["frozen"], signal.SIGCONT)
    for training in trainings.values():
        training.process.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    for training in trainings.values():
        (training.folder / "stop").touch()
    for name, training in trainings.items():
        number, left = map(int, training.finish().split())
        assert (training.process.returncode, training.err) == (0, "")
        assert ended(training.recording) == layout.ENDED
        check_whole(training.recording)
        with RecordingReader(training.recording) as reader:
            assert reader.place().step == number
        check_delivered(training.recording)
        assert left == RESTARTS
        assert events(training.recording) == ["start", "exit"]
        if name == "frozen":
            assert during[name] == before[name]
        else:
            assert during[name] >= before[name] + 25
    fault("SIGSTOP and SIGCONT of the training process")
    fault("Ctrl-Z of its whole process group")
    fault("training and agent are frozen for 4 s", "samples of those 4 s, in which nothing ran")


def windows_of(training):
    with RecordingReader(training.recording) as reader:
        return reader.head().windows


# -- other programs in the same process -----------------------------------------------------------------------------

REPLACED = """
monitor = memtrack.start(sinks=["jsonl"], interval=0.1, flush_interval=0.2)
monitor.wait_ready()
time.sleep(0.5)
print(monitor.path, flush=True)
left = int(sys.argv[1])
if left:
    os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, str(left - 1)])
"""
OTHER = """
monitor = memtrack.start(sinks=["jsonl"], interval=0.1, flush_interval=0.2)
monitor.wait_ready()
memtrack.step(5)
time.sleep(0.3)
print(monitor.path, flush=True)
os.execv("/bin/sh", ["sh", "-c", "sleep 0.5; exit 3"])
"""


def test_exec(running, fault):
    """A program that replaces itself is monitored anew, and its first agent stops; another program is watched on."""
    again, other = running["exec"], running["exec of another"]
    paths = [again.read() for _ in range(3)]
    assert len({*paths}) == 3
    again.finish(), other.finish()
    assert (again.process.returncode, other.process.returncode) == (0, 3)
    assert [ended(path) for path in paths] == [layout.STOPPED, layout.STOPPED, layout.ENDED]
    spans = []
    for path in paths:
        check_whole(path)
        check_delivered(path)
        stamps = [stamp for _, stamp, _ in lines_of(path)[0]]
        spans.append((min(stamps), max(stamps)))
    # no moment is told by two recordings, but for the few ticks until the agent has heard
    overlaps_ms = [earlier[1] - later[0] for earlier, later in itertools.pairwise(spans)]
    assert max(overlaps_ms) <= 1000
    fault("exec of the same program, which starts memtrack again, twice")
    assert ended(other.recording) == layout.ENDED
    rows = check_whole(other.recording)
    assert rows[-1].end_ns - rows[0].start_ns > 0.6e9
    check_delivered(other.recording)
    with RecordingReader(other.recording) as reader:
        assert (reader.verdict().kind, reader.verdict().exit_code) == ("failed", 3)
    fault("exec of another program, which ends with status 3")


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
import sys
sys.path.insert(0, {root!r})
import memtrack
for start in (memtrack.start, lambda: memtrack.autolog(trackers=[])):
    try:
        start()
    except memtrack.errors.MonitorError as exc:
        print(exc, flush=True)
memtrack.step(1)
'''
with memtrack.start():
    failed = interpreters.run_string(interpreters.create(), code.format(root=sys.path[0]))
    print(failed, flush=True)
"""


def test_subinterpreter(child, fault):
    """It is refused in a sentence, and nothing is left behind; marks there are no-ops."""
    one = child(SUBINTERPRETER)
    *refusals, failed = one.finish().splitlines()
    assert refusals == [refusals[0]] * 2
    assert refusals[0].startswith("memtrack cannot be started in a subinterpreter.")
    assert (failed, one.err, len(one.made())) == ("None", "", 1)
    fault("start() and autolog() in a subinterpreter", "nothing: refused in a sentence")


# -- descriptors ----------------------------------------------------------------------------------------------------

CLOSING = """
import gc
sinks = ["jsonl"] if sys.argv[1] == "fed" else []
monitor = memtrack.start(sinks=sinks, interval=0.05, flush_interval=0.1)
monitor.wait_ready()
time.sleep(0.3)
begun = time.monotonic()
os.closerange(3, 1000)
files = [open(f"file-{number}", "w+b", buffering=0) for number in range(20)]
for number in range(30):
    memtrack.step(number)
    with memtrack.phase("train"):
        time.sleep(0.01)
assert time.monotonic() - begun < 3, "slow"
assert monitor.flush() and monitor.summary().figures.windows > 5
with memtrack.phase("train"):
    if sys.argv[1] == "killed":
        os.kill(monitor._reader.head().agent_pid, 9)
        time.sleep(3.2)
if sys.argv[1] == "killed":
    for _ in range(200):
        with memtrack.phase("train"):
            time.sleep(0.02)
begun = time.monotonic()
path = monitor.path
monitor.stop()
delay = time.monotonic() - begun
del monitor
gc.collect()
open_files = [os.fstat(file.fileno()).st_size for file in files]
print(open_files == [0] * 20, delay, path)
"""


def test_all_descriptors_closed(running, fault):
    """A program that closes every descriptor, and has files of its own behind these numbers: nothing is written to them
    nor are they closed, and everything that can goes on, also when the agent must be started again."""
    children = {"alive": running["closing"], "killed": running["closing, agent killed"]}
    for name, one in children.items():
        out = one.finish()
        assert (one.process.returncode, one.err) == (0, "")
        intact, delay_s, path = out.split()
        assert intact == "True"
        assert float(delay_s) <= 1.0
        assert ended(path) == layout.STOPPED
        with RecordingReader(path) as reader:
            assert reader.place().step == 29
        assert [path.stat().st_size for path in one.folder.glob("file-*")] == [0] * 20
        if name == "alive":
            check_whole(path)
        else:
            assert events(path).count("start") == 2
    fault(
        "the training closes all descriptors and reuses their numbers", delay_s=float(children["alive"].out.split()[1])
    )


def test_all_descriptors_closed_with_a_sink(running, fault):
    """The same while a sink is fed: the windows arrive, in its own file."""
    one = running["closing, with a sink"]
    out = one.finish()
    assert (one.process.returncode, one.err) == (0, "")
    intact, delay_s, path = out.split()
    assert intact == "True"
    assert float(delay_s) <= 1.0
    assert [path.stat().st_size for path in one.folder.glob("file-*")] == [0] * 20
    check_delivered(path)
    fault("the same, while a sink is fed", delay_s=float(delay_s))


DAEMON = """
monitor = memtrack.start(sinks=["jsonl"], interval=0.05, flush_interval=0.1)
monitor.wait_ready()
memtrack.step(3)
time.sleep(0.2)
print(monitor.path, flush=True)
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.closerange(0, 1000)
log = os.open("log", os.O_RDWR | os.O_CREAT)
os.dup2(log, 1), os.dup2(log, 2)
files = [open(f"file-{number}", "w+b", buffering=0) for number in range(20)]
for number in range(10):
    memtrack.step(1000 + number)
    with memtrack.phase("daemon"):
        time.sleep(0.01)
monitor.stop()
print(monitor.summary().figures.windows > 0, [os.fstat(file.fileno()).st_size for file in files] == [0] * 20)
with memtrack.start(interval=0.05, sinks=["jsonl"]) as second:
    second.wait_ready()
    memtrack.step(77)
    time.sleep(0.2)
print(second.path, flush=True)
"""


def test_daemon(child, fault):
    """A training that becomes a daemon after the start is a child of what was monitored: it can be monitored anew."""
    one = child(DAEMON)
    first = one.read()
    one.process.wait(20)
    log = until(
        lambda: (
            (one.folder / "log").exists()
            and (one.folder / "log").read_text().count("\n") == 2
            and (one.folder / "log").read_text()
        )
    )
    intact, second = log.splitlines()
    assert intact == "True True"
    assert ended(first) == layout.ENDED
    check_delivered(first)
    with RecordingReader(first) as reader:
        assert reader.place().step == 3
        assert reader.verdict().kind == "clean"
    assert ended(second) == layout.STOPPED
    check_delivered(second)
    with RecordingReader(second) as reader:
        assert reader.place().step == 77
    fault("the training becomes a daemon after the start", "nothing: the daemon is another process, to be started anew")


BARE = """
log = os.open("log", os.O_RDWR | os.O_CREAT)
os.dup2(log, 100)
os.close(log)
os.close(0), os.close(1), os.close(2)
sys.stdout = sys.stderr = None
def held():
    for fd in range(3):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass
monitor = memtrack.start(sinks=["jsonl"], interval=0.05, flush_interval=0.1)
ready = monitor.wait_ready()
time.sleep(0.3)
mine = [path for path in held() if "mtk" in path or "memfd" in path or "anon" in path]
for fd in (1, 2):
    try:
        os.write(fd, b"a library says something")
    except OSError:
        pass
os.write(100, f"{ready} {mine}\\n".encode())
"""


def test_no_standard_streams(child, fault):
    """Without descriptors 0 to 2, nothing of memtrack's is opened there, where libraries print."""
    one = child(BARE)
    assert one.process.wait(20) == 0
    assert (one.folder / "log").read_text() == "True []\n"
    assert ended(one.recording) == layout.ENDED
    check_whole(one.recording)
    check_delivered(one.recording)
    fault("the training has closed its standard streams")


# -- limits ---------------------------------------------------------------------------------------------------------

SCARCE = """
import logging, resource
from memtrack.testing import RecordingSink
logging.basicConfig()
sink = RecordingSink()
monitor = memtrack.start(sinks=[sink], interval=0.05, flush_interval=0.1)
monitor.wait_ready()
held = []
try:
    while True:
        held.append(open(os.devnull))
except OSError as exc:
    print(exc.errno)
for number in range(50):
    memtrack.step(number)
    with memtrack.phase(str(number % 5)):
        time.sleep(0.01)
assert monitor.flush()
assert monitor.summary().figures.windows > 5
begun = time.monotonic()
monitor.stop()
print(time.monotonic() - begun, sink.figures is not None, len(sink.windows) > 5)
monitor.summary()
"""


def test_no_descriptor_left_later(child, fault):
    """Where the training has opened as many files as it may, windows and figures arrive as ever."""
    one = child(f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n{SCARCE}")
    code, delay_s, *found = one.finish().split()
    assert (code, found) == ("24", ["True", "True"])
    assert one.process.returncode == 0
    # only what needs a descriptor of its own is missing, and that is said
    assert [line for line in one.err.splitlines() if "cannot sum up" not in line] == []
    fault("no descriptor is left, after the start", delay_s=float(delay_s))


ADDRESS_SPACE = """
import resource
def limit(mib):
    with open("/proc/self/status") as file:
        size = next(int(line.split()[1]) for line in file if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + (mib << 20),) * 2)
import memtrack.monitor, memtrack.config
limit(int(sys.argv[1]))
try:
    with memtrack.start(interval=0.05) as monitor:
        ready = monitor.wait_ready()
    print("started", ready)
except memtrack.errors.MemtrackError as exc:
    print(type(exc).__name__, exc)
"""


def test_tight_address_space(child, fault):
    """With hardly any address space to spare, which the agent inherits, it runs or there is one clear error."""
    outcomes = {mib: child(ADDRESS_SPACE, mib) for mib in (0, 1, 8)}
    lines = {}
    for mib, one in outcomes.items():
        (lines[mib],) = one.finish().splitlines()
        assert (one.process.returncode, one.err) == (0, "")
    assert lines[8] == "started True"
    assert all(line == "started True" or "Cannot allocate memory" in line for line in lines.values()), lines
    fault("RLIMIT_AS leaves 8 MiB", "nothing; with less, start() is refused in a sentence")


PROCESSES = """
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    memtrack.start()
except memtrack.errors.AgentError as exc:
    print(exc)
"""


def test_no_process_left(child, fault):
    """Where the user may have no more processes, start() is refused in a sentence and leaves nothing behind."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, to become another user")
    one = child(PROCESSES, as_nobody=True)
    assert "cannot start the agent" in one.finish()
    assert (one.process.returncode, one.err, one.made()) == (0, "", [])
    fault("RLIMIT_NPROC is used up", "nothing: start() is refused in a sentence")


# -- odd surroundings -----------------------------------------------------------------------------------------------

READY = """
monitor = memtrack.start(sinks=["jsonl"], interval=0.05)
print(monitor.wait_ready(), len(list(monitor._reader.events())))
time.sleep(0.2)
"""


def test_misleading_environment(child, fault, tmp_path):
    """The agent is led astray neither by PYTHON* variables nor by a folder ``memtrack`` in the working directory."""
    wrong = {"PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere", "PYTHONSTARTUP": "/nowhere", "PYTHONINSPECT": "1"}
    one = child(READY, environment=wrong)
    other = child("sys.stdin.readline()\n" + READY)
    (other.folder / "memtrack" / "agent").mkdir(parents=True)
    for name in ("__init__.py", "agent/__init__.py", "agent/loop.py", "os.py", "struct.py"):
        (other.folder / "memtrack" / name).write_text("open('/dev/full', 'w').write('x')\nraise SystemExit(9)")
    other.say()
    for training in (one, other):
        assert training.finish() == "True 1\n"
        assert training.err == ""
        assert ended(training.recording) == layout.ENDED
        check_delivered(training.recording)
    fault("PYTHONHOME and PYTHONPATH that lead nowhere")
    fault("a folder named memtrack in the working directory")


WORKERS = """
import multiprocessing
from multiprocessing import shared_memory

def work(number, name, queue):
    batch = shared_memory.SharedMemory(name)
    batch.buf[number << 20 : (number + 1) << 20] = bytes([number + 1]) * (1 << 20)
    memtrack.step(1000 + number)
    with memtrack.phase("worker"):
        queue.put((number, type(memtrack.monitor.active.monitor).__name__))
    batch.close()
    while not os.path.exists("done"):
        time.sleep(0.02)

if __name__ == "__main__":
    import memtrack.monitor
    context = multiprocessing.get_context("fork")
    block = shared_memory.SharedMemory(create=True, size=8 << 20)
    monitor = memtrack.start(sinks=["jsonl"], interval=0.1, flush_interval=0.1)
    monitor.wait_ready()
    memtrack.step(1)
    queue = context.SimpleQueue()
    workers = [
        context.Process(target=work, args=(n, block.name, queue), daemon=True) for n in range(8)
    ]
    for worker in workers:
        worker.start()
    print(sorted(queue.get() for _ in workers))
    time.sleep(1.5)
    if sys.argv[1] == "worker killed":
        os.kill(workers[3].pid, 9)
        time.sleep(1.2)
    open("done", "w").close()
    for worker in workers:
        worker.join()
    block.close(), block.unlink()
    memtrack.step(2)
    time.sleep(0.3)
"""


def test_eight_workers(running, fault):
    """Workers as a DataLoader has them, forked with the relay at work, with batches in shared memory; one is killed."""
    for name in ("workers", "worker killed"):
        training = running[name]
        out = training.finish(60)
        assert (training.process.returncode, training.err) == (0, ""), training.err
        assert out.splitlines()[-1] == str([(number, "NoneType") for number in range(8)])
        assert ended(training.recording) == layout.ENDED
        rows = check_whole(training.recording)
        check_delivered(training.recording)
        most = max(row.cells["memory/tree/processes"].max for row in rows if "memory/tree/processes" in row.cells)
        assert most >= 9
        with RecordingReader(training.recording) as reader:
            assert reader.place().step == 2
            assert "worker" not in reader.names()
        assert len(training.made()) == 1
    fault("eight forked workers with shared memory, as of a DataLoader")
    fault("one of eight workers is killed")


def test_thousands_of_runs(fault):
    """Five hundred runs in one process, each with a sink of its own: all are complete, and nothing grows."""
    with memtrack.start(interval=0.05, flush_interval=60, recording_size="1MiB") as monitor:
        assert monitor.wait_ready()
        begun = time.monotonic()
        held = len(os.listdir("/proc/self/fd"))
        for number in range(500):
            sink = RecordingSink(f"run {number}")
            attached = monitor.attach(sink)
            assert attached.detach()
            assert sink.figures is not None
            assert sink.closed == 1
        each_s = (time.monotonic() - begun) / 500
        assert each_s < 0.1
        assert len(os.listdir("/proc/self/fd")) <= held + 3
        assert len(monitor._attached) <= 2
        with RecordingReader(monitor.path) as reader:
            assert len(reader.feeds()) <= layout.FEED_COUNT
    fault("500 runs in one process", delay_s=each_s)


def test_monitored_already(fault):
    """A second start is refused, a second autolog joins in."""
    with memtrack.start() as monitor:
        with pytest.raises(memtrack.errors.MonitorError):
            memtrack.start()
        assert memtrack.autolog(trackers=[]) is memtrack.autolog(trackers=[]) is monitor
        assert active.monitor is monitor
    fault("start() inside start()", "nothing: refused in a sentence")
    fault("autolog() twice")


# -- pids -----------------------------------------------------------------------------------------------------------

REUSED = """
import json, subprocess
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from memtrack.agent.launch import spawn
from memtrack.report.recordings import find_live, list_recordings
from memtrack.recording.standing import standing
from memtrack.collectors.procfs import start_ticks

TRAINER = '''
import sys, time
sys.path.insert(0, sys.argv[1])
import memtrack
monitor = memtrack.start(interval=0.05)
monitor.wait_ready()
time.sleep(0.3)
print(monitor.path, flush=True)
time.sleep(60)
'''

def take_pid(pid):
    for _ in range(50):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        other = subprocess.Popen(["sleep", "60"])
        if other.pid == pid:
            return other
        other.kill(), other.wait()
    raise SystemExit("cannot get that pid")

found = {}
for both in (False, True):
    command = [sys.executable, "-I", "-S", "-c", TRAINER, sys.path[0]]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    path = trainer.stdout.readline().strip()
    with RecordingReader(path) as reader:
        agent = reader.head().agent_pid
    time.sleep(0.02)
    if both:
        os.kill(trainer.pid, signal.SIGSTOP)
        os.kill(agent, 9)
    trainer.kill(), trainer.wait()
    other = take_pid(trainer.pid)
    time.sleep(1.5 if both else 0.5)
    with RecordingReader(path) as reader:
        windows = reader.head().windows
        seen = standing(reader)
        if both:
            spawn(path)  # an agent that is told to watch the process of this recording
            time.sleep(0.6)
        (listed,) = [one for one in list_recordings(os.path.dirname(path)) if one.path == path]
        found[both] = {
            "stands": seen,
            "state": listed.state,
            "live": find_live(other.pid, [os.path.dirname(path)]),
            "grown": reader.head().windows - windows,
            "events": [event.kind for event in reader.events()],
            "errors": [event.text for event in reader.events() if event.kind == "error"],
        }
    other.kill(), other.wait()
print(json.dumps(found))
"""


def test_pid_reuse(running, namespaces, fault):
    """Another process with the pid of the dead training is not taken for it, whether or not the agent outlived it."""
    one = running["pid reused"]
    found = json.loads(one.finish(60))
    assert (one.process.returncode, one.err) == (0, "")
    assert found["false"] == {
        "stands": "dead",
        "state": "killed by SIGKILL",
        "live": None,
        "grown": 0,
        "errors": [],
        "events": ["start", "exit"],
    }
    killed = found["true"]
    assert killed["stands"] == "dead"
    assert (killed["live"], killed["grown"]) == (None, 0)
    assert killed["events"] == ["start", "error"]
    assert killed["state"] not in ("running", "starting")
    assert any("is gone" in error for error in killed["errors"])
    fault("the pid of the dead training is given to another process")
    fault("the same, and the agent was killed with the training", "samples since the last tick")


FIRST = """
import ctypes, warnings
warnings.simplefilter("ignore")  # from Python 3.12 on, of a fork with threads
if sys.argv[1] == "subreaper":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
monitor = memtrack.start(sinks=["jsonl"], interval=0.05, flush_interval=0.2)
monitor.wait_ready()
memtrack.step(8)
time.sleep(0.4)
worker = os.fork()
if worker == 0:
    os._exit(4)
print(os.waitpid(worker, 0)[1] >> 8, os.getpid())
print(os.waitpid(-1, os.WNOHANG))
"""


def test_first_process_of_a_container(child, namespaces, fault):
    """As pid 1, with which all others die, it waits until the recording is finished. As pid 1 or subreaper it gets the
    agent for a child, which nobody can help; waiting for a certain child is as ever."""
    first = child(FIRST, "init", prefix=["unshare", "--pid", "--fork", "--mount-proc"])
    reaper = child(FIRST, "subreaper")
    assert first.finish() == "4 1\n(0, 0)\n"
    assert reaper.finish() == f"4 {reaper.process.pid}\n(0, 0)\n"
    assert (first.err, reaper.err) == ("", "")
    assert ended(first.recording) == layout.STOPPED
    assert ended(reaper.recording) == layout.ENDED
    for one in (first, reaper):
        check_whole(one.recording)
        check_delivered(one.recording)
        with RecordingReader(one.recording) as reader:
            assert reader.place().step == 8
            assert reader.farewell() == {"how": "exit"}
    fault("the training is the first process of a container", "the verdict: nobody is left to see the end")
    fault("the training is a subreaper: os.wait() sees the agent")
