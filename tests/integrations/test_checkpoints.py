"""What frameworks save is stored with the run by one argument of the callback, and restored as it was saved."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

import memtrack
from memtrack.artifacts.store import FolderStore

pytest.importorskip("torch")
pytest.importorskip("zstandard")

LIGHTNING = """
import logging, warnings
warnings.simplefilter("ignore")
import lightning.pytorch as pl, torch
from memtrack_lightning import MemoryCallback
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(300, 300)
    def training_step(self, batch, number):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-6)
data = torch.utils.data.DataLoader(torch.randn(64, 300), batch_size=16)
saving = pl.callbacks.ModelCheckpoint("saved", save_top_k=1, save_last=True, every_n_epochs=1)
pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, callbacks=[saving, MemoryCallback(checkpoints="store")],
           enable_progress_bar=False, enable_model_summary=False).fit(Net(), data)
"""

KERAS = """
import keras, numpy as np
from memtrack_keras import MemoryCallback
model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300)])
model.compile("adam", "mse")
x = np.random.default_rng(0).standard_normal((64, 300)).astype("float32")
saving = keras.callbacks.ModelCheckpoint("saved/{epoch:02d}.keras")
model.fit(x, x, batch_size=16, epochs=3, verbose=0, callbacks=[MemoryCallback(checkpoints="store"), saving])
"""

HUGGINGFACE = """
import torch
from memtrack_huggingface import MemoryCallback
from transformers import Trainer, TrainingArguments
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(300, 300)
    def forward(self, x, labels=None):
        return {"loss": self.layer(x).square().mean()}
data = [{"x": torch.randn(300), "labels": 0} for _ in range(64)]
arguments = TrainingArguments("saved", num_train_epochs=3, per_device_train_batch_size=16, save_strategy="epoch",
                              save_total_limit=1, report_to=[], use_cpu=True, disable_tqdm=True)
Trainer(Net(), arguments, train_dataset=data, callbacks=[MemoryCallback(checkpoints="store")]).train()
"""

STEPS = ["checkpoint/step-00000004", "checkpoint/step-00000008", "checkpoint/step-00000012"]


def digests(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*") if path.is_file()}


def stored(folder):
    """The names of the artifacts in a store."""
    names = [name for name in FolderStore(folder).names() if name.startswith("memtrack/checkpoint")]
    return sorted(name.removeprefix("memtrack/").removesuffix(".mtz") for name in names)


def test_lightning(train, tmp_path):
    """One artifact for each step, though it is saved twice; the Trainer removes all but the last at once."""
    pytest.importorskip("lightning")
    train(LIGHTNING)
    assert stored(tmp_path / "store") == STEPS
    back = memtrack.restore(f"{tmp_path}/store/checkpoint", tmp_path / "back")
    assert sha256(Path(back).read_bytes()).hexdigest() == digests(tmp_path / "saved")[Path(back).name]
    # those that have been removed meanwhile are there as well
    assert Path(memtrack.restore(f"{tmp_path}/store/{STEPS[0]}", tmp_path / "first")).name == "epoch=0-step=4.ckpt"


def test_keras(train, tmp_path):
    pytest.importorskip("keras")
    train(KERAS, KERAS_BACKEND="torch")
    assert stored(tmp_path / "store") == STEPS
    for step, name in zip(STEPS, ("01.keras", "02.keras", "03.keras"), strict=True):
        back = Path(memtrack.restore(f"{tmp_path}/store/{step}", tmp_path / "back"))
        assert (back.name, back.read_bytes()) == (name, (tmp_path / "saved" / name).read_bytes())


def test_huggingface(train, tmp_path):
    """Folders, with the optimizer's state, of which the Trainer keeps one."""
    pytest.importorskip("transformers")
    train(HUGGINGFACE, HF_HUB_OFFLINE="1")
    assert stored(tmp_path / "store") == STEPS
    memtrack.restore(f"{tmp_path}/store/checkpoint", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "saved" / "checkpoint-12")
    memtrack.restore(f"{tmp_path}/store/{STEPS[0]}", tmp_path / "first")
    assert digests(tmp_path / "first").keys() == digests(tmp_path / "back").keys()
