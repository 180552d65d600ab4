"""Hugging Face's Trainer with memtrack's callback, by hand and by autolog alone: real trainings, reported to a real
MLflow server and to W&B offline."""

from __future__ import annotations

import pytest

from memtrack import metrics
from memtrack.training import STEP_PEAK
from tests.integrations.huggingface_lab import HOLD, QUIET, spikes
from tests.integrations.mlflow_lab import scripts
from tests.integrations.wandb_lab import in_folder, read_run

pytest.importorskip("transformers", reason="Hugging Face's transformers are not installed")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate")

TRAINER = f"""
{HOLD}
import inspect, torch, transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
"""
TRAINER += """
class Net(torch.nn.Module):
    '''Holds memory, or fails, when a call has the number that the plan says.'''
    def __init__(self, **plan):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.plan, self.calls = torch.nn.Linear(4, 2), plan, {}
    def at(self, kind):
        self.calls[kind] = self.calls.get(kind, 0) + 1
        what = self.plan.get(f"{kind}_{self.calls[kind]}", 0)
        if isinstance(what, BaseException):
            raise what
        if what:
            hold(what)
    def forward(self, x, labels=None):
        self.at("train" if self.training else "eval")
        logits = self.layer(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}
    def state_dict(self, *args, **kwargs):
        self.at("save")
        return super().state_dict(*args, **kwargs)

torch.manual_seed(1)
DATA = [{"x": torch.randn(4), "labels": torch.tensor(number % 2)} for number in range(32)]
EVALUATE = "eval_strategy"
if EVALUATE not in inspect.signature(TrainingArguments).parameters:
    EVALUATE = "evaluation_strategy"

# 4 steps an epoch, each of 2 batches; at the end of an epoch, an evaluation of 2 batches and a checkpoint
def trainer(net, *callbacks, name="plain", report_to=(), **more):
    arguments = TrainingArguments(name, run_name=name, report_to=list(report_to), use_cpu=True, disable_tqdm=True, **{
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "logging_steps": 1,
        EVALUATE: "epoch", "save_strategy": "epoch", **more,
    })
    return Trainer(net, arguments, train_dataset=DATA, eval_dataset=DATA[:16], callbacks=list(callbacks))

# batch 5 of the training is in step 3, batch 5 that is not trained on the first of predict
PLAN = {"train_5": 300, "eval_1": 150, "save_1": 200, "eval_5": 250}
"""

HEIGHTS = {("train", 3, 0): 300, ("validation", 4, 0): 150, ("checkpoint", 4, 0): 200, ("predict", 8, -1): 250}
"""What PLAN holds, in MiB, and where: phase, step, epoch; a prediction after the training is of no epoch."""


def own(history):
    """A Trainer's log without what differs from time to time, and without what is memtrack's."""
    changing = ("_runtime", "_per_second", "_time")
    return [
        {key: value for key, value in row.items() if not key.endswith(changing) and not key.startswith("memory/")}
        for row in history
    ]


def peaks(history):
    """``step -> peak in MiB`` of the rows of a Trainer's log, each step once."""
    found = [(row["step"], row[STEP_PEAK]) for row in history if STEP_PEAK in row]
    assert len(dict(found)) == len(found)
    return dict(found)


# -- autolog --------------------------------------------------------------------------------------------------------

AUTOLOG = f"""
import memtrack, mlflow
{TRAINER}
from transformers.trainer import DEFAULT_CALLBACKS

plain = trainer(Net())
plain.train()
report(plain=plain.state.log_history)

METHODS = ("train", "evaluate", "predict", "save_model", "_save_checkpoint")
before = [getattr(Trainer, name) for name in METHODS], list(DEFAULT_CALLBACKS)
memtrack.autolog()
report(changed=[one is not other for one, other in zip(before[0], [getattr(Trainer, name) for name in METHODS])])
report(callbacks_changed=DEFAULT_CALLBACKS != before[1])
memtrack.autolog(disable=True)
report(restored=before == ([getattr(Trainer, name) for name in METHODS], DEFAULT_CALLBACKS))

report(recording=memtrack.autolog(interval=0.1, flush_interval=0.2).path)
class Watcher(TrainerCallback):
    rows = {{}}
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.setdefault(state.global_step, set()).update(logs)

HELD.clear()
first = trainer(Net(**PLAN), Watcher(), name="first", report_to=["mlflow"])
first.train()
first.predict(DATA[:8])
report(first=first.state.log_history, first_held=HELD[:], calls=first.model.calls)
report(seen=[sorted(keys) for keys in Watcher.rows.values()])

from memtrack_huggingface import MemoryCallback
HELD.clear()
mine = MemoryCallback()
second = trainer(Net(train_9=300), mine, name="second", report_to=["mlflow"], logging_steps=2)
second.train()
report(second=second.state.log_history, second_held=HELD[:])
report(kept=[one is mine for one in second.callback_handler.callbacks if isinstance(one, MemoryCallback)])

HELD.clear()
error = ValueError("the loss is NaN")
third = trainer(Net(train_5=error), name="third", report_to=["mlflow"])
try:
    third.train()
except ValueError as caught:
    assert caught is error and caught.__cause__ is None and caught.__context__ is None
with memtrack.phase("after"):
    hold(200)
report(third_held=HELD[:], third=third.state.log_history)
mlflow.end_run()
"""


@pytest.fixture(scope="module")
def by_autolog(_server, tmp_path_factory):
    """One process with four trainings: without memtrack, by autolog alone, with a callback as well, one that fails."""
    pytest.importorskip("mlflow")
    _server.start()
    with scripts(tmp_path_factory.mktemp("huggingface")) as train:
        done = train(AUTOLOG, _server, MLFLOW_EXPERIMENT_NAME="huggingface", **QUIET)
        runs = {run.info.run_name: run.info.run_id for run in _server.runs("huggingface")}
        yield done, done.result, {name: _server.history(run_id) for name, run_id in runs.items()}


def test_autolog_marks_steps_epochs_and_phases(by_autolog):
    """What is held in a known step, in the first batch of an evaluation or prediction, or in a checkpoint, is there."""
    done, result, _ = by_autolog
    found = spikes(result["recording"], result["first_held"])
    assert set(found) == set(HEIGHTS)
    for where, mib in HEIGHTS.items():
        assert found[where] == pytest.approx(mib, rel=0.1)
    assert "memtrack" not in done.stderr


def test_the_log_of_the_trainer_has_the_peaks_and_is_otherwise_as_without(by_autolog):
    """Each row with a loss has the peak of its step, also for callbacks further back; all else is equal bit for bit."""
    _, result, _ = by_autolog
    assert own(result["first"]) == own(result["plain"])
    found = peaks(result["first"])
    assert list(found) == list(range(1, 9))
    assert found[3] - found[2] == pytest.approx(300, rel=0.1)
    assert found[5] - found[2] == pytest.approx(200, rel=0.1)  # the checkpoint after row 4
    assert max(abs(found[step] - found[2]) for step in (1, 4, 6, 7, 8)) < 30
    assert all(STEP_PEAK not in row for row in result["first"] if "loss" not in row)
    assert [STEP_PEAK in keys for keys in result["seen"]] == [True] * 8
    assert result["calls"] == {"train": 16, "eval": 5, "save": 2}


def test_mlflow_has_loss_and_peak_in_the_same_row(by_autolog):
    """At the Trainer's own steps, each point once, with the values of the Trainer's log; and the run has its charts."""
    _, result, runs = by_autolog
    assert set(runs) == {"first", "second", "third"}
    for name in ("first", "second"):
        logged = [row for row in result[name] if "loss" in row]
        for key in ("loss", STEP_PEAK):
            assert [(step, value) for _, step, value in runs[name][key]] == [(row["step"], row[key]) for row in logged]
        assert [stamp for stamp, *_ in runs[name]["loss"]] == [stamp for stamp, *_ in runs[name][STEP_PEAK]]
        assert len(runs[name]["eval_loss"]) == 2
        assert f"system/{metrics.RSS}" in runs[name]


def test_a_callback_of_the_users_wins(by_autolog):
    """With autolog as well: it is the only one, stands before those that report, and no step or row comes twice."""
    done, result, _ = by_autolog
    assert result["kept"] == [True]
    found = peaks(result["second"])
    assert list(found) == [2, 4, 6, 8]
    assert found[6] - found[8] == pytest.approx(300, rel=0.1)
    spike = spikes(result["recording"], result["second_held"])
    assert set(spike) == {("train", 5, 1)}
    assert spike["train", 5, 1] == pytest.approx(300, rel=0.1)
    assert "You are adding a" not in done.stderr


def test_a_training_that_fails_leaves_its_phases(by_autolog):
    """The exception passes unchanged, and what comes then is not part of the training."""
    _, result, _ = by_autolog
    spike = spikes(result["recording"], result["third_held"])
    assert set(spike) == {("after", 3, -1)}
    assert list(peaks(result["third"])) == [1, 2]


def test_autolog_is_taken_back(by_autolog):
    """Methods and default callbacks are changed by it, and the same as before afterwards."""
    _, result, _ = by_autolog
    assert result["changed"] == [True] * 5
    assert result["callbacks_changed"]
    assert result["restored"]


# -- by hand --------------------------------------------------------------------------------------------------------

BY_HAND = f"""
{TRAINER}
from memtrack_huggingface import MemoryCallback
import memtrack, wandb
from memtrack.errors import SettingsError
try:
    MemoryCallback(interval="soon")
except SettingsError as exc:
    report(refused=str(exc))

class Own(Trainer):
    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs)

HELD.clear()
one = trainer(Net(**PLAN), name="one", report_to=["wandb"])
one.add_callback(MemoryCallback(interval=0.1, flush_interval=0.2))
one.train()
one.predict(DATA[:8])
report(one=one.state.log_history, one_held=HELD[:], one_id=wandb.run.id)
wandb.finish()

# trained, then gone on with from its checkpoint, interrupted in an evaluation
Trainer = Own
two = trainer(Net(eval_3=KeyboardInterrupt()), MemoryCallback(), name="two", report_to=["wandb"], save_total_limit=1)
HELD.clear()
try:
    two.train()
except KeyboardInterrupt:
    pass
with memtrack.phase("after"):
    hold(200)
report(two=two.state.log_history, two_held=HELD[:], two_id=wandb.run.id)
wandb.finish()
"""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """One process with two trainings that have the callback; autolog is never called."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("huggingface-wandb")
    with scripts(folder) as train:
        done = in_folder(train, folder)(BY_HAND, **QUIET)
        result = done.result
        yield done, result, {name: read_run(folder, result[f"{name}_id"]) for name in ("one", "two")}


def test_by_hand_it_works_alone(by_hand):
    """Steps, epochs, phases and peaks as with autolog, though it was added later than the Trainer was made."""
    done, result, _ = by_hand
    found = spikes(done.recording, result["one_held"])
    assert set(found) == set(HEIGHTS)
    for where, mib in HEIGHTS.items():
        assert found[where] == pytest.approx(mib, rel=0.1)
    assert list(peaks(result["one"])) == list(range(1, 9))
    assert result["refused"].startswith("interval='soon'")
    assert "memtrack" not in done.stderr


def test_wandb_has_loss_and_peak_in_the_same_row(by_hand):
    """In the rows of the Trainer's own callback, and in no others; and the run has its charts."""
    _, result, runs = by_hand
    found = [
        (row["train/global_step"], row["train/loss"], row[f"train/{STEP_PEAK}"])
        for _, row in runs["one"].history
        if "train/loss" in row
    ]
    assert found == [(row["step"], row["loss"], row[STEP_PEAK]) for row in result["one"] if "loss" in row]
    others = [row for _, row in runs["one"].history if "train/loss" not in row]
    assert others
    assert not any("memory" in key for row in others for key in row)
    assert "proc.memory.rssMB/l:memtrack" in runs["one"].series


def test_an_interrupt_in_an_evaluation_leaves_all_phases(by_hand):
    """Of a subclass that has methods of its own. The rows up to then are there."""
    done, result, runs = by_hand
    spike = spikes(done.recording, result["two_held"])
    assert set(spike) == {("after", 8, -1)}
    assert list(peaks(result["two"])) == list(range(1, 9))
    assert sum("train/loss" in row for _, row in runs["two"].history) == 8
