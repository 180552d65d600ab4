"""The MLflow sink on a real SQLite store and on a real server."""

from __future__ import annotations

import logging
import socket
import sqlite3
import time

import pytest

import memtrack
from memtrack import metrics
from memtrack.errors import DeliveryError, RejectedError
from memtrack.sinks import Batch, Point, RunFigures, Sink
from memtrack.testing import SinkContract, example_batch
from tests.integrations.mlflow_lab import check_run

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy", reason="needs the full mlflow, with its SQL store")

from memtrack_mlflow import MlflowSink  # noqa: E402 - needs mlflow


@pytest.fixture(params=["sqlite", "server"])
def store(request):
    """Both kinds of store, set as MLflow's tracking URI for the test."""
    found = request.getfixturevalue("sqlite_store" if request.param == "sqlite" else "mlflow_server")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(found.uri)
    yield found
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


def closed_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class TestMlflowSink(SinkContract):
    @pytest.fixture(autouse=True)
    def _run(self, store):
        self.store = store
        self.run_id = store.client().create_run("0").info.run_id

    def make_sink(self):
        return MlflowSink(run_id=self.run_id)

    def read_back(self):
        series = self.store.series(self.run_id)
        return [Point(name, value, stamp) for name, found in series.items() for stamp, _, value in found]

    def make_broken_sink(self):
        if self.store.uri.startswith("sqlite"):
            database = sqlite3.connect(self.store.uri.removeprefix("sqlite:///"))
            database.execute("DROP TABLE latest_metrics")
            database.close()
            return self.make_sink()
        mlflow.set_tracking_uri(f"http://127.0.0.1:{closed_port()}")
        return self.make_sink()

    def test_a_batch_that_comes_again_is_there_once(self):
        """MLflow's history has each point once, also of a batch that overlaps one that has arrived."""
        sink = self.make_sink()
        windows = example_batch(120).windows
        for part in (windows[:80], windows[:80], windows[40:]):
            sink.write(Batch(part))
        sink.close()
        for key in ("memory/process/rss_mib", "memory/process/rss_peak_mib", "memory/tree/pss_mib"):
            history = self.store.client().get_metric_history(self.run_id, f"system/{key}")
            assert len(history) == len({point.timestamp for point in history}) == 120

    def test_values_that_are_no_numbers(self):
        """NaN and the infinities are taken, and do not keep the rest of the batch from arriving."""
        batch = example_batch(3, names=["memory/a/x_mib", "memory/b/x_mib", "memory/c/x_mib", "memory/d/x_mib"])
        odd = (float("nan"), float("inf"), float("-inf"))
        for row in batch.windows:
            for name, value in zip(("memory/a/x_mib", "memory/b/x_mib", "memory/c/x_mib"), odd, strict=True):
                row.cells[name].mean = value
        self.make_sink().write(batch)
        assert {len(found) for found in self.store.series(self.run_id).values()} == {3}

    def test_a_deleted_run_refuses(self):
        """Windows and figures for a run that was deleted are refused for good, and the error says why."""
        sink = self.make_sink()
        sink.write(example_batch(1))
        self.store.client().delete_run(self.run_id)
        with pytest.raises(RejectedError, match="active"):
            sink.write(example_batch(2))
        with pytest.raises(RejectedError, match="active"):
            sink.finish(RunFigures(peak_rss_mib=1.0))

    def test_a_run_that_is_not_there_refuses(self):
        """So does a run that never was."""
        with pytest.raises(RejectedError, match="RESOURCE_DOES_NOT_EXIST"):
            MlflowSink(run_id="0" * 32).write(example_batch(1))


# -- which run ------------------------------------------------------------------------------------------------------


def test_start_feeds_the_active_run(store, tmp_path):
    """``memtrack.start(sinks=["mlflow"])`` in a run feeds that run, and leaves it open."""
    with mlflow.start_run() as run:
        with memtrack.start(sinks=["mlflow"], interval=0.1, flush_interval=0.2) as monitor:
            since = time.time()
            time.sleep(0.6)
            until = time.time()
        assert mlflow.active_run().info.run_id == run.info.run_id
        assert store.client().get_run(run.info.run_id).info.status == "RUNNING"
    check_run(store, run.info.run_id, monitor.path, since, until, outer_s=1.0)
    assert "memtrack.peak" in store.client().get_run(run.info.run_id).data.tags


def test_start_without_a_run_makes_one_and_ends_it(store, tmp_path):
    """In the experiment that is set, with the tags that MLflow gives. The user's own runs are not in its way."""
    experiment = mlflow.set_experiment(f"sink {tmp_path.name}")
    try:
        with memtrack.start(sinks=["mlflow"], interval=0.1, flush_interval=0.2) as monitor:
            since = time.time()
            assert mlflow.active_run() is None
            with mlflow.start_run() as users:
                time.sleep(0.6)
            until = time.time()
        (run,) = (run for run in store.runs(experiment.name) if run.info.run_id != users.info.run_id)
    finally:
        mlflow.set_experiment(experiment_id="0")
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.tags["mlflow.user"] == users.data.tags["mlflow.user"]
    check_run(store, run.info.run_id, monitor.path, since, until, outer_s=1.0)
    assert not store.series(users.info.run_id)


def test_start_with_a_run_id(store, monkeypatch):
    """A sink made for a run feeds that one, whatever is active; ``MLFLOW_RUN_ID`` counts where nothing is."""
    named, by_variable = (store.client().create_run("0").info.run_id for _ in range(2))
    monkeypatch.setenv("MLFLOW_RUN_ID", by_variable)
    sinks: list[str | Sink] = [MlflowSink(run_id=named), "mlflow"]
    with memtrack.start(sinks=sinks, interval=0.1, flush_interval=0.2) as monitor:
        since = time.time()
        time.sleep(0.5)
        until = time.time()
    for run_id in (named, by_variable):
        check_run(store, run_id, monitor.path, since, until, outer_s=1.0)
        assert store.client().get_run(run_id).info.status == "RUNNING"


def test_a_run_that_is_deleted_while_it_is_fed(store, notices):
    """Said once; nothing is raised into the training, and its other sinks go on."""
    deleted, kept = (store.client().create_run("0").info.run_id for _ in range(2))
    sinks = [MlflowSink(run_id=deleted), MlflowSink(run_id=kept)]
    with memtrack.start(sinks=sinks, interval=0.1, flush_interval=0.1) as monitor:
        since = time.time()
        assert monitor.flush()
        store.client().delete_run(deleted)
        time.sleep(0.6)
        until = time.time()
    assert len(notices) == 1
    assert deleted in notices[0]
    assert "Training goes on" in notices[0]
    check_run(store, kept, monitor.path, since, until, outer_s=1.0)


# -- a server that cannot be reached --------------------------------------------------------------------------------


def test_an_unreachable_server_fails_at_once(monkeypatch, caplog):
    """One attempt, no word in the log: to try again, and to say so, is the relay's. MLflow's own settings stay."""
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"http://127.0.0.1:{closed_port()}")
    sink = MlflowSink(run_id="0" * 32, start_time_ms=0)
    start = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(DeliveryError, match="Connection refused"):
        sink.write(example_batch(1))
    assert time.monotonic() - start < 2
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 7


def test_errors_name_no_password(monkeypatch):
    """What is logged when a server does not answer names neither the user nor the password in its address."""
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"http://ada:s3cret@127.0.0.1:{closed_port()}/x?token=t0k")
    with pytest.raises(DeliveryError) as raised:
        MlflowSink(run_id="0" * 32).write(example_batch(1))
    assert not any(word in str(raised.value) for word in ("ada", "s3cret", "t0k"))


def test_with_mlflow_skinny(mlflow_server, train):
    """Without numpy, pandas and SQLAlchemy, which mlflow-skinny does not bring, a server can be used all the same."""
    done = train(
        """
absent = ("numpy", "pandas", "sqlalchemy", "alembic", "flask", "scipy", "sklearn")
sys.modules.update(dict.fromkeys(absent))
import memtrack
memtrack.autolog(interval=0.1, flush_interval=0.2)
import mlflow
with mlflow.start_run() as run:
    t0 = time.time()
    time.sleep(0.6)
    t1 = time.time()
assert not any(sys.modules.get(name) for name in absent)
report(run_id=run.info.run_id, t0=t0, t1=t1)
""",
        mlflow_server,
    )
    result = done.result
    series = check_run(mlflow_server, result["run_id"], done.recording, result["t0"], result["t1"])
    assert metrics.RSS in series
