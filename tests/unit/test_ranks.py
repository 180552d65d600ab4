"""Ranks of a distributed training: which one a process is, what their recordings come to, and who died before whom."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrack import metrics
from memtrack.agent import job
from memtrack.agent.evidence import Case
from memtrack.agent.ranks import MAX_PEERS, RankCollector
from memtrack.agent.verdict import judge
from memtrack.analysis.summary import summarise
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.marks import MarkWriter
from memtrack.recording.rank import Rank
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Verdict
from memtrack.recording.writer import RecordingWriter, create
from memtrack.report.data import collect
from memtrack.report.json_ import as_dict
from memtrack.sampling.window import Cell, Place, Row
from memtrack.testing import FakeProc

SECOND_NS = 10**9
START_NS = 1000 * SECOND_NS
WALL_NS = 1_700_000_000 * SECOND_NS
LAUNCHER = 50
SERIES = {
    name: f"memory/ranks/{name}" for name in ("rss_min_mib", "rss_mean_mib", "rss_max_mib", "worst_rank", "alive")
}

# -- which rank it is -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**24), st.integers(0, 2**24 + 1), st.none() | st.integers(0, 2**16))
def test_a_word_holds_a_rank(number, world, local):
    """What can be is read as it was written; one rank alone, and what cannot be, is no rank."""
    word = Rank(number, world, local).pack()
    possible = 2 <= world < 2**24 and number < world and (local is None or local < 2**16 - 1)
    assert bool(word) == possible
    assert word < 2**64
    assert Rank.unpack(word) == (Rank(number, world, local) if possible else None)


@given(st.integers(0, 2**64 - 1))
def test_any_word_is_a_rank_or_none(word):
    """Whatever stands there, its number is below the number of ranks."""
    rank = Rank.unpack(word)
    assert rank is None or (0 <= rank.number < rank.world and rank.pack() == word)


ENVIRONMENTS = {
    "torchrun": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(5, 8, 1)),
    "without a local rank": ({"RANK": "1", "WORLD_SIZE": "2"}, Rank(1, 2)),
    "one process": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
    "Lightning's child": ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, Rank(1, 2, 1)),
    "Lightning's child on another node": ({"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4"}, None),
    "Open MPI": (
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        Rank(3, 4, 0),
    ),
    "srun": ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Rank(2, 4, 0)),
    "srun with one task": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, None),
    "torchrun below srun": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"},
        Rank(7, 8, 3),
    ),
    "no number": ({"RANK": "one", "WORLD_SIZE": "8"}, None),
    "negative": ({"RANK": "-1", "WORLD_SIZE": "8"}, None),
    "beyond the last": ({"RANK": "8", "WORLD_SIZE": "8"}, None),
    "huge": ({"RANK": "1", "WORLD_SIZE": "9" * 30}, None),
    "another script of digits": ({"RANK": "\u0661", "WORLD_SIZE": "8"}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("environ", "rank"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_rank_from_the_environment(environ, rank, monkeypatch):
    """What launchers say, and nothing where they say nothing or nonsense."""
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    assert job.rank_now(environ) == rank


def test_torch_knows_better(monkeypatch):
    """Once its process group is there, that counts; before, and if it is in the making, the environment does."""
    torch = types.ModuleType("torch.distributed")
    monkeypatch.setitem(sys.modules, "torch.distributed", torch)
    environ = {"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4"}
    assert job.rank_now({"RANK": "1", "WORLD_SIZE": "2"}) == Rank(1, 2)
    torch.is_available, torch.is_initialized = lambda: True, lambda: False
    assert job.rank_now(environ) is None
    torch.is_initialized, torch.get_rank, torch.get_world_size = lambda: True, lambda: 3, lambda: 4
    assert job.rank_now(environ) == Rank(3, 4, 1)
    assert job.rank_now({}) == Rank(3, 4)


def test_launcher_is_found_behind_wrappers(tmp_path, monkeypatch):
    """A shell that was started as this rank is not the launcher, whoever started that is."""
    proc = FakeProc(tmp_path)
    environ = {"RANK": "3", "WORLD_SIZE": "4"}
    for pid, parent, rank, ticks in ((60, 61, b"RANK=3", 7), (61, 62, b"RANK=3", 8), (62, 1, b"RANK=33", 9)):
        proc.add(pid, parent=parent)
        proc.update(pid, start_ticks=ticks)
        Path(f"{proc.path}/{pid}/environ").write_bytes(b"A=1\0" + rank + b"\0WORLD_SIZE=4\0")
    monkeypatch.setattr(os, "getppid", lambda: 60)
    assert job.launcher_of(environ, proc.path) == "62:9"
    assert job.launcher_of({}, proc.path) == "60:7"
    os.unlink(f"{proc.path}/61/environ")  # as one that may not be read
    assert job.launcher_of(environ, proc.path) == "61:8"
    monkeypatch.setattr(os, "getppid", lambda: 0)
    assert job.launcher_of(environ, proc.path) == ""


# -- recordings of ranks ------------------------------------------------------------------------------------------


class Node:
    """A folder of recordings of ranks, a ``/proc`` with their processes, and the collector of one of them."""

    def __init__(self, folder):
        self.folder = folder / "recordings"
        self.folder.mkdir()
        self.proc = FakeProc(folder)
        self.now_ns = START_NS
        self.made = []

    def rank(self, rank, pid, *, name=None, ticks=100, start_ns=START_NS, **fields):
        """A recording of a rank, or of a process that is none."""
        one = Recorded(self, rank, pid, name or f"{pid}.mtk", ticks, start_ns, fields)
        self.made.append(one)
        return one

    def collector(self, first):
        return RankCollector(first.writer, str(first.path), first.fields(), self.now_ns, self.proc.path)

    def close(self):
        for one in self.made:
            one.close()


class Recorded:
    def __init__(self, node, rank, pid, name, ticks, start_ns, fields):
        self.node, self.pid, self.path = node, pid, node.folder / name
        node.proc.add(pid, parent=LAUNCHER)
        node.proc.update(pid, start_ticks=ticks)
        fields = {
            "pid": str(pid), "start_ticks": str(ticks), "launcher": f"{LAUNCHER}:5", "boot_id": "b", "pid_ns": "n",
            "interval_s": "1.0", "mono_ns": str(start_ns), "wall_ns": str(WALL_NS), "size": str(layout.MIN_SIZE),
            **fields,
        }  # fmt: skip
        create(str(self.path), layout.MIN_SIZE, fields)
        self.writer = RecordingWriter(str(self.path))
        self.marks = MarkWriter(str(self.path))
        self.marks.tell_rank(rank)
        self.head = Head()
        self.head.state = layout.RUNNING
        self.head.mono_ns, self.head.wall_ns = start_ns, WALL_NS
        self.writer.publish(self.head)
        self.end_ns = start_ns
        self.whole = Row(0, start_ns)

    def fields(self):
        with RecordingReader(str(self.path)) as reader:
            return reader.fields

    def window(self, mean_mib, peak_mib=None, seconds=1.0):
        """One more window."""
        row = Row(self.writer.windows, self.end_ns)
        self.end_ns += int(seconds * SECOND_NS)
        row.end_ns, row.end_wall_ns = self.end_ns, WALL_NS + self.end_ns - START_NS
        row.cells["memory/host/available_mib"] = Cell(5.0, self.end_ns, Place())
        cell = row.cells[metrics.RSS] = Cell(mean_mib, self.end_ns, Place(), seconds)
        cell.max = mean_mib if peak_mib is None else peak_mib
        self.writer.append(row)
        self.whole.merge(row)
        self.whole.first = 0
        self.head.mono_ns = self.end_ns
        self.writer.publish(self.head)
        return self

    def end(self, kind="clean", text="the process ended with exit code 0", *, after_s=0.0, signal=None, reason=""):
        """It has died, and its agent has judged."""
        verdict = Verdict(kind, "certain", f"{text}{reason}")
        verdict.wall_ns, verdict.signal = WALL_NS + self.end_ns - START_NS + int(after_s * SECOND_NS), signal
        self.writer.put_phase(self.whole)
        self.writer.put_verdict(verdict)
        self.head.state = layout.ENDED
        self.head.mono_ns = self.end_ns + int((after_s + 0.01) * SECOND_NS)
        self.head.wall_ns = verdict.wall_ns + SECOND_NS // 100
        self.writer.publish(self.head)
        self.vanish()

    def kill(self, **more):
        self.end("unknown_sigkill", "the process was killed by SIGKILL", signal=9, reason="; nobody knows", **more)

    def vanish(self):
        if self.pid in self.node.proc.processes:
            self.node.proc.kill(self.pid)

    def events(self):
        with RecordingReader(str(self.path)) as reader:
            return [(event.kind, event.text, event.value, event.time_ns) for event in reader.events()]

    def close(self):
        self.marks.close()
        self.writer.close()


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    yield made
    made.close()


@pytest.fixture
def four(node):
    """Four ranks, pids 100 to 103, and the collector of rank 0."""
    ranks = [node.rank(Rank(number, 4, number), 100 + number) for number in range(4)]
    return ranks, node.collector(ranks[0])


def look(collector, now_ns=START_NS):
    """What the collector says, by the last part of the name."""
    return {name.rpartition("/")[2]: value for name, value in collector.collect(now_ns)}


def test_four_ranks(four):
    """Smallest and mean of the means, weighted by time, largest of the peaks, and whose that is."""
    ranks, collector = four
    for number, one in enumerate(ranks):
        one.window(100.0 + number, 110.0 + number).window(130.0 + number, 140.0 + number, seconds=2.0)
    ranks[2].window(200.0, 900.0)
    found = look(collector)
    means = [120.0, 121.0, (102.0 + 2 * 132.0 + 200.0) / 4, 123.0]
    assert found == pytest.approx(
        {"rss_min_mib": 120.0, "rss_mean_mib": sum(means) / 4, "rss_max_mib": 900.0, "worst_rank": 2.0, "alive": 4.0}
    )
    assert {f"memory/ranks/{name}" for name in found} == set(SERIES.values()) <= set(metrics.BY_NAME)
    assert all(metrics.BY_NAME[name].default for name in SERIES.values())


def test_only_what_is_new(four):
    """A window counts once; who has none since stands where it stood; the worst is the worst so far."""
    ranks, collector = four
    for number, one in enumerate(ranks):
        one.window(100.0 + number, 500.0 + number)
    assert look(collector)["rss_max_mib"] == 503.0
    assert look(collector) == {
        "rss_min_mib": 100.0, "rss_mean_mib": 101.5, "rss_max_mib": 103.0, "worst_rank": 3.0, "alive": 4.0,
    }  # fmt: skip
    ranks[1].window(50.0, 300.0)
    assert look(collector) == {
        "rss_min_mib": 50.0, "rss_mean_mib": 88.75, "rss_max_mib": 300.0, "worst_rank": 3.0, "alive": 4.0,
    }  # fmt: skip
    ranks[1].window(50.0, 503.5)
    assert look(collector)["worst_rank"] == 1.0


def test_more_windows_than_are_kept(four):
    """Of an agent that was long away, what stands there still."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    look(collector)
    ring = layout.Layout(layout.MIN_SIZE).ring
    for number in range(3 * ring):
        ranks[3].window(100.0, 200.0 + number)
    assert look(collector)["rss_max_mib"] == 199.0 + 3 * ring


def test_before_there_is_another_rank(node):
    """One rank alone has no series, though its launcher has announced four."""
    first = node.rank(Rank(0, 4, 0), 100).window(100.0)
    collector = node.collector(first)
    assert look(collector) == {}
    second = node.rank(Rank(1, 4, 1), 101)
    second.window(50.0)
    assert look(collector)["alive"] == 2.0


def test_others_cost_nothing(node, monkeypatch):
    """Who is no rank, or not the first of the node, does not even look at the folder."""
    others = [node.rank(None, 100), node.rank(Rank(1, 4, 1), 101), node.rank(Rank(6, 8, 2), 102)]
    collectors = [node.collector(one.window(100.0)) for one in others]
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: pytest.fail("it looks"))
    for collector in collectors:
        assert look(collector) == {}
        assert collector.deaths(START_NS) == []


def test_without_local_ranks(node):
    """As in what multiprocessing has spawned: the smallest that records here is the first."""
    ranks = [node.rank(Rank(number, 8), 100 + number).window(100.0 + number) for number in (4, 5)]
    first, second = (node.collector(one) for one in ranks)
    assert look(first)["alive"] == 2.0
    assert look(second) == {}


def test_told_late(node):
    """Lightning's first rank launches the others and hears only then which rank it is."""
    first = node.rank(None, 100).window(700.0)
    collector = node.collector(first)
    assert look(collector) == {}
    second = node.rank(Rank(1, 2, 1), 101, launcher="100:100")
    second.window(60.0)
    assert look(collector) == {}
    first.marks.tell_rank(Rank(0, 2, 0))
    first.window(100.0)
    second.window(50.0)
    # what was before is nobody's as a rank
    assert look(collector, START_NS + SECOND_NS) == {
        "rss_min_mib": 50.0, "rss_mean_mib": 75.0, "rss_max_mib": 100.0, "worst_rank": 0.0, "alive": 2.0,
    }  # fmt: skip


def test_a_sibling_that_is_told_late(node):
    """A process of the same launcher that is no rank yet is looked at again."""
    first = node.rank(Rank(0, 2, 0), 100).window(100.0)
    second = node.rank(None, 101).window(50.0)
    collector = node.collector(first)
    assert look(collector) == {}
    second.marks.tell_rank(Rank(1, 2, 1))
    assert look(collector)["alive"] == 2.0


def test_the_folder_is_listed_when_it_has_changed(four, monkeypatch):
    """Not at every look; a file that came within a second of the last listing is found all the same."""
    ranks, collector = four
    ranks[0].window(100.0)
    folder, listed = ranks[0].node.folder, []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or real(path))
    for _ in range(3):
        look(collector)
    assert len(listed) == 3
    os.utime(folder, ns=(1, 1))
    for _ in range(3):
        look(collector)
    assert len(listed) == 4


STRANGERS = {
    "another launcher": {"launcher": "51:5"},
    "the launcher's pid, another process": {"launcher": "50:6"},
    "no launcher": {"launcher": ""},
    "another boot": {"boot_id": "c"},
    "another pid namespace": {"pid_ns": "m"},
    "a job of another size": {"rank": Rank(1, 3, 1)},
    "the same rank": {"rank": Rank(0, 2, 0)},
    "the same rank, seen before": {"rank": Rank(0, 2, 0), "name": "0.mtk"},
    "no rank": {"rank": None},
}


@pytest.mark.parametrize("other", STRANGERS.values(), ids=STRANGERS)
def test_strangers(node, other):
    """Recordings of other jobs in the same folder do not count."""
    first = node.rank(Rank(0, 2, 0), 100).window(100.0)
    node.rank(**{"rank": Rank(1, 2, 1), "pid": 101, **other}).window(9.0)
    collector = node.collector(first)
    assert look(collector) == {}
    node.rank(Rank(1, 2, 1), 102).window(50.0)
    assert look(collector)["rss_min_mib"] == 50.0


def test_launchers_that_nobody_knows(node):
    """Two processes at the end of a pid namespace have nothing in common."""
    first = node.rank(Rank(0, 2, 0), 100, launcher="").window(100.0)
    node.rank(Rank(1, 2, 1), 101, launcher="").window(50.0)
    assert look(node.collector(first)) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_recording_of_another_user(node):
    """It could tell anything."""
    first = node.rank(Rank(0, 2, 0), 100).window(100.0)
    second = node.rank(Rank(1, 2, 1), 101).window(50.0)
    os.chown(second.path, 12345, -1)
    assert look(node.collector(first)) == {}


def test_an_earlier_start_of_the_job(node):
    """What had ended before this rank began is of a start before; a worker that died since counts no more."""
    node.rank(Rank(1, 2, 1), 90, name="0.mtk", start_ns=START_NS - 9 * SECOND_NS).window(5.0).kill()
    lost_agent = node.rank(Rank(1, 2, 1), 91, name="1.mtk", start_ns=START_NS - 9 * SECOND_NS).window(5.0)
    lost_agent.vanish()
    first = node.rank(Rank(0, 2, 0), 100).window(100.0)
    collector = node.collector(first)
    assert look(collector) == {}
    assert collector.deaths(START_NS + SECOND_NS) == []


def test_started_again(node):
    """Of a rank that was started again the process that lives counts, and its end before is no reason for anything."""
    first = node.rank(Rank(0, 2, 0), 100).window(100.0)
    second = node.rank(Rank(1, 2, 1), 101).window(50.0)
    collector = node.collector(first)
    look(collector)
    second.kill()
    assert look(collector)["alive"] == 1.0
    node.rank(Rank(1, 2, 1), 102, start_ns=START_NS + 2 * SECOND_NS).window(70.0, 800.0)
    found = look(collector)
    assert (found["alive"], found["rss_min_mib"], found["rss_max_mib"]) == (2.0, 70.0, 800.0)
    assert collector.deaths(START_NS + 9 * SECOND_NS) == []


def test_a_program_of_a_rank_is_no_rank(node):
    """What a rank starts has its environment; the rank itself is the one that was there before."""
    first = node.rank(Rank(0, 2, 0), 100).window(100.0)
    node.rank(Rank(1, 2, 1), 101).window(50.0)
    node.rank(Rank(1, 2, 1), 102).window(7.0)
    found = look(node.collector(first))
    assert (found["alive"], found["rss_min_mib"]) == (2.0, 50.0)


def test_taken_up_by_another_agent(four):
    """An agent that relieves another knows what that one has found to be the worst."""
    ranks, _ = four
    whole = Row(0, START_NS)
    whole.cells = {
        metrics.RANKS_WORST: Cell(2.0, START_NS, Place()), metrics.RANKS_MAX: Cell(900.0, START_NS, Place()),
    }  # fmt: skip
    ranks[0].writer.put_phase(whole)
    collector = ranks[0].node.collector(ranks[0])
    for one in ranks:
        one.window(100.0)
    assert look(collector)["worst_rank"] == 2.0
    ranks[1].window(100.0, 901.0)
    assert look(collector)["worst_rank"] == 1.0


# -- the end of a rank ----------------------------------------------------------------------------------------------


def test_a_rank_that_ends_in_order(four):
    """Its last windows count, then it is one less; it is no death."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    look(collector)
    ranks[3].window(10.0, 600.0).end()
    found = look(collector)
    assert (found["rss_max_mib"], found["rss_min_mib"], found["alive"]) == (600.0, 100.0, 3.0)
    assert look(collector)["rss_max_mib"] == 100.0
    assert collector.deaths(START_NS + 9 * SECOND_NS) == []
    assert ranks[0].events() == []


def test_a_rank_that_stops_to_record(four):
    """The same; one whose agent has failed, and is started again, goes on."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
        one.head.state = layout.STOPPED
        one.writer.publish(one.head)
    assert look(collector)["alive"] == 4.0
    ranks[3].marks.request_stop()
    ranks[3].window(50.0)
    assert look(collector)["alive"] == 3.0


def test_a_rank_that_is_killed(four):
    """An event when it is seen, with its peak; and a death, with the time at which it died."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0, 150.0)
    look(collector)
    ranks[2].window(100.0, 700.0).kill(after_s=0.5)
    assert look(collector)["alive"] == 3.0
    died_ns = START_NS + int(2.5 * SECOND_NS)
    assert ranks[0].events() == [("rank", "rank 2 (pid 102) was killed by SIGKILL", 700.0, died_ns)]
    assert look(collector)["alive"] == 3.0
    assert collector.deaths(died_ns - 1) == []
    (death,) = collector.deaths(died_ns)
    assert (death.number, death.pid, death.how, death.peak_mib) == (2, 102, "was killed by SIGKILL", 700.0)
    assert (death.time_ns, death.recording) == (died_ns, "102.mtk")
    assert len(ranks[0].events()) == 1


def test_deaths_in_order(four):
    """The first is the one that ended the others, and what launchers end all with is no death."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    look(collector)
    ranks[1].end("killed", "the process was killed by SIGTERM (15)", after_s=0.1, signal=15)
    ranks[2].end("failed", "the process failed: RuntimeError at train.py:3 main, exit code 1", after_s=0.9)
    ranks[3].kill(after_s=0.8)
    found = collector.deaths(START_NS + 9 * SECOND_NS)
    assert [(death.number, death.how) for death in found] == [
        (3, "was killed by SIGKILL"),
        (2, "failed: RuntimeError at train.py:3 main, exit code 1"),
    ]


def test_a_verdict_that_is_on_its_way(four, monkeypatch):
    """The agent of a rank that is dead is waited for, for a quarter of a second."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    look(collector)
    ranks[3].vanish()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 5:
            ranks[3].kill()

    monkeypatch.setattr("memtrack.agent.ranks.sleep", sleep)
    assert [death.number for death in collector.deaths(START_NS + 9 * SECOND_NS)] == [3]
    assert len(waits) == 5
    ranks[2].vanish()
    now = iter(range(100))
    monkeypatch.setattr("memtrack.agent.ranks.monotonic", lambda: next(now) / 10)
    assert [death.number for death in collector.deaths(START_NS + 9 * SECOND_NS)] == [3]
    assert next(now) == 4


def case(*deaths, status=15):
    made = Case()
    made.now_ns, made.status, made.ranks = START_NS + 3 * SECOND_NS, status, list(deaths)
    return made


def test_the_verdict_names_it(four):
    """A process that its launcher has ended says which rank was the reason, and one with a clean end does not."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    ranks[3].kill(after_s=0.8)
    deaths = collector.deaths(START_NS + 3 * SECOND_NS)
    verdict = judge(case(*deaths))
    assert verdict.text == (
        "the process was killed by SIGTERM (15); 1.2 s before, rank 3 (pid 103) was killed by SIGKILL"
    )
    assert verdict.kind == "killed"
    assert verdict.evidence[0] == (
        "rank 3 (pid 103), peak 100.0 MiB, was killed by SIGKILL 1.2 s before; its recording is 103.mtk"
    )
    assert judge(case(status=15)).text == "the process was killed by SIGTERM (15)"
    assert judge(case(*deaths, status=0)).text == "the process ended with exit code 0"


def test_what_all_ranks_fail_of_is_not_blamed_on_one(four):
    """The same exception at the same place everywhere."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    text = "the process failed: ValueError at train.py:3 main, exit code 1"
    ranks[3].end("failed", text)
    own = case(*collector.deaths(START_NS + 3 * SECOND_NS), status=1 << 8)
    own.farewell = {"how": "exception", "type": "ValueError", "module": "builtins", "where": "train.py:3 main"}
    assert judge(own).text == text
    own.farewell["type"] = "RuntimeError"
    assert judge(own).text.endswith("s before, rank 3 (pid 103) failed: ValueError at train.py:3 main, exit code 1")


# -- what else lies in the folder -----------------------------------------------------------------------------------


def test_hostile_files(node):
    """Whatever lies there: what is a rank counts, the rest is passed over, and nothing is waited for."""
    first = node.rank(Rank(0, 9, 0), 100).window(100.0)
    (node.folder / "0.mtk").write_bytes(b"")
    (node.folder / "1.mtk").write_bytes(os.urandom(8192))
    (node.folder / "2.mtk").mkdir()
    os.mkfifo(node.folder / "3.mtk")
    (node.folder / "4.mtk").symlink_to("/dev/zero")
    (node.folder / "5.mtk").write_bytes(first.path.read_bytes()[:5000])
    without_pid = node.rank(Rank(2, 9, 2), 102)
    with open(without_pid.path, "r+b") as file:
        file.write(layout.pack_header({"launcher": f"{LAUNCHER}:5", "boot_id": "b", "pid_ns": "n"}))
    cut = node.rank(Rank(3, 9, 3), 103).window(70.0)
    collector = node.collector(first)
    node.rank(Rank(1, 9, 1), 101).window(50.0)
    found = look(collector)
    assert (found["alive"], found["rss_min_mib"]) == (3.0, 50.0)
    os.truncate(cut.path, 4096)
    cut.path.unlink()
    assert look(collector)["rss_min_mib"] == 50.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -5.0, 1e300])
def test_values_that_cannot_be(node, value):
    """They are no memory."""
    first = node.rank(Rank(0, 2, 0), 100).window(100.0)
    second = node.rank(Rank(1, 2, 1), 101).window(50.0).window(value)
    collector = node.collector(first)
    assert look(collector)["rss_min_mib"] == 50.0
    second.window(80.0, seconds=float("1e-9"))
    assert look(collector)["rss_max_mib"] == 100.0


def test_times_that_cannot_be(four):
    """A verdict of no time is none; a head that claims to have no end of windows is soon read."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    look(collector)
    ranks[1].kill(after_s=0.5)
    ranks[1].head.mono_ns = -(2**63)
    ranks[1].writer.publish(ranks[1].head)
    ranks[2].writer.windows = 2**63
    ranks[2].writer.publish(ranks[2].head)
    assert look(collector)["alive"] == 3.0
    assert collector.deaths(2**62) == []
    assert ranks[0].events() == []


def test_more_ranks_than_are_followed(node, monkeypatch):
    """Descriptors are few."""
    monkeypatch.setattr("memtrack.agent.ranks.MAX_PEERS", 3)
    assert MAX_PEERS == 256
    first = node.rank(Rank(0, 9, 0), 100).window(100.0)
    for number in range(1, 6):
        node.rank(Rank(number, 9, number), 100 + number).window(50.0)
    assert look(node.collector(first))["alive"] == 3.0


def test_the_folder_is_removed(four):
    """What is open stays readable."""
    ranks, collector = four
    for one in ranks:
        one.window(100.0)
    assert look(collector)["alive"] == 4.0
    for one in ranks:
        one.path.unlink()
    ranks[0].node.folder.rmdir()
    ranks[1].window(100.0, 300.0)
    assert look(collector)["rss_max_mib"] == 300.0


# -- summary and report ---------------------------------------------------------------------------------------------


def test_summary_and_report(four):
    """One line, three figures; each rank in the JSON, of the first rank's recording only."""
    ranks, collector = four
    for number, one in enumerate(ranks):
        one.window(100.0, 150.0 + number)
    row = Row(1, START_NS)
    row.end_ns = START_NS + SECOND_NS
    for name, value in collector.collect(START_NS):
        row.cells[name] = Cell(value, START_NS, Place(), 1.0)
    row.cells[metrics.RSS] = Cell(100.0, START_NS, Place(), 1.0)
    row.first = 0
    ranks[0].writer.put_phase(row)
    with RecordingReader(str(ranks[0].path)) as reader:
        summary = summarise(reader)
    assert "  ranks     4, worst rank 3 with 153.0 MiB at its peak" in str(summary).splitlines()
    numbers = summary.figures.numbers()
    assert (numbers["ranks"], numbers["worst_rank"], numbers["worst_rank_peak_mib"]) == (4, 3, 153.0)
    row.cells[metrics.RSS].max = 200.0  # in a window that has not ended
    ranks[0].writer.put_phase(row)
    with RecordingReader(str(ranks[0].path)) as reader:
        assert "worst rank 0 with 200.0 MiB" in str(summarise(reader))
    ranks[2].kill()
    found = as_dict(collect(str(ranks[0].path)))["ranks"]
    assert [(one["rank"], one["pid"], one["name"]) for one in found] == [(n, 100 + n, str(100 + n)) for n in range(4)]
    assert found[2]["peak_rss_mib"] == 152.0
    assert found[2]["state"] == "killed by SIGKILL"
    assert as_dict(collect(str(ranks[1].path)))["ranks"] == []
    with RecordingReader(str(ranks[1].path)) as reader:
        assert "ranks" not in str(summarise(reader))
        assert summarise(reader).figures.numbers().keys().isdisjoint({"ranks", "worst_rank", "worst_rank_peak_mib"})


def test_one_metric_of_a_window(four):
    """``cell`` reads what ``window`` does."""
    one = four[0][0].window(100.0, 120.0).window(90.0)
    with RecordingReader(str(one.path)) as reader:
        for number in (0, 1):
            row = reader.window(number)
            for name, cell in row.cells.items():
                found = reader.cell(number, name)
                assert all(getattr(found, field) == getattr(cell, field) for field in Cell.__slots__)
        assert reader.cell(0, "memory/no/such") is None
        assert reader.cell(2, metrics.RSS) is None
