"""Where a process's memory cgroup is, and which limit stops it first: cgroup v1, v2, hybrid, nested or namespaced.

A limit on any ancestor kills as surely as one on the process's own cgroup, so every level up to the mount's root is
looked at, and beside them RLIMIT_AS and the machine's memory. All are read through the eyes of the reader: the kernel
renders the paths in ``/proc/PID/cgroup`` and the roots in ``mountinfo`` relative to the cgroup namespace of whoever
opens the file (``cgroups(7)``, ``cgroup_namespaces(7)``), and mount points are those of the reader's own mounts.

``proc`` and ``root`` are injectable: ``root`` is put before every mount point, so a recorded tree serves as a machine.
A file that is missing or may not be read makes its limit absent; nothing here raises OSError.
"""

from __future__ import annotations

import os

from memtrack.metrics import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

UNLIMITED_BYTES = 1 << 62
"""No limit, from here on: cgroup v1 writes "none" as LONG_MAX rounded down to a page, 9223372036854771712 on x86-64."""

SEARCHED_DIRECTORIES = 4096
"""How many cgroups are looked through at most, for a process whose path the cgroup namespace hides."""


class Limit:
    """One limit that applies to the process. ``source`` says whose it is, in words."""

    __slots__ = ("bytes", "source")

    def __init__(self, bytes: int, source: str) -> None:
        self.bytes = bytes
        self.source = source

    @property
    def mib(self) -> float:
        return self.bytes / MIB

    def __repr__(self) -> str:
        return f"Limit({self.bytes}, {self.source!r})"


class Headroom:
    """What is left below one limit, in bytes, never below 0."""

    __slots__ = ("bytes", "limit")

    def __init__(self, bytes: int, limit: Limit) -> None:
        self.bytes = max(bytes, 0)
        self.limit = limit

    def __repr__(self) -> str:
        return f"Headroom({self.bytes}, {self.limit!r})"


class Level:
    """One cgroup v2 with the memory controller: the process's own or an ancestor.

    ``directory`` is where its files are, ``name`` its path in the hierarchy. ``limit`` is None when it has none.
    """

    __slots__ = ("directory", "limit", "name")

    version = 2
    limit_file = "memory.max"
    usage_file = "memory.current"
    peak_file = "memory.peak"
    events_file = "memory.events"

    def __init__(self, directory: str, name: str) -> None:
        self.directory = directory
        self.name = name
        allowed = self.read_bytes(self.limit_file)
        self.limit = None if allowed is None else Limit(allowed, f"cgroup v{self.version} {name} {self.limit_file}")

    def path(self, file: str) -> str:
        return f"{self.directory}/{file}"

    def read_bytes(self, file: str) -> int | None:
        """The byte count in a one-number file; None for "max", v1's "none", and where the file is missing."""
        text = _text(self.path(file)).strip()
        if not text.isdigit() or int(text) >= UNLIMITED_BYTES:
            return None
        return int(text)

    def exists(self) -> bool:
        """Whether the memory controller is here: v2's real root and levels it was not delegated to lack it."""
        return os.path.exists(self.path(self.limit_file)) or os.path.exists(self.path(self.usage_file))

    def holds_descendants(self) -> bool:
        """Whether what descendants use is charged here too: in v2 always."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.directory!r}, {self.name!r})"


class LevelV1(Level):
    """One cgroup of the v1 memory controller."""

    __slots__ = ()

    version = 1
    limit_file = "memory.limit_in_bytes"
    usage_file = "memory.usage_in_bytes"
    peak_file = "memory.max_usage_in_bytes"
    events_file = "memory.oom_control"

    def holds_descendants(self) -> bool:
        """Kernels before 5.11 let a v1 cgroup opt out, and the root is out by default: ``memory.use_hierarchy`` 0."""
        return _text(self.path("memory.use_hierarchy")).strip() != "0"


class Limits:
    """The limits of one process as they stood when they were resolved.

    ``levels`` are its cgroups, innermost first. ``limits`` are those that apply: cgroups from the outermost inwards,
    RLIMIT_AS, physical memory. A cgroup limit of physical memory or more is none.
    """

    __slots__ = ("address_space", "binding", "levels", "limited", "limits", "physical", "pid", "proc", "usage_level")

    def __init__(self, pid: int, levels: tuple[Level, ...], proc: str = "/proc") -> None:
        self.pid = pid
        self.proc = proc
        self.levels = levels
        self.physical = _physical_memory(proc)
        self.address_space = _address_space(pid, proc)
        for level in levels:
            if level.limit is not None and self.physical is not None and level.limit.bytes >= self.physical.bytes:
                level.limit = None
        limited = [level for level in reversed(levels) if level.limit is not None]
        applying = (*[level.limit for level in limited], self.address_space, self.physical)
        self.limits = tuple(limit for limit in applying if limit is not None)
        self.binding: Limit | None = min(self.limits, key=_size, default=None)
        """The smallest, None if not even physical memory is known. Of equals the outermost: it fills first."""
        self.limited = tuple(sorted(limited, key=_level_size))
        """The levels that have a limit, the smallest first, of equals the outermost."""
        self.usage_level: Level | None = (*self.limited, *levels, None)[0]
        """The cgroup whose usage matters: that with the smallest limit, the process's own when none is limited."""

    def headroom(self) -> Headroom | None:
        """What is left below the limit that is nearest now, and which that is: not always the smallest limit.

        A level with siblings can be nearly full while the process's own, smaller one is not. None if nothing is known.
        """
        rooms = [room for room in (self.elsewhere(),) if room is not None]
        for level in self.limited:
            used = level.read_bytes(level.usage_file)
            if level.limit is not None and used is not None:
                rooms.append(Headroom(level.limit.bytes - used, level.limit))
        return min(rooms, key=_size, default=None)

    def elsewhere(self) -> Headroom | None:
        """The lesser of what is left outside cgroups: MemAvailable, and RLIMIT_AS less the address space in use."""
        rooms = []
        available_kib = _number_behind("MemAvailable:", _text(f"{self.proc}/meminfo"))
        if self.physical is not None and available_kib is not None:
            rooms.append(Headroom(available_kib * 1024, self.physical))
        pages = _text(f"{self.proc}/{self.pid}/statm").split()
        if self.address_space is not None and pages:
            size_bytes = int(pages[0]) * os.sysconf("SC_PAGE_SIZE")
            rooms.append(Headroom(self.address_space.bytes - size_bytes, self.address_space))
        return min(rooms, key=_size, default=None)


def resolve(pid: int, proc: str = "/proc", root: str = "") -> Limits:
    """The limits of process ``pid``. A process that has gone keeps the physical limit only."""
    return Limits(pid, cgroup_levels(pid, proc, root), proc)


def cgroup_levels(pid: int, proc: str = "/proc", root: str = "") -> tuple[Level, ...]:
    """The memory cgroups that ``pid`` is charged to, its own first; empty without a memory controller in sight.

    The memory controller is in one hierarchy only: v1 if ``/proc/PID/cgroup`` names it on a line of its own, else v2.
    """
    path_v1: str | None = None
    path_v2: str | None = None
    for line in _text(f"{proc}/{pid}/cgroup").split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            path_v1 = path
        elif number == "0" and not controllers:
            path_v2 = path
    make = Level if path_v1 is None else LevelV1
    own = path_v2 if path_v1 is None else path_v1
    if own is None:
        return ()
    # The reader's own mounts, not the process's: see above. A recorded tree has no "self".
    mounts = _text(f"{proc}/self/mountinfo") or _text(f"{proc}/{pid}/mountinfo")
    for mount_root, point in _memory_mounts(mounts, make.version):
        place = _locate(pid, own, mount_root, root + point)
        if place is not None:
            levels = tuple(_ancestry(make, *place))
            if levels:
                return levels
    return ()


def _ancestry(make: type[Level], base: str, above: list[str], below: list[str]) -> Iterator[Level]:
    """The levels from the process's own up to mount point ``base``, as far as they are charged for it."""
    for depth in range(len(below), -1, -1):
        level = make("/".join([base.rstrip("/"), *below[:depth]]), "/" + "/".join(above + below[:depth]))
        if not level.exists():
            continue
        if depth < len(below) and not level.holds_descendants():
            return
        yield level


def _memory_mounts(text: str, version: int) -> list[tuple[str, str]]:
    """(root, mount point) of each mount that may show the hierarchy, those that show most ancestors first.

    ``proc_pid_mountinfo(5)``: the 4th field is the directory of the hierarchy that the mount shows, the 5th where.
    """
    found: dict[str, str] = {}
    for line in text.split("\n"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(kind) < 3:
            continue
        point = _unescape(fields[4])
        # A later mount on the same point hides the earlier one, whatever it is.
        found.pop(point, None)
        if kind[0] == "cgroup2" if version == 2 else kind[0] == "cgroup" and "memory" in kind[2].split(","):
            found[point] = _unescape(fields[3])
    return sorted(((shown, point) for point, shown in found.items()), key=_named_segments)


def _locate(pid: int, path: str, mount_root: str, base: str) -> tuple[str, list[str], list[str]] | None:
    """Where cgroup ``path`` is in a mount at ``base`` that shows ``mount_root``: (base, names above, names below).

    None if the mount shows another part of the hierarchy.
    """
    below, hidden = _segments(path), _segments(mount_root)
    above = []
    while below and hidden and below[0] == hidden[0]:
        above.append(below.pop(0))
        hidden.pop(0)
    if ".." in below or any(name != ".." for name in hidden):
        return None
    if hidden:
        # The mount was made outside the cgroup namespace and shows levels above it whose names the namespace hides.
        return _search(pid, base, len(hidden), below)
    return base, [name for name in above if name != ".."], below


def _search(pid: int, base: str, depth: int, tail: list[str]) -> tuple[str, list[str], list[str]] | None:
    """Find the cgroup of ``pid`` by its ``cgroup.procs``, ``depth`` unknown names and then ``tail`` below ``base``."""
    candidates: list[list[str]] = [[]]
    for _ in range(depth):
        deeper = []
        for names in candidates:
            deeper += [[*names, child] for child in _children("/".join([base, *names]))]
        candidates = deeper[:SEARCHED_DIRECTORIES]
    wanted = str(pid)
    for names in candidates:
        if wanted in _text("/".join([base, *names, *tail, "cgroup.procs"])).split():
            return base, [], [*names, *tail]
    return None


def _children(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _physical_memory(proc: str) -> Limit | None:
    total_kib = _number_behind("MemTotal:", _text(f"{proc}/meminfo"))
    return None if total_kib is None else Limit(total_kib * 1024, "physical memory")


def _address_space(pid: int, proc: str) -> Limit | None:
    """RLIMIT_AS, the soft one: it is what mmap checks. Past it allocations fail, nothing is killed."""
    soft_bytes = _number_behind("Max address space", _text(f"{proc}/{pid}/limits"))
    return None if soft_bytes is None else Limit(soft_bytes, "RLIMIT_AS")


def _number_behind(label: str, text: str) -> int | None:
    words = text.partition(label)[2].split(None, 1)
    return int(words[0]) if words and words[0].isdigit() else None


def _text(path: str) -> str:
    """The file's content, "" where it is missing, unreadable, or its cgroup was removed while it was read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fsdecode(file.read())
    except OSError:
        return ""


def _unescape(field: str) -> str:
    """Blank, tab, newline and backslash are three octal digits in ``mountinfo``."""
    first, *rest = field.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def _segments(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


def _named_segments(mount: tuple[str, str]) -> int:
    return sum(1 if name != ".." else -1 for name in _segments(mount[0]))


def _size(sized: Limit | Headroom) -> int:
    return sized.bytes


def _level_size(level: Level) -> int:
    return UNLIMITED_BYTES if level.limit is None else level.limit.bytes
