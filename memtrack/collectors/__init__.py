"""What can be read, one module a place. ``build`` chooses what this system has."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from memtrack.collectors.base import Collector
    from memtrack.collectors.cgroup import CgroupUsageCollector, LimitWatch
    from memtrack.collectors.nvml import Gpus
    from memtrack.collectors.tree import TreeCollector


class Sight:
    """What the collectors know besides their samples; None where this system has no such thing."""

    __slots__ = ("gpus", "tree", "usage", "watch")

    def __init__(
        self,
        watch: LimitWatch | None = None,
        usage: CgroupUsageCollector | None = None,
        tree: TreeCollector | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        self.watch = watch
        self.usage = usage
        self.tree = tree
        self.gpus = gpus

    def limit_source(self) -> str:
        """Which limit binds the process, in words; "" if none is known."""
        if self.watch is None:
            return "physical memory"
        binding = self.watch.limits.binding
        return binding.source if binding else ""


def build(
    pid: int,
    *,
    exclude: int = 0,
    environ: Mapping[str, str] | None = None,
    choice: str = "default",
    platform: str = sys.platform,
    proc: str = "/proc",
    root: str = "",
) -> tuple[list[Collector], Sight]:
    """The collectors for process ``pid``, and what else they know.

    ``exclude`` is the agent's own pid, which may stand below the process. ``environ`` is the environment of the
    process; None: the one that it was started with. ``choice`` is what is charted, as in the header of a recording.
    ``root`` is put before every cgroup mount point, and before ``/dev``.

    Linux is read from ``/proc`` and the cgroup file systems, other systems through psutil. Raises OSError if there is
    no such process.
    """
    if platform != "linux":
        from memtrack.collectors.psutil_ import PsutilCollector

        return [PsutilCollector(pid, exclude=exclude)], Sight()
    from memtrack.collectors.cgroup import CgroupStatCollector, CgroupUsageCollector, LimitWatch
    from memtrack.collectors.host import HostCollector, PressureCollector
    from memtrack.collectors.process import ProcessCollector, ProcessDetailCollector
    from memtrack.collectors.tree import PssCollector, TreeCollector

    process = ProcessCollector(pid, proc)
    watch = LimitWatch(pid, proc, root)
    tree = TreeCollector(pid, exclude=exclude, proc=proc)
    usage = CgroupUsageCollector(watch)
    found: list[Collector] = [
        process,
        usage,
        ProcessDetailCollector(process, pid, proc),
        tree,
        PssCollector(tree, proc),
        CgroupStatCollector(watch),
        HostCollector(proc),
        PressureCollector(proc),
    ]
    gpus = None
    if has_nvidia(proc, root):
        from memtrack.collectors.cuda_devices import environment_of
        from memtrack.collectors.nvml import GpuMemoryCollector, GpuProcessCollector, Gpus

        if environ is None:
            environ = environment_of(pid, proc)
        if environ is not None:
            gpus = Gpus(environ, choice, proc=proc)
            found += [GpuMemoryCollector(gpus), GpuProcessCollector(gpus, tree)]
    return found, Sight(watch, usage, tree, gpus)


def has_nvidia(proc: str = "/proc", root: str = "") -> bool:
    """Whether NVIDIA's driver is there, and devices of it may be seen here."""
    return os.path.exists(f"{root}/dev/nvidiactl") and os.path.exists(f"{proc}/driver/nvidia")
