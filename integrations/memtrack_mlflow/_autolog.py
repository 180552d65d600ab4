"""Following the runs of MLflow's fluent API, from their start to their end."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from memtrack_mlflow._sink import MlflowSink

if TYPE_CHECKING:
    from collections.abc import Callable

    Attach = Callable[[Callable[[], MlflowSink]], Any]

FLUENT = "mlflow.tracking.fluent"
STATUSES = ("FINISHED", "FAILED", "KILLED")


class _Follower:
    """Learns of runs from two methods of public classes, which every way to start or end a run comes through.

    ``mlflow.ActiveRun`` is made once a run has started, by whatever name ``start_run`` was called and also by
    ``mlflow.log_metric`` and by MLflow's own autologging; ``MlflowClient.set_terminated`` is called when it ends. What
    they return or raise is untouched.
    """

    def __init__(self, attach: Attach) -> None:
        self._attach = attach
        # by process too: what a forked child finds here is its parent's
        self._attached: dict[tuple[int, str], Any] = {}
        self._sinks: dict[tuple[int, str], MlflowSink] = {}
        self._patched: list[tuple[type, str, Any, Any]] = []
        self._off = False

    def install(self, fluent: Any) -> None:
        """Patch, and follow the runs that are active in this thread already."""
        if self._off or self._patched:
            return
        self._patch(fluent.ActiveRun, "__init__", self._around_start)
        self._patch(fluent.MlflowClient, "set_terminated", self._around_end)
        run = fluent.active_run()
        if run is not None:
            self._started(run.info)

    def remove(self) -> None:
        """Put the originals back, and let go of the runs that are being followed."""
        self._off = True
        while self._patched:
            owner, name, original, ours = self._patched.pop()
            # who has patched since then calls ours, which passes on and does nothing else from now on
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        for _, run_id in list(self._attached):
            self._ended(run_id)

    def _patch(self, owner: type, name: str, around: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        ours = functools.wraps(original)(around(original))
        self._patched.append((owner, name, original, ours))
        setattr(owner, name, ours)

    def _around_start(self, original: Any) -> Any:
        def started(active_run: Any, *args: Any, **kwargs: Any) -> None:
            original(active_run, *args, **kwargs)
            info = getattr(active_run, "info", None)
            if info is not None:
                self._started(info)

        return started

    def _around_end(self, original: Any) -> Any:
        def set_terminated(client: Any, run_id: Any, *args: Any, **kwargs: Any) -> Any:
            # first, so that a run that is marked finished is complete
            self._ended(run_id, (args[0] if args else kwargs.get("status")) or "FINISHED")
            return original(client, run_id, *args, **kwargs)

        return set_terminated

    def _started(self, info: Any) -> None:
        key = (os.getpid(), info.run_id)
        claim = object()
        # no lock: a forked child might find it held by a thread that it does not have
        if self._off or self._attached.setdefault(key, claim) is not claim:
            return

        def make() -> MlflowSink:
            sink = self._sinks[key] = MlflowSink(run_id=info.run_id, start_time_ms=info.start_time)
            return sink

        self._attached[key] = self._attach(make)

    def _ended(self, run_id: str, status: str = "") -> None:
        key = (os.getpid(), run_id)
        attached, sink = self._attached.pop(key, None), self._sinks.pop(key, None)
        if sink is not None and status in STATUSES:
            sink.ending(status)
        if hasattr(attached, "detach"):
            attached.detach()


def autolog(attach: Attach) -> Callable[[], None]:
    """Follow MLflow's runs from now on: those that are active, and those to come. Returns what takes it back.

    MLflow is not imported by this; if it is not there yet it is caught when it is. ``attach`` gets what makes the
    sink of a run and never raises.
    """
    follower = _Follower(attach)
    loaded = sys.modules.get(FLUENT)
    if loaded is not None and hasattr(loaded, "active_run"):
        follower.install(loaded)
    else:
        import wrapt  # half a MiB, for nothing if MLflow is there already

        # by the name of the package: Comet, once imported, claims the import of the module itself before wrapt sees it
        wrapt.register_post_import_hook(lambda _: follower.install(sys.modules[FLUENT]), "mlflow")
    return follower.remove
