"""The tables of the overhead benchmark: what each figure is called, which budget it has, and how it is laid out."""

from __future__ import annotations

import statistics
from typing import NamedTuple

Figures = dict[str, float]
NAMES = {"mlflow": "MLflow", "wandb": "W&B", "comet": "Comet"}
TITLES = {"plain": "{} alone", "memtrack": "memtrack", "own": "{}'s metrics"}


class Line(NamedTuple):
    """A line of a table: what it says, of which figure, in which unit, whether as difference, and what is allowed."""

    title: str
    key: str
    unit: str = ""
    digits: int = 1
    extra: bool = False
    budget: float | None = None


LOOP_LINES = (
    Line("training process, extra USS", "uss_mib", "MiB", 1, True, 2.0),
    Line("training process, extra PSS", "pss_mib", "MiB", 1, True),
    Line("training process, extra memory written to", "dirty_mib", "MiB", 1, True),
    Line("tree with agent, extra USS", "tree_uss_mib", "MiB", 1, True),
    Line("tree with agent, extra PSS", "tree_pss_mib", "MiB", 1, True),
    Line("agent RSS", "agent_rss_mib", "MiB", 1, False, 10.0),
    Line("agent PSS", "agent_pss_mib", "MiB", 1, False, 6.0),
    Line("agent USS", "agent_uss_mib", "MiB"),
    Line("tracker's own processes, PSS", "tracker_pss_mib", "MiB"),
    Line("extra threads", "threads", "", 0, True, 1),
    Line("CPU of it all (agent, threads, processes)", "monitor_cpu_pct", "% of a core", 2, False, 0.2),
    Line("  agent", "agent_cpu_pct", "% of a core", 2),
    Line("  threads in the training process, extra", "threads_cpu_pct", "% of a core", 2, True),
    Line("  tracker's own processes, extra", "tracker_cpu_pct", "% of a core", 2, True),
    Line("main thread", "main_cpu_pct", "% of a core", 1),
    Line("tracker's server, extra", "server_cpu_pct", "% of a core", 1, True),
    Line("training, the same steps", "train_s", "s", 2),
    Line("autolog call", "call_ms", "ms", 1),
    Line("start of the run with it, extra", "start_ms", "ms", 0, True),
    Line("agent start, CPU", "agent_start_cpu_ms", "ms", 0),
    Line("end of run and exit, extra", "stop_s", "s", 2, True, 2.0),
    Line("written to files, extra", "written_mib", "MiB", 2, True),
    Line("written to disk, extra", "disk_mib", "MiB", 2, True),
    Line("  the agent's, of it all", "agent_written_mib", "MiB", 2),
    Line("  the agent's, to disk", "agent_disk_mib", "MiB", 2),
    Line("series", "series", "", 0),
    Line("points a series, median", "points_per_min", "1/min", 1),
    Line("  of the one with the most", "most_points_per_min", "1/min", 1),
    Line("longest gap between samples, lock held", "gap_ms", "ms", 0),
    Line("  the lock was held for", "gil_s", "s", 1),
    Line("spikes seen", "spikes_pct", "%", 0),
    Line("  the first one", "first_spike", "%", 0),
    Line("  they lasted", "spike_ms", "ms", 0),
)

MICRO_LINES = (
    Line("step(), median of single calls", "step_ns", "ns", 0, False, 1000),
    Line("step(), mean in a loop", "step_mean_ns", "ns", 0),
    Line("step(), median, caches cold", "step_cold_ns", "ns", 0),
    Line("entering a phase, median", "phase_ns", "ns", 0, False, 1000),
    Line("a whole `with phase(...)`, mean", "phase_block_mean_ns", "ns", 0),
    Line("step(), nothing monitoring", "idle_step_ns", "ns", 0),
    Line("`with phase(...)`, nothing monitoring", "idle_phase_block_ns", "ns", 0),
    Line("import memtrack, time", "import_ms", "ms", 2),
    Line("import memtrack, USS beyond numpy", "import_uss_mib", "MiB", 2, False, 1.0),
    Line("  and after the first step()", "first_use_uss_mib", "MiB", 2),
    Line("start(), the first, with imports", "start_first_ms", "ms", 1),
    Line("  until the agent samples", "start_ready_ms", "ms", 1),
    Line("start(), again", "start_again_ms", "ms", 1),
    Line("start(), memory written to", "start_dirty_mib", "MiB", 2, False, 2.0),
    Line("agent beside a process at rest, CPU", "calm_cpu_pct", "% of a core", 3, False, 0.2),
    Line("  samples", "calm_ticks_per_s", "1/s", 1),
    Line("  RSS", "calm_rss_mib", "MiB", 1, False, 10.0),
    Line("  PSS", "calm_pss_mib", "MiB", 1, False, 6.0),
    Line("  USS", "calm_uss_mib", "MiB", 1),
    Line("agent beside a process that trains, CPU", "busy_cpu_pct", "% of a core", 3, False, 0.2),
    Line("  samples", "busy_ticks_per_s", "1/s", 1),
    Line("  RSS", "busy_rss_mib", "MiB", 1, False, 10.0),
    Line("  PSS", "busy_pss_mib", "MiB", 1, False, 6.0),
    Line("  USS", "busy_uss_mib", "MiB", 1),
    Line("agent beside one that enters a phase a step, CPU", "phases_cpu_pct", "% of a core", 3, False, 0.2),
    Line("  samples", "phases_ticks_per_s", "1/s", 1),
)


def combine(line: Line, arm: str, rounds: list[dict[str, Figures]]) -> float | None:
    """The median over the rounds, of the figure or of what it exceeds the plain arm's by."""
    values = []
    for one in rounds:
        if line.key in one.get(arm, {}):
            base = one.get("plain", {}).get(line.key) if line.extra else 0.0
            if base is not None:
                values.append(one[arm][line.key] - base)
    if not values or (line.extra and arm == "plain"):
        return None
    return statistics.median(values)


def shown(value: float | None, line: Line) -> str:
    """The figure with the sign of a difference."""
    if value is None:
        return "–"
    return f"{value:+.{line.digits}f}" if line.extra else f"{value:.{line.digits}f}"


def verdict(value: float | None, line: Line) -> list[str]:
    """The budget, and whether it is kept."""
    if line.budget is None or value is None:
        return ["", ""]
    return [f"{line.budget:g}", "ok" if round(value, line.digits) <= line.budget else "MISSED"]


def loop_table(tracker: str, rounds: list[dict[str, Figures]], arms: list[str]) -> list[list[str]]:
    """Header and rows of the comparison with one tracker."""
    table = [["", *(TITLES[arm].format(NAMES[tracker]) for arm in arms), "unit", "budget", ""]]
    for line in LOOP_LINES:
        found = {arm: combine(line, arm, rounds) for arm in arms}
        if any(value is not None for value in found.values()):
            cells = [shown(found[arm], line) for arm in arms]
            table.append([line.title, *cells, line.unit, *verdict(found.get("memtrack"), line)])
    return table


def micro_table(figures: Figures) -> list[list[str]]:
    """Header and rows of the single costs."""
    table = [["", "memtrack", "unit", "budget", ""]]
    for line in MICRO_LINES:
        value = figures.get(line.key)
        if value is not None:
            table.append([line.title, shown(value, line), line.unit, *verdict(value, line)])
    return table


def render(table: list[list[str]], markdown: bool) -> str:
    """Aligned columns; numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    right = [index > 0 and column != "unit" for index, column in enumerate(table[0])]
    right[-1] = False
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if to else cell.ljust(width) for cell, width, to in zip(row, widths, right, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        rule = [("-" * (width - 1) + ":") if to else "-" * width for width, to in zip(widths, right, strict=True)]
        lines.insert(1, f"|{'|'.join(f' {dashes} ' for dashes in rule)}|")
    else:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
