"""memtrack in Weights & Biases: series in the stream of system metrics, figures in the run's summary."""

from memtrack_wandb._autolog import autolog
from memtrack_wandb._sink import WandbSink
from memtrack_wandb._store import active_store, open_store

__all__ = ["WandbSink", "active_store", "autolog", "open_store"]
