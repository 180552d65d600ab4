"""The callback for a program that has imported ``lightning.pytorch`` and ``pytorch_lightning``: who knows for which."""

from memtrack_lightning import _lightning, _pytorch_lightning


class MemoryCallback(_lightning.MemoryCallback, _pytorch_lightning.MemoryCallback):
    """The callback for either Trainer."""
