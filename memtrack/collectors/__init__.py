"""What can be read, one module a place. ``build`` chooses what this system has."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.collectors.base import Collector


def build(
    pid: int, *, exclude: int = 0, platform: str = sys.platform, proc: str = "/proc", root: str = ""
) -> tuple[list[Collector], Callable[[], str]]:
    """The collectors for process ``pid``, and what tells in words which limit binds it.

    ``exclude`` is the agent's own pid, which may stand below the process. ``root`` is put before every cgroup mount
    point.

    Linux is read from ``/proc`` and the cgroup file systems, other systems through psutil. Raises OSError if there is
    no such process.
    """
    if platform != "linux":
        from memtrack.collectors.psutil_ import PsutilCollector

        return [PsutilCollector(pid, exclude=exclude)], lambda: "physical memory"
    from memtrack.collectors.cgroup import CgroupStatCollector, CgroupUsageCollector, LimitWatch
    from memtrack.collectors.host import HostCollector, PressureCollector
    from memtrack.collectors.process import ProcessCollector, ProcessDetailCollector
    from memtrack.collectors.tree import PssCollector, TreeCollector

    process = ProcessCollector(pid, proc)
    watch = LimitWatch(pid, proc, root)
    tree = TreeCollector(pid, exclude=exclude, proc=proc)
    found: list[Collector] = [
        process,
        CgroupUsageCollector(watch),
        ProcessDetailCollector(process, pid, proc),
        tree,
        PssCollector(tree, proc),
        CgroupStatCollector(watch),
        HostCollector(proc),
        PressureCollector(proc),
    ]
    return found, lambda: watch.limits.binding.source if watch.limits.binding else ""
