"""Reports on a recording that was written by hand, so that every figure is known."""

from __future__ import annotations

import io
import json
import os
import re
import time
from typing import NamedTuple

import pytest

from memtrack import metrics
from memtrack.errors import RecordingError, RecordingFormatError
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.standing import boot_id
from memtrack.recording.writer import RecordingWriter, create
from memtrack.sampling.window import EXACT, NOWHERE, Place, Row

pytest.importorskip("rich")
from rich.console import Console

from memtrack.report import recordings, terminal
from memtrack.report.data import Span, collect
from memtrack.report.json_ import as_dict, encode

SECOND_NS = 10**9
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


class Made(NamedTuple):
    path: str
    start_ns: int
    wall_ns: int


def make_recording(
    folder,
    *,
    windows=4,
    state=layout.STOPPED,
    name="run",
    limit_mib=1000.0,
    age_s=0,
    program="train.py",
    agent_pid=None,
    base_mib=100.0,
    leave_open="",
    **fields,
):
    """Windows of a second: RSS rises by 10 MiB in each, from ``base_mib``; a spike of 200 MiB more in the third."""
    path = os.path.join(folder, f"{name}.mtk")
    start_ns, wall_ns = time.monotonic_ns() - age_s * SECOND_NS, time.time_ns() - age_s * SECOND_NS
    header = {
        "size": str(layout.MIN_SIZE),
        "pid": "4242",
        "start_ticks": "1",
        "boot_id": boot_id(),
        "program": program,
        "wall_ns": str(wall_ns),
        "mono_ns": str(start_ns),
        "interval_s": "1.0",
        "tick_s": "0.1",
        "cpu_budget_pct": "0.2",
    }
    create(path, layout.MIN_SIZE, {key: value for key, value in (header | fields).items() if value is not None})
    marks, writer, whole = MarkWriter(path), RecordingWriter(path), Row(0, start_ns)
    train = marks.begin("train")
    assert train is not None
    writer.event("start", start_ns, text="agent 1 watches 4242")
    for number in range(windows):
        row = Row(number, start_ns + number * SECOND_NS)
        place = Place(number * 10, 1, (train.id,))
        low = base_mib + 10.0 * number
        middle_ns = row.start_ns + SECOND_NS // 2
        row.add(metrics.RSS, low, middle_ns, place, 0.5)
        row.add(metrics.RSS, low + 2.0, middle_ns, place, 0.5)
        if number == 2:
            row.raise_max(metrics.RSS, low + 200.0, middle_ns, place, EXACT)
        row.add(metrics.TREE_PSS, low, middle_ns, NOWHERE, 1.0)
        row.add(metrics.CONTAINER_USAGE, low + 50.0, middle_ns, NOWHERE, 1.0)
        row.add(metrics.CONTAINER_LIMIT, limit_mib, middle_ns, NOWHERE, 1.0)
        row.add(metrics.CONTAINER_HEADROOM, 100.0 * (1 - (low + 50.0) / limit_mib), middle_ns, NOWHERE, 1.0)
        row.add(metrics.HOST_AVAILABLE, 8000.0 - low, middle_ns, NOWHERE, 1.0)
        row.add(metrics.ANON, low, middle_ns, NOWHERE, 1.0)
        row.end_ns, row.end_wall_ns = row.start_ns + SECOND_NS, wall_ns + (number + 1) * SECOND_NS
        writer.append(row)
        whole.merge(row)
    marks.end(train)
    if leave_open:
        marks.begin(leave_open)
    if windows:
        writer.put_phase(whole)
        phase = whole.copy()
        phase.first = train.id
        writer.put_phase(phase)
    end_ns = start_ns + windows * SECOND_NS
    writer.event("limit_near", end_ns, 30, 4.0, "cgroup v2 /job memory.max")
    writer.event("mark", end_ns, 30, 2.0, "checkpoint [best]")
    head = Head()
    head.state, head.agent_pid = state, os.getpid() if agent_pid is None else agent_pid
    head.mono_ns, head.wall_ns = end_ns, wall_ns + windows * SECOND_NS
    head.limit_mib, head.limit_source = limit_mib, "cgroup v2 /job memory.max"
    writer.publish(head)
    writer.close()
    marks.close()
    return Made(path, start_ns, wall_ns)


def shown(report, **options):
    """What the terminal shows, without colours."""
    text = io.StringIO()
    terminal.show(report, Console(file=text, width=160, **options))
    return text.getvalue()


# -- collecting -----------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_windows(tmp_path):
    """Minimum, mean, maximum and last are over all windows, and the maximum knows where it stood."""
    report = collect(make_recording(tmp_path).path)
    total = report.series[metrics.RSS].total
    assert total is not None
    assert (total.min, total.max, total.last) == (100.0, 320.0, 132.0)
    assert total.mean == pytest.approx(116.0)
    assert (total.label, total.step, total.epoch, total.phase) == ("exact", 20, 1, "train")
    assert total.max_s == pytest.approx(2.5)
    assert report.seconds == pytest.approx(4.0)


def test_only_the_default_metrics_unless_all_are_wanted(tmp_path):
    """A report shows what is charted by default; the rest is there on request."""
    path = make_recording(tmp_path).path
    assert metrics.ANON not in collect(path).series
    assert metrics.ANON in collect(path, "all").series


def test_series_follow_the_order_of_the_metrics_table(tmp_path):
    """The process comes first and the host later, whatever order they were sampled in."""
    found = list(collect(make_recording(tmp_path).path).series)
    assert found == [metric.name for metric in metrics.TABLE if metric.name in found]


def test_spans_of_phases_come_from_the_marks(tmp_path):
    """A phase that was left is a span; one that is still open reaches to the end of the recording."""
    first, second = collect(make_recording(tmp_path, leave_open="eval").path).spans
    assert (first.phase, second.phase) == ("train", "eval")
    assert first.start_s < first.end_s <= second.start_s < second.end_s == pytest.approx(4.0)


def test_header_that_lacks_a_field_is_a_format_error(tmp_path):
    """A header that is whole but incomplete is named as what it is."""
    with pytest.raises(RecordingFormatError, match="lacks"):
        collect(make_recording(tmp_path, mono_ns=None).path)


# -- terminal -------------------------------------------------------------------------------------------------------


def test_terminal_shows_summary_metrics_and_events(tmp_path):
    """The program, the peak with its place, a row a metric with a sparkline, and the events."""
    text = shown(collect(make_recording(tmp_path).path))
    assert "train.py (4242)" in text
    assert "peak 320.0 MiB resident (exact)" in text
    assert re.search(r"process/rss_mib +100 +116 +320 +132 +MiB +▁+█+▂+", text)
    assert "4.0 % left of cgroup v2 /job memory.max" in text
    assert "checkpoint [best] = 2" in text


def test_terminal_report_on_nothing(tmp_path):
    """A recording without a window is reported on, and says so."""
    assert "nothing was sampled" in shown(collect(make_recording(tmp_path, windows=0).path))


def test_sparkline_shows_maxima_over_time(tmp_path):
    """Columns are equal stretches of time; the spike of a quarter fills a quarter."""
    series = collect(make_recording(tmp_path).path).series[metrics.RSS]
    assert terminal.sparkline(series, 4.0, 8) == "▁▁▁▁██▂▂"


def test_sparkline_of_a_constant_and_of_a_gap(tmp_path):
    """What never changes is a line in the middle; where nothing was measured there is nothing."""
    series = collect(make_recording(tmp_path).path).series[metrics.CONTAINER_LIMIT]
    assert terminal.sparkline(series, 8.0, 8) == "▄▄▄▄    "


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.0, "12"), (0.123, "0.12"), (12.34, "12.3"), (12345.6, "12346")],
)
def test_numbers_are_short(value, text):
    """As many digits as help."""
    assert terminal.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (125.0, "2 min 5 s"), (9000.0, "2 h 30 min")])
def test_durations_are_for_people(seconds, text):
    """Seconds, minutes or hours."""
    assert terminal.duration(seconds) == text


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys(tmp_path):
    """Programs rely on these names: none may go or change."""
    found = json.loads(encode(collect(make_recording(tmp_path).path)))
    assert list(found) == [
        "format", "recording", "name", "program", "pid", "started", "seconds", "state",
        "peak", "tree", "ranks", "limit", "memtrack", "phases", "epochs", "verdict", "stacks", "events", "metrics",
    ]  # fmt: skip
    assert found["peak"] == {
        "rss_mib": 320.0, "label": "exact", "time_s": pytest.approx(2.5), "phase": "train", "epoch": 1, "step": 20,
    }  # fmt: skip
    assert set(found["limit"]) == {"mib", "source", "headroom_min_pct"}
    assert set(found["memtrack"]) == {"agent_rss_mib", "agent_cpu_pct", "windows", "dropped"}
    assert found["events"][-1] == {
        "time_s": pytest.approx(4.0), "kind": "mark", "step": 30, "value": 2.0, "text": "checkpoint [best]",
    }  # fmt: skip


def test_json_metrics_hold_figures_and_windows(tmp_path):
    """Each metric has its unit, its figures, and its windows as lists of equal length."""
    rss = json.loads(encode(collect(make_recording(tmp_path).path)))["metrics"][metrics.RSS]
    assert (rss["unit"], rss["max"], rss["max_time_s"], rss["step"]) == ("MiB", 320.0, pytest.approx(2.5), 20)
    assert rss["windows"]["max"] == [102.0, 112.0, 320.0, 132.0]
    assert {len(values) for values in rss["windows"].values()} == {4}


def test_json_is_strict(tmp_path):
    """NaN is no JSON: what is not known is null."""
    report = collect(make_recording(tmp_path, limit_mib=float("nan")).path)
    text = encode(report)
    assert "NaN" not in text
    assert json.loads(text)["limit"]["mib"] is None


def test_json_of_an_empty_recording(tmp_path):
    """Without a sample the peak is null, and the document is complete all the same."""
    found = json.loads(encode(collect(make_recording(tmp_path, windows=0).path)))
    assert found["peak"] is None
    assert found["metrics"] == {}


def test_json_documentation_names_every_key(tmp_path):
    """The table in the module's docstring is what people read."""
    from memtrack.report import json_

    for key in as_dict(collect(make_recording(tmp_path).path)):
        assert re.search(rf"^    (.*, )?{key}\b", f"{json_.__doc__}", re.MULTILINE), key


# -- picture --------------------------------------------------------------------------------------------------------


def texts_of(report, monkeypatch, folder):
    """All texts in the picture."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    from memtrack.report import png

    drawn = []

    def keep(figure):
        drawn.append(figure)
        return FigureCanvasAgg(figure)

    monkeypatch.setattr(png, "FigureCanvasAgg", keep)
    path = os.path.join(folder, "out.png")
    png.draw(report, path)
    with open(path, "rb") as file:
        assert file.read(8) == PNG_MAGIC
    return [text.get_text() for text in drawn[0].findobj(Text) if text.get_text()]


def test_picture_names_peak_phase_and_program(tmp_path, monkeypatch):
    """The peak is annotated with its value and place; the phase is written where it was."""
    report = collect(make_recording(tmp_path).path)
    report = report._replace(spans=[Span("train", 0.0, 4.0)])
    texts = texts_of(report, monkeypatch, tmp_path)
    assert "peak 320.0 MiB (exact), train, epoch 1, step 20" in texts
    assert "train" in texts
    assert "train.py (4242)" in texts
    assert "seconds since start" in texts


def test_picture_draws_a_limit_that_is_near(tmp_path, monkeypatch):
    """Up to three times the peak the limit is a line."""
    texts = texts_of(collect(make_recording(tmp_path, limit_mib=900.0).path), monkeypatch, tmp_path)
    assert any(text.startswith("limit 900.0 MiB") for text in texts)


def test_picture_writes_a_limit_that_is_far(tmp_path, monkeypatch):
    """A limit far above would flatten everything: it is told in words."""
    texts = texts_of(collect(make_recording(tmp_path, limit_mib=9000.0).path), monkeypatch, tmp_path)
    assert not any(text.startswith("limit ") for text in texts)
    assert any("of 8.79 GiB" in text for text in texts)


def test_picture_of_one_window(tmp_path, monkeypatch):
    """A run as short as one window has a picture."""
    assert texts_of(collect(make_recording(tmp_path, windows=1).path), monkeypatch, tmp_path)


def test_picture_of_nothing_is_an_error(tmp_path):
    """There is no empty picture."""
    pytest.importorskip("matplotlib")
    from memtrack.report.png import draw

    with pytest.raises(RecordingError, match="nothing was sampled"):
        draw(collect(make_recording(tmp_path, windows=0).path), str(tmp_path / "out.png"))


@pytest.mark.parametrize("name", ["no/such/folder/out.png", "out.unknown"])
def test_picture_that_cannot_be_written_is_an_error(tmp_path, name):
    """The message names the file."""
    pytest.importorskip("matplotlib")
    from memtrack.report.png import draw

    with pytest.raises(RecordingError, match=f"cannot write .*{name}"):
        draw(collect(make_recording(tmp_path).path), str(tmp_path / name))


# -- which recordings there are -------------------------------------------------------------------------------------


def test_recordings_are_listed_newest_first(tmp_path):
    """By when they started, not by name."""
    make_recording(tmp_path, name="a", age_s=10)
    make_recording(tmp_path, name="z", age_s=20)
    listed = recordings.list_recordings(str(tmp_path))
    assert [one.name for one in listed] == ["a", "z"]
    assert (listed[0].program, listed[0].pid, listed[0].peak_rss_mib) == ("train.py", 4242, 320.0)
    assert (listed[0].state, listed[0].size_bytes) == ("stopped", layout.MIN_SIZE)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "shorter than its header"), (b"x" * 5000, "not a memtrack recording"), (None, "1048576")],
)
def test_damaged_recordings_are_listed_with_what_is_wrong(tmp_path, content, problem):
    """An empty file, another file, and one that was cut short."""
    made = make_recording(tmp_path)
    if content is None:
        os.truncate(made.path, 500_000)
    else:
        (tmp_path / "run.mtk").write_bytes(content)
    (listed,) = recordings.list_recordings(str(tmp_path))
    assert problem in listed.problem


def test_header_without_sense_is_a_problem_not_a_traceback(tmp_path):
    """Also what is whole by its checksum may be nonsense."""
    make_recording(tmp_path, wall_ns=None)
    (listed,) = recordings.list_recordings(str(tmp_path))
    assert "wall_ns" in listed.problem


def test_no_folder_no_recordings(tmp_path):
    """A folder that is not there is an empty one."""
    assert recordings.list_recordings(str(tmp_path / "none")) == []


def test_recording_that_nobody_writes_any_more_has_lost_its_agent(tmp_path):
    """Running by its own account, but its agent is gone: killed with the machine, or by hand."""
    made = make_recording(tmp_path, state=layout.RUNNING, agent_pid=2**22 + 1, age_s=100)
    assert recordings.list_recordings(str(tmp_path))[0].state == recordings.LOST
    assert recordings.find_live(4242, [str(tmp_path)]) is None
    assert collect(made.path).state == recordings.LOST


def test_recording_of_another_boot_has_lost_its_agent(tmp_path):
    """A pid from before a reboot says nothing."""
    make_recording(tmp_path, state=layout.RUNNING, boot_id="another")
    assert recordings.list_recordings(str(tmp_path))[0].state == recordings.LOST


def test_find_takes_paths_names_and_nothing(tmp_path):
    """A path; a name with or without suffix; and by default the newest that is not damaged."""
    older, newer = make_recording(tmp_path, name="b", age_s=50), make_recording(tmp_path, name="a", age_s=10)
    (tmp_path / "damaged.mtk").write_bytes(b"")
    folder = str(tmp_path)
    assert recordings.find(older.path, "nowhere") == older.path
    assert recordings.find("b", folder) == older.path
    assert recordings.find("b.mtk", folder) == older.path
    assert recordings.find(None, folder) == newer.path


def test_find_says_what_to_do_when_there_is_none(tmp_path):
    """The message ends with the command that helps."""
    with pytest.raises(RecordingError, match=r"memtrack run -- CMD$"):
        recordings.find(None, str(tmp_path))
    with pytest.raises(RecordingError, match=r"memtrack ls$"):
        recordings.find("other", str(tmp_path))
