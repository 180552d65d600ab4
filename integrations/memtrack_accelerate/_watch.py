"""``watch(accelerator)``: what a loop tells its ``Accelerator`` tells memtrack where the training stands."""

from __future__ import annotations

from typing import Any, TypeVar

from memtrack.errors import SettingsError
from memtrack.notices import warn_once
from memtrack.training import Training

AnyAccelerator = TypeVar("AnyAccelerator")


def watch(accelerator: AnyAccelerator, **settings: Any) -> AnyAccelerator:
    """Monitor this process, and add memory figures to each row that ``accelerator.log(values, step=n)`` logs.

    Every tracker of the accelerator has them in the same row, the first one of each step; ``values`` itself is not
    changed. What follows the row of step ``n`` is marked as step ``n + 1``; where not every step is logged,
    ``memtrack.step`` in the loop tells more. ``save_state`` and ``save_model`` are the phase ``checkpoint``.

    Args:
        accelerator: An ``accelerate.Accelerator``. Watching it again changes nothing.
        settings: Those of :func:`memtrack.autolog`, for a process that nothing monitors yet.

    Returns the accelerator. Raises SettingsError.
    """
    training = Training(**settings)
    if isinstance(accelerator, _Watched):
        return accelerator
    kind: Any = type(accelerator)
    if not callable(getattr(kind, "log", None)) or not callable(getattr(kind, "save_state", None)):
        raise SettingsError("accelerator", accelerator, "give an accelerate.Accelerator")
    training.begin()
    # a class of its own, and no functions in the object: those would hold it, and with it the models, in a cycle
    accelerator.__class__ = type(
        kind.__name__, (_Watched, kind), {"__module__": kind.__module__, "_memtrack": training}
    )
    return accelerator


def _saving(name: str) -> Any:
    def save(watched: _Watched, *args: Any, **kwargs: Any) -> Any:
        training = watched._memtrack
        training.enter("checkpoint")
        try:
            return getattr(super(_Watched, watched), name)(*args, **kwargs)
        finally:
            training.leave("checkpoint")

    return save


class _Watched:
    """What comes before an ``Accelerator``'s own methods."""

    _memtrack: Training
    _memtrack_step: Any = None

    save_state = _saving("save_state")
    save_model = _saving("save_model")

    def log(self, values: Any, step: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The row, with what is to be said of the memory since the last one."""
        accelerator: Any = super()
        training = self._memtrack
        is_first = step != self._memtrack_step if step is not None else self._memtrack_step is None
        if is_first and isinstance(values, dict):
            values = {**values, **training.row()}
        result = accelerator.log(values, step, *args, **kwargs)
        if step is not None:
            self._memtrack_step = step
            _reach(training, step)
        return result


def _reach(training: Training, step: Any) -> None:
    """What comes now belongs to the row after this one."""
    try:
        training.step(int(step) + 1)
    except Exception as exc:
        warn_once("accelerate step", f"memtrack takes {step!r} for no step ({type(exc).__name__}).")
