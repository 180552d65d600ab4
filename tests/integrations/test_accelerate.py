"""A loop with Hugging Face's accelerate that memtrack watches: it logs to a real MLflow server and to W&B offline."""

from __future__ import annotations

import pytest

from memtrack import metrics
from memtrack.training import STEP_PEAK
from tests.integrations.huggingface_lab import HOLD, QUIET, spikes
from tests.integrations.mlflow_lab import scripts
from tests.integrations.wandb_lab import in_folder, read_run

pytest.importorskip("accelerate", reason="Hugging Face's accelerate is not installed")
pytest.importorskip("mlflow")
pytest.importorskip("wandb")

LOOP = f"""
{HOLD}
import gc, mlflow, torch, wandb, weakref
from accelerate import Accelerator
from memtrack_accelerate import watch
from memtrack.errors import SettingsError
"""
LOOP += """
class Net(torch.nn.Linear):
    def state_dict(self, *args, **kwargs):
        hold(200)
        return super().state_dict(*args, **kwargs)

def loop(accelerator, name):
    accelerator.init_trackers(name)
    torch.manual_seed(0)
    net = Net(4, 1)
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    rows = []
    for step in range(10, 18):
        if step == 15:
            hold(300)
        loss = net(torch.randn(8, 4)).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        row = {"loss": loss.item()}
        accelerator.log(row, step=step)
        rows.append(row)
        time.sleep(0.1)
    return rows

alone = Accelerator(cpu=True)
report(alone=loop(alone, "alone"))
try:
    watch(object())
except SettingsError as exc:
    report(refused=str(exc))

HELD.clear()
accelerator = watch(Accelerator(cpu=True, log_with=["mlflow", "wandb"]), interval=0.1, flush_interval=0.2)
assert watch(accelerator) is accelerator and isinstance(accelerator, Accelerator)
report(rows=loop(accelerator, "accelerate"), loop_held=HELD[:], run_id=wandb.run.id)
HELD.clear()
accelerator.save_state("checkpoint")
report(save_held=HELD[:], saved=sorted(os.listdir("checkpoint")))
HELD.clear()
error = OSError("disk full")
def fail(*_):
    raise error
accelerator.register_save_state_pre_hook(fail)
try:
    accelerator.save_state("checkpoint")
except OSError as caught:
    assert caught is error
hold(250)
report(after_held=HELD[:])
accelerator.log({"again": 1.0}, step=17)
accelerator.log({"no step": 1.0})
accelerator.log(values={"accuracy": 0.5}, step=30, log_kwargs={})
accelerator.end_training()

# the object is held by nobody else
accelerator = watch(Accelerator(cpu=True))
gc.collect()
gc.disable()
gone = weakref.ref(accelerator)
del accelerator
report(is_gone=gone() is None)
"""


@pytest.fixture(scope="module")
def watched(_server, tmp_path_factory):
    """One process with a loop that is not watched, and then one that is."""
    _server.start()
    folder = tmp_path_factory.mktemp("accelerate")
    with scripts(folder) as train:
        done = in_folder(train, folder)(LOOP, MLFLOW_TRACKING_URI=_server.uri, **QUIET)
        (run,) = _server.runs("accelerate")
        yield done, done.result, _server.history(run.info.run_id), read_run(folder, done.result["run_id"])


def test_each_tracker_has_loss_and_peak_in_the_same_row(watched):
    """At the loop's own steps, each once; the loop's dicts and losses are as without memtrack."""
    done, result, history, run = watched
    assert result["rows"] == result["alone"]
    losses = [row["loss"] for row in result["rows"]]
    steps = [*range(10, 18)]
    assert [(step, value) for _, step, value in history["loss"]] == list(zip(steps, losses, strict=True))
    stamps = {key: [(stamp, step) for stamp, step, _ in history[key]] for key in ("loss", "accuracy", STEP_PEAK)}
    assert stamps[STEP_PEAK] == stamps["loss"] + stamps["accuracy"]
    assert [(step, row["loss"]) for step, row in run.history if "loss" in row] == list(zip(steps, losses, strict=True))
    peaks = [(step, row[STEP_PEAK]) for step, row in run.history if "loss" in row]
    assert peaks == [(step, value) for _, step, value in history[STEP_PEAK]][:-1]
    peak = dict(peaks)
    assert peak[15] - peak[14] == pytest.approx(300, rel=0.1)
    assert max(abs(peak[step] - peak[14]) for step in (11, 12, 13, 16, 17)) < 30
    assert "memtrack" not in done.stderr


def test_what_follows_a_row_is_the_next_step(watched):
    """The peak of a step is marked with the number that its row has."""
    done, result, _, _ = watched
    found = spikes(done.recording, result["loop_held"])
    assert set(found) == {("", 15, -1)}
    assert found["", 15, -1] == pytest.approx(300, rel=0.1)


def test_saving_is_a_phase_also_if_it_fails(watched):
    """``save_state`` saves what it always does; after an exception the phase is left."""
    done, result, _, _ = watched
    found = spikes(done.recording, result["save_held"])
    assert found == {("checkpoint", 18, -1): pytest.approx(200, rel=0.1)}
    assert "model.safetensors" in result["saved"]
    after = spikes(done.recording, result["after_held"])
    assert after == {("checkpoint", 18, -1): pytest.approx(200, rel=0.1), ("", 18, -1): pytest.approx(250, rel=0.1)}


def test_nothing_else_is_different(watched):
    """Rows with keywords, a second one of a step, one without; the wrong object is refused, the right one not held."""
    _, result, history, run = watched
    assert [(step, value) for _, step, value in history["accuracy"]] == [(30, 0.5)]
    assert [step for _, step, _ in history["again"]] == [17]
    assert len(history["no step"]) == 1
    assert [row["accuracy"] for _, row in run.history if "accuracy" in row] == [0.5]
    assert result["refused"].endswith("give an accelerate.Accelerator")
    assert result["is_gone"]
    assert f"system/{metrics.RSS}" in history
    assert "proc.memory.rssMB/l:memtrack" in run.series
