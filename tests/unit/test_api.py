"""The functions that users call: nothing where nothing is monitoring, and never an exception."""

from __future__ import annotations

import os
import threading

import pytest

import memtrack
from memtrack import api
from memtrack.errors import MissingDependencyError, RecordingError, SettingsError
from memtrack.monitor import active
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.testing import RecordingSink


@pytest.fixture
def marked(make_recording):
    """Marks go to a recording that a reader follows, without an agent."""
    path = make_recording()
    active.marks = MarkWriter(path)
    with RecordingReader(path) as reader:
        yield reader
    marks, active.marks = active.marks, None
    if marks is not None:
        marks.close()


def phase_of(reader):
    phases = reader.place().phases
    return reader.names()[phases[-1]] if phases else ""


def test_nothing_happens_without_a_monitor():
    """Every function takes anything and does nothing."""
    for value in (1, 3.0, "x", None, object()):
        assert memtrack.step(value) is None
        assert memtrack.epoch(value) is None
        assert memtrack.mark(value, value) is None
        assert memtrack.gauge(value, value) is None
        with memtrack.phase(value):
            pass
    assert not [name for name in os.listdir(os.environ["MEMTRACK_DIR"]) if name.endswith(".mtk")]


def test_step_and_epoch(marked):
    """They arrive, and so do numbers that are integers in other clothes."""
    memtrack.step(5)
    memtrack.epoch(2)
    assert (marked.place().step, marked.place().epoch) == (5, 2)
    memtrack.step(3.0)
    memtrack.epoch(1.0)
    assert (marked.place().step, marked.place().epoch) == (3, 1)
    np = pytest.importorskip("numpy")
    memtrack.step(np.int64(8))
    assert marked.place().step == 8
    memtrack.step(np.float32(9))
    assert marked.place().step == 9


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("step", ("x",)), ("step", (None,)), ("step", (2**70,)), ("epoch", ("x",)), ("epoch", ([],)),
        ("mark", ("m", "much")), ("mark", ([],)), ("gauge", ("g", "much")), ("gauge", ([], 1.0)),
    ],
)  # fmt: skip
def test_nonsense_warns_once(marked, notices, name, arguments):
    """It is a warning that names the function, once; what is right before and after is taken."""
    memtrack.step(1)
    for _ in range(3):
        getattr(memtrack, name)(*arguments)
    assert len(notices) == 1
    assert f"memtrack.{name}() did not work" in notices[0]
    assert "Training goes on" in notices[0]
    memtrack.step(2)
    memtrack.epoch(1)
    with memtrack.phase("train"):
        assert (marked.place().step, phase_of(marked)) == (2, "train")


def test_phase_of_nonsense(marked, notices):
    """A phase whose name cannot be used is no phase, and the block runs."""
    ran = []
    with memtrack.phase([]):
        ran.append(1)
    assert ran
    assert len(notices) == 1
    assert phase_of(marked) == ""


def test_phases_nest(marked):
    """Inside train, forward is train/forward."""
    with memtrack.phase("train"):
        with memtrack.phase("forward"):
            assert phase_of(marked) == "train/forward"
        assert phase_of(marked) == "train"
    assert phase_of(marked) == ""


def test_exceptions_pass_through_a_phase(marked):
    """The exception of the block is the one that comes out, and the phase has ended."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, memtrack.phase("train"):
        raise error
    assert caught.value is error
    assert phase_of(marked) == ""


def test_phase_as_a_decorator(marked):
    """Each call is in the phase; name, result, arguments and recursion are those of the function."""

    @memtrack.phase("fit")
    def factorial(number: int, *, seen: list) -> int:
        """Multiplies."""
        seen.append(phase_of(marked))
        return 1 if number < 2 else number * factorial(number - 1, seen=seen)

    seen: list = []
    assert factorial(3, seen=seen) == 6
    assert seen == ["fit", "fit/fit", "fit/fit/fit"]
    assert (factorial.__name__, factorial.__doc__) == ("factorial", "Multiplies.")
    assert phase_of(marked) == ""


def test_one_phase_object_used_again(marked):
    """The same object may be entered inside itself, and by several threads at once."""
    train = memtrack.phase("train")
    with train, train:
        assert phase_of(marked) == "train/train"
    assert phase_of(marked) == ""
    inside, leave = threading.Barrier(5), threading.Event()

    def work():
        with train:
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert phase_of(marked) == "train/train/train/train"
    leave.set()
    for thread in threads:
        thread.join()
    assert phase_of(marked) == ""


def test_monitor_ends_inside_a_phase(marked, make_recording):
    """A phase may outlive the monitor, or begin before it: it is then no phase, and later ones are right."""
    train = memtrack.phase("train")
    with train:
        first, active.marks = active.marks, None
    path = make_recording()
    with memtrack.phase("load"):
        active.marks = MarkWriter(path)
    with RecordingReader(path) as reader:
        with train:
            assert phase_of(reader) == "train"
        assert phase_of(reader) == ""
    active.marks.close()
    active.marks = first


def test_too_deep_is_no_error(marked):
    """More than eight levels are not told apart, and the blocks run."""
    ran = []

    def level(number):
        if number < 12:
            with memtrack.phase(str(number)):
                level(number + 1)
        ran.append(number)

    level(0)
    assert len(ran) == 13
    assert phase_of(marked) == ""


def test_marks_and_gauges(marked):
    """Named marks carry their value."""
    memtrack.mark("checkpoint", 3)
    memtrack.mark("saved")
    names = marked.names()
    assert [(names[mark.name], mark.value) for mark in marked.marks()] == [("checkpoint", 3.0), ("saved", 0.0)]
    memtrack.gauge("memory/cache/used_mib", 5)
    assert "memory/cache/used_mib" in marked.names()


# -- start ----------------------------------------------------------------------------------------------------------


def test_disabled(monkeypatch, tmp_path):
    """With MEMTRACK_DISABLE nothing is started, nothing is imported for sinks, and the monitor does nothing."""
    monkeypatch.setenv("MEMTRACK_DISABLE", "1")
    sink = RecordingSink()
    with memtrack.start(sinks=[sink, "mlflow"], interval=0.5) as monitor:
        memtrack.step(1)
        assert monitor.attach(sink).detach() is True
        assert monitor.flush() is True
        assert monitor.wait_ready() is True
        assert "nothing was sampled" in str(monitor.summary())
    monitor.stop()
    assert active.monitor is None
    assert "disabled" in repr(monitor)
    assert os.listdir(tmp_path) == []
    assert memtrack.autolog().flush() is True
    assert (sink.attempts, sink.closed) == (0, 0)


def test_disabled_still_checks_settings(monkeypatch):
    """A wrong setting is an error all the same, so that it does not wait for the day that memtrack is switched on."""
    monkeypatch.setenv("MEMTRACK_DISABLE", "1")
    with pytest.raises(SettingsError):
        memtrack.start(interval=-1)


@pytest.mark.parametrize("sinks", [5, [5], [None], [object()], [RecordingSink(), 3]])
def test_sinks_that_are_none(sinks, tmp_path):
    """What is neither a name nor a sink is refused before anything was started."""
    with pytest.raises(SettingsError, match="sinks="):
        memtrack.start(sinks=sinks)
    assert active.monitor is None
    assert os.listdir(tmp_path) == []


def test_unknown_sink(tmp_path):
    """An unknown name is an error that lists the known ones; nothing was started."""
    with pytest.raises(SettingsError, match=r"sinks='mlfow': no such sink\. There are: comet, jsonl, mlflow, wandb"):
        memtrack.start(sinks=["mlfow"])
    assert os.listdir(tmp_path) == []


def test_sink_that_cannot_be_made(monkeypatch, tmp_path):
    """If the sink's constructor fails, the agent is stopped, and no recording is left."""
    from memtrack import registry

    monkeypatch.setitem(registry.SINKS, "broken", ("memtrack.errors:MissingDependencyError", ""))
    with pytest.raises(TypeError):
        memtrack.start(sinks=["broken"])
    assert active.monitor is None
    assert [name for name in os.listdir(tmp_path) if name.endswith(".mtk")] == []


def test_open_recording(make_recording, tmp_path):
    """It opens a recording by its path, and says what is wrong with one that is not there."""
    with memtrack.open_recording(make_recording()) as recording:
        assert "0 windows" in repr(recording)
    with pytest.raises(RecordingError, match=r"nothing\.mtk"):
        memtrack.open_recording(str(tmp_path / "nothing.mtk"))


def test_missing_dependency_names_the_command():
    """The message ends with what to type."""
    assert str(MissingDependencyError("x", "data")).endswith("pip install 'memtrack[data]'")


def test_every_function_is_documented():
    """Each public function says what it does."""
    for name in ("start", "step", "epoch", "mark", "gauge", "phase", "open_recording"):
        assert getattr(api, name).__doc__
