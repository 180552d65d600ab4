"""Whom the kernel says it has killed for lack of memory: the lines of its OOM killer in ``/dev/kmsg``.

The log is opened when the agent starts and stands at its end then, so that what is read later is new, whatever the
clock in the lines says: it is not disciplined by NTP and may be minutes off after months. Needs CAP_SYSLOG where
``kernel.dmesg_restrict`` is set, as mostly in containers; without it there is no evidence here.
"""

from __future__ import annotations

import os

MAX_RECORDS = 1 << 16
"""Records that are read at once at most; a log of 16 MiB has about so many, and reading them takes 0.1 s."""


class Kill:
    """One process that the OOM killer has killed, with the figures of the log in MiB."""

    __slots__ = ("anon_mib", "cgroup", "limited", "name", "pid", "rss_mib")

    def __init__(self, pid: int, name: str, anon_mib: float, rss_mib: float) -> None:
        self.pid = pid
        """As the initial pid namespace has it."""
        self.name = name
        self.anon_mib = anon_mib
        self.rss_mib = rss_mib
        """Private, file and shared memory together."""
        self.cgroup = ""
        """The victim's cgroup, seen from the root of the hierarchy; "" if the log does not tell."""
        self.limited = ""
        """The cgroup whose limit it was; "/" means the machine's memory, "" that the log does not tell."""

    def __repr__(self) -> str:
        return f"Kill({self.pid}, {self.name!r}, {self.anon_mib:g}, {self.rss_mib:g})"


class KernelLog:
    """New lines of the OOM killer. ``readable`` is False where the log may not be read; then there never are any."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self.close()

    @property
    def readable(self) -> bool:
        """Whether it can be read."""
        return self._fd >= 0

    def kills(self) -> list[Kill]:
        """The kills since the last call."""
        parser = Parser()
        for _ in range(MAX_RECORDS if self._fd >= 0 else 0):
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:
                continue  # lines were overwritten before they were read
            except OSError:
                break
            if not record:
                break
            parser.feed(record)
        return parser.kills

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Parser:
    """Takes records of ``/dev/kmsg``, one at a time, and keeps the kills that they tell of.

    A record is ``priority,sequence,microseconds,flags;text``. Since 4.20 a line with the cgroups precedes the kill::

        oom-kill:constraint=CONSTRAINT_MEMCG,…,oom_memcg=/a,task_memcg=/a/b,task=python,pid=6141,uid=0
        Memory cgroup out of memory: Killed process 6141 (python) total-vm:830588kB, anon-rss:411264kB, …
    """

    def __init__(self) -> None:
        self.kills: list[Kill] = []
        self._told: dict[int, tuple[str, str]] = {}

    def feed(self, record: bytes) -> None:
        """One record, whatever it is about."""
        head, _, rest = record.partition(b";")
        text = rest.partition(b"\n")[0]
        # what programs write into the log has another facility than the kernel's, 0
        if b"kill" not in text.lower() or not head.split(b",", 1)[0].isdigit() or int(head.split(b",", 1)[0]) >= 8:
            return
        if text.startswith(b"oom-kill:"):
            self._cgroups(text)
        elif b"Killed process " in text:
            self._kill(text)

    def _cgroups(self, text: bytes) -> None:
        # looked for from the end: a cgroup's name may hold anything
        rest, _, pid = text.rpartition(b",uid=")[0].rpartition(b",pid=")
        cgroup = rest.rpartition(b",task=")[0].partition(b",task_memcg=")[2]
        limited = b"/"
        if b"oom_memcg=" in rest:
            limited = rest.partition(b",oom_memcg=")[2].partition(b",task_memcg=")[0]
        if pid.isdigit():
            self._told[int(pid)] = os.fsdecode(cgroup), os.fsdecode(limited)

    def _kill(self, text: bytes) -> None:
        pid, _, rest = text.partition(b"Killed process ")[2].partition(b" (")
        name, _, figures = rest.partition(b"total-vm:")
        if not pid.isdigit():
            return
        # the name may hold brackets itself
        shown = os.fsdecode(name[: name.rfind(b")")]) if b")" in name else ""
        anon_mib = _mib(b"anon-rss:", figures)
        kill = Kill(int(pid), shown, anon_mib, anon_mib + _mib(b"file-rss:", figures) + _mib(b"shmem-rss:", figures))
        kill.cgroup, kill.limited = self._told.pop(kill.pid, ("", ""))
        self.kills.append(kill)


def _mib(label: bytes, text: bytes) -> float:
    number = text.partition(label)[2].partition(b"kB")[0]
    return int(number) / 1024.0 if number.isdigit() else 0.0
