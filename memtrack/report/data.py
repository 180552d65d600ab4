"""Everything that a report shows, read from a recording once."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING, NamedTuple

from memtrack import metrics
from memtrack.analysis.summary import summarise
from memtrack.errors import RecordingFormatError
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from memtrack.report.recordings import SUFFIX, length_s, list_ranks, state_of
from memtrack.sampling.window import LABELS, NO_STEP

if TYPE_CHECKING:
    from memtrack.analysis.summary import Summary
    from memtrack.report.recordings import Listed
    from memtrack.sampling.window import Cell

_ORDER = {metric.name: number for number, metric in enumerate(metrics.TABLE)}


LARGEST = 1e300
"""Values beyond it, infinities and NaN are no figures: windows in which a metric has one do not show it."""


class Total(NamedTuple):
    """A metric over the whole recording, in its unit. ``max_s`` is in seconds since the start; None: not marked."""

    min: float
    mean: float
    max: float
    last: float
    label: str
    max_s: float
    step: int | None
    epoch: int | None
    phase: str


class Series:
    """One metric: its windows, oldest first, as arrays of equal length, and the total. Times are from the start on."""

    __slots__ = ("count", "end_s", "max", "mean", "min", "name", "start_s", "total", "unit")

    def __init__(self, name: str) -> None:
        self.name = name
        self.unit = metrics.unit_of(name)
        self.start_s, self.end_s = array("d"), array("d")
        self.min, self.mean, self.max = array("d"), array("d"), array("d")
        self.count = array("L")
        """Samples in each window; 0 where the value was held over from an earlier one."""
        self.total: Total | None = None


class Span(NamedTuple):
    """A stretch of time in which the same phases were open: path of the innermost one, "" for none."""

    phase: str
    start_s: float
    end_s: float


class Note(NamedTuple):
    """An event: when in seconds since the start, its kind, step (None: not marked), value, and text."""

    time_s: float
    kind: str
    step: int | None
    value: float
    text: str


class Taken(NamedTuple):
    """A stack of the training process: when in seconds since the start, at what memory, and its frames as text."""

    time_s: float
    rss_mib: float
    usage_mib: float
    headroom_pct: float
    phase: str
    epoch: int | None
    step: int | None
    frames: list[str]


class Report(NamedTuple):
    """A recording as reports show it. ``started_s`` is Unix time, ``state`` as in ``memtrack ls``."""

    path: str
    name: str
    program: str
    pid: int
    started_s: float
    seconds: float
    state: str
    summary: Summary
    series: dict[str, Series]
    spans: list[Span]
    notes: list[Note]
    stacks: list[Taken]
    ranks: dict[int, Listed]
    """Of the first rank of a node: all of its ranks, by number."""


def collect(path: str, choice: str = "default") -> Report:
    """Read the recording at ``path``, with the metrics of ``choice`` (see ``metrics.selected``).

    Raises RecordingError or RecordingFormatError. Memory: 48 bytes a window and metric.
    """
    with RecordingReader(path) as reader:
        fields = reader.fields
        try:
            start_ns, started_s, pid = int(fields["mono_ns"]), int(fields["wall_ns"]) / 1e9, int(fields["pid"])
        except (KeyError, ValueError) as exc:
            raise RecordingFormatError(f"{path}: the header lacks {exc}") from exc
        seconds = length_s(reader)
        return Report(
            path=path,
            name=os.path.basename(path).removesuffix(SUFFIX),
            program=fields.get("program", ""),
            pid=pid,
            started_s=started_s,
            seconds=seconds,
            state=state_of(reader),
            summary=summarise(reader),
            series=_series(reader, start_ns, choice),
            spans=_spans(reader, start_ns, seconds),
            notes=[
                Note(
                    (event.time_ns - start_ns) / 1e9,
                    event.kind,
                    None if event.step == NO_STEP else event.step,
                    event.value,
                    event.text,
                )
                for event in reader.events()
            ],
            stacks=_stacks(reader, start_ns),
            ranks=list_ranks(reader),
        )


def _series(reader: RecordingReader, start_ns: int, choice: str) -> dict[str, Series]:
    found: dict[str, Series] = {}
    totals: dict[str, Cell] = {}
    for row in reader.windows():
        start_s, end_s = (row.start_ns - start_ns) / 1e9, (row.end_ns - start_ns) / 1e9
        for name, cell in row.cells.items():
            if not _is_figure(cell):
                continue
            series = found.get(name)
            if series is None:
                if not metrics.selected(name, choice):
                    continue
                series = found[name] = Series(name)
                totals[name] = cell.copy()
            else:
                totals[name].merge(cell)
            series.start_s.append(start_s)
            series.end_s.append(end_s)
            series.min.append(cell.min)
            series.mean.append(cell.mean)
            series.max.append(cell.max)
            series.count.append(cell.count)
    names = reader.names()
    for name, cell in totals.items():
        found[name].total = Total(
            cell.min,
            cell.mean,
            cell.max,
            cell.last,
            LABELS.get(cell.label, ""),
            (cell.max_ns - start_ns) / 1e9,
            None if cell.step == NO_STEP else cell.step,
            None if cell.epoch == NO_STEP else cell.epoch,
            names[cell.phase] if cell.phase < len(names) else "",
        )
    return dict(sorted(found.items(), key=lambda item: (_ORDER.get(item[0], len(_ORDER)), item[0])))


def _stacks(reader: RecordingReader, start_ns: int) -> list[Taken]:
    names = reader.names()
    return [
        Taken(
            (stack.time_ns - start_ns) / 1e9,
            stack.rss_mib,
            stack.usage_mib,
            stack.headroom_pct,
            names[stack.place.phase] if stack.place.phase < len(names) else "",
            None if stack.place.epoch == NO_STEP else stack.place.epoch,
            None if stack.place.step == NO_STEP else stack.place.step,
            stack.text.splitlines(),
        )
        for stack in reader.stacks()
    ]


def _is_figure(cell: Cell) -> bool:
    return all(-LARGEST < value < LARGEST for value in (cell.min, cell.mean, cell.max, cell.last))


def _spans(reader: RecordingReader, start_ns: int, seconds: float) -> list[Span]:
    """From the newest marks: of a long run, the phases of its end."""
    names = reader.names()
    spans: list[Span] = []
    phase, since_s = "", 0.0
    for mark in reader.marks():
        if mark.kind not in (layout.PHASE_BEGIN, layout.PHASE_END):
            continue
        now_s = (mark.time_ns - start_ns) / 1e9
        if phase and now_s > since_s:
            spans.append(Span(phase, since_s, now_s))
        innermost = mark.place.phase
        phase, since_s = (names[innermost] if innermost < len(names) else ""), now_s
    if phase and seconds > since_s:
        spans.append(Span(phase, since_s, seconds))
    return spans
