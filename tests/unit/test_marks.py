"""Marks as the trainer writes them and as the agent reads them, in one mapped file."""

from __future__ import annotations

import itertools
import mmap
import random
import signal
import threading

import pytest

from memtrack.recording import layout
from memtrack.recording.marks import MarkWriter
from memtrack.recording.marks_view import MarkReader


@pytest.fixture
def marks(make_recording):
    """A writer, and a reader of the same file."""
    path = make_recording()
    writer = MarkWriter(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), layout.METRICS, access=mmap.ACCESS_READ) as part:
        reader = MarkReader(part)
        yield writer, reader
        reader.close()
    writer.close()


def path_of(reader):
    """The open phases by name, as the agent sees them."""
    phases = reader.place().phases
    return reader.name(phases[-1]) if phases else ""


def test_nothing_marked(marks):
    """Before the first mark there is no step, no epoch, no phase and no gauge."""
    _, reader = marks
    place = reader.place()
    assert (place.step, place.epoch, place.phases, place.phase) == (-1, -1, (), 0)
    assert reader.drain() == []
    assert list(reader.gauges()) == []


def test_step_and_epoch(marks):
    """Step and epoch stand as marked last, also going back, and negative or large ones."""
    writer, reader = marks
    for step in (0, 5, 3, 2**62, -7):
        writer.step(step)
        assert reader.place().step == step
    writer.epoch(2)
    assert (reader.place().step, reader.place().epoch) == (-7, 2)
    (mark,) = reader.drain()
    assert (mark.kind, mark.place.epoch, mark.place.step) == (layout.EPOCH, 2, -7)


@pytest.mark.parametrize("wrong", ["x", 3.5, None, 2**64])
def test_step_that_is_no_integer_changes_nothing(marks, wrong):
    """What cannot be packed raises, and steps, epochs and phases go on as if it had not been."""
    writer, reader = marks
    writer.step(1)
    writer.epoch(1)
    with pytest.raises(Exception, match=r"."):
        writer.step(wrong)
    with pytest.raises(Exception, match=r"."):
        writer.epoch(wrong)
    assert (reader.place().step, reader.place().epoch) == (1, 1)
    writer.begin("train")
    writer.step(2)
    writer.epoch(2)
    assert (reader.place().step, reader.place().epoch, path_of(reader)) == (2, 2, "train")


def test_mark_of_a_value_that_is_no_number(marks):
    """It raises, and the marks before and after stand."""
    writer, reader = marks
    writer.mark("first", 1.0)
    with pytest.raises(Exception, match=r"."):
        writer.mark("second", "much")
    writer.mark("third", 3.0)
    assert [(reader.name(mark.name), mark.value) for mark in reader.drain()] == [("first", 1.0), ("third", 3.0)]
    assert reader.overrun == 0


def test_name_that_cannot_be_encoded_hides_no_other(marks):
    """A name with a lone surrogate is refused, and names that come later are still found."""
    writer, reader = marks
    with pytest.raises(UnicodeEncodeError):
        writer.mark("\ud800")
    writer.mark("later")
    (mark,) = reader.drain()
    assert reader.name(mark.name) == "later"


def test_nested_phases(marks):
    """The same name inside another phase is another place; ids run from the outermost to the innermost."""
    writer, reader = marks
    train = writer.begin("train")
    forward = writer.begin("forward")
    place = reader.place()
    assert [reader.name(phase) for phase in place.phases] == ["train", "train/forward"]
    writer.end(forward)
    assert path_of(reader) == "train"
    writer.end(train)
    assert path_of(reader) == ""
    forward = writer.begin("forward")
    assert path_of(reader) == "forward"
    assert writer.begin("forward") is not forward
    assert path_of(reader) == "forward/forward"


def test_phase_keeps_its_id(marks):
    """Entering a phase again uses no second name."""
    writer, reader = marks
    ids = set()
    for _ in range(5):
        phase = writer.begin("load")
        ids.add(phase.id)
        writer.end(phase)
    assert len(ids) == 1
    assert [mark.kind for mark in reader.drain()] == [layout.PHASE_BEGIN, layout.PHASE_END] * 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("names", [("a", "b", "c"), ("a", "a", "b"), ("a", "a", "a")])
def test_threads_leave_in_any_order(marks, names, order):
    """A phase that was left is gone; the others are open, in the order of entering, however they are left."""
    writer, reader = marks
    opened = [writer.begin(name) for name in names]
    still = list(range(3))
    for which in order:
        writer.end(opened[which])
        still.remove(which)
        assert path_of(reader) == "/".join(names[at] for at in still)
    assert reader.place().phases == ()


def test_phases_of_many_threads(marks):
    """While threads enter and leave in any interleaving, exactly those that are in a phase are on the path."""
    writer, reader = marks
    rng = random.Random(7)
    opened, names = [], []
    for _ in range(3000):
        if opened and (len(opened) == layout.MAX_DEPTH or rng.random() < 0.5):
            at = rng.randrange(len(opened))
            writer.end(opened.pop(at))
            del names[at]
        else:
            name = rng.choice("ab")
            phase = writer.begin(name)
            if phase is not None:  # the table of names is full now and then
                opened.append(phase)
                names.append(name)
        if writer._words[layout.CONTROL // 8 + layout.MARKS_REFUSED] == 0:
            assert sorted(path_of(reader).replace("/", "")) == sorted(names)
    for phase in opened:
        writer.end(phase)
    assert reader.place().phases == ()


def test_leaving_what_is_not_open(marks, make_recording):
    """A phase that was left already, or was entered with another writer, is ignored."""
    writer, reader = marks
    train = writer.begin("train")
    other = MarkWriter(make_recording())
    foreign = other.begin("other")
    writer.end(foreign)
    assert path_of(reader) == "train"
    writer.end(train)
    writer.end(train)
    assert path_of(reader) == ""
    other.close()


def test_too_deep(marks):
    """The ninth level is refused and counted; the eight above it stand, and are left in order."""
    writer, reader = marks
    opened = [writer.begin(str(level)) for level in range(layout.MAX_DEPTH)]
    assert writer.begin("too deep") is None
    assert path_of(reader) == "0/1/2/3/4/5/6/7"
    assert reader.control(layout.MARKS_REFUSED) == 1
    for phase in reversed(opened):
        writer.end(phase)
    assert path_of(reader) == ""


def test_names_table_full(marks):
    """The 257th name is refused: phases of that name are not entered, marks are nameless, and both are counted."""
    writer, reader = marks
    for number in range(layout.NAME_COUNT):
        writer.mark(f"name {number}")
    marks_read = reader.drain()
    assert [reader.name(mark.name) for mark in marks_read] == [f"name {number}" for number in range(256)]
    assert reader.control(layout.MARKS_REFUSED) == 0
    writer.mark("one more", 5.0)
    (mark,) = reader.drain()
    assert (mark.name, mark.value) == (0, 5.0)
    assert writer.begin("yet another") is None
    assert writer.begin("name 0") is not None
    assert reader.control(layout.MARKS_REFUSED) >= 2


def test_long_names(marks):
    """A long name keeps its end; two that share it are two phases."""
    writer, reader = marks
    phase = writer.begin("x" * 100 + "the end")
    assert path_of(reader) == "x" * 56 + "the end"
    other = writer.begin("y" + "x" * 100 + "the end")
    assert other is not None
    assert other.id != phase.id


def test_gauges(marks):
    """Each gauge has its last value; one more than there is room for is refused and counted."""
    writer, reader = marks
    for number in range(layout.GAUGE_COUNT):
        writer.gauge(f"memory/test/g{number}_mib", number)
    writer.gauge("memory/test/g5_mib", 55.5)
    found = dict(reader.gauges())
    assert len(found) == layout.GAUGE_COUNT
    assert found["memory/test/g5_mib"] == 55.5
    assert found["memory/test/g60_mib"] == 60.0
    writer.gauge("memory/test/one_more_mib", 1.0)
    assert dict(reader.gauges()) == found
    assert reader.control(layout.MARKS_REFUSED) == 1


def test_gauge_in_the_making_hides_no_other(marks):
    """A gauge that the process died in setting is left out; those behind it are read."""
    writer, reader = marks
    for name in ("a", "b", "c"):
        writer.gauge(name, 1.0)
    writer._words[(layout.GAUGES + layout.LINE) // 8] = 0
    assert dict(reader.gauges()) == {"a": 1.0, "c": 1.0}


def test_gauge_of_a_value_that_is_no_number(marks):
    """It raises, and takes no place away from the others."""
    writer, reader = marks
    with pytest.raises(ValueError, match="could not convert"):
        writer.gauge("a", "much")
    writer.gauge("b", 2.0)
    assert dict(reader.gauges()) == {"b": 2.0}


def test_ring_overrun_is_counted(marks):
    """Marks that were overwritten before they were read are counted; the newest 512 are read, oldest first."""
    writer, reader = marks
    for number in range(700):
        writer.mark("m", number)
    assert [mark.value for mark in reader.drain()] == list(range(188, 700))
    assert reader.overrun == 188
    writer.mark("m", 700.0)
    assert [mark.value for mark in reader.drain()] == [700.0]
    assert reader.overrun == 188
    assert reader.written() == 701


def test_mark_in_the_making_is_passed_over(marks):
    """A mark that the process died in writing is left out; the place is the one before it."""
    writer, reader = marks
    writer.begin("train")
    writer.begin("forward")
    line = layout.MARKS + 2 * layout.LINE
    writer._words[line // 8] = 0
    assert path_of(reader) == "train"
    assert [reader.name(mark.name) for mark in reader.drain()] == ["train"]


def test_signal_handler_marks_while_the_main_thread_does(marks):
    """Marks from a signal handler that interrupts marking neither deadlock nor lose or double any other."""
    writer, reader = marks
    handled = 0

    def handler(number, frame):
        nonlocal handled
        handled += 1
        mine = handled  # a handler may be interrupted by the next one
        writer.step(10**6 + mine)
        writer.end(writer.begin("handler"))
        writer.mark("handled", mine)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
    try:
        values, number = [], 0
        while handled < 200:
            number += 1
            writer.step(number)
            writer.mark("main", number)
            found = reader.drain()
            values += [(reader.name(mark.name), mark.value) for mark in found if mark.kind == layout.MARK]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    values += [(reader.name(mark.name), mark.value) for mark in reader.drain() if mark.kind == layout.MARK]
    assert reader.overrun == 0
    assert [value for name, value in values if name == "main"] == list(range(1, number + 1))
    assert sorted(value for name, value in values if name == "handled") == list(range(1, handled + 1))
    assert reader.place().phases == ()


def test_threads_mark_at_once(marks):
    """Every mark of four threads arrives whole, and steps are never a mixture."""
    writer, reader = marks
    barrier = threading.Barrier(4)

    def work(thread):
        barrier.wait()
        for number in range(100):
            writer.step(thread * 1000 + number)
            writer.mark(f"thread {thread}", thread * 1000 + number)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = reader.drain()
    assert len(found) == 400
    for mark in found:
        assert reader.name(mark.name) == f"thread {int(mark.value) // 1000}"
    assert sorted(mark.value for mark in found) == sorted(t * 1000 + n for t in range(4) for n in range(100))


def test_requests(marks):
    """Requests to cut are numbered; a request to stop stands."""
    writer, reader = marks
    assert [writer.request_cut() for _ in range(3)] == [1, 2, 3]
    assert reader.control(layout.CUT) == 3
    assert reader.control(layout.STOP) == 0
    writer.request_stop()
    assert reader.control(layout.STOP) == 1


def test_agent_is_woken_by_phases(marks):
    """Entering and leaving a phase asks for a sample, but not more than every 20 ms."""
    writer, _ = marks
    woken = []
    writer.wake = woken.append
    for _ in range(100):
        writer.end(writer.begin("short"))
    assert 1 <= len(woken) <= 3
    writer.step(1)
    writer.mark("m")
    assert len(woken) <= 3
