"""The W&B sink by itself: names, the contract of sinks, addresses, and versions that it does not know."""

from __future__ import annotations

import os

import pytest

from memtrack import metrics
from memtrack.errors import DeliveryError, MonitorError
from memtrack.sinks import Batch, Point, RunFigures
from memtrack.testing import SinkContract, example_batch
from tests.integrations.wandb_lab import SETTINGS, folders, inspect, milliseconds, read_run

wandb = pytest.importorskip("wandb")

from memtrack_wandb import WandbSink  # noqa: E402
from memtrack_wandb._figures import exit_code_of, summary_of  # noqa: E402
from memtrack_wandb._stream import held, series_key  # noqa: E402
from memtrack_wandb._where import MAX_TARGET  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _settings():
    """W&B as the scripts have it, in this process."""
    before = dict(os.environ)
    os.environ.update(SETTINGS)
    yield
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def start(tmp_path):
    """``start()`` makes a run in ``tmp_path``; what is not finished at the end is finished."""
    started = []

    def init(**kwargs):
        quiet = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True, x_save_requirements=False)
        run = wandb.init(project="p", dir=str(tmp_path), reinit="create_new", settings=quiet, **kwargs)
        started.append(run)
        return run

    yield init
    for run in started:
        run.finish()


NAMES = {series_key(name): name for name in (metrics.RSS, metrics.peak_name(metrics.RSS), metrics.TREE_PSS)}


class TestWandbSink(SinkContract):
    @pytest.fixture(autouse=True)
    def _run(self, start, tmp_path):
        self.start = start
        self.root = tmp_path
        self.runs = []

    def make_sink(self):
        self.runs.append(self.start())
        return WandbSink(run=self.runs[-1])

    def reopen(self, sink):
        # in life the process that had the run is dead
        sink._run.finish()
        return super().reopen(sink)

    def read_back(self):
        for run in self.runs:
            run.finish()
        for run in self.runs:
            for timestamp_ms, items in read_run(self.root, run.id).stats:
                for key, value in items.items():
                    yield Point(NAMES.get(key, key), value, timestamp_ms)

    def make_broken_sink(self):
        sink = self.make_sink()
        self.runs[-1].finish()
        return sink


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "writer", "key"),
    [
        ("memory/process/rss_mib", "", "proc.memory.rssMB/l:memtrack"),
        ("memory/process/rss_peak_mib", "", "proc.memory.rssMB/l:peak"),
        ("memory/tree/pss_mib", "", "proc.memory.rssMB/l:tree-pss"),
        ("memory/worker/1/rss_mib", "", "proc.memory.rssMB/l:worker-1"),
        ("memory/worker/rest/rss_mib", "", "proc.memory.rssMB/l:worker-rest"),
        ("memory/host/available_mib", "", "memory/host/available_mib"),
        ("memory/process/rss_mib", "node-2", "proc.memory.rssMB/l:node-2-memtrack"),
        ("memory/host/available_mib", "node-2", "memory/host/available_mib/l:node-2"),
    ],
)
def test_names_in_the_stream(name, writer, key):
    """What W&B has a chart for stands in it under a label; several writers to one run are told apart."""
    assert series_key(name, writer) == key


def test_keys_are_never_those_of_wandb_itself():
    """Whatever W&B measures, its series is not written to."""
    names = [metric.name for metric in metrics.TABLE]
    peaks = [metrics.peak_name(name) for name in names if metrics.has_peak(name)]
    keys = [series_key(name) for name in (*names, *peaks)]
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("memory/") or "/l:" in key for key in keys)


# -- addresses and figures ------------------------------------------------------------------------------------------


def test_address_of_a_run_with_long_names(start):
    """What does not fit is left out of the address, and the id, without which it is worth nothing, stays."""
    run = start(id="i" * 60, name="n" * 120, group="g" * 120, job_type="train")
    sink = WandbSink(run=run)
    assert len(sink.key.encode()) <= 40
    target = sink.target
    assert sum(len(name) + len(text) for name, text in target.items()) <= MAX_TARGET
    assert target["id"] == "i" * 60
    assert target["mode"] == "offline"
    assert os.path.isabs(target["dir"])
    assert target["job_type"] == "train"


def test_environment_is_handed_over_without_the_service(start, monkeypatch):
    """A key that stands in a variable goes along; the address of W&B's process, which dies with this one, does not."""
    sink = WandbSink(run=start())
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    monkeypatch.setenv("WANDB_SERVICE", "2-4711-unix-/tmp/socket")
    environment = sink.environment()
    assert environment["WANDB_API_KEY"] == "f" * 40
    assert "WANDB_SERVICE" not in environment
    assert "f" * 40 not in str(sink.target)


@pytest.mark.parametrize(
    ("figures", "code"),
    [
        (RunFigures(), 0),
        (RunFigures(verdict="clean", exit_code=0), 0),
        (RunFigures(verdict="failed", exit_code=3), 3),
        (RunFigures(verdict="out_of_memory", signal=9), 137),
        (RunFigures(verdict="unknown"), 1),
    ],
)
def test_exit_code_of_a_run_whose_process_has_died(figures, code):
    """As a shell would have it; not 0 unless it is known to have ended well."""
    assert exit_code_of(figures) == code


def test_verdict_in_the_summary():
    """A bad end is told with its evidence, a good one is not worth a word."""
    bad = RunFigures(
        peak_rss_mib=512.5,
        verdict="out_of_memory",
        verdict_confidence="confirmed",
        verdict_text="killed by the kernel",
        verdict_evidence=("oom_kill went from 0 to 1", "97 % of 2 GiB in use"),
    )
    found = summary_of(bad)
    assert found["memtrack/peak_rss_mib"] == 512.5
    assert found["memtrack/verdict"] == "out of memory (confirmed)"
    assert found["memtrack/evidence"] == "oom_kill went from 0 to 1\n97 % of 2 GiB in use"
    assert "memtrack/verdict" not in summary_of(RunFigures(verdict="clean"))


# -- what is not as expected ----------------------------------------------------------------------------------------


def test_no_run_is_one_clear_error():
    """Without a run there is nothing to feed, and it is said what to do."""
    with pytest.raises(MonitorError, match=r"wandb\.init"):
        WandbSink()


def test_active_run_is_found(start):
    """Without an argument it is the newest run, also if it is not the global one."""
    start()
    newest = start()
    assert wandb.run is None
    assert WandbSink().key == f"wandb:{newest.id}"


def test_unknown_version_gets_the_figures(start, monkeypatch, notices, tmp_path):
    """Where the stream is not what it was, that is said once, and the public part is used."""
    run = start()
    monkeypatch.setattr(type(run._interface), "_publish", None)
    sink = WandbSink(run=run)
    sink.write(example_batch())
    monkeypatch.undo()
    sink.finish(RunFigures(peak_rss_mib=77.5))
    run.finish()
    read = read_run(tmp_path, run.id)
    assert not read.stats
    assert read.summary["memtrack/peak_rss_mib"] == 77.5
    assert [text for text in notices if "version of W&B" in text]


def test_disabled_run_takes_everything():
    """A run in disabled mode costs nothing and complains of nothing."""
    run = wandb.init(mode="disabled")
    sink = WandbSink(run=run)
    sink.write(example_batch())
    sink.finish(RunFigures(peak_rss_mib=1.0))
    sink.close()
    assert sink.target == {}
    run.finish()


def test_what_comes_after_the_end_is_not_taken(start):
    """W&B drops it without a word; here it waits for who delivers later."""
    run = start()
    sink = WandbSink(run=run)
    run.finish()
    with pytest.raises(DeliveryError, match="finished"):
        sink.write(example_batch())
    with pytest.raises(DeliveryError, match="finished"):
        sink.finish(RunFigures())


def test_what_a_torn_file_holds(start, tmp_path):
    """As much of a file as is whole is known, which is what W&B's own reader shows."""
    run = start()
    sink = WandbSink(run=run)
    for first in range(0, 600, 60):
        sink.write(example_batch(60, first=first))
    run.finish()
    assert len(read_run(tmp_path, run.id).stats) == 600
    (folder,) = folders(tmp_path, run.id)
    (path,) = folder.glob("*.wandb")
    assert path.stat().st_size > 1 << 16
    known = {milliseconds(record["stats"]["timestamp"]) for record in inspect(folder) if record["type"] == "stats"}
    found = held(str(tmp_path), run.id)
    assert found.keys() == known
    assert len(known) == 600
    assert {*found.values()} == {frozenset(series_key(point.name) for point in example_batch().points())}
    assert held(str(tmp_path), run.id[:-1]) == {}
    os.truncate(path, int(path.stat().st_size * 0.6))
    known = {milliseconds(record["stats"]["timestamp"]) for record in inspect(folder) if record["type"] == "stats"}
    assert held(str(tmp_path), run.id).keys() == known
    assert 200 < len(known) < 600
    os.truncate(path, 0)
    assert held(str(tmp_path), run.id) == {}


def test_points_that_a_file_lacks_of_a_moment_that_it_has(start, tmp_path):
    """Of one window, one series was sent and the other held back, as selective logging does; who delivers after the
    death sends what is not there, and what is there not again."""
    run = start()
    points = list(example_batch(2).points())
    sink = WandbSink(run=run)
    sink.write(Batch((), "all", [point for point in points if point.name == metrics.RSS]))
    target = dict(sink.target)
    run.finish()
    again = WandbSink.reopen(target)
    again.write(Batch((), "all", points))
    again.finish(RunFigures(verdict="killed", signal=9))
    again.conclude(RunFigures(verdict="killed", signal=9))
    again.close()
    series = read_run(tmp_path, run.id).series
    arrived = sorted((key, *one) for key, found in series.items() for one in found)
    assert arrived == sorted((series_key(point.name), point.timestamp_ms, point.value) for point in points)
