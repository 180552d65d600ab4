"""Descriptors that somebody else in the process has closed, and put files of his own behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memtrack
from memtrack.errors import RecordingError
from memtrack.recording import layout
from memtrack.recording.descriptor import Descriptor, FileMap, StdioTaken, above_stdio
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader

ROOT = Path(memtrack.__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs descriptors that can be replaced")


@pytest.fixture
def stranger(tmp_path):
    """A file of somebody else's, and what puts it behind a number: ``stranger(fd)`` gives the number."""
    fd = os.open(tmp_path / "stranger", os.O_RDWR | os.O_CREAT)
    taken = []

    def take(number):
        os.dup2(fd, number, inheritable=False)
        taken.append(number)
        return number

    yield take
    for number in {*taken, fd}:
        os.close(number)


def test_a_descriptor_is_ours_until_somebody_takes_the_number(tmp_path, stranger):
    """Closed or replaced, it is not used any more; and what is behind it then is not closed."""
    mine = Descriptor(os.open(tmp_path / "mine", os.O_RDWR | os.O_CREAT))
    assert mine.is_ours
    fd = stranger(mine.fd)
    assert not mine.is_ours
    mine.close()
    assert os.fstat(fd).st_size == 0, "it has been closed"
    assert mine.fd == -1
    mine.close()


def test_a_descriptor_that_is_closed(tmp_path):
    """Closing what is ours closes it, once."""
    fd = os.open(tmp_path / "mine", os.O_RDWR | os.O_CREAT)
    mine = Descriptor(fd)
    mine.close()
    assert not mine.is_ours
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert not Descriptor(-1).is_ours
    assert not Descriptor(-1).is_as(Descriptor(-1))


def numbers_of(path):
    """The descriptors of a file that are open in this process."""
    folder = "/proc/self/fd"
    return {int(name) for name in os.listdir(folder) if os.path.realpath(f"{folder}/{name}") == os.path.realpath(path)}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("dropped", [False, True])
def test_a_map_whose_own_descriptor_was_taken(make_recording, stranger, dropped):
    """``mmap`` keeps a duplicate of the descriptor: closing the map, or dropping it, leaves the new owner alone."""
    path = make_recording()
    marks = MarkWriter(path)
    taken = [stranger(number) for number in numbers_of(path)]
    marks.step(4711)
    with RecordingReader(path) as reader:
        assert reader.place().step == 4711
    if not dropped:
        marks.close()
    del marks
    gc.collect()
    assert all(os.fstat(number).st_size == 0 for number in taken)
    assert sys.version_info >= (3, 13) or taken


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_map_that_is_ours_is_closed(make_recording):
    """Nothing is left of it."""
    path = make_recording()
    fd = os.open(path, os.O_RDWR)
    made = FileMap(fd, layout.METRICS)
    os.close(fd)
    made.view[layout.CONTROL] = 1
    made.close()
    assert numbers_of(path) == set()
    with open("/proc/self/maps", encoding="utf-8") as file:
        assert path not in file.read()


def test_a_reader_opens_its_file_again(make_recording, stranger, tmp_path):
    """Unless another one is in its place."""
    path = make_recording(program="mine")
    reader = RecordingReader(path)
    stranger(reader.fileno())
    assert reader.head().state == layout.STARTING
    number = stranger(reader.fileno())
    os.rename(path, tmp_path / "kept")
    Path(path).write_bytes((tmp_path / "kept").read_bytes())
    with pytest.raises(RecordingError, match="another file by now"):
        reader.head()
    reader.close()
    with pytest.raises(RecordingError, match="it has been closed"):
        reader.head()
    assert os.fstat(number).st_size == 0


STDIO = """
import os, sys
sys.path.insert(0, sys.argv[1])
from memtrack.recording.descriptor import StdioTaken, above_stdio
out = os.dup2(1, 50)
os.close(0), os.close(1), os.close(2)
with StdioTaken():
    inside = os.open("/dev/zero", os.O_RDONLY)
high = above_stdio(os.open("/dev/zero", os.O_RDONLY))
left = [fd for fd in range(4) if os.path.exists(f"/proc/self/fd/{fd}")]
os.write(50, f"{inside} {high} {left}".encode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_numbers_of_the_standard_streams_are_left_alone():
    """Where they are free, they stay free."""
    command = [sys.executable, "-I", "-S", "-c", STDIO, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "3 4 [3]"


def test_standard_streams_that_are_there():
    """Nothing is opened for good then, and a high descriptor stays what it is."""
    with StdioTaken() as taken:
        assert taken._fillers == []
    fd = os.dup2(1, 60)
    assert above_stdio(fd) == fd
    os.close(fd)
