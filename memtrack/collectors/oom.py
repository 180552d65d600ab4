"""Counts of kills by the kernel's OOM killer, and by systemd-oomd, as far as they concern one process.

``oom_kill`` of the process's own cgroup is the count that convicts. In v1 a kill is counted in the victim's own cgroup
only; in v2 ``memory.events`` counts those of all descendants as well, ``memory.events.local`` (since 5.2) does not.
Both count whoever's limit it was, an ancestor's or the machine's. ``/proc/vmstat`` counts those of the whole machine.
"""

from __future__ import annotations

import os

from memtrack.collectors.procfs import open_held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.collectors.cgroup import LimitWatch
    from memtrack.collectors.limits import Level
    from memtrack.collectors.procfs import HeldFile

_VMSTAT_SIZE = 1 << 16
_OOMD_XATTRS = ("user.oomd_kill", "user.oomd_ooms")


class Counter:
    """The ``oom_kill`` of one file, held open: who reads it after a kill may find the cgroup gone."""

    __slots__ = ("_file", "first", "last", "path")

    def __init__(self, file: HeldFile) -> None:
        self._file = file
        self.path = file.path
        self.first = self.last = self._read()
        """The count when this was made, and when it was last read. None: there is no such line (before 4.13)."""

    def risen(self) -> int:
        """By how much it rose since it was read last. Raises OSError if the cgroup has gone."""
        count = self._read()
        before, self.last = self.last, count
        return count - before if count is not None and before is not None and count > before else 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> int | None:
        text = b"\n" + self._file.read()
        start = text.find(b"\noom_kill ")
        words = text[start + 10 : start + 32].split(None, 1) if start >= 0 else []
        return int(words[0]) if words and words[0].isdigit() else None


class KillCounters:
    """The counts of the process's own cgroup and of the machine. Not thread-safe."""

    def __init__(self, watch: LimitWatch, proc: str = "/proc") -> None:
        self._watch = watch
        self._generation = 0
        self.own: Counter | None = None
        """Of the own cgroup; None where none is visible, or it has no such count."""
        self.gone = False
        """Whether the own cgroup had gone when it was last looked for."""
        self.host: Counter | None = _open(f"{proc}/vmstat", _VMSTAT_SIZE)
        self._follow()

    def own_risen(self) -> int:
        """Kills in the own cgroup since the last call. Costs 2 µs."""
        if self._watch.generation != self._generation:
            self._follow()
        if self.own is None:
            return 0
        try:
            return self.own.risen()
        except OSError:
            self.own.close()
            self.own, self.gone = None, True
            self._watch.expire()
            return 0

    def host_risen(self) -> int:
        """Kills on the machine since the last call. Costs 20 µs and more: the kernel adds up all its counters."""
        try:
            return 0 if self.host is None else self.host.risen()
        except OSError:
            return 0

    def close(self) -> None:
        """Close the files."""
        for counter in (self.own, self.host):
            if counter is not None:
                counter.close()
        self.own = self.host = None

    def _follow(self) -> None:
        """The process may have been moved: count where it is now."""
        self._generation = self._watch.generation
        path = ""
        for level in self._watch.limits.levels[:1]:
            path = level.path(level.events_file)
            if level.version == 2 and os.path.exists(f"{path}.local"):
                path += ".local"
        if self.own is not None:
            if self.own.path == path:
                return
            self.own.close()
        self.own = _open(path) if path else None
        self.gone = False


def _open(path: str, size: int = 4096) -> Counter | None:
    file = open_held(path, size)
    if file is None:
        return None
    try:
        counter = Counter(file)
    except OSError:
        counter = None
    if counter is None or counter.first is None:
        file.close()
        return None
    return counter


def oomd_kills(levels: Iterable[Level]) -> int:
    """How many processes systemd-oomd has killed in these cgroups: it leaves the number in an extended attribute."""
    total = 0
    if not hasattr(os, "getxattr"):
        return total
    for level in levels:
        for name in _OOMD_XATTRS:
            try:
                total += int(os.getxattr(level.directory, name))
            except (OSError, ValueError):
                continue
    return total
