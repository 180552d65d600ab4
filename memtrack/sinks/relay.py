"""The relay: the one thread of memtrack in the training process. It hands finished windows to the sinks."""

from __future__ import annotations

import random
import threading
from time import monotonic, sleep
from typing import TYPE_CHECKING

from memtrack.errors import DeliveryError
from memtrack.notices import warn_once
from memtrack.recording import records
from memtrack.recording.reader import RecordingReader
from memtrack.sinks.feeds import Delivery, FeedWriter, Halted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memtrack.sinks.base import Sink
    from memtrack.sinks.figures import RunFigures

    Environments = Mapping[str, Mapping[str, str]]

BACKOFF_S = (1.0, 10.0)
"""First and longest pause after a failure. The longest is the default time between two flushes: a tracker that is
back has what is new within seconds, and one that is down is asked no more often than one that is up."""
PATIENCE_S = 1.6
"""The most that the end of one feed is waited for, over all the calls that wait for it. With what the agent takes to
stop, an exit is delayed by less than 2 s."""
CUT_TIMEOUT_S = 1.0


class Feed:
    """One sink, and how the delivery of its part of the recording goes."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.sink = delivery.sink
        self.record = delivery.record
        self.key = delivery.record.key
        self.cut = 0
        """The request to cut that must be served before the feed can be finished."""
        self.until: int | None = None
        """How many windows there were when it ended, about."""
        self.is_flushed = False
        """Whether points that may turn out superfluous are wanted now."""
        self.done = threading.Event()
        self.failures = 0
        self.retry_at = 0.0
        self.patience_s = PATIENCE_S

    @property
    def end_ns(self) -> int | None:
        """Monotonic time at which the feed was ended."""
        return self.record.end_ns


class Relay:
    """Drains a recording into sinks, every ``flush_interval_s`` and whenever a feed ends.

    A sink that fails is tried again after 1 s, then 2, up to 10, with jitter, or when it said; its windows wait in the
    recording. What it refuses for good is lost, and counted. Thread-safe; the thread is a daemon and is started with
    the first feed. ``hand_over`` is told, by the keys of the feeds, of the environment that their sinks need in another
    process; ``on_lag``, after each turn, how many windows the feed has not got that is furthest behind.
    """

    def __init__(
        self,
        path: str,
        *,
        flush_interval_s: float,
        metrics: str | tuple[str, ...],
        selective: bool,
        figures: Callable[[int, int | None], RunFigures],
        hand_over: Callable[[Environments], None],
        on_turn: Callable[[], None],
        on_lag: Callable[[int], None],
    ) -> None:
        self._reader = RecordingReader(path)
        self._records = FeedWriter(path)
        self._flush_interval_s = flush_interval_s
        self._metrics = metrics
        self._selective = selective
        self._figures = figures
        self._hand_over = hand_over
        self._on_turn = on_turn
        self._on_lag = on_lag
        self._feeds: list[Feed] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """Held while a record is written: after ``close`` none is, because the recording is somebody else's then."""
        self._changed = threading.Condition()
        """A feed is done, or has failed."""
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, sink: Sink, start_ns: int, first: int) -> Feed:
        """Feed a sink with the windows from ``start_ns`` on.

        ``first`` is how many windows there were at some moment before that. Counted here, after it, it would be too
        many, should this thread have had to wait meanwhile: a window that is the sink's would be passed over.
        """
        with self._lock:
            taken = {feed.key for feed in self._feeds}
            record = records.Feed(_free_key(sink.key, taken), *_address(sink))
            record.start_ns, record.next = start_ns, first
            _check_room(record)
            feed = Feed(Delivery(self._reader, sink, record, self._metrics, self._note, selective=self._selective))
            self._note(record)
            self._feeds.append(feed)
            self._offer_environments()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memtrack-relay", daemon=True)
                self._thread.start()
        return feed

    def end(self, feed: Feed, end_ns: int, cut: int, timeout_s: float) -> bool:
        """Deliver what is left of a feed up to ``end_ns`` and finish its sink; wait for that as ``wait`` does.

        ``cut`` is the request to the agent to finish the window; see ``MarkWriter.request_cut``. What cannot be
        delivered in time is tried again as long as the relay runs. Returns whether it is done.
        """
        feed.cut = cut
        feed.until = self._reader.head().windows + 1
        record = feed.record
        record.end_ns = end_ns
        try:
            if record.target:
                record.target = _address(feed.sink)[1]
            self._note(record)
        except Exception as exc:  # the thread will try again
            warn_once(f"ending {feed.key}", f"the end of {feed.key} could not be noted ({type(exc).__name__}: {exc}).")
        feed.retry_at = 0.0
        self._wake.set()
        return self.wait(feed, timeout_s)

    def wait(self, feed: Feed, timeout_s: float) -> bool:
        """Wait until a feed that has been ended is done, and return whether it is.

        Not longer than ``timeout_s``, nor than what is left of its ``PATIENCE_S``, nor at all when the next try would
        come later than that.
        """
        start = monotonic()
        deadline = start + min(timeout_s, feed.patience_s)
        with self._changed:
            while not (feed.done.is_set() or self._closing or feed.retry_at > deadline):
                if not self._changed.wait(max(deadline - monotonic(), 0.0)):
                    break
        feed.patience_s = max(feed.patience_s - (monotonic() - start), 0.0)
        return feed.done.is_set()

    def flush(self, timeout_s: float) -> bool:
        """Deliver what is there now. Returns whether every sink has it."""
        wanted = self._reader.head().windows
        with self._lock:
            for feed in self._feeds:
                feed.is_flushed = True
        self._wake.set()
        deadline = monotonic() + timeout_s
        while monotonic() < deadline:
            with self._lock:
                if all(feed.record.next >= wanted and not feed.is_flushed for feed in self._feeds):
                    return True
            sleep(0.005)
        return False

    def close(self, timeout_s: float) -> None:
        """Stop the thread; feeds should have been ended. Waits at most ``timeout_s``; hardly at all if not.

        What was not delivered is left to whoever comes next: from here on nothing is noted in the recording.
        """
        with self._writing:
            self._closing = True
        self._wake.set()
        if self._thread is not None:
            with self._lock:
                idle = all(feed.done.is_set() for feed in self._feeds)
            self._thread.join(timeout_s if idle else min(timeout_s, 0.1))
            if self._thread.is_alive():
                return  # it hangs in a tracker's client; the process may exit, it is a daemon
        self._records.close()
        self._reader.close()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._pause_s())
            self._wake.clear()
            self._on_turn()
            with self._lock:
                feeds = list(self._feeds)
            for feed in feeds:
                if monotonic() >= feed.retry_at:
                    self._serve(feed)
                    with self._changed:
                        self._changed.notify_all()
            with self._lock:
                self._feeds = [feed for feed in self._feeds if not feed.done.is_set()]
                self._offer_environments()
            self._on_lag(self._lag())
        for feed in self._feeds:
            feed.delivery.close()

    def _pause_s(self) -> float:
        now = monotonic()
        waits = [max(feed.retry_at - now, 0.05) for feed in self._feeds if feed.failures]
        return min([self._flush_interval_s, *waits])

    def _lag(self) -> int:
        """How many windows the feed has not got that is furthest behind."""
        windows = self._reader.head().windows
        ends = [(windows if feed.until is None else min(windows, feed.until), feed) for feed in self._feeds]
        return max([0, *(end - feed.record.next for end, feed in ends)])

    def _serve(self, feed: Feed) -> None:
        ending = feed.end_ns is not None
        delivery = feed.delivery
        try:
            if ending:
                self._await_cut(feed)
            # asked before: what is finished while this is being sent is not among it
            wants_all = ending or feed.is_flushed
            delivery.send()
            if wants_all:
                delivery.send_rest()
                feed.is_flushed = False
            if ending:
                delivery.finish(self._figures(feed.record.start_ns, feed.end_ns))
                feed.done.set()
            feed.failures = 0
        except Halted:
            return
        except Exception as exc:  # a tracker's client may raise anything
            self._back_off(feed, exc)
        if delivery.refusal:
            warn_once(f"rejected {feed.key}", f"{feed.key} refused {delivery.refusal}.")

    def _note(self, record: records.Feed) -> None:
        with self._writing:
            if self._closing:
                raise Halted
            self._records.put(record)

    def _offer_environments(self) -> None:
        """Tell what is needed now: a token may have been set, or exchanged, since the sink was made."""
        environments = {}
        for feed in self._feeds:
            ask = getattr(feed.sink, "environment", None)
            if ask is not None and feed.record.target:
                try:
                    environments[feed.key] = ask()
                except Exception as exc:  # as with anything a sink does
                    warn_once(f"environment {feed.key}", f"{feed.key} cannot be handed over ({type(exc).__name__}).")
        self._hand_over(environments)

    def _await_cut(self, feed: Feed) -> None:
        deadline = monotonic() + CUT_TIMEOUT_S
        while self._reader.head().cut < feed.cut and monotonic() < deadline:
            sleep(0.002)

    def _back_off(self, feed: Feed, exc: Exception) -> None:
        feed.failures += 1
        wait_s = backoff_s(feed.failures, exc)
        feed.retry_at = monotonic() + wait_s
        warn_once(
            f"failing {feed.key}",
            f"{feed.key} does not take its windows ({type(exc).__name__}: {exc}). They wait in the recording.",
        )


def backoff_s(failures: int, exc: Exception) -> float:
    """How long to wait after so many failures in a row, in seconds; what the tracker asked for counts."""
    wait_s: float = min(BACKOFF_S[0] * 2 ** min(failures - 1, 10), BACKOFF_S[1]) * random.uniform(0.5, 1.0)
    if isinstance(exc, DeliveryError) and exc.retry_after_s is not None:
        wait_s = max(wait_s, exc.retry_after_s)
    return wait_s


def _address(sink: Sink) -> tuple[str, dict[str, str]]:
    """Name and target of a sink, for who delivers after the process; empty for one that cannot be made again."""
    target = getattr(sink, "target", None)
    return getattr(sink, "name", ""), dict(target) if target else {}


def _free_key(key: str, taken: set[str]) -> str:
    """The key, with a number behind it while the same run, resumed, is still owed what it was fed before."""
    number = 1
    free = key
    while free in taken:
        number += 1
        free = f"{key}#{number}"
    return free


def _check_room(record: records.Feed) -> None:
    """A target of which not all fits is worth nothing."""
    found = records.Feed.unpack(record.pack(1))
    if found is None or found[1].target != record.target:
        record.target = {}
        warn_once(
            f"target {record.key}",
            f"the address of {record.key} is too long to be kept: what is undelivered when this process dies stays so.",
        )
