"""What the callbacks cost a training: their hooks, timed inside real trainings beside those of an empty callback.

    python tests/benchmarks/callbacks.py [lightning keras huggingface pytorch accelerate]

In each training both callbacks are called in each step, so that both find the caches as the step has left them, and
half of the time the empty one comes first. The difference of the medians is what memtrack adds: to steps without a row
of the framework's log, and to those with one. The empty callback adds nothing to a row. The model is small: a step
takes some 0.5 ms, so rows come faster than in most trainings. A framework takes 10 to 30 seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 4000, 10
"""Steps of a training, and how often it logs a row."""
STEP_BUDGET_US, ROW_BUDGET_US = 2.0, 20.0

Times = dict[str, list[int]]


class Clock:
    """Nanoseconds that the hooks of two callbacks took, by step."""

    def __init__(self) -> None:
        self.spent = {"empty": 0, "memtrack": 0}
        self.plain: Times = {"empty": [], "memtrack": []}
        self.logged: Times = {"empty": [], "memtrack": []}

    def timed(self, who: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, with its time noted."""

        def ours(*args: Any, **kwargs: Any) -> Any:
            began_ns = perf_counter_ns()
            result = call(*args, **kwargs)
            self.spent[who] += perf_counter_ns() - began_ns
            return result

        return ours

    def step_over(self, *, is_logged: bool, by: str = "") -> None:
        """A step is over; what was spent in it counts. ``by``: whose way its row has gone, if it went one of two."""
        for who, spent_ns in self.spent.items():
            if by in ("", who):
                (self.logged if is_logged else self.plain)[who].append(spent_ns)
            self.spent[who] = 0

    def figures(self) -> dict[str, float]:
        """Medians in microseconds, the first steps left out."""
        found = {}
        for kind, times in (("step", self.plain), ("row", self.logged)):
            for who, spent_ns in times.items():
                if len(spent_ns) > 20:
                    found[f"{kind} {who}"] = median(spent_ns[10:]) / 1e3
        return found


def time_hooks(clock: Clock, who: str, callback: Any, hooks: tuple[str, ...]) -> Any:
    """The callback itself, with those of its hooks timed."""
    for hook in hooks:
        setattr(callback, hook, clock.timed(who, getattr(callback, hook)))
    return callback


def network() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))


def batches(count: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    data = torch.rand(32, 64, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    return [data] * count


# -- trainings ------------------------------------------------------------------------------------------------------


def lightning(clock: Clock, is_first: bool) -> None:
    """Rows by ``log_every_n_steps``. memtrack adds to one while Lightning logs it: every second row goes to Lightning's
    own method at once, past memtrack, which is the row of the empty callback."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers.logger import DummyLogger
    from memtrack_lightning import MemoryCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    hooks = "on_train_batch_start", "on_train_batch_end"

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def training_step(self, batch, number):
            loss = torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    class Empty(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pass

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pass

    class Over(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            connector = trainer._logger_connector
            ways = {
                "memtrack": clock.timed("memtrack", connector.log_metrics),
                "empty": clock.timed("empty", partial(type(connector).log_metrics, connector)),
            }
            turn = cycle(ways)
            self.by = ""

            def log_metrics(metrics):
                self.by = next(turn)
                ways[self.by](metrics)

            connector.log_metrics = log_metrics

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clock.step_over(is_logged=bool(self.by), by=self.by)
            self.by = ""

    both = [
        time_hooks(clock, "empty", Empty(), hooks),
        time_hooks(clock, "memtrack", MemoryCallback(), hooks),
    ]
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=DummyLogger(),
        log_every_n_steps=EVERY,
        callbacks=[*(both if is_first else reversed(both)), Over()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(batches(STEPS), batch_size=None))


def huggingface(clock: Clock, is_first: bool) -> None:
    """Rows by ``logging_steps``; memtrack's callback always comes first, wherever it is put."""
    import torch
    from memtrack_huggingface import MemoryCallback
    from transformers import Trainer, TrainerCallback, TrainingArguments

    hooks = "on_step_begin", "on_log"

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, pixels, labels):
            return {"loss": torch.nn.functional.cross_entropy(self.layers(pixels), labels)}

    class Empty(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            pass

        def on_log(self, args, state, control, logs=None, **kwargs):
            pass

    class Over(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.step_over(is_logged=state.global_step % EVERY == 0)

    callbacks = [
        Over(),
        time_hooks(clock, "memtrack", MemoryCallback(), hooks),
        time_hooks(clock, "empty", Empty(), hooks),
    ]
    pixels, labels = batches(1)[0]
    data = [{"pixels": image, "labels": label} for image, label in zip(pixels, labels, strict=True)] * (STEPS // 4)
    arguments = TrainingArguments(
        "out",
        max_steps=STEPS // 2,
        per_device_train_batch_size=8,
        logging_steps=EVERY,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(Net(), arguments, train_dataset=data, callbacks=callbacks).train()


def keras(clock: Clock, is_first: bool) -> None:
    """A row an epoch, of ten steps."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras as k
    from memtrack_keras import MemoryCallback

    hooks = "on_train_batch_begin", "on_epoch_end"

    class Empty(k.callbacks.Callback):
        async_safe = True

        def on_train_batch_begin(self, batch, logs=None):
            pass

        def on_epoch_end(self, epoch, logs=None):
            pass

    class Over(k.callbacks.Callback):
        async_safe = True

        def on_train_batch_begin(self, batch, logs=None):
            if batch:
                clock.step_over(is_logged=False)

        def on_epoch_end(self, epoch, logs=None):
            clock.step_over(is_logged=True)

    both = [
        time_hooks(clock, "empty", Empty(), hooks),
        time_hooks(clock, "memtrack", MemoryCallback(), hooks),
    ]
    model = k.Sequential([k.Input((64,)), k.layers.Dense(256, activation="relu"), k.layers.Dense(10)])
    model.compile("sgd", "mse")
    pixels = batches(1)[0][0].numpy()
    model.fit(
        pixels.repeat(EVERY, axis=0),
        pixels.repeat(EVERY, axis=0)[:, :10],
        batch_size=32,
        epochs=STEPS // EVERY // 4,
        verbose=0,
        callbacks=[*(both if is_first else reversed(both)), Over()],
    )


def pytorch(clock: Clock, is_first: bool) -> None:
    """``watch`` beside a plain iterator, and what its ``row()`` takes beside an empty dictionary."""
    import torch
    from memtrack_pytorch import watch

    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    watched = watch(batches(STEPS))
    it = {"empty": iter(batches(STEPS)), "memtrack": iter(watched)}
    rows = {"empty": dict, "memtrack": watched.row}
    ways = {who: (clock.timed(who, it[who].__next__), clock.timed(who, rows[who])) for who in it}
    order = list(ways) if is_first else list(reversed(ways))
    for step in range(STEPS - 1):
        for who in order:
            pixels, labels = ways[who][0]()
        torch.nn.functional.cross_entropy(net(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        is_logged = step % EVERY == 0
        if is_logged:
            for who in order:
                ways[who][1]()
        clock.step_over(is_logged=is_logged)


def accelerate(clock: Clock, is_first: bool) -> None:
    """``log`` of an accelerator that is watched beside that of one that is not; every step is a row."""
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from memtrack_accelerate import watch

    class Nowhere(GeneralTracker):
        name, requires_logging_directory = "nowhere", False

        @property
        def tracker(self):
            return None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            pass

    both = {"empty": Accelerator(cpu=True, log_with=Nowhere()), "memtrack": Accelerator(cpu=True, log_with=Nowhere())}
    for accelerator in both.values():
        accelerator.init_trackers("p")
    watch(both["memtrack"])
    logs = {who: clock.timed(who, accelerator.log) for who, accelerator in both.items()}
    order = list(both) if is_first else list(reversed(both))
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for step, (pixels, labels) in enumerate(batches(STEPS)):
        torch.nn.functional.cross_entropy(net(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for who in order:
            logs[who]({"loss": 1.0}, step=step)
        clock.step_over(is_logged=True)


TRAININGS = {one.__name__: one for one in (lightning, keras, huggingface, pytorch, accelerate)}


# -- the table ------------------------------------------------------------------------------------------------------


def measure(framework: str) -> dict[str, float]:
    """Train twice in this process, each callback first once; the median of both."""
    warnings.simplefilter("ignore")
    sys.path[:0] = [str(ROOT), str(ROOT / "integrations")]  # before what may be installed
    clock = Clock()
    for is_first in (True, False):
        TRAININGS[framework](clock, is_first)
    return clock.figures()


def main() -> None:
    """Each framework in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="*", default=[], choices=[*TRAININGS, []], metavar="FRAMEWORK")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("FIGURES " + json.dumps(measure(options.one)))
        return
    print(f"| | a step, of {STEP_BUDGET_US:.0f} us | a row, of {ROW_BUDGET_US:.0f} us |\n|---|---|---|")
    for framework in options.frameworks or TRAININGS:
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "MEMTRACK_DIR": folder, "HF_HUB_OFFLINE": "1", "COMET_DISABLE_AUTO_LOGGING": "1"}
            command = [sys.executable, __file__, "--one", framework]
            done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.rpartition("FIGURES ")[2])
        cells = []
        for kind in ("step", "row"):
            ours, empty = figures.get(f"{kind} memtrack"), figures.get(f"{kind} empty")
            known = ours is not None and empty is not None
            cells.append(f"+{ours - empty:.1f} us ({ours:.1f} against {empty:.1f})" if known else "")
        print(f"| {framework} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
