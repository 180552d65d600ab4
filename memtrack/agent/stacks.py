"""Python stacks of the training process, asked for at a new peak and when the limit is near."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.recording.writer import RecordingWriter
    from memtrack.sampling.window import Place


class StackWatch:
    """Decides when a stack is worth having, asks for it, and stores what comes."""

    def __init__(self, writer: RecordingWriter, pid: int, pid_fd: int, signal_number: int, dump_fd: int) -> None:
        self._writer = writer

    def look(self, now_ns: int, latest: dict[str, float], place: Place) -> None:
        """Called after each sample."""

    def finish(self) -> None:
        """Store what has come in the end."""
