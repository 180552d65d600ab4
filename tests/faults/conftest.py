"""The fixtures of the tests that inject faults: real processes, file systems and trackers."""

from tests.integrations.mlflow_lab import _server, mlflow_server, mlflow_template, train
from tests.process.conftest import run_child, small_disk, tools

__all__ = ["_server", "mlflow_server", "mlflow_template", "run_child", "small_disk", "tools", "train"]
