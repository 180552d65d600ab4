"""The monitor of a process in which memtrack is switched off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtrack.monitor import Attached, Monitor

if TYPE_CHECKING:
    from memtrack.analysis.summary import Summary
    from memtrack.sinks.base import Sink


class _NothingAttached(Attached):
    def __init__(self) -> None:
        pass

    @property
    def done(self) -> bool:
        return True

    def detach(self, timeout_s: float = 0.0) -> bool:
        return True


class DisabledMonitor(Monitor):
    """Has every method of a monitor and does nothing, for ``MEMTRACK_DISABLE=1``."""

    def __init__(self) -> None:
        self.path = ""

    def __repr__(self) -> str:
        return "<memtrack.Monitor, disabled>"

    def attach(self, sink: Sink) -> Attached:
        return _NothingAttached()

    def flush(self, timeout_s: float = 0.0) -> bool:
        return True

    def summary(self) -> Summary:
        from memtrack.analysis.summary import Summary
        from memtrack.sinks.figures import RunFigures

        return Summary(RunFigures())

    def stop(self) -> None:
        pass

    def wait_ready(self, timeout_s: float = 0.0) -> bool:
        return True
