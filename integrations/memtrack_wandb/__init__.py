"""memtrack in Weights & Biases: series in the stream of system metrics, figures in the run's summary."""

from memtrack_wandb._autolog import autolog
from memtrack_wandb._sink import WandbSink

__all__ = ["WandbSink", "autolog"]
