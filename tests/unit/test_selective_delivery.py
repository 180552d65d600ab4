"""Selective logging on its way: failures, refusals, flushes and deaths leave charts that are as true as they were."""

from __future__ import annotations

import math
import os

import pytest

from memtrack import metrics, registry
from memtrack.analysis.summary import figures_of
from memtrack.errors import DeliveryError, RejectedError
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Feed, Verdict
from memtrack.recording.writer import RecordingWriter, put_verdict
from memtrack.sampling.window import NOWHERE, Row
from memtrack.sinks import RunFigures
from memtrack.sinks.deliver import deliver
from memtrack.sinks.feeds import Delivery, FeedWriter
from memtrack.sinks.relay import Relay
from memtrack.testing import RecordingSink
from tests.unit.test_selection import check_chart

SECOND_NS = 10**9
WALL_NS = 1_700_000_000 * SECOND_NS
WINDOWS = 400


def value_at(number):
    """A sine on a slope, with a spike each 97 windows."""
    return 500.0 + 0.2 * number + 40.0 * math.sin(number / 25.0) + 800.0 * (number % 97 == 50)


def fill(path, first=0, count=WINDOWS, state=None):
    """Windows of a second each."""
    writer = RecordingWriter(path)
    writer.windows = first
    for number in range(first, first + count):
        row = Row(number, number * SECOND_NS)
        row.add(metrics.TREE_PSS, value_at(number), row.start_ns, NOWHERE, 1.0)
        row.end_ns = row.start_ns + SECOND_NS
        row.end_wall_ns = WALL_NS + row.end_ns
        writer.append(row)
    head = Head()
    if state is not None:
        head.state, head.mono_ns, head.wall_ns = state, (first + count) * SECOND_NS, WALL_NS
    writer.publish(head)
    writer.close()


def full(count=WINDOWS):
    return [(WALL_NS // 10**6 + 1000 * (number + 1), value_at(number)) for number in range(count)]


def series(sink):
    return [(point.timestamp_ms, point.value) for point in sink.points]


@pytest.fixture
def course(make_recording):
    """``course(sink)`` is the selective delivery of a filled recording, whose path is ``course.path``."""
    path = make_recording(4 << 20, pid="4194303", start_ticks="1", selective="1")
    fill(path, state=layout.ENDED)
    reader, records = RecordingReader(path), FeedWriter(path)

    def make(sink):
        return Delivery(reader, sink, Feed("a", "lasting", {"key": "a"}), "default", records.put, selective=True)

    make.path = path
    yield make
    reader.close()
    records.close()


@pytest.fixture
def again(monkeypatch):
    """The sinks that are made by who delivers after the death."""
    made = []

    class LastingSink(RecordingSink):
        @classmethod
        def reopen(cls, target):
            made.append(cls(target["key"], target))
            return made[-1]

    monkeypatch.setattr(registry, "load_sink", lambda name: {"lasting": LastingSink}[name])
    return made


def test_what_arrives(course):
    """A chart within the bound, of a part of the windows, and all of these count as delivered."""
    sink = RecordingSink()
    delivery = course(sink)
    delivery.send()
    assert series(sink)[-1] != full()[-1], "the newest is held back"
    delivery.send_rest()
    delivery.finish(RunFigures())
    check_chart(series(sink), full())
    assert len(sink.points) < WINDOWS / 2
    assert delivery.windows == WINDOWS
    assert delivery.record.done


@pytest.mark.parametrize("failures", [1, 3])
def test_failures_change_nothing(course, failures):
    """A batch that has failed comes again, with the same points; so do those that were held back."""
    smooth, rough = RecordingSink(), RecordingSink()
    delivery = course(smooth)
    delivery.send()
    delivery.send_rest()
    delivery = course(rough)
    for step in (delivery.send, delivery.send_rest):
        rough.fail(failures)
        for _ in range(failures):
            with pytest.raises(DeliveryError):
                step()
        step()
    assert rough.points == smooth.points


def test_a_point_that_is_refused(course):
    """It is left out alone, and counted."""
    spike_ms = full()[50 + 97][0]

    class Picky(RecordingSink):
        def write(self, batch):
            if any(point.timestamp_ms == spike_ms for point in batch.points()):
                raise RejectedError("bad point")
            super().write(batch)

    smooth, picky = RecordingSink(), Picky()
    course(smooth).send()
    delivery = course(picky)
    delivery.send()
    assert picky.points == [point for point in smooth.points if point.timestamp_ms != spike_ms]
    assert delivery.record.dropped >= 1
    assert delivery.windows + delivery.record.dropped == WINDOWS


def test_a_run_that_is_gone(course):
    """It is asked once a batch."""

    class Gone(RecordingSink):
        def write(self, batch):
            self.attempts += 1
            raise RejectedError("gone", run_gone=True)

    sink = Gone()
    delivery = course(sink)
    delivery.send()
    assert sink.attempts == math.ceil(WINDOWS / 64)
    assert delivery.record.dropped == WINDOWS


@pytest.mark.parametrize("died_at", [10, 64, 130, 399])
def test_a_death_with_points_held_back(course, again, died_at):
    """Who delivers then begins before them: both parts together make a chart that is within the bound."""
    sink = RecordingSink()
    delivery = course(sink)
    delivery._reader = _Until(delivery._reader, died_at)
    delivery.send()
    verdict = Verdict("unknown_sigkill", "none", "the process was killed")
    verdict.wall_ns = WALL_NS + WINDOWS * SECOND_NS
    fd = os.open(course.path, os.O_RDWR)
    put_verdict(fd, verdict)
    os.close(fd)
    assert deliver(course.path, figures_of).complete
    (later,) = again
    together = sorted({*series(sink), *series(later)})
    check_chart(together, full())
    assert together[-1] == full()[-1]
    # not everything from the start: a minute before what was next
    assert series(later)[0][0] >= full()[max(died_at - 61, 0)][0]


class _Until:
    """A reader that sees windows up to a number."""

    def __init__(self, reader, end):
        self._reader, self._end = reader, end

    def windows(self, first=0):
        return (row for row in self._reader.windows(first) if row.last < self._end)


def test_flush_and_end(make_recording, notices):
    """A flush brings charts up to date and goes on from there; so does the end of a feed."""
    path = make_recording(4 << 20)
    fill(path, count=100)
    relay = Relay(
        path,
        flush_interval_s=3600.0,
        metrics="default",
        selective=True,
        figures=lambda start_ns, end_ns: RunFigures(),
        hand_over=lambda environments: None,
        on_turn=lambda: None,
        on_lag=lambda windows: None,
    )
    sink = RecordingSink()
    feed = relay.add(sink, 0, 0)
    assert relay.flush(5.0)
    assert series(sink)[-1] == full()[99]
    check_chart(series(sink), full(100))
    write = sink.write

    def fail_for_the_rest(batch):
        if not batch.windows:
            raise DeliveryError("down")
        write(batch)

    sink.write = fail_for_the_rest
    fill(path, first=100, count=1)
    assert not relay.flush(0.3), "what is held back has not arrived"
    sink.write = write
    fill(path, first=101, count=WINDOWS - 1)
    assert relay.end(feed, (WINDOWS + 100) * SECOND_NS, 0, 5.0)
    check_chart(series(sink), full(WINDOWS + 100))
    assert len(sink.points) < WINDOWS / 2
    relay.close(1.0)
