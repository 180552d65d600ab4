"""What a run ends with, as values of W&B's summary and as an exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import memtrack

if TYPE_CHECKING:
    from memtrack.sinks import RunFigures

PREFIX = "memtrack/"
MAX_TEXT = 5000
"""Characters of a text: a summary is sent as a whole each time."""


def summary_of(figures: RunFigures) -> dict[str, float | str]:
    """The final figures and the verdict: numbers to sort runs by, and texts to read."""
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
        "peak_label": figures.peak_label,
        "peak_phase": figures.peak_phase,
        "limit_source": figures.limit_source,
        "stack": figures.stack,
    }
    if figures.verdict not in ("", "clean"):
        known = figures.verdict_confidence in ("confirmed", "likely")
        words = figures.verdict.replace("_", " ").replace("sigkill", "SIGKILL")
        texts["verdict"] = words + (f" ({figures.verdict_confidence})" if known else "")
        texts["verdict_text"] = figures.verdict_text
        texts["evidence"] = "\n".join(figures.verdict_evidence)
    found: dict[str, float | str] = {name: value for name, value in numbers.items() if value is not None}
    found.update({name: text[:MAX_TEXT] for name, text in texts.items() if text})
    return {PREFIX + name: value for name, value in found.items()}


def exit_code_of(figures: RunFigures) -> int:
    """The code to end a run with whose process has died: as a shell has it, 0 only for a good end."""
    if figures.verdict in ("", "clean"):
        return 0
    if figures.signal:
        return 128 + figures.signal
    return figures.exit_code or 1
