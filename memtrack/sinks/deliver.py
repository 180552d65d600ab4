"""Delivery after death: what the process of a recording left undelivered, sent by another one."""

from __future__ import annotations

import os
from time import monotonic, sleep
from typing import TYPE_CHECKING, NamedTuple

from memtrack import registry
from memtrack.errors import DeliveryError, MemtrackError, RejectedError
from memtrack.recording.reader import RecordingReader
from memtrack.recording.standing import DEAD, LIVE, standing, waiting
from memtrack.sinks.feeds import Delivery, FeedWriter, holds, undelivered
from memtrack.sinks.relay import backoff_s
from memtrack.sinks.selection import hold_s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memtrack.recording.records import Feed
    from memtrack.sinks.base import Sink
    from memtrack.sinks.figures import RunFigures

    Figures = Callable[[RecordingReader, int, int | None], RunFigures]

LOCK_PAUSE_S = 0.05
STILL_LIVE = "its process is running, and delivers by itself"
LOCKED = "another process is delivering it"


class Delivered(NamedTuple):
    """What came of one feed. ``reason`` says why it has not got everything, or what was refused; "" if all went well.

    ``windows`` are those that its sink has taken, ``merged`` those of them that came merged, ``dropped`` those that it
    has refused for good, ``left`` those that still wait.
    """

    key: str
    sink: str
    windows: int
    merged: int
    dropped: int
    left: int
    done: bool
    reason: str


class Outcome(NamedTuple):
    """What came of a recording; ``skipped`` says why nothing was tried."""

    path: str
    feeds: tuple[Delivered, ...] = ()
    skipped: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to deliver."""
        return not self.skipped and all(feed.done for feed in self.feeds)


def deliver(
    path: str,
    figures: Figures,
    *,
    environments: Mapping[str, Mapping[str, str]] | None = None,
    patience_s: float = 0.0,
    wait_s: float = 0.0,
    held_fd: int = -1,
    on_progress: Callable[[str, int], None] | None = None,
) -> Outcome:
    """Deliver everything of a recording whose process does not any more, and end its runs if the settings say so.

    Exactly one process does so at a time: it holds a lock on the file, which goes with it. What is noted as delivered
    is not sent again; if a kill comes between sending and noting, one batch is.

    Args:
        figures: What computes the final figures of a part of the recording.
        environments: Variables that the sinks need, by the key of the feed; they are set in this process.
        patience_s: How long a tracker is tried that does not answer, counted from the last batch that got through.
        wait_s: How long to wait while another process delivers.
        held_fd: A descriptor of the file that has the lock already.
        on_progress: Called with the key of a feed and the windows delivered so far.

    Raises RecordingError if the file cannot be read.
    """
    with RecordingReader(path) as reader:
        if not waiting(reader):
            return Outcome(path)
        if standing(reader) == LIVE:
            return Outcome(path, skipped=STILL_LIVE)
        lock_fd = _lock(path, wait_s) if held_fd < 0 else held_fd
        if lock_fd is None:
            return Outcome(path, skipped=LOCKED)
        records = None
        try:
            _check_owner(lock_fd, path)
            records = FeedWriter(path)
            # looked for again: who had the lock before may have delivered them
            courses = [
                _Course(reader, records, feed, figures, (environments or {}).get(feed.key, {}), on_progress)
                for feed in waiting(reader)
            ]
            _walk(courses, patience_s)
            return Outcome(path, tuple(course.result() for course in courses))
        finally:
            if records is not None:
                records.close()
            if held_fd < 0:
                os.close(lock_fd)


class _Course:
    """One feed, tried until it is done or patience ends."""

    def __init__(
        self,
        reader: RecordingReader,
        records: FeedWriter,
        feed: Feed,
        figures: Figures,
        environment: Mapping[str, str],
        on_progress: Callable[[str, int], None] | None,
    ) -> None:
        self.feed = feed
        self.failures = 0
        self.retry_at = 0.0
        self.progress_at = monotonic()
        self.reason = ""
        self._reader = reader
        self._records = records
        self._figures = figures
        self._environment = environment
        self._on_progress = on_progress
        self._delivery: Delivery | None = None
        self._dropped = feed.dropped

    def attempt(self) -> None:
        """Deliver as much as can be."""
        os.environ.update(self._environment)
        try:
            if self._delivery is None:
                sink = self._open()
                selective = self._reader.fields.get("selective", "0") != "0"
                self._delivery = Delivery(
                    self._reader, sink, self.feed, self._metrics(), self._note, selective=selective
                )
                self._go_back(getattr(sink, "unsaved_s", 0.0), selective)
            self._delivery.send()
            self._delivery.send_rest()
            self._delivery.finish(self._final(), conclude=self._reader.fields.get("end_run", "1") != "0")
            self.reason = self._delivery.refusal and f"refused {self._delivery.refusal}"
        except Exception as exc:  # a tracker's client may raise anything
            self.reason = str(exc) if isinstance(exc, MemtrackError) else f"{type(exc).__name__}: {exc}"
            if isinstance(exc, RejectedError):
                self._give_up()
                return
            self.failures += 1
            self.retry_at = monotonic() + backoff_s(self.failures, exc)

    def result(self) -> Delivered:
        """How it went."""
        if self._delivery is not None and not self.feed.done:
            self._delivery.close()
        windows, merged = (self._delivery.windows, self._delivery.merged) if self._delivery is not None else (0, 0)
        left = 0 if self.feed.done else undelivered(self._reader, self.feed)
        dropped = self.feed.dropped - self._dropped
        return Delivered(self.feed.key, self.feed.sink, windows, merged, dropped, left, self.feed.done, self.reason)

    def _open(self) -> Sink:
        kind = registry.load_sink(self.feed.sink)
        reopen = getattr(kind, "reopen", None)
        if reopen is None:
            raise DeliveryError(f"this version's sink {self.feed.sink!r} cannot be opened again")
        sink: Sink = reopen(dict(self.feed.target))
        return sink

    def _go_back(self, unsaved_s: float, selective: bool) -> None:
        """Begin where the tracker may have lost with the process what it had taken, and before what was held back."""
        feed = self.feed
        sent = [(row.first, row.end_ns) for row in self._reader.windows() if row.first < feed.next and holds(feed, row)]
        if not sent:
            return
        sent_ns = sent[-1][1]
        since_ns: float = sent_ns
        if unsaved_s:
            end_ns = self._reader.pulse().mono_ns if feed.end_ns is None else feed.end_ns
            since_ns = end_ns - unsaved_s * 1e9
        if selective:
            since_ns = min(since_ns, sent_ns - 1e9 * hold_s((sent_ns - feed.start_ns) / 1e9))
        if unsaved_s or selective:
            feed.next = min((first for first, end_ns in sent if end_ns >= since_ns), default=feed.next)

    def _metrics(self) -> str | tuple[str, ...]:
        chosen = self._reader.fields.get("metrics", "default")
        return chosen if chosen in ("default", "all") else tuple(chosen.split(","))

    def _note(self, feed: Feed) -> None:
        self._records.put(feed)
        self.failures = 0
        self.progress_at = monotonic()
        if self._on_progress is not None:
            self._on_progress(feed.key, self._delivery.windows if self._delivery is not None else 0)

    def _final(self) -> RunFigures:
        """The figures of the feed's part. The verdict goes to the runs that were open in the end, and to the last."""
        feed, reader = self.feed, self._reader
        figures = self._figures(reader, feed.start_ns, feed.end_ns)
        if feed.end_ns is not None or figures.end_wall_s is None:
            figures = figures._replace(end_wall_s=_end_wall_s(reader, feed.end_ns))
        last_ns = max(other.start_ns if other.end_ns is None else other.end_ns for other in reader.feeds())
        if standing(reader) == DEAD and (feed.end_ns is None or feed.end_ns >= last_ns):
            return figures._replace(verdict=figures.verdict or "unknown")
        return figures._replace(
            verdict="", verdict_confidence="", verdict_text="", verdict_evidence=(), exit_code=None, signal=None
        )

    def _give_up(self) -> None:
        """The run cannot be opened and never will be: it must not come again at each start."""
        self.feed.dropped += undelivered(self._reader, self.feed)
        self.feed.done = True
        self._note(self.feed)


def _end_wall_s(reader: RecordingReader, end_ns: int | None) -> float:
    """A monotonic time, or else that of the last sample, as Unix time."""
    head = reader.head()
    mono_ns, wall_ns = head.mono_ns, head.wall_ns
    if not mono_ns:
        mono_ns, wall_ns = int(reader.fields.get("mono_ns", "0")), int(reader.fields.get("wall_ns", "0"))
    end_ns = max(mono_ns, reader.pulse().mono_ns) if end_ns is None else end_ns
    return (wall_ns + end_ns - mono_ns) / 1e9


def _walk(courses: list[_Course], patience_s: float) -> None:
    while True:
        now = monotonic()
        left = [one for one in courses if not one.feed.done]
        left = [one for one in left if not one.failures or max(one.retry_at, now) <= one.progress_at + patience_s]
        if not left:
            return
        soonest = min(left, key=lambda one: one.retry_at)
        sleep(max(soonest.retry_at - now, 0.0))
        soonest.attempt()


def _lock(path: str, wait_s: float) -> int | None:
    """A descriptor that holds the lock on the recording; None if somebody else has it for longer than ``wait_s``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    deadline = monotonic() + wait_s
    while True:
        try:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() >= deadline:
                os.close(fd)
                return None
            sleep(LOCK_PAUSE_S)
            continue
        except (ImportError, OSError):
            pass  # a system, or a file system, without locks
        return fd


def _check_owner(fd: int, path: str) -> None:
    """What a stranger wrote might send our credentials to his server."""
    owner = os.fstat(fd).st_uid
    if hasattr(os, "geteuid") and owner != os.geteuid():
        raise DeliveryError(f"{path} belongs to user {owner}: only its owner can deliver it")
