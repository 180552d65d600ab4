"""What every sink must do, done by those that need no tracker."""

from __future__ import annotations

import json

import pytest

from memtrack import metrics
from memtrack.sinks import Point
from memtrack.sinks.jsonl import JsonLinesSink
from memtrack.testing import RecordingSink, SinkContract, example_batch


class TestJsonLinesSink(SinkContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.path = tmp_path / "points.jsonl"

    def make_sink(self):
        return JsonLinesSink(path=str(self.path))

    def read_back(self):
        objects = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [Point(**found) for found in objects if "figures" not in found]

    def make_broken_sink(self):
        return JsonLinesSink(path="/dev/full")

    def test_file_is_private(self):
        """Nobody else may read the file."""
        self.make_sink().close()
        assert self.path.stat().st_mode & 0o777 == 0o600

    def test_figures_are_the_last_line(self):
        """The file ends with the final figures, by name."""
        from memtrack.sinks import RunFigures

        sink = self.make_sink()
        sink.write(example_batch(1))
        sink.finish(RunFigures(peak_rss_mib=12.5))
        sink.close()
        last = json.loads(self.path.read_text().splitlines()[-1])
        assert last["figures"]["peak_rss_mib"] == 12.5


class TestRecordingSink(SinkContract):
    @pytest.fixture(autouse=True)
    def _sink(self):
        self.sink = RecordingSink()

    def make_sink(self):
        return self.sink

    def read_back(self):
        return self.sink.points

    def make_broken_sink(self):
        self.sink.fail()
        return self.sink


def test_default_selection_of_points():
    """Unless the user chose otherwise, workers and details are left out, and RSS comes with its peak."""
    batch = example_batch(1, names=[metrics.RSS, metrics.ANON, metrics.WORKER_RSS.format(0), "memory/cache/used_mib"])
    chosen = type(batch)(batch.windows)
    assert {point.name for point in chosen.points()} == {
        "memory/process/rss_mib",
        "memory/process/rss_peak_mib",
        "memory/cache/used_mib",
    }
