"""Giving every training, evaluation and prediction of Keras a callback."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.sinks.following import Follower

if TYPE_CHECKING:
    from collections.abc import Callable


class _KerasFollower(Follower):
    """Puts the callback first into each ``keras.callbacks.CallbackList``, when that is told its model.

    ``fit``, ``evaluate`` and ``predict`` make one, and so do programs with a loop of their own. It is told its model
    after it has looked which callbacks let Keras dispatch asynchronously, and before it tells them anything.
    """

    def __init__(self) -> None:
        super().__init__(lambda _: None)  # it feeds no runs
        # not before Keras has been imported, by the program, for the backend that it wants
        self._module: Any = import_module("memtrack_keras._callback")
        self._callback = self._module.MemoryCallback(automatic=True)
        self._fits = 0

    def install(self) -> None:
        """Follow what begins from now on."""
        keras = import_module("keras")
        self.before(keras.callbacks.CallbackList, "set_model", self._on_model)
        # of the backend; what others wrap, MLflow for one, is its subclass keras.Model
        trainer = next(kind for kind in keras.Model.__mro__ if "make_predict_function" in vars(kind))
        for name in ("fit", "evaluate", "predict"):
            self._watch(trainer, name)

    def _on_model(self, callbacks: Any, model: Any, *_: Any, **__: Any) -> None:
        if not model or any(isinstance(callback, self._module.Phases) for callback in callbacks.callbacks):
            return
        running = self._module.running()
        # first: those that come later find the figures in the logs
        callbacks.callbacks.insert(0, self._callback if running is None else self._module.Phases(running.training))

    def _watch(self, trainer: type, name: str) -> None:
        original = getattr(trainer, name)

        @functools.wraps(original)
        def ours(model: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "fit" and not self._fits:
                self._call(self._on_fit)
            self._fits += name == "fit"
            try:
                return original(model, *args, **kwargs)
            except BaseException:  # callbacks are not told
                self._call(self._on_exception, model, name)
                raise
            finally:
                self._fits -= name == "fit"

        self._put(trainer, name, original, ours)

    def _on_fit(self) -> None:
        """What seems to be under way, though no ``fit`` is, has been broken off: a loop of the program's own."""
        running = self._module.running()
        if running is not None:
            running.over()

    def _on_exception(self, model: object, name: str) -> None:
        running = self._module.running()
        if running is None:
            self._callback.over()
        elif name == "fit" and running.fits(model):
            running.over()

    def remove(self) -> None:
        """Put the originals back; no training that is under way is marked any more."""
        super().remove()
        self._callback.over()


def autolog() -> Callable[[], None]:
    """From now on whatever Keras trains, evaluates or predicts has a callback. Returns what takes it back.

    Keras has been imported.
    """
    follower = _KerasFollower()
    follower.install()
    return follower.remove
