"""Half an hour of outage, and clocks that are set, in virtual time: real sampler, recording and relay."""

from __future__ import annotations

import itertools

import pytest

from memtrack import metrics
from memtrack.analysis.summary import figures_of, summarise
from memtrack.collectors.process import ProcessCollector
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.cadence import Budget
from memtrack.sampling.sampler import Sampler
from memtrack.sinks import relay as relay_module
from memtrack.sinks.base import Batch
from memtrack.sinks.relay import Relay
from memtrack.testing import FakeClock, FakeProc, RecordingSink

SECOND_NS = 10**9
PID = 4242
CALM_MIB = 400.0
PEAK = metrics.peak_name(metrics.RSS)


class World:
    """A training process and its agent, moved from tick to tick."""

    def __init__(self, path, folder):
        self.path = path
        self.clock = FakeClock()
        self.proc = FakeProc(folder)
        self.proc.add(PID, rss_mib=CALM_MIB)
        self.writer = RecordingWriter(path)
        self.marks = MarkWriter(path)
        self.head = Head()
        self.sampler = Sampler(
            [ProcessCollector(PID, self.proc.path)],
            self.writer.marks,
            interval_s=1.0,
            tick_s=0.1,
            budget=Budget(1.0, self.clock.now_ns, 0),
            now_ns=self.clock.now_ns,
            cpu_clock_ns=lambda: self.clock.cpu_ns,
            on_window=self._store,
            on_phase=self.writer.put_phase,
            on_epoch=self.writer.put_epoch,
        )

    def _store(self, row):
        self.writer.append(row)
        self.head.mono_ns, self.head.wall_ns = self.clock.now_ns, self.clock.wall_ns
        self.writer.publish(self.head)

    def tick(self):
        """Until the sampler has looked once more."""
        self.clock.advance_to(self.sampler.due_ns)
        self.sampler.tick(self.clock.now_ns, self.clock.wall_ns)

    def live(self, seconds):
        """Let time pass."""
        until_ns = self.clock.now_ns + int(seconds * SECOND_NS)
        while self.sampler.due_ns <= until_ns:
            self.tick()
        self.clock.advance_to(until_ns)

    def end(self):
        """The process ends."""
        self.sampler.finish(self.clock.now_ns, self.clock.wall_ns)
        self.writer.publish(self.head)


@pytest.fixture
def world(make_recording, tmp_path):
    """Everything at the default settings."""
    made = World(make_recording(4 << 20), tmp_path)
    yield made
    made.marks.close()
    made.writer.close()


def test_half_an_hour_of_outage(world, monkeypatch, notices, fault):
    """2000 windows go through a recording that has room for 907: every spike of the outage is delivered afterwards, in
    its height, at its time."""
    monkeypatch.setattr(relay_module, "monotonic", lambda: world.clock.now_ns / SECOND_NS)
    sink = RecordingSink()
    relay = Relay(
        world.path,
        flush_interval_s=3600.0,  # the thread sleeps: the relay's turns are taken here, when their time has come
        metrics="default",
        selective=False,
        figures=lambda start_ns, end_ns: figures_of(reader, start_ns, end_ns),
        hand_over=lambda environments: None,
        on_turn=lambda: None,
        on_lag=lambda windows: None,
    )
    spikes = []

    def live(seconds):
        for second in range(seconds):
            if second % 47 == 10:
                height = CALM_MIB + 50.0 + (len(spikes) * 37 % 101) * 3.0
                world.proc.update(PID, rss_mib=height)
                spikes.append((world.clock.wall_ns // 10**6, height))
            if second % 47 == 12:
                world.proc.update(PID, rss_mib=CALM_MIB - len(spikes))
            world.live(1)
            if (second % 10 == 0 or feed.failures) and world.clock.now_ns / SECOND_NS >= feed.retry_at:
                relay._serve(feed)

    with RecordingReader(world.path) as reader:
        feed = relay.add(sink, world.clock.now_ns, 0)
        live(120)
        assert len(sink.windows) >= 100
        sink.fail(10_000)
        before = sink.attempts
        live(1800)
        tries = sink.attempts - before
        assert 1800 / 10 <= tries <= 1800 / 4, "it is asked neither too often nor too rarely"
        sink._failures.clear()
        live(60)
        world.end()
        feed.record.end_ns = world.clock.now_ns
        relay._serve(feed)
        relay.close(1.0)
        merged = reader.head().merged
    assert feed.done.is_set()
    assert merged > 500
    assert len(spikes) >= 40
    peaks = [(point.timestamp_ms, point.value) for point in sink.points if point.name == PEAK]
    for at_ms, height in spikes:
        assert max(value for stamp, value in peaks if at_ms <= stamp <= at_ms + 12_000) == pytest.approx(
            height, abs=0.01
        )
    numbers = {number for row in sink.windows for number in range(row.first, row.last + 1)}
    assert numbers == set(range(len(numbers)))
    assert sink.figures.peak_rss_mib == pytest.approx(max(height for _, height in spikes), abs=0.01)
    assert (sink.figures.merged, sink.figures.dropped) == (merged, 0)
    assert len(notices) == 1
    fault(
        "tracker: away for 30 min (virtual time)",
        f"resolution: {merged} windows were merged; every one of {len(spikes)} spikes is there",
    )


@pytest.mark.parametrize("step_s", [-3600, 3600])
def test_a_clock_that_is_set(world, fault, step_s):
    """By an hour, forwards or back: time stamps follow it, durations and everything else do not."""
    began_ns = world.clock.wall_ns
    world.live(20)
    world.proc.update(PID, rss_mib=700.0)
    world.live(2)
    world.proc.update(PID, rss_mib=CALM_MIB)
    world.live(20.5)
    world.clock.wall_ns += step_s * SECOND_NS
    world.live(30)
    world.end()
    with RecordingReader(world.path) as reader:
        rows = list(reader.windows())
        summary = summarise(reader)
    assert [row.first for row in rows] == list(range(len(rows)))
    for before, after in itertools.pairwise(rows):
        assert after.start_ns == before.end_ns
    assert all(0.9 <= row.seconds <= 1.1 for row in rows[:-1])
    assert all(0 <= cell.seconds <= row.seconds for row in rows for cell in row.cells.values())
    stamps = [stamp - began_ns // 10**6 for stamp in sorted({point.timestamp_ms for point in Batch(rows).points()})]
    steps_ms = {round((after.end_wall_ns - before.end_wall_ns) / 1e6) for before, after in itertools.pairwise(rows)}
    assert steps_ms - {500} == {1000, 1000 + step_s * 1000}, "500: the last one is cut short"
    assert len(stamps) == len(rows), "no two windows share a time stamp"
    figures = summary.figures
    assert figures.seconds == pytest.approx(72.5, abs=0.2)
    assert (figures.peak_rss_mib, figures.windows) == (700.0, len(rows))
    # as the clock that is right now would have shown it
    assert figures.peak_wall_s == pytest.approx(began_ns / 1e9 + step_s + 20, abs=1.0)
    assert "700.0 MiB" in str(summary)
    fault(f"the clock is set {'forwards' if step_s > 0 else 'back'} by an hour (virtual time)")
