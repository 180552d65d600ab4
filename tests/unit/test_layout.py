"""How the parts of a recording are packed, and that damage is noticed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrack.errors import RecordingFormatError
from memtrack.recording import layout, records
from memtrack.recording.layout import Head, Layout, Mark, Pulse
from memtrack.recording.records import Event
from memtrack.sampling.window import Cell, Place, Row

NAMES = [f"memory/test/m{number}_mib" for number in range(layout.NAME_COUNT)]
IDS = {name: number for number, name in enumerate(NAMES)}
i64 = st.integers(-(2**63), 2**63 - 1)
u64 = st.integers(0, 2**64 - 1)
counts = st.integers(0, layout.MAX_NUMBER - 1)
printables = st.characters(exclude_categories=("C", "Z")) | st.just(" ")  # type: ignore[arg-type]
finite = st.floats(allow_nan=False)


@st.composite
def rows(draw):
    row = Row(draw(counts), draw(counts))
    row.last, row.end_wall_ns, row.step = draw(counts), draw(counts), draw(i64)
    row.end_ns = draw(st.integers(row.start_ns, layout.MAX_NUMBER - 1))
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=layout.MAX_CELLS)):
        cell = row.cells[name] = Cell(
            draw(finite), draw(counts), Place(draw(i64), draw(st.integers(-(2**31), 2**31 - 1)))
        )
        cell.max, cell.mean, cell.last = draw(finite), draw(finite), draw(finite)
        cell.seconds = draw(st.floats(0.0, 1e6, width=32))
        cell.count = draw(st.integers(0, 2**32 - 1))
        cell.phase = draw(st.integers(0, 65535))
        cell.label = draw(st.integers(1, 3))
    return row


def state(row):
    found = {name: getattr(row, name) for name in ("first", "last", "start_ns", "end_ns", "end_wall_ns", "step")}
    found["cells"] = {name: [getattr(cell, part) for part in Cell.__slots__] for name, cell in row.cells.items()}
    return found


@given(rows(), st.integers(0, 70000))
def test_row_round_trip(row, turn):
    """A row of any content comes back as it was, and fits a page."""
    page = layout.pack_row(row, IDS, turn)
    assert len(page) <= layout.PAGE
    found = layout.unpack_row(page.ljust(layout.PAGE, b"\xff"), NAMES)
    assert found is not None
    assert state(found) == state(row)
    assert layout.row_span(page) == (row.first, row.last)
    assert layout.row_turn(page) == turn % 65536
    assert layout.row_cells(page) == len(row.cells)


@given(rows(), st.data())
def test_damaged_row_is_noticed(row, data):
    """One flipped bit anywhere in a row, and it does not count."""
    page = bytearray(layout.pack_row(row, IDS))
    bit = data.draw(st.integers(0, len(page) * 8 - 1))
    page[bit // 8] ^= 1 << bit % 8
    assert layout.unpack_row(bytes(page).ljust(layout.PAGE, b"\0"), NAMES) is None


@given(rows(), st.data())
def test_torn_row_is_noticed(row, data):
    """A row of which only the beginning was written over another one does not count, wherever it was cut."""
    page = layout.pack_row(row, IDS)
    other = Row(row.first ^ 1, row.start_ns)
    other.cells = {NAMES[0]: Cell(1.0, 2, Place())}
    before = layout.pack_row(other, IDS).ljust(len(page), b"\0")
    cut = data.draw(st.integers(1, len(page) - 1))
    torn = page[:cut] + before[cut:]
    if torn[: len(page)] != page and torn != before:
        assert layout.unpack_row(torn.ljust(layout.PAGE, b"\0"), NAMES) is None


def test_empty_and_short_pages():
    """A page that was never written, or a file that ends too early, has no row."""
    for page in (b"", b"\0" * 63, b"\0" * layout.PAGE, b"\xff" * layout.PAGE):
        assert layout.unpack_row(page, NAMES) is None
        assert layout.row_span(page) is None


def test_cells_of_unknown_metrics_are_left_out():
    """Metrics without an id are not written; ids without a name are not read."""
    row = Row(1, 0)
    row.cells = {"unknown": Cell(1.0, 0, Place()), NAMES[3]: Cell(2.0, 0, Place())}
    page = layout.pack_row(row, IDS)
    assert set(layout.unpack_row(page, NAMES) or ()) == {NAMES[3]}
    assert set(layout.unpack_row(page, NAMES[:3]) or ()) == set()
    assert layout.row_cells(page) == 1


def test_more_cells_than_a_page_holds():
    """What does not fit is left out; the rest is whole."""
    row = Row(1, 0)
    row.cells = {name: Cell(1.0, 0, Place()) for name in NAMES[: layout.MAX_CELLS + 5]}
    page = layout.pack_row(row, IDS)
    assert len(page) <= layout.PAGE
    assert len((layout.unpack_row(page, NAMES) or row).cells) == layout.MAX_CELLS


# -- header ---------------------------------------------------------------------------------------------------------

HEADER = {"pid": "42", "program": "train.py", "odd": "a=b=c ü", "empty": ""}


def test_header_round_trip():
    """Values may hold anything but line breaks."""
    assert layout.unpack_header(layout.pack_header(HEADER).ljust(layout.PAGE, b"\0"), "x.mtk") == HEADER


def test_header_too_long():
    """A header that does not fit its page is a mistake of the caller."""
    with pytest.raises(ValueError, match="does not fit"):
        layout.pack_header({"key": "x" * 5000})


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (b"", "shorter than its header"),
        (b"MEMTRACK", "shorter than its header"),
        (b"SQLite format 3\0" * 8, "does not begin with MEMTRACK"),
        (b"\0" * layout.PAGE, "does not begin with MEMTRACK"),
        (b"MEMTRACK" + (2).to_bytes(4, "little") + b"\0" * 100, "pip install --upgrade memtrack"),
        (layout.pack_header(HEADER)[:-1], "damaged"),
        (layout.pack_header(HEADER)[:-1] + b"\1", "damaged"),
    ],
)
def test_header_errors(page, says):
    """What is no recording, damaged, or of a later version is told apart, and the file is named."""
    with pytest.raises(RecordingFormatError, match=says) as caught:
        layout.unpack_header(page, "some/where.mtk")
    assert str(caught.value).startswith("some/where.mtk: ")


@pytest.mark.parametrize("text", [b"no equals sign\n", b"a=\xff\xfe\n"])
def test_header_that_somebody_made_up(text):
    """A header with a right checksum around nonsense is still only a format error."""
    import struct
    from binascii import crc32

    page = struct.pack("<8sIII", b"MEMTRACK", layout.VERSION, len(text), crc32(text)) + text
    with pytest.raises(RecordingFormatError, match="key=value"):
        layout.unpack_header(page, "x.mtk")


# -- names ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(printables, min_size=1), max_size=20))
def test_names_round_trip(names):
    """Names that fit come back; longer ones keep their end, cut between characters."""
    table = b"".join(map(layout.pack_name, names)).ljust(layout.NAME_COUNT * layout.LINE, b"\0")
    found = layout.unpack_names(table)
    assert len(found) == len(names)
    for name, back in zip(names, found, strict=True):
        assert name.endswith(back)
        assert name == back or 60 <= len(back.encode()) <= 63
    assert len(table) == layout.NAME_COUNT * layout.LINE


# -- head, pulse, events, marks, records ----------------------------------------------------------------------------


@given(
    st.integers(0, 3), st.integers(0, 2**32 - 1), i64, i64, u64, st.integers(0, 2**32 - 1), u64, u64, finite,
    st.text(printables, max_size=20),
)  # fmt: skip
def test_head_round_trip(state, pid, mono, wall, windows, cut, merged, ticks, limit, source):
    """Everything that the agent publishes comes back, and fits its slot."""
    head = Head()
    head.state, head.agent_pid, head.mono_ns, head.wall_ns, head.windows = state, pid, mono, wall, windows
    head.cut, head.merged, head.ticks, head.limit_mib, head.limit_source = cut, merged, ticks, limit, source
    body = head.pack()
    assert len(body) == layout.HEAD_BODY <= layout.HEAD_SLOT - 8
    back = Head.unpack(body)
    assert {name: getattr(back, name) for name in Head.__slots__} == {
        name: getattr(head, name) for name in Head.__slots__
    }


def test_pulse():
    """No body, no sample: values are NaN then, not zero."""
    empty = Pulse()
    assert empty.mono_ns == 0
    assert empty.rss_mib != empty.rss_mib
    pulse = Pulse(layout.PULSE_BODY.pack(5, 1.0, 2.0, 3.0, 4, 6.0))
    assert (pulse.mono_ns, pulse.rss_mib, pulse.usage_mib, pulse.headroom_pct) == (5, 1.0, 2.0, 3.0)


@given(u64, st.sampled_from(records.EVENT_KINDS[1:]), i64, i64, finite, st.text(printables, max_size=100), st.data())
def test_event_round_trip_and_damage(number, kind, time_ns, step, value, text, data):
    """An event comes back, its text cut to what fits; with one flipped bit it does not count."""
    record = records.pack_event(Event(number, kind, time_ns, step, value, text))
    assert len(record) == layout.EVENT_SIZE
    event = records.unpack_event(record)
    assert event is not None
    assert (event.number, event.kind, event.time_ns, event.step, event.value) == (number, kind, time_ns, step, value)
    assert text.startswith(event.text.rstrip("\ufffd"))
    damaged = bytearray(record)
    bit = data.draw(st.integers(0, len(record) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    assert records.unpack_event(bytes(damaged)) is None
    assert records.unpack_event(bytes(layout.EVENT_SIZE)) is None


WORDS = st.text("abcdefghij:/-_0123456789 é", max_size=60)


def fields_of(thing):
    """The slots of a record, as a dictionary."""
    return {name: getattr(thing, name) for name in thing.__slots__}


@given(
    st.integers(0, 2**32 - 1), counts, counts, st.none() | counts, counts, st.booleans(), WORDS.map(str.strip),
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.text("xyz:/=", max_size=40), max_size=4), st.data(),
)  # fmt: skip
def test_feed_round_trip_and_damage(turn, delivered, start_ns, end_ns, dropped, done, key, target, data):
    """A feed comes back; with one flipped bit it does not count."""
    feed = records.Feed(key, "mlflow", target)
    feed.next, feed.start_ns, feed.end_ns, feed.dropped, feed.done = delivered, start_ns, end_ns, dropped, done
    record = feed.pack(turn)
    assert len(record) == layout.FEED_SIZE
    found = records.Feed.unpack(record)
    assert found is not None
    assert (found[0], fields_of(found[1])) == (turn, fields_of(feed))
    damaged = bytearray(record.rstrip(b"\0"))
    bit = data.draw(st.integers(0, len(damaged) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    assert records.Feed.unpack(bytes(damaged).ljust(layout.FEED_SIZE, b"\0")) is None
    assert records.Feed.unpack(bytes(layout.FEED_SIZE)) is None


def test_a_target_that_does_not_fit():
    """What is too long is left out as a whole; the numbers are always there."""
    feed = records.Feed("key", "mlflow", {"uri": "x" * 600, "run_id": "abc"})
    feed.next = 7
    found = records.Feed.unpack(feed.pack(1))
    assert found is not None
    assert (found[1].next, found[1].sink, found[1].target) == (7, "mlflow", {"run_id": "abc"})


@given(st.integers(0, 2**32 - 1), i64, finite, st.text(printables | st.just("\n"), max_size=6000), st.data())
def test_stack_round_trip_and_damage(number, time_ns, rss, text, data):
    """A stack comes back, cut to a page; with one flipped bit it does not count."""
    stack = records.Stack(number, time_ns, layout.Place(3, 1, (5, 9)), rss, 2.0, 3.0, text)
    record = stack.pack()
    assert len(record) <= layout.PAGE
    back = records.Stack.unpack(record.ljust(layout.PAGE, b"\0"))
    assert back is not None
    assert (back.number, back.time_ns, back.rss_mib, back.headroom_pct) == (number, time_ns, rss, 3.0)
    assert (back.place.step, back.place.epoch, back.place.phase) == (3, 1, 9)
    assert text.startswith(back.text)
    assert len(text) < 1000 or len(back.text) >= 1000
    damaged = bytearray(record)
    bit = data.draw(st.integers(0, len(record) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    assert records.Stack.unpack(bytes(damaged)) is None
    assert records.Stack.unpack(bytes(layout.PAGE)) is None


@given(
    st.sampled_from(records.KINDS), st.sampled_from(records.CONFIDENCES), st.none() | st.integers(-5, 300),
    st.none() | st.integers(1, 64), counts, WORDS, st.lists(WORDS, max_size=12),
)  # fmt: skip
def test_verdict_round_trip(kind, confidence, exit_code, signal, wall_ns, text, evidence):
    """A verdict comes back with its evidence in order."""
    verdict = records.Verdict(kind, confidence, text)
    verdict.exit_code, verdict.signal, verdict.wall_ns, verdict.evidence = exit_code, signal, wall_ns, evidence
    packed = verdict.pack(1)
    assert len(packed) <= layout.PAGE
    found = records.unpack_text(packed)
    assert found is not None
    back = records.Verdict.from_fields(found[1])
    assert back is not None
    assert fields_of(back) == fields_of(verdict)


def test_a_verdict_of_an_unknown_kind_is_none():
    """What a newer memtrack wrote, or somebody made up, is not shown as if it were understood."""
    assert records.Verdict.from_fields({"kind": "eaten", "confidence": "certain"}) is None
    assert records.Verdict.from_fields({"kind": "clean", "confidence": "certain", "exit_code": "x"}) is None


def test_mark():
    """A mark has the state after it; a depth that cannot be is cut to what can."""
    body = layout.MARK_BODY.pack(layout.PHASE_BEGIN, 2, 7, 1, 30, 99, 0.5) + layout.MARK_PATH.pack(3, 7, *(0,) * 6)
    mark = Mark(body)
    assert (mark.kind, mark.name, mark.time_ns, mark.value) == (layout.PHASE_BEGIN, 7, 99, 0.5)
    assert (mark.place.step, mark.place.epoch, mark.place.phases) == (30, 1, (3, 7))
    wild = layout.MARK_BODY.pack(1, 200, 7, 1, 30, 99, 0.5) + layout.MARK_PATH.pack(*range(8))
    assert Mark(wild).place.phases == tuple(range(8))


# -- where things lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [layout.MIN_SIZE, layout.DEFAULT_SIZE, layout.MIN_SIZE + 4096, 64 << 20])
def test_pages_do_not_overlap(size):
    """Ring and history lie behind everything else, side by side, and inside the file."""
    where = Layout(size)
    offsets = [where.ring_offset(number) for number in range(where.ring)]
    offsets += [where.bin_offset(index) for index in range(where.bins)]
    assert len(set(offsets)) == len(offsets) == (size - layout.WINDOWS) // layout.PAGE
    assert min(offsets) == layout.WINDOWS
    assert max(offsets) + layout.PAGE <= size
    assert where.ring_offset(where.ring) == where.ring_offset(0)


def test_parts_do_not_overlap():
    """Each part of the layout ends before the next one begins, and lines are aligned."""
    parts = [
        (0, layout.PAGE),
        (layout.HEAD, 2 * layout.HEAD_SLOT),
        (layout.PULSE, 2 * layout.LINE),
        (layout.FAREWELL, layout.FAREWELL_SIZE),
        (layout.CONTROL, layout.LINE),
        (layout.NOW, layout.LINE),
        (layout.GAUGES, layout.GAUGE_COUNT * layout.LINE),
        (layout.MARKS, layout.MARK_COUNT * layout.LINE),
        (layout.NAMES, layout.NAME_COUNT * layout.LINE),
        (layout.METRICS, layout.NAME_COUNT * layout.LINE),
        (layout.EVENTS, layout.EVENT_COUNT * layout.EVENT_SIZE),
        (layout.FEEDS, layout.FEED_COUNT * 2 * layout.FEED_SIZE),
        (layout.VERDICT, 2 * layout.PAGE),
        (layout.STACKS, layout.STACK_COUNT * layout.PAGE),
        (layout.PHASES, layout.PHASE_COUNT * 2 * layout.PAGE),
        (layout.WINDOWS, layout.PAGE),
    ]
    for (start, size), (following, _) in itertools.pairwise(parts):
        assert start + size <= following
        assert start % layout.LINE == 0
    assert layout.MARK_BODY.size + layout.MARK_PATH.size <= layout.LINE - 8
    assert layout.GAUGE_BODY.size <= layout.LINE - 8
    assert layout.PULSE_BODY.size <= layout.LINE - 8
    assert layout.Layout.phase_offset(layout.PHASE_COUNT - 1, 1) + layout.PAGE <= layout.WINDOWS
