"""A run's memory as a picture. Needs matplotlib, which the 'report' extra brings; never touches its global state."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from memtrack import metrics
from memtrack.analysis.stacks import headline
from memtrack.analysis.summary import size
from memtrack.errors import MissingDependencyError, RecordingError
from memtrack.recording.layout import printable

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as exc:
    raise MissingDependencyError("a picture of a recording", "report") from exc

if TYPE_CHECKING:
    from array import array
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from memtrack.report.data import Report, Series, Span

RSS_COLOUR, PSS_COLOUR, CONTAINER_COLOUR, LIMIT_COLOUR = "#1f5fa8", "#2a9d6f", "#b07d2b", "#c0392b"
HOST_COLOUR, SECOND_COLOUR, GREY = "#5b6b7b", "#a05195", "#555555"
PHASE_COLOURS = ("#e8eef7", "#fdf1dc", "#e7f4ec", "#f7e8ee", "#efe9f7", "#e6f3f6")

LIMIT_IN_SIGHT = 3.0
"""The limit is drawn if it is at most this many times the peak; farther away it would flatten everything else."""

LABEL_WIDTH = 0.012
"""Width of a character of a phase's name, as a share of the time axis."""

LONGEST_CODE = 60
"""Characters of a place in the code that are written at the peak; a longer one is left out."""

MIN_GAP = 0.004
"""The shortest pause between two phases of the same name that is shown, as a share of the time axis."""


class Scale(NamedTuple):
    """The unit of an axis: what values are divided by, and its name."""

    divisor: float
    unit: str


def draw(report: Report, path: str) -> None:
    """Write the picture to ``path``; the format is that of its suffix, PNG by default.

    Raises RecordingError if nothing was sampled or the file cannot be written.
    """
    if metrics.RSS not in report.series:
        raise RecordingError(f"{report.path}: nothing was sampled, so there is nothing to draw")
    figure = Figure(figsize=(10.0, 5.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1.0))
    seconds = max(report.seconds, report.series[metrics.RSS].end_s[-1], 1e-3)
    clock = Scale(3600.0, "hours") if seconds > 3 * 3600 else Scale(1.0, "seconds")
    _draw_memory(upper, report, clock, seconds)
    _draw_machine(lower, report, clock)
    lower.set_xlim(0.0, seconds / clock.divisor)
    lower.set_xlabel(f"{clock.unit} since start")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    _title(upper, report)
    try:
        canvas.print_figure(path)
    except (OSError, ValueError) as exc:
        raise RecordingError(f"cannot write {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def _draw_memory(axes: Axes, report: Report, clock: Scale, seconds: float) -> None:
    rss, figures = report.series[metrics.RSS], report.summary.figures
    peak_mib = max(rss.max)
    shown = [
        rss,
        *(report.series[name] for name in (metrics.TREE_PSS, metrics.CONTAINER_USAGE) if name in report.series),
    ]
    top_mib = max(max(series.max) for series in shown)
    limit_mib = figures.limit_mib
    limit_in_sight = limit_mib is not None and limit_mib <= LIMIT_IN_SIGHT * top_mib
    if limit_mib is not None and limit_in_sight:
        top_mib = max(top_mib, limit_mib)
    scale = _scale(top_mib)
    _draw_phases(axes, report.spans, clock, seconds)
    edges, low, high = _steps(rss, clock, scale)
    axes.fill_between(edges, low, high, step="post", color=RSS_COLOUR, alpha=0.22, linewidth=0, label="its min to max")
    for name, colour, label in (
        (metrics.CONTAINER_USAGE, CONTAINER_COLOUR, "container usage"),
        (metrics.TREE_PSS, PSS_COLOUR, "with descendants (PSS)"),
        (metrics.RSS, RSS_COLOUR, "process RSS, mean"),
    ):
        if name in report.series:
            is_process = name == metrics.RSS
            axes.plot(
                *_line(report.series[name], clock, scale, estimates=name == metrics.TREE_PSS),
                color=colour,
                linewidth=1.8 if is_process else 1.3,
                linestyle="-" if is_process else "--" if name == metrics.TREE_PSS else ":",
                label=label,
            )
    if limit_mib is not None and limit_in_sight:
        axes.axhline(limit_mib / scale.divisor, color=LIMIT_COLOUR, linewidth=1.3)
        axes.text(
            0.008,
            limit_mib / scale.divisor,
            f"limit {size(limit_mib)}",
            transform=axes.get_yaxis_transform(),
            va="bottom",
            fontsize=9,
            color=LIMIT_COLOUR,
        )
    axes.set_ylim(0.0, top_mib / scale.divisor * 1.28)
    axes.set_ylabel(f"memory, {scale.unit}")
    _annotate_peak(axes, rss, peak_mib, clock, scale, seconds, _code_at_peak(report))
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: "RSS" not in labels[index])
    legend = axes.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=5,
        fontsize=8.5,
        frameon=False,
        columnspacing=1.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a phase may be named after a price


def _code_at_peak(report: Report) -> str:
    """``file:line function``, if there is a stack and it fits beside the curve."""
    highest = max(report.stacks, key=lambda taken: taken.rss_mib, default=None)
    text = "" if highest is None else printable(headline("\n".join(highest.frames)))
    return text if len(text) <= LONGEST_CODE else ""


def _annotate_peak(
    axes: Axes, rss: Series, peak_mib: float, clock: Scale, scale: Scale, seconds: float, code: str
) -> None:
    total = rss.total
    if total is None:
        return
    where = [f"peak {size(peak_mib)}"]
    if total.label != "sampled":
        where[0] += f" ({total.label})"
    if total.phase:
        where.append(total.phase)
    if total.epoch is not None:
        where.append(f"epoch {total.epoch}")
    if total.step is not None:
        where.append(f"step {total.step}")
    at_s = min(max(total.max_s, 0.0), seconds)
    is_right = at_s > seconds / 2
    axes.plot(at_s / clock.divisor, peak_mib / scale.divisor, "o", color=RSS_COLOUR, markersize=5, zorder=5)
    axes.annotate(
        ", ".join(where) + (f"\n{code}" if code else ""),
        (at_s / clock.divisor, peak_mib / scale.divisor),
        xytext=(at_s / clock.divisor, 0.88),
        textcoords=axes.get_xaxis_transform(),
        ha="right" if is_right else "left",
        va="center",
        fontsize=9.5,
        fontweight="bold",
        color="#222222",
        parse_math=False,
        arrowprops={
            "arrowstyle": "-",
            "color": "#444444",
            "linewidth": 0.8,
            "shrinkA": 0,
            "shrinkB": 3,
            "relpos": (1.0 if is_right else 0.0, 0.0),
        },
        zorder=6,
    )


def _draw_phases(axes: Axes, spans: Sequence[Span], clock: Scale, seconds: float) -> None:
    """Shade by outermost phase. A name is written where it fits; one that fits nowhere goes to the legend."""
    stretches = _outermost(spans, seconds * MIN_GAP)
    fitting = {name for name, start_s, end_s in stretches if (end_s - start_s) / seconds > LABEL_WIDTH * len(name)}
    colours: dict[str, str] = {}
    for name, start_s, end_s in stretches:
        label = "_" if name in colours or name in fitting else name
        colour = colours.setdefault(name, PHASE_COLOURS[len(colours) % len(PHASE_COLOURS)])
        left, right = start_s / clock.divisor, end_s / clock.divisor
        axes.axvspan(left, right, color=colour, linewidth=0, zorder=0, label=label)
        if (end_s - start_s) / seconds > LABEL_WIDTH * len(name):
            transform = axes.get_xaxis_transform()
            middle = (left + right) / 2
            axes.text(
                middle,
                0.985,
                name,
                transform=transform,
                ha="center",
                va="top",
                fontsize=8.5,
                color=GREY,
                parse_math=False,
            )


def _outermost(spans: Sequence[Span], gap_s: float) -> list[tuple[str, float, float]]:
    """Name, start and end of outermost phases. One that was left and entered again within ``gap_s`` was not left."""
    joined: list[tuple[str, float, float]] = []
    for span in spans:
        name = span.phase.partition("/")[0]
        if joined and joined[-1][0] == name and span.start_s - joined[-1][2] <= gap_s:
            joined[-1] = (name, joined[-1][1], span.end_s)
        else:
            joined.append((name, span.start_s, span.end_s))
    return joined


def _draw_machine(axes: Axes, report: Report, clock: Scale) -> None:
    """The machine's free memory, and beside it what moves: memory pressure, else the number of processes."""
    available = report.series.get(metrics.HOST_AVAILABLE)
    if available is not None:
        scale = _scale(max(available.max))
        edges, low, _ = _steps(available, clock, scale)
        axes.fill_between(edges, low, step="post", color=HOST_COLOUR, alpha=0.25, linewidth=0)
        axes.plot(*_line(available, clock, scale), color=HOST_COLOUR, linewidth=1.2)
        axes.set_ylim(0.0, max(available.max) / scale.divisor * 1.15)
        axes.set_ylabel(f"host available,\n{scale.unit}", color=HOST_COLOUR, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(3))
    pressure, processes = report.series.get(metrics.HOST_PRESSURE), report.series.get(metrics.TREE_PROCESSES)
    if pressure is not None and max(pressure.max) >= 1.0:
        second, label, unit_top = pressure, "memory pressure, %", 5.0
    elif processes is not None and max(processes.max) >= 2.0:
        second, label, unit_top = processes, "processes", 2.0
    else:
        return
    twin = axes.twinx()
    edges, _, high = _steps(second, clock, Scale(1.0, ""))
    twin.step(edges, high, where="post", color=SECOND_COLOUR, linewidth=1.3)
    twin.set_ylim(0.0, max(max(second.max), unit_top) * 1.25)
    twin.set_ylabel(label, color=SECOND_COLOUR, fontsize=9)
    twin.yaxis.set_major_locator(MaxNLocator(3, integer=second is processes))
    twin.spines["top"].set_visible(False)
    twin.tick_params(labelsize=9)


def _title(axes: Axes, report: Report) -> None:
    figures = report.summary.figures
    axes.set_title(
        f"{report.program or 'process'} ({report.pid})", loc="left", fontsize=12, fontweight="bold", parse_math=False
    )
    facts = []
    if figures.headroom_min_pct is not None and figures.limit_mib is not None:
        facts.append(
            f"headroom {figures.headroom_min_pct:.0f} % at the least, of {size(figures.limit_mib)}"
            f" ({_shorten(figures.limit_source)})"
        )
    if report.state not in ("stopped", "ended"):
        facts.append(report.state)
    axes.set_title(", ".join(facts), loc="right", fontsize=9, color=GREY, parse_math=False)


def _scale(top_mib: float) -> Scale:
    return Scale(1024.0, "GiB") if top_mib >= 2048.0 else Scale(1.0, "MiB")


def _steps(series: Series, clock: Scale, scale: Scale) -> tuple[list[float], list[float], list[float]]:
    """Edges of the windows, and lowest and highest value from each edge on; a window is a stretch, not a point."""
    edges = [*series.start_s, series.end_s[-1]]
    return (
        [edge / clock.divisor for edge in edges],
        _scaled(series.min, scale),
        _scaled(series.max, scale),
    )


def _scaled(values: array[float], scale: Scale) -> list[float]:
    return [value / scale.divisor for value in (*values, values[-1])]


def _line(series: Series, clock: Scale, scale: Scale, *, estimates: bool = False) -> tuple[list[float], list[float]]:
    """The means, in the middle of the windows that have samples, drawn out to the first and last edge.

    Values that were only held over are left out, as they would make stairs; estimates are not.
    """
    sampled = [index for index, count in enumerate(series.count) if count or estimates] or [0]
    middles = [(series.start_s[index] + series.end_s[index]) / 2 for index in sampled]
    times = [series.start_s[0], *middles, series.end_s[-1]]
    means = [series.mean[index] for index in (sampled[0], *sampled, sampled[-1])]
    return [at_s / clock.divisor for at_s in times], [mean / scale.divisor for mean in means]


def _shorten(source: str) -> str:
    """cgroup paths of containers are long, and their beginning tells least."""
    return source if len(source) <= 44 else "…" + source[-43:]
