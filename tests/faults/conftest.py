"""The fixtures of the tests that inject faults: real processes, file systems and trackers."""

import pytest

from tests.faults.lab import Child
from tests.integrations.mlflow_lab import _server, mlflow_server, mlflow_template, train
from tests.process.conftest import run_child, small_disk, tools

__all__ = ["_server", "child", "mlflow_server", "mlflow_template", "run_child", "small_disk", "tools", "train"]


@pytest.fixture
def child(tmp_path):
    """Starts programs, see :class:`Child`; all of them are gone at the end."""
    started = []

    def start(code, *arguments, **options):
        started.append(Child(tmp_path / f"child-{len(started)}", code, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()
