"""What a run ends with, in Comet's words, and the names of its series there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtrack.sinks import RunFigures

MAX_KEY = 100
MAX_TEXT = 1000
"""What Comet keeps of a name and of a text, in characters; it cuts the rest off and warns."""

UNSAVED_S = 5.0
"""What Comet may not have written or uploaded when a kill comes, in seconds: it collects for two and then sends."""


def series_name(name: str) -> str:
    """``memory/process/rss_mib`` as Comet has it: ``sys.memory.process.rss_mib``."""
    return f"sys.{name.replace('/', '.')}"[:MAX_KEY]


def others_of(figures: RunFigures) -> dict[str, float | str]:
    """The final figures and the verdict: numbers to sort experiments by, and texts to read."""
    found: dict[str, float | str] = {f"memtrack.{name}": value for name, value in figures.numbers().items()}
    found.update({f"memtrack.{name}": text[:MAX_TEXT] for name, text in figures.texts().items()})
    return found


def tags_of(figures: RunFigures) -> list[str]:
    """The tag that tells experiments whose process came to a bad end: ``memtrack: out of memory``."""
    return [f"memtrack: {figures.verdict_name}"] if figures.is_bad_end else []
