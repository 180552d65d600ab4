"""What a run ends with, as MLflow's metrics, tags and status."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import memtrack

if TYPE_CHECKING:
    from memtrack.sinks import RunFigures

MAX_TAG = 5000
"""What MLflow takes as the value of a tag, in characters; later versions take more."""

CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


def status_of(figures: RunFigures) -> str:
    """What becomes of a run whose process has died; "" for a process that came to a good end, or has not died."""
    if figures.verdict in ("", "clean"):
        return ""
    if figures.verdict == "unknown_sigkill" or (figures.verdict == "killed" and figures.signal not in CRASHES):
        return "KILLED"
    return "FAILED"


def numbers_of(figures: RunFigures) -> dict[str, float]:
    """The final figures that are worth sorting runs by."""
    found = {
        "peak_rss_mib": figures.peak_rss_mib,
        "peak_tree_pss_mib": figures.peak_tree_pss_mib,
        "peak_step": figures.peak_step,
        "headroom_min_pct": figures.headroom_min_pct,
        "limit_mib": figures.limit_mib,
        "agent_rss_mib": figures.agent_rss_mib,
        "agent_cpu_pct": figures.agent_cpu_pct,
    }
    return {key: float(value) for key, value in found.items() if value is not None}


def tags_of(figures: RunFigures) -> dict[str, str]:
    """The figures and the verdict as texts."""
    tags = {"version": memtrack.__version__, "windows": str(figures.windows), "dropped": str(figures.dropped)}
    if figures.peak_rss_mib is not None:
        tags["peak"] = f"{figures.peak_rss_mib:.1f} MiB ({figures.peak_label})"
        tags["peak_phase"] = figures.peak_phase
        if figures.peak_step is not None:
            tags["peak_step"] = str(figures.peak_step)
    if figures.limit_mib is not None and figures.headroom_min_pct is not None:
        tags["limit"] = f"{figures.limit_mib:.0f} MiB ({figures.limit_source})"
        tags["headroom_min"] = f"{figures.headroom_min_pct:.1f} %"
    if figures.agent_rss_mib is not None and figures.agent_cpu_pct is not None:
        tags["cost"] = f"agent {figures.agent_rss_mib:.1f} MiB, {figures.agent_cpu_pct:.2f} % of a core"
    return {**tags, **_verdict(figures)}


def _verdict(figures: RunFigures) -> dict[str, str]:
    """How the process ended, if that is worth a word, and where it stood."""
    tags = {}
    if figures.verdict not in ("", "clean"):
        known = figures.verdict_confidence in ("confirmed", "likely")
        words = figures.verdict.replace("_", " ").replace("sigkill", "SIGKILL")
        tags["verdict"] = words + (f" ({figures.verdict_confidence})" if known else "")
        tags["verdict_text"] = figures.verdict_text
        tags["evidence"] = "\n".join(figures.verdict_evidence)
    tags["stack"] = figures.stack
    return {name: value[:MAX_TAG] for name, value in tags.items() if value}
