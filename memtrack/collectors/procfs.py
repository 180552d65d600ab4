"""Reading ``/proc`` and cgroup files cheaply: descriptors are held open and read with ``pread``.

A held ``/proc/PID`` descriptor costs a tenth of opening it anew, and is safe against reuse of the pid: it belongs to
the process that had the pid when it was opened, and reads fail with ESRCH once that process is gone.
"""

from __future__ import annotations

import os

from memtrack.metrics import MIB

PAGE_MIB = (os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096) / MIB
"""Size of a page, in which ``statm`` counts."""

INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""Only in this one are pids what the kernel log and drivers call them (``PROC_PID_INIT_INO``)."""


class HeldFile:
    """One small text file, opened once. ``read`` raises OSError if it has gone; not thread-safe."""

    __slots__ = ("_fd", "path", "size")

    def __init__(self, path: str, size: int = 4096) -> None:
        self.path = path
        self.size = size
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        """The content from its beginning, at most ``size`` bytes."""
        return os.pread(self._fd, self.size, 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_held(path: str, size: int = 4096) -> HeldFile | None:
    """The file, or None where it does not exist or may not be read."""
    try:
        return HeldFile(path, size)
    except OSError:
        return None


def field_kib(text: bytes, label: bytes) -> float | None:
    """The number behind ``label`` in a ``Label:   123 kB`` listing, in MiB; None if the line is absent."""
    start = text.find(label)
    if start < 0:
        return None
    start += len(label)
    end = text.find(b"\n", start)
    return int(text[start:end].split(None, 1)[0]) / 1024.0


def start_ticks(pid: int, proc: str = "/proc") -> int:
    """Start time of a process in clock ticks since boot: with the pid it names the process for good.

    Field 22 of ``/proc/PID/stat``; the name in field 2 may hold spaces and brackets, so counting starts behind its last
    bracket. Raises OSError if there is no such process.
    """
    with open(f"{proc}/{pid}/stat", "rb") as file:
        text = file.read()
    return int(text[text.rindex(b")") + 2 :].split()[19])


def pids_are_true(proc: str = "/proc") -> bool:
    """Whether the pids of the kernel log and of drivers are those that this process sees."""
    try:
        return os.readlink(f"{proc}/self/ns/pid") == INITIAL_PID_NAMESPACE
    except OSError:
        return False


def program_name(pid: int, proc: str = "/proc") -> str:
    """What process ``pid`` runs, without the arguments, which may hold secrets: ``train.py``, ``sh``, ``python -c``.

    Of an interpreter it is the script or module. At most 100 characters, all printable; "" if there is no such process.
    """
    try:
        with open(f"{proc}/{pid}/cmdline", "rb") as file:
            words = os.fsdecode(file.read(65536)).split("\0")
        if not words[0]:  # a zombie or a kernel thread
            with open(f"{proc}/{pid}/comm", "rb") as file:
                words = [os.fsdecode(file.read()).strip()]
    except OSError:
        return ""
    # a title that the program gave itself is one word with blanks, and may repeat its arguments
    name = os.path.basename(words[0].split(" ", 1)[0])
    if name.startswith(("python", "pypy")):
        name = _script(words[1:]) or name
    return "".join(char if char.isprintable() else "?" for char in name[:100])


def _script(words: list[str]) -> str:
    """The script or module among the arguments of a Python interpreter."""
    rest = iter(words)
    for word in rest:
        if word.startswith(("-W", "-X", "--")):
            if word in ("-W", "-X", "--check-hash-based-pycs"):
                next(rest, "")
        elif not word.startswith("-"):
            return os.path.basename(word)
        elif "c" in word:
            return "python -c"
        elif "m" in word:
            return word.partition("m")[2] or next(rest, "")
    return ""
