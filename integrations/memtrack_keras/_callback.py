"""The callback: what Keras's hooks tell becomes marks and phases, and the epoch's peak goes into the epoch's logs."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import TYPE_CHECKING, Any

import keras

from memtrack.notices import warn_once
from memtrack.training import Training

if TYPE_CHECKING:
    from collections.abc import Callable

    _Base: Any = object
else:
    _Base = keras.callbacks.Callback

SAVING = ("save", "save_weights")
"""The methods of a model that ModelCheckpoint, BackupAndRestore and the trackers' callbacks save it with."""

_running: weakref.ref[MemoryCallback] | None = None


def running() -> MemoryCallback | None:
    """The callback of the ``fit`` that is under way, if there is one."""
    return None if _running is None else _running()


class Phases(_Base):  # type: ignore[misc]
    """Marks what is evaluated and predicted inside of a ``fit`` whose callback has this ``training``."""

    async_safe = True  # or Keras waits for the device after each batch; nothing here looks at what it computes

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training = training

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """``evaluate`` begins, in most cases that of the epoch."""
        self.training.enter("validation")

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """It is over."""
        self.training.leave("validation")

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """``predict`` begins."""
        self.training.enter("predict")

    def on_predict_end(self, logs: dict[str, Any] | None = None) -> None:
        """It is over."""
        self.training.leave("predict")


class MemoryCallback(Phases):
    """For ``model.fit(..., callbacks=[MemoryCallback(), ...])``, ``evaluate`` and ``predict``: the first of the list.

    Marks epochs by Keras's own number, which begins with 0; steps by the number that ``optimizer.iterations`` reaches
    with them; and the phases train, validation, test, predict, and checkpoint while ``model.save`` or ``save_weights``
    runs. Adds ``memory/epoch/rss_peak_mib``, the highest resident memory since the last epoch's end in MiB, to the
    ``logs`` of each epoch: History, the progress bar and the callbacks that come later in the list have it beside the
    loss. What these do at the end of an epoch, such as saving, counts in the next one.

    Asynchronous dispatch stays on: the device is asked for ``optimizer.iterations`` at the beginning of an epoch only,
    and batches are counted from there. ``memtrack.autolog()`` need not be called. Keras does not tell a callback that
    ``fit`` was broken off by an exception: its phase ends at once if autolog was on when it began, else as soon as
    something begins with this callback again.

    Args:
        automatic: Of a callback that autolog has put there.
        checkpoints: Store what ``model.save`` and ``save_weights`` write during ``fit``, ModelCheckpoint's among it,
            with the run, see ``memtrack.log_checkpoint``: True, or where to.
        settings: Those of ``memtrack.autolog``, for a process in which nothing is monitoring yet.

    Raises:
        SettingsError: A setting is wrong.
    """

    def __init__(self, *, automatic: bool = False, **settings: Any) -> None:
        super().__init__(Training(automatic=automatic, **settings))
        self._automatic = automatic
        self._settings = settings
        self._model_told: Callable[[], Any] = _nothing
        self._fitting = False
        self._mark = self.training.step
        self._watched: dict[str, Callable[..., Any]] = {}
        # batches: done once this execution is, of an execution, of a step of the optimizer
        self._done, self._span, self._every = 0, 1, 1
        self._last = sys.maxsize
        self._iterations = -1

    def __reduce__(self) -> Any:
        # a copy is made from what this was made from: those who search for parameters copy callbacks for each trial
        return functools.partial(type(self), automatic=self._automatic, **self._settings), ()

    def set_model(self, model: Any) -> None:
        """A list of callbacks is made: what this one was in before has been broken off."""
        self.over()
        if not self._automatic:  # which outlives the models
            super().set_model(model)
        self._model_told = weakref.ref(model)

    def fits(self, model: object) -> bool:
        """Whether ``fit`` of this model is under way."""
        return self._fitting and self._model_told() is model

    def over(self) -> None:
        """Whatever has begun is over, well or not."""
        global _running
        if not self._fitting:
            self.training.leave("test")
            self.training.leave("predict")
            return
        self._fitting = False
        self.training.end()
        model = self._model_told()
        for name, ours in self._watched.items():
            if model is not None and vars(model).get(name) is ours:
                del vars(model)[name]
        self._watched.clear()
        if running() is self:
            _running = None

    # -- fit ---------------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """``fit`` begins."""
        global _running
        self.over()
        self._begin("train")
        self._fitting, _running = True, weakref.ref(self)
        try:
            model = self._model_told()
            self._iterations, self._span = -1, getattr(model, "steps_per_execution", 1)
            self._find_step()
            self._watch_saving(model)
        except Exception as exc:
            warn_once("keras", f"memtrack sees less of this training ({type(exc).__name__}: {exc}).")

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """``fit`` is about to return."""
        self.over()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An epoch begins."""
        self.training.epoch(epoch)
        try:
            self._find_step()
        except Exception as exc:
            warn_once("keras step", f"memtrack only counts the steps of this training ({type(exc).__name__}: {exc}).")

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """A batch begins, or as many as the model has ``steps_per_execution``."""
        done = self._done + self._span
        if done > self._last:
            done = self._last  # the last execution of an epoch has less of them
        self._done = done
        self._mark((done - 1) // self._every + 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An epoch is over, its validation too."""
        if logs is not None:
            logs.update(self.training.row("epoch"))

    def _find_step(self) -> None:
        """Ask the optimizer where it is. That waits for the device, which at this moment has nothing to do."""
        self._last = sys.maxsize
        optimizer = getattr(self._model_told(), "optimizer", None)
        if optimizer is not None:
            iterations = int(keras.ops.convert_to_numpy(optimizer.iterations))
            of = getattr(optimizer, "inner_optimizer", optimizer)
            # where it is no property, as in Keras 3.0, the iterations are batches, whether gradients accumulate or not
            if isinstance(getattr(type(of), "iterations", None), property):
                self._every = of.gradient_accumulation_steps or 1
            # one that stands still is not in use: the model has others of its own. That it has gone further than the
            # last whole step does not show
            if iterations not in (self._iterations, self._done // self._every):
                self._done = iterations * self._every
            self._iterations = iterations
        steps = (getattr(self, "params", None) or {}).get("steps")
        if steps:
            self._last = self._done + steps

    def _watch_saving(self, model: Any) -> None:
        for name in SAVING:
            if model is not None and name not in vars(model):
                # not by setattr: Keras tracks what is set on a model
                self._watched[name] = vars(model)[name] = self._saving(getattr(model, name))

    def _saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        training = self.training

        @functools.wraps(save)
        def ours(*args: Any, **kwargs: Any) -> Any:
            training.enter("checkpoint")
            try:
                found = save(*args, **kwargs)
            finally:
                training.leave("checkpoint")
            training.saved(args[0] if args else kwargs.get("filepath"), self._done // self._every)
            return found

        return ours

    # -- evaluate and predict ----------------------------------------------------------------------------------------

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """``evaluate`` begins."""
        if self._fitting:
            super().on_test_begin(logs)
        else:
            self._begin("test")

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """It is over."""
        self.training.leave("validation" if self._fitting else "test")

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """``predict`` begins."""
        if self._fitting:
            super().on_predict_begin(logs)
        else:
            self._begin("predict")

    def _begin(self, phase: str) -> None:
        self.training.begin()
        self.training.enter(phase)


def _nothing() -> None:
    pass
