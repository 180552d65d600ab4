"""The table of phases and epochs, as an artifact that MLflow shows as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from memtrack.notices import warn_once
from memtrack_mlflow._run import LOGGED, reason

if TYPE_CHECKING:
    from memtrack.sinks import RunFigures
    from memtrack_mlflow._run import RunState

PATH = "memtrack/phases_and_epochs.json"


def log_table(client: Any, run_id: str, state: RunState, figures: RunFigures) -> dict[str, str]:
    """Log the table, if there is anything in it. Returns the tags that make MLflow show it. Never raises.

    ``MlflowClient.log_table`` would load pandas into the training process, and append to what is there, should the
    figures have to be delivered again. For the same reason the table goes only where MLflow needs no library more: to
    a folder, or through the tracking server; not straight into a bucket.
    """
    columns, rows = figures.table()
    scheme = state.artifact_uri.partition(":")[0] if ":" in state.artifact_uri else ""
    if not rows or scheme not in ("", "file", "mlflow-artifacts"):
        return {}
    try:
        client.log_text(run_id, json.dumps({"columns": columns, "data": rows}), PATH)
        known = json.loads(state.logged_artifacts or "[]")
        entry = {"path": PATH, "type": "table"}
        return {LOGGED: json.dumps([*known, entry])} if entry not in known else {}
    except Exception as exc:
        warn_once("mlflow table", f"memtrack cannot log the table of phases and epochs ({reason(exc)}).")
        return {}
