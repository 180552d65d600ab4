"""What the benchmarks read of other processes: memory, threads, CPU time, bytes written. Linux only."""

from __future__ import annotations

import os
from typing import NamedTuple

MIB = 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")


class Memory(NamedTuple):
    """Of one process, in MiB: resident, proportional, unique, and of the unique part what was written to."""

    rss: float = 0.0
    pss: float = 0.0
    uss: float = 0.0
    dirty: float = 0.0

    def __add__(self, other: object) -> Memory:
        assert isinstance(other, Memory)
        return Memory(*(mine + its for mine, its in zip(self, other, strict=True)))


def memory(pid: int | str) -> Memory:
    """From ``smaps_rollup``; zeros if the process has gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            kib = {line.split()[0]: int(line.split()[1]) for line in file if line.endswith("kB\n")}
    except OSError:
        return Memory()
    dirty = kib["Private_Dirty:"]
    return Memory(kib["Rss:"] / 1024, kib["Pss:"] / 1024, (dirty + kib["Private_Clean:"]) / 1024, dirty / 1024)


def descendants(pid: int) -> list[int]:
    """Pids of the processes below ``pid``."""
    found = []
    for task in _list(f"/proc/{pid}/task"):
        for child in _read(f"/proc/{pid}/task/{task}/children").split():
            found += [int(child), *descendants(int(child))]
    return found


def cpu_by_thread(pid: int) -> dict[int, float]:
    """Seconds on a processor of each thread that lives, the main thread's id being ``pid``."""
    return {int(task): _cpu(f"/proc/{pid}/task/{task}") for task in _list(f"/proc/{pid}/task")}


def cpu(pid: int) -> float:
    """Seconds on a processor of all threads that live."""
    return sum(cpu_by_thread(pid).values())


def cpu_of_dead(pid: int) -> float:
    """Seconds on a processor of the children that have ended and been waited for."""
    text = _read(f"/proc/{pid}/stat")
    fields = text[text.rindex(")") + 2 :].split() if text else []
    return (int(fields[13]) + int(fields[14])) / TICKS if fields else 0.0


def written_bytes(pid: int) -> tuple[int, int]:
    """What ``write`` was given (not ``send``: sockets do not count), and what is to reach a disk, mapped files too."""
    lines = dict(line.split(": ") for line in _read(f"/proc/{pid}/io").splitlines())
    return int(lines.get("wchar", 0)), int(lines.get("write_bytes", 0))


def _cpu(folder: str) -> float:
    # nanoseconds; /proc/PID/stat counts in hundredths of a second
    precise = _read(f"{folder}/schedstat").split()
    if precise:
        return int(precise[0]) / 1e9
    text = _read(f"{folder}/stat")
    fields = text[text.rindex(")") + 2 :].split() if text else []
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else 0.0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
