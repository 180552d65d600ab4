"""What no hook of a Trainer tells: that an evaluation, a prediction or a save begins, and that a training has failed.

So methods of the class are replaced. They do what they did, and mark where that begins and ends if the Trainer has the
callback.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.notices import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.training import Training

    TrainingOf = Callable[[Any], Training | None]

PHASES = {
    "train": "train",
    "evaluate": "validation",
    "predict": "predict",
    "save_model": "checkpoint",
    "_save_checkpoint": "checkpoint",
}
"""Method -> phase. The last one saves the optimizer, too, after it has called the one before."""

_wanted: set[str] = set()
_replaced: list[tuple[str, Any, Any]] = []


def follow(who: str, training_of: TrainingOf) -> None:
    """Replace the methods, unless they are; ``who`` wants it. ``training_of`` is asked at each call."""
    trainer_class = import_module("transformers.trainer").Trainer
    _wanted.add(who)
    if _replaced:
        return
    for name, phase in PHASES.items():
        original = getattr(trainer_class, name, None)
        if original is not None:
            ours = _marked(original, phase, training_of)
            setattr(trainer_class, name, ours)
            _replaced.append((name, original, ours))


def unfollow(who: str) -> None:
    """Put the originals back, unless there is somebody else who wants them replaced."""
    trainer_class = import_module("transformers.trainer").Trainer
    _wanted.discard(who)
    while _replaced and not _wanted:
        name, original, ours = _replaced.pop()
        # who has replaced it since then calls ours, which does nothing in a Trainer without the callback
        if getattr(trainer_class, name) is ours:
            setattr(trainer_class, name, original)


def _marked(original: Callable[..., Any], phase: str, training_of: TrainingOf) -> Callable[..., Any]:
    def begin(trainer: Any) -> Training | None:
        try:
            training = training_of(trainer)
            if training is not None and phase != "train":  # for which there is a hook
                if not trainer.is_in_train:
                    training.begin()
                training.enter(phase)
            return training
        except Exception as exc:
            warn_once("trainer", f"memtrack does not follow this Trainer ({type(exc).__name__}: {exc}).")
            return None

    @functools.wraps(original)
    def ours(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        training = begin(trainer)
        try:
            return original(trainer, *args, **kwargs)
        finally:
            if training is not None and phase == "train":
                training.end()
            elif training is not None:
                training.leave(phase)

    return ours
