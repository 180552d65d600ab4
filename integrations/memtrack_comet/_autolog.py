"""Following Comet's experiments, from their start to their end."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.sinks.following import Follower
from memtrack_comet._sink import CometSink, is_running

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.sinks.following import Attach


class _CometFollower(Follower):
    """Learns of experiments from three methods, which every way to start or end one comes through.

    ``comet_ml.start``, ``Experiment``, ``OfflineExperiment`` and the two for existing ones, by whatever name they were
    imported, come to the constructor of ``Experiment`` or ``OfflineExperiment``. Comet has no public place for the end:
    an experiment that ``end()`` is not called on ends when another one starts, or in a hook that Comet has set for the
    exit, before all of ``atexit``. ``_clean_experiment`` is what each of them calls, looked up at the time of the end,
    before the first thing is closed.
    """

    def install(self, comet_ml: Any) -> None:
        """Follow the experiments to come, and the one that is running already."""
        self.after(comet_ml.Experiment, "__init__", self._on_start)
        self.after(comet_ml.OfflineExperiment, "__init__", self._on_start)
        # before: nothing is taken any more once Comet has begun to close
        self.before(*end_of(comet_ml), self._on_end)
        running = comet_ml.get_running_experiment()
        if running is not None:
            self._on_start(running)

    def _on_start(self, experiment: Any) -> None:
        if is_running(experiment):
            # by id(), not by Comet's key: an experiment may be continued by another object
            self.started(experiment, id(experiment), lambda: CometSink(experiment=experiment))

    def _on_end(self, experiment: Any, *_: Any, **__: Any) -> None:
        self.ended(id(experiment))


def end_of(comet_ml: Any) -> tuple[type, str]:
    """The class, and its method that ends an experiment."""
    base = comet_ml.CometExperiment
    # where a version does not have it, what is left is the call that users make
    return base, "_clean_experiment" if hasattr(base, "_clean_experiment") else "end"


def autolog(attach: Attach) -> Callable[[], None]:
    """Follow Comet's experiments from now on: the one that is running, and those to come. Returns what takes it back.

    Comet has been imported. ``attach`` gets what makes the sink of an experiment and never raises.
    """
    follower = _CometFollower(attach)
    follower.install(import_module("comet_ml"))
    return follower.remove
