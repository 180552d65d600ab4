"""Every example runs, as a user would run it, in an empty folder."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("mlflow")
pytest.importorskip("pandas")

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PRINTS = {
    "checkpoints": ["model/step-00000019: stored, ", "model/step-00000099: stored, ", "is the same; from the shell"],
    "demo": ["memtrack: peak", "evaluate", "picture  .memtrack/demo/timeline.png", "mlflow ui --backend-store-uri"],
    "mlflow_autolog": ["50 MiB: peak", "100 MiB: peak"],
    "read_recording": ["windows, peak", "memory/process/rss_mib"],
    "train_accelerate": ["step 116: loss ", ", peak "],
    "train_huggingface": ["evaluation: ", "step 90: loss ", ", peak "],
    "train_keras": ["epoch 2: accuracy ", ", peak ", "checkpoint", "validation"],
    "train_lightning": ["step 109: loss ", ", peak ", "checkpoint", "validation"],
    "train_pytorch": ["90 steps; see run"],
    "without_tracker": ["memtrack: peak", "train/validate"],
}
ARGUMENTS = {"demo": ["--seconds", "5"]}
NEEDS = {
    "checkpoints": ["torch", "sklearn", "zstandard"],
    "train_accelerate": ["accelerate", "torch", "sklearn"],
    "train_huggingface": ["transformers", "accelerate", "sklearn"],
    "train_keras": ["keras", "torch", "sklearn"],
    "train_lightning": ["lightning", "sklearn"],
    "train_pytorch": ["torch", "sklearn"],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    """It exits with 0, prints what it promises, and warns of nothing of ours."""
    for module in NEEDS.get(example.stem, []):
        if find_spec(module) is None:
            pytest.skip("needs Python 3.11, for which the frameworks are installed")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MEMTRACK_", "MLFLOW_"))}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    # Comet is installed here and hooks into MLflow and transformers
    env |= {"COMET_DISABLE_AUTO_LOGGING": "1", "COMET_MODE": "disabled"}
    command = [sys.executable, str(example), *ARGUMENTS.get(example.stem, [])]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for text in PRINTS[example.stem]:
        assert text in done.stdout
    assert "Training goes on" not in done.stderr, "memtrack had to warn"


def test_examples_are_short():
    """One idea a file: at most 60 lines, but for the demo."""
    for example in EXAMPLES:
        if example.stem != "demo":
            assert len(example.read_text().splitlines()) <= 60
