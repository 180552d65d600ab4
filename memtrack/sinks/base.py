"""The protocol of a sink, and what it is handed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from memtrack.metrics import has_peak, peak_name, selected

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memtrack.sampling.window import Row
    from memtrack.sinks.figures import RunFigures


class Point(NamedTuple):
    """One point of a chart: series name, value in the unit that the name carries, wall clock in milliseconds."""

    name: str
    value: float
    timestamp_ms: int


class Batch:
    """Finished windows, oldest first, none twice unless a delivery has to be repeated.

    ``windows`` are the rows themselves, for sinks that want more than charts; ``points()`` is what to draw. ``chosen``
    are the points if not all are to be drawn; some may be of earlier windows.
    """

    def __init__(
        self,
        windows: Sequence[Row],
        metrics: str | tuple[str, ...] = "default",
        chosen: Sequence[Point] | None = None,
    ) -> None:
        self.windows = windows
        self._metrics = metrics
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self.windows)

    def halves(self) -> tuple[Batch, Batch] | None:
        """Two batches, the earlier and the later half; None if all is of one moment."""
        moments = sorted({point.timestamp_ms for point in self.points()})
        if len(moments) < 2:
            return None
        middle = moments[len(moments) // 2]
        parts = []
        for is_late in (False, True):
            windows = [row for row in self.windows if (_moment(row) >= middle) == is_late]
            chosen = self._chosen
            if chosen is not None:
                chosen = [point for point in chosen if (point.timestamp_ms >= middle) == is_late]
            parts.append(Batch(windows, self._metrics, chosen))
        return parts[0], parts[1]

    def points(self) -> Iterator[Point]:
        """For each window the mean of each selected metric, at the window's end, and its peak where it has a twin."""
        if self._chosen is not None:
            yield from self._chosen
            return
        for row in self.windows:
            timestamp_ms = _moment(row)
            for name, cell in row.cells.items():
                if selected(name, self._metrics):
                    yield Point(name, cell.mean, timestamp_ms)
                    if has_peak(name):
                        yield Point(peak_name(name), cell.max, timestamp_ms)


def _moment(row: Row) -> int:
    return round(row.end_wall_ns / 1e6)


class Sink(Protocol):
    """Takes batches of windows to one tracker. Called from one thread at a time.

    ``write`` and ``finish`` raise :class:`~memtrack.errors.DeliveryError` if the batch may be sent again later, and
    :class:`~memtrack.errors.RejectedError` if it never will be taken. A batch may come twice after a failure, so
    writing should be idempotent where the tracker allows it. Try it with :class:`memtrack.testing.SinkContract`.
    """

    @property
    def key(self) -> str:
        """Which run of which tracker: ``mlflow:RUN_ID``. At most 40 bytes. Cursors are kept under it."""

    def write(self, batch: Batch) -> None:
        """Deliver the batch. Returns when the tracker has it."""

    def finish(self, figures: RunFigures) -> None:
        """Deliver what the run ends with. Nothing is written afterwards."""

    def close(self) -> None:
        """Release what is held. Never raises. Called once, also after failures."""


class LastingSink(Sink, Protocol):
    """What a sink has besides if another process shall be able to deliver to its run: later, when this one is dead.

    All of it is optional; a sink that has no ``target``, or an empty one, gets nothing after its process.
    """

    @property
    def name(self) -> str:
        """The name under which ``memtrack.start(sinks=[name])`` finds the class."""

    @property
    def target(self) -> dict[str, str]:
        """Which run it is and where, for ``reopen``. About 300 bytes, no secrets, no relative paths: it stands in the
        recording. May change until the feed is over."""

    @property
    def unsaved_s(self) -> float:
        """Of a sink that was opened again: how much of what it had taken the tracker may have lost with the process, in
        seconds before its end. It gets those windows again."""

    def environment(self) -> dict[str, str]:
        """Environment variables that a process needs which delivers later. May be secret: it is kept in memory only.
        Asked now and then, from the relay's thread."""

    @classmethod
    def reopen(cls, target: dict[str, str]) -> LastingSink:
        """A sink for the same run in another process, without asking or changing what is active there.

        Raises DeliveryError or RejectedError, as ``write`` does.
        """

    def conclude(self, figures: RunFigures) -> None:
        """End the run if it is still open. Called after ``finish`` where nobody is left to do it: ``figures.verdict``
        tells how the process ended, "" that it only stopped to monitor. Raises as ``write`` does."""
