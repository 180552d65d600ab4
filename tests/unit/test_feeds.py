"""One feed's delivery: refused windows cost no others, and whoever comes next goes on where the last one noted."""

from __future__ import annotations

import pytest

from memtrack import metrics
from memtrack.errors import DeliveryError, RejectedError
from memtrack.recording.layout import Head
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Feed
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import NOWHERE, Row
from memtrack.sinks import RunFigures
from memtrack.sinks.feeds import BATCH_WINDOWS, Delivery, FeedWriter, Halted, undelivered
from memtrack.sinks.relay import Relay
from memtrack.testing import RecordingSink

SECOND_NS = 10**9


class PickySink(RecordingSink):
    """Refuses every batch in which one of these windows is."""

    def __init__(self, *bad, run_gone=False):
        super().__init__()
        self.bad = {*bad}
        self.run_gone = run_gone
        self.asked = []

    def write(self, batch):
        numbers = [row.first for row in batch.windows]
        self.asked.append(numbers)
        if self.bad & {*numbers}:
            raise RejectedError("bad window", run_gone=self.run_gone)
        super().write(batch)

    @property
    def numbers(self):
        return [row.first for row in self.windows]


def fill(path, windows):
    """Windows of a second each, from monotonic time 0 on."""
    writer = RecordingWriter(path)
    for number in range(windows):
        row = Row(number, number * SECOND_NS)
        row.add(metrics.RSS, 100.0 + number, row.start_ns, NOWHERE, 1.0)
        row.end_ns, row.end_wall_ns = row.start_ns + SECOND_NS, 1_700_000_000 * SECOND_NS + number * SECOND_NS
        writer.append(row)
    writer.publish(Head())
    writer.close()


@pytest.fixture
def course(make_recording):
    """``course(sink, windows, **feed)`` gives the delivery of a feed to a sink; its path is ``course.path``."""
    opened = []

    def make(sink, windows=200, note=None, size=4 << 20, **values):
        if not hasattr(make, "path"):
            make.path = make_recording(size)
            fill(make.path, windows)
        reader, records = RecordingReader(make.path), FeedWriter(make.path)
        opened.extend((reader, records))
        feed = next(iter(reader.feeds()), None) or Feed(sink.key, "recording", {"key": sink.key})
        for name, value in values.items():
            setattr(feed, name, value)
        return Delivery(reader, sink, feed, "default", note or records.put, selective=False)

    make.feed = lambda: _feed(make.path)
    yield make
    for part in opened:
        part.close()


def _feed(path):
    with RecordingReader(path) as reader:
        (feed,) = reader.feeds()
        return feed


def test_everything_once_in_batches(course):
    """Oldest first, none twice, and the recording says so after each batch."""
    sink = PickySink()
    noted = []
    delivery = course(sink, note=lambda feed: noted.append((feed.next, feed.done)))
    delivery.send()
    delivery.finish(RunFigures())
    assert sink.numbers == list(range(200))
    assert noted == [(64, False), (128, False), (192, False), (200, False), (200, True)]
    assert delivery.windows == 200
    assert delivery.merged == delivery.record.dropped == 0
    assert sink.closed == 1


@pytest.mark.parametrize("bad", [{0}, {63}, {64, 65}, {5, 70, 71, 199}, set(range(200))])
def test_a_refused_window_costs_no_other(course, bad):
    """The batch is halved until the bad windows stand alone; those are counted, and nothing behind them waits."""
    sink = PickySink(*bad)
    delivery = course(sink)
    delivery.send()
    delivery.finish(RunFigures(dropped=1))
    assert sink.numbers == [number for number in range(200) if number not in bad]
    assert delivery.windows == 200 - len(bad)
    assert sink.figures.dropped == 1 + len(bad)
    feed = course.feed()
    assert (feed.next, feed.dropped, feed.done) == (200, len(bad), True)
    assert "1 windows: bad window" in delivery.refusal
    if len(bad) == 1:
        assert len(sink.asked) <= 4 + 2 * 6


def test_a_run_that_is_gone_is_not_asked_about_each_window(course):
    """Nothing of a batch will be taken: it is counted as a whole."""
    sink = PickySink(*range(200), run_gone=True)
    delivery = course(sink)
    delivery.send()
    assert len(sink.asked) == 4
    assert course.feed().dropped == 200


def test_an_outage_in_the_middle_of_halving(course):
    """The batch comes again as a whole, and what was refused is counted once."""
    sink = PickySink(3)
    write = sink.write

    def fail_once(batch):
        if len(sink.asked) == 4:
            sink.write = write
            raise DeliveryError("down")
        write(batch)

    sink.write = fail_once
    delivery = course(sink)
    with pytest.raises(DeliveryError):
        delivery.send()
    assert delivery.record.next == 0
    delivery.send()
    assert {*sink.numbers} == {*range(200)} - {3}
    assert course.feed().dropped == 1
    assert delivery.windows == 199


def test_another_goes_on(course):
    """Where the note says, and with the part between start and end only."""
    first = PickySink()
    first.fail(0)
    delivery = course(first, start_ns=10 * SECOND_NS, end_ns=150 * SECOND_NS, next=5)
    stop_after = [2]

    def note(feed, put=delivery._note):
        put(feed)
        stop_after[0] -= 1
        if not stop_after[0]:
            raise Halted

    delivery._note = note
    with pytest.raises(Halted):
        delivery.send()
    second = PickySink()
    course(second).send()
    assert first.numbers == list(range(10, 5 + 2 * BATCH_WINDOWS))
    assert second.numbers == list(range(5 + 2 * BATCH_WINDOWS, 150))


def test_merged_windows_are_delivered_and_counted(course):
    """A recording that was full: what is left has every window, some in rows that hold several."""
    sink = PickySink()
    delivery = course(sink, windows=2000, size=1 << 20)
    delivery.send()
    assert delivery.windows == 2000
    assert delivery.merged > 1000
    assert sum(row.last - row.first + 1 for row in sink.windows) == 2000


def test_figures_that_are_refused_end_the_feed(course):
    """They would be refused for ever. Those that do not get through come again."""
    sink = RecordingSink()
    sink.fail()
    delivery = course(sink)
    with pytest.raises(DeliveryError):
        delivery.finish(RunFigures())
    assert not delivery.record.done
    sink.refuse()
    delivery.finish(RunFigures(), conclude=True)
    assert course.feed().done
    assert sink.concluded is None


def test_concluding(course):
    """Only if it is asked for; and with the figures."""
    for conclude in (False, True):
        sink = RecordingSink()
        course(sink).finish(RunFigures(verdict="killed"), conclude=conclude)
        assert (sink.concluded is not None) == conclude


def test_counting_what_is_left(course):
    """Those of the feed only."""
    delivery = course(RecordingSink(), start_ns=10 * SECOND_NS, next=20)
    with RecordingReader(course.path) as reader:
        assert undelivered(reader, delivery.record) == 180
        delivery.record.end_ns = 100 * SECOND_NS
        assert undelivered(reader, delivery.record) == 80


# -- the relay ------------------------------------------------------------------------------------------------------


@pytest.fixture
def relay(make_recording):
    """A relay of an empty recording that flushes when it is woken; what it hands over is in ``relay.handed``."""
    path = make_recording()
    handed, lags = [], []
    made = Relay(
        path,
        flush_interval_s=3600.0,
        metrics="default",
        selective=False,
        figures=lambda start_ns, end_ns: RunFigures(),
        hand_over=handed.append,
        on_turn=lambda: None,
        on_lag=lags.append,
    )
    made.path, made.handed, made.lags = path, handed, lags
    yield made
    if not made._closing:
        made.close(1.0)


def feeds_of(path):
    with RecordingReader(path) as reader:
        return reader.feeds()


def test_a_feed_stands_in_the_recording_from_its_first_moment(relay, notices):
    """A kill before the first flush must not lose the run; nor one after its end the time of that."""
    sink = RecordingSink("recording:1", {"run": "1"})
    sink.variables = {"TOKEN": "a"}
    feed = relay.add(sink, 5, 0)
    (noted,) = feeds_of(relay.path)
    assert (noted.key, noted.sink, noted.target, noted.start_ns) == ("recording:1", "recording", {"run": "1"}, 5)
    assert not noted.done
    fill(relay.path, 10)
    assert relay.handed == [{"recording:1": {"TOKEN": "a"}}]
    sink.fail(1000)
    sink.target = {"run": "1", "status": "FAILED"}
    relay.end(feed, 7 * SECOND_NS, 0, 0.0)
    (noted,) = feeds_of(relay.path)
    assert (noted.end_ns, noted.target) == (7 * SECOND_NS, {"run": "1", "status": "FAILED"})


def test_windows_that_were_finished_while_the_feed_was_added(relay):
    """The thread may be held up between the start of the feed and this: what ended since is the sink's all the same."""
    sink = RecordingSink("recording:1", {"run": "1"})
    fill(relay.path, 10)
    feed = relay.add(sink, 7 * SECOND_NS, 6)
    relay.end(feed, 10 * SECOND_NS, 0, 5.0)
    assert [row.first for row in sink.windows] == [7, 8, 9]


def test_a_token_that_is_exchanged_is_handed_over(relay, notices):
    """At the latest with the next flush; a run that has everything needs none any more."""
    sink = RecordingSink("recording:1", {"run": "1"})
    feed = relay.add(sink, 0, 0)
    sink.variables["TOKEN"] = "new"
    fill(relay.path, 10)
    assert relay.flush(5.0)
    assert len(sink.windows) == 10
    relay.end(feed, 9 * SECOND_NS, 0, 5.0)
    relay.close(1.0)
    assert {"recording:1": {"TOKEN": "new"}} in relay.handed
    assert relay.handed[-1] == {}
    assert relay.lags[-1] == 0


def test_a_run_that_is_resumed_while_it_is_owed_something(relay, notices):
    """Both parts have a feed in the recording: the second must not take the first one's place."""
    sinks = [RecordingSink("recording:1", {"run": "1"}) for _ in range(2)]
    for sink in sinks:
        sink.fail(1000)
        feed = relay.add(sink, 0, 0)
        if sink is sinks[0]:
            fill(relay.path, 10)
        relay.end(feed, 5 * SECOND_NS, 0, 0.1)
    assert [feed.key for feed in feeds_of(relay.path)] == ["recording:1", "recording:1#2"]
    assert [feed.target for feed in feeds_of(relay.path)] == [{"run": "1"}] * 2


def test_an_address_that_does_not_fit(relay, notices):
    """It is said, and none is kept rather than a part of one."""
    relay.add(RecordingSink("recording:1", {"run": "1", "uri": "x" * 600}), 0, 0)
    (noted,) = feeds_of(relay.path)
    assert noted.target == {}
    assert "too long" in notices[0]


def test_nothing_is_noted_after_close(relay):
    """A request that comes back after the end must not put the recording back behind what others have delivered."""
    import threading

    inside, go_on = threading.Event(), threading.Event()

    class SlowSink(RecordingSink):
        def write(self, batch):
            inside.set()
            assert go_on.wait(10)
            super().write(batch)

    sink = SlowSink("recording:1", {"run": "1"})
    relay.add(sink, 0, 0)
    fill(relay.path, 10)
    relay._wake.set()
    assert inside.wait(5)
    thread = relay._thread
    relay.close(0.1)
    with RecordingReader(relay.path) as reader:
        (feed,) = reader.feeds()
        feed.next, feed.done = 10, True
        records = FeedWriter(relay.path)
        records.put(feed)
        records.close()
    go_on.set()
    thread.join(5)
    assert not thread.is_alive()
    assert len(sink.windows) == 10
    (noted,) = feeds_of(relay.path)
    assert (noted.next, noted.done) == (10, True)
