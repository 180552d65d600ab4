"""However a living run ends: nothing is lost, its exit status is its own, and the end comes 2 s later at the most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from tests.faults.lab import ROOT, Child, check_delivered, check_whole, ended, until

pytestmark = pytest.mark.alone  # forty programs end at the same time, and how long each takes counts

BEGIN = """
{before}
monitor = memtrack.start(sinks=[{sink}], interval=0.05, flush_interval=0.3)
{after}
getattr(monitor, "wait_ready", bool)()
memtrack.step(1)
time.sleep(0.5)
memtrack.step(41)
print("ready", flush=True)
{wait}
{end}
"""

HANGS = """
from memtrack.testing import RecordingSink
class Hangs(RecordingSink):
    def write(self, batch):
        {how}
    finish = write
"""


class Way(NamedTuple):
    """How a program ends. ``status`` as ``subprocess`` tells it, ``verdict`` one of ``records.KINDS``."""

    end: str = ""
    status: int = 0
    verdict: str = "clean"
    signal: int = 0
    before: str = ""
    after: str = ""
    sink: str = "'jsonl'"
    lost: str = "nothing"
    step: int = 41


SLOW = "atexit.register(lambda: (memtrack.step(97), time.sleep(0.6)))"
TOIL = """
def toil():
    while True:
        memtrack.step(41)
        with memtrack.phase("toil"):
            sum(range(1000))
for _ in range(3):
    threading.Thread(target=toil, daemon=True).start()
"""
LINGER = """
def linger():
    for number in range(60):
        memtrack.step(number)
        time.sleep(0.01)
threading.Thread(target=linger).start()
"""
WAITING = "nothing: what the sink has not got waits in the recording"

WAYS = {
    "the script ends": Way(),
    "an exception": Way("raise KeyError('mine')", 1, "failed"),
    "sys.exit(3)": Way("sys.exit(3)", 3, "failed"),
    "Ctrl-C (SIGINT)": Way(status=-2, verdict="killed", signal=signal.SIGINT),
    "SIGTERM": Way(status=-15, verdict="killed", signal=signal.SIGTERM),
    "SIGTERM with a handler that exits": Way(
        status=143,
        verdict="failed",
        signal=signal.SIGTERM,
        before="signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))",
    ),
    "SIGHUP": Way(status=-1, verdict="killed", signal=signal.SIGHUP),
    "kill -9": Way(status=-9, verdict="unknown_sigkill", signal=signal.SIGKILL),
    "os._exit(5)": Way("os._exit(5)", 5, "failed"),
    "os.abort()": Way("os.abort()", -6, "killed"),
    "os._exit(6) from a thread": Way(
        "threading.Thread(target=os._exit, args=(6,)).start(); time.sleep(20)", 6, "failed"
    ),
    "sys.exit(7) in a thread, which ends only that": Way("threading.Thread(target=sys.exit, args=(7,)).start()"),
    "daemon threads that mark until the very end": Way(TOIL),
    "a thread that goes on after the main one has ended": Way(LINGER, step=59),
    "a slow exit handler of the user's, before memtrack's": Way(after=SLOW, step=97),
    "a slow exit handler of the user's, after memtrack's": Way(before=SLOW),
    "a phase is open": Way("memtrack.phase('train').__enter__()"),
    "the end of a with block, by sys.exit(4)": Way("with memtrack.phase('x'):\n    sys.exit(4)", 4, "failed"),
    "the relay is in a request that takes 30 s": Way(
        before=HANGS.format(how="time.sleep(30)"), sink="Hangs()", lost=WAITING
    ),
    "the relay is in a request that never lets go of the processor": Way(
        before=HANGS.format(how="\n            ".join(["while True:", "    sum(range(100))"])),
        sink="Hangs()",
        lost=WAITING,
    ),
    "five sinks hang": Way(
        before=HANGS.format(how="time.sleep(30)"), sink=", ".join(f"Hangs('{n}')" for n in range(5)), lost=WAITING
    ),
}
ATTEND = "sys.stdin.readline()"
SLEEP = "time.sleep(60)"


def source(way):
    wait = SLEEP if way.signal else ATTEND
    return BEGIN.format(before=way.before, after=way.after, sink=way.sink, wait=wait, end=way.end)


def end(child, way):
    """Let it end. Returns how long that took, in seconds."""
    start = time.monotonic()
    if way.signal:
        child.process.send_signal(way.signal)
    else:
        child.say()
    child.process.wait(30)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    """Every way to end, with memtrack and without it: way -> (child, seconds longer than without)."""
    folder = tmp_path_factory.mktemp("exits")
    with ExitStack() as stack:
        pairs = {}
        for number, (name, way) in enumerate(WAYS.items()):
            # a sink of the script's own is not made where memtrack is off
            pairs[name] = [
                Child(folder / f"{number}-{off}", source(way), environment={"MEMTRACK_DISABLE": off})
                for off in ("", "1")
            ]
            for child in pairs[name]:
                stack.callback(child.kill)
        for pair in pairs.values():
            for child in pair:
                assert child.read() == "ready"
        found = {}
        for name, pair in pairs.items():
            seconds = [end(child, WAYS[name]) for child in pair]
            found[name] = (pair[0], pair[1], seconds[0] - seconds[1])
        for name, (child, plain, delay_s) in found.items():
            child.finish(), plain.finish()
            found[name] = (child, plain, delay_s)
        yield found


@pytest.mark.parametrize("name", WAYS)
def test_exit(name, exits, fault):
    """Status and output are those that the program has without memtrack; the recording tells everything to the end."""
    way = WAYS[name]
    child, plain, delay_s = exits[name]
    assert child.process.returncode == plain.process.returncode == way.status
    assert child.err.splitlines()[-1:] == plain.err.splitlines()[-1:]
    assert "memtrack" not in child.err
    assert ended(child.recording) == layout.ENDED
    rows = check_whole(child.recording)
    with RecordingReader(child.recording) as reader:
        assert reader.verdict().kind == way.verdict
        assert reader.place().step == way.step
        exit_ns = reader.events()[-1].time_ns
    assert exit_ns - rows[-1].end_ns < 0.3e9, "the last window is old"
    if way.sink == "'jsonl'":
        check_delivered(child.recording)
    if "Hangs" not in way.sink:
        assert delay_s <= 1.0, "nothing had to be waited for"
    fault(f"exit: {name}", way.lost, delay_s)


# -- with memtrack run as the parent --------------------------------------------------------------------------------

COMMANDS = {
    "an exception": ("raise KeyError('mine')", 0, 1, "failed"),
    "sys.exit(3)": ("sys.exit(3)", 0, 3, "failed"),
    "SIGTERM to memtrack run": ("", signal.SIGTERM, -15, "killed"),
    "SIGINT to memtrack run": ("", signal.SIGINT, -2, "killed"),
    "the command kills itself with SIGKILL": ("os.kill(os.getpid(), 9)", 0, -9, "unknown_sigkill"),
}
COMMAND = "import os, sys, time\nprint('ready', flush=True)\n{wait}\n{end}\n"


def command(folder, code, prefix):
    folder.mkdir(parents=True)
    (folder / "train.py").write_text(code)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTRACK_")}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "MEMTRACK_DIR": str(folder),
        "MEMTRACK_SELECTIVE": "0",
        "NO_COLOR": "1",
    }
    return subprocess.Popen(
        [*prefix, sys.executable, "-S", "train.py"],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The same under ``memtrack run``: name -> (folder, its status, that of the plain command, seconds longer)."""
    pytest.importorskip("typer")
    folder = tmp_path_factory.mktemp("commands")
    started, found = {}, {}
    for number, (name, (code, number_of_signal, *_)) in enumerate(COMMANDS.items()):
        text = COMMAND.format(wait=SLEEP if number_of_signal else ATTEND, end=code)
        prefix = [sys.executable, "-m", "memtrack", "run", "--interval", "0.1", "--"]
        started[name] = [command(folder / f"{number}-{bool(words)}", text, words) for words in (prefix, [])]
    for pair in started.values():
        for process in pair:
            assert process.stdout.readline() == "ready\n"
    time.sleep(0.7)  # the launcher steps aside, the agent samples
    for number, (name, pair) in enumerate(started.items()):
        seconds = []
        for process in pair:
            start = time.monotonic()
            if COMMANDS[name][1]:
                process.send_signal(COMMANDS[name][1])
                process.wait(30)
            else:
                process.communicate("go\n", timeout=30)
            seconds.append(time.monotonic() - start)
            process.communicate()
        (path,) = (folder / f"{number}-True").glob("*.mtk")
        found[name] = (str(path), pair[0].returncode, pair[1].returncode, seconds[0] - seconds[1])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_under_memtrack_run(name, commands, fault):
    """The command's status is passed on, and the verdict is exact."""
    path, status, plain, delay_s = commands[name]
    assert status == plain == COMMANDS[name][2]
    assert ended(path) == layout.ENDED
    check_whole(path)
    with RecordingReader(path) as reader:
        assert reader.verdict().kind == COMMANDS[name][3]
    assert delay_s <= 2.0
    fault(f"exit under memtrack run: {name}", delay_s=delay_s)


# -- finalising, again and again --------------------------------------------------------------------------------------

BUSY = """
from memtrack.testing import RecordingSink
class Busy(RecordingSink):
    def write(self, batch):
        for _ in range(50):
            time.sleep(0.002)
            super().write(batch)
number, begun = int(sys.argv[1]), 0.0
atexit.register(lambda: print(time.monotonic() - begun, flush=True))  # the first to register is the last to run
monitor = memtrack.start(sinks=[Busy()], interval=0.05, flush_interval=0.1)
monitor.wait_ready()
time.sleep(0.2 + number * 0.007)
begun = time.monotonic()
"""


def test_finalising_at_any_moment_of_a_delivery(tmp_path, fault):
    """Thirty exits, each at another moment of the relay's turn: no crash, no word on stderr."""
    children = [Child(tmp_path / str(number), BUSY, number) for number in range(30)]
    slowest = 0.0
    for child in children:
        slowest = max(slowest, *map(float, child.finish().split()))
        assert (child.process.returncode, child.err) == (0, "")
        assert ended(child.recording) == layout.ENDED
    assert slowest <= 2.0
    fault("Python finalises while the relay is in the middle of a request, 30 times", delay_s=slowest)


# -- notebooks ------------------------------------------------------------------------------------------------------


class Notebook:
    """A real kernel, as Jupyter starts it."""

    def __init__(self, folder, environment):
        client = pytest.importorskip("jupyter_client")
        pytest.importorskip("ipykernel")
        self._manager = client.KernelManager(kernel_name="python3")
        self._manager.start_kernel(cwd=str(folder), env=environment)
        self.client = self._connect()

    def _connect(self):
        client = self._manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        return client

    def run(self, code, wait=True):
        """Execute a cell; what it printed, or the name of the exception."""
        printed: list[str] = []

        def listen(message):
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        if not wait:
            return self.client.execute(code)
        reply = self.client.execute_interactive(code, output_hook=listen, timeout=30)["content"]
        return "".join(printed) if reply["status"] == "ok" else reply["ename"]

    def interrupt(self, message):
        """The stop button. Returns the reply to the cell that was running."""
        self._manager.interrupt_kernel()
        while True:
            reply = self.client.get_shell_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == message:
                return reply["content"]

    def restart(self, now):
        """The button of that name; ``now`` kills. Returns how long it took until the new one was ready, in seconds."""
        start = time.monotonic()
        self.client.stop_channels()
        self._manager.restart_kernel(now=now)
        self.client = self._connect()
        return time.monotonic() - start

    def close(self):
        self.client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()


CELL = """
import memtrack, time
monitor = memtrack.start(sinks=["jsonl"], interval=0.05, flush_interval=0.2)
monitor.wait_ready()
memtrack.step(3)
time.sleep(0.4)
print(monitor.path)
"""
LOOP = "for number in range(100, 2000):\n    memtrack.step(number)\n    time.sleep(0.01)"


@pytest.mark.filterwarnings("default")
def test_notebook(tmp_path, fault):
    """Interrupting a cell is the cell's affair; restarting the kernel, politely or not, ends one recording well."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTRACK_")}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "MEMTRACK_DIR": str(tmp_path / "recordings"),
        "MEMTRACK_SELECTIVE": "0",
    }
    books = [Notebook(tmp_path, {**environment, "MEMTRACK_DISABLE": off}) for off in ("", "1")]
    try:
        book, plain = books
        paths = [book.run(CELL).strip()]
        plain.run("import memtrack; memtrack.start()")

        message = book.run(LOOP, wait=False)
        time.sleep(0.6)
        reply = book.interrupt(message)
        assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
        with RecordingReader(paths[0]) as reader:
            seen = reader.head().windows
            until(lambda: reader.head().windows > seen + 5)
            assert 100 < reader.place().step < 2000
        assert book.run("memtrack.step(7)") == ""
        fault("a cell of a notebook is interrupted")

        delays = []
        for now in (False, True):
            delays.append(book.restart(now) - plain.restart(now))
            paths.append(book.run(CELL).strip())
        for path, kind in zip(paths, ("clean", "unknown_sigkill"), strict=False):
            assert ended(path) == layout.ENDED
            check_whole(path)
            check_delivered(path)
            with RecordingReader(path) as reader:
                assert reader.verdict().kind == kind
        assert max(delays) <= 2.0
        fault("the kernel of a notebook is restarted", delay_s=delays[0])
        fault("the kernel of a notebook is killed and restarted", delay_s=delays[1])
    finally:
        for one in books:
            one.close()
