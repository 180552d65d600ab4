"""Delivery by another process than the one that recorded: what it takes, what it leaves, and who may."""

from __future__ import annotations

import fcntl
import os
import threading
import time

import pytest

from memtrack import registry
from memtrack.analysis.summary import figures_of
from memtrack.errors import DeliveryError, RejectedError
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Feed, Verdict
from memtrack.recording.writer import RecordingWriter, put_verdict
from memtrack.sinks import deliver as delivering
from memtrack.sinks.deliver import LOCKED, STILL_LIVE, deliver
from memtrack.sinks.feeds import FeedWriter
from memtrack.testing import RecordingSink
from tests.unit.test_feeds import fill

SECOND_NS = 10**9


class LastingSink(RecordingSink):
    """One of a name, that remembers all that were made, and the environment at that moment."""

    made: list[LastingSink]
    failing = 0
    refusing = False

    @classmethod
    def reopen(cls, target):
        if cls.refusing:
            raise RejectedError("no such run", run_gone=True)
        sink = cls(target["key"], target)
        sink.fail(cls.failing)
        sink.environment_then = os.environ.get("MEMTRACK_TEST_TOKEN")
        cls.made.append(sink)
        return sink


@pytest.fixture
def sinks(monkeypatch):
    """The sinks that are opened again; the name of their class is "lasting"."""
    LastingSink.made = []
    LastingSink.failing, LastingSink.refusing = 0, False
    monkeypatch.setattr(registry, "load_sink", lambda name: {"lasting": LastingSink}[name])
    monkeypatch.setattr(delivering, "backoff_s", lambda failures, exc: 0.01)
    monkeypatch.delenv("MEMTRACK_TEST_TOKEN", raising=False)
    return LastingSink.made


@pytest.fixture
def dead(make_recording):
    """``dead(*feeds, state=…, verdict=…)`` is a recording of 100 windows of a dead process, with feeds by key."""

    def make(*keys, state=layout.ENDED, verdict="unknown_sigkill", ended=(), **fields):
        path = make_recording(4 << 20, **{"pid": "4194303", "start_ticks": "1", **fields})
        fill(path, 100)
        writer = RecordingWriter(path)
        writer.windows = 100
        head = Head()
        head.state, head.mono_ns, head.wall_ns = state, 100 * SECOND_NS, 1_700_000_100 * SECOND_NS
        writer.publish(head)
        writer.close()
        if verdict:
            found = Verdict(verdict, "none", "the process was killed")
            found.signal, found.wall_ns = 9, 1_700_000_123 * SECOND_NS
            fd = os.open(path, os.O_RDWR)
            put_verdict(fd, found)
            os.close(fd)
        records = FeedWriter(path)
        for key in keys:
            feed = Feed(key, "lasting", {"key": key})
            feed.end_ns = dict(ended).get(key)
            records.put(feed)
        records.close()
        return path

    return make


def feeds_of(path):
    with RecordingReader(path) as reader:
        return {feed.key: feed for feed in reader.feeds()}


def test_everything_is_delivered_and_the_run_ended(dead, sinks):
    """Windows, figures with the verdict and the time of death, the end of the run; a second time there is nothing."""
    path = dead("a", "b")
    progress = []
    outcome = deliver(path, figures_of, on_progress=lambda key, windows: progress.append((key, windows)))
    assert outcome.complete
    assert [(feed.key, feed.windows, feed.left, feed.done, feed.reason) for feed in outcome.feeds] == [
        ("a", 100, 0, True, ""),
        ("b", 100, 0, True, ""),
    ]
    for sink in sinks:
        assert [row.first for row in sink.windows] == list(range(100))
        assert sink.figures == sink.concluded
        assert (sink.figures.verdict, sink.figures.signal) == ("unknown_sigkill", 9)
        assert sink.figures.end_wall_s == 1_700_000_123.0
        assert sink.closed == 1
    assert progress == [(key, windows) for key in "ab" for windows in (64, 100, 100)]
    again = deliver(path, figures_of)
    assert again.complete
    assert again.feeds == ()
    assert len(sinks) == 2


def test_a_process_that_lives_is_left_alone(dead, sinks):
    """It delivers by itself."""
    from memtrack.collectors.procfs import start_ticks
    from memtrack.recording.standing import boot_id

    own = {"pid": str(os.getpid()), "start_ticks": str(start_ticks(os.getpid())), "boot_id": boot_id()}
    path = dead("a", state=layout.RUNNING, verdict="", **own)
    outcome = deliver(path, figures_of)
    assert outcome.skipped == STILL_LIVE
    assert not outcome.complete
    assert not sinks


def test_a_recording_that_somebody_delivers_is_left_alone(dead, sinks):
    """Or waited for; then there is nothing left to do."""
    path = dead("a")
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    start = time.monotonic()
    assert deliver(path, figures_of, wait_s=0.2).skipped == LOCKED
    assert 0.2 <= time.monotonic() - start < 2
    assert not sinks
    # who holds it already needs no other
    assert deliver(path, figures_of, held_fd=fd).complete
    assert len(sinks) == 1
    threading.Timer(0.2, os.close, [fd]).start()
    outcome = deliver(path, figures_of, wait_s=5)
    assert outcome.feeds == ()
    assert len(sinks) == 1


def test_two_at_once(dead, sinks, monkeypatch):
    """One of them delivers, the other finds nothing left: each window arrives once."""
    path = dead("a")
    original = LastingSink.write

    def slowly(sink, batch):
        time.sleep(0.05)
        original(sink, batch)

    monkeypatch.setattr(LastingSink, "write", slowly)
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(deliver(path, figures_of, wait_s=5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sum(feed.windows for feed in outcome.feeds) for outcome in outcomes) == [0, 0, 100]
    assert [row.first for sink in sinks for row in sink.windows] == list(range(100))


def test_a_tracker_that_is_down(dead, sinks):
    """It is tried while patience lasts; then all waits, with the reason, for the next one, who delivers the rest."""
    path = dead("a")
    LastingSink.failing = 1000
    start = time.monotonic()
    (found,) = deliver(path, figures_of, patience_s=0.3).feeds
    assert 0.25 <= time.monotonic() - start < 3
    assert (found.windows, found.left, found.done, found.reason) == (0, 100, False, "told to fail")
    assert sinks[0].attempts > 3
    assert sinks[0].closed == 1
    (found,) = deliver(path, figures_of).feeds
    assert sinks[1].attempts == 1, "without patience there is one attempt"
    LastingSink.failing = 3
    assert deliver(path, figures_of, patience_s=1.0).complete
    assert [row.first for row in sinks[2].windows] == list(range(100))


def test_one_tracker_that_is_down_keeps_no_other_waiting(dead, sinks, monkeypatch):
    """The others have everything after the first round."""
    path = dead("a", "b")
    monkeypatch.setattr(
        LastingSink, "write", lambda sink, batch: _raise(DeliveryError("down")) if sink.key == "a" else None
    )
    first, second = deliver(path, figures_of, patience_s=0.3).feeds
    assert (first.left, first.reason) == (100, "down")
    assert second.done


def _raise(exc):
    raise exc


def test_a_run_that_is_gone_does_not_come_again(dead, sinks):
    """What it lacks is counted as dropped."""
    path = dead("a")
    LastingSink.refusing = True
    (found,) = deliver(path, figures_of).feeds
    assert found.done
    assert (found.dropped, found.left, found.reason) == (100, 0, "no such run")
    assert deliver(path, figures_of).feeds == ()


def test_a_sink_that_this_installation_lacks(dead, sinks):
    """It waits for one that has it."""
    path = dead("a")
    records = FeedWriter(path)
    records.put(Feed("c", "unheard-of", {"key": "c"}))
    records.close()
    found = {feed.key: feed for feed in deliver(path, figures_of).feeds}
    assert found["a"].done
    assert not found["c"].done
    assert "unheard-of" in found["c"].reason


def test_each_feed_has_its_environment(dead, sinks, monkeypatch):
    """Two servers may want two tokens."""
    path = dead("a", "b")
    monkeypatch.setenv("MEMTRACK_TEST_TOKEN", "")
    tokens = {"a": {"MEMTRACK_TEST_TOKEN": "for a"}, "b": {"MEMTRACK_TEST_TOKEN": "for b"}}
    deliver(path, figures_of, environments=tokens)
    assert [sink.environment_then for sink in sinks] == ["for a", "for b"]


def test_runs_are_left_open_if_the_settings_say_so(dead, sinks):
    """Everything arrives, and that is all."""
    deliver(dead("a", end_run="0"), figures_of)
    assert sinks[0].figures.verdict == "unknown_sigkill"
    assert sinks[0].concluded is None


def test_monitoring_that_was_stopped_has_no_verdict(dead, sinks, make_recording):
    """Who stopped to monitor did not die: the run is concluded as it would have been then."""
    from memtrack.recording.marks import MarkWriter

    path = dead("a", state=layout.STOPPED, verdict="")
    marks = MarkWriter(path)
    marks.request_stop()
    marks.close()
    assert deliver(path, figures_of).complete
    assert sinks[0].concluded.verdict == ""
    assert sinks[0].concluded.end_wall_s == 1_700_000_100.0


def test_the_verdict_is_not_for_runs_that_ended_long_before(dead, sinks):
    """Two were over when the process died, one of them last; one was still open."""
    ended = {"first": 10 * SECOND_NS, "second": 60 * SECOND_NS}
    deliver(dead("first", "second", ended=ended), figures_of)
    first, second = sinks
    assert (len(first.windows), len(second.windows)) == (10, 60)
    assert (first.figures.verdict, second.figures.verdict) == ("", "unknown_sigkill")
    assert first.figures.end_wall_s == 1_700_000_010.0
    sinks.clear()
    deliver(dead("first", "open", ended=ended), figures_of)
    assert [sink.figures.verdict for sink in sinks] == ["unknown_sigkill", "unknown_sigkill"]


def test_somebody_else_s_recording(dead, sinks):
    """It may name any address, to which our credentials would go."""
    path = dead("a")
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    os.chown(path, 65534, 65534)
    with pytest.raises(DeliveryError, match="belongs to user 65534"):
        deliver(path, figures_of)
    assert not sinks


def test_a_removed_file_through_its_descriptor(dead, sinks):
    """As the agent does when the folder was deleted."""
    path = dead("a")
    fd = os.open(path, os.O_RDONLY)
    os.unlink(path)
    assert deliver(f"/proc/self/fd/{fd}", figures_of, held_fd=fd).complete
    assert len(sinks[0].windows) == 100
    os.close(fd)
