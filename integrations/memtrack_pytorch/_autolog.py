"""Steps of a plain loop that knows nothing of memtrack: those of its optimizer."""

from __future__ import annotations

import sys
import weakref
from importlib import import_module
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from memtrack.notices import warn_once
from memtrack.training import Training, step_reached

if TYPE_CHECKING:
    from collections.abc import Callable

NONE = -1
IDLE_STEPS = 100
"""After so many steps of other optimizers alone, the one whose steps are counted has had its time."""
GAUGES_NS = 1_000_000_000


class _Steps:
    """Called after each step of any optimizer. Counts those of the optimizer that came first.

    After its step n, counted from 1, the training is at step n: what follows, up to the next one, is of the batch with
    that number, counted from 0. As soon as somebody else marks steps, a framework's callback or the program, this marks
    none any more; there is no other sign of that than a step that is not the last one from here.
    """

    def __init__(self) -> None:
        self._training = Training(automatic=True)
        self._step = self._training.step
        self._leader: Callable[[], Any] = _nobody
        self._count = 0
        self._marked = NONE
        self._idle = 0
        self._due_ns = 0
        self._has_tried = False
        self._is_aside = False
        self._torch: Any = import_module("torch")

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # torch.compile would break its graph here; older versions cannot say that it is at work
        if self._is_aside or getattr(self._torch.compiler, "is_compiling", _nobody)():
            return
        try:
            if optimizer is not self._leader() and not self._follow(optimizer):
                return
            reached = step_reached()
            if reached is None:
                if self._has_tried:
                    return
                self._has_tried = True
                if not self._training.begin():
                    return
            elif reached != self._marked and reached != NONE:
                self._is_aside = True
                return
            self._count = self._marked = count = self._count + 1
            self._idle = 0
            self._step(count)
            now_ns = monotonic_ns()
            if now_ns >= self._due_ns:
                self._due_ns = now_ns + GAUGES_NS
                self._training.allocations()
        except Exception as exc:
            self._is_aside = True
            warn_once("torch steps", f"memtrack marks no steps of the optimizer ({type(exc).__name__}: {exc}).")

    def _follow(self, optimizer: Any) -> bool:
        """Whether the steps of this one count from now on: there is no other, or that one does not step any more."""
        self._idle += 1
        if self._leader() is not None and self._idle <= IDLE_STEPS:
            return False
        self._leader = weakref.ref(optimizer)
        return True


def autolog() -> Callable[[], None]:
    """Mark the steps of optimizers from now on, until somebody else marks steps. Returns what takes it back."""
    handle = sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(_Steps())
    remove: Callable[[], None] = handle.remove
    return remove


def _nobody() -> Any:
    return None
