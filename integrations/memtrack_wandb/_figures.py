"""What a run ends with, as values of W&B's summary and as an exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtrack.sinks import RunFigures

PREFIX = "memtrack/"
MAX_TEXT = 5000
"""Characters of a text: a summary is sent as a whole each time."""


def summary_of(figures: RunFigures) -> dict[str, float | str]:
    """The final figures and the verdict: numbers to sort runs by, and texts to read."""
    found: dict[str, float | str] = {PREFIX + name: value for name, value in figures.numbers().items()}
    found.update({PREFIX + name: text[:MAX_TEXT] for name, text in figures.texts().items()})
    return found


def exit_code_of(figures: RunFigures) -> int:
    """The code to end a run with whose process has died: as a shell has it, 0 only for a good end."""
    if not figures.is_bad_end:
        return 0
    if figures.signal:
        return 128 + figures.signal
    return figures.exit_code or 1
