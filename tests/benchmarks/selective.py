"""What selective logging sends, and how far the chart drawn of it is off: its figures of merit, in seconds.

    python tests/benchmarks/selective.py [--markdown]

The default charts of recorded programs, ``tests/data/traces``, and of a week of one window a second that is flat but
for ten spikes, in virtual time; against every window sent. The error is the greatest distance between the chart of the
points that were sent and any window, as a share of the range of the series; where 0.1 MiB or 0.1 % is more than 1 % of
the range, that is allowed, and the error is given in these units.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path += [str(root), str(root / "integrations")]

from memtrack import metrics
from memtrack.sinks.selection import RESOLUTION, SHARE, Selection
from tests.benchmarks.tables import render
from tests.unit.test_selection import TRACES, WEEK_S, drawn, row_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.sampling.window import Row

    Series = dict[str, list[tuple[int, float]]]  # name -> time in ms, value

FLUSH = 10
"""Windows that are delivered together."""


class Merit(NamedTuple):
    """Of one or several series: points of all windows, points sent, and the greatest errors."""

    full: int
    sent: int
    share: float
    """As a share of the range, of the series whose range allows more than the resolution."""
    units: float
    """In the unit of the series, of the others."""


def select(rows: Iterable[Row]) -> tuple[Series, Series]:
    """The points of the default charts if every window is sent, and those that are chosen."""
    selection = Selection("default")
    full: Series = {}
    sent: Series = {}
    waiting: list[Row] = []

    def keep(points: Iterable[object]) -> None:
        for point in points:
            sent.setdefault(point.name, []).append((point.timestamp_ms, point.value))  # type: ignore[attr-defined]

    for row in rows:
        at = round(row.end_wall_ns / 1e6)
        for name, cell in row.cells.items():
            if metrics.selected(name, "default"):
                full.setdefault(name, []).append((at, cell.mean))
                if metrics.has_peak(name):
                    full.setdefault(metrics.peak_name(name), []).append((at, cell.max))
        waiting.append(row)
        if len(waiting) == FLUSH:
            keep(selection.take(waiting))
            waiting = []
    keep(selection.take(waiting))
    keep(selection.rest())
    return full, sent


def merit(full: Series, sent: Series) -> Merit:
    """The figures of these series together."""
    share = units = 0.0
    for name, windows in full.items():
        values = [value for _, value in windows]
        spread = max(values) - min(values)
        error = max(abs(drawn(sent[name], at) - value) for at, value in windows)
        if SHARE * spread >= RESOLUTION.get(metrics.unit_of(name), 0.0) and spread:
            share = max(share, error / spread)
        else:
            units = max(units, error)
    return Merit(sum(map(len, full.values())), sum(len(sent[name]) for name in full), share, units)


def trace(path: Path) -> list[Row]:
    """The windows of a recorded program."""
    rows: dict[float, Row] = {}
    with gzip.open(path, "rt", newline="") as file:
        for name, end_s, mean, highest in csv.reader(file):
            end = float(end_s)
            if end not in rows:
                row = rows[end] = row_at(0, {})
                row.end_wall_ns += round(1e9 * end) - row.end_ns
                row.end_ns = round(1e9 * end)
            rows[end].cells.update(row_at(0, {name: (float(mean), float(highest))}).cells)
    return [rows[end] for end in sorted(rows)]


def week(spikes: dict[int, float]) -> Iterable[Row]:
    """A week of windows, flat but for spikes of a second: second -> height in MiB."""
    dice = random.Random(11)
    for second in range(WEEK_S):
        mean = 400.0 + dice.uniform(-0.02, 0.02)
        yield row_at(second, {metrics.RSS: (mean, spikes.get(second, mean))})


def table(markdown: bool) -> str:
    """The figures of merit."""
    dice = random.Random(7)
    spikes = {dice.randrange(WEEK_S): 500.0 + 37.3 * number for number in range(10)}
    found = {path.name.partition(".")[0]: select(trace(path)) for path in TRACES}
    found["week"] = select(week(spikes))
    lines = [["", "windows", "points sent", "share", "error, of the range", "of small ranges", "heights of spikes"]]
    for program, (full, sent) in found.items():
        parts = {"all default series": list(full), **{name.removeprefix("memory/"): [name] for name in SHOWN}}
        for title, names in parts.items():
            got = merit({name: full[name] for name in names}, sent)
            exact = ""
            if program == "week" and names == [metrics.peak_name(metrics.RSS)]:
                heights = {value for _, value in sent[names[0]]}
                exact = f"{len(heights & set(spikes.values()))} of {len(spikes)} exact"
            share = f"{100 * got.share:.2f} %" if got.share else "–"
            units = f"{got.units:.2f} MiB or %" if got.units else "–"
            sent_pct = f"{100 * got.sent / got.full:.2g} %"
            lines.append([f"{program}: {title}", f"{got.full:,}", f"{got.sent:,}", sent_pct, share, units, exact])
    return render(lines, markdown)


SHOWN = (metrics.RSS, metrics.peak_name(metrics.RSS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    print(table(parser.parse_args().markdown))


if __name__ == "__main__":
    main()
