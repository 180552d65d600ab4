"""The sink: windows to one MLflow run, through the client that the process has loaded."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import memtrack
from memtrack.errors import DeliveryError, MissingDependencyError, RejectedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.sinks import Batch, Point, RunFigures

MAX_METRICS = 1000
"""What MLflow takes in one request (``mlflow.utils.validation``, since 1.0; one more is refused as a whole)."""

PREFIX = "system/"
"""Keys that begin so stand in the System metrics tab, over time; the section is the rest up to the last slash."""

REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "INVALID_STATE", "NOT_FOUND"}


class MlflowSink:
    """Feeds one run: the one given, else the active one, else one that it starts, as ``mlflow.log_metric`` would.

    A run that it starts itself it also ends. Each point carries the time of its window's end, and as its step the whole
    seconds since the run began, so that steps go on when a run is resumed. MLflow keeps a point that comes twice (same
    key, time, step and value) once, so a batch may be repeated.

    Args:
        run_id: The run to feed. Its server is the one that ``mlflow.get_tracking_uri()`` names now.
        recording: Path of the recording; not used.
    """

    def __init__(self, *, run_id: str | None = None, recording: str = "") -> None:
        mlflow = _mlflow()
        self._owned = False
        if run_id is None:
            run = mlflow.active_run()
            if run is None:
                run = mlflow.start_run()
                self._owned = True
            run_id = run.info.run_id
        self.run_id: str = run_id
        self._client = mlflow.MlflowClient(tracking_uri=mlflow.get_tracking_uri())
        self._entities = import_module("mlflow.entities")
        self._start_ms: int | None = None

    @property
    def key(self) -> str:
        return f"mlflow:{self.run_id}"[:40]

    def write(self, batch: Batch) -> None:
        points = list(batch.points())
        for first in range(0, len(points), MAX_METRICS):
            self._log(metrics=self._metrics(points[first : first + MAX_METRICS]))

    def finish(self, figures: RunFigures) -> None:
        tags = [self._entities.RunTag(f"memtrack.{key}", value) for key, value in _tags(figures).items()]
        timestamp_ms = round(1000 * _now_s())
        metrics = [
            self._entities.Metric(f"memtrack/{key}", value, timestamp_ms, 0) for key, value in _numbers(figures).items()
        ]
        self._log(metrics=metrics, tags=tags)

    def close(self) -> None:
        if self._owned:
            self._owned = False
            active = sys.modules["mlflow"].active_run()
            try:
                if active is not None and active.info.run_id == self.run_id:
                    sys.modules["mlflow"].end_run()
                else:
                    self._client.set_terminated(self.run_id)
            except Exception:
                # the run stays open at a server that does not answer; the recording has everything
                return

    def _metrics(self, points: Iterable[Point]) -> list[Any]:
        start_ms = self._run_start_ms()
        make = self._entities.Metric
        return [
            make(PREFIX + point.name, point.value, point.timestamp_ms, max(point.timestamp_ms - start_ms, 0) // 1000)
            for point in points
        ]

    def _run_start_ms(self) -> int:
        if self._start_ms is None:
            self._start_ms = int(_translate(self._client.get_run, self.run_id).info.start_time)
        return self._start_ms

    def _log(self, **what: Any) -> None:
        _translate(self._client.log_batch, self.run_id, **what)


def _translate(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call MLflow; what it raises becomes DeliveryError, or RejectedError where trying again is pointless."""
    try:
        return call(*args, **kwargs)
    except Exception as exc:
        code = str(getattr(exc, "error_code", ""))
        text = str(exc).partition("\n")[0]
        raise (RejectedError if code in REFUSED else DeliveryError)(f"{code or type(exc).__name__}: {text}") from exc


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


def _now_s() -> float:
    from time import time

    return time()


def _mlflow() -> Any:
    try:
        return import_module("mlflow")
    except ImportError as exc:
        raise MissingDependencyError("the 'mlflow' sink", "mlflow") from exc
