"""Readers in other processes follow a recording while it is written and merged."""

from __future__ import annotations

import itertools
import json
import time

import pytest

from memtrack import metrics
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import Place, Row

SECONDS = 3.0

FOLLOW = """
import json, time
from memtrack import metrics
from memtrack.recording.reader import RecordingReader

def value_of(number):
    return float(number * 2654435761 % 10007)

def check(row):
    numbers = range(row.first, row.last + 1)
    for at, name in enumerate((metrics.RSS, metrics.ANON, metrics.TREE_PSS)):
        cell = row.cells[name]
        assert cell.max == max(map(value_of, numbers)) + at, "torn"
        assert cell.min == min(map(value_of, numbers)) + at, "torn"
        assert cell.last == value_of(row.last) + at, "torn"
        assert cell.count == len(numbers), "torn"

mode, path = sys.argv[1:]
found = {"rows": 0, "passes": 0, "overlaps": 0, "merged": 0, "heads": 0, "places": 0}
with RecordingReader(path) as reader:
    print("ready", flush=True)
    following = -1
    while reader.head().state != 2:
        found["passes"] += 1
        head = reader.head()
        assert head.ticks == head.windows * 3, "torn head"
        found["heads"] += 1
        pulse = reader.pulse()
        assert pulse.mono_ns == 0 or pulse.rss_mib == pulse.mono_ns % 1000, "torn pulse"
        place = reader.place()
        if place.step >= 0:
            assert place.epoch - place.step // 7 in (0, 1), "torn place"
            found["places"] += 1
        for mark in reader.marks():
            assert mark.kind == 1 or mark.value == mark.place.step * 3.0, "torn mark"
        for event in reader.events():
            assert event.value == event.number * 2.0, "torn event"
        for row in reader.phases().values():
            assert row.cells[metrics.RSS].max == row.step, "torn phase"
        if mode == "follow":
            for row in reader.windows(following + 1):
                check(row)
                assert row.first == following + 1, (row.first, row.last, following)
                following = row.last
                found["rows"] += 1
            time.sleep(0.005)
        else:
            done = -1
            for row in reader.windows():
                check(row)
                assert row.last > done, "not in order"
                assert row.first <= done + 1, "a window is missing"
                found["overlaps"] += row.first <= done
                found["merged"] += row.last > row.first
                found["rows"] += 1
                done = row.last
            assert done >= head.windows - 1
    found["following"] = following
print(json.dumps(found))
"""


def value_of(number):
    """A value of window ``number`` that looks random and is always the same."""
    return float(number * 2654435761 % 10007)


def window(number):
    row = Row(number, number * 10**9)
    row.end_ns, row.end_wall_ns, row.step = row.start_ns + 10**9, row.start_ns + 10**18, number
    for at, name in enumerate((metrics.RSS, metrics.ANON, metrics.TREE_PSS)):
        row.add(name, value_of(number) + at, row.start_ns, Place(number), 1.0)
    return row


@pytest.mark.parametrize("mode", ["follow", "whole"])
def test_readers_see_nothing_torn_or_twice(make_recording, run_child, mode):
    """While windows are written fifty times as fast as ever in earnest, nothing that is read is torn, lost or double.

    Who follows gets each window once, at full resolution. Who reads the whole again and again sees every window; one
    that was merged with a later one during the very reading may be told twice, which is rare.
    """
    path = make_recording()
    marks, writer = MarkWriter(path), RecordingWriter(path)
    marks.gauge("warm-up", 1.0)
    phase_id = marks.begin("train").id
    head = Head()
    readers = [run_child(FOLLOW, mode, path) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    number, deadline = 0, time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        writer.append(window(number))
        writer.event("mark", number, value=number * 2.0)
        row = window(number)
        row.cells[metrics.RSS].max = row.step
        row.first = phase_id
        writer.put_phase(row)
        for step in range(number * 10, number * 10 + 10):
            marks._now[1] = step // 7
            marks.step(step)
            marks.mark("m", step * 3.0)
        number += 1
        head.ticks = number * 3
        writer.publish(head)
        writer.pulse(number, number % 1000, 0.0, 0.0)
        time.sleep(0.001)
    head.state = layout.STOPPED
    writer.publish(head)
    found = []
    for reader in readers:
        out, _ = reader.communicate(timeout=20)
        assert reader.returncode == 0
        found.append(json.loads(out))
    writer.close()
    marks.close()
    assert number > 400
    for counts in found:
        assert counts["passes"] > 20
        assert counts["places"] > 20
        if mode == "follow":
            assert counts["rows"] == counts["following"] + 1 > 400
        else:
            assert counts["merged"] > 100
            assert counts["overlaps"] <= counts["passes"]


def test_follow_a_real_run(run_child, tools):
    """Followed from here, the windows of a real run come one by one, without gap, and the end is seen."""
    child = run_child("""
import memtrack, time
with memtrack.start(interval=0.05, recording_size="1MiB") as monitor:
    print(monitor.path, flush=True)
    for step in range(150):
        memtrack.step(step)
        time.sleep(0.02)
""")
    rows = []
    with RecordingReader(child.stdout.readline().strip()) as reader:

        def follow():
            rows.extend(reader.windows(rows[-1].last + 1 if rows else 0))
            return reader.head().state == layout.STOPPED

        tools.wait_until(follow, 20.0)
        rows += reader.windows(rows[-1].last + 1)
    assert [(row.first, row.last) for row in rows] == [(number, number) for number in range(len(rows))]
    assert len(rows) == pytest.approx(150 * 0.02 / 0.05, rel=0.25)
    assert all(later.start_ns == earlier.end_ns for earlier, later in itertools.pairwise(rows))
    steps = [row.step for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == 149
