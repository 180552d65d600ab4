"""Gathers what is known of a process that has died, and has it judged.

Loaded from the start, though not needed before the end: by then the package may have been upgraded or removed.
"""

from __future__ import annotations

import os

from memtrack.agent import neighbours
from memtrack.agent.evidence import SHORT_PCT, Case
from memtrack.agent.verdict import SIGKILL, SIGTERM, judge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.agent.witness import Witness
    from memtrack.collectors.limits import Level, Limit, Limits
    from memtrack.recording.records import Verdict
    from memtrack.sampling.window import Place


def hear(witness: Witness, now_ns: int, place: Place) -> Verdict:
    """The verdict on the process that ``witness`` has watched, and that stood at ``place`` when it died."""
    case = Case()
    marks = witness.writer.marks
    case.now_ns, case.farewell = now_ns, marks.farewell()
    case.uses_memtrack = bool(case.farewell) or place.step >= 0 or marks.written() > 0
    case.phase, case.epoch, case.step = marks.name(place.phase), place.epoch, place.step
    case.stack = max(witness.writer.stacks().values(), key=lambda stack: stack.number, default=None)
    case.status = witness.status()
    case.samples = witness.samples()
    number = _signal_of(case.status, case.farewell)
    case.was_counted = witness.close_the_case(now_ns, may_be_victim=number == SIGKILL)
    case.kill, case.others, case.log_readable = witness.kill, witness.others, witness.log.readable
    if number == SIGKILL:
        _drop_dying(case)
    _take_counters(case, witness)
    level = _take_limits(case, witness)
    is_short = case.is_below(SHORT_PCT)
    if number in (SIGKILL, SIGTERM):
        case.oomd_risen = max(witness.oomd_now() - witness.oomd_before, 0)
        if is_short:
            case.killers, case.nanny = neighbours.killers(), witness.nanny
    if is_short or case.kill is not None or case.was_counted or case.others:
        _look_around(case, witness, level)
    if case.status != 0:
        case.ranks = witness.rank_deaths(now_ns)
    verdict = judge(case)
    if witness.trouble and verdict.kind != "clean":
        verdict.evidence.append(f"memtrack could not always look: {witness.trouble}")
    return verdict


def _signal_of(status: int | None, farewell: dict[str, str]) -> int:
    """The signal that ended it. Who left without a word and whose status nobody knows counts as killed."""
    if status is None:
        return 0 if farewell else SIGKILL
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _drop_dying(case: Case) -> None:
    """The kernel takes the memory of a victim away while it dies: what was sampled then tells nothing of its life."""
    samples = case.samples
    while len(samples) > 1:
        last_mib, before_mib = samples[-1][1], samples[-2][1]
        if last_mib is None or before_mib is None or last_mib >= 0.5 * before_mib:
            return
        samples.pop()


def _take_counters(case: Case, witness: Witness) -> None:
    counters = witness.counters
    if counters is None:
        return
    case.host_risen, case.counter_gone = witness.host_risen, counters.gone
    own = counters.own
    if own is not None and own.first is not None and own.last is not None:
        case.counter, case.counted = own.path, (own.first, own.last)


def _take_limits(case: Case, witness: Witness) -> Level | None:
    """Fill in the limit that matters; returns the cgroup that it is of, None if it is the machine's or RLIMIT_AS."""
    watch, usage = witness.sight.watch, witness.sight.usage
    if watch is None:
        return None
    limits = watch.limits
    if limits.address_space is not None:
        case.address_space_mib = limits.address_space.mib
    limit = _named_by_log(case, limits) or _by_source(limits, usage.nearest if usage else None) or limits.binding
    if limit is None:
        return None
    case.limit_mib, case.limit_source = limit.mib, limit.source
    return next((level for level in limits.levels if level.limit is limit), None)


def _named_by_log(case: Case, limits: Limits) -> Limit | None:
    """The limit that the kernel log says was hit."""
    limited = "" if case.kill is None else case.kill.limited
    if limited == "/":
        return limits.physical
    for level in limits.levels:
        name = level.name.rstrip("/")
        if limited and level.limit is not None and name and limited.endswith(name):
            return level.limit
    return None


def _by_source(limits: Limits, source: str | None) -> Limit | None:
    return next((limit for limit in limits.limits if limit.source == source), None)


def _look_around(case: Case, witness: Witness, level: Level | None) -> None:
    if level is not None:
        case.neighbours_of = "in the cgroup"
        pids = neighbours.pids_of_cgroup(level)
    else:
        case.neighbours_of = "on the machine"
        pids = neighbours.pids_of_machine()
    case.neighbours = neighbours.largest(pids, witness.own_pids)
