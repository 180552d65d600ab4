"""What speaks for and against an out-of-memory kill, and how the process ended."""

from __future__ import annotations

from memtrack.recording.records import Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.sampling.window import Place


class Witness:
    """Gathers evidence while the process lives, and turns it into a verdict once it is dead."""

    def __init__(self, pid: int, pid_fd: int, now_ns: int) -> None:
        self._pid = pid

    def note(self, now_ns: int, latest: dict[str, float]) -> None:
        """Called after each sample."""

    def verdict(self, wall_ns: int, place: Place, phase: str, farewell: dict[str, str]) -> Verdict:
        """Called once the process is dead."""
        found = Verdict("unknown", "none", "the process has ended")
        found.wall_ns = wall_ns
        return found
