"""What the container uses, and how far it is from the limit that kills it.

Two collectors share one ``LimitWatch``: a cheap one for every tick (one ``pread`` a limited level), and one for what
costs the kernel an aggregation over all CPUs (``memory.stat``) or changes rarely (the limits themselves). Usage and
what is derived from it are of the cgroup with the smallest limit; where none is limited, of the process's own cgroup;
absent where there is no memory controller. Kernel facts: ``cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.collectors.limits import LevelV1, resolve
from memtrack.collectors.procfs import open_held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.collectors.base import Sample
    from memtrack.collectors.limits import Level
    from memtrack.collectors.procfs import HeldFile

RESOLVE_NS = 10_000_000_000
"""How long resolved limits are believed. They can be changed, and the process moved, at any time."""

STAT_SIZE = 16384
"""Room for ``memory.stat``: 1 to 2 KiB on today's kernels, and every release adds lines."""


class LimitWatch:
    """The limits of one process, resolved again when they may have changed. Shared by the collectors of a container.

    ``generation`` counts the resolutions that found something new. ``elsewhere`` is the headroom outside cgroups
    (physical memory, RLIMIT_AS) as of the last ``refresh``; None if unknown.
    """

    def __init__(self, pid: int, proc: str = "/proc", root: str = "") -> None:
        self._where = (pid, proc, root)
        self._due_ns: int | None = None
        self._stale = False
        self.limits = resolve(pid, proc, root)
        self.elsewhere = self.limits.elsewhere()
        self.generation = 1

    def refresh(self, now_ns: int) -> None:
        """Read the headroom elsewhere, and resolve the limits if that was at least 10 s ago."""
        if self._due_ns is None:
            self._due_ns = now_ns + RESOLVE_NS
        elif (self._stale or now_ns >= self._due_ns) and self._alive():
            fresh = resolve(*self._where)
            if self._stale or _signature(fresh.levels) != _signature(self.limits.levels):
                self.generation += 1
            self.limits = fresh
            self._stale = False
            self._due_ns = now_ns + RESOLVE_NS
        self.elsewhere = self.limits.elsewhere()

    def expire(self) -> None:
        """Resolve and open anew at the next ``refresh``: a file that was there has gone."""
        self._stale = True

    def _alive(self) -> bool:
        """Whether the process still has memory. Of a dead one the cgroup it had is kept, for its OOM kill count.

        A v1 hierarchy shows a zombie in the root cgroup (``proc_cgroup_show``), which would be believed otherwise.
        """
        pid, proc, _ = self._where
        try:
            with open(f"{proc}/{pid}/statm", "rb", buffering=0) as file:
                return not file.read(64).startswith(b"0 ")
        except OSError:
            return False


class CgroupUsageCollector(Collector):
    """Usage and headroom at every tick. ``nearest`` is the source of the limit with the least headroom, or None.

    ``collect`` raises OSError once the cgroup has been removed.
    """

    period_s = 0.0

    def __init__(self, watch: LimitWatch) -> None:
        self._watch = watch
        self._generation = 0
        self._usage: HeldFile | None = None
        self._peak: HeldFile | None = None
        self._others: list[tuple[HeldFile, int, str]] = []
        self._limit_bytes: int | None = None
        self._source: str | None = None
        self._inherited_bytes = -1
        self._reported_mib = 0.0
        self.nearest: str | None = None

    def collect(self, now_ns: int) -> list[Sample]:
        """Usage in MiB, and the least headroom of all levels in percent of the smallest limit."""
        watch = self._watch
        if watch.generation != self._generation:
            self._open()
        samples: list[Sample] = []
        elsewhere = watch.elsewhere
        if elsewhere is None:
            least_bytes, nearest = None, None
        else:
            least_bytes, nearest = elsewhere.bytes, elsewhere.limit.source
        try:
            if self._usage is not None:
                used_bytes = int(self._usage.read())
                samples.append((metrics.CONTAINER_USAGE, used_bytes / metrics.MIB))
                if self._limit_bytes is not None:
                    room_bytes = self._limit_bytes - used_bytes
                    if least_bytes is None or room_bytes < least_bytes:
                        least_bytes, nearest = room_bytes, self._source
            for file, limit_bytes, source in self._others:
                room_bytes = limit_bytes - int(file.read())
                if least_bytes is None or room_bytes < least_bytes:
                    least_bytes, nearest = room_bytes, source
        except OSError:
            watch.expire()
            raise
        self.nearest = nearest
        binding = watch.limits.binding
        if least_bytes is not None and binding is not None:
            share = least_bytes / binding.bytes if binding.bytes and least_bytes > 0 else 0.0
            samples.append((metrics.CONTAINER_HEADROOM, 100.0 * share))
        return samples

    def moved(self) -> bool:
        """Page cache and neighbours move it all the time: while the process stands still, once a second will do."""
        return False

    def high_water(self) -> list[Sample]:
        """The kernel's own peak of usage: ``memory.peak`` (since 5.19) or ``memory.max_usage_in_bytes``, else nothing.

        It is the peak since the cgroup was made. When another cgroup became the one that binds, its old peak is not a
        rise of this metric, so the last value stands until the kernel's moves.
        """
        if self._peak is None:
            return []
        peak_bytes = int(self._peak.read())
        if peak_bytes != self._inherited_bytes:
            self._inherited_bytes = -1
            self._reported_mib = peak_bytes / metrics.MIB
        return [(metrics.CONTAINER_USAGE, self._reported_mib)]

    def close(self) -> None:
        for file in (self._usage, self._peak, *(other[0] for other in self._others)):
            if file is not None:
                file.close()
        self._usage = self._peak = None
        self._others = []

    def _open(self) -> None:
        """Hold the files of the levels that count now; a level whose usage cannot be read is left out."""
        self.close()
        limits = self._watch.limits
        level = limits.usage_level
        self._limit_bytes = self._source = None
        if level is not None:
            self._usage = open_held(level.path(level.usage_file), 64)
            self._peak = open_held(level.path(level.peak_file), 64)
            if level.limit is not None:
                self._limit_bytes, self._source = level.limit.bytes, level.limit.source
        for other in limits.limited[1:]:
            file = open_held(other.path(other.usage_file), 64)
            if file is not None and other.limit is not None:
                self._others.append((file, other.limit.bytes, other.limit.source))
        if self._peak is not None and self._generation:
            self._inherited_bytes = int(self._peak.read())
        self._generation = self._watch.generation


class CgroupStatCollector(Collector):
    """The limit, what the usage is made of, and OOM kills: every two seconds.

    ``collect`` raises OSError once the cgroup has been removed. All values but the limit are of the cgroup that
    ``CgroupUsageCollector`` reports, descendants included.
    """

    period_s = 2.0

    def __init__(self, watch: LimitWatch) -> None:
        self._watch = watch
        self._generation = 0
        self._usage: HeldFile | None = None
        self._stat: HeldFile | None = None
        self._kernel: HeldFile | None = None
        self._events: list[HeldFile] = []
        self._prefix = b""

    def collect(self, now_ns: int) -> list[Sample]:
        watch = self._watch
        watch.refresh(now_ns)
        if watch.generation != self._generation:
            self._open()
        samples: list[Sample] = []
        if watch.limits.binding is not None:
            samples.append((metrics.CONTAINER_LIMIT, watch.limits.binding.mib))
        try:
            self._collect_stat(samples)
            kills = [_value(b"oom_kill", b"\n" + file.read()) for file in self._events]
        except OSError:
            watch.expire()
            raise
        known = [count for count in kills if count is not None]
        if known:
            samples.append((metrics.CONTAINER_OOM_KILLS, float(sum(known))))
        return samples

    def _collect_stat(self, samples: list[Sample]) -> None:
        """``anon``, ``file`` (tmpfs and shared memory included, in both versions), ``shmem``, ``kernel``."""
        if self._stat is None:
            return
        text = b"\n" + self._stat.read()
        inactive = _value(self._prefix + b"inactive_file", text)
        if self._usage is not None and inactive is not None:
            working_bytes = max(int(self._usage.read()) - inactive, 0)
            samples.append((metrics.CONTAINER_WORKING_SET, working_bytes / metrics.MIB))
        anon, file = (b"total_rss", b"total_cache") if self._prefix else (b"anon", b"file")
        # v2 has "kernel" since 5.18; its parts are no substitute, they do not add up to it.
        kernel = int(self._kernel.read()) if self._kernel is not None else _value(b"kernel", text)
        for name, value in (
            (metrics.CONTAINER_ANON, _value(anon, text)),
            (metrics.CONTAINER_FILE, _value(file, text)),
            (metrics.CONTAINER_SHMEM, _value(self._prefix + b"shmem", text)),
            (metrics.CONTAINER_KERNEL, kernel),
        ):
            if value is not None:
                samples.append((name, value / metrics.MIB))

    def close(self) -> None:
        for file in (self._usage, self._stat, self._kernel, *self._events):
            if file is not None:
                file.close()
        self._usage = self._stat = self._kernel = None
        self._events = []

    def _open(self) -> None:
        self.close()
        self._generation = self._watch.generation
        limits = self._watch.limits
        level = limits.usage_level
        if level is None:
            return
        self._usage = open_held(level.path(level.usage_file), 64)
        self._stat = open_held(level.path("memory.stat"), STAT_SIZE)
        counting = [level]
        self._prefix = b""
        if isinstance(level, LevelV1):
            self._prefix = b"total_"
            self._kernel = open_held(level.path("memory.kmem.usage_in_bytes"), 64)
            # v1 counts a kill in the victim's cgroup only, also when the limit was an ancestor's; v2 in all ancestors.
            counting = list(limits.levels[: limits.levels.index(level) + 1])
        held = [open_held(each.path(each.events_file)) for each in counting]
        self._events = [file for file in held if file is not None]


def container_collectors(
    pid: int, proc: str = "/proc", root: str = ""
) -> tuple[CgroupUsageCollector, CgroupStatCollector]:
    """Both collectors of the container that process ``pid`` is in, over one watch."""
    watch = LimitWatch(pid, proc, root)
    return CgroupUsageCollector(watch), CgroupStatCollector(watch)


def _value(key: bytes, text: bytes) -> int | None:
    """The number on the line ``key 123`` of flat-keyed ``text``, which starts with a newline; None without the line."""
    start = text.find(b"\n" + key + b" ")
    if start < 0:
        return None
    start += len(key) + 2
    return int(text[start : text.find(b"\n", start)])


def _signature(levels: tuple[Level, ...]) -> list[tuple[str, int | None]]:
    return [(level.directory, None if level.limit is None else level.limit.bytes) for level in levels]
