"""A distribution of somebody else that brings a sink."""

from __future__ import annotations

from memtrack.testing import RecordingSink


class FakeSink(RecordingSink):
    """A sink by entry point."""

    def __init__(self, *, recording: str = "") -> None:
        super().__init__("fake")
        self.recording = recording
        made.append(self)


made: list[FakeSink] = []
