"""memtrack in Keras 3, on PyTorch, JAX and TensorFlow: steps, epochs and phases, and the peak in each epoch's logs.

Imports Keras when ``MemoryCallback`` is first used, so that ``KERAS_BACKEND`` may be set after this is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtrack_keras._autolog import autolog

if TYPE_CHECKING:
    from memtrack_keras._callback import MemoryCallback

__all__ = ["MemoryCallback", "autolog"]


def __getattr__(name: str) -> object:
    if name != "MemoryCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memtrack_keras._callback import MemoryCallback

    return MemoryCallback
