"""The sink: windows to one MLflow run, through the client that the process has loaded."""

from __future__ import annotations

import os
from importlib import import_module
from time import time
from typing import TYPE_CHECKING, Any

import memtrack
from memtrack.errors import DeliveryError, MissingDependencyError
from memtrack_mlflow._run import Value, run_writer, translate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.sinks import Batch, Point, RunFigures

MAX_METRICS = 1000
"""What MLflow takes in one request (``mlflow.utils.validation``, since 1.0; one more is refused as a whole)."""

PREFIX = "system/"
"""Keys that begin so stand in the System metrics tab, over time, in a section named by all up to the last slash."""

SUMMARY = PREFIX + "memory/summary/"
"""Where a run's final figures stand.
A key with a slash that begins otherwise gets a section above the user's own charts."""


class MlflowSink:
    """Feeds one run: the one given, else the active one, else that of ``MLFLOW_RUN_ID``, else one that it makes.

    A run that it makes itself it also ends. That run never is the active one: ``mlflow.start_run()`` would not start
    another beside it. Each point carries the time of its window's end, and as its step the whole seconds since the run
    began, so that steps go on when a run is resumed. MLflow keeps a point that comes twice (same key, time, step and
    value) once, so a batch may be repeated.

    Args:
        run_id: The run to feed. Its server is the one that ``mlflow.get_tracking_uri()`` names now.
        start_time_ms: When that run began, in milliseconds of Unix time. Asked of MLflow if it is not given.
        recording: Path of the recording; not used.

    Raises:
        MissingDependencyError: MLflow is not installed.
        DeliveryError: MLflow could not make a run.
    """

    def __init__(self, *, run_id: str | None = None, start_time_ms: int | None = None, recording: str = "") -> None:
        mlflow = _mlflow()
        client = mlflow.MlflowClient(tracking_uri=mlflow.get_tracking_uri())
        self._owned = False
        if run_id is None:
            run = mlflow.active_run()
            if run is None and not os.environ.get("MLFLOW_RUN_ID"):
                run = translate(_create_run, client)
                self._owned = True
            run_id = run.info.run_id if run is not None else os.environ["MLFLOW_RUN_ID"]
            start_time_ms = run.info.start_time if run is not None else None
        self.run_id: str = run_id
        self._start_ms = start_time_ms
        self._run = run_writer(client, run_id)

    @property
    def key(self) -> str:
        return f"mlflow:{self.run_id}"[:40]

    def write(self, batch: Batch) -> None:
        points = list(batch.points())
        for first in range(0, len(points), MAX_METRICS):
            self._run.log(self._values(points[first : first + MAX_METRICS]), {})

    def finish(self, figures: RunFigures) -> None:
        timestamp_ms = round(1000 * time())
        tags = {f"memtrack.{key}": value for key, value in _tags(figures).items()}
        metrics = [Value(SUMMARY + key, value, timestamp_ms, 0) for key, value in _numbers(figures).items()]
        self._run.log(metrics, tags)

    def close(self) -> None:
        if self._owned:
            self._owned = False
            try:
                self._run.finish(round(1000 * time()))
            except DeliveryError:
                # the run stays open at a server that does not answer; the recording has everything
                return

    def _values(self, points: Iterable[Point]) -> list[Value]:
        if self._start_ms is None:
            self._start_ms = self._run.start_time_ms()
        start_ms = self._start_ms
        return [
            Value(PREFIX + name, value, timestamp_ms, max(timestamp_ms - start_ms, 0) // 1000)
            for name, value, timestamp_ms in points
        ]


def _create_run(client: Any) -> Any:
    """A run as ``mlflow.start_run()`` makes it, in the experiment that is set and with its tags, but not active."""
    fluent = import_module("mlflow.tracking.fluent")
    tags = import_module("mlflow.tracking.context.registry").resolve_tags()
    return client.create_run(experiment_id=fluent._get_experiment_id() or "0", tags=tags)


def _numbers(figures: RunFigures) -> dict[str, float]:
    """The final figures that are worth sorting runs by."""
    found = {
        "peak_rss_mib": figures.peak_rss_mib,
        "peak_tree_pss_mib": figures.peak_tree_pss_mib,
        "peak_step": figures.peak_step,
        "headroom_min_pct": figures.headroom_min_pct,
        "limit_mib": figures.limit_mib,
        "agent_rss_mib": figures.agent_rss_mib,
        "agent_cpu_pct": figures.agent_cpu_pct,
    }
    return {key: float(value) for key, value in found.items() if value is not None}


def _tags(figures: RunFigures) -> dict[str, str]:
    tags = {"version": memtrack.__version__, "windows": str(figures.windows), "dropped": str(figures.dropped)}
    if figures.peak_rss_mib is not None:
        tags["peak"] = f"{figures.peak_rss_mib:.1f} MiB ({figures.peak_label})"
        tags["peak_phase"] = figures.peak_phase
        if figures.peak_step is not None:
            tags["peak_step"] = str(figures.peak_step)
    if figures.limit_mib is not None and figures.headroom_min_pct is not None:
        tags["limit"] = f"{figures.limit_mib:.0f} MiB ({figures.limit_source})"
        tags["headroom_min"] = f"{figures.headroom_min_pct:.1f} %"
    if figures.agent_rss_mib is not None and figures.agent_cpu_pct is not None:
        tags["cost"] = f"agent {figures.agent_rss_mib:.1f} MiB, {figures.agent_cpu_pct:.2f} % of a core"
    return tags


def _mlflow() -> Any:
    try:
        return import_module("mlflow")
    except ImportError as exc:
        raise MissingDependencyError("the 'mlflow' sink", "mlflow") from exc
