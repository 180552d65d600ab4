"""memtrack in a training loop with plain PyTorch: steps, epochs, phases, and the names of the DataLoader's workers."""

from memtrack_pytorch._autolog import autolog
from memtrack_pytorch._watch import Watched, watch

__all__ = ["Watched", "autolog", "watch"]
