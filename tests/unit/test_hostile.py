"""Recordings and settings from strangers: one clear error or none, within bounds of time and memory, and no trace."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrack import config, metrics
from memtrack.analysis.summary import summarise
from memtrack.errors import RecordingError, RecordingFormatError, SettingsError
from memtrack.recording import layout
from memtrack.recording.layout import Head, Layout
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import PASSES, TRIES, RecordingReader
from memtrack.recording.writer import RecordingWriter, create
from memtrack.sampling.window import Cell, Place, Row
from tests.fuzz import splice
from tests.fuzz.seeds import FLOATS, NUMBERS, TEXTS, seeds
from tests.fuzz.splice import CUT, LATER, NAMES, PARTS, RENDER, REPLACE, Canvas, Change

CORPUS = sorted((Path(splice.__file__).parent / "corpus").iterdir())

MIB = 1 << 20


@pytest.fixture(scope="module")
def canvas(tmp_path_factory):
    """A whole recording to which changes are made."""
    made = Canvas(str(tmp_path_factory.mktemp("canvas")))
    yield made
    made.close()


# -- content --------------------------------------------------------------------------------------------------------


def test_undamaged(canvas):
    """What all changes begin with is whole, and read in full."""
    with RecordingReader(canvas.path) as reader:
        assert [(row.first, row.last) for row in reader.windows()] == [
            (0, 31), (32, 63), (64, 69), *((number, number) for number in range(70, 76)),
        ]  # fmt: skip
        verdict = reader.verdict()
        assert verdict is not None
        assert (len(reader.feeds()), len(reader.stacks()), verdict.kind) == (2, 3, "out_of_memory")
        assert set(reader.phases()) == {"", "train", "train/forward"}
        assert reader.farewell()["type"] == "MemoryError"
    canvas.try_input(bytes([RENDER]))


def test_changes_reach_the_content(canvas):
    """The checksums are put right: a change of each part is seen by the reader."""
    change = Change("verdict", 1, 0, b"kind=clean\nconfidence=none\nwall_ns=5\ntext=fine\n", REPLACE)
    again = next(iter(splice.changes(change.pack())))
    assert again == change
    for slot in (0, 1):
        canvas.apply(change._replace(slot=slot))
    canvas.apply(Change("window", 75 % Layout(layout.MIN_SIZE).ring, layout.LINE, struct.pack("<d", 5.0)))
    canvas.apply(Change("header", 0, 0, b"pid=77\n", REPLACE))
    canvas.apply(Change("event", 3, 40, b"another text"))
    with RecordingReader(canvas.path) as reader:
        verdict, row = reader.verdict(), reader.window(75)
        assert verdict is not None
        assert row is not None
        assert (verdict.text, row.cells[metrics.RSS].min, reader.fields) == ("fine", 5.0, {"pid": "77"})
        assert reader.events()[3].text.startswith("another text")
    canvas.restore()
    test_undamaged(canvas)


def test_restored(canvas):
    """Whatever was done to it, the recording is whole again afterwards, also if it was cut and grew again."""
    whole = Path(canvas.path).read_bytes()
    last = Change("window", splice.PAGES - 1, 0, b"x")
    for cut in (Change("header", 0, 100, b"", CUT), Change("header", 7, 0, b"", CUT)):
        canvas.try_input(cut.pack() + last.pack())
        canvas.try_input(Change("header", 0, 0, b"", LATER).pack() + cut.pack() + last.pack())
        assert Path(canvas.path).read_bytes() == whole


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(canvas, path):
    """What fuzzing has found worth keeping: all that reads recordings copes with it."""
    canvas.try_input(path.read_bytes())


def test_seeds(canvas):
    """What fuzzing begins with, likewise."""
    for seed in seeds():
        canvas.try_input(seed)


WORDS = [struct.pack("<Q", number) for number in NUMBERS] + [struct.pack("<d", value) for value in FLOATS]
CHANGES = st.builds(
    Change,
    st.sampled_from(NAMES),
    st.integers(0, 8) | st.integers(0, 255),
    st.integers(0, 64).map(lambda word: 8 * word) | st.integers(0, 4095),
    st.sampled_from([*WORDS, *TEXTS]) | st.binary(max_size=80),
    st.sampled_from([0, 0, 0, REPLACE, REPLACE, CUT, LATER]),
)


@given(st.lists(CHANGES, min_size=1, max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_changes(canvas, found, render):
    """Property: whatever stands in a recording, nothing but RecordingError comes of it, and nothing unprintable."""
    data = bytearray(b"".join(change.pack() for change in found))
    data[0] |= RENDER * render
    canvas.try_input(bytes(data))


@given(st.sampled_from(NAMES), st.binary(min_size=200, max_size=4096), st.data())
@settings(max_examples=60, deadline=None)
def test_random_bytes_behind_a_header(canvas, part, content, data):
    """Property: the same for parts that are noise from beginning to end."""
    for slot in range(min(PARTS[part].slots, 12)):
        size = min(PARTS[part].size, len(content))
        at = data.draw(st.integers(0, len(content) - size))
        canvas.apply(Change(part, slot, 0, content[at : at + size]))
    try:
        splice.read_everything(canvas.path)
        splice.export_everything(canvas.path)
    finally:
        canvas.restore()


HEADER_KEYS = ["size", "pid", "start_ticks", "wall_ns", "mono_ns", "interval_s", "keep", "keep_days", "program", "x"]


@given(st.dictionaries(st.sampled_from(HEADER_KEYS), st.text(max_size=30) | st.integers().map(str), max_size=10))
@settings(max_examples=150, deadline=None)
def test_any_header(canvas, fields):
    """Property: whatever the header says, it is an error of one printable line, or a recording that can be shown."""
    text = "".join(f"{key}={value}\n" for key, value in fields.items()).encode(errors="ignore")
    canvas.try_input(Change("header", 0, 0, text, REPLACE).pack())


@pytest.mark.parametrize("field", ["pid", "wall_ns", "mono_ns", "start_ticks", "keep"])
@pytest.mark.parametrize("value", ["-1", "9" * 25, "1e9", "nan", "", "x\x1b[31m", "٣"])
def test_header_numbers(canvas, field, value):
    """A number that is none is one clear error that names field, value and file."""
    canvas.apply(Change("header", 0, 0, f"{field}={value}\n".encode(), REPLACE))
    try:
        with pytest.raises(RecordingFormatError) as caught:
            RecordingReader(canvas.path)
    finally:
        canvas.restore()
    assert str(caught.value) == f"{canvas.path}: the header is damaged ({field}={layout.printable(value)})"


def test_names_that_a_terminal_would_obey(canvas, capsys):
    """Escapes, markup and line breaks in names and texts reach no terminal, no JSON, and no chart's key."""
    name = b"a\x1b]0;owned\x07[red]b\nc\xe2\x80\xaed"
    for slot, part in enumerate(("name", "metric", "event", "feed")):
        canvas.apply(Change(part, 0, 40 * (part == "event"), name, REPLACE * (slot < 2)))
    try:
        if splice.HAS_TERMINAL:
            splice.show_everything(canvas.path, canvas.folder)
        splice.export_everything(canvas.path)
        with RecordingReader(canvas.path) as reader:
            clean = "a?]0;owned?[red]b?c?d"
            assert (reader.names()[1], reader.metrics()[0]) == (clean, clean)
            assert clean in next(reader.windows())
            assert reader.events()[0].text == clean[:15]  # as long as the text that stood there
    finally:
        canvas.restore()


def test_phase_that_looks_like_mathematics(canvas, tmp_path):
    """A picture is drawn whatever phases and programs are called; once matplotlib tried to typeset ``$\\frac{$``."""
    pytest.importorskip("matplotlib")
    from memtrack.report import png
    from memtrack.report.data import collect

    for slot in (0, 1):
        canvas.apply(Change("name", slot, 0, b"$\\frac{$", REPLACE))
    text = b"program=$\\frac{$ <b>\npid=1\nwall_ns=5\nmono_ns=0\n"
    canvas.apply(Change("header", 0, 0, text, REPLACE))
    try:
        png.draw(collect(canvas.path), str(tmp_path / "out.png"))
    finally:
        canvas.restore()
    assert (tmp_path / "out.png").stat().st_size > 10_000


# -- files that are none ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_recording(tmp_path):
    """Makes something that is no recording: ``no_recording(kind)`` gives its path."""
    opened: list[socket.socket] = []

    def make(kind):
        path = tmp_path / f"{kind}.mtk"
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            opened.append(socket.socket(socket.AF_UNIX))
            opened[0].bind(str(path))
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "link to a device":
            path.symlink_to("/dev/zero")
        elif kind == "null":
            return f"{tmp_path}/null\0.mtk"
        return str(path)

    yield make
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("folder", "Is a directory"),
        ("pipe", "not a regular file"),
        ("socket", "not a regular file"),
        ("link to a device", "not a regular file"),
        ("loop", "Too many levels of symbolic links"),
        ("null", "embedded null"),
        ("missing", "No such file"),
    ],
)
def test_things_that_are_no_file(no_recording, kind, says):
    """Opening them neither waits nor does anything to them; the error names the path and what it is."""
    path = no_recording(kind)
    before, start = len(os.listdir("/proc/self/fd")), time.monotonic()
    with pytest.raises(RecordingError, match=says) as caught:
        RecordingReader(path)
    assert path.replace("\0", "\\x00") in str(caught.value)
    assert time.monotonic() - start < 2.0
    assert len(os.listdir("/proc/self/fd")) == before


def test_listing_a_folder_full_of_traps(no_recording, canvas, tmp_path):
    """A list of recordings says of each what is wrong with it, also where its name is no text and its date no date."""
    from memtrack.report.recordings import list_recordings

    for kind in ("folder", "pipe", "socket", "loop", "link to a device"):
        no_recording(kind)
    for name in (b"\xff\xfe.mtk", b"\x1b[2J.mtk", b"[bold].mtk", b"a\nb.mtk"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"MEMTRACK")
    odd = tmp_path / "odd date.mtk"
    odd.touch()
    with contextlib.suppress(OSError):  # not every file system has room for it
        os.utime(odd, (2**60, 2**60))
    listed = list_recordings(str(tmp_path))
    assert len(listed) == 10
    assert all(one.problem for one in listed)
    if not splice.HAS_TERMINAL:
        return
    from rich.console import Console

    from memtrack.report.terminal import listing

    with open(tmp_path / "out", "w", encoding="utf-8") as out:
        Console(file=out, width=200).print(listing(listed, str(tmp_path)))
    assert all(line.isprintable() for line in (tmp_path / "out").read_text().split("\n"))


# -- bounds ---------------------------------------------------------------------------------------------------------


def test_the_largest_recording():
    """What may be asked for can be read."""
    assert config.MAX_RECORDING_BYTES == layout.MAX_SIZE
    assert config.MIN_RECORDING_BYTES == layout.MIN_SIZE


@pytest.mark.parametrize("size", [layout.MAX_SIZE + 4096, 1 << 40])
def test_enormous_file(tmp_path, size):
    """A sparse file that takes no room on the disk would keep a reader busy for hours: it is refused."""
    path = tmp_path / "sparse.mtk"
    path.write_bytes(layout.pack_header({"size": str(size), "pid": "1"}))
    os.truncate(path, size)
    with pytest.raises(RecordingFormatError, match=f"recordings have {layout.MAX_SIZE} at the most"):
        RecordingReader(str(path))


class CountingReader(RecordingReader):
    """Counts how many pages are read."""

    reads = 0

    def _read(self, offset: int, size: int) -> bytes:
        self.reads += 1
        return super()._read(offset, size)


def full_of_gaps(path, size):
    """A recording of which every other page holds a window that begins far behind the one before."""
    create(path, size, {"size": str(size), "pid": "1", "wall_ns": "1", "mono_ns": "0"})
    where = Layout(size)
    with open(path, "r+b") as file:
        file.seek(layout.METRICS)
        file.write(layout.pack_name(metrics.RSS))
        newest = 10**6 * where.ring - 1
        for index in range(0, where.bins, 2):
            file.seek(where.bin_offset(index))
            file.write(layout.pack_row(_window(index * 1000, index * 1000 + 3), {metrics.RSS: 0}))
        for number in range(newest - where.ring + 1, newest + 1, 2):
            file.seek(where.ring_offset(number))
            file.write(layout.pack_row(_window(number, number), {metrics.RSS: 0}))
    writer, head = RecordingWriter(path), Head()
    writer.windows = newest
    writer.publish(head)
    writer.close()


def _window(first, last):
    row = Row(first, first)
    row.last, row.end_ns = last, last + 1
    row.cells[metrics.RSS] = Cell(1.0, first, Place(1, 1, ()))
    return row


@pytest.mark.parametrize("size", [layout.MIN_SIZE, 8 * MIB])
def test_work_is_bounded(tmp_path, size):
    """However the windows lie, each page is looked at a few times and no more: not once for each other page."""
    path = str(tmp_path / "gaps.mtk")
    full_of_gaps(path, size)
    with CountingReader(path) as reader:
        rows = list(reader.windows())
        assert rows
        assert reader.reads < 4 * (TRIES + 1) * size // layout.PAGE
        assert all(earlier.last < later.first for earlier, later in itertools.pairwise(rows))


def test_somebody_keeps_writing(tmp_path):
    """A recording whose windows always move on just before they are read does not keep a reader for ever."""
    path = str(tmp_path / "gaps.mtk")
    full_of_gaps(path, layout.MIN_SIZE)
    where, moves = Layout(layout.MIN_SIZE), 0
    with CountingReader(path) as reader, open(path, "r+b") as file:
        for row in reader.windows():
            moves += 1
            # what comes next in the history is a window later again, for ever
            for index in range(1, 4):
                file.seek(where.bin_offset(index))
                number = row.last + 2 * index
                file.write(layout.pack_row(_window(number, number), {metrics.RSS: 0}))
            file.flush()
        assert reader.reads < (PASSES + 2) * 4 * layout.MIN_SIZE // layout.PAGE
    assert moves < 10_000


def test_memory_is_bounded(tmp_path):
    """Beside the windows that it gives, a reader of 32 MiB of history holds less than 2 MiB: 1/16 of that."""
    path = str(tmp_path / "large.mtk")
    size = 32 * MIB
    full_of_gaps(path, size)
    tracemalloc.start()
    try:
        with RecordingReader(path) as reader:
            for _ in reader.windows():
                pass
            summarise(reader)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 16


def test_large_recording_is_read_in_seconds(tmp_path):
    """A quarter of the largest, with nothing in it, is looked through in a second; the largest in a few."""
    path, size = str(tmp_path / "sparse.mtk"), layout.MAX_SIZE // 4
    with open(path, "wb") as file:
        file.write(layout.pack_header({"size": str(size), "pid": "1"}))
        file.truncate(size)
    writer = RecordingWriter(path)
    writer.windows = 2**40
    writer.publish(Head())
    writer.close()
    before = resource.getrusage(resource.RUSAGE_SELF)
    with RecordingReader(path) as reader:
        assert list(reader.windows()) == []
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10.0


@pytest.mark.parametrize(
    "left", [0, 10, layout.HEAD + 3, layout.NAMES + 65, layout.EVENTS + 130, layout.WINDOWS + 5000]
)
def test_file_is_cut_while_it_is_read(canvas, left):
    """What was cut off is left out: nothing raises, whichever part is asked for next."""
    with RecordingReader(canvas.path) as reader:
        reading = reader.windows()
        assert next(reading).first == 0
        os.truncate(canvas.path, left)
        try:
            assert all(row.first <= row.last for row in reading)
            splice._read_parts(reader)
            summarise(reader)
        finally:
            canvas._is_cut = True
            canvas.restore()


def test_reading_leaves_no_trace(canvas):
    """Not a byte of the file changes, nor is anything beside it, whatever is read of it."""
    before, names = Path(canvas.path).read_bytes(), os.listdir(canvas.folder)
    splice.read_everything(canvas.path)
    splice.export_everything(canvas.path)
    if splice.HAS_TERMINAL:
        splice.show_everything(canvas.path, canvas.folder)
    assert Path(canvas.path).read_bytes() == before
    assert os.listdir(canvas.folder) == names


# -- settings -------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=30) | st.from_regex(r"\s*[-+]?[0-9.eE]{0,12}\s*(us|ms|s|min|h|KiB|MiB|GiB|MB|%)?\s*")
ANYTHING = TEXT | st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=5) | st.lists(TEXT)


@given(st.sampled_from(sorted(config._VARIABLES)), TEXT)
@settings(max_examples=300, deadline=None)
def test_any_variable(variable, text):
    """Property: a variable of any text is a setting that a child process takes over, or a SettingsError."""
    _resolve_or_refuse({}, {variable: text})


@given(st.dictionaries(st.sampled_from(sorted(config._ARGUMENTS)), ANYTHING, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_argument(arguments):
    """Property: and so is an argument of any type."""
    _resolve_or_refuse(arguments, {})


def _resolve_or_refuse(arguments, environ):
    try:
        found = config.resolve(arguments, environ)
    except SettingsError:
        return
    assert config.resolve({}, config.environment(found)) == found
    # as monitor.py writes them
    header = {
        "size": str(found.recording_bytes),
        "interval_s": repr(found.interval_s),
        "tick_s": repr(found.tick_s),
        "cpu_budget_pct": repr(found.cpu_budget_pct),
        "keep": str(found.keep),
        "keep_days": repr(found.keep_days),
    }
    assert layout.unpack_header(layout.pack_header(header), "x.mtk") == header


def test_marks_of_a_trainer_that_went_astray(make_recording):
    """The agent's view of the trainer's part copes with any content of it, too."""
    path = make_recording()
    marks, writer = MarkWriter(path), RecordingWriter(path)
    marks.begin("train")
    for word in NUMBERS:
        for at in range(layout.CONTROL, layout.NAMES, 8):
            marks._words[at // 8] = word
        writer.marks.drain(), writer.marks.place(), list(writer.marks.gauges())
        assert writer.marks.name(65535) == ""
    marks.close()
    writer.close()
