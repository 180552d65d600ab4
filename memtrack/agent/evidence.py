"""What is known of the end of one process, and how it is told: sentences with numbers."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.agent.kernel_log import Kill
    from memtrack.agent.neighbours import Process
    from memtrack.agent.ranks import Death
    from memtrack.agent.witness import OtherKill, Sampled
    from memtrack.recording.records import Stack

LOW_PCT = 5.0
"""Headroom below which an out-of-memory kill is likely."""
SHORT_PCT = 10.0
"""Headroom below which programs such as earlyoom act by default."""

FEW_RANKS = 3
"""How many ranks that had ended before are told of."""

_LIBRARIES = ("site-packages/", "lib/python3.", "<")
"""How frames begin that are not of the user's own code."""


class Case:
    """Everything that is known of the end of one process. Memory in MiB, times in monotonic nanoseconds."""

    def __init__(self) -> None:
        self.status: int | None = None
        """As ``waitpid`` gives it; None if nobody told."""
        self.farewell: dict[str, str] = {}
        self.uses_memtrack = True
        """Whether the process called memtrack itself; if it was watched from outside, no farewell is to be expected."""
        self.now_ns = 0
        self.samples: list[Sampled] = []
        self.phase = ""
        self.epoch = self.step = -1
        self.limit_mib: float | None = None
        """The limit that was nearest at the last sample, or whose kill the kernel log tells of."""
        self.limit_source = ""
        self.address_space_mib: float | None = None
        """RLIMIT_AS."""
        self.counter = ""
        """File of the own cgroup's count of kills, and the count when it was first and last read."""
        self.counted: tuple[int, int] | None = None
        self.counter_gone = False
        self.host_risen = 0
        """Kills on the machine in the last seconds."""
        self.was_counted = False
        """Whether the own cgroup's count rose by a kill that was for no other process that is known."""
        self.kill: Kill | None = None
        """The line of the kernel log about this process."""
        self.log_readable = False
        self.others: list[OtherKill] = []
        self.ranks: list[Death] = []
        """Other ranks of the same training that had ended badly before, the first of them first."""
        self.neighbours: list[Process] = []
        self.neighbours_of = ""
        self.killers: list[str] = []
        self.nanny = ""
        self.oomd_risen = 0
        self.stack: Stack | None = None

    @property
    def headroom_pct(self) -> float | None:
        """At the last sample."""
        return self.samples[-1][3] if self.samples else None

    def is_below(self, share_pct: float) -> bool:
        """Whether less than that was left at the last sample."""
        return self.headroom_pct is not None and self.headroom_pct < share_pct


def points_for(case: Case) -> list[str]:
    """Why it counts as an out-of-memory kill."""
    lines = []
    kill = case.kill
    if kill is not None:
        limited = f" at the limit of {kill.limited}" if kill.limited not in ("", "/") else ""
        lines.append(
            f"the kernel log says that process {kill.pid} ({kill.name}) was killed out of memory{limited}, with "
            f"{kill.anon_mib:.1f} MiB of private memory (anon-rss) and {kill.rss_mib:.1f} MiB in all"
        )
    if case.counted is not None and case.counted[1] > case.counted[0]:
        lines.append(f"oom_kill in {case.counter} rose from {case.counted[0]} to {case.counted[1]}")
    elif case.counter_gone:
        lines.append(no_counter(case))
    return lines


def points_against(case: Case) -> list[str]:
    """Why it does not count as an out-of-memory kill."""
    lines = []
    if case.counted is None:
        lines.append(no_counter(case))
    elif case.counted[1] > case.counted[0]:
        lines.append(
            f"oom_kill in {case.counter} rose from {case.counted[0]} to {case.counted[1]}, by kills of other processes"
        )
    else:
        lines.append(f"oom_kill in {case.counter} stayed at {case.counted[1]}")
    if case.log_readable:
        lines.append("the kernel log does not name the process")
    if case.host_risen and (case.counted is None or case.counted[1] == case.counted[0]):
        lines.append(f"the machine's count of OOM kills rose by {case.host_risen} at that time, elsewhere")
    if case.is_below(SHORT_PCT):
        lines.append(f"memory was short all the same: {left(case)}")
    return lines


def no_counter(case: Case) -> str:
    """Why the own cgroup's count says nothing."""
    if case.counter_gone:
        return "the cgroup was gone before its count of kills could be read"
    return "no count of kills is to be had for its cgroup"


def circumstances(case: Case) -> list[str]:
    """What was going on, for every end that is not clean."""
    lines = []
    for kill in case.others:
        seconds = (case.now_ns - kill.time_ns) / 1e9
        last = f", last {size(kill.rss_mib)}," if kill.rss_mib else ""
        how = "" if kill.certain or not kill.pid else " (it vanished when the count rose)"
        who = kill.who()
        if kill.pid:
            who = f"its process {who}" if kill.is_member else f"{who} of the same cgroup"
        lines.append(f"{who}{last} was killed out of memory {seconds:.1f} s before{how}")
    for rank in case.ranks[:FEW_RANKS]:
        peak = f", peak {size(rank.peak_mib)}," if rank.peak_mib else ""
        seconds = (case.now_ns - rank.time_ns) / 1e9
        lines.append(f"{rank.who()}{peak} {rank.how} {seconds:.1f} s before; its recording is {rank.recording}")
    if case.limit_mib is not None:
        lines.append(f"the limit that was nearest: {size(case.limit_mib)} ({case.limit_source}); {left(case)}")
    lines += growth(case.samples)
    place = at_place(case, "")
    if place:
        lines.append(f"its last marks: {place}")
    stack = case.stack
    if stack is not None:
        frames = stack.text.splitlines() or [""]
        frame = next((frame for frame in frames if not frame.startswith(_LIBRARIES)), frames[0])
        seconds = max(case.now_ns - stack.time_ns, 0) / 1e9
        lines.append(f"{seconds:.1f} s before, at {stack.rss_mib:.1f} MiB, it stood at {frame}")
    if case.neighbours:
        named = ", ".join(f"{name} ({pid}) {size(rss_mib)}" for pid, name, rss_mib in case.neighbours)
        lines.append(f"the largest other processes {case.neighbours_of}: {named}")
    return lines


def growth(samples: list[Sampled]) -> list[str]:
    """The last samples of RSS, and how fast it grew."""
    known = [(time_ns, rss_mib) for time_ns, rss_mib, _, _ in samples if rss_mib is not None]
    if not known:
        return []
    last_ns = known[-1][0]
    newest = known[-4:]
    values = ", ".join(f"{rss_mib:.1f}" for _, rss_mib in newest)
    over = f" in the last {(last_ns - newest[0][0]) / 1e6:.0f} ms" if len(newest) > 1 else " at the last sample"
    lines = [f"RSS {values} MiB{over}"]
    since_ns, before_mib = next(sample for sample in known if sample[0] >= last_ns - 2 * 10**9)
    seconds = (last_ns - since_ns) / 1e9
    if seconds > 0.0:
        rate = (known[-1][1] - before_mib) / seconds
        if abs(rate) >= 1.0:
            lines.append(f"RSS {'grew' if rate > 0 else 'fell'} by {abs(rate):.0f} MiB/s over the last {seconds:.1f} s")
    return lines


def at_limit(case: Case) -> str:
    """``at the limit of …``, with a blank before it; nothing if none is known."""
    return "" if case.limit_mib is None else f" at the limit of {size(case.limit_mib)} ({case.limit_source})"


def left(case: Case) -> str:
    """What was left at the last sample, and how old that is."""
    # what is in use counts towards the limit of a cgroup; of the machine it is a part
    usage_mib = case.samples[-1][2] if case.samples and case.limit_source.startswith("cgroup") else None
    parts = [] if usage_mib is None else [f"{size(usage_mib)} in use"]
    if case.headroom_pct is not None:
        parts.append(f"{case.headroom_pct:.1f} % left")
    if not parts:
        return "nothing was sampled"
    age_ms = max(case.now_ns - case.samples[-1][0], 0) / 1e6
    return f"{', '.join(parts)} at the last sample, {age_ms:.0f} ms before the end"


def at_place(case: Case, lead: str) -> str:
    """Phase, epoch and step behind ``lead``; nothing if none is known."""
    parts = [f"phase {case.phase}"] if case.phase else []
    parts += [f"{name} {number}" for name, number in (("epoch", case.epoch), ("step", case.step)) if number >= 0]
    return lead + ", ".join(parts) if parts else ""


def size(mib: float) -> str:
    """MiB for people."""
    return f"{mib / 1024:.2f} GiB" if abs(mib) >= 1024 else f"{mib:.1f} MiB"
