"""Forked and spawned children: they write nothing into their parent's recording, and hang on none of its locks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import memtrack
from memtrack import metrics
from memtrack.errors import MonitorError
from memtrack.monitor import active
from memtrack.recording.reader import RecordingReader
from memtrack.testing import RecordingSink

ROOT = Path(memtrack.__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def in_child(work, timeout_s=10.0):
    """Fork, run ``work`` in the child, and return its exit status: 0 if it returned true. A child that hangs fails."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(2)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def mark_everything():
    for step in range(1000, 1100):
        memtrack.step(step)
        memtrack.epoch(step)
        with memtrack.phase("child"):
            memtrack.mark("child", step)
            memtrack.gauge("memory/child/x_mib", step)
    return True


def test_child_writes_nothing_into_the_parents_slots():
    """Marks of a forked child are no-ops; the parent's recording has its own only."""
    with memtrack.start() as monitor, RecordingReader(monitor.path) as reader:
        memtrack.step(7)
        with memtrack.phase("parent"):
            assert in_child(mark_everything) == 0
            place = reader.place()
            assert (place.step, place.epoch) == (7, -1)
            assert "child" not in "".join(reader.names())
        memtrack.step(8)
        assert reader.place().step == 8


def test_child_leaves_the_parents_phase():
    """A child that leaves a block which its parent entered does not end the parent's phase."""
    with memtrack.start() as monitor, RecordingReader(monitor.path) as reader:
        outer = memtrack.phase("outer")
        outer.__enter__()
        assert in_child(lambda: outer.__exit__(None, None, None) is None) == 0
        assert [reader.names()[phase] for phase in reader.place().phases] == ["outer"]
        outer.__exit__(None, None, None)


def test_fork_while_the_lock_is_held(fault):
    """A child forked while another thread was marking does not wait for that thread, which it does not have."""
    with memtrack.start() as monitor:
        held, release = threading.Event(), threading.Event()

        def hold():
            with monitor._marks._lock:
                held.set()
                release.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        try:
            assert in_child(mark_everything) == 0
            assert in_child(lambda: monitor.flush() in (True, False)) == 0
            assert in_child(lambda: monitor.summary() is not None) == 0
            assert in_child(lambda: monitor.stop() is None) == 0
        finally:
            release.set()
            thread.join()
    fault("fork while another thread holds the lock of the marks")


def test_parents_monitor_in_the_child(tools):
    """It does nothing there: no sink is fed, attaching is refused, and the parent's agent goes on."""
    sink = RecordingSink()
    with memtrack.start(sinks=[sink], flush_interval=60) as monitor:
        assert monitor.wait_ready()

        def work():
            with pytest.raises(MonitorError):
                monitor.attach(RecordingSink("other"))
            monitor.stop()
            return sink.attempts == 0

        assert in_child(work) == 0
        agent = tools.agent_of(monitor.path)
        assert not tools.is_gone(agent)
        assert active.monitor is monitor
        assert monitor.flush()
        assert sink.windows


def test_child_starts_its_own_monitor(tmp_path, tools):
    """A forked child may be monitored itself: its recording has its own marks, and its agent ends with it."""
    with memtrack.start() as monitor:
        memtrack.step(1)

        def work():
            with memtrack.start(interval=0.05) as mine:
                mine.wait_ready()
                memtrack.step(4711)
                time.sleep(0.1)
            return mine.path != monitor.path

        assert in_child(work) == 0
        assert active.monitor is monitor
        memtrack.step(2)
        paths = [path for path in tmp_path.glob("*.mtk") if str(path) != monitor.path]
        assert len(paths) == 1
        with RecordingReader(str(paths[0])) as reader:
            assert reader.place().step == 4711
            assert int(reader.fields["pid"]) != os.getpid()
        with RecordingReader(monitor.path) as reader:
            assert reader.place().step == 2


def test_fork_with_a_relay_running(tools, fault):
    """With the relay's thread at work, a hundred forks do not hang, and the sink gets each window once."""
    sink = RecordingSink()
    with memtrack.start(sinks=[sink], interval=0.05, flush_interval=0.1):
        for _ in range(100):
            assert in_child(mark_everything) == 0
    numbers = [row.first for row in sink.windows]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert sink.figures is not None
    fault("a hundred forks while the relay delivers")


def _work(inbox, outbox):
    held = bytearray(30 << 20)
    for at in range(0, len(held), 4096):
        held[at] = 1
    outbox.put(os.getpid())
    mark_everything()
    inbox.get()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing(method, tools, fault):
    """Workers as a DataLoader starts them are seen as workers, however they are started."""
    context = multiprocessing.get_context(method)
    with memtrack.start(interval=0.2) as monitor, RecordingReader(monitor.path) as reader:
        assert monitor.wait_ready()
        inbox, outbox = context.Queue(), context.Queue()
        workers = [context.Process(target=_work, args=(inbox, outbox), daemon=True) for _ in range(2)]
        for worker in workers:
            worker.start()
        pids = {outbox.get(timeout=30) for _ in workers}
        assert len(pids) == 2

        def large():
            rows = list(reader.windows())
            cells = rows[-1].cells if rows else {}
            found = {name: cell.last for name, cell in cells.items() if name.startswith("memory/worker/")}
            return found if len([mib for mib in found.values() if mib > 30]) >= 2 else None

        found = tools.wait_until(large, 15.0, 0.1)
        assert metrics.WORKER_RSS.format(0) in found
        assert reader.place().step == -1
        for _ in workers:
            inbox.put(None)
        for worker in workers:
            worker.join(20)
        inbox.close(), outbox.close()
    if method == "forkserver":
        from multiprocessing import forkserver

        forkserver._forkserver._stop()
    fault(f"workers of multiprocessing, by {method}")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_that_runs_the_main_script_again(tmp_path, method, fault):
    """A script that calls autolog() without a guard, and has workers, is monitored once."""
    script = tmp_path / "train.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import multiprocessing
import memtrack

monitor = memtrack.autolog(trackers=[])

def work(number):
    memtrack.step(1000 + number)
    return type(monitor).__name__

if __name__ == "__main__":
    memtrack.step(5)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        print(pool.map(work, range(4)))
    print(type(monitor).__name__)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    there = "Monitor" if method == "fork" else "DisabledMonitor"
    assert done.stdout == f"{[there] * 4}\nMonitor\n"
    (path,) = tmp_path.glob("*.mtk")
    with RecordingReader(str(path)) as reader:
        assert reader.place().step == 5
    fault(f"multiprocessing.Pool in a script without a guard, by {method}")
