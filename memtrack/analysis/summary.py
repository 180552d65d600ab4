"""What a recording, or a part of it, comes to: peak and place, the room that was left, what memtrack cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from memtrack import metrics
from memtrack.analysis.stacks import peak_stack
from memtrack.analysis.verdict import describe, verdict_of
from memtrack.recording import layout
from memtrack.recording.rank import rank_of
from memtrack.sampling.window import BOUND, LABELS, NO_STEP, Row
from memtrack.sinks.figures import PartFigures, RunFigures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memtrack.recording.epochs import Epoch
    from memtrack.recording.reader import RecordingReader
    from memtrack.recording.records import Verdict
    from memtrack.sampling.window import Cell

SLACK_NS = 10**9
"""A phase that began so much before a run is the run's: a framework may start its tracker within its training."""

MAX_EPOCHS = 12
"""Lines of epochs in a text; the table that the tracker gets has them all."""


class Summary(NamedTuple):
    """The figures of a recording and how the process ended. ``str()`` of it is what people read."""

    figures: RunFigures
    verdict: Verdict | None = None

    @property
    def phases(self) -> tuple[PartFigures, ...]:
        """A row a phase."""
        return self.figures.phases

    @property
    def epochs(self) -> tuple[PartFigures, ...]:
        """A row an epoch; of more than 64, a row for several that follow each other."""
        return self.figures.epochs

    def __str__(self) -> str:
        return render(self)


def figures_of(reader: RecordingReader, start_ns: int = 0, end_ns: int | None = None) -> RunFigures:
    """The figures of the windows whose middle lies between two monotonic times. Reads one window at a time.

    With the verdict, if the process has ended, and the stack at the highest sample, whatever the times are.
    """
    total: Row | None = None
    windows = 0
    for row in reader.windows():
        middle = (row.start_ns + row.end_ns) // 2
        if middle < start_ns or (end_ns is not None and middle >= end_ns):
            continue
        windows += row.last - row.first + 1
        if total is None:
            total = row
        else:
            total.merge(row)
    figures = RunFigures() if total is None else _figures(total, reader, windows)
    return _with_end(_with_parts(figures, reader, start_ns, end_ns), reader, verdict_of(reader))


def summarise(reader: RecordingReader) -> Summary:
    """The summary of a whole recording."""
    verdict = verdict_of(reader)
    whole = reader.phases().get("")
    if whole is None:
        return Summary(figures_of(reader), verdict)
    figures = _with_parts(_figures(whole, reader, reader.head().windows), reader)
    return Summary(_with_end(figures, reader, verdict), verdict)


def _with_end(figures: RunFigures, reader: RecordingReader, verdict: Verdict | None) -> RunFigures:
    stack = peak_stack(reader)
    if stack is not None:
        figures = figures._replace(stack=stack.text)
    if verdict is None:
        return figures
    return figures._replace(
        verdict=verdict.kind,
        verdict_confidence=verdict.confidence,
        verdict_text=verdict.text,
        verdict_evidence=tuple(verdict.evidence),
        exit_code=verdict.exit_code,
        signal=verdict.signal,
        end_wall_s=verdict.wall_ns / 1e9 if verdict.wall_ns else None,
    )


def _figures(total: Row, reader: RecordingReader, windows: int) -> RunFigures:
    cells = total.cells
    head = reader.head()
    rss = cells.get(metrics.RSS)
    own_rss, own_cpu = cells.get(metrics.SELF_AGENT_RSS), cells.get(metrics.SELF_CPU)
    figures = RunFigures(
        peak_tree_pss_mib=_max(cells.get(metrics.TREE_PSS)),
        processes_max=_count(_max(cells.get(metrics.TREE_PROCESSES))),
        limit_mib=_min(cells.get(metrics.CONTAINER_LIMIT)),
        limit_source=head.limit_source,
        headroom_min_pct=_min(cells.get(metrics.CONTAINER_HEADROOM)),
        seconds=total.seconds,
        agent_rss_mib=_max(own_rss),
        agent_cpu_pct=None if own_cpu is None else own_cpu.mean,
        windows=windows,
        dropped=head.dropped,
        merged=head.merged,
    )
    figures = _with_ranks(figures, cells, reader)
    if rss is None:
        return figures
    names = reader.names()
    return figures._replace(
        peak_rss_mib=rss.max,
        peak_label=LABELS.get(rss.label, ""),
        peak_wall_s=(total.end_wall_ns - (total.end_ns - rss.max_ns)) / 1e9,
        peak_phase=names[rss.phase] if rss.phase < len(names) else "",
        peak_step=_known(rss.step),
        peak_epoch=_known(rss.epoch),
    )


def _with_ranks(figures: RunFigures, cells: dict[str, Cell], reader: RecordingReader) -> RunFigures:
    alive, worst, highest = (cells.get(name) for name in (metrics.RANKS_ALIVE, metrics.RANKS_WORST, metrics.RANKS_MAX))
    if alive is None or worst is None or highest is None or not 0.0 <= worst.last < 1e9:
        return figures
    rank, peak_mib, own = int(worst.last), highest.max, rank_of(reader)
    # of this rank more is known than stood in finished windows
    if own is not None and metrics.RSS in cells and cells[metrics.RSS].max > peak_mib:
        rank, peak_mib = own.number, cells[metrics.RSS].max
    return figures._replace(ranks=_count(alive.max), worst_rank=rank, worst_rank_peak_mib=peak_mib)


def _with_parts(
    figures: RunFigures, reader: RecordingReader, start_ns: int = 0, end_ns: int | None = None
) -> RunFigures:
    """With the phases and epochs between two monotonic times. Of one that was open at other times as well, such as
    that of an earlier run, the peak is a bound, and how it grew is not known."""
    end_ns = layout.MAX_NUMBER if end_ns is None else end_ns
    named = {name: row for name, row in reader.phases().items() if name and metrics.RSS in row.cells}
    phases = [
        _bounded(_phase(name, row), row.start_ns < start_ns - SLACK_NS or row.end_ns > end_ns + SLACK_NS)
        for name, row in named.items()
        if row.end_ns > start_ns and row.start_ns < end_ns
    ]
    epochs = [
        _bounded(_epoch(epoch), epoch.start_ns < start_ns - SLACK_NS or epoch.end_ns > end_ns + SLACK_NS)
        for epoch in reader.epochs()
        if epoch.end_ns > start_ns and epoch.start_ns < end_ns and epoch.peak_mib == epoch.peak_mib
    ]
    return figures._replace(phases=tuple(phases), epochs=tuple(epochs))


def _phase(name: str, row: Row) -> PartFigures:
    rss, growth = row.cells[metrics.RSS], row.cells.get(metrics.GROWTH)
    headroom_pct = _min(row.cells.get(metrics.CONTAINER_HEADROOM))
    return PartFigures(
        name,
        rss.seconds,
        rss.max,
        LABELS.get(rss.label, ""),
        _known(rss.step),
        rss.last,
        None if growth is None else growth.last,
        None if headroom_pct is None else 100.0 - headroom_pct,
    )


def _epoch(epoch: Epoch) -> PartFigures:
    return PartFigures(
        str(epoch.first) if epoch.first_number == epoch.last_number else f"{epoch.first}-{epoch.last}",
        epoch.seconds,
        epoch.peak_mib,
        LABELS.get(epoch.label, ""),
        _known(epoch.step),
        epoch.last_mib,
        epoch.growth_mib if epoch.growth_mib == epoch.growth_mib else None,
        100.0 - epoch.headroom_min_pct if epoch.headroom_min_pct == epoch.headroom_min_pct else None,
    )


def _bounded(part: PartFigures, is_more: bool) -> PartFigures:
    return part._replace(peak_label=LABELS[BOUND], growth_mib=None) if is_more else part


def _count(value: float | None) -> int:
    return int(value) if value is not None and 1.0 <= value < 1e9 else 1


def _known(number: int) -> int | None:
    return None if number == NO_STEP else number


def _max(cell: Cell | None) -> float | None:
    return None if cell is None else cell.max


def _min(cell: Cell | None) -> float | None:
    return None if cell is None else cell.min


def render(summary: Summary, *, everything: bool = False) -> str:
    """The summary as a few lines of text, with the main evidence of the verdict, or with everything."""
    figures = summary.figures
    verdict = [] if summary.verdict is None else describe(summary.verdict, everything=everything)
    if figures.peak_rss_mib is None:
        return "\n".join(["memtrack: nothing was sampled", *verdict])
    lines = [f"memtrack: peak {size(figures.peak_rss_mib)} resident ({figures.peak_label}){_where(figures)}", *verdict]
    if figures.peak_tree_pss_mib is not None and figures.processes_max > 1:
        tree = f"{size(figures.peak_tree_pss_mib)} with all {figures.processes_max} processes"
        lines.append(f"  tree      {tree} (PSS: shared pages count once)")
    if figures.ranks is not None and figures.worst_rank_peak_mib is not None:
        worst = f"worst rank {figures.worst_rank} with {size(figures.worst_rank_peak_mib)} at its peak"
        lines.append(f"  ranks     {figures.ranks}, {worst}")
    if figures.limit_mib is not None and figures.headroom_min_pct is not None:
        limit = f"{size(figures.limit_mib)} ({figures.limit_source})"
        lines.append(f"  headroom  {figures.headroom_min_pct:.0f} % at the least, of {limit}")
    lines += _render_parts("phases", summary.phases)
    lines += _render_parts("epochs", summary.epochs, MAX_EPOCHS)
    if figures.agent_rss_mib is not None:
        cpu = "" if figures.agent_cpu_pct is None else f", {figures.agent_cpu_pct:.2f} % of a core"
        spent = f"{figures.windows} windows in {figures.seconds:.1f} s"
        lines.append(f"  memtrack  agent {figures.agent_rss_mib:.1f} MiB{cpu}, {spent}")
    if figures.merged:
        lines.append(f"  merged    {figures.merged} windows, because the recording was full; extremes are exact")
    if figures.dropped:
        lines.append(f"  dropped   {figures.dropped} marks, phases or windows found no room")
    return "\n".join(lines)


def _render_parts(title: str, parts: Sequence[PartFigures], most: int = 100) -> list[str]:
    """A line a part under a title; of more than ``most`` the first few and the last."""
    if not parts:
        return []
    shown: list[PartFigures | None] = list(parts)
    if len(shown) > most:
        shown[most // 3 : len(shown) - (most - most // 3)] = [None]
    width = max(len(part.name) for part in parts)
    lines = [f"  {title}"]
    for part in shown:
        if part is None:
            lines.append("    ...")
            continue
        growth = "" if part.growth_mib is None else f"{part.growth_mib:+.1f} MiB"
        share = "" if part.limit_pct is None else f"   {part.limit_pct:5.1f} % of the limit in use"
        lines.append(
            f"    {part.name:<{width}}  {part.seconds:7.1f} s   peak {size(part.peak_rss_mib):>10}"
            f" {f'({part.peak_label})':<9}   grew by {growth:>11}{share}"
        )
    return lines


def size(mib: float) -> str:
    """MiB for people: GiB from 1024 MiB on."""
    return f"{mib / 1024:.2f} GiB" if abs(mib) >= 1024 else f"{mib:.1f} MiB"


def _where(figures: RunFigures) -> str:
    from datetime import datetime

    parts = []
    if figures.peak_wall_s is not None:
        parts.append(f"at {datetime.fromtimestamp(figures.peak_wall_s):%H:%M:%S}")
    if figures.peak_phase:
        parts.append(f"in phase {figures.peak_phase}")
    if figures.peak_epoch is not None:
        parts.append(f"epoch {figures.peak_epoch}")
    if figures.peak_step is not None:
        parts.append(f"step {figures.peak_step}")
    return " " + ", ".join(parts) if parts else ""
