"""Where windows go: the Sink protocol, and the relay that feeds sinks from the recording."""

from memtrack.sinks.base import Batch, Point, Sink
from memtrack.sinks.figures import PartFigures, RunFigures

__all__ = ["Batch", "PartFigures", "Point", "RunFigures", "Sink"]
