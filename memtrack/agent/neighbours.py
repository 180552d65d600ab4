"""Who else is there: the largest other processes of a cgroup or of the machine, and known killers among them.

Names are those that the kernel keeps (``comm``, 15 characters); command lines may hold secrets and are not looked at.
"""

from __future__ import annotations

import os
from time import monotonic

from memtrack.collectors.procfs import PAGE_MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memtrack.collectors.limits import Level

MAX_PROCESSES = 4096
MAX_CGROUPS = 256
TIMEOUT_S = 0.1
"""How long is looked at the most: 4,000 processes take so long."""

KILLERS = ("earlyoom", "nohang", "oomd", "systemd-oomd", "bustd", "slurmstepd")
"""Programs that kill others when memory is short, as the kernel calls them."""

TORCH_WORKER = "pt_data_worker"
"""What torch calls the workers of a DataLoader."""

DASK = ("dask", "dask-worker", "dask-nanny", "dask-cuda-worker")
"""Programs that run a Dask nanny, which ends its worker at 95 % of the worker's own limit."""

Process = tuple[int, str, float]
"""Pid, name, RSS in MiB."""


def largest(pids: Iterable[int], leave_out: Iterable[int], count: int = 5, proc: str = "/proc") -> list[Process]:
    """The largest of these processes."""
    deadline = monotonic() + TIMEOUT_S
    unwanted = {*leave_out}
    found: list[tuple[float, int]] = []
    for number, pid in enumerate(pids):
        if number >= MAX_PROCESSES or monotonic() > deadline:
            break
        if pid in unwanted:
            continue
        try:
            with open(f"{proc}/{pid}/statm", "rb", buffering=0) as file:
                pages = int(file.read(256).split(None, 2)[1])
        except (OSError, ValueError, IndexError):
            continue
        if pages:
            found.append((pages * PAGE_MIB, pid))
    found.sort(reverse=True)
    return [(pid, title_of(name_of(pid, proc)), rss_mib) for rss_mib, pid in found[:count]]


def pids_of_cgroup(level: Level) -> Iterator[int]:
    """The processes of a cgroup and those below it."""
    pending = [level.directory]
    for _ in range(MAX_CGROUPS):
        if not pending:
            return
        directory = pending.pop()
        try:
            with open(f"{directory}/cgroup.procs", "rb") as file:
                # 0 stands for one of another pid namespace
                yield from (int(word) for word in file.read().split() if word != b"0")
        except (OSError, ValueError):
            pass
        try:
            with os.scandir(directory) as entries:
                pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            pass


def pids_of_machine(proc: str = "/proc") -> Iterator[int]:
    """All processes that can be seen."""
    try:
        yield from (int(name) for name in os.listdir(proc) if name.isdigit())
    except OSError:
        return


def killers(proc: str = "/proc") -> list[str]:
    """Those of ``KILLERS`` that run."""
    deadline = monotonic() + TIMEOUT_S
    found = set()
    for number, pid in enumerate(pids_of_machine(proc)):
        if number >= MAX_PROCESSES or monotonic() > deadline:
            break
        name = name_of(pid, proc)
        if name in KILLERS:
            found.add(name)
    return sorted(found)


def nanny_of(pid: int, proc: str = "/proc") -> str:
    """The program, if the parent of ``pid`` is a Dask nanny, else "". To be asked while ``pid`` lives."""
    from memtrack.collectors.procfs import program_name

    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            text = file.read()
        parent = program_name(int(text[text.rindex(b")") + 2 :].split(None, 2)[1]), proc)
    except (OSError, ValueError, IndexError):
        return ""
    return parent if parent in DASK else ""


def name_of(pid: int, proc: str = "/proc") -> str:
    """What the kernel calls a process; "" if it has gone."""
    try:
        with open(f"{proc}/{pid}/comm", "rb", buffering=0) as file:
            name = os.fsdecode(file.read(64)).rstrip("\n")
    except OSError:
        return ""
    return "".join(char if char.isprintable() else "?" for char in name)


def title_of(name: str) -> str:
    """A process in words, by its name. ``memtrack_pytorch.watch`` calls the workers of a DataLoader by numbers."""
    if name == TORCH_WORKER:
        return "DataLoader worker"
    kind, _, number = name.partition(" ")
    return f"DataLoader worker {number}" if kind == "DataLoader" and number.isdecimal() else name


def has_sigkill(pid: int, proc: str = "/proc") -> bool:
    """Whether SIGKILL waits for the process, or it has no memory any more: it is as good as dead."""
    try:
        with open(f"{proc}/{pid}/status", "rb", buffering=0) as file:
            text = file.read(4096)
        pending = 0
        for label in (b"\nSigPnd:", b"\nShdPnd:"):
            pending |= int(text.partition(label)[2].split(None, 1)[0], 16)
    except (OSError, ValueError, IndexError):
        return True
    return bool(pending & 1 << 8) or b"\nVmRSS:" not in text
