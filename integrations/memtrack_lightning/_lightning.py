"""The callback as ``lightning.pytorch`` wants it. A class of a module can be pickled, as strategies that spawn do."""

from importlib import import_module

from memtrack_lightning import _callback


class MemoryCallback(_callback.MemoryCallback, import_module("lightning.pytorch").Callback):  # type: ignore[misc]
    """The callback for ``lightning.pytorch.Trainer``."""
