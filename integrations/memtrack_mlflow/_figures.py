"""What a run ends with, as MLflow's metrics, tags and status."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtrack.sinks import RunFigures

MAX_TAG = 5000
"""What MLflow takes as the value of a tag, in characters; later versions take more."""

COUNTS = ("windows", "dropped")
"""What is a tag and not a metric."""

CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


def status_of(figures: RunFigures) -> str:
    """What becomes of a run whose process has died; "" for a process that came to a good end, or has not died."""
    if not figures.is_bad_end:
        return ""
    if figures.verdict == "unknown_sigkill" or (figures.verdict == "killed" and figures.signal not in CRASHES):
        return "KILLED"
    return "FAILED"


def numbers_of(figures: RunFigures) -> dict[str, float]:
    """The final figures that are worth sorting runs by."""
    return {name: float(value) for name, value in figures.numbers().items() if name not in COUNTS}


def tags_of(figures: RunFigures) -> dict[str, str]:
    """The figures and the verdict as texts."""
    texts = figures.texts()
    tags = {"version": texts["version"], **{name: str(getattr(figures, name)) for name in COUNTS}}
    if figures.peak_rss_mib is not None:
        tags["peak"] = f"{figures.peak_rss_mib:.1f} MiB ({figures.peak_label})"
        if figures.peak_phase:
            tags["peak_phase"] = figures.peak_phase
        if figures.peak_step is not None:
            tags["peak_step"] = str(figures.peak_step)
    if figures.limit_mib is not None and figures.headroom_min_pct is not None:
        tags["limit"] = f"{figures.limit_mib:.0f} MiB ({figures.limit_source})"
        tags["headroom_min"] = f"{figures.headroom_min_pct:.1f} %"
    if figures.agent_rss_mib is not None and figures.agent_cpu_pct is not None:
        tags["cost"] = f"agent {figures.agent_rss_mib:.1f} MiB, {figures.agent_cpu_pct:.2f} % of a core"
    longer = ("phases", "epochs", "verdict", "verdict_text", "evidence", "stack")
    found = {name: texts.get(name, "")[:MAX_TAG] for name in longer}
    return {**tags, **{name: text for name, text in found.items() if text}}
