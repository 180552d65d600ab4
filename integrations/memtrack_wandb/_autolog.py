"""Following W&B's runs, from their start to their end."""

from __future__ import annotations

import atexit
import functools
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.notices import warn_once
from memtrack_wandb._sink import WandbSink, active_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    Attach = Callable[[Callable[[], WandbSink]], Any]

WANDB = "wandb"
STARTED = "_on_start"


class _Follower:
    """Learns of runs from three methods of W&B's ``Run``, and from the end of the interpreter.

    ``wandb.init``, by whatever name it was imported, calls ``_on_start`` as its last step; a process that joins a run
    of another does not. ``finish`` and ``__exit__`` are the ends. Where neither is called, W&B ends its runs in a
    function that it has registered with ``atexit`` when the first one began, so that what is registered at each start
    comes before. What they return or raise is untouched.
    """

    def __init__(self, attach: Attach) -> None:
        self._attach = attach
        # by process too: what a forked child finds here is its parent's. Keyed by id(), and the run held, because a run
        # that is asked for anything in another process joins it
        self._attached: dict[tuple[int, int], tuple[Any, list[WandbSink], Any]] = {}
        self._patched: list[tuple[type, str, Any, Any]] = []
        self._off = False

    def install(self, wandb: Any) -> None:
        """Patch, and follow the runs that are active already."""
        if self._off or self._patched:
            return
        kind = import_module("wandb.sdk.wandb_run").Run
        if hasattr(kind, STARTED):
            self._patch(kind, STARTED, self._around_start)
        else:
            warn_once("wandb start", "in this version of W&B memtrack only follows runs that are there already.")
        self._patch(kind, "finish", self._around_finish)
        self._patch(kind, "__exit__", self._around_exit)
        for run in active_runs(wandb):
            self._started(run)

    def remove(self) -> None:
        """Put the originals back, and let go of the runs that are being followed."""
        self._off = True
        while self._patched:
            owner, name, original, ours = self._patched.pop()
            # who has patched since then calls ours, which passes on and does nothing else from now on
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        self._leave()
        atexit.unregister(self._leave)

    def _patch(self, owner: type, name: str, around: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        ours = functools.wraps(original)(around(original))
        self._patched.append((owner, name, original, ours))
        setattr(owner, name, ours)

    def _around_start(self, original: Any) -> Any:
        def started(run: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(run, *args, **kwargs)
            self._started(run)
            return result

        return started

    def _around_finish(self, original: Any) -> Any:
        def finish(run: Any, exit_code: int | None = None, *args: Any, **kwargs: Any) -> Any:
            # first: W&B drops what comes after the end
            self._ended(run, exit_code)
            return original(run, exit_code, *args, **kwargs)

        return finish

    def _around_exit(self, original: Any) -> Any:
        def __exit__(run: Any, kind: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._ended(run, 0 if kind is None else 1)
            return original(run, kind, *args, **kwargs)

        return __exit__

    def _started(self, run: Any) -> None:
        key = (os.getpid(), id(run))
        sinks: list[WandbSink] = []
        claim = (run, sinks, None)
        # no lock: a forked child might find it held by a thread that it does not have
        if self._off or getattr(run, "disabled", False) or self._attached.setdefault(key, claim) is not claim:
            return

        def make_sink() -> WandbSink:
            sinks.append(WandbSink(run=run))
            return sinks[0]

        self._attached[key] = (run, sinks, self._attach(make_sink))
        # again, to come before what W&B has registered
        atexit.unregister(self._leave)
        atexit.register(self._leave)

    def _ended(self, run: Any, exit_code: int | None = None) -> None:
        _, sinks, attached = self._attached.pop((os.getpid(), id(run)), (None, [], None))
        if exit_code is not None and sinks:
            sinks[0].ending(exit_code)
        if attached is not None:
            attached.detach()

    def _leave(self) -> None:
        """No run is followed any more."""
        for (pid, _), (run, _, _) in list(self._attached.items()):
            if pid == os.getpid():
                self._ended(run)


def autolog(attach: Attach) -> Callable[[], None]:
    """Follow W&B's runs from now on: those that are active, and those to come. Returns what takes it back.

    W&B is not imported by this; if it is not there yet it is caught when it is. ``attach`` gets what makes the sink of
    a run and never raises.
    """
    follower = _Follower(attach)
    loaded = sys.modules.get(WANDB)
    # one of the last things that the package makes when it is imported
    if loaded is not None and hasattr(loaded, "finish"):
        follower.install(loaded)
    else:
        import wrapt  # half a MiB, for nothing if W&B is there already

        wrapt.register_post_import_hook(follower.install, WANDB)
    return follower.remove
