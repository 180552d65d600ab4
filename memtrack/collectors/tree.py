"""The training process with its descendants: DataLoader workers, ranks, shells."""

from __future__ import annotations

import os

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.collectors.procfs import PAGE_MIB, HeldFile, field_kib, open_held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.collectors.base import Sample

WORKERS = 8
MAX_PROCESSES = 512
RELIST_TICKS = 10


class Member:
    """A process of the tree, by held descriptors: once it is gone reads fail, whoever has its pid then."""

    __slots__ = ("children", "pid", "pss_mib", "pss_rss_mib", "rss_mib", "statm", "tasks")

    def __init__(self, pid: int, proc: str) -> None:
        self.pid = pid
        self.statm = HeldFile(f"{proc}/{pid}/statm", 256)
        self.children: list[HeldFile] = []
        """The list of children of each thread: the kernel keeps one a thread that forked."""
        self.tasks: list[str] = []
        self.rss_mib = 0.0
        self.pss_mib: float | None = None
        """PSS when it was last read, None if it never was; and RSS at that moment."""
        self.pss_rss_mib = 0.0

    def read_rss(self) -> bool:
        """Whether the process is still there."""
        try:
            self.rss_mib = int(self.statm.read().split(None, 2)[1]) * PAGE_MIB
        except (OSError, IndexError):
            return False
        # the memory of a process that has died but was not reaped yet reads as zero
        return self.rss_mib > 0.0

    def relist_tasks(self, proc: str) -> None:
        """Open the children list of each thread anew, if other threads are there than before."""
        folder = f"{proc}/{self.pid}/task"
        try:
            tasks = os.listdir(folder)
        except OSError:
            return
        if tasks == self.tasks:
            return
        self.tasks = tasks
        self.close_children()
        for task in tasks[:256]:
            file = open_held(f"{folder}/{task}/children")
            if file is not None:
                self.children.append(file)

    def child_pids(self) -> list[int]:
        """Pids of the direct children."""
        pids: list[int] = []
        for file in self.children:
            try:
                pids += map(int, file.read().split())
            except OSError:
                continue
        return pids

    def close_children(self) -> None:
        """Close the children lists."""
        for file in self.children:
            file.close()
        self.children = []

    def close(self) -> None:
        """Close everything."""
        self.close_children()
        self.statm.close()


class TreeCollector(Collector):
    """Once a second: how many processes, the sum of their RSS, and the RSS of each of the first eight workers.

    The sum of RSS is an upper bound: pages that forked workers share are counted once a process. The true figure is
    PSS, see :class:`PssCollector`, which is read more rarely because it is expensive.

    Workers are numbered in the order in which they were first seen, from 0; a number is free again when its worker is
    gone. The ninth and later ones are summed as ``worker/rest``.
    """

    def __init__(self, pid: int, *, exclude: int = 0, proc: str = "/proc") -> None:
        self._proc = proc
        self._exclude = exclude
        self._root = Member(pid, proc)
        self._members: dict[int, Member] = {pid: self._root}
        self._workers: list[int] = []
        self._turn = 0
        self.changed = False
        """Whether processes came or went, or memory moved by more than a twentieth, since this was last reset."""
        self._rss_when_reset = 0.0
        self._has_children_files = os.path.exists(f"{proc}/{pid}/task/{pid}/children")

    def members(self) -> list[Member]:
        """The processes of the tree, the training process first."""
        return list(self._members.values())

    def collect(self, now_ns: int) -> Iterable[Sample]:
        self._walk()
        total = 0.0
        for pid, member in list(self._members.items()):
            if member.read_rss():
                total += member.rss_mib
            else:
                self._drop(pid)
        if not self._members:
            raise ValueError("the process has no memory any more")
        if abs(total - self._rss_when_reset) > 0.05 * total:
            self.changed = True
        yield metrics.TREE_RSS_SUM, total
        yield metrics.TREE_PROCESSES, float(len(self._members))
        yield from self._worker_samples()

    def reset_changed(self) -> None:
        """Forget that the tree has changed: somebody has taken it in as it is now."""
        self.changed = False
        self._rss_when_reset = sum(member.rss_mib for member in self._members.values())

    def _worker_samples(self) -> Iterable[Sample]:
        rest = 0.0
        for pid, member in self._members.items():
            if member is self._root:
                continue
            if pid not in self._workers:
                if 0 in self._workers:
                    self._workers[self._workers.index(0)] = pid
                elif len(self._workers) < WORKERS:
                    self._workers.append(pid)
            if pid in self._workers:
                yield metrics.WORKER_RSS.format(self._workers.index(pid)), member.rss_mib
            else:
                rest += member.rss_mib
        if rest:
            yield metrics.WORKER_RSS.format("rest"), rest

    def _walk(self) -> None:
        """Find processes that came. Those that went are noticed when they are read."""
        if not self._has_children_files:
            self._scan()
            return
        relist = self._turn % RELIST_TICKS == 0
        self._turn += 1
        pending = list(self._members.values())
        for member in pending:
            if relist or not member.children:
                member.relist_tasks(self._proc)
            for pid in member.child_pids():
                found = self._add(pid)
                if found is not None:
                    pending.append(found)

    def _scan(self) -> None:
        """For kernels without CONFIG_PROC_CHILDREN: one pass over all processes for those whose parent is known."""
        parents: dict[int, int] = {}
        for pid in sorted(int(name) for name in os.listdir(self._proc) if name.isdigit()):
            try:
                with open(f"{self._proc}/{pid}/stat", "rb") as file:
                    text = file.read()
                parents[pid] = int(text[text.rindex(b")") + 2 :].split(None, 3)[1])
            except (OSError, ValueError):
                continue
        grown = True
        while grown:
            grown = False
            for pid, parent in parents.items():
                if parent in self._members and self._add(pid) is not None:
                    grown = True

    def _add(self, pid: int) -> Member | None:
        if pid in self._members or pid == self._exclude or len(self._members) >= MAX_PROCESSES:
            return None
        try:
            member = Member(pid, self._proc)
        except OSError:
            return None
        self._members[pid] = member
        self.changed = True
        return member

    def _drop(self, pid: int) -> None:
        self._members.pop(pid).close()
        if pid in self._workers:
            self._workers[self._workers.index(pid)] = 0
        self.changed = True

    def close(self) -> None:
        for member in self._members.values():
            member.close()


class PssCollector(Collector):
    """The memory of the whole tree with shared pages counted once: the sum of PSS from ``smaps_rollup``.

    Reading it walks the page tables: about 11 ms for each GB in 4 KiB pages, during which the target's mmap calls wait.
    So it is asked again only after 3000 times what it cost, and sooner once when the tree has changed. In between each
    process is taken to have grown or shrunk by private pages, as its RSS did. Descendants whose ``smaps_rollup`` may
    not be read (another user's, or not dumpable) count with their RSS; where it is that of the training process
    itself, there is no PSS.
    """

    period_s = 2.0

    def __init__(self, tree: TreeCollector, proc: str = "/proc") -> None:
        self._tree = tree
        self._proc = proc

    @property
    def stale(self) -> bool:  # type: ignore[override]
        return self._tree.changed

    def collect(self, now_ns: int) -> Iterable[Sample]:
        members = self._tree.members()
        for member in members:
            if not self._read(member):
                if member is members[0]:
                    return ()
                member.pss_mib = member.pss_rss_mib = member.rss_mib
        self._tree.reset_changed()
        total = sum(member.pss_mib or 0.0 for member in members)
        return ((metrics.TREE_PSS, total),) if total else ()

    def between(self) -> Iterable[Sample]:
        total = 0.0
        members = self._tree.members()
        for member in members if members and members[0].pss_mib is not None else ():
            if member.pss_mib is not None:
                total += max(member.pss_mib + member.rss_mib - member.pss_rss_mib, 0.0)
        return ((metrics.TREE_PSS, total),) if total else ()

    def _read(self, member: Member) -> bool:
        """Whether it may be read."""
        try:
            with open(f"{self._proc}/{member.pid}/smaps_rollup", "rb", buffering=0) as file:
                text = file.read(4096)
        except (PermissionError, FileNotFoundError):
            return False
        except OSError:
            return True  # it has just died
        pss, rss = field_kib(text, b"\nPss:"), field_kib(text, b"\nRss:")
        if pss is not None and rss is not None:
            member.pss_mib, member.pss_rss_mib = pss, rss
        return True
