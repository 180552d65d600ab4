"""The callback, given by hand or by autolog."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.training import Training
from memtrack_huggingface import _methods

if TYPE_CHECKING:
    from collections.abc import Callable

    TrainerCallback = object
else:
    from transformers import TrainerCallback


class MemoryCallback(TrainerCallback):
    """Marks steps, epochs and phases of a Trainer, and adds memory figures to each row of its log that has a loss.

    ``Trainer(..., callbacks=[MemoryCallback()])``. A step is marked by the number that the Trainer logs it under, an
    epoch by the whole part of the Trainer's. The phases are ``train``, ``validation`` (``evaluate``), ``predict`` and
    ``checkpoint`` (all that saves). The peak in a row is that since the row before, evaluations and saving included.
    """

    def __init__(self, **settings: Any) -> None:
        """``settings`` are those of :func:`memtrack.autolog`, for a process that nothing monitors yet.

        With ``checkpoints=True``, or where to, the Trainer's checkpoints are stored with the run, see
        :func:`memtrack.log_checkpoint`. Raises SettingsError.
        """
        self.training = Training(**settings)
        _methods.follow("by hand", _training_of)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training begins, or begins anew with smaller batches."""
        self.training.end()
        self.training.begin()
        self.training.enter("train")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training is over; one that fails does not come here."""
        self.training.end()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The epoch is a fraction; it is whole here, unless the training goes on from a checkpoint."""
        self.training.epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once for all batches whose gradients are accumulated. The step is counted, and logged, when it is over."""
        self.training.step(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete, in a folder that the Trainer names by the step."""
        if state.is_world_process_zero:
            self.training.saved(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Not the rows of evaluations and of the end, which stand at a step that has a row with its loss."""
        if logs and "loss" in logs and state.is_world_process_zero:
            figures = self.training.row()
            logs.update(figures)
            # the row was copied there before the callbacks got it
            if state.log_history and "loss" in state.log_history[-1]:
                state.log_history[-1].update(figures)


class AutomaticCallback(MemoryCallback):
    """The callback that autolog gives each Trainer. A class of its own: a Trainer warns of two of the same."""

    def __init__(self) -> None:
        self.training = Training(automatic=True)


def autolog() -> Callable[[], None]:
    """Give each Trainer that is made from now on the callback. Returns what takes it back.

    ``transformers.trainer`` has been imported.
    """
    defaults = import_module("transformers.trainer").DEFAULT_CALLBACKS
    _methods.follow("autolog", _training_of)
    defaults.append(AutomaticCallback)

    def undo() -> None:
        if AutomaticCallback in defaults:
            defaults.remove(AutomaticCallback)
        _methods.unfollow("autolog")

    return undo


def _training_of(trainer: Any) -> Training | None:
    """What the callback of a Trainer has to tell, if it has one; of several, the user's is kept, and is made the first.

    A Trainer puts what it is given behind those that report its rows, where what is added to a row comes too late.
    """
    callbacks = trainer.callback_handler.callbacks
    found = [one for one in callbacks if isinstance(one, MemoryCallback)]
    if not found:
        return None
    kept = min(found, key=lambda one: isinstance(one, AutomaticCallback))
    if found != [callbacks[0]]:
        callbacks[:] = [kept, *(one for one in callbacks if not isinstance(one, MemoryCallback))]
    return kept.training
