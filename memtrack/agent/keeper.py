"""Looking after the agent from the training process: one that was killed is started again."""

from __future__ import annotations

import threading
from time import monotonic, monotonic_ns, sleep

from memtrack.notices import warn_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.recording.marks import MarkWriter
    from memtrack.recording.reader import RecordingReader

SILENT_NS = 3 * 10**9
"""An agent from which there is no sign of life for so long is looked after. Five ticks of the slowest cadence."""

RESTARTS = 5
"""How often an agent is started again: one that keeps dying is not worth more."""


class Keeper:
    """Notices that the agent is silent, and starts it again with ``restart``. Thread-safe; nothing here raises."""

    def __init__(
        self, marks: MarkWriter, reader: RecordingReader, restart: Callable[[], object], is_over: Callable[[], bool]
    ) -> None:
        self._marks = marks
        self._reader = reader
        self._restart = restart
        self._is_over = is_over
        self._lock = threading.Lock()
        self._started_ns = monotonic_ns()
        self.restarts_left = RESTARTS
        """-1: it was said that there will be no more."""

    @property
    def is_needed(self) -> bool:
        """Whether the agent has given no sign of life for long, nor been started lately, and something can be done."""
        silent_ns = min(self._marks.silence_ns(), monotonic_ns() - self._started_ns)
        return silent_ns > SILENT_NS and self.restarts_left >= 0

    def look(self) -> None:
        """Start the agent again if it was killed. Takes a second at the most, 30 ms as a rule."""
        if not self.is_needed or not self._lock.acquire(blocking=False):
            return
        try:
            if not self._is_over():
                self._replace()
        except Exception as exc:
            self.restarts_left = -1
            warn_once("restart", f"memtrack's agent has gone and could not be started again ({exc}).")
        finally:
            self._lock.release()

    def close(self) -> None:
        """Look no more, and let go of whoever was to be asked."""
        self._restart = self._is_over = _nothing

    def tell(self, otherwise: str = "") -> None:
        """Say why nothing is sampled any more, if the agent has failed."""
        errors = [event.text for event in self._reader.events() if event.kind == "error"]
        reason = errors[-1] if errors else otherwise
        if reason:
            warn_once("agent", f"memtrack's agent does not run any more: {reason}.")

    def _replace(self) -> None:
        self.restarts_left -= 1
        if self.restarts_left < 0:
            self.tell("it was killed again and again")
            return
        before = self._reader.head().agent_pid
        self._started_ns = monotonic_ns()
        # should the old one only stand still, the new one finds the recording locked and leaves
        self._restart()
        deadline = monotonic() + 1.0
        while self._marks.silence_ns() > SILENT_NS and monotonic() < deadline:
            sleep(0.01)
        if self._marks.silence_ns() <= SILENT_NS and self._reader.head().agent_pid == before:
            self.restarts_left += 1  # that is what it did


def _nothing() -> bool:
    return True
