"""memtrack in MLflow: charts in the System metrics tab, figures and tags on the run."""

from memtrack_mlflow._autolog import autolog
from memtrack_mlflow._sink import MlflowSink
from memtrack_mlflow._store import active_store, open_store

__all__ = ["MlflowSink", "active_store", "autolog", "open_store"]
