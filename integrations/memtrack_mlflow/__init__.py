"""memtrack in MLflow: charts in the System metrics tab, figures and tags on the run."""

from memtrack_mlflow._autolog import autolog
from memtrack_mlflow._sink import MlflowSink

__all__ = ["MlflowSink", "autolog"]
