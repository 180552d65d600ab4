"""memtrack in a training loop with Hugging Face's accelerate: the peak of the steps in each row that the loop logs."""

from memtrack_accelerate._watch import watch

__all__ = ["watch"]
