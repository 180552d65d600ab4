"""A sink that remembers, and what every sink must do: shipped as part of ``memtrack.testing``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from memtrack import metrics
from memtrack.errors import DeliveryError, RejectedError
from memtrack.sampling.window import Place, Row
from memtrack.sinks.base import Batch, Point
from memtrack.sinks.figures import RunFigures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memtrack.sinks.base import Sink

_SECOND_NS = 10**9


class RecordingSink:
    """A sink that keeps what it is given, and fails when it is told to."""

    name = "recording"

    def __init__(self, key: str = "recording", target: dict[str, str] | None = None) -> None:
        self.key = key
        self.target = target or {}
        """What ``reopen`` would be given; without one, nothing can be delivered after the process."""
        self.variables: dict[str, str] = {}
        """What ``environment`` gives."""
        self.concluded: RunFigures | None = None
        """What ``conclude`` was given."""
        self.batches: list[Batch] = []
        """What was taken, as it came."""
        self.figures: RunFigures | None = None
        self.closed = 0
        """How often it was closed."""
        self.attempts = 0
        """How often ``write`` or ``finish`` was called, also in vain."""
        self._failures: list[DeliveryError] = []

    def fail(self, times: int = 1, retry_after_s: float | None = None) -> None:
        """Let the next deliveries fail, as with a tracker that cannot be reached."""
        self._failures += [DeliveryError("told to fail", retry_after_s) for _ in range(times)]

    def refuse(self, times: int = 1) -> None:
        """Let the next deliveries be refused for good."""
        self._failures += [RejectedError("told to refuse") for _ in range(times)]

    @property
    def windows(self) -> list[Row]:
        """The windows of all batches."""
        return [row for batch in self.batches for row in batch.windows]

    @property
    def points(self) -> list[Point]:
        """The points of all batches."""
        return [point for batch in self.batches for point in batch.points()]

    def write(self, batch: Batch) -> None:
        """Keep the batch."""
        self._attempt()
        self.batches.append(batch)

    def finish(self, figures: RunFigures) -> None:
        """Keep the figures."""
        self._attempt()
        self.figures = figures

    def environment(self) -> dict[str, str]:
        """A copy of ``variables``."""
        return dict(self.variables)

    @classmethod
    def reopen(cls, target: dict[str, str]) -> RecordingSink:
        """A new one."""
        return cls(target.get("key", "recording"), target)

    def conclude(self, figures: RunFigures) -> None:
        """Keep the figures."""
        self._attempt()
        self.concluded = figures

    def close(self) -> None:
        """Count."""
        self.closed += 1

    def _attempt(self) -> None:
        self.attempts += 1
        if self._failures:
            raise self._failures.pop(0)


def example_batch(windows: int = 3, *, names: Sequence[str] = (metrics.RSS, metrics.TREE_PSS), first: int = 0) -> Batch:
    """Windows of one second that ended a short while ago, each metric with a mean, and a maximum that is higher."""
    now_ns = time.time_ns() // _SECOND_NS * _SECOND_NS
    rows = []
    for number in range(first, first + windows):
        start_ns = number * _SECOND_NS
        row = Row(number, start_ns)
        row.end_ns = start_ns + _SECOND_NS
        row.end_wall_ns = now_ns + row.end_ns
        row.step = number
        for at, name in enumerate(names):
            value = 100.0 + number + at / 8
            for part in (0.25, 0.75, 0.5):
                row.add(name, value + part, start_ns + round(part * 1e9), Place(number, 0, (1,)), 1.0)
        rows.append(row)
    return Batch(rows, "all")


class SinkContract:
    """What every sink must do: subclass it in a test module as ``class TestMySink(SinkContract)`` and fill the hooks.

    Each test makes its own sink with ``make_sink`` and looks at what the tracker has with ``read_back``.
    """

    def make_sink(self) -> Sink:
        """A new sink, to a place of its own that is empty."""
        raise NotImplementedError

    def read_back(self) -> Iterable[Point]:
        """All points that have arrived from the sinks that this test made, in any order, under our names."""
        raise NotImplementedError

    def make_broken_sink(self) -> Sink | None:
        """A sink whose tracker cannot be reached; None if there is no such thing."""
        return None

    # -- the contract -----------------------------------------------------------------------------------------------

    def test_points_arrive(self) -> None:
        """Every point of a batch arrives with its name, its value and its time stamp, and no other does."""
        batch = example_batch()
        sink = self.make_sink()
        sink.write(batch)
        sink.close()
        arrived = list(self.read_back())
        assert sorted(arrived) == sorted(batch.points())
        assert {metrics.RSS, metrics.peak_name(metrics.RSS), metrics.TREE_PSS} == {point.name for point in arrived}

    def test_batches_follow_each_other(self) -> None:
        """A later batch adds to what an earlier one has left."""
        batches = [example_batch(3), example_batch(2, first=3)]
        sink = self.make_sink()
        for batch in batches:
            sink.write(batch)
        sink.close()
        assert {*self.read_back()} == {point for batch in batches for point in batch.points()}

    def test_repeated_batch(self) -> None:
        """A batch that comes again, because its delivery seemed to have failed, makes no point that is wrong."""
        batch = example_batch()
        sink = self.make_sink()
        sink.write(batch)
        sink.write(batch)
        sink.close()
        assert {*self.read_back()} == {*batch.points()}

    def test_empty_batch(self) -> None:
        """A batch without windows is taken, and adds nothing."""
        sink = self.make_sink()
        sink.write(example_batch(0))
        sink.close()
        assert list(self.read_back()) == []

    def test_large_batch(self) -> None:
        """1,500 points in one batch arrive, whatever the tracker takes in one request."""
        batch = example_batch(100, names=[f"memory/example/q{number}_mib" for number in range(15)])
        sink = self.make_sink()
        sink.write(batch)
        sink.close()
        expected = {*batch.points()}
        assert len(expected) == 1500
        assert {*self.read_back()} == expected

    def test_finish(self) -> None:
        """The final figures are taken after the last batch, and change no point."""
        batch = example_batch()
        sink = self.make_sink()
        sink.write(batch)
        sink.finish(RunFigures(peak_rss_mib=512.0, peak_label="exact", peak_step=3, windows=len(batch)))
        sink.close()
        assert {*self.read_back()} >= {*batch.points()}

    def test_finish_without_figures(self) -> None:
        """A run in which nothing was measured ends like any other."""
        sink = self.make_sink()
        sink.finish(RunFigures())
        sink.close()

    def test_close_twice(self) -> None:
        """Closing again does no harm."""
        sink = self.make_sink()
        sink.close()
        sink.close()

    def test_key(self) -> None:
        """The key, under which the cursor is kept, is stable and short."""
        sink = self.make_sink()
        key = sink.key
        assert 0 < len(key.encode()) <= 40
        sink.write(example_batch(1))
        assert sink.key == key
        sink.close()

    def test_address(self) -> None:
        """Where a sink can be opened again, its address is short, and texts."""
        sink = self.make_sink()
        target = getattr(sink, "target", None) or {}
        assert all(isinstance(text, str) and text.isprintable() for text in (*target, *target.values()))
        assert sum(len(name) + len(text) for name, text in target.items()) <= 300
        if target:
            environment: dict[str, str] = getattr(sink, "environment", dict)()
            assert all(isinstance(text, str) for text in (*environment, *environment.values()))
        sink.close()

    def test_opened_again(self) -> None:
        """A sink that is opened again, as by another process, adds to what the first one has left, and can end it."""
        batches = [example_batch(3), example_batch(2, first=3)]
        sink = self.make_sink()
        sink.write(batches[0])
        again = self.reopen(sink)
        sink.close()
        if again is None:
            return
        again.write(batches[1])
        figures = RunFigures(peak_rss_mib=512.0, verdict="unknown_sigkill", verdict_text="killed", signal=9)
        again.finish(figures)
        conclude = getattr(again, "conclude", None)
        if conclude is not None:
            conclude(figures)
        again.close()
        assert {*self.read_back()} == {point for batch in batches for point in batch.points()}

    def reopen(self, sink: Sink) -> Sink | None:
        """Another sink with the address of this one; None if it has none."""
        target = getattr(sink, "target", None)
        return type(sink).reopen(dict(target)) if target else None  # type: ignore[attr-defined]

    def test_unreachable_tracker(self) -> None:
        """A tracker that cannot be reached is a DeliveryError that says so, and closing afterwards is quiet."""
        sink = self.make_broken_sink()
        if sink is None:
            import pytest

            pytest.skip("needs make_broken_sink()")
        raised: DeliveryError | None = None
        try:
            sink.write(example_batch(1))
        except DeliveryError as exc:
            raised = exc
        assert raised is not None, "the batch was taken"
        assert str(raised), "the error says nothing"
        assert not isinstance(raised, RejectedError), "the tracker may be reachable again later"
        sink.close()
