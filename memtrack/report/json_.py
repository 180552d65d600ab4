"""A report for machines. The keys are part of memtrack's interface: they are added to, never renamed.

    ============  ====================================================================================================
    key           value
    ============  ====================================================================================================
    format        1
    recording     path of the file
    name          its name, without folder and suffix
    program, pid  the process that was monitored
    started       Unix time in seconds
    seconds       how long it was monitored
    state         starting, running, stopped, ended, "lost its agent"
    peak          rss_mib, label (exact, sampled, bound), time_s, phase, epoch, step; null if nothing was sampled
    tree          peak_pss_mib
    ranks         list: rank, pid, name, state, peak_rss_mib: the ranks of a distributed training, if this is the first
                  of its node, as far as their recordings are still there
    limit         mib, source, headroom_min_pct
    memtrack      agent_rss_mib, agent_cpu_pct, windows, dropped: what it cost
    phases        list: name, seconds, peak_rss_mib, peak_label, peak_step, last_rss_mib, growth_mib, limit_pct
    epochs        list of the same, "8-15" being the name of several together
    verdict       kind, confidence, exit_code, signal, text, evidence (list), time_s: how the process ended; null while
                  it runs, and if memtrack was stopped before
    stacks        list: time_s, rss_mib, usage_mib, headroom_pct, phase, epoch, step, frames (innermost first)
    events        list: time_s, kind, step, value, text
    metrics       by name: unit, min, mean, max, last, label, max_time_s, step, epoch, phase, and ``windows``: lists
                  start_s, end_s, min, mean, max of equal length
    ============  ====================================================================================================

Times that end in ``_s`` are seconds since the start; MiB is 2**20 bytes. What was not measured or marked is null.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.report.data import Report, Series

FORMAT = 1


def encode(report: Report) -> str:
    """The report as one JSON document: strict JSON, without NaN."""
    return json.dumps(_clean(as_dict(report)), allow_nan=False)


def as_dict(report: Report) -> dict[str, object]:
    """The report as a dictionary with the keys above."""
    figures = report.summary.figures
    peak = None
    if figures.peak_rss_mib is not None:
        peak = {
            "rss_mib": figures.peak_rss_mib,
            "label": figures.peak_label,
            "time_s": None if figures.peak_wall_s is None else figures.peak_wall_s - report.started_s,
            "phase": figures.peak_phase or None,
            "epoch": figures.peak_epoch,
            "step": figures.peak_step,
        }
    return {
        "format": FORMAT,
        "recording": report.path,
        "name": report.name,
        "program": report.program or None,
        "pid": report.pid,
        "started": report.started_s,
        "seconds": report.seconds,
        "state": report.state,
        "peak": peak,
        "tree": {"peak_pss_mib": figures.peak_tree_pss_mib},
        "ranks": [
            {"rank": rank, "pid": one.pid, "name": one.name, "state": one.state, "peak_rss_mib": one.peak_rss_mib}
            for rank, one in report.ranks.items()
        ],
        "limit": {
            "mib": figures.limit_mib,
            "source": figures.limit_source or None,
            "headroom_min_pct": figures.headroom_min_pct,
        },
        "memtrack": {
            "agent_rss_mib": figures.agent_rss_mib,
            "agent_cpu_pct": figures.agent_cpu_pct,
            "windows": figures.windows,
            "dropped": figures.dropped,
        },
        "phases": [phase._asdict() for phase in report.summary.phases],
        "epochs": [epoch._asdict() for epoch in report.summary.epochs],
        "verdict": _verdict(report),
        "stacks": [taken._asdict() for taken in report.stacks],
        "events": [note._asdict() for note in report.notes],
        "metrics": {name: _metric(series) for name, series in report.series.items()},
    }


def _verdict(report: Report) -> dict[str, object] | None:
    verdict = report.summary.verdict
    if verdict is None:
        return None
    return {
        "kind": verdict.kind,
        "confidence": verdict.confidence,
        "exit_code": verdict.exit_code,
        "signal": verdict.signal,
        "text": verdict.text,
        "evidence": verdict.evidence,
        "time_s": verdict.wall_ns / 1e9 - report.started_s if verdict.wall_ns else None,
    }


def _metric(series: Series) -> dict[str, object]:
    total = series.total
    figures = {} if total is None else total._asdict()
    figures["max_time_s"] = figures.pop("max_s", None)
    figures["phase"] = figures.get("phase") or None
    windows = {field: list(getattr(series, field)) for field in ("start_s", "end_s", "min", "mean", "max")}
    return {"unit": series.unit, **figures, "windows": windows}


def _clean(value: object) -> object:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        items: Iterable[object] = value
        return [_clean(item) for item in items]
    return value
