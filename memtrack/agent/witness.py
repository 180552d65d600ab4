"""What speaks for and against an out-of-memory kill, gathered while the process lives.

That a count of kills has risen does not say who was killed. A victim has SIGKILL pending at once, and the count rises
just before: so a process that has none some time after the rise was not the victim. What is left without a victim when
the process dies of SIGKILL was for it. Where the kernel log may be read, its word counts instead.
"""

from __future__ import annotations

import os

from memtrack import metrics
from memtrack.agent import exit_status
from memtrack.agent.kernel_log import KernelLog
from memtrack.agent.neighbours import TORCH_WORKER, has_sigkill, name_of, nanny_of, title_of
from memtrack.agent.trial import hear
from memtrack.collectors.oom import KillCounters, oomd_kills
from memtrack.collectors.procfs import pids_are_true
from memtrack.recording.records import Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.agent.kernel_log import Kill
    from memtrack.agent.ranks import Death, RankCollector
    from memtrack.collectors import Sight
    from memtrack.collectors.tree import Member
    from memtrack.recording.writer import RecordingWriter
    from memtrack.sampling.window import Place

    Sampled = tuple[int, float | None, float | None, float | None]
    """Monotonic ns; RSS and container usage in MiB, headroom in percent."""

_RSS, _USAGE, _HEADROOM = metrics.RSS, metrics.CONTAINER_USAGE, metrics.CONTAINER_HEADROOM

SAMPLES = 64
LOOK_NS = 1_000_000_000
LOOK_CLOSELY_NS = 100_000_000
"""Between two looks at the counts, and while the limit is near or a kill has no victim yet."""
HOST_NS = 10_000_000_000
NEAR_PCT = 10.0
ACQUIT_NS = 100_000_000
"""How long after a rise of the count a process without a pending SIGKILL is known not to be its victim."""
PATIENCE_NS = 2_000_000_000
"""How long a member of the tree may take to die of the kill that was counted."""
REMEMBER_NS = 60_000_000_000
FEW = 32
SIGKILL = 9


class OtherKill:
    """An out-of-memory kill of another process than the one that is watched."""

    __slots__ = ("certain", "is_member", "name", "pid", "rss_mib", "time_ns")

    def __init__(self, time_ns: int, pid: int, name: str, rss_mib: float, *, is_member: bool, certain: bool) -> None:
        self.time_ns = time_ns
        self.pid = pid
        """0 if it is not known which process it was."""
        self.name = name
        self.rss_mib = rss_mib
        self.is_member = is_member
        """Whether it belonged to the tree of the process."""
        self.certain = certain
        """Whether the kernel log or its exit status says so; else it has vanished when the count rose."""

    def who(self) -> str:
        """Whom it met, in words."""
        if not self.pid:
            return "one of its processes" if self.is_member else "another process of the cgroup"
        return f"{title_of(self.name) or 'process'} ({self.pid})"


class _Known:
    """A member of the tree as it was seen last."""

    __slots__ = ("is_gone", "member", "name", "rss_mib")

    def __init__(self, member: Member, name: str) -> None:
        self.member = member
        self.name = name
        self.rss_mib = member.rss_mib
        self.is_gone = False


class Witness:
    """Gathers evidence while process ``pid`` lives, and turns it into a verdict once it is dead. Not thread-safe."""

    def __init__(
        self,
        writer: RecordingWriter,
        pid: int,
        start_ticks: int,
        pid_fd: int,
        sight: Sight,
        now_ns: int,
        proc: str = "/proc",
        log: KernelLog | None = None,
    ) -> None:
        self._writer = writer
        self.ranks: RankCollector | None = None
        """Who knows of the other ranks of a distributed training."""
        self._who = (pid, start_ticks, pid_fd)
        self._proc = proc
        self._sight = sight
        self._gpu_news = [] if sight.gpus is None else sight.gpus.news
        self._samples: list[Sampled | None] = [None] * SAMPLES
        self._count = 0
        self._look_due_ns = now_ns
        self._host_due_ns = now_ns + HOST_NS
        self._status: int | None = None
        self.counters = None if sight.watch is None else KillCounters(sight.watch, proc)
        self.log = KernelLog() if log is None else log
        self.pids_are_true = pids_are_true(proc)
        self._known: dict[int, _Known] = {}
        self._has_ended = False
        self._unexplained = 0
        """Kills that were counted in the own cgroup and whose victim is not known yet."""
        self._risen_ns = 0
        self.kill: Kill | None = None
        """What the kernel log says of the process itself."""
        self.others: list[OtherKill] = []
        self.host_risen = 0
        """Kills on the machine since the last look at that count, which is up to ``HOST_NS`` ago."""
        self.trouble = ""
        """What went wrong in a look, last."""
        self.oomd_before = self.oomd_now()
        self._nanny: str | None = None
        self._first_names = (name_of(pid, proc), TORCH_WORKER)

    def note(self, now_ns: int, latest: dict[str, float]) -> None:
        """Called after each sample: costs a microsecond but for a look now and then."""
        get = latest.get
        count = self._count
        self._samples[count % SAMPLES] = (now_ns, get(_RSS), get(_USAGE), get(_HEADROOM))
        self._count = count + 1
        while self._gpu_news:
            self._writer.event("gpu", now_ns, text=self._gpu_news.pop(0))
        if now_ns >= self._look_due_ns:
            self._look_due_ns = now_ns + LOOK_NS
            headroom_pct = get(_HEADROOM)
            try:
                self.look(now_ns, headroom_pct is not None and headroom_pct < NEAR_PCT)
            except Exception as exc:  # evidence may be incomplete; sampling goes on
                self.trouble = f"{type(exc).__name__}: {exc}"

    def look(self, now_ns: int, is_near: bool = False) -> None:
        """See whether kills were counted, and find out whom they met."""
        if self.counters is None:
            return
        risen = self.counters.own_risen()
        if risen:
            self._unexplained += risen
            self._risen_ns = now_ns
        if now_ns >= self._host_due_ns or self.counters.own is None:
            self._host_due_ns = now_ns + HOST_NS
            self.host_risen = self.counters.host_risen()
        if risen or self.host_risen or self._unexplained > 0:
            self._read_log(now_ns)
        if self._unexplained > 0:
            self._find_victims(now_ns, is_over=False)
        else:
            self._meet(is_near)
        if is_near or self._unexplained > 0:
            self._look_due_ns = now_ns + LOOK_CLOSELY_NS

    # -- who was killed ---------------------------------------------------------------------------------------------

    def _meet(self, is_near: bool) -> None:
        """Remember the members of the tree by name and size while they live: of the dead, nobody tells them."""
        tree = self._sight.tree
        if tree is None:
            return
        known, pid = self._known, self._who[0]
        # the tree's own readings are seconds old; of hundreds of processes they have to do
        is_fresh = is_near or len(known) <= FEW
        present = {}
        for member in tree.members():
            if member.pid == pid:
                continue
            before = known.get(member.pid)
            if before is None or before.member is not member:
                before = _Known(member, name_of(member.pid, self._proc))
            elif (not is_fresh or member.read_rss()) and member.rss_mib > 0.0:
                before.rss_mib = member.rss_mib
                if is_fresh and before.name in self._first_names:
                    # a worker has its parent's name until it is given one, which may take seconds
                    before.name = name_of(member.pid, self._proc) or before.name
            present[member.pid] = before
        self._known = present
        if self._nanny is None:
            self._nanny = nanny_of(pid, self._proc)

    def _read_log(self, now_ns: int) -> None:
        for kill in self.log.kills():
            if self._is_own(kill):
                self.kill = kill
                continue
            known = self._find_known(kill)
            if known is not None:
                pid = known.member.pid
                self._unexplained -= 1
                self._tell(now_ns, OtherKill(now_ns, pid, kill.name, kill.rss_mib, is_member=True, certain=True))
                del self._known[pid]
            elif self._in_own_cgroup(kill):
                self._unexplained -= 1
                self._tell(now_ns, OtherKill(now_ns, kill.pid, kill.name, kill.rss_mib, is_member=False, certain=True))

    def _is_own(self, kill: Kill) -> bool:
        pid = self._who[0]
        if self.pids_are_true:
            return kill.pid == pid
        samples = self.samples()
        last_mib = samples[-1][1] if samples else None
        return last_mib is not None and kill.name == name_of(pid, self._proc) and _is_about(kill.rss_mib, last_mib)

    def _find_known(self, kill: Kill) -> _Known | None:
        if self.pids_are_true:
            return self._known.get(kill.pid)
        for known in self._known.values():
            if known.name == kill.name and _is_about(kill.rss_mib, known.rss_mib) and self._has_gone(known):
                return known
        return None

    def _in_own_cgroup(self, kill: Kill) -> bool:
        watch = self._sight.watch
        levels = () if watch is None else watch.limits.levels
        name = levels[0].name.rstrip("/") if levels else ""
        if kill.cgroup and name:
            # as a cgroup namespace has it, the name is the end of what the log has
            return kill.cgroup.endswith(name)
        return self._unexplained > 0

    def _find_victims(self, now_ns: int, *, is_over: bool) -> None:
        """Ascribe kills that were counted to members of the tree that are gone, if they were not for the process."""
        if not is_over:
            if now_ns - self._risen_ns < ACQUIT_NS or has_sigkill(self._who[0], self._proc):
                return
            if not self.pids_are_true:
                self.kill = None  # whoever has the same name and size
        risen_ns = self._risen_ns
        gone = [known for known in self._known.values() if self._has_gone(known)]
        killed = [known for known in gone if exit_status.zombie(known.member.pid, None, self._proc)[1] == SIGKILL]
        certain = bool(killed)
        if not killed and len(gone) <= self._unexplained:
            killed = gone
        for known in killed[: self._unexplained]:
            pid = known.member.pid
            self._unexplained -= 1
            self._tell(now_ns, OtherKill(risen_ns, pid, known.name, known.rss_mib, is_member=True, certain=certain))
            del self._known[pid]
        if self._unexplained > 0 and (is_over or now_ns - self._risen_ns >= PATIENCE_NS):
            nobody = OtherKill(risen_ns, 0, "", 0.0, is_member=bool(gone), certain=False)
            self._unexplained = 0
            self._tell(now_ns, nobody)
            self._meet(False)

    def _has_gone(self, known: _Known) -> bool:
        """Whether it has no memory any more, or had none when the process ended: then the collectors are closed."""
        if not known.is_gone and not self._has_ended:
            known.is_gone = not known.member.read_rss()
        return known.is_gone

    def _tell(self, now_ns: int, kill: OtherKill) -> None:
        self.others = [other for other in self.others[-15:] if now_ns - other.time_ns < REMEMBER_NS] + [kill]
        size = f", last {kill.rss_mib:.1f} MiB," if kill.rss_mib else ""
        of = "" if kill.is_member or not kill.pid else " of the cgroup"
        text = f"{kill.who()}{of}{size} was killed out of memory"
        self._writer.event("oom_kill", now_ns, self._writer.marks.place().step, kill.rss_mib, text)

    # -- the end ----------------------------------------------------------------------------------------------------

    def see_end(self, now_ns: int) -> None:
        """Called at once when the process has ended: what can be seen of it now may be gone in a moment.

        Its status can be read until its parent collects it, its workers end with it, its cgroup is removed.
        """
        pid, start_ticks, _ = self._who
        self._status = exit_status.zombie(pid, start_ticks, self._proc)[1]
        if self.counters is not None:
            self._unexplained += self.counters.own_risen()
            self._risen_ns = now_ns
            for known in self._known.values():
                self._has_gone(known)
        self._has_ended = True

    def verdict(self, now_ns: int, wall_ns: int, place: Place) -> Verdict:
        """Called once the process is dead. Never raises; takes 0.5 s at the most, and some milliseconds usually."""
        try:
            found = hear(self, now_ns, place)
        except Exception as exc:
            found = Verdict("unknown", "none", "the process has ended")
            found.evidence.append(f"memtrack could not look into it: {type(exc).__name__}: {exc}")
        found.wall_ns = wall_ns
        return found

    def status(self) -> int | None:
        """The wait status, waited for if need be; None if nobody tells."""
        if self._status is None:
            self._status = exit_status.wait_status(*self._who, proc=self._proc)
        return self._status

    def close_the_case(self, now_ns: int, *, may_be_victim: bool) -> bool:
        """Find out whom the last kills met. Returns whether one was counted that was for the process itself.

        ``may_be_victim``: it was SIGKILL that ended the process, or nobody knows what did.
        """
        if self.counters is None:
            return False
        self.host_risen += self.counters.host_risen()
        self._read_log(now_ns)
        if may_be_victim:
            return self._unexplained > 0 and self.kill is None
        if self._unexplained > 0:
            self._find_victims(now_ns, is_over=True)
        return False

    def rank_deaths(self, now_ns: int) -> list[Death]:
        """Other ranks of a distributed training that had ended badly by then, oldest first."""
        return [] if self.ranks is None else self.ranks.deaths(now_ns)

    def samples(self) -> list[Sampled]:
        """The last samples, oldest first, without those that were taken when the process had no memory any more."""
        first = max(self._count - SAMPLES, 0)
        kept = [sample for at in range(first, self._count) if (sample := self._samples[at % SAMPLES]) is not None]
        # a sample that fails leaves the value of the one before: the very same object
        while len(kept) > 1 and kept[-1][1] is kept[-2][1]:
            kept.pop()
        return kept

    def oomd_now(self) -> int:
        """What systemd-oomd has killed so far in the cgroups of the process."""
        watch = self._sight.watch
        return 0 if watch is None else oomd_kills(watch.limits.levels)

    @property
    def sight(self) -> Sight:
        """The collectors' knowledge."""
        return self._sight

    @property
    def nanny(self) -> str:
        """The Dask nanny above the process, if there is one."""
        return self._nanny or ""

    @property
    def writer(self) -> RecordingWriter:
        """The recording, with what the process has left in it."""
        return self._writer

    @property
    def own_pids(self) -> tuple[int, ...]:
        """The process and its agent, which are no neighbours."""
        return self._who[0], os.getpid()


def _is_about(mib: float, last_mib: float) -> bool:
    """Whether a process that was seen with ``last_mib`` may have had ``mib`` a moment later."""
    return 0.8 * last_mib - 16.0 <= mib <= 1.25 * last_mib + 64.0
