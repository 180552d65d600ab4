"""Following W&B's runs, from their start to their end."""

from __future__ import annotations

import atexit
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.notices import warn_once
from memtrack.sinks.following import Follower
from memtrack_wandb._sink import WandbSink, active_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.sinks.following import Attach

STARTED, FINISHED = "_on_start", "_finish"


class _WandbFollower(Follower):
    """Learns of runs from two methods of W&B's ``Run``, and from the end of the interpreter.

    ``wandb.init``, by whatever name it was imported, calls ``_on_start`` as its last step; a process that joins a run
    of another does not. ``_finish`` is the end that ``finish`` and ``__exit__`` come to; a ``with`` statement that runs
    already has got hold of its ``__exit__``. Where neither is called, W&B ends its runs in a function that it has
    registered with ``atexit`` when the first one began, so that what is registered at each start comes before.
    """

    def install(self, wandb: Any) -> None:
        """Follow the runs to come, and those that are active already."""
        kind = import_module("wandb.sdk.wandb_run").Run
        if hasattr(kind, STARTED):
            self.after(kind, STARTED, self._on_start)
        else:
            warn_once("wandb start", "in this version of W&B memtrack only follows runs that are there already.")
        # before: W&B drops what comes after the end
        self.before(kind, FINISHED, self._on_finish)
        for run in active_runs(wandb):
            self._on_start(run)

    def remove(self) -> None:
        """As any follower does."""
        super().remove()
        atexit.unregister(self.leave)

    def _on_start(self, run: Any) -> None:
        if getattr(run, "disabled", False):
            return
        # by id(): a run that is asked for anything in another process than its own joins it
        self.started(run, id(run), lambda: WandbSink(run=run))
        # again, to come before what W&B has registered
        atexit.unregister(self.leave)
        atexit.register(self.leave)

    def _on_finish(self, run: Any, exit_code: int | None = None, *_: Any, **__: Any) -> None:
        self.ended(id(run), exit_code)


def autolog(attach: Attach) -> Callable[[], None]:
    """Follow W&B's runs from now on: those that are active, and those to come. Returns what takes it back.

    W&B has been imported. ``attach`` gets what makes the sink of a run and never raises.
    """
    follower = _WandbFollower(attach)
    follower.install(import_module("wandb"))
    return follower.remove
