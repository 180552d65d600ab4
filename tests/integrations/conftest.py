"""The fixtures of the tests against real trackers."""

from tests.integrations.mlflow_lab import _server, mlflow_server, mlflow_template, proxy, sqlite_store, train
from tests.integrations.wandb_lab import wandb_train

__all__ = ["_server", "mlflow_server", "mlflow_template", "proxy", "sqlite_store", "train", "wandb_train"]
