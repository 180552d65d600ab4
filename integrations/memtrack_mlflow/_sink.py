"""The sink: windows to one MLflow run, through the client that the process has loaded."""

from __future__ import annotations

import os
from importlib import import_module
from time import time
from typing import TYPE_CHECKING, Any

from memtrack.errors import DeliveryError, MissingDependencyError, RejectedError
from memtrack_mlflow import _where
from memtrack_mlflow._figures import numbers_of, status_of, tags_of
from memtrack_mlflow._run import Value, reason, run_writer, translate
from memtrack_mlflow._table import log_table

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
        run_id: The run to feed.
        tracking_uri: Where the run is; default where ``mlflow.get_tracking_uri()`` says now.
        start_time_ms: When that run began, in milliseconds of Unix time. Asked of MLflow if it is not given.
        recording: Path of the recording; not used.

    Raises:
        MissingDependencyError: MLflow is not installed.
        DeliveryError: MLflow could not make a run.
    """

    name = "mlflow"

    def __init__(
        self,
        *,
        run_id: str | None = None,
        start_time_ms: int | None = None,
        recording: str = "",
        tracking_uri: str | None = None,
    ) -> None:
        mlflow = _mlflow()
        uri = tracking_uri or mlflow.get_tracking_uri()
        client = mlflow.MlflowClient(tracking_uri=uri)
        self._uri = _where.absolute(uri)
        self._owned = False
        self._finished = False
        self._ending = ""
        if run_id is None:
            run = mlflow.active_run()
            if run is None and not os.environ.get("MLFLOW_RUN_ID"):
                run = translate(_create_run, client)
                self._owned = True
            run_id = run.info.run_id if run is not None else os.environ["MLFLOW_RUN_ID"]
            start_time_ms = run.info.start_time if run is not None else None
        self.run_id: str = run_id
        self._start_ms = start_time_ms
        self._client = client
        self._run = run_writer(client, run_id)

    @property
    def key(self) -> str:
        return f"mlflow:{self.run_id}"[:40]

    @property
    def target(self) -> dict[str, str]:
        found = {"run_id": self.run_id, "uri": _where.public(self._uri)}
        if self._start_ms is not None:
            found["start_time_ms"] = str(self._start_ms)
        if self._owned:
            found["owned"] = "1"
        if self._ending:
            found["status"] = self._ending
        return found

    def environment(self) -> dict[str, str]:
        """What is set now: a token may have been set, or exchanged, since the process began."""
        return _where.environment(self._uri)

    @classmethod
    def reopen(cls, target: dict[str, str]) -> MlflowSink:
        """A sink for the same run from another process; no run becomes active."""
        uri = _where.known(target["uri"])
        _where.check_trusted(uri)
        _where.check_there(uri)
        start_ms = target.get("start_time_ms")
        try:
            sink = cls(
                run_id=target["run_id"], start_time_ms=None if start_ms is None else int(start_ms), tracking_uri=uri
            )
        except MissingDependencyError:
            raise
        except Exception as exc:
            # not refused: this process may lack what the other one had
            raise DeliveryError(f"MLflow cannot open its store: {reason(exc)}") from exc
        sink._owned = "owned" in target
        sink._ending = target.get("status", "")
        return sink

    def ending(self, status: str) -> None:
        """The user's code ends the run with this status. Should MLflow not be able to note it, ``conclude`` will."""
        self._ending = status

    def write(self, batch: Batch) -> None:
        try:
            points = list(batch.points())
            for first in range(0, len(points), MAX_METRICS):
                self._run.log(self._values(points[first : first + MAX_METRICS]), {})
        except RejectedError as exc:
            raise RejectedError(str(exc), run_gone=self._is_gone()) from exc

    def finish(self, figures: RunFigures) -> None:
        timestamp_ms = round(1000 * (figures.end_wall_s or time()))
        tags = {f"memtrack.{key}": value for key, value in tags_of(figures).items()}
        metrics = [Value(SUMMARY + key, value, timestamp_ms, 0) for key, value in numbers_of(figures).items()]
        self._run.log(metrics, tags)
        if figures.phases or figures.epochs:
            table_tags = log_table(self._client, self.run_id, self._run.state(), figures)
            if table_tags:
                self._run.log([], table_tags)
        self._finished = True

    def conclude(self, figures: RunFigures) -> None:
        """End the run, if it is still running, as the user's code or else the verdict says.

        A run that the user's code has left open when it came to a good end stays open.
        """
        owned, self._owned = self._owned, False
        status = self._ending or status_of(figures) or ("FINISHED" if owned else "")
        if status and self._run.state().status == "RUNNING":
            self._run.finish(round(1000 * (figures.end_wall_s or time())), status)

    def close(self) -> None:
        # one that has not got everything is ended by who delivers the rest
        if self._owned and self._finished:
            self._owned = False
            try:
                self._run.finish(round(1000 * time()))
            except DeliveryError:
                # the run stays open at a server that does not answer; the recording has everything
                return

    def _values(self, points: Iterable[Point]) -> list[Value]:
        if self._start_ms is None:
            self._start_ms = self._run.state().start_time_ms
        start_ms = self._start_ms
        return [
            Value(PREFIX + name, value, timestamp_ms, max(timestamp_ms - start_ms, 0) // 1000)
            for name, value, timestamp_ms in points
        ]

    def _is_gone(self) -> bool:
        try:
            return self._run.state().is_deleted
        except RejectedError:
            return True
        except DeliveryError:
            return False


def _create_run(client: Any) -> Any:
    """A run as ``mlflow.start_run()`` makes it, in the experiment that is set and with its tags, but not active."""
    fluent = import_module("mlflow.tracking.fluent")
    tags = import_module("mlflow.tracking.context.registry").resolve_tags()
    return client.create_run(experiment_id=fluent._get_experiment_id() or "0", tags=tags)


def _mlflow() -> Any:
    try:
        return import_module("mlflow")
    except ImportError as exc:
        raise MissingDependencyError("the 'mlflow' sink", "mlflow") from exc
