"""Following the runs of MLflow's fluent API, from their start to their end."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.sinks.following import Follower
from memtrack_mlflow._sink import MlflowSink

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.sinks.following import Attach

STATUSES = ("FINISHED", "FAILED", "KILLED")


_following: list[_MlflowFollower] = []
"""The one that follows now, if any does."""


class _MlflowFollower(Follower):
    """Learns of runs from two methods of public classes, which every way to start or end one comes through.

    ``mlflow.ActiveRun`` is made once a run has started, by whatever name ``start_run`` was called and also by
    ``mlflow.log_metric`` and by MLflow's own autologging; ``MlflowClient.set_terminated`` is called when it ends.
    """

    def install(self, fluent: Any) -> None:
        """Follow the runs to come, and those that are active in this thread already."""
        self.after(fluent.ActiveRun, "__init__", self._on_start)
        # before: a run that is marked finished is complete
        self.before(fluent.MlflowClient, "set_terminated", self._on_end)
        run = fluent.active_run()
        if run is not None:
            self._on_start(run)

    def remove(self) -> None:
        """As any follower does."""
        _following.clear()
        super().remove()

    def newest(self) -> str | None:
        """The id of the run that began last of those that are being fed in this process."""
        return next((str(key) for pid, key in reversed(self._fed) if pid == os.getpid()), None)

    def _on_start(self, run: Any) -> None:
        info = getattr(run, "info", None)
        if info is not None:
            self.started(run, info.run_id, lambda: MlflowSink(run_id=info.run_id, start_time_ms=info.start_time))

    def _on_end(self, _client: Any, run_id: str, status: str | None = None, *_: Any, **__: Any) -> None:
        status = status or "FINISHED"
        self.ended(run_id, status if status in STATUSES else None)


def autolog(attach: Attach) -> Callable[[], None]:
    """Follow MLflow's runs from now on: those that are active, and those to come. Returns what takes it back.

    MLflow has been imported. ``attach`` gets what makes the sink of a run and never raises.
    """
    follower = _MlflowFollower(attach)
    follower.install(import_module("mlflow.tracking.fluent"))
    _following[:] = [follower]
    return follower.remove


def followed_run_id() -> str | None:
    """The run that began last of those that are followed: MLflow knows a run as active in its own thread only."""
    return _following[0].newest() if _following else None
