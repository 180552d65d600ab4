"""Real trainings with ``lightning.pytorch`` or ``pytorch_lightning`` for processes of their own, and what they show."""

from __future__ import annotations

import csv
import io
from importlib.metadata import entry_points
from importlib.util import find_spec
from statistics import quantiles

import pytest

from memtrack import metrics
from memtrack.recording.layout import PHASE_BEGIN
from memtrack.recording.reader import RecordingReader
from memtrack.training import STEP_PEAK
from tests.integrations.mlflow_lab import rows

GROUPS = {
    "lightning.pytorch": "lightning.pytorch.callbacks_factory",
    "pytorch_lightning": "pytorch_lightning.callbacks_factory",
}

FAST = "interval=0.1, flush_interval=0.2"

LAB = """
import importlib, warnings
warnings.simplefilter("ignore")
import numpy, torch
lightning = importlib.import_module(os.environ["PACKAGE"])
loggers = importlib.import_module(os.environ["PACKAGE"] + ".loggers")

def hold(mib):
    block = numpy.ones(mib << 17)
    time.sleep(0.3)
    return block[0]

class Net(lightning.LightningModule):
    '''Holds memory, or fails, when a call has the number that the plan says.'''
    def __init__(self, **plan):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.plan, self.calls, self.losses = torch.nn.Linear(4, 1), plan, {}, []
    def at(self, kind):
        self.calls[kind] = self.calls.get(kind, 0) + 1
        what = self.plan.get(f"{kind}_{self.calls[kind]}", 0)
        if isinstance(what, BaseException):
            raise what
        if what:
            hold(what)
    def on_train_start(self):
        self.times = [time.time()]
    def on_train_end(self):
        time.sleep(0.6)  # on a fast machine there would not be a window in all that time
        self.times.append(time.time())
    on_test_start, on_test_end = on_train_start, on_train_end
    def training_step(self, batch, number):
        self.at("train")
        loss = (self.layer(batch[0]) - 1).pow(2).mean()
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss
    def validation_step(self, batch, number):
        self.at("sanity" if self.trainer.sanity_checking else "validation")
        self.log("quality", self.layer(batch[0]).mean())
    def test_step(self, batch, number):
        self.at("test")
    def predict_step(self, batch, number):
        self.at("predict")
        return self.layer(batch[0])
    def on_save_checkpoint(self, checkpoint):
        self.at("save")
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

def data(batches):
    numbers = torch.linspace(-1, 1, batches * 8).reshape(-1, 4)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(numbers), batch_size=2)

def trainer(*callbacks, **more):
    return lightning.Trainer(**{
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "log_every_n_steps": 1,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": list(callbacks), **more,
    })

def ours(trainer):
    return [callback for callback in trainer.callbacks if type(callback).__module__.startswith("memtrack")]

def table(logger):
    with open(logger.experiment.metrics_file_path) as file:
        return file.read()
"""


def need(package):
    """Skip unless there is this package, and what asks memtrack for its callback."""
    if find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    if not [entry for entry in entry_points(group=GROUPS[package]) if entry.name == "memtrack"]:
        pytest.skip("memtrack itself is not installed, so that its entry points are not there")


def logged(text):
    """The rows that a CSVLogger has written: ``[{key: value}]``, without what is empty."""
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def without_ours(found):
    """Rows without what memtrack has added."""
    return [{key: value for key, value in row.items() if not key.startswith("memory/")} for row in found]


def peaks(found):
    """``step -> peak in MiB``; each step has one row with a peak, and it is that of the loss."""
    ours = [row for row in found if STEP_PEAK in row]
    assert all("loss" in row for row in ours)
    assert len({row["step"] for row in ours}) == len(ours)
    return {int(row["step"]): row[STEP_PEAK] for row in ours}


def spikes(recording, since=0.0, until=float("inf")):
    """``(phase, step, epoch) -> MiB`` of what stood out by 100 MiB or more in a time: its highest point."""
    with RecordingReader(str(recording)) as reader:
        names = reader.names()
    # a last window may have been cut before anything was sampled in it
    cells = [row.cells[metrics.RSS] for row in rows(recording, since, until) if metrics.RSS in row.cells]
    # what is held stands for half of the time
    floor = quantiles(cell.min for cell in cells)[0]
    found: dict[tuple[str, int, int], float] = {}
    for cell in cells:
        if cell.max > floor + 100:
            key = (names[cell.phase], cell.step, cell.epoch)
            found[key] = max(found.get(key, 0.0), cell.max - floor)
    return found


def phases(recording):
    """The names of the phases that were entered, in the order of entering."""
    with RecordingReader(str(recording)) as reader:
        names = reader.names()
        return [names[mark.name] for mark in reader.marks() if mark.kind == PHASE_BEGIN]
