"""The callback as ``pytorch_lightning`` wants it, whose base class is another one."""

from importlib import import_module

from memtrack_lightning import _callback


class MemoryCallback(_callback.MemoryCallback, import_module("pytorch_lightning").Callback):  # type: ignore[misc]
    """The callback for ``pytorch_lightning.Trainer``."""
