"""memtrack in Lightning: steps, epochs and phases, and the peak of the steps in the row that Lightning logs.

Serves ``lightning.pytorch`` and ``pytorch_lightning``, and imports neither before it is used. Lightning loads this in
each Trainer, so it loads next to nothing itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from memtrack.notices import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from memtrack_lightning._callback import MemoryCallback

__all__ = ["MemoryCallback", "autolog", "callbacks", "pl_autolog", "pl_callbacks"]

_followed: set[str] = set()
"""The modules with a class for each of the packages whose Trainers get a callback."""


def autolog() -> Callable[[], None]:
    """From now on each ``lightning.pytorch.Trainer`` that is made gets a callback. Returns what takes it back."""
    return _follow("_lightning")


def pl_autolog() -> Callable[[], None]:
    """From now on each ``pytorch_lightning.Trainer`` that is made gets a callback. Returns what takes it back."""
    return _follow("_pytorch_lightning")


def callbacks() -> list[Any]:
    """What ``lightning.pytorch`` adds to the callbacks of each Trainer: the entry point of its callbacks_factory."""
    return _automatic("_lightning")


def pl_callbacks() -> list[Any]:
    """What ``pytorch_lightning`` adds to the callbacks of each Trainer: the entry point of its callbacks_factory."""
    return _automatic("_pytorch_lightning")


def _follow(module: str) -> Callable[[], None]:
    _followed.add(module)
    return lambda: _followed.discard(module)


def _automatic(module: str) -> list[Any]:
    if module not in _followed:
        return []
    try:
        return [import_module(f"memtrack_lightning.{module}").MemoryCallback(automatic=True)]
    except Exception as exc:
        warn_once("lightning", f"memtrack has no callback for this Trainer ({type(exc).__name__}: {exc}).")
        return []


def __getattr__(name: str) -> object:
    if name != "MemoryCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("memtrack_lightning._callback").MemoryCallback
