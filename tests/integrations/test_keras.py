"""Keras 3 with memtrack's callback on each of its backends, by hand and by autolog alone: real trainings, logged to a
real MLflow server and to W&B offline."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from memtrack import metrics
from memtrack.recording.reader import RecordingReader
from tests.integrations.keras_lab import BY_AUTOLOG, BY_HAND, DISPATCH, LAB
from tests.integrations.mlflow_lab import environment, rows, scripts
from tests.integrations.wandb_lab import SETTINGS, read_run

pytest.importorskip("mlflow")
if find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)

PEAK = "memory/epoch/rss_peak_mib"
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "COMET_MODE": "disabled", "PYTHONWARNINGS": "ignore"}

BACKENDS = ("jax", "torch", "tensorflow")

HEIGHTS = {
    ("validation", 5, 0): 150,
    ("train", 7, 1): 300,
    ("checkpoint", 10, 1): 200,
    ("test", 15, -1): 250,
    ("predict", 15, -1): 350,
}
"""What is held, in MiB, and where: phase, step, epoch."""


@pytest.fixture(scope="module", params=BACKENDS)
def trained(request, _server, tmp_path_factory):
    """One process for each backend: what it printed, its run in MLflow by name, its folder."""
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    _server.start()
    folder = tmp_path_factory.mktemp(f"keras-{request.param}")
    experiment = {"MLFLOW_TRACKING_URI": _server.uri, "MLFLOW_EXPERIMENT_NAME": f"keras-{request.param}"}
    with scripts(folder) as train:
        env = {**QUIET, **SETTINGS, **experiment, "KERAS_BACKEND": request.param, "WANDB_DIR": str(folder)}
        done = train(LAB + DISPATCH + BY_HAND + BY_AUTOLOG, **env)
        runs = {run.info.run_name: run.info.run_id for run in _server.runs(f"keras-{request.param}")}
        yield done, done.result, {name: _server.history(run_id) for name, run_id in runs.items()}, folder


def spikes(recording, since, until):
    """``(phase, step, epoch) -> MiB`` of what stood out by 100 MiB or more in a time, and what it stood out of."""
    with RecordingReader(str(recording)) as reader:
        names = reader.names()
    cells = [row.cells[metrics.RSS] for row in rows(recording, since, until)]
    floor = sorted(cell.min for cell in cells)[len(cells) // 10]
    found: dict[tuple[str, int, int], float] = {}
    for cell in cells:
        if cell.max > floor + 100:
            key = (names[cell.phase], cell.step, cell.epoch)
            found[key] = max(found.get(key, 0.0), cell.max - floor)
    return found, floor


def own(history):
    """A history without what is memtrack's."""
    return {key: values for key, values in history.items() if not key.startswith("memory/")}


@pytest.mark.parametrize("way", ["hand", "auto"])
def test_steps_epochs_and_phases(trained, way):
    """What is held in a known step, validation, checkpoint, evaluation or prediction is there, and nothing else."""
    _, result, _, _ = trained
    found, _ = spikes(result[f"{way}_recording"], *result[f"{way}_time"])
    assert set(found) == set(HEIGHTS)
    for where, mib in HEIGHTS.items():
        assert found[where] == pytest.approx(mib, rel=0.1)
    assert result[f"{way}_clean"]


@pytest.mark.parametrize("way", ["hand", "auto"])
def test_history_and_csv_have_the_peak_of_each_epoch(trained, way):
    """And are otherwise equal, number for number, to the same training without memtrack."""
    _, result, _, _ = trained
    history = result[way]
    assert own(history) == result["plain"]
    assert all(PEAK not in key for key in result["plain"])
    _, floor = spikes(result[f"{way}_recording"], *result[f"{way}_time"])
    # the checkpoint at the end of epoch 1 counts in epoch 2
    assert [peak - floor for peak in history[PEAK]] == [pytest.approx(mib, rel=0.1) for mib in (150, 300, 200)]
    table = result[f"{way}_csv"]
    assert [int(row["epoch"]) for row in table] == [0, 1, 2]
    for key, values in history.items():
        assert [float(row[key]) for row in table] == pytest.approx(values)


@pytest.mark.parametrize("way", ["hand", "auto"])
def test_the_tracker_has_loss_and_peak_in_the_same_row(trained, way):
    """Each once, at Keras's own epochs: by MLflow's callback, by its autologging, by the program, by W&B's callback."""
    _, result, runs, folder = trained
    history = result[way]
    if way == "hand" and "wandb" in result:
        run = read_run(folder, result["wandb"])
        logged = [row for _, row in run.history if "epoch/loss" in row]
        assert [row["epoch/epoch"] for row in logged] == [0, 1, 2]
        for key in ("loss", PEAK):
            assert [row[f"epoch/{key}"] for row in logged] == history[key]
        assert "proc.memory.rssMB/l:memtrack" in run.series
        return
    for key in ("loss", "val_loss", PEAK):
        assert [(step, value) for _, step, value in runs[way][key]] == list(enumerate(history[key]))
    assert f"system/{metrics.RSS}" in runs[way]


def test_asynchronous_dispatch_stays_on(trained):
    """By Keras's own state, by the threads that it calls from, and by how often its main thread waits for a value."""
    _, result, _, _ = trained
    without, ours, unsafe = (result[name] for name in ("without", "ours", "unsafe"))
    assert ours["states"] == without["states"]
    assert ours["threads"] == without["threads"]
    if result["is_async"]:
        assert ours["states"] == [[True] * 3] * 2
        assert ours["threads"] == [False]
        assert unsafe["states"] == [[False] * 3] * 2
        assert unsafe["threads"] == [True]
    # for each fit and for each of its epochs, however many batches these have
    few, many = (count - other for count, other in zip(ours["waits"], without["waits"], strict=True))
    assert 3 <= few == many <= 6
    few, many = (count - other for count, other in zip(unsafe["waits"], without["waits"], strict=True))
    assert many - few == (2 * 5 if result["is_async"] else 0)


def test_steps_are_those_of_the_optimizer(trained):
    """What is marked when a batch begins is what ``optimizer.iterations`` is when it is over."""
    _, result, _, _ = trained
    assert result["steps"] == [[number, number] for number in range(1, 16)]
    if "steps_of_two" in result:
        # an epoch of 5 batches ends with an execution of one
        assert result["steps_of_two"] == [[number, number] for number in (2, 4, 5, 7, 9, 10)]
    # of a generator some versions lose the first batch, some only in the first of two fits
    unknown = result["steps_of_unknown"]
    assert 4 <= len(unknown) <= 6
    assert unknown == [[number + 1, number + 1] for number in range(len(unknown))]
    # two batches are one step, but in the first versions, whose optimizers count batches
    both = [[number // 2 + 1, (number + 1) // 2] for number in range(10)]
    assert result["steps_accumulated"] == (both if result["accumulated"] else result["steps"][:10])
    if "steps_still" in result:
        # an optimizer that the model does not use
        assert result["steps_still"] == [[number, 0] for number in range(1, 11)]


def test_a_loop_of_the_programs_own(trained):
    """With a ``CallbackList`` it is marked as ``fit`` is."""
    _, result, _, _ = trained
    assert [[epoch, phases] for _, epoch, phases in result["loop"]] == [[7, ["train"]]] * 2
    assert [step for step, _, _ in result["loop"]] == [1, 2]
    assert result["after_loop"] == [2, -1, []]
    # one that was broken off is over when a fit begins
    assert result["broken_loop"] == [["train"], [], [[number, number] for number in range(1, 6)]]


def test_what_is_predicted_inside_of_a_fit(trained):
    """It interrupts the phase train; steps, epochs and the row of the fit go on."""
    _, result, _, _ = trained
    expected = [
        [step, epoch, [phase]] for step, epoch in ((5, 0), (10, 1)) for phase in ("predict", "validation", "train")
    ]
    assert result["nested"] == expected
    assert result["nested_peaks"] == 2
    assert result["after_nested"] == []


def test_never_two(trained):
    """A callback that the program has added is the only one, and each epoch has one peak."""
    _, result, _, _ = trained
    assert result["kept"] == [[True], [True]]
    assert [len(history[PEAK]) for history in result["both"]] == [3, 3]


def test_exceptions_leave_the_phases(trained):
    """At once with autolog; by hand, without, when something begins again."""
    _, result, _, _ = trained
    assert result["ends"] == [[3, -1, [], True]] * 2 + [[3, -1, [], True]]
    assert result["broken"] == [["train"], False, ["test"], [], True]


def test_the_progress_bar_has_the_peak_once_an_epoch(trained):
    """Behind the loss."""
    _, result, _, _ = trained
    lines = [line for line in result["bar"].splitlines() if "loss" in line]
    assert len(lines) == 3
    assert all(line.count(PEAK) == 1 and line.index("loss: ") < line.index(PEAK) for line in lines)


def test_autolog_is_taken_back(trained):
    """Keras has its own functions again, a model that was trained is not held, and memtrack had nothing to say."""
    done, result, _, _ = trained
    assert result["lazy"]
    assert result["refused"].startswith("interval='soon'")
    assert result["hooked"]
    assert result["restored"]
    assert result["restored_again"]
    assert result["model_is_freed"]
    assert "memtrack" not in done.stderr


def test_import_leaves_the_choice_of_the_backend(tmp_path):
    """KERAS_BACKEND may be set after memtrack_keras has been imported and autolog called."""
    source = (
        "import os, sys, memtrack, memtrack_keras\n"
        "memtrack.autolog(trackers=[])\n"
        "assert 'keras' not in sys.modules\n"
        "assert not hasattr(memtrack_keras, 'Callback')\n"
        "assert 'keras' not in sys.modules\n"
    )
    env = environment(MEMTRACK_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path)
