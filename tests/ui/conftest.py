"""A real MLflow server to look at."""

from tests.integrations.mlflow_lab import _server, mlflow_server, mlflow_template, train

__all__ = ["_server", "mlflow_server", "mlflow_template", "train"]
