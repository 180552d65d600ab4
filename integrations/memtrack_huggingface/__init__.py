"""memtrack in Hugging Face's Trainer: steps, epochs and phases, and the peak of the steps in the Trainer's own log."""

from memtrack_huggingface._callback import MemoryCallback, autolog

__all__ = ["MemoryCallback", "autolog"]
