"""Which code stood at the peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtrack.recording.reader import RecordingReader
    from memtrack.recording.records import Stack

_LIBRARIES = ("site-packages/", "lib/python3.", "<")


def peak_stack(reader: RecordingReader) -> Stack | None:
    """The stack that was taken at the highest RSS; None if none was taken."""
    return max(reader.stacks(), key=lambda stack: stack.rss_mib, default=None)


def headline(text: str) -> str:
    """``file:line function``: the innermost frame of the user's own code, and what of a library it had called."""
    frames = main_frames(text)
    if not frames:
        return ""
    own = next((frame for frame in frames if not frame.startswith(_LIBRARIES)), frames[0])
    return own if own == frames[0] else f"{own}, in {frames[0].removeprefix('site-packages/')}"


def main_frames(text: str) -> list[str]:
    """The frames of the main thread, the innermost first."""
    return text.partition("\n-- ")[0].splitlines()
