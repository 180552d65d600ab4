"""From the evidence to the verdict: no look at the system, no clock, so that every case can be tried."""

from __future__ import annotations

import os

from memtrack.agent.evidence import (
    LOW_PCT,
    SHORT_PCT,
    at_limit,
    at_place,
    circumstances,
    no_counter,
    points_against,
    points_for,
    size,
)
from memtrack.recording.records import Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.agent.evidence import Case

SIGKILL, SIGTERM = 9, 15
WORKER_S = 60.0
"""How long a process may take to end because a worker of it was killed."""

_DEVICE = {
    ("torch", "OutOfMemoryError"): "certain",
    ("cupy", "OutOfMemoryError"): "certain",
    ("pycuda", "MemoryError"): "certain",
    # these have a message that tells, which is not kept, as messages may hold anything
    ("tensorflow", "ResourceExhaustedError"): "likely",
    ("jaxlib", "XlaRuntimeError"): "likely",
    ("jaxlib", "JaxRuntimeError"): "likely",
    ("jax", "JaxRuntimeError"): "likely",
}
"""Exceptions of frameworks that say that a device has no memory left, and how surely they do."""


def judge(case: Case) -> Verdict:
    """The verdict, without ``wall_ns``."""
    status = case.status
    if status is None:
        verdict = _without_status(case)
    elif os.WIFSIGNALED(status):
        verdict = _signalled(case, os.WTERMSIG(status))
    else:
        verdict = _exited(case, os.WEXITSTATUS(status))
    if verdict.kind != "clean":
        _blame_rank(case, verdict)
        verdict.evidence += circumstances(case)
    return verdict


# -- kinds of end ---------------------------------------------------------------------------------------------------


def _exited(case: Case, code: int) -> Verdict:
    if code == 0:
        verdict = Verdict("clean", "certain", "the process ended with exit code 0")
    elif case.farewell.get("how") == "exception":
        verdict = _raised(case, f"exit code {code}")
    else:
        verdict = Verdict("failed", "certain", f"the process ended with exit code {code}")
        if not case.farewell and case.uses_memtrack:
            verdict.evidence.append("it left without Python's shutdown: by os._exit or exec perhaps")
        if code > 128 and signal_name(code - 128):
            name = signal_name(code - 128)
            verdict.evidence.append(f"{code} is how a shell says that {name} killed what it had run")
    verdict.exit_code = code
    if code:
        _blame_worker(case, verdict)
    return verdict


def _raised(case: Case, ending: str) -> Verdict:
    """An exception that nobody caught. ``ending`` is how the process went, in words."""
    name, module = case.farewell.get("type", ""), case.farewell.get("module", "")
    shown = name if module in ("", "builtins") else f"{module}.{name}"
    where = case.farewell.get("where", "")
    at = f" at {where}" if where else ""
    last_name = name.rpartition(".")[2]
    confidence = _DEVICE.get((module.partition(".")[0], last_name))
    if confidence is not None:
        surely = "for lack of" if confidence == "certain" else "probably for lack of"
        text = f"the process failed {surely} device memory: {shown}{at}, {ending}"
        return Verdict("device_out_of_memory", confidence, text)
    if last_name.endswith("MemoryError"):
        verdict = Verdict("memory_error", "certain", f"the process was refused memory: {shown}{at}, {ending}")
        verdict.evidence.append(_why_refused(case))
        return verdict
    return Verdict("failed", "certain", f"the process failed: {shown}{at}, {ending}")


def _why_refused(case: Case) -> str:
    limit_mib = case.address_space_mib
    if limit_mib is None:
        return (
            "no RLIMIT_AS was set: more was asked for than the machine can give (vm.overcommit_memory), at once perhaps"
        )
    return f"RLIMIT_AS was {size(limit_mib)}: beyond it allocations are refused, whatever the machine has left"


def _blame_worker(case: Case, verdict: Verdict) -> None:
    """Say so if a worker was killed shortly before, which ends most programs by an exception of their own."""
    killed = [kill for kill in case.others if kill.is_member and case.now_ns - kill.time_ns <= WORKER_S * 1e9]
    if not killed:
        return
    first = killed[0]
    seconds = (case.now_ns - first.time_ns) / 1e9
    who = f"its worker {first.who()}" if first.pid else "one of its workers"
    verdict.text += f"; {seconds:.1f} s before, {who} was killed out of memory (confirmed){at_limit(case)}"


def _blame_rank(case: Case, verdict: Verdict) -> None:
    """Say so if another rank had ended badly before: the others wait for it, until an exception or a signal comes."""
    # what all ranks fail of alike is the fault of none
    others = [rank for rank in case.ranks if f"the process {rank.how}" != verdict.text]
    if others:
        seconds = (case.now_ns - others[0].time_ns) / 1e9
        verdict.text += f"; {seconds:.1f} s before, {others[0].who()} {others[0].how}"


def _signalled(case: Case, number: int) -> Verdict:
    name = signal_name(number) or f"signal {number}"
    if number == SIGKILL:
        verdict = _killed(case)
    elif number == SIGTERM and (killer := _userspace_killer(case)):
        verdict = _by_userspace(case, name, killer)
    elif case.farewell.get("type") == "KeyboardInterrupt":
        where = case.farewell.get("where", "")
        verdict = Verdict("killed", "certain", f"the process was interrupted ({name}){f' at {where}' if where else ''}")
    else:
        verdict = Verdict("killed", "certain", f"the process was killed by {name} ({number})")
        if number == 7:
            verdict.evidence.append("SIGBUS is what a write into shared memory gets when /dev/shm is full")
        elif number == 6 and (case.address_space_mib is not None or case.is_below(LOW_PCT)):
            verdict.evidence.append("native code that is refused memory mostly aborts (std::bad_alloc)")
    verdict.signal = number
    _blame_worker(case, verdict)
    return verdict


def _killed(case: Case) -> Verdict:
    """SIGKILL: the one signal that the OOM killer sends, and that everybody else may send as well."""
    found = _out_of_memory(case)
    if found is not None:
        return found
    killer = _userspace_killer(case)
    if killer:
        return _by_userspace(case, "SIGKILL", killer)
    verdict = Verdict("unknown_sigkill", "none", "the process was killed by SIGKILL; nothing tells by whom")
    verdict.evidence += points_against(case)
    return verdict


def _out_of_memory(case: Case) -> Verdict | None:
    if case.kill is not None or case.was_counted:
        text = f"the process was killed by the kernel's OOM killer{at_limit(case)}{at_place(case, ', in ')}"
        verdict = Verdict("out_of_memory", "confirmed", text)
        verdict.evidence += points_for(case)
        return verdict
    # without a count of the own cgroup and without the log there are signs at best
    if case.counted is None and not case.log_readable and case.host_risen and case.is_below(LOW_PCT):
        text = f"the process was probably killed by the kernel's OOM killer{at_limit(case)}{at_place(case, ', in ')}"
        verdict = Verdict("out_of_memory", "likely", text)
        verdict.evidence.append(f"the machine's count of OOM kills rose by {case.host_risen} at that time")
        verdict.evidence.append(no_counter(case))
        return verdict
    return None


def _userspace_killer(case: Case) -> str:
    if case.oomd_risen:
        return "systemd-oomd"
    if not case.is_below(SHORT_PCT):
        return ""
    return ", ".join(case.killers) or (f"the Dask nanny ({case.nanny})" if case.nanny else "")


def _by_userspace(case: Case, name: str, killer: str) -> Verdict:
    if case.oomd_risen:
        verdict = Verdict(
            "userspace_killer", "confirmed", f"the process was killed by systemd-oomd{at_place(case, ', in ')}"
        )
        verdict.evidence.append(
            f"systemd-oomd's mark on the cgroup (user.oomd_kill, user.oomd_ooms) rose by {case.oomd_risen}"
        )
    else:
        text = f"the process was killed by {name}, probably by {killer}, for lack of memory{at_place(case, ', in ')}"
        verdict = Verdict("userspace_killer", "likely", text)
        verdict.evidence.append(f"it runs here and kills when memory is short: {killer}")
    verdict.evidence += points_against(case)
    return verdict


def _without_status(case: Case) -> Verdict:
    """The parent was faster and the kernel is too old to tell, or it is no Linux."""
    how = case.farewell.get("how", "")
    if how == "exception":
        return _raised(case, "exit code unknown")
    if how == "exit":
        return Verdict("clean", "likely", "the process ended in order; nobody told its exit code")
    found = _out_of_memory(case)
    if found is not None:
        return found
    verdict = Verdict("unknown", "none", "the process ended without a word; nobody told its exit status")
    verdict.evidence += points_against(case)
    return verdict


def signal_name(number: int) -> str:
    """SIGTERM for 15; "" for a number that has no name."""
    import _signal  # the module signal would load enum, half a MiB

    names = (name for name, value in vars(_signal).items() if value == number and name.startswith("SIG"))
    # of two names, as SIGABRT and SIGIOT, the first in the alphabet is the one that is known
    return min((name for name in names if not name.startswith("SIG_")), default="")
