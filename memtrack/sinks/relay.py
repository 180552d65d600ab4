"""The relay: the one thread of memtrack in the training process. It hands finished windows to the sinks."""

from __future__ import annotations

import random
import threading
from time import monotonic, sleep
from typing import TYPE_CHECKING

from memtrack.errors import DeliveryError, RejectedError
from memtrack.notices import warn_once
from memtrack.recording import records
from memtrack.recording.reader import RecordingReader
from memtrack.sinks.base import Batch
from memtrack.sinks.feeds import FeedWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memtrack.sampling.window import Row
    from memtrack.sinks.base import RunFigures, Sink

BATCH_WINDOWS = 64
BACKOFF_S = (1.0, 10.0)
"""First and longest pause after a failure. The longest is the default time between two flushes: a tracker that is
back has what is new within seconds, and one that is down is asked no more often than one that is up."""
PATIENCE_S = 1.6
"""The most that the end of one feed is waited for, over all the calls that wait for it. With what the agent takes to
stop, an exit is delayed by less than 2 s."""
CUT_TIMEOUT_S = 1.0


class Feed:
    """One sink and its part of the recording: the windows whose middle lies between ``start_ns`` and ``end_ns``."""

    def __init__(self, sink: Sink, start_ns: int, first: int) -> None:
        self.sink = sink
        self.key = sink.key
        self.record = records.Feed(self.key, *_address(sink))
        self.record.start_ns, self.record.next = start_ns, first
        self.start_ns = start_ns
        self.end_ns: int | None = None
        self.cut = 0
        """The request to cut that must be served before the feed can be finished."""
        self.next = first
        """Number of the first window that was not delivered."""
        self.done = threading.Event()
        self.failures = 0
        self.retry_at = 0.0
        self.patience_s = PATIENCE_S
        self.dropped = 0
        """Windows that the tracker refused for good."""

    def holds(self, row: Row) -> bool:
        """Whether a window is this feed's."""
        middle = (row.start_ns + row.end_ns) // 2
        return middle >= self.start_ns and (self.end_ns is None or middle < self.end_ns)


class Relay:
    """Drains a recording into sinks, every ``flush_interval_s`` and whenever a feed ends.

    A sink that fails is tried again after 1 s, then 2, up to 10, with jitter, or when it said; its windows wait in the
    recording. One that refuses a batch for good loses that batch, which is counted. Thread-safe; the thread is a daemon
    and is started with the first feed.
    """

    def __init__(
        self,
        path: str,
        *,
        flush_interval_s: float,
        metrics: str | tuple[str, ...],
        figures: Callable[[int, int | None], RunFigures],
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self._reader = RecordingReader(path)
        self._records = FeedWriter(path)
        self._flush_interval_s = flush_interval_s
        self._metrics = metrics
        self._figures = figures
        self._on_turn = on_turn
        self._feeds: list[Feed] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        """A feed is done, or has failed."""
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, sink: Sink, start_ns: int) -> Feed:
        """Feed a sink with the windows from ``start_ns`` on."""
        feed = Feed(sink, start_ns, self._reader.head().windows)
        with self._lock:
            self._feeds.append(feed)
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
        feed.end_ns = end_ns
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
        self._wake.set()
        deadline = monotonic() + timeout_s
        while monotonic() < deadline:
            with self._lock:
                if all(feed.next >= wanted for feed in self._feeds):
                    return True
            sleep(0.005)
        return False

    def close(self, timeout_s: float) -> None:
        """Stop the thread; feeds should have been ended. Waits at most ``timeout_s``; hardly at all if not."""
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
        for feed in self._feeds:
            _close(feed)

    def _pause_s(self) -> float:
        now = monotonic()
        waits = [max(feed.retry_at - now, 0.05) for feed in self._feeds if feed.failures]
        return min([self._flush_interval_s, *waits])

    def _serve(self, feed: Feed) -> None:
        ending = feed.end_ns is not None
        try:
            if ending:
                self._await_cut(feed)
            for batch in self._batches(feed):
                self._write(feed, batch)
            if ending:
                self._finish(feed)
            feed.failures = 0
        except Exception as exc:  # a tracker's client may raise anything
            self._back_off(feed, exc)

    def _batches(self, feed: Feed) -> Iterator[list[Row]]:
        rows: list[Row] = []
        for row in self._reader.windows(feed.next):
            rows.append(row)
            if len(rows) == BATCH_WINDOWS:
                yield rows
                rows = []
        if rows:
            yield rows

    def _write(self, feed: Feed, rows: list[Row]) -> None:
        mine = [row for row in rows if feed.holds(row)]
        if mine:
            try:
                feed.sink.write(Batch(mine, self._metrics))
            except RejectedError as exc:
                feed.dropped += len(mine)
                warn_once(f"rejected {feed.key}", f"{feed.key} refused {len(mine)} windows: {exc}.")
        feed.next = rows[-1].last + 1
        self._note(feed)

    def _finish(self, feed: Feed) -> None:
        figures = self._figures(feed.start_ns, feed.end_ns)
        try:
            feed.sink.finish(figures._replace(dropped=figures.dropped + feed.dropped))
        except RejectedError as exc:
            warn_once(f"rejected {feed.key}", f"{feed.key} refused the final figures: {exc}.")
        _close(feed)
        feed.record.done = True
        self._note(feed)
        feed.done.set()

    def _note(self, feed: Feed) -> None:
        record = feed.record
        record.next, record.end_ns, record.dropped = feed.next, feed.end_ns, feed.dropped
        self._records.put(record)

    def _await_cut(self, feed: Feed) -> None:
        deadline = monotonic() + CUT_TIMEOUT_S
        while self._reader.head().cut < feed.cut and monotonic() < deadline:
            sleep(0.002)

    def _back_off(self, feed: Feed, exc: Exception) -> None:
        feed.failures += 1
        wait_s = min(BACKOFF_S[0] * 2 ** (feed.failures - 1), BACKOFF_S[1]) * random.uniform(0.5, 1.0)
        if isinstance(exc, DeliveryError) and exc.retry_after_s is not None:
            wait_s = max(wait_s, exc.retry_after_s)
        feed.retry_at = monotonic() + wait_s
        warn_once(
            f"failing {feed.key}",
            f"{feed.key} does not take its windows ({type(exc).__name__}: {exc}). They wait in the recording.",
        )


def _address(sink: Sink) -> tuple[str, dict[str, str]]:
    """Name and target of a sink, for who delivers after the process; empty for one that cannot be made again."""
    target = getattr(sink, "target", None)
    return getattr(sink, "name", ""), dict(target) if target else {}


def _close(feed: Feed) -> None:
    try:
        feed.sink.close()
    except Exception as exc:  # a sink should not, but it is not the training's fault
        warn_once(f"closing {feed.key}", f"{feed.key} could not be closed ({type(exc).__name__}: {exc}).")
