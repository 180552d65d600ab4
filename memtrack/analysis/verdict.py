"""How a process ended: the verdict of its agent, or what can be said when the agent died as well."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from memtrack import metrics
from memtrack.agent.evidence import LOW_PCT, SHORT_PCT, Case, at_limit, circumstances
from memtrack.agent.verdict import judge
from memtrack.collectors.limits import cgroup_levels
from memtrack.recording import layout
from memtrack.recording.records import Verdict
from memtrack.recording.standing import DEAD, boot_id, pid_namespace, standing

if TYPE_CHECKING:
    from memtrack.agent.witness import Sampled
    from memtrack.recording.reader import RecordingReader

FRESH_NS = 3_000_000_000
"""Where the agent cannot be seen, it counts as alive for so long after its last sample."""

MAIN_EVIDENCE = 4
"""Lines of evidence that a summary shows; fewer where memory has most likely nothing to do with it."""

_TOGETHER = (
    "memtrack's agent ended at the same moment, as when a cgroup is killed as a whole (memory.oom.group, systemd-oomd, "
    "the end of a container) or the machine stops"
)


def verdict_of(reader: RecordingReader) -> Verdict | None:
    """The verdict that was stored, else one from what the recording holds; None while the process runs.

    None, too, if monitoring was stopped while the process lived on. Reads a few kilobytes and, in the second case,
    the cgroup of the process if it is still there.
    """
    stored = reader.verdict()
    if stored is not None:
        return stored
    if standing(reader) != DEAD or _agent_is_there(reader):
        return None
    return post_mortem(reader)


def title(verdict: Verdict) -> str:
    """The kind in words, with the confidence where it matters: ``out of memory (confirmed)``."""
    words = "unknown SIGKILL" if verdict.kind == "unknown_sigkill" else verdict.kind.replace("_", " ")
    return f"{words} ({verdict.confidence})" if verdict.confidence in ("confirmed", "likely") else words


def describe(verdict: Verdict, *, everything: bool = False) -> list[str]:
    """The verdict as lines for people, with the main evidence or all of it; nothing for a clean end."""
    if verdict.kind == "clean":
        return []
    count = 2 if verdict.kind in ("failed", "killed") else MAIN_EVIDENCE
    lines = [f"  verdict   {title(verdict)}: {verdict.text}"]
    return lines + [f"            - {line}" for line in verdict.evidence[: None if everything else count]]


# -- when the agent died, too ---------------------------------------------------------------------------------------


def post_mortem(reader: RecordingReader, proc: str = "/proc", root: str = "") -> Verdict:
    """A verdict from the recording alone, and from the count of kills of its cgroup if that still exists."""
    case = _case(reader)
    farewell_kind = case.farewell.get("how")
    later_s = _heard_later_s(reader)
    if farewell_kind:
        verdict = judge(case)
        verdict.evidence.insert(0, "memtrack's agent was gone by then: nobody saw the exit status")
    elif later_s is not None:
        verdict = Verdict("unknown", "none", "the process has ended, and memtrack's agent before it")
        verdict.evidence.append(f"the process was heard of {later_s:.1f} s after the agent's last sample")
        verdict.evidence += circumstances(case)
    else:
        verdict = _without_witness(case, reader, _risen(reader, proc, root))
    wall_ns, mono_ns = reader.head().wall_ns, reader.head().mono_ns
    verdict.wall_ns = wall_ns + max(case.now_ns - mono_ns, 0) if wall_ns else 0
    return verdict


def _without_witness(case: Case, reader: RecordingReader, risen: int) -> Verdict:
    is_same_boot = reader.fields.get("boot_id") == boot_id()
    limit = at_limit(case)
    if risen and (risen > 1 or case.is_below(SHORT_PCT)):
        text = f"the process was killed by the kernel's OOM killer{limit}, and memtrack's agent with it"
        verdict = Verdict("out_of_memory", "confirmed", text)
    elif risen or case.is_below(LOW_PCT):
        text = f"the process was probably killed by the kernel's OOM killer{limit}; memtrack's agent ended with it"
        verdict = Verdict("out_of_memory", "likely", text)
    else:
        verdict = Verdict("unknown", "none", "the process has ended, and memtrack's agent at the same moment")
    if risen:
        verdict.evidence.append(f"oom_kill in the cgroup of the limit is {risen} higher than the agent last saw it")
    verdict.evidence.append(_TOGETHER)
    if not is_same_boot:
        verdict.evidence.append("the machine has been started anew since then, or it was another one")
    verdict.evidence += circumstances(case)
    return verdict


def _case(reader: RecordingReader) -> Case:
    """What the recording knows of the end."""
    case = Case()
    head, pulse, place, names = reader.head(), reader.pulse(), reader.place(), reader.names()
    case.farewell = reader.farewell()
    case.now_ns = max(pulse.mono_ns, head.mono_ns)
    case.samples = _samples(reader)
    case.phase = names[place.phase] if place.phase < len(names) else ""
    case.epoch, case.step = place.epoch, place.step
    if head.limit_source and head.limit_mib == head.limit_mib:
        case.limit_mib, case.limit_source = head.limit_mib, head.limit_source
    case.stack = max(reader.stacks(), key=lambda stack: stack.number, default=None)
    return case


def _samples(reader: RecordingReader) -> list[Sampled]:
    """The ends of the last windows, and the last sample."""
    newest = reader.newest_number()
    samples: list[Sampled] = []
    for number in range(max(newest - 2, 0), newest + 1):
        row = reader.window(number)
        if row is not None:
            cells = (row.cells.get(name) for name in (metrics.RSS, metrics.CONTAINER_USAGE, metrics.CONTAINER_HEADROOM))
            rss, usage, headroom = (None if cell is None else cell.last for cell in cells)
            samples.append((row.end_ns, rss, usage, headroom))
    pulse = reader.pulse()
    values = (pulse.rss_mib, pulse.usage_mib, pulse.headroom_pct)
    rss, usage, headroom = (None if value != value else value for value in values)
    if pulse.mono_ns and (not samples or pulse.mono_ns > samples[-1][0]):
        samples.append((pulse.mono_ns, rss, usage, headroom))
    return samples


def _heard_later_s(reader: RecordingReader) -> float | None:
    """How long after the agent's last sample the process still left a mark; None if it did not."""
    last_ns = reader.pulse().mono_ns
    newest_ns = max((mark.time_ns for mark in reader.marks()), default=0)
    return (newest_ns - last_ns) / 1e9 if last_ns and newest_ns > last_ns + 10**9 else None


def _risen(reader: RecordingReader, proc: str, root: str) -> int:
    """By how much the count of kills of the limit's cgroup is above what the agent saw; 0 if that cannot be said."""
    newest = reader.window(reader.newest_number())
    cell = None if newest is None else newest.cells.get(metrics.CONTAINER_OOM_KILLS)
    kind, _, rest = reader.head().limit_source.partition(" ")
    version, _, rest = rest.partition(" ")
    name, _, _ = rest.rpartition(" ")
    if cell is None or kind != "cgroup" or not name or reader.fields.get("boot_id") != boot_id():
        return 0
    for level in cgroup_levels(os.getpid(), proc, root):
        own = level.name.rstrip("/")
        if f"v{level.version}" != version or not level.directory.endswith(own):
            continue
        directory = level.directory[: len(level.directory) - len(own)] + name.rstrip("/")
        try:
            # made after the start, it is another one of the same name: a container that was started again
            if os.stat(directory).st_ctime_ns > int(reader.fields.get("wall_ns", "0")):
                return 0
            with open(f"{directory}/{level.events_file}", encoding="ascii") as file:
                counts = dict(line.split(" ", 1) for line in file.read().splitlines() if " " in line)
            return max(int(counts.get("oom_kill", "0")) - int(cell.last), 0)
        except (OSError, ValueError):
            return 0
    return 0


def _agent_is_there(reader: RecordingReader) -> bool:
    """Whether the agent still runs, and is about to tell."""
    head = reader.head()
    if reader.fields.get("boot_id") != boot_id() or head.state == layout.ENDED:
        return False
    if reader.fields.get("pid_ns", pid_namespace()) != pid_namespace():
        age_ns: int = time.monotonic_ns() - reader.pulse().mono_ns
        return age_ns < FRESH_NS
    try:
        with open(f"/proc/{head.agent_pid}/cmdline", "rb") as file:
            command: bytes = file.read()
    except OSError:
        return False
    return os.path.basename(reader.path).encode() in command
