"""Recordings made of a few bytes: changes to a small whole recording, with the checksums put right afterwards.

A recording has 1 MiB at least, and nearly all that random bytes could do to it is to break a checksum. So an input is a
list of changes, each of them a header of six bytes and what is written::

    part, slot (one byte each) | place in the record, length (two bytes each) | the bytes

``part`` numbers PARTS. With ``REPLACE`` added the record is the given text and nothing else; ``CUT`` truncates the file
instead, ``LATER`` holds back all that follows until the first window has been read; ``RENDER`` in the first change asks
for the terminal, too, which takes most of the time. After each change the record is sealed: its checksum is made to
fit, so that readers look at the content.
"""

from __future__ import annotations

import io
import json
import os
import struct
from binascii import crc32
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from memtrack import metrics
from memtrack.analysis.summary import figures_of
from memtrack.errors import RecordingError
from memtrack.recording import layout, records
from memtrack.recording.layout import Head, Layout
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Feed, Stack, Verdict
from memtrack.recording.tables import Recording
from memtrack.recording.writer import RecordingWriter, create
from memtrack.report import json_
from memtrack.report.data import collect
from memtrack.report.recordings import list_recordings
from memtrack.sampling.window import EXACT, Cell, Place, Row
from memtrack.sinks.base import Batch
from memtrack.sinks.feeds import FeedWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]

HAS_TERMINAL = find_spec("rich") is not None
"""Whether there is what prints reports; without it, they are not tried."""

SECOND_NS = 10**9
WALL_NS = 1_700_000_000 * SECOND_NS
WINDOWS = 76
PAGES = (layout.MIN_SIZE - layout.WINDOWS) // layout.PAGE


class Part(NamedTuple):
    """A kind of record: where the first lies, how long one is, how many there are."""

    start: int
    size: int
    slots: int


PARTS = {
    "header": Part(0, layout.PAGE, 1),
    "head": Part(layout.HEAD, layout.HEAD_SLOT, 2),
    "pulse": Part(layout.PULSE, layout.LINE, 2),
    "farewell": Part(layout.FAREWELL, layout.FAREWELL_SIZE, 1),
    "control": Part(layout.CONTROL, layout.LINE, 2 + layout.GAUGE_COUNT),
    "mark": Part(layout.MARKS, layout.LINE, layout.MARK_COUNT),
    "name": Part(layout.NAMES, layout.LINE, layout.NAME_COUNT),
    "metric": Part(layout.METRICS, layout.LINE, layout.NAME_COUNT),
    "event": Part(layout.EVENTS, layout.EVENT_SIZE, layout.EVENT_COUNT),
    "feed": Part(layout.FEEDS, layout.FEED_SIZE, 2 * layout.FEED_COUNT),
    "verdict": Part(layout.VERDICT, layout.PAGE, 2),
    "stack": Part(layout.STACKS, layout.PAGE, layout.STACK_COUNT),
    "phase": Part(layout.PHASES, layout.PAGE, 2 * layout.PHASE_COUNT),
    "window": Part(layout.WINDOWS, layout.PAGE, PAGES),
}
NAMES = list(PARTS)
REPLACE, CUT, LATER = 16, 32, 48
RENDER = 64

_CHANGE = struct.Struct("<BBHH")
_STACK_HEAD = 52
_TEXT_HEAD = 10
_HEADER_HEAD = 20


class Change(NamedTuple):
    """One change; ``part`` is a name of PARTS, with ``REPLACE`` as ``kind`` the text is all of the record."""

    part: str
    slot: int
    at: int
    content: bytes
    kind: int = 0

    def pack(self) -> bytes:
        """As a part of an input."""
        number = NAMES.index(self.part) + self.kind
        return _CHANGE.pack(number, self.slot, self.at, len(self.content)) + self.content


def changes(data: bytes) -> Iterator[Change]:
    """The changes of an input, whatever it is."""
    at = 0
    while at + _CHANGE.size <= len(data):
        number, slot, place, length = _CHANGE.unpack_from(data, at)
        at += _CHANGE.size
        content = data[at : at + length]
        at += len(content)
        yield Change(NAMES[number % 16 % len(NAMES)], slot, place, content, number & 48)


def seal(part: str, record: bytearray) -> None:
    """Make the checksum of a record fit its content."""
    if part == "header":
        record[:12] = layout.MAGIC + layout.VERSION.to_bytes(4, "little")
        length = min(int.from_bytes(record[12:16], "little"), len(record) - _HEADER_HEAD)
        record[12:16] = length.to_bytes(4, "little")
        record[16:20] = _crc(record[_HEADER_HEAD : _HEADER_HEAD + length])
    elif part == "event":
        record[:4] = _crc(record[4:])
    elif part in ("farewell", "feed", "verdict"):
        length = min(int.from_bytes(record[8:10], "little"), len(record) - _TEXT_HEAD)
        record[8:10] = length.to_bytes(2, "little")
        record[:4] = _crc(record[4 : _TEXT_HEAD + length])
    elif part == "stack":
        length = min(int.from_bytes(record[_STACK_HEAD - 2 : _STACK_HEAD], "little"), len(record) - _STACK_HEAD)
        record[_STACK_HEAD - 2 : _STACK_HEAD] = length.to_bytes(2, "little")
        record[:4] = _crc(record[4 : _STACK_HEAD + length])
    elif part in ("phase", "window"):
        count = min(int.from_bytes(record[4:6], "little"), layout.MAX_CELLS)
        record[4:6] = count.to_bytes(2, "little")
        record[:4] = _crc(record[4 : layout.LINE * (1 + count)])


def _crc(content: bytes | bytearray) -> bytes:
    return crc32(content).to_bytes(4, "little")


def _replace(part: str, record: bytearray, text: bytes) -> None:
    """Let the text of a record be ``text``, and the rest of it as it was."""
    if part in ("header", "farewell", "feed", "verdict", "stack"):
        start = {"header": _HEADER_HEAD, "stack": _STACK_HEAD}.get(part, _TEXT_HEAD)
        text = text[: len(record) - start]
        record[start : start + len(text)] = text
        at, size = (12, 4) if part == "header" else (start - 2, 2)
        record[at : at + size] = len(text).to_bytes(size, "little")
    elif part in ("name", "metric"):
        text = text[: layout.LINE - 1]
        record[: 1 + len(text)] = bytes((len(text),)) + text
    else:
        record[: len(text)] = text[: len(record)]


class Canvas:
    """A recording in a folder, which changes are made to, and which is whole again after ``restore``."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, "spliced.mtk")
        build(self.path)
        self._fd = os.open(self.path, os.O_RDWR)
        self._whole = os.pread(self._fd, layout.MIN_SIZE, 0)
        self._changed: set[tuple[int, int]] = set()
        self._is_cut = False

    def apply(self, change: Change) -> None:
        """Make one change."""
        if change.kind & CUT:
            if change.kind != LATER:
                os.ftruncate(self._fd, min(change.slot << 16 | change.at, layout.MIN_SIZE))
                self._is_cut = True
            return
        part = PARTS[change.part]
        offset = part.start + change.slot % part.slots * part.size
        record = bytearray(os.pread(self._fd, part.size, offset).ljust(part.size, b"\0"))
        if change.kind == REPLACE:
            _replace(change.part, record, change.content)
        else:
            at = change.at % part.size
            record[at : at + len(change.content)] = change.content[: part.size - at]
        seal(change.part, record)
        self._changed.add((offset, part.size))
        os.pwrite(self._fd, record, offset)

    def _apply_all(self, found: list[Change]) -> None:
        for change in found:
            self.apply(change)

    def restore(self) -> None:
        """Make the recording what it was."""
        if self._is_cut:
            os.pwrite(self._fd, self._whole, 0)
        for offset, size in self._changed:
            os.pwrite(self._fd, self._whole[offset : offset + size], offset)
        self._changed.clear()
        self._is_cut = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def try_input(self, data: bytes) -> None:
        """Make the changes that an input spells, read all there is to read, and restore the recording."""
        now: list[Change] = []
        later: list[Change] = []
        chosen = now
        for change in changes(data):
            if change.kind == LATER:
                chosen = later
            else:
                chosen.append(change)
        try:
            self._apply_all(now)
            read_everything(self.path, lambda: self._apply_all(later))
            export_everything(self.path)
            if HAS_TERMINAL and data[:1] and data[0] & RENDER:
                show_everything(self.path, self.folder)
        finally:
            self.restore()


# -- a whole recording ------------------------------------------------------------------------------------------------


def build(path: str) -> None:
    """A recording with something in every part, of which little is needed to read all: nine pages of windows."""
    fields = {"size": str(layout.MIN_SIZE), "pid": "4242", "start_ticks": "7", "boot_id": "none", "program": "train.py"}
    fields |= {"wall_ns": str(WALL_NS), "mono_ns": "0", "interval_s": "1.0", "tick_s": "0.1", "cpu_budget_pct": "0.2"}
    fields |= {"end_run": "1", "keep": "20", "keep_days": "30.0", "stack_signal": "0"}
    create(path, layout.MIN_SIZE, fields)
    marks, writer, feeds, where = MarkWriter(path), RecordingWriter(path), FeedWriter(path), Layout(layout.MIN_SIZE)
    outer = marks.begin("train")
    inner = marks.begin("forward")
    assert outer is not None
    assert inner is not None
    marks.epoch(1)
    marks.step(75)
    marks.mark("note", 1.5)
    marks.gauge("memory/test/gauge_mib", 3.0)
    marks.say_farewell({"how": "exception", "type": "MemoryError", "module": "builtins", "where": "train.py:3 load"})
    for metric in NAMES_OF_METRICS:
        # the writer names a metric when it comes in a window; the pages below are not the writer's
        writer.metric_ids[metric] = len(writer.metric_ids)
        offset = layout.METRICS + writer.metric_ids[metric] * layout.LINE
        os.pwrite(writer._fd, layout.pack_name(metric), offset)
    for page, (first, last) in enumerate([(0, 31), (32, 63), (64, 69)]):
        os.pwrite(writer._fd, layout.pack_row(_row(first, last), writer.metric_ids), where.bin_offset(page))
    for number in range(70, WINDOWS):
        os.pwrite(writer._fd, layout.pack_row(_row(number, number), writer.metric_ids), where.ring_offset(number))
    for phase in (0, outer.id, inner.id):
        row = _row(0, WINDOWS - 1)
        row.first = phase
        writer.put_phase(row)
        writer.put_phase(row)
    for number, kind in enumerate(records.EVENT_KINDS[1:]):
        writer.event(kind, number * SECOND_NS, number, 1.0 + number, f"what {kind} says")
    for number in range(3):
        place = Place(number, 1, (outer.id, inner.id))
        text = "train.py:3 load\ntrain.py:9 <module>"
        writer.put_stack(Stack(number, number * SECOND_NS, place, 100.0, 200.0, 30.0, text), number)
    for key in ("mlflow:abc", "jsonl:x.jsonl"):
        feed = Feed(key, key.partition(":")[0], {"uri": "http://127.0.0.1:5000", "run_id": "abc"})
        feed.next, feed.end_ns = 70, 76 * SECOND_NS
        feeds.put(feed)
        feeds.put(feed)
    verdict = Verdict("out_of_memory", "confirmed", "killed: out of memory")
    verdict.evidence, verdict.signal, verdict.wall_ns = ["the counter rose by 1", "2 MiB were left"], 9, WALL_NS
    writer.put_verdict(verdict)
    writer.pulse(WINDOWS * SECOND_NS, 100.0, 200.0, 30.0)
    head = Head()
    head.state, head.agent_pid, head.mono_ns, head.limit_mib = layout.ENDED, 4243, WINDOWS * SECOND_NS, 512.0
    head.wall_ns, head.limit_source = WALL_NS + head.mono_ns, "cgroup /train"
    writer.windows, writer.bin_width = WINDOWS, 32
    writer.publish(head)
    for opened in (marks, writer, feeds):
        opened.close()


NAMES_OF_METRICS = (
    metrics.RSS, metrics.TREE_PSS, metrics.TREE_PROCESSES, metrics.CONTAINER_LIMIT, metrics.CONTAINER_HEADROOM,
    metrics.SELF_AGENT_RSS, metrics.SELF_CPU, "memory/test/gauge_mib",
)  # fmt: skip


def _row(first: int, last: int) -> Row:
    row = Row(first, first * SECOND_NS)
    row.last, row.end_ns, row.step = last, (last + 1) * SECOND_NS, last
    row.end_wall_ns = WALL_NS + row.end_ns
    for number, metric in enumerate(NAMES_OF_METRICS):
        cell = row.cells[metric] = Cell(100.0 + first + number, row.start_ns + 5, Place(last, 1, (1, 2)), 1.0, EXACT)
        cell.min -= 1.0
        cell.count = last - first + 1
    return row


# -- reading all there is ---------------------------------------------------------------------------------------------


def read_everything(path: str, meanwhile: Callable[[], None] | None = None) -> None:
    """Ask a reader all it can be asked. Nothing but RecordingError may come of it, and nothing that cannot be printed.

    ``meanwhile`` is called once the first window has been read.
    """
    try:
        with RecordingReader(path) as reader:
            _read_parts(reader)
            last = -1
            for row in reader.windows():
                assert row.first <= row.last > last, "windows come in order"
                assert row.start_ns <= row.end_ns
                last = row.last
                if meanwhile is not None:
                    meanwhile()
                    meanwhile = None
            list(reader.windows(WINDOWS - 2))
            newest = reader.window(last)
            list(Batch([] if newest is None else [newest], "all").points())
    except RecordingError as exc:
        _are_printable([str(exc)])


def _read_parts(reader: RecordingReader) -> None:
    head, farewell, verdict = reader.head(), reader.farewell(), reader.verdict()
    reader.pulse(), reader.place(), reader.marks()
    phases = reader.phases()
    words = [head.limit_source, *reader.names(), *reader.metrics(), *phases, *reader.fields, *reader.fields.values()]
    words += [*farewell, *farewell.values(), *(event.text for event in reader.events())]
    for feed in reader.feeds():
        words += [feed.key, feed.sink, *feed.target, *feed.target.values()]
        assert abs(feed.next) < layout.MAX_NUMBER
    for stack in reader.stacks():
        words += stack.text.split("\n")
    if verdict is not None:
        words += [verdict.text, *verdict.evidence]
        assert abs(verdict.wall_ns) < layout.MAX_NUMBER
    _are_printable(words)


def export_everything(path: str) -> None:
    """Make tables and JSON of a recording."""
    try:
        with Recording(path) as recording:
            recording.to_numpy()
        report = collect(path, "all")
        _as_strict_json(json_.encode(report))
        _are_printable(str(report.summary).split("\n"))
    except RecordingError as exc:
        _are_printable([str(exc)])


def show_everything(path: str, folder: str) -> None:
    """Print the report on a recording, and the list of the folder, which holds no other. Needs rich."""
    from rich.console import Console

    from memtrack.report import terminal

    out = io.StringIO()
    console = Console(file=out, width=120, highlight=False)
    try:
        with RecordingReader(path) as reader:
            figures_of(reader, 3 * SECOND_NS, 9 * SECOND_NS)
            console.print(terminal.live_line(reader))
        terminal.show(collect(path, "all"), console)
    except RecordingError as exc:
        _are_printable([str(exc)])
    listed = list_recordings(folder)
    assert [one.path for one in listed] == [path]
    console.print(terminal.listing(listed, folder))
    _are_printable(out.getvalue().split("\n"))


def _as_strict_json(text: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)


def _are_printable(words: list[str]) -> None:
    for word in words:
        assert word.isprintable(), f"not printable: {word!r}"
