"""The recording as a whole: a ring of the newest windows, a history that merges, and a reader that bears damage."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrack import metrics
from memtrack.errors import RecordingError, RecordingFormatError
from memtrack.recording import layout, records
from memtrack.recording.layout import Head, Layout
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Feed
from memtrack.recording.writer import RecordingWriter, create
from memtrack.sampling.window import EXACT, Cell, Place, Row
from memtrack.sinks.feeds import FeedWriter

SECOND_NS = 10**9
RING = Layout(layout.MIN_SIZE).ring
BINS = Layout(layout.MIN_SIZE).bins


def value_of(number):
    """A value of window ``number`` that looks random and is always the same."""
    return float((number * 2654435761) % 10007)


def window(number, names=(metrics.RSS,)):
    row = Row(number, number * SECOND_NS)
    row.end_ns = row.start_ns + SECOND_NS
    row.end_wall_ns = row.end_ns + 10**18
    row.step = number
    for name in names:
        cell = row.cells[name] = Cell(value_of(number), row.start_ns + 5, Place(number, number // 100, (1,)), 1.0)
        cell.min = value_of(number) - 1.0
    return row


def check(rows, count):
    """The rows cover the windows from 0 to ``count`` without gap or overlap, and each says what its windows said."""
    expected = 0
    for row in rows:
        assert row.first == expected
        numbers = range(row.first, row.last + 1)
        cell = row.cells[metrics.RSS]
        best = max(numbers, key=lambda number: (value_of(number), -number))
        assert (cell.max, cell.step, cell.max_ns) == (value_of(best), best, best * SECOND_NS + 5)
        assert cell.min == min(map(value_of, numbers)) - 1.0
        assert cell.last == value_of(row.last)
        assert cell.count == len(numbers)
        assert cell.mean == pytest.approx(sum(map(value_of, numbers)) / len(numbers), rel=1e-6)
        assert (row.start_ns, row.end_ns) == (row.first * SECOND_NS, (row.last + 1) * SECOND_NS)
        expected = row.last + 1
    assert expected == count


@pytest.fixture
def writer(make_recording):
    """A writer of a new recording of the smallest size; its path is ``writer.path``."""
    path = make_recording()
    made = RecordingWriter(path)
    made.path = path
    yield made
    made.close()


@pytest.fixture
def reader(writer):
    """A reader of what ``writer`` writes."""
    with RecordingReader(writer.path) as made:
        yield made


# -- making ---------------------------------------------------------------------------------------------------------


def test_new_recording(make_recording):
    """It has its full size, all of it allocated, and nobody else may read it."""
    path = make_recording(layout.DEFAULT_SIZE)
    status = os.stat(path)
    assert status.st_size == layout.DEFAULT_SIZE
    assert status.st_blocks * 512 >= layout.DEFAULT_SIZE
    assert status.st_mode & 0o777 == 0o600


def test_new_recording_is_empty(make_recording):
    """A reader finds nothing in it, and no error."""
    with RecordingReader(make_recording()) as reader:
        head, pulse, place = reader.head(), reader.pulse(), reader.place()
        assert (head.state, head.windows, pulse.mono_ns, place.step) == (layout.STARTING, 0, 0, -1)
        assert list(reader.windows()) == []
        assert (reader.phases(), reader.events(), reader.feeds(), reader.stacks()) == ({}, [], [], [])
        assert (reader.names(), reader.metrics()) == ([""], [])


def test_existing_file_is_not_overwritten(make_recording):
    """A file that is there already is an error that names it and a way out."""
    path = make_recording()
    with pytest.raises(RecordingError, match="MEMTRACK_DIR") as caught:
        create(path, layout.MIN_SIZE, {})
    assert path in str(caught.value)


# -- ring and history -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, RING, RING + 1, RING + BINS, 3 * RING, 1000, 5000])
def test_windows_read_back(writer, reader, count):
    """However many windows there were, what is read covers them all, exactly; the file has not grown."""
    for number in range(count):
        writer.append(window(number))
    writer.publish(Head())
    rows = list(reader.windows())
    check(rows, count)
    assert len(rows) <= RING + BINS
    newest = rows[-min(count, RING) :]
    assert [row.first for row in newest] == [row.last for row in newest] == list(range(count - len(newest), count))
    assert os.stat(writer.path).st_size == layout.MIN_SIZE
    head = reader.head()
    assert head.windows == count
    assert head.merged == count - len(rows)
    widest = max(row.last - row.first + 1 for row in rows)
    assert widest <= head.bin_width < 4 * max(1, count / BINS)


def test_consistent_after_every_window(writer, reader):
    """While the history fills, doubles and doubles again, every window is found exactly once, all the time."""
    for number in range(1200):
        writer.append(window(number))
        if number % 7 == 0 or number < 200:
            writer.publish(Head())
            check(reader.windows(), number + 1)


def test_history_stays_fine_enough(writer, reader):
    """Doubling leaves at least a quarter of the pages of the history in use: resolution is not thrown away."""
    least = BINS
    for number in range(20000):
        writer.append(window(number))
        if number > RING + BINS and number % 97 == 0:
            least = min(least, len(reader.history(0)))
    assert least >= BINS // 4


@pytest.mark.parametrize("since", [0, 1, 100, 1900, 1999, 2000, 5000])
def test_since(writer, reader, since):
    """Reading from a window on gives it and all later ones; a merged row that holds it is given whole."""
    for number in range(2000):
        writer.append(window(number))
    writer.publish(Head())
    whole = list(reader.windows())
    part = list(reader.windows(since))
    assert [(row.first, row.last) for row in part] == [(row.first, row.last) for row in whole if row.last >= since]


def test_window_without_head(writer, reader):
    """A window that was written when the agent died, before its head was, is found."""
    for number in range(10):
        writer.append(window(number))
    writer.publish(Head())
    writer.append(window(10))
    check(reader.windows(), 11)


def test_pages_that_were_merged_do_not_count(writer, reader):
    """Pages whose windows stand merged on another page keep their old content, and are left out."""
    for number in range(RING + BINS):
        writer.append(window(number))
    writer.publish(Head())
    stale = sum(
        layout.row_span(reader._read(reader.layout.bin_offset(index), layout.PAGE)) is not None for index in range(BINS)
    )
    index = reader.history(0)
    assert stale > len(index)
    check(reader.windows(), RING + BINS)


@pytest.mark.parametrize("start", [1500, 1580, 1700])
def test_reading_goes_on_while_windows_move(make_recording, start):
    """Who reads while windows are added finds each once, though pages are merged and the ring is overwritten."""
    path = make_recording(layout.DEFAULT_SIZE)
    writer, number = RecordingWriter(path), start
    for number in range(start):
        writer.append(window(number))
    writer.publish(Head())
    rows, merged = [], writer.merged
    with RecordingReader(path) as reader:
        for row in reader.windows():
            rows.append(row)
            if len(rows) % 90 == 0:
                number += 1
                writer.append(window(number))
                writer.publish(Head())
    assert number > start + 5
    assert writer.merged > merged
    assert rows[-1].last >= start - 1
    check(rows, rows[-1].last + 1)
    writer.close()


def test_reading_is_overtaken(writer, reader):
    """Should everything be overwritten between two rows, no window is lost, and none comes before an earlier one."""
    for number in range(100):
        writer.append(window(number))
    writer.publish(Head())
    reading = reader.windows()
    rows = [next(reading) for _ in range(50)]
    for number in range(100, 3000):
        writer.append(window(number))
    writer.publish(Head())
    rows += reading
    covered = set()
    for row in rows:
        covered |= set(range(row.first, row.last + 1))
    assert covered == set(range(3000))
    assert all(earlier.last < later.last for earlier, later in itertools.pairwise(rows))


def test_metrics_that_come_later(writer, reader):
    """A reader that has read the names already finds the metrics that were added since."""
    writer.append(window(0))
    assert reader.window(0) is not None
    writer.append(window(1, (metrics.RSS, metrics.ANON)))
    assert set(reader.window(1) or ()) == {metrics.RSS, metrics.ANON}


def test_more_metrics_than_have_ids(writer, reader):
    """The 257th metric finds no room, which is counted; the others are there."""
    for first in range(0, 280, 40):
        writer.append(window(first // 40, [f"memory/test/m{number}_mib" for number in range(first, first + 40)]))
    writer.publish(Head())
    found = set()
    for row in reader.windows():
        found |= set(row)
    assert len(found) == layout.NAME_COUNT
    assert writer.dropped == 280 - layout.NAME_COUNT


def test_more_metrics_than_a_window_holds(writer, reader):
    """A window keeps the first 63 metrics; the rest is counted."""
    writer.append(window(0, [f"memory/test/m{number}_mib" for number in range(70)]))
    writer.publish(Head())
    assert len((reader.window(0) or {}).cells) == layout.MAX_CELLS
    assert writer.dropped == 70 - layout.MAX_CELLS


@given(st.lists(st.integers(1, 150), max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_appends_and_reads(make_recording, bursts):
    """Property: after any number of windows, all views of the recording agree with each other."""
    path = make_recording()
    writer, number = RecordingWriter(path), 0
    with RecordingReader(path) as reader:
        for burst in bursts:
            for _ in range(burst):
                writer.append(window(number))
                number += 1
            total = Row(0, 0)
            writer.publish(Head())
            for row in reader.windows():
                total.merge(row)
            assert reader.head().windows == number
            assert total.cells[metrics.RSS].count == number
            assert total.last == number - 1
            half = number // 2
            assert next(reader.windows(half)).first <= half <= next(reader.windows(half)).last
            newest = reader.window(number - 1)
            assert newest is not None
            assert newest.cells[metrics.RSS].max == value_of(number - 1)
            assert reader.window(number) is None
            assert reader.window(number - 1 - RING) is None
    writer.close()


# -- head, pulse, events, phases, cursors ---------------------------------------------------------------------------


def test_newest_head_counts(writer, reader):
    """Of the two slots the newer one counts, and the older one if the newer was never finished."""
    for number in range(1, 6):
        head = Head()
        head.ticks = number
        writer.publish(head)
        assert reader.head().ticks == number
    writer._words[(layout.HEAD + (writer._turn & 1) * layout.HEAD_SLOT) // 8] = 0
    assert reader.head().ticks == 4
    writer.pulse(1, 10.0, 20.0, 30.0)
    writer.pulse(2, 11.0, 21.0, 31.0)
    assert (reader.pulse().mono_ns, reader.pulse().rss_mib) == (2, 11.0)


def test_the_highest_sample_since_the_trainer_asked(writer, reader):
    """A sample that was taken before the trainer asked is none of what comes after, though it is stored after."""
    marks = MarkWriter(reader.path)
    assert marks.take_peak_mib() != marks.take_peak_mib()
    for rss_mib in (100.0, 300.0, 200.0):
        writer.pulse(1, rss_mib, 0.0, 0.0, writer.peak_asked)
    before = writer.peak_asked
    assert marks.take_peak_mib() == 300.0
    writer.pulse(2, 280.0, 0.0, 0.0, before)
    assert marks.take_peak_mib() != marks.take_peak_mib()
    for rss_mib in (90.0, 120.0, 110.0):
        writer.pulse(3, rss_mib, 0.0, 0.0, writer.peak_asked)
    assert marks.take_peak_mib() == 120.0
    assert reader.pulse().peak_mib == 120.0
    marks.close()


def test_events(writer, reader):
    """The newest 512 events are kept, in order, with their numbers."""
    for number in range(600):
        writer.event("mark", number, step=number, value=number / 2, text=f"event {number}")
    events = reader.events()
    assert [event.number for event in events] == list(range(88, 600))
    assert (events[-1].kind, events[-1].step, events[-1].value, events[-1].text) == ("mark", 599, 299.5, "event 599")


def test_phases(writer, reader):
    """The row of a phase that was stored last counts, also when it ends when the one before it did."""
    marks = MarkWriter(writer.path)
    train = marks.begin("train").id
    for turn in range(7):
        for phase in (0, train):
            row = window(phase)
            row.first, row.start_ns, row.end_ns = phase, 0, 77
            row.cells[metrics.RSS].max = 1000.0 * phase + turn
            writer.put_phase(row)
        found = reader.phases()
        assert set(found) == {"", "train"}
        assert found["train"].cells[metrics.RSS].max == 1000.0 * train + turn
        assert found[""].cells[metrics.RSS].max == turn
    marks.close()


def test_more_phases_than_slots(writer, reader):
    """Phases beyond the 32nd are not stored; those before are."""
    marks = MarkWriter(writer.path)
    for number in range(40):
        phase = marks.begin(f"p{number}")
        row = window(0)
        row.first = phase.id
        writer.put_phase(row)
        marks.end(phase)
    marks.close()
    assert set(reader.phases()) == {f"p{number}" for number in range(layout.PHASE_COUNT)}


def test_marks_of_a_recording(writer, reader):
    """A reader sees the trainer's place and its newest marks without the agent."""
    marks = MarkWriter(writer.path)
    marks.step(41)
    marks.begin("train")
    marks.mark("hello", 1.5)
    marks.step(42)
    place = reader.place()
    assert (place.step, [reader.names()[phase] for phase in place.phases]) == (42, ["train"])
    assert [mark.value for mark in reader.marks()] == [0.0, 1.5]
    marks.close()


def put(feeds, key, delivered, *, done=False):
    """Note that ``key`` has all windows before a number."""
    feed = Feed(key)
    feed.next, feed.done = delivered, done
    feeds.put(feed)


def progress(reader):
    """How far each feed has got."""
    return {feed.key: feed.next for feed in reader.feeds()}


def test_feeds(writer, reader):
    """Each sink has its feed; whoever opens the recording later goes on from there, also backwards."""
    feeds = FeedWriter(writer.path)
    for delivered in range(1, 8):
        put(feeds, "mlflow:abc", delivered)
        put(feeds, "jsonl:x.jsonl", delivered * 2)
    assert progress(reader) == {"mlflow:abc": 7, "jsonl:x.jsonl": 14}
    feeds.close()
    later = FeedWriter(writer.path)
    put(later, "mlflow:abc", 9)
    assert progress(reader) == {"mlflow:abc": 9, "jsonl:x.jsonl": 14}
    put(later, "third", 1)
    put(later, "mlflow:abc", 3)
    assert progress(reader) == {"mlflow:abc": 3, "jsonl:x.jsonl": 14, "third": 1}
    later.close()


def test_feed_survives_a_torn_successor(writer, reader):
    """When the process dies in writing a feed, the record before it counts, however many sinks there are."""
    for sinks in (1, 2, 3):
        feeds = FeedWriter(writer.path)
        for delivered in (1, 2):
            for number in range(sinks):
                put(feeds, f"sink {number}", delivered)
        newest = {}
        for at in range(2 * layout.FEED_COUNT):
            offset = layout.FEEDS + at * layout.FEED_SIZE
            found = Feed.unpack(os.pread(writer._fd, layout.FEED_SIZE, offset))
            if found and found[0] > newest.get(found[1].key, (0, 0))[0]:
                newest[found[1].key] = (found[0], offset)
        for _, offset in newest.values():
            os.pwrite(writer._fd, b"\xee" * 20, offset)
        assert progress(reader) == {f"sink {number}": 1 for number in range(sinks)}
        feeds.close()


def test_more_sinks_than_feeds(writer, reader):
    """With more than 32 sinks those that are done give way, whoever has the recording open; then the oldest."""
    for start in (0, 20):
        feeds = FeedWriter(writer.path)
        for number in range(start, start + 20):
            put(feeds, f"sink {number}", number, done=number % 2 == 0)
        feeds.close()
    kept = progress(reader)
    assert len(kept) == layout.FEED_COUNT
    assert {f"sink {number}" for number in range(1, 40, 2)} <= set(kept)
    assert all(kept[f"sink {number}"] == number for number in range(28, 40))


def test_stacks_and_verdict(writer, reader):
    """They come back from the file, and the newest of two verdicts counts, also when its successor is torn."""
    assert reader.verdict() is None
    for number in (1, 2, 3):
        stack = records.Stack(number, number, Place(number, 0, ()), 1.0, 2.0, 3.0, f"train.py:{number} step")
        writer.put_stack(stack, number % 2)
    assert [stack.text for stack in reader.stacks()] == ["train.py:2 step", "train.py:3 step"]
    for kind in ("unknown", "clean"):
        writer.put_verdict(records.Verdict(kind, "certain", kind))
        assert reader.verdict().kind == kind
    os.pwrite(writer._fd, b"\xee" * 20, layout.VERDICT)
    assert reader.verdict() is not None


# -- damage ---------------------------------------------------------------------------------------------------------


def test_file_that_is_not_there(tmp_path):
    """It is a RecordingError that names the file."""
    with pytest.raises(RecordingError, match=r"missing\.mtk.*No such file"):
        RecordingReader(str(tmp_path / "missing.mtk"))


def test_folder_instead_of_a_file(tmp_path):
    """It is a RecordingError, too."""
    with pytest.raises(RecordingError, match="Is a directory"):
        RecordingReader(str(tmp_path))


@pytest.mark.parametrize("size", [0, 10, 4096, layout.WINDOWS, layout.MIN_SIZE - 1, layout.MIN_SIZE + 1])
def test_file_of_the_wrong_size(make_recording, size):
    """A file that was cut, or that has grown, is a RecordingFormatError that says so."""
    path = make_recording()
    os.truncate(path, size)
    with pytest.raises(RecordingFormatError, match=os.path.basename(path)):
        RecordingReader(path)


def test_file_of_something_else(tmp_path):
    """Any other file is a RecordingFormatError, and no descriptor stays open."""
    path = tmp_path / "other.mtk"
    path.write_bytes(os.urandom(layout.MIN_SIZE))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RecordingFormatError, match="not a memtrack recording"):
        RecordingReader(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


class Killed(Exception):
    """Stands for a kill at this instruction."""


@pytest.mark.parametrize("when", [1, 7, RING + 3, 5 * RING, 9 * RING])
def test_another_writer_goes_on(make_recording, monkeypatch, when):
    """Killed before any of its writes, a writer has a successor that loses nothing, however full the recording is."""
    for victim in range(8):
        path = make_recording()
        writer = RecordingWriter(path)
        left = victim
        armed = False

        def pwrite(fd, data, offset, real=os.pwrite):
            nonlocal left
            if armed:  # noqa: B023 - it is this round's
                if left == 0:
                    raise Killed
                left -= 1
            return real(fd, data, offset)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "pwrite", pwrite)
            for number in range(when + 10):
                writer.append(window(number))
                armed = number >= when
                row = window(number)
                row.first = 0
                writer.put_phase(row)
                writer.event("mark", number)
                writer.publish(Head())
        assert left == 0
        writer.close()
        with RecordingReader(path) as reader:
            second = RecordingWriter(path)
            second.go_on(reader)
            before, numbers = second.windows, [event.number for event in reader.events()]
            assert when <= before <= when + 10
            assert reader.head().windows <= before <= reader.head().windows + 1
            for number in range(before, when + 500):
                second.append(window(number))
                second.event("mark", number)
                second.publish(Head())
                if number < before + 40:
                    check(reader.windows(), number + 1)
            check(reader.windows(), when + 500)
            assert reader.head().windows == when + 500
            kept = [event.number for event in reader.events()]
            assert kept == list(range(kept[0], kept[0] + len(kept)))
            assert not numbers or kept[-1] == numbers[-1] + when + 500 - before
            second.put_phase(window(0))
            assert len(reader.phases()) == 1
        second.close()
        os.unlink(path)


@pytest.fixture(scope="module")
def full_recording(tmp_path_factory):
    """A recording with something in every part, finished."""
    path = str(tmp_path_factory.mktemp("full") / "full.mtk")
    create(path, layout.MIN_SIZE, {"size": str(layout.MIN_SIZE)})
    marks = MarkWriter(path)
    writer = RecordingWriter(path)
    feeds = FeedWriter(path)
    phase = marks.begin("train")
    for number in range(400):
        marks.step(number)
        marks.gauge("memory/test/gauge_mib", number)
        marks.mark("note", number)
        writer.append(window(number, (metrics.RSS, metrics.ANON, metrics.TREE_PSS)))
        writer.event("mark", number)
        row = window(number)
        row.first = phase.id if number % 2 else 0
        writer.put_phase(row)
        writer.pulse(number, 1.0, 2.0, 3.0)
        writer.publish(Head())
        put(feeds, "sink", number)
        writer.put_stack(records.Stack(number, number, Place(number, 0, ()), 1.0, 2.0, 3.0, "a.py:1 f"), number % 8)
    writer.put_verdict(records.Verdict("clean", "certain", "it ended"))
    for part in (marks, writer, feeds):
        part.close()
    return path


def read_everything(path):
    """All that a reader can be asked; nothing of it may raise, or give a row that is not one of ours."""
    with RecordingReader(path) as reader:
        reader.head(), reader.pulse(), reader.place(), reader.names(), reader.metrics(), reader.feeds()
        reader.marks(), reader.stacks(), reader.verdict(), reader.farewell()
        for event in reader.events():
            assert event.kind in records.EVENT_KINDS
        last = -1
        for row in reader.windows():
            assert last < row.first <= row.last < 400
            last = row.last
            for cell in row.cells.values():
                assert cell.max == max(map(value_of, range(row.first, row.last + 1)))
        for row in reader.phases().values():
            assert row.cells
        return last


def test_undamaged(full_recording):
    """What the damage tests begin with is whole."""
    assert read_everything(full_recording) == 399
    with RecordingReader(full_recording) as reader:
        check(reader.windows(), 400)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_content_is_left_out(full_recording, tmp_path, seed):
    """Bytes overwritten at random places behind the header: reading never raises, and gives no wrong window."""
    path = str(tmp_path / "damaged.mtk")
    shutil.copy(full_recording, path)
    rng = random.Random(seed)
    # the names of the metrics carry no checksum: damage there changes names, which is tried elsewhere
    parts = [(layout.PAGE, layout.METRICS), (layout.EVENTS, layout.MIN_SIZE)]
    with open(path, "r+b") as file:
        for _ in range(rng.choice([1, 10, 300])):
            start, end = parts[rng.random() < 0.7]
            file.seek(rng.randrange(start, end))
            file.write(rng.randbytes(rng.choice([1, 8, 64, 500]))[: end - file.tell()])
    read_everything(path)


@pytest.mark.parametrize("seed", range(10))
def test_damaged_names(full_recording, tmp_path, seed):
    """Names that were overwritten are other names, or none; nothing raises."""
    path = str(tmp_path / "damaged.mtk")
    shutil.copy(full_recording, path)
    rng = random.Random(seed)
    with open(path, "r+b") as file:
        for start in (layout.NAMES, layout.METRICS):
            file.seek(start + rng.randrange(200))
            file.write(rng.randbytes(300))
    with RecordingReader(path) as reader:
        list(reader.windows())
        reader.phases()
        reader.marks()


def test_label_of_maximum_survives_merging(writer, reader):
    """That a maximum was exact is still known when its window is merged."""
    for number in range(1000):
        row = window(number)
        if number == 123:
            row.raise_max(metrics.RSS, 10**6, row.start_ns + 9, Place(123, 1, (5,)), EXACT)
        writer.append(row)
    writer.publish(Head())
    best = max((row.cells[metrics.RSS] for row in reader.windows()), key=lambda cell: cell.max)
    assert (best.max, best.label, best.step, best.phase, best.max_ns) == (10**6, EXACT, 123, 5, 123 * SECOND_NS + 9)
