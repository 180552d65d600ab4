"""A contestant's process while it works: the processor time and the peaks of memory of it and of what it starts."""

from __future__ import annotations

import functools
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO, NamedTuple

from tests.benchmarks.readings import TICKS, descendants

POLL_S = 0.02
"""How often the peaks of other processes are read: they keep them, but end before they can be asked for the last."""


class Failed(Exception):
    """A contestant has ended too soon; the text is what it left."""


class Work(NamedTuple):
    """What storing or restoring took."""

    cpu_s: float
    """User and system, of the process and all below it."""
    extra_mib: float
    """Peak resident memory of the process beyond what it had after its imports."""
    packer_mib: float | None
    """The same of the process in which memtrack packs; None if there was none."""
    receipt: str
    """What restoring is to be told."""


def work(command: list[str], environ: dict[str, str], folder: Path, receipt: str = "") -> Work:
    """Start a contestant in a folder, let it work, and measure. Raises Failed."""
    log = folder / "log"
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            command,
            env=environ,
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _expect("READY", process.stdout)
            before_mib, before_s = _status(process.pid, "VmRSS"), _cpu_of_tree(process.pid)
            process.stdin.write(f"{receipt}\n")
            process.stdin.flush()
            packers: dict[int, float] = {}
            while not select.select([process.stdout], [], [], POLL_S)[0]:
                for pid in descendants(process.pid):
                    if _is_packer(pid):
                        packers[pid] = max(packers.get(pid, 0.0), _status(pid, "VmHWM"))
            said = _expect("DONE", process.stdout)
            cpu_s = _cpu_of_tree(process.pid) - before_s
            extra_mib = _status(process.pid, "VmHWM") - before_mib
            process.stdin.write("\n")
            process.stdin.flush()
        except (OSError, ValueError):
            process.kill()
            raise Failed(log.read_text(encoding="utf-8", errors="replace")) from None
    packer_mib = max(packers.values()) - packer_imports_mib() if packers else None
    return Work(cpu_s, extra_mib, packer_mib, said)


@functools.cache
def packer_imports_mib() -> float:
    """Resident memory of a process that has only imported what packing needs."""
    code = "import numpy, zstandard; print(next(line for line in open('/proc/self/status') if line[:5] == 'VmRSS'))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[1]) / 1024


def _expect(word: str, stdout: IO[str]) -> str:
    found, _, said = stdout.readline().strip().partition(" ")
    if found != word:
        raise ValueError(found)
    return said


def _is_packer(pid: int) -> bool:
    try:
        return b"artifacts" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _status(pid: int, key: str) -> float:
    """In MiB; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), 0.0)


def _cpu_of_tree(pid: int) -> float:
    """Seconds of a process and all below it, threads and children that have ended included."""
    ticks = 0
    for one in (pid, *descendants(pid)):
        try:
            stat = Path(f"/proc/{one}/stat").read_text(encoding="utf-8")
        except OSError:
            continue
        ticks += sum(map(int, stat[stat.rindex(")") + 2 :].split()[11:15]))
    return ticks / TICKS


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(folder) for name in names)
