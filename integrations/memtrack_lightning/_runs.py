"""Runs that Lightning's loggers make in a way that nothing else tells of."""

from __future__ import annotations

import sys
from typing import Any

from memtrack import autologging, registry


class Fed:
    """A run that is being fed."""

    def __init__(self, run_id: str, uri: str) -> None:
        self._sink: Any = None
        self._attached = autologging.attach(lambda: self._make(run_id, uri))

    def _make(self, run_id: str, uri: str) -> Any:
        self._sink = registry.load_sink("mlflow")(run_id=run_id, tracking_uri=uri)
        return self._sink

    def end(self, status: str) -> None:
        """Deliver what is left. Lightning marks the run ended right after that."""
        if self._attached is not None:
            self._sink.ending(status)
            self._attached.detach()


def feed_runs(trainer: Any) -> list[Fed]:
    """Feed the runs of the trainer's loggers for MLflow, if MLflow's runs are followed.

    Such a logger writes through a client of its own, not through the fluent API, in which memtrack sees runs start.
    """
    mlflow = sys.modules.get("mlflow")
    if mlflow is None or not trainer.is_global_zero or not autologging.follows("mlflow"):
        return []
    active = mlflow.active_run()
    found = {}
    for logger in trainer.loggers:
        client = getattr(logger, "experiment", None)
        # not by the logger's class, which is another one in each package
        if isinstance(client, mlflow.MlflowClient):
            run_id = logger.run_id
            if active is None or active.info.run_id != run_id:
                found[run_id] = client.tracking_uri
    return [Fed(run_id, uri) for run_id, uri in found.items()]
