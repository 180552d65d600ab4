"""The monitor from the outside: starting, stopping, and never in the way of the training."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest

import memtrack
from memtrack import metrics
from memtrack.errors import MonitorError, RejectedError
from memtrack.monitor import Monitor, active
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from memtrack.testing import RecordingSink


class HangingSink(RecordingSink):
    """A tracker that takes the connection and never answers."""

    def write(self, batch):
        time.sleep(3600)

    finish = write


def threads():
    """The threads of this process, as the kernel counts them."""
    return sorted(os.listdir("/proc/self/task"))


# -- starting and stopping ------------------------------------------------------------------------------------------


def test_start_and_stop():
    """A monitor runs until it is stopped; stopping again does nothing."""
    monitor = memtrack.start(interval=0.1)
    assert active.monitor is monitor
    assert monitor.wait_ready()
    assert "running" in repr(monitor)
    memtrack.step(1)
    time.sleep(0.25)
    monitor.stop()
    monitor.stop()
    assert "stopped" in repr(monitor)
    assert active.monitor is active.marks is None
    memtrack.step(2)
    with memtrack.open_recording(monitor.path) as recording:
        assert recording.head().state == layout.STOPPED
        assert recording.place().step == 1
        assert 2 <= len(list(recording.windows())) <= 5
        assert [event.kind for event in recording.events()] == ["start", "stop"]


def test_start_inside_start(tmp_path):
    """A second monitor for the same process is a MonitorError that says what to do; the first goes on."""
    with memtrack.start() as monitor:
        with pytest.raises(MonitorError, match=r"being monitored already.*autolog"):
            memtrack.start()
        assert active.monitor is monitor
        assert len(list(tmp_path.glob("*.mtk"))) == 1
    with memtrack.start():
        pass


def test_monitors_one_after_the_other(tmp_path, tools):
    """Ten in a row make ten recordings, and leave no descriptor, no map and no thread."""
    memtrack.start().stop()
    gc.collect()
    before, threads_before = len(os.listdir("/proc/self/fd")), threads()
    for _ in range(10):
        sink = RecordingSink()
        with memtrack.start(sinks=[sink], interval=0.05) as monitor:
            monitor.wait_ready()
        assert sink.figures is not None
    del monitor
    gc.collect()
    tools.wait_until(lambda: threads() == threads_before, 1.0)
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps", encoding="utf-8") as file:
        # of these: a test before may have left one on purpose
        assert str(tmp_path) not in file.read()
    assert len(list(tmp_path.glob("*.mtk"))) == 11


def test_stopped_monitor():
    """It says what it has found, feeds nobody, and raises only where a sink would be lost."""
    with memtrack.start(interval=0.1) as monitor:
        monitor.wait_ready()
    assert monitor.summary().figures.peak_rss_mib > 1
    assert monitor.flush() is True
    with pytest.raises(MonitorError, match="stopped"):
        monitor.attach(RecordingSink())


def test_no_thread_without_a_sink():
    """Without a sink to feed, memtrack has no thread in this process, in Python's eyes or the kernel's."""
    before = threads(), threading.enumerate()
    with memtrack.start() as monitor:
        monitor.wait_ready()
        memtrack.step(1)
        assert (threads(), threading.enumerate()) == before
        monitor.flush()
        monitor.summary()
        assert (threads(), threading.enumerate()) == before


def test_one_thread_for_all_sinks(tools):
    """With sinks it has one, however many there are, and it is gone afterwards."""
    before = threads()
    with memtrack.start(sinks=[RecordingSink("a"), RecordingSink("b")]):
        assert len(threads()) == len(before) + 1
    # the kernel takes a moment longer than join()
    tools.wait_until(lambda: threads() == before, 1.0)


def test_monitor_of_another_process(run_child):
    """A process that knows nothing of memtrack is watched until it ends."""
    from memtrack.config import resolve

    child = run_child("sys.stdin.readline()")
    monitor = Monitor(resolve({"interval": 0.1}), pid=child.pid)
    assert monitor.wait_ready()
    assert active.monitor is None
    time.sleep(0.3)
    child.communicate("\n", timeout=10)
    with RecordingReader(monitor.path) as reader:
        deadline = time.monotonic() + 5
        while reader.head().state != layout.ENDED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reader.head().state == layout.ENDED
        assert len(list(reader.windows())) >= 2
    monitor.stop()
    with pytest.raises(MonitorError, match=f"no process {child.pid}"):
        Monitor(resolve({}), pid=child.pid)


# -- what is recorded -----------------------------------------------------------------------------------------------


def test_summary():
    """The summary names the peak, when, in which phase and at which step it stood, and what memtrack cost."""
    with memtrack.start(interval=0.1) as monitor:
        monitor.wait_ready()
        memtrack.epoch(3)
        with memtrack.phase("load"):
            time.sleep(0.3)
        with memtrack.phase("train"):
            memtrack.step(17)
            held = b"x" * (200 << 20)
            time.sleep(0.5)
            del held
            time.sleep(0.3)
        began = time.time() - 0.8
    summary = monitor.summary()
    figures = summary.figures
    assert figures.peak_rss_mib > 200
    assert figures.peak_label in ("exact", "sampled")
    assert (figures.peak_phase, figures.peak_step, figures.peak_epoch) == ("train", 17, 3)
    assert began - 0.4 <= figures.peak_wall_s <= began + 0.8
    assert figures.limit_mib > 0
    assert figures.limit_source
    assert 0 < figures.headroom_min_pct < 100
    assert 1.0 <= figures.seconds <= 2.5
    phases = {phase.name: phase for phase in summary.phases}
    assert phases["train"].peak_rss_mib == figures.peak_rss_mib
    assert phases["load"].peak_rss_mib < figures.peak_rss_mib - 150 or phases["load"].peak_label == "bound"
    text = str(summary)
    for word in ("peak", "train", "step 17", "epoch 3", "headroom", "agent"):
        assert word in text, text


def test_summary_while_it_runs():
    """It can be asked for at any time, and takes in what has just happened."""
    with memtrack.start(interval=60) as monitor:
        monitor.wait_ready()
        held = b"x" * (100 << 20)
        began = time.monotonic()
        first = monitor.summary().figures
        assert time.monotonic() - began < 1.0
        assert first.peak_rss_mib > 100
        assert first.windows >= 1
        del held


def test_user_gauges_and_marks_are_recorded():
    """A gauge becomes a metric, a named mark an event with its step."""
    with memtrack.start(interval=0.2) as monitor:
        monitor.wait_ready()
        memtrack.step(4)
        memtrack.gauge("memory/cache/used_mib", 12.5)
        memtrack.mark("checkpoint", 2.0)
        time.sleep(1.3)
        memtrack.mark("last words", 3.0)
    with memtrack.open_recording(monitor.path) as recording:
        values = {
            row.cells["memory/cache/used_mib"].last for row in recording.windows() if "memory/cache/used_mib" in row
        }
        events = [(event.text, event.value, event.step) for event in recording.events() if event.kind == "mark"]
    assert values == {12.5}
    assert events == [("checkpoint", 2.0, 4), ("last words", 3.0, 4)]


# -- sinks ----------------------------------------------------------------------------------------------------------


def test_sink_gets_every_window_once():
    """Each window in order, none twice, and the figures at the end; then it is closed once."""
    sink = RecordingSink()
    with memtrack.start(sinks=[sink], interval=0.05, flush_interval=0.2) as monitor:
        monitor.wait_ready()
        time.sleep(1.0)
        assert monitor.flush()
        assert sink.windows
    numbers = [row.first for row in sink.windows]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert len(numbers) >= 15
    assert (sink.closed, sink.figures.peak_rss_mib > 1) == (1, True)
    with memtrack.open_recording(monitor.path) as recording:
        assert {feed.key: feed.next for feed in recording.feeds()}["recording"] == numbers[-1] + 1
        assert {point.name for point in sink.points} >= {metrics.RSS, metrics.peak_name(metrics.RSS)}


def test_sink_that_fails_gets_it_later(notices):
    """Windows wait in the recording while a tracker is away, and arrive when it is back; that is said once."""
    sink = RecordingSink()
    sink.fail(2)
    with memtrack.start(sinks=[sink], interval=0.05, flush_interval=0.1) as monitor:
        monitor.wait_ready()
        deadline = time.monotonic() + 15
        while not sink.windows and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sink.windows
    numbers = [row.first for row in sink.windows]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert len(notices) == 1
    assert "wait in the recording" in notices[0]


class Picky(RecordingSink):
    """Refuses whatever has window 3 in it."""

    def write(self, batch):
        if any(row.first == 3 for row in batch.windows):
            raise RejectedError("not that one")
        super().write(batch)


def test_sink_that_refuses_loses_only_that_window(notices):
    """What a tracker refuses for good is counted; the others of its batch arrive, and what comes later."""
    sink = Picky()
    with memtrack.start(sinks=[sink], interval=0.05, flush_interval=0.4) as monitor:
        monitor.wait_ready()
        time.sleep(0.8)
    numbers = [row.first for row in sink.windows]
    assert len(numbers) >= 8
    assert numbers == [number for number in range(numbers[0], numbers[-1] + 1) if number != 3]
    assert sink.figures.dropped == 1
    assert len(notices) == 1
    assert "refused 1 windows" in notices[0]


class Odd(RecordingSink):
    """A sink with bugs of its own."""

    def write(self, batch):
        raise ZeroDivisionError("a bug in a sink")

    def close(self):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    "sink", [Odd(), type("Refuses", (RecordingSink,), {"finish": lambda self, figures: refuse()})()]
)
def test_bugs_of_a_sink_hurt_nobody(notices, sink):
    """Whatever a sink raises, other sinks get their windows, and stopping is quick and quiet."""
    good = RecordingSink("good")
    with memtrack.start(sinks=[sink, good], interval=0.05, flush_interval=0.1) as monitor:
        monitor.wait_ready()
        time.sleep(0.4)
        began = time.monotonic()
    assert time.monotonic() - began <= 2.0
    assert good.figures is not None
    assert notices


def refuse():
    raise RejectedError("no figures, thank you")


class Timed(RecordingSink):
    """Knows when it was finished."""

    def finish(self, figures):
        super().finish(figures)
        self.finished = time.monotonic()


def test_a_sink_that_fails_takes_no_time_of_the_others(notices):
    """The end of all is told at once: while one is tried again, nobody waits behind it, who would get nothing then."""
    failing, good = RecordingSink("failing"), Timed("good")
    with memtrack.start(sinks=[failing, good], interval=0.05, flush_interval=60.0) as monitor:
        monitor.wait_ready()
        time.sleep(0.2)
        failing.fail(9, retry_after_s=1.2)
        began = time.monotonic()
    assert good.finished - began < 1.0
    assert notices


def test_stop_with_a_sink_that_hangs(notices, fault):
    """A tracker that never answers delays the end by two seconds at the most."""
    memtrack.start(sinks=[HangingSink("hangs")], interval=0.05, flush_interval=0.1)
    time.sleep(0.5)
    began = time.monotonic()
    active.monitor.stop()
    took = time.monotonic() - began
    assert took <= 2.0
    fault("stop() while a sink hangs", "nothing: what the sink has not got waits in the recording", took)


def test_exit_with_a_sink_that_hangs(run_child):
    """As does the end of the process, though nobody stopped the monitor."""
    child = run_child("""
import time, memtrack
from memtrack.testing import RecordingSink

class HangingSink(RecordingSink):
    def write(self, batch):
        time.sleep(3600)
    finish = write

sinks = [HangingSink(f"hangs {number}") for number in range(3)]
monitor = memtrack.start(sinks=sinks, interval=0.05, flush_interval=0.1)
monitor.wait_ready()
time.sleep(0.5)
print(time.monotonic(), flush=True)
""")
    ended = float(child.stdout.readline())
    child.wait(timeout=30)
    assert child.returncode == 0
    assert time.monotonic() - ended <= 2.0 + 0.15, "0.15 s for the interpreter itself"


# -- the training goes its own way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_exceptions_of_the_training_pass_through(error):
    """What the training raises inside the monitor's block, a phase and a decorated function is what comes out."""

    @memtrack.phase("inner")
    def work():
        raise error

    with pytest.raises(type(error)) as caught, memtrack.start() as monitor, memtrack.phase("outer"):
        work()
    assert caught.value is error
    assert active.monitor is None
    with RecordingReader(monitor.path) as reader:
        assert reader.head().state == layout.STOPPED


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("sys.exit(5)", 5, ""),
        ("os._exit(6)", 6, ""),
        ("raise KeyError('mine')", 1, "KeyError: 'mine'"),
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("os.kill(os.getpid(), 15)", -15, ""),
        ("os.abort()", -6, ""),
        ("pass", 0, ""),
    ],
)
@pytest.mark.parametrize("sinks", ["[]", "[RecordingSink()]"])
def test_exit_status(run_child, ending, status, said, sinks):
    """However the program ends, its exit status and what it prints are those it has without memtrack."""
    child = run_child(
        f"""
import os, memtrack
from memtrack.testing import RecordingSink
monitor = memtrack.start(sinks={sinks}, interval=0.1)
monitor.wait_ready()
{ending}
""",
        stderr=-1,
    )
    began = time.monotonic()
    out, err = child.communicate(timeout=20)
    assert time.monotonic() - began < 4
    assert child.returncode == status
    assert out == ""
    assert err.strip().splitlines()[-1:] == ([said] if said else [])


def test_ctrl_c(run_child, tools):
    """Ctrl-C, which reaches the whole group, is the training's KeyboardInterrupt, once; the recording ends well."""
    child = run_child(
        """
import time, memtrack
with memtrack.start(interval=0.1) as monitor:
    monitor.wait_ready()
    print(monitor.path, flush=True)
    try:
        while True:
            memtrack.step(1)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
print("done")
""",
        start_new_session=True,
    )
    path = child.stdout.readline().strip()
    agent = tools.agent_of(path)
    time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    assert child.communicate(timeout=10)[0] == "interrupted\ndone\n"
    tools.wait_until(lambda: tools.is_gone(agent))
    with RecordingReader(path) as reader:
        assert reader.head().state == layout.STOPPED


def test_threads_of_the_training_may_mark_while_it_stops():
    """Stopping while other threads mark raises nothing in them."""
    errors, stop = [], threading.Event()

    def work():
        try:
            while not stop.is_set():
                memtrack.step(1)
                with memtrack.phase("p"):
                    memtrack.mark("m")
        except BaseException as exc:
            errors.append(exc)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(5):
        with memtrack.start() as monitor:
            monitor.wait_ready()
    stop.set()
    for worker in workers:
        worker.join()
    assert errors == []


# -- autolog --------------------------------------------------------------------------------------------------------


def test_autolog_twice(tmp_path):
    """The second call gives the monitor of the first."""
    first = memtrack.autolog(trackers=[])
    assert memtrack.autolog(trackers=[]) is first is active.monitor
    assert len(list(tmp_path.glob("*.mtk"))) == 1


def test_autolog_inside_start():
    """autolog() joins a monitor that is there already."""
    with memtrack.start() as monitor:
        assert memtrack.autolog(trackers=[]) is monitor


def test_autolog_disable():
    """It takes everything back; afterwards it can be switched on again."""
    first = memtrack.autolog(trackers=[])
    memtrack.autolog(disable=True)
    assert active.monitor is None
    assert "stopped" in repr(first)
    second = memtrack.autolog(trackers=[])
    assert second is not first
    assert second is active.monitor
    memtrack.autolog(disable=True)
    memtrack.autolog(disable=True)


def test_autolog_unknown_tracker(tmp_path):
    """A tracker that is asked for by name must be one that memtrack knows."""
    from memtrack.errors import SettingsError

    with pytest.raises(SettingsError, match="no such tracker"):
        memtrack.autolog(trackers=["nope"])
    assert active.monitor is None
    assert list(tmp_path.glob("*.mtk")) == []
