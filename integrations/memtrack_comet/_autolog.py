"""Following Comet's experiments, from their start to their end."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from memtrack_comet._sink import CometSink, is_running

if TYPE_CHECKING:
    from collections.abc import Callable

    Attach = Callable[[Callable[[], CometSink]], Any]

COMET = "comet_ml"


class _Follower:
    """Learns of experiments from three methods, which every way to start or end one comes through.

    ``comet_ml.start``, ``Experiment``, ``OfflineExperiment`` and the two for existing ones, by whatever name they were
    imported, come to the constructor of ``Experiment`` or ``OfflineExperiment``. Comet has no public place for the end:
    an experiment that ``end()`` is not called on ends when another one starts, or in a hook that Comet has set for the
    exit, before all of ``atexit``. ``_clean_experiment`` is what each of them calls, looked up at the time of the end,
    before the first thing is closed. What they return or raise is untouched.
    """

    def __init__(self, attach: Attach) -> None:
        self._attach = attach
        # by process too: what a forked child finds here is its parent's. An experiment that is fed is not collected,
        # so its id() is its own; its key is not, an experiment may be continued by another object
        self._attached: dict[tuple[int, int], Any] = {}
        self._patched: list[tuple[type, str, Any, Any]] = []
        self._off = False

    def install(self, comet_ml: Any) -> None:
        """Patch, and follow the experiment that is running already."""
        if self._off or self._patched:
            return
        self._patch(comet_ml.Experiment, "__init__", self._around_start)
        self._patch(comet_ml.OfflineExperiment, "__init__", self._around_start)
        base = comet_ml.CometExperiment
        # where a version does not have it, what is left is the call that users make
        self._patch(base, "_clean_experiment" if hasattr(base, "_clean_experiment") else "end", self._around_end)
        running = comet_ml.get_running_experiment()
        if running is not None:
            self._started(running)

    def remove(self) -> None:
        """Put the originals back, and let go of the experiments that are being followed."""
        self._off = True
        while self._patched:
            owner, name, original, ours = self._patched.pop()
            # who has patched since then calls ours, which passes on and does nothing else from now on
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        for key in list(self._attached):
            self._ended(key)

    def _patch(self, owner: type, name: str, around: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        ours = functools.wraps(original)(around(original))
        self._patched.append((owner, name, original, ours))
        setattr(owner, name, ours)

    def _around_start(self, original: Any) -> Any:
        def __init__(experiment: Any, *args: Any, **kwargs: Any) -> None:
            original(experiment, *args, **kwargs)
            self._started(experiment)

        return __init__

    def _around_end(self, original: Any) -> Any:
        def end(experiment: Any, *args: Any, **kwargs: Any) -> Any:
            # first: nothing is taken any more once Comet has begun to close
            self._ended((os.getpid(), id(experiment)))
            return original(experiment, *args, **kwargs)

        return end

    def _started(self, experiment: Any) -> None:
        key = (os.getpid(), id(experiment))
        claim = object()
        # no lock: a forked child might find it held by a thread that it does not have
        if self._off or not is_running(experiment) or self._attached.setdefault(key, claim) is not claim:
            return
        self._attached[key] = self._attach(lambda: CometSink(experiment=experiment))

    def _ended(self, key: tuple[int, int]) -> None:
        attached = self._attached.pop(key, None)
        if key[0] == os.getpid() and hasattr(attached, "detach"):
            attached.detach()


def autolog(attach: Attach) -> Callable[[], None]:
    """Follow Comet's experiments from now on: the one that is running, and those to come. Returns what takes it back.

    Comet is not imported by this; if it is not there yet it is caught when it is. ``attach`` gets what makes the sink
    of an experiment and never raises.
    """
    follower = _Follower(attach)
    loaded = sys.modules.get(COMET)
    # its version is the last thing that the package learns when it is imported
    if loaded is not None and hasattr(loaded, "__version__"):
        follower.install(loaded)
    else:
        import wrapt  # half a MiB, for nothing if Comet is there already

        wrapt.register_post_import_hook(follower.install, COMET)
    return follower.remove
