"""What the frameworks' own memory allocators say: read in the training process, where alone they can be asked."""

from __future__ import annotations


class Allocators:
    """The allocators of the frameworks that are loaded and initialised."""

    def read(self) -> dict[str, float]:
        """Value by name of metric, in MiB; nothing of a framework that is not in use."""
        return {}
