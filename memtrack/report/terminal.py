"""Reports and lists for the terminal. Needs rich, which the 'cli' extra brings."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from memtrack import metrics
from memtrack.analysis.stacks import headline, main_frames
from memtrack.analysis.summary import render, size
from memtrack.errors import MissingDependencyError
from memtrack.recording.layout import printable
from memtrack.sampling.window import NO_STEP

try:
    from rich import box
    from rich.markup import escape
    from rich.table import Table
except ImportError as exc:
    raise MissingDependencyError("a report on the terminal", "cli") from exc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from memtrack.recording.reader import RecordingReader
    from memtrack.report.data import Note, Report, Series, Taken
    from memtrack.report.recordings import Listed

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 20
MAX_EVENTS = 20
MAX_FRAMES = 12
STATE_STYLES = {"running": "green", "starting": "green", "lost its agent": "yellow"}
EVENT_STYLES = {
    "error": "red",
    "oom_kill": "red",
    "rank": "red",
    "limit_near": "yellow",
    "limit_changed": "yellow",
    "gap": "yellow",
    "gpu": "yellow",
}


def show(report: Report, console: Console) -> None:
    """Print the report: summary, metrics with sparklines, events."""
    title = f"{report.program or 'process'} ({report.pid})"
    started = _moment(report.started_s)
    console.print(
        f"[bold]{escape(title)}[/], started {started}, {duration(report.seconds)}, {_state(report.state)}",
        soft_wrap=True,
    )
    console.print(render(report.summary, everything=True), markup=False, soft_wrap=True)
    if report.stacks:
        console.print(stack_text(report.stacks), markup=False, soft_wrap=True)
    if report.series:
        console.print()
        console.print(metric_table(report))
    if report.notes:
        console.print()
        console.print(event_table(report.notes))
    console.print(f"[dim]{escape(printable(os.path.abspath(report.path)))}[/]", soft_wrap=True)


def stack_text(stacks: Sequence[Taken]) -> str:
    """Where the code of the main thread stood at the highest RSS that has a stack, the innermost frame first."""
    taken = max(stacks, key=lambda taken: taken.rss_mib)
    text = "\n".join(taken.frames)
    frames = [printable(frame) for frame in main_frames(text)]
    lines = [f"  code      {printable(headline(text))}, at {size(taken.rss_mib)}"]
    lines += [f"            {frame}" for frame in frames[:MAX_FRAMES]]
    if len(frames) > MAX_FRAMES:
        lines.append(f"            and {len(frames) - MAX_FRAMES} further out")
    return "\n".join(lines)


def metric_table(report: Report) -> Table:
    """A row a metric; the sparkline is of the maxima of the windows."""
    table = _table("memory/…", "min", "mean", "max", "last", "unit", "maximum over time", numbers=range(1, 5))
    for name, series in report.series.items():
        total = series.total
        if total is not None:
            figures = (number(value) for value in (total.min, total.mean, total.max, total.last))
            line = sparkline(series, report.seconds)
            table.add_row(escape(name.removeprefix("memory/")), *figures, series.unit, f"[cyan]{line}[/]")
    return table


def event_table(notes: Sequence[Note]) -> Table:
    """The newest events."""
    table = _table("at", "event", "step", "what", numbers=(0, 2))
    for note in notes[-MAX_EVENTS:]:
        text = note.text
        if note.kind == "limit_near":
            text = f"{note.value:.1f} % left of {note.text}"
        elif note.kind == "new_peak":
            text = f"{size(note.value)}, {note.text}"
        elif note.kind == "limit_changed":
            text = f"{size(note.value)} ({note.text})"
        elif note.kind == "mark" and note.value:
            text = f"{note.text} = {note.value:g}"
        kind = f"[{EVENT_STYLES[note.kind]}]{note.kind}[/]" if note.kind in EVENT_STYLES else note.kind
        step = "" if note.step is None else str(note.step)
        table.add_row(f"{note.time_s:.1f} s", kind.replace("_", " "), step, escape(text))
    if len(notes) > MAX_EVENTS:
        table.caption = f"and {len(notes) - MAX_EVENTS} before"
    return table


def listing(listed: Sequence[Listed], folder: str) -> Table:
    """The recordings of a folder; damaged ones with what is wrong."""
    columns = ("recording", "process", "started", "length", "state", "delivery", "peak RSS", "file")
    table = _table(*columns, numbers=(3, 6, 7))
    table.title = escape(printable(folder))
    for one in listed:
        name, started = escape(printable(one.name)), _moment(one.started_s)
        file_size = size(one.size_bytes / metrics.MIB)
        if one.problem:
            table.add_row(name, "", started, "", f"[red]{escape(printable(one.problem))}[/]", "", "", file_size)
            continue
        peak = "" if one.peak_rss_mib is None else size(one.peak_rss_mib)
        process = escape(f"{one.program} ({one.pid})" if one.program else str(one.pid))
        delivery = escape(one.delivery) or "–"
        table.add_row(name, process, started, duration(one.seconds), _state(one.state), delivery, peak, file_size)
    return table


def live_line(reader: RecordingReader) -> str:
    """Where a recording that is being made stands now, in rich's markup."""
    pulse = reader.pulse()
    if not pulse.mono_ns:
        return "waiting for the first sample"
    whole = reader.phases().get("")
    peak = pulse.rss_mib
    if whole is not None and metrics.RSS in whole.cells:
        peak = max(peak, whole.cells[metrics.RSS].max)
    parts = [f"now [bold]{size(pulse.rss_mib)}[/]", f"peak [bold]{size(peak)}[/]"]
    if pulse.headroom_pct == pulse.headroom_pct:  # NaN is not equal to itself
        style = "red" if pulse.headroom_pct < 10.0 else "bold"
        parts.append(f"headroom [{style}]{pulse.headroom_pct:.0f} %[/]")
    place, names = reader.place(), reader.names()
    if place.phases and place.phase < len(names):
        parts.append(f"phase {escape(names[place.phase])}")
    if place.step != NO_STEP:
        parts.append(f"step {place.step}")
    return "   ".join(parts)


def sparkline(series: Series, seconds: float, width: int = SPARK_WIDTH) -> str:
    """The maxima of the windows over the time of the recording; a blank where nothing was measured.

    The lowest bar is the smallest maximum, the highest bar the largest; one that never changes is a line in the middle.
    """
    highest: list[float | None] = [None] * width
    scale = width / max(seconds, series.end_s[-1], 1e-9) if len(series.end_s) else 0.0
    for start_s, end_s, value in zip(series.start_s, series.end_s, series.max, strict=True):
        first = min(max(int(start_s * scale), 0), width - 1)
        # a window that ends on the border of two columns belongs to the first
        last = min(max(int(end_s * scale - 1e-9), first), width - 1)
        for column in range(first, last + 1):
            before = highest[column]
            highest[column] = value if before is None else max(before, value)
    known = [value for value in highest if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if high <= low:
        return "".join(" " if value is None else BARS[3] for value in highest)
    steps = len(BARS) - 1
    return "".join(" " if value is None else BARS[round((value - low) / (high - low) * steps)] for value in highest)


def number(value: float) -> str:
    """Four significant digits at least, without exponents unless it is astronomical."""
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return ""  # a file may be dated to any year


def _state(state: str) -> str:
    style = STATE_STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state


def _table(*columns: str, numbers: Sequence[int] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        is_number = index in numbers
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number or index == 0)
    return table
