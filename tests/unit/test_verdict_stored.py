"""The verdict of a recording: the stored one, or one made from what a dead agent has left. And how it is shown."""

from __future__ import annotations

import json
import os
import time

import pytest

from memtrack import metrics
from memtrack.analysis.summary import figures_of, summarise
from memtrack.analysis.verdict import describe, post_mortem, title, verdict_of
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Stack, Verdict
from memtrack.recording.standing import boot_id, pid_namespace
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import Place, Row

SECOND_NS = 10**9
V2 = "cgroup v2 /job memory.max"


class Left:
    """What an agent leaves that has seen three windows of a process that is gone by now, and the last sample."""

    def __init__(self, make_recording, *, headroom_pct=40.0, state=layout.RUNNING, kills=0.0, source=V2, **fields):
        self.start_ns = time.monotonic_ns() - 60 * SECOND_NS
        wall_ns = time.time_ns() - 60 * SECOND_NS
        header = {
            "pid": "4194303", "start_ticks": "1", "boot_id": boot_id(), "pid_ns": pid_namespace(),
            "wall_ns": str(wall_ns), "mono_ns": str(self.start_ns), "program": "train.py",
        }  # fmt: skip
        self.path = make_recording(**{**header, **fields})
        self.marks, self.writer = MarkWriter(self.path), RecordingWriter(self.path)
        phase = self.marks.begin("train")
        assert phase is not None
        self.marks.epoch(1)
        self.marks.step(17)
        place = Place(17, 1, (phase.id,))
        for number in range(3):
            row = Row(number, self.start_ns + number * SECOND_NS)
            row.end_ns, row.end_wall_ns = row.start_ns + SECOND_NS, wall_ns + (number + 1) * SECOND_NS
            row.add(metrics.RSS, 100.0 + 50.0 * number, row.end_ns, place, 1.0)
            row.add(metrics.CONTAINER_USAGE, 120.0 + 50.0 * number, row.end_ns, place, 1.0)
            row.add(metrics.CONTAINER_HEADROOM, headroom_pct, row.end_ns, place, 1.0)
            row.add(metrics.CONTAINER_OOM_KILLS, kills, row.end_ns, place, 1.0)
            self.writer.append(row)
        self.last_ns = self.start_ns + 3 * SECOND_NS + SECOND_NS // 2
        self.writer.pulse(self.last_ns, 225.0, 245.0, headroom_pct)
        head = Head()
        head.state, head.agent_pid, head.limit_mib, head.limit_source = state, 4194302, 250.0, source
        head.mono_ns, head.wall_ns = self.start_ns + 3 * SECOND_NS, wall_ns + 3 * SECOND_NS
        self.wall_ns = wall_ns
        self.writer.publish(head)
        # marks are stamped with the time at which they are written, which is long after the samples here
        self.writer.marks.drain()

    def shift_samples(self):
        """Let the last sample be as new as the marks are."""
        self.last_ns = time.monotonic_ns()
        self.writer.pulse(self.last_ns, 225.0, 245.0, self.headroom_pct())

    def headroom_pct(self):
        with RecordingReader(self.path) as reader:
            return reader.pulse().headroom_pct

    def close(self):
        self.marks.close()
        self.writer.close()


@pytest.fixture
def left(make_recording):
    made = []

    def make(*, heard_later=False, **options):
        made.append(Left(make_recording, **options))
        if not heard_later:
            made[-1].shift_samples()
        return made[-1]

    yield make
    for one in made:
        one.close()


def verdict_from(one):
    with RecordingReader(one.path) as reader:
        return verdict_of(reader)


def cgroup(folder, kills):
    """A machine where this process is in /job/next, on v2: its proc and its root."""
    proc = folder / "proc"
    for pid in (str(os.getpid()), "self"):
        (proc / pid).mkdir(parents=True)
        (proc / pid / "cgroup").write_text("0::/other\n")
        (proc / pid / "mountinfo").write_text("32 22 0:27 / /cg rw,relatime shared:9 - cgroup2 cgroup2 rw\n")
    (proc / "meminfo").write_text("MemTotal:        1048576 kB\nMemAvailable:     614400 kB\n")
    for name in ("other", "job"):
        (folder / "cg" / name).mkdir(parents=True)
        (folder / "cg" / name / "memory.max").write_text("max\n")
        (folder / "cg" / name / "memory.current").write_text("1\n")
        (folder / "cg" / name / "memory.events").write_text(f"oom 9\noom_kill {kills if name == 'job' else 77}\n")
    return str(proc), str(folder)


# -- which ----------------------------------------------------------------------------------------------------------


def test_stored_verdict_counts(left):
    """Whatever else the recording says."""
    one = left(headroom_pct=0.5)
    stored = Verdict("killed", "certain", "the process was killed by SIGTERM (15)")
    one.writer.put_verdict(stored)
    assert verdict_from(one).kind == "killed"


@pytest.mark.parametrize("fields", [{}, {"pid_ns": "pid:[1]"}], ids=["here", "in another pid namespace"])
def test_no_verdict_while_it_runs(left, fields):
    """The process of the recording is this one; or one that cannot be seen, of which there was a sample just now."""
    from memtrack.collectors.procfs import start_ticks

    one = left(headroom_pct=0.5, pid=str(os.getpid()), start_ticks=str(start_ticks(os.getpid())), **fields)
    assert verdict_from(one) is None


def test_no_verdict_when_monitoring_was_stopped(left):
    """The process went on; nobody knows how it ended."""
    one = left(state=layout.STOPPED)
    one.marks.request_stop()
    assert verdict_from(one) is None


# -- post mortem ----------------------------------------------------------------------------------------------------


def test_killed_together_with_room(left):
    """Nothing points to memory: unknown, with the last figures."""
    verdict = verdict_from(left())
    assert (verdict.kind, verdict.confidence) == ("unknown", "none")
    assert "memory.oom.group" in verdict.evidence[0]
    assert any("250.0 MiB" in line and "40.0 % left" in line for line in verdict.evidence)
    assert "its last marks: phase train, epoch 1, step 17" in verdict.evidence


def test_killed_together_without_room(left):
    """Less than 5 % left in the end: likely."""
    verdict = verdict_from(left(headroom_pct=3.0))
    assert (verdict.kind, verdict.confidence) == ("out_of_memory", "likely")
    assert f"at the limit of 250.0 MiB ({V2})" in verdict.text


def test_another_boot(left):
    """The machine was started anew: that is said."""
    verdict = verdict_from(left(boot_id="another"))
    # what cannot be seen from here counts as alive until its file is old
    assert verdict is None
    one = left(boot_id="another")
    os.utime(one.path, (1e9, 1e9))
    verdict = verdict_from(one)
    assert verdict.kind == "unknown"
    assert any("started anew" in line for line in verdict.evidence)


def test_agent_that_died_first(left):
    """The process went on for a while: low headroom long before its end is no sign."""
    verdict = verdict_from(left(headroom_pct=1.0, heard_later=True))
    assert (verdict.kind, verdict.confidence) == ("unknown", "none")
    assert "agent before it" in verdict.text


def test_farewell_is_believed(left):
    """What Python said before it ended stands in the recording, agent or not."""
    one = left(headroom_pct=1.0)
    one.marks.say_farewell({"how": "exception", "type": "MemoryError", "module": "builtins", "where": "a.py:1 f"})
    verdict = verdict_from(one)
    assert (verdict.kind, verdict.confidence) == ("memory_error", "certain")
    assert verdict.exit_code is None


@pytest.mark.parametrize(
    ("kills", "headroom_pct", "outcome"),
    [
        (2, 40.0, ("out_of_memory", "confirmed")),
        (1, 2.0, ("out_of_memory", "confirmed")),
        (1, 40.0, ("out_of_memory", "likely")),
        (0, 40.0, ("unknown", "none")),
    ],
)
def test_count_that_rose_since(left, tmp_path, kills, headroom_pct, outcome):
    """The cgroup is still there: its count tells what the agent did not live to see."""
    proc, root = cgroup(tmp_path / "machine", 3 + kills)
    # the cgroup is older than the recording
    one = left(headroom_pct=headroom_pct, kills=3.0, wall_ns=str(time.time_ns() + 3600 * SECOND_NS))
    with RecordingReader(one.path) as reader:
        verdict = post_mortem(reader, proc, root)
    assert (verdict.kind, verdict.confidence) == outcome
    assert any(f"is {kills} higher" in line for line in verdict.evidence) is bool(kills)


@pytest.mark.parametrize("change", [{"boot_id": "another"}, {"source": "physical memory"}, {}])
def test_count_that_is_not_its_own(left, tmp_path, change):
    """After another boot, of no cgroup, or of one that was made later under the same name, it says nothing."""
    proc, root = cgroup(tmp_path / "machine", 9)
    fields = {"wall_ns": str(time.time_ns() + (3600 if change else -3600) * SECOND_NS)}
    one = left(**{**fields, **change})
    with RecordingReader(one.path) as reader:
        assert post_mortem(reader, proc, root).kind == "unknown"


def test_empty_recording(make_recording):
    """An agent that never came: unknown, and no error."""
    path = make_recording(pid="4194303", start_ticks="1", boot_id=boot_id(), pid_ns=pid_namespace())
    with RecordingReader(path) as reader:
        assert verdict_of(reader).kind == "unknown"
        assert "verdict" in str(summarise(reader))


# -- how it is shown ------------------------------------------------------------------------------------------------


def stored(one, kind="out_of_memory", confidence="confirmed"):
    verdict = Verdict(kind, confidence, "the process was killed, for an example")
    verdict.evidence = [f"line {number}" for number in range(7)]
    verdict.signal, verdict.wall_ns = 9, one.wall_ns + 4 * SECOND_NS
    one.writer.put_verdict(verdict)
    return verdict


def test_summary_shows_it(left):
    """The sentence, and the main evidence; a clean end is not worth a line."""
    one = left()
    verdict = stored(one)
    with RecordingReader(one.path) as reader:
        text = str(summarise(reader))
    assert "  verdict   out of memory (confirmed): the process was killed, for an example\n            - line 0" in text
    assert "line 3" in text
    assert "line 4" not in text
    assert len(describe(verdict, everything=True)) == 8
    assert describe(Verdict("clean", "certain", "")) == []


@pytest.mark.parametrize(
    ("kind", "confidence", "words"),
    [
        ("unknown_sigkill", "none", "unknown SIGKILL"),
        ("failed", "certain", "failed"),
        ("device_out_of_memory", "likely", "device out of memory (likely)"),
    ],
)
def test_title(kind, confidence, words):
    """Confidence only where it is not a matter of course."""
    assert title(Verdict(kind, confidence, "")) == words


def test_figures_have_it(left):
    """What trackers get."""
    one = left()
    verdict = stored(one)
    for number, rss_mib in ((0, 300.0), (1, 200.0)):
        stack = Stack(number, one.start_ns, Place(), rss_mib, 1.0, 1.0, f"train.py:{number} f\ntrain.py:9 <module>")
        one.writer.put_stack(stack, number)
    with RecordingReader(one.path) as reader:
        figures = figures_of(reader)
        part = figures_of(reader, 0, 1)
    assert (figures.verdict, figures.verdict_confidence) == ("out_of_memory", "confirmed")
    assert (figures.verdict_text, figures.verdict_evidence) == (verdict.text, tuple(verdict.evidence))
    assert (figures.exit_code, figures.signal, figures.end_wall_s) == (None, 9, verdict.wall_ns / 1e9)
    assert figures.stack == "train.py:0 f\ntrain.py:9 <module>"
    assert part.verdict == "out_of_memory"
    assert part.peak_rss_mib is None


def test_json_and_terminal(left):
    """Programs get all of it, people too in a report."""
    pytest.importorskip("rich")
    import io

    from rich.console import Console

    from memtrack.report.data import collect
    from memtrack.report.json_ import encode
    from memtrack.report.terminal import show

    one = left()
    verdict = stored(one)
    one.writer.put_stack(
        Stack(0, one.start_ns + SECOND_NS, Place(4, 1, (1,)), 300.0, 310.0, 7.0, "a.py:1 f\nb.py:2 g"), 0
    )
    report = collect(one.path)
    found = json.loads(encode(report))
    assert found["verdict"] == {
        "kind": "out_of_memory", "confidence": "confirmed", "exit_code": None, "signal": 9, "text": verdict.text,
        "evidence": verdict.evidence, "time_s": pytest.approx(4.0, abs=0.01),
    }  # fmt: skip
    assert found["stacks"] == [
        {
            "time_s": pytest.approx(1.0, abs=0.01), "rss_mib": 300.0, "usage_mib": 310.0, "headroom_pct": 7.0,
            "phase": "train", "epoch": 1, "step": 4, "frames": ["a.py:1 f", "b.py:2 g"],
        }
    ]  # fmt: skip
    text = io.StringIO()
    show(report, Console(file=text, width=160))
    assert "line 6" in text.getvalue()
