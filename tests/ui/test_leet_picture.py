"""What a person sees: memtrack's series of a training and its workers in W&B's terminal UI. The picture is kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.integrations.wandb_lab import chart
from tests.ui.leet_picture import TITLE, paint, record, show

pytest.importorskip("wandb")
pytest.importorskip("pyte")


def test_the_chart_as_a_person_sees_it(tmp_path):
    """The band reaches from the smallest worker to whichever is largest, on the scale that stands beside it, and moves
    with them; the final figures stand in the run's summary."""
    path, run = record(tmp_path, 12.0)
    process = [value for _, value in run.series["proc.memory.rssMB/l:memtrack"]]
    workers = [value for key in run.series if "/l:worker-" in key for _, value in run.series[key]]
    assert min(workers) < min(process) < max(process)

    screen = show(path, tmp_path / "settings")
    lines = [line.rstrip() for line in screen.display]
    folder = Path(os.environ.get("MEMTRACK_TEST_ARTIFACTS", "test-artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wandb_leet_band.txt").write_text("\n".join(lines) + "\n")
    picture = folder / "wandb_leet.png"
    paint(screen, picture)

    drawn = chart(lines, TITLE)
    marks = {
        row: float(found[1]) for row, line in enumerate(drawn) if (found := re.match(r" *([0-9.]+)(?:MiB)?[│└]", line))
    }
    top, zero = min(marks), max(marks)
    assert marks[zero] == 0
    row_mib = marks[top] / (zero - top)
    dots = [row for row, line in enumerate(drawn) if re.search("[\u2801-\u28ff]", line)]
    highest, lowest = max(process + workers), min(workers)
    assert abs((zero - dots[0]) * row_mib - highest) <= row_mib
    assert abs((zero - dots[-1]) * row_mib - lowest) <= 1.5 * row_mib
    heights = {
        next(
            row for row in range(len(drawn)) if column < len(drawn[row]) and 0x2800 < ord(drawn[row][column]) <= 0x28FF
        )
        for column in {column for line in drawn for column, dot in enumerate(line) if 0x2800 < ord(dot) <= 0x28FF}
    }
    assert len(heights) >= 4, "its upper edge does not move"
    assert sum("memtrack/" in line for line in lines) >= 8
    assert picture.stat().st_size <= 200_000
