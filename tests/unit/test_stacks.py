"""Stacks: when one is taken, where it is kept, how lines are found, and what happens where memory may not be read."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

import pytest

from memtrack import metrics
from memtrack.agent import frames
from memtrack.agent.frames import StackReader, line_of, old_line
from memtrack.agent.stacks import OTHER_THREAD, StackWatch, shorten
from memtrack.agent.symbols import exported, find
from memtrack.analysis.stacks import headline, main_frames, peak_stack
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import Place

MS = 10**6
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
linux = pytest.mark.skipif(
    sys.platform != "linux" or VERSION not in frames.SHAPES, reason="needs Linux, a known Python"
)


class Reader:
    """Stands in for the memory of another process."""

    def __init__(self, error=None):
        self.asked = 0
        self.error = error
        self.closed = False
        self.frames = [("/x/lib/python3.11/site-packages/np/core.py", 5, "ones"), ("/job/train.py", 42, "grow")]

    def threads(self):
        if self.error is not None:
            raise self.error
        return [1, 2]

    def stack(self, thread):
        self.asked += thread == 1
        return self.frames if thread == 1 else [("/job/load.py", 7, "fetch")]

    def close(self):
        self.closed = True


@pytest.fixture
def path(make_recording):
    return make_recording()


@pytest.fixture
def writer(path):
    writer = RecordingWriter(path)
    yield writer
    writer.close()


def watch(writer, reader, mode="main"):
    return StackWatch(writer, os.getpid(), {"stacks": mode, "python": VERSION}, reader=reader)


def feed(watch, values, headroom_pct=100.0, step_ns=20 * MS, start_ns=10**9):
    for number, value in enumerate(values):
        latest = {metrics.RSS: float(value), metrics.CONTAINER_HEADROOM: headroom_pct}
        watch.look(start_ns + number * step_ns, latest, Place(number))


def test_nothing_is_taken_while_nothing_grows(writer):
    reader = Reader()
    feed(watch(writer, reader), [1000 + number % 30 for number in range(1000)])
    assert reader.asked == 0


def test_the_highest_stack_stands_close_to_the_highest_sample(writer, path):
    """However many there were, one is within 5 % and 32 MiB of the highest sample."""
    reader = Reader()
    feed(watch(writer, reader), range(100, 20000, 7))
    with RecordingReader(path) as recording:
        peak = peak_stack(recording)
        assert peak.rss_mib * 1.05 + 32 >= 19993
        assert len(recording.stacks()) == 8
    assert 20 <= reader.asked <= 100


def test_a_sawtooth_takes_no_more_than_its_first_rise(writer):
    reader = Reader()
    feed(watch(writer, reader), [500 + 400 * (number % 2) for number in range(2000)])
    assert reader.asked == 1


def test_the_highest_is_never_overwritten(writer, path):
    """Stacks that are taken because the limit is near come and go around it."""
    one = watch(writer, Reader())
    feed(one, [100, 900])
    for number in range(30):
        for headroom_pct in (90.0, 1.0):
            feed(one, [200 + number], headroom_pct, start_ns=10**10 + number * 10**10 + int(headroom_pct))
    with RecordingReader(path) as recording:
        assert len(recording.stacks()) == 8
        assert recording.stacks()[-1].number >= 30
        assert peak_stack(recording).rss_mib == 900


@pytest.mark.parametrize("headroom", [(50, 19, 9, 4, 1), (50, 21, 19, 21, 19, 9, 4, 1)])
def test_levels_of_headroom_count_once_until_rearmed(writer, headroom):
    reader, one = Reader(), watch(writer, Reader())
    one._reader = reader
    for number, value in enumerate(headroom):
        feed(one, [100], float(value), start_ns=(number + 1) * 60 * 10**9)
    assert reader.asked == 4


def test_headroom_that_is_gone_within_a_second_takes_some_but_not_many(writer):
    reader, one = Reader(), watch(writer, Reader())
    one._reader = reader
    for number in range(3000):
        headroom_pct = 40.0 if number % 2 else 30.0  # 10 % in 20 ms
        feed(one, [100], headroom_pct, start_ns=10**9 + number * 20 * MS)
    assert 40 <= reader.asked <= 51


@pytest.mark.parametrize(
    "error", [PermissionError("no"), OSError("gone"), ValueError("no Python"), ImportError("no file")]
)
def test_without_access_there_are_no_stacks_and_no_more_tries(writer, path, error):
    reader = Reader(error)
    feed(watch(writer, reader), range(100, 5000, 100))
    assert reader.closed
    with RecordingReader(path) as recording:
        assert recording.stacks() == []
        assert recording.events() == []


def test_off_never_opens_the_memory(writer, monkeypatch):
    monkeypatch.setattr(frames, "StackReader", lambda *given: pytest.fail("opened"))
    for fields in ({"stacks": "off", "python": VERSION}, {}):
        feed(StackWatch(writer, os.getpid(), fields), range(100, 5000, 100))


def test_all_threads_come_after_the_main_one(writer, path):
    feed(watch(writer, Reader(), "all"), [100, 900])
    with RecordingReader(path) as recording:
        (stack,) = recording.stacks()
    assert stack.text.splitlines()[2:] == [OTHER_THREAD, "/job/load.py:7 fetch"]
    assert main_frames(stack.text) == ["site-packages/np/core.py:5 ones", "/job/train.py:42 grow"]
    assert headline(stack.text) == "/job/train.py:42 grow, in np/core.py:5 ones"


def test_names_cannot_break_lines_or_encoding(writer, path):
    reader = Reader()
    reader.frames = [("a\nb\udc80.py", 1, "f\x1b[31m")]
    feed(watch(writer, reader), [100, 900])
    with RecordingReader(path) as recording:
        assert [stack.text for stack in recording.stacks()] == ["a?b?.py:1 f?[31m"]
        assert recording.events()[-1].kind == "new_peak"


def test_the_next_agent_goes_on_where_the_last_one_was(writer, path):
    """It numbers on, and does not overwrite the highest."""
    from memtrack.recording.layout import Head

    feed(watch(writer, Reader()), [100, 900])
    writer.publish(Head())
    reader = Reader()
    feed(watch(writer, reader), [100, 800, 970])
    assert reader.asked == 0
    feed(watch(writer, reader), [100, 2000])
    with RecordingReader(path) as recording:
        assert [(stack.number, stack.rss_mib) for stack in recording.stacks()] == [(0, 900.0), (1, 2000.0)]


def test_headline_of_nothing():
    assert headline("") == ""


def test_shorten():
    assert shorten("/job/src/train.py", "/job/") == "src/train.py"
    assert shorten("/v/lib/python3.11/site-packages/a/b.py", "/v/") == "site-packages/a/b.py"
    assert shorten("/usr/lib/python3.11/threading.py", "/job/") == "lib/python3.11/threading.py"
    assert shorten("<frozen runpy>", "/") == "<frozen runpy>"


SAMPLE = '''
def f(a,
      b):
    x = [i
         for i in range(3)]

    try:
        with open(a) as g:
            yield (g,

                   b)
    except (OSError,
            ValueError):
        return
''' + "\n" * 300 + "    y = 1\n"  # fmt: skip


def test_lines_are_those_of_the_interpreter():
    """Every instruction of functions with jumps backwards and far ahead, against what Python itself says."""
    module = compile(SAMPLE, "sample.py", "exec")
    functions = [const for const in module.co_consts if hasattr(const, "co_code")]
    functions += [test_levels_of_headroom_count_once_until_rearmed.__code__, StackReader._text.__code__]
    decode = old_line if sys.version_info < (3, 11) else line_of
    seen = 0
    for code in [module, *functions]:
        for start, end, line in code.co_lines():
            for position in range(start, end, 2):
                assert decode(code.co_linetable, code.co_firstlineno, position) == (line or 0), (code, position)
                seen += 1
    assert seen > 100


def test_damaged_line_tables_give_no_line():
    for decode in (line_of, old_line):
        for size in range(8):
            decode(b"\xff" * size, 1, 1000)
            decode(b"\x00" * size, 1, 1000)


@linux
def test_addresses_are_those_of_the_loader():
    found = find(os.getpid(), ("PyCode_Type", "PyUnicode_Type"))
    assert found == {"PyCode_Type": id(type(find.__code__)), "PyUnicode_Type": id(str)}
    assert found["PyUnicode_Type"] == ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "PyUnicode_Type"))
    assert find(os.getpid(), ("PyCode_Type", "no_such_symbol")) == {}


def test_files_that_are_no_programs(tmp_path):
    for content in (b"", b"\x7fELF", b"\x7fELF\x01\x01" + bytes(58), b"#!/bin/sh\n" * 20):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises((ValueError, struct.error)):
            exported(str(path), ("x",))


def test_unknown_versions_are_left_alone():
    with pytest.raises(ValueError, match=r"Python 3\.99 cannot be read"):
        StackReader(os.getpid(), "3.99")
