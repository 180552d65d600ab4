"""Evidence gathered from counts of kills, the kernel log and samples, on trees in a folder.

The ``memory.events`` of the v2 trees are written by hand after the kernel's ``cgroup-v2.rst``, before and after a kill;
the lines of the kernel log are recorded ones, of Linux 6.18, 5.4 and 4.14.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from memtrack import metrics
from memtrack.agent import exit_status, neighbours
from memtrack.agent.evidence import Case
from memtrack.agent.kernel_log import KernelLog, Kill, Parser
from memtrack.agent.witness import SAMPLES, Witness
from memtrack.collectors import Sight
from memtrack.collectors.cgroup import LimitWatch
from memtrack.collectors.oom import KillCounters
from memtrack.collectors.procfs import INITIAL_PID_NAMESPACE
from memtrack.collectors.tree import TreeCollector
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.window import Place
from memtrack.testing import FakeProc

TREES = Path(__file__).parents[1] / "data" / "proc"
PID, WORKER = 4242, 4300
SECOND_NS = 10**9
EVENTS = "low 0\nhigh 0\nmax 7\noom 2\noom_kill {}\noom_group_kill 0\n"
SCOPE = "sys/fs/cgroup/user.slice/user-1000.slice/session-3.scope"
DOCKER = "sys/fs/cgroup/memory"


class FakeLog:
    """A kernel log that says what it is told to."""

    def __init__(self, readable=True):
        self.readable = readable
        self.new = []

    def kills(self):
        taken, self.new = self.new, []
        return taken


class Scene:
    """A process with a worker in a cgroup of a recorded machine, a witness, and its clock."""

    def __init__(self, folder, recording, case="v2", *, log=False, true_pids=True):
        shutil.copytree(TREES / case / "sys", folder / "sys")
        self.proc = FakeProc(folder)
        os.makedirs(folder / "proc/self/ns")
        os.symlink(INITIAL_PID_NAMESPACE if true_pids else "pid:[4026532201]", folder / "proc/self/ns/pid")
        self.proc.add(PID, rss_mib=200)
        self.proc.add(WORKER, parent=PID, rss_mib=90)
        for name in ("cgroup", "mountinfo", "limits"):
            shutil.copy(TREES / case / f"proc/{PID}/{name}", folder / f"proc/{PID}/{name}")
        self.folder = folder
        (folder / "proc/vmstat").write_text("nr_free_pages 1\noom_kill 4\n")
        for pid in (PID, WORKER):
            (folder / f"proc/{pid}/comm").write_text("python\n" if pid == PID else "pt_data_worker\n")
        self.pending(PID, 0)
        self.now_ns = 100 * SECOND_NS
        self.recording = recording
        self.writer = RecordingWriter(recording)
        self.tree = TreeCollector(PID, proc=self.proc.path)
        self.watch = LimitWatch(PID, self.proc.path, str(folder))
        self.log = FakeLog(log)
        self.witness = Witness(
            self.writer, PID, 12345, -1, Sight(self.watch, None, self.tree), self.now_ns, self.proc.path, self.log
        )
        self.pass_time(2.0)

    def pending(self, pid, mask):
        """Let signals wait for a process."""
        with open(self.folder / f"proc/{pid}/status", "a", encoding="ascii") as file:
            file.write(f"SigPnd:\t{mask:016x}\nShdPnd:\t{0:016x}\n")

    def kill(self, pid):
        """A child is gone; its parent's files are written anew."""
        self.proc.kill(pid)
        self.pending(PID, 0)

    def pass_time(self, seconds, headroom_pct=50.0):
        """Sample every 50 ms."""
        for _ in range(round(seconds / 0.05)):
            self.now_ns += SECOND_NS // 20
            try:
                list(self.tree.collect(self.now_ns))
            except ValueError:
                pass
            latest = {
                metrics.RSS: float(f"{200 + self.now_ns % 7}"),
                metrics.CONTAINER_USAGE: 300.0,
                metrics.CONTAINER_HEADROOM: headroom_pct,
            }
            self.witness.note(self.now_ns, latest)

    def count(self, kills, folder=SCOPE, name="memory.events.local", text=EVENTS):
        """Let the cgroup count."""
        (self.folder / folder / name).write_text(text.format(kills))

    def end(self, *, may_be_victim=True):
        """The process ends. Whether a kill was counted that was for it."""
        self.witness.see_end(self.now_ns)
        return self.witness.close_the_case(self.now_ns, may_be_victim=may_be_victim)

    def events(self):
        with RecordingReader(self.recording) as reader:
            return [event for event in reader.events() if event.kind in ("oom_kill", "error")]


@pytest.fixture
def scene(tmp_path, make_recording):
    made = []

    def make(case="v2", **options):
        made.append(Scene(tmp_path / f"scene-{len(made)}", make_recording(), case, **options))
        return made[-1]

    yield make
    for one in made:
        one.writer.close()


def kill_of(pid, name="pt_data_worker", rss_mib=95.0, cgroup="/user.slice/user-1000.slice/session-3.scope"):
    kill = Kill(pid, name, rss_mib - 5, rss_mib)
    kill.cgroup = kill.limited = cgroup
    return kill


# -- counts ---------------------------------------------------------------------------------------------------------


def test_count_that_moves_with_the_death(scene):
    """The recorded count was 0 before; that it is 1 when the process is dead convicts."""
    one = scene()
    assert one.witness.counters.own.first == 0
    one.count(1)
    assert one.end()
    assert (one.witness.counters.own.first, one.witness.counters.own.last) == (0, 1)


def test_count_that_does_not_move(scene):
    """Nothing convicts, whatever happens on the machine."""
    one = scene()
    (one.folder / "proc/vmstat").write_text("oom_kill 5\n")
    assert not one.end()
    assert one.witness.host_risen == 1


def test_count_that_is_seen_before_the_victim_is_dead(scene):
    """SIGKILL waits for it, and it takes two seconds to die: the count was its own all the same."""
    one = scene()
    one.count(1)
    status = one.folder / f"proc/{PID}/status"
    status.write_text(status.read_text().replace(f"SigPnd:\t{0:016x}\nShdPnd", f"SigPnd:\t{1 << 8:016x}\nShdPnd"))
    one.pass_time(2.0)
    assert one.end()


def test_acquittal(scene):
    """A process without a pending SIGKILL 0.1 s after the count moved was not the victim, also of a later kill -9."""
    one = scene()
    one.count(1)
    one.pass_time(3.5)
    assert not one.end()
    (event,) = one.events()
    assert event.text == "another process of the cgroup was killed out of memory"


def test_v2_counts_its_own_level(scene):
    """A kill in a sibling's cgroup is counted by the ancestors: theirs are not looked at."""
    one = scene()
    one.count(9, "sys/fs/cgroup/user.slice/user-1000.slice")
    assert not one.end()


def test_v2_local_count_is_preferred(tmp_path):
    """``memory.events`` would count kills in cgroups below as well."""
    shutil.copytree(TREES / "v2", tmp_path / "v2")
    (tmp_path / "v2" / SCOPE / "memory.events.local").write_text(EVENTS.format(0))
    counters = KillCounters(LimitWatch(PID, f"{tmp_path}/v2/proc", f"{tmp_path}/v2"), f"{tmp_path}/v2/proc")
    (tmp_path / "v2" / SCOPE / "memory.events").write_text(EVENTS.format(5))
    assert counters.own.path.endswith("memory.events.local")
    assert counters.own_risen() == 0
    (tmp_path / "v2" / SCOPE / "memory.events.local").write_text(EVENTS.format(2))
    assert counters.own_risen() == 2
    assert counters.own_risen() == 0
    counters.close()


def test_v1_count(scene):
    """``memory.oom_control`` of the own cgroup."""
    one = scene("v1")
    one.count(1, DOCKER, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n")
    assert one.end()


def test_kernel_without_a_count(scene, tmp_path):
    """Before 4.13 there is none: that is no count of zero."""
    (tmp_path / "bare").mkdir()
    shutil.copytree(TREES / "v1", tmp_path / "old")
    (tmp_path / "old" / DOCKER / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\n")
    counters = KillCounters(LimitWatch(PID, f"{tmp_path}/old/proc", f"{tmp_path}/old"), f"{tmp_path}/old/proc")
    assert counters.own is None
    assert counters.own_risen() == 0
    counters.close()


def test_cgroup_that_vanishes(scene, monkeypatch):
    """A removed cgroup answers ENODEV: that is kept apart from a count that stood still."""
    one = scene()

    def gone(self):
        raise OSError(19, "No such device")

    monkeypatch.setattr("memtrack.collectors.procfs.HeldFile.read", gone)
    assert not one.end()
    assert one.witness.counters.gone
    assert one.witness.counters.own is None


# -- workers --------------------------------------------------------------------------------------------------------


def test_worker_that_vanishes_is_named(scene):
    """Without the log: the count moved and one member is gone. The event comes within two seconds."""
    one = scene()
    one.count(1)
    one.kill(WORKER)
    before_ns = one.now_ns
    one.pass_time(2.0)
    (event,) = one.events()
    assert event.text == "DataLoader worker (4300), last 90.0 MiB, was killed out of memory"
    assert event.value == 90.0
    assert event.time_ns - before_ns <= 2 * SECOND_NS
    (other,) = one.witness.others
    assert (other.pid, other.is_member, other.certain) == (WORKER, True, False)
    assert not one.end()


@pytest.mark.parametrize("before", ["python", "pt_data_worker"])
def test_worker_that_is_given_a_name_later(scene, before):
    """It was seen first under its parent's name, or under the one that torch gives to all of them."""
    one = scene()
    comm = one.folder / f"proc/{WORKER}/comm"
    one.proc.add(4301, parent=PID, rss_mib=80)
    for pid in (WORKER, 4301):
        (one.folder / f"proc/{pid}/comm").write_text(f"{before}\n")
    one.pass_time(1.5)
    comm.write_text("DataLoader 12\n")
    one.pass_time(1.5)
    one.count(1)
    one.kill(WORKER)
    one.pass_time(2.0)
    (event,) = one.events()
    assert event.text.startswith("DataLoader worker 12 (4300), last ")


def test_names_in_words():
    """Only those that torch and memtrack give to workers are another word."""
    assert neighbours.title_of("pt_data_worker") == "DataLoader worker"
    assert neighbours.title_of("DataLoader 3") == "DataLoader worker 3"
    for name in ("DataLoader", "DataLoader x", "python", "", "my DataLoader 3"):
        assert neighbours.title_of(name) == name


def test_several_workers(scene):
    """As many as were counted."""
    one = scene()
    one.proc.add(4301, parent=PID, rss_mib=80)
    (one.folder / "proc/4301/comm").write_text("pt_data_worker\n")
    one.pass_time(1.5)
    one.count(2)
    one.kill(WORKER)
    one.kill(4301)
    one.pass_time(2.0)
    assert sorted(other.pid for other in one.witness.others) == [WORKER, 4301]
    assert len(one.events()) == 2


def test_more_workers_gone_than_were_killed(scene):
    """Which of them it was is not made up."""
    one = scene()
    one.proc.add(4301, parent=PID, rss_mib=80)
    one.pass_time(1.5)
    one.count(1)
    one.kill(WORKER)
    one.kill(4301)
    one.pass_time(4.0)
    (event,) = one.events()
    assert event.text == "one of its processes was killed out of memory"


def test_worker_named_by_the_log(scene):
    """At once, and with what the kernel counted; the other that is gone at the same time is not accused."""
    one = scene(log=True)
    one.proc.add(4301, parent=PID, rss_mib=80)
    one.pass_time(1.5)
    one.count(1)
    one.log.new = [kill_of(WORKER)]
    one.kill(WORKER)
    one.kill(4301)
    one.pass_time(1.5)
    (event,) = one.events()
    assert event.text == "DataLoader worker (4300), last 95.0 MiB, was killed out of memory"
    assert one.witness.others[0].certain
    assert not one.end()


def test_worker_that_dies_with_the_process(scene):
    """The trainer raises at once, before anybody has looked: who was gone at its end is the one."""
    one = scene()
    one.count(1)
    one.kill(WORKER)
    assert not one.end(may_be_victim=False)
    assert [other.pid for other in one.witness.others] == [WORKER]


def test_error_in_a_look_is_borne(scene, monkeypatch):
    """Samples are noted on, the next look may do; the verdict tells that something was missed."""
    one = scene()
    with monkeypatch.context() as patch:
        patch.setattr(one.witness.counters, "own_risen", lambda: 1 / 0)
        one.pass_time(3.0)
    assert one.witness.samples()[-1][0] == one.now_ns
    one.count(1)
    one.kill(WORKER)
    one.pass_time(2.0)
    assert len(one.events()) == 1
    verdict = one.witness.verdict(one.now_ns, 1, Place())
    assert "memtrack could not always look: ZeroDivisionError: division by zero" in verdict.evidence


def test_verdict_is_given_whatever_happens(scene, monkeypatch):
    """Also if the judge fails."""
    one = scene()
    monkeypatch.setattr("memtrack.agent.trial.judge", lambda case: 1 / 0)
    verdict = one.witness.verdict(one.now_ns, 17, Place())
    assert (verdict.kind, verdict.wall_ns) == ("unknown", 17)
    assert "ZeroDivisionError" in verdict.evidence[0]


# -- the log --------------------------------------------------------------------------------------------------------


def test_log_that_names_the_process(scene):
    """Its word counts, with or without a count."""
    one = scene(log=True)
    one.log.new = [kill_of(PID, "python", 210.0)]
    one.end()
    assert one.witness.kill is not None


def test_log_that_names_another_in_the_same_cgroup(scene):
    """The count moved by somebody else's kill just before ``kill -9``: the log's word stands against the count."""
    one = scene(log=True)
    one.count(1)
    one.log.new = [kill_of(999, "postgres")]
    assert not one.end()
    assert one.witness.kill is None
    assert [other.pid for other in one.witness.others] == [999]


def test_log_that_names_another_elsewhere(scene):
    """A kill in another cgroup does not explain why ours counted one."""
    one = scene(log=True)
    one.count(1)
    one.log.new = [kill_of(999, "postgres", cgroup="/system.slice/postgres.service")]
    assert one.end()
    assert one.witness.others == []


@pytest.mark.parametrize(
    ("name", "rss_mib", "is_own"),
    [("python", 215.0, True), ("python", 60.0, False), ("postgres", 215.0, False)],
)
def test_log_in_another_pid_namespace(scene, name, rss_mib, is_own):
    """Pids mean nothing there: name and size must fit."""
    one = scene(log=True, true_pids=False)
    one.log.new = [kill_of(31337, name, rss_mib)]
    (one.folder / "proc/vmstat").write_text("oom_kill 5\n")
    one.end()
    assert (one.witness.kill is not None) is is_own


def test_acquittal_of_a_namesake(scene):
    """In another pid namespace a twin of the same name and size was killed; ours went on living."""
    one = scene(log=True, true_pids=False)
    one.count(1)
    one.log.new = [kill_of(31337, "python", 205.0)]
    one.pass_time(4.0)
    assert not one.end()
    assert one.witness.kill is None


RECORDS = [
    b"6,1,100,-;eth0: link up",
    b"4,2,101,-;python invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
    b"6,3,102,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/a,"
    b"task_memcg=/a/b,task=python,pid=6141,uid=0",
    b"3,4,103,-;Memory cgroup out of memory: Killed process 6141 (py) (x) total-vm:830588kB, anon-rss:411264kB, "
    b"file-rss:6032kB, shmem-rss:1024kB, UID:0 pgtables:868kB oom_score_adj:0\n SUBSYSTEM=mem",
    b"6,5,104,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,"
    b"task_memcg=/c,task=node,pid=7,uid=0",
    b"3,6,105,-;Out of memory: Killed process 7 (node) total-vm:100kB, anon-rss:2048kB, file-rss:0kB, shmem-rss:0kB",
    b"3,7,106,-;Killed process 8 (ruby) total-vm:100kB, anon-rss:1024kB, file-rss:0kB, shmem-rss:0kB",
    b"12,8,107,-;Memory cgroup out of memory: Killed process 9 (forged) total-vm:1kB, anon-rss:1kB",
    b"garbage",
    b"3,9,108,-;Killed process nonsense",
]


def test_lines_of_the_log():
    """Pid, name, figures and cgroups; a line that a program wrote is not the kernel's."""
    parser = Parser()
    for record in RECORDS:
        parser.feed(record)
    first, second, third = parser.kills
    assert (first.pid, first.name, first.cgroup, first.limited) == (6141, "py) (x", "/a/b", "/a")
    assert (first.anon_mib, first.rss_mib) == (411264 / 1024, (411264 + 6032 + 1024) / 1024)
    assert (second.pid, second.cgroup, second.limited) == (7, "/c", "/")
    assert (third.pid, third.name, third.cgroup, third.limited) == (8, "ruby", "", "")


def test_log_that_may_not_be_read(tmp_path):
    """No log, no evidence, no error."""
    log = KernelLog(str(tmp_path / "kmsg"))
    assert not log.readable
    assert log.kills() == []
    log.close()


# -- samples --------------------------------------------------------------------------------------------------------


def test_samples_are_the_newest(scene):
    """The ring holds 64, oldest first."""
    one = scene()
    one.pass_time(10.0)
    times = [sample[0] for sample in one.witness.samples()]
    assert len(times) == SAMPLES
    assert times == sorted(times)
    assert times[-1] == one.now_ns


def test_samples_without_those_of_a_dead_process(scene):
    """Where RSS could not be read any more, the value of the sample before is still there: it is left out."""
    one = scene()
    last = one.witness.samples()[-1]
    latest = {metrics.RSS: last[1], metrics.CONTAINER_USAGE: 20.0, metrics.CONTAINER_HEADROOM: 95.0}
    for _ in range(5):
        one.witness.note(one.now_ns + 1, latest)
    assert one.witness.samples()[-1] == last


def test_samples_while_the_kernel_takes_the_memory_away():
    """The fall of a victim is no part of its life."""
    from memtrack.agent.trial import _drop_dying

    case = Case()
    case.samples = [(at, rss, None, None) for at, rss in enumerate((200.0, 290.0, 371.0, 40.0, 6.0))]
    _drop_dying(case)
    assert [sample[1] for sample in case.samples] == [200.0, 290.0, 371.0]


# -- status ---------------------------------------------------------------------------------------------------------


def write_stat(folder, state="Z", status=9, start_ticks=55):
    fields = [state, *["0"] * 18, str(start_ticks), *["0"] * 29, str(status), "0"]
    (folder / "77").mkdir(exist_ok=True)
    (folder / "77" / "stat").write_text(f"77 (a) b) {' '.join(fields)}\n")


def test_status_of_a_zombie(tmp_path):
    """Only of one that is dead, and is the one that is meant."""
    write_stat(tmp_path)
    assert exit_status.zombie(77, 55, str(tmp_path)) == (True, 9)
    assert exit_status.zombie(77, 56, str(tmp_path)) == (False, None), "another process has the pid"
    assert exit_status.zombie(77, None, str(tmp_path)) == (True, 9)
    write_stat(tmp_path, state="S", status=0)
    assert exit_status.zombie(77, 55, str(tmp_path)) == (True, None)
    assert exit_status.zombie(78, 55, str(tmp_path)) == (False, None)


def test_status_that_is_hidden(tmp_path, monkeypatch):
    """Who may not look is shown 0, which is no clean exit then."""
    write_stat(tmp_path, status=0)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tpython\nCapEff:\t0000000000000000\n")
    assert exit_status.zombie(77, 55, str(tmp_path)) == (True, 0), "our own"
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    assert exit_status.zombie(77, 55, str(tmp_path)) == (True, None)
    (tmp_path / "self/status").write_text("Name:\tpython\nCapEff:\t0000000000080000\n")
    assert exit_status.zombie(77, 55, str(tmp_path)) == (True, 0), "CAP_SYS_PTRACE"


def test_status_that_nobody_tells(tmp_path):
    """No pidfd, collected: None, and at once."""
    assert exit_status.wait_status(77, 55, -1, 5.0, str(tmp_path)) is None


# -- neighbours -----------------------------------------------------------------------------------------------------


def test_largest_neighbours(tmp_path):
    """By size, by the kernel's name, without the process itself."""
    proc = FakeProc(tmp_path)
    for pid in range(1, 9):
        proc.add(pid, rss_mib=pid * 10)
        (tmp_path / f"proc/{pid}/comm").write_text(f"name\x1b{pid}\n")
    found = neighbours.largest(neighbours.pids_of_machine(proc.path), [8], 3, proc.path)
    assert found == [(7, "name?7", 70.0), (6, "name?6", 60.0), (5, "name?5", 50.0)]


def test_processes_of_a_cgroup_and_below(tmp_path):
    """v1 lists them where they are; those below are charged to the same limit."""
    shutil.copytree(TREES / "v2", tmp_path / "v2")
    watch = LimitWatch(PID, f"{tmp_path}/v2/proc", f"{tmp_path}/v2")
    (tmp_path / "v2" / SCOPE / "cgroup.procs").write_text("4242\n0\n")
    slice_ = watch.limits.levels[1]
    Path(slice_.directory, "cgroup.procs").write_text("17\n")
    assert sorted(neighbours.pids_of_cgroup(slice_)) == [17, 4242]


def test_known_killers(tmp_path):
    """By the name of the program."""
    proc = FakeProc(tmp_path)
    for pid, name in ((5, "earlyoom"), (6, "bash"), (7, "slurmstepd")):
        proc.add(pid)
        (tmp_path / f"proc/{pid}/comm").write_text(f"{name}\n")
    assert neighbours.killers(proc.path) == ["earlyoom", "slurmstepd"]
