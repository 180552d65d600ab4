"""``memtrack.autolog()`` and trackers that are not there, not imported yet, or being imported right now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integrations.mlflow_lab import environment

NOTHING = """
import memtrack
from memtrack.errors import MissingDependencyError
monitor = memtrack.autolog()
assert memtrack.autolog() is monitor
assert monitor.wait_ready()
try:
    memtrack.autolog(trackers=["comet"])
except MissingDependencyError as exc:
    print(exc.extra)
"""


def test_no_tracker_is_installed(run_child, tmp_path):
    """That is said, once, and the recording is made. One that is asked for by name must be there."""
    child = run_child(NOTHING, stderr=subprocess.PIPE)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (0, "comet\n")
    assert err == (
        "no tracker is installed (MLflow, Weights & Biases, Comet): memtrack only records locally, "
        "see memtrack report.\n"
    )
    assert len(list(tmp_path.glob("*.mtk"))) == 1


def run(tmp_path, source):
    """Run a script that has the trackers; it must say nothing unless it does so on purpose."""
    (tmp_path / "script.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment(MEMTRACK_DIR=str(tmp_path / "recordings"), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/m.db"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


WATCHED = """
def is_followed():
    from mlflow.tracking.fluent import ActiveRun
    return hasattr(ActiveRun.__init__, "__wrapped__")
"""


def test_asked_for_by_name_it_is_waited_for(tmp_path):
    """Nothing is imported for it, and it is followed once the program has; taken back before that, it never is."""
    pytest.importorskip("mlflow")
    source = f"""
import sys, memtrack
{WATCHED}
memtrack.autolog(trackers=["mlflow"])
assert not {{"mlflow", "memtrack_mlflow", "wrapt"}} & {{*sys.modules}}
if sys.argv[1:]:
    memtrack.autolog(disable=True)
import mlflow
assert is_followed() == (not sys.argv[1:])
memtrack.autolog(disable=True)
assert not is_followed()
"""
    for arguments in ("", "sys.argv.append('taken back')\n"):
        assert "memtrack" not in run(tmp_path, f"import sys\n{arguments}{source}")


def test_while_another_thread_imports_it(tmp_path):
    """autolog() comes in the middle of the import: it waits for the rest, and follows."""
    pytest.importorskip("mlflow")
    source = f"""
import sys, threading, time, memtrack
import memtrack.autologging
{WATCHED}
thread = threading.Thread(target=__import__, args=["mlflow"])
thread.start()
while "mlflow" not in sys.modules:
    time.sleep(0.001)
assert sys.modules["mlflow"].__spec__._initializing
memtrack.autolog()
assert not sys.modules["mlflow"].__spec__._initializing
assert is_followed()
thread.join()
"""
    assert "memtrack" not in run(tmp_path, source)


def test_from_within_its_import(tmp_path):
    """A tracker that is only half there cannot be followed: that is said, and the import goes on."""
    (tmp_path / "comet_ml.py").write_text("import memtrack\nmonitor = memtrack.autolog()\nversion = 1\n")
    err = run(tmp_path, "import comet_ml\nassert comet_ml.version == 1\nassert comet_ml.monitor.wait_ready()\n")
    assert "memtrack.autolog() does not follow comet from within its import." in err
