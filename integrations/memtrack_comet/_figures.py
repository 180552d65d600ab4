"""What a run ends with, in Comet's words, and the names of its series there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import memtrack

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
    numbers = {
        "peak_rss_mib": figures.peak_rss_mib,
        "peak_tree_pss_mib": figures.peak_tree_pss_mib,
        "peak_step": figures.peak_step,
        "headroom_min_pct": figures.headroom_min_pct,
        "limit_mib": figures.limit_mib,
        "agent_rss_mib": figures.agent_rss_mib,
        "agent_cpu_pct": figures.agent_cpu_pct,
        "windows": figures.windows,
        "dropped": figures.dropped,
    }
    texts = {
        "version": memtrack.__version__,
        "peak_phase": figures.peak_phase,
        "peak_label": figures.peak_label,
        "limit_source": figures.limit_source,
        "stack": figures.stack,
    }
    if is_bad_end(figures):
        texts["verdict"] = _verdict(figures)
        texts["verdict_text"] = figures.verdict_text
        texts["evidence"] = "\n".join(figures.verdict_evidence)
    found: dict[str, float | str] = {name: value for name, value in numbers.items() if value is not None}
    found.update({name: text[:MAX_TEXT] for name, text in texts.items() if text})
    return {f"memtrack.{name}": value for name, value in found.items()}


def tags_of(figures: RunFigures) -> list[str]:
    """The tag that tells experiments whose process came to a bad end: ``memtrack: out of memory``."""
    return [f"memtrack: {_words(figures)}"] if is_bad_end(figures) else []


def is_bad_end(figures: RunFigures) -> bool:
    """Whether the process has died, and not in order."""
    return figures.verdict not in ("", "clean")


def _verdict(figures: RunFigures) -> str:
    known = figures.verdict_confidence in ("confirmed", "likely")
    return _words(figures) + (f" ({figures.verdict_confidence})" if known else "")


def _words(figures: RunFigures) -> str:
    return figures.verdict.replace("_", " ").replace("sigkill", "SIGKILL")
