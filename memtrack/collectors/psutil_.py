"""macOS and Windows: what psutil can tell. Quantities that these systems do not have are absent."""

from __future__ import annotations

import psutil

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.metrics import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.collectors.base import Sample


def exists(pid: int) -> bool:
    """Whether there is a process with this pid."""
    return bool(psutil.pid_exists(pid))


class PsutilCollector(Collector):
    """RSS of the process at every tick, its tree and the machine once a second.

    RSS is the working set on Windows and excludes compressed pages on macOS. There is no PSS, no cgroup and no PSI on
    these systems; the limit is physical memory. psutil's errors come out as OSError, the collector's contract.
    """

    period_s = 0.0

    def __init__(self, pid: int, *, exclude: int = 0) -> None:
        try:
            self._process = psutil.Process(pid)
        except psutil.Error as exc:
            raise ProcessLookupError(f"no process {pid}") from exc
        self._exclude = exclude
        self._slow_due_ns = 0
        self._peak_mib: float | None = None

    def collect(self, now_ns: int) -> Iterable[Sample]:
        try:
            memory = self._process.memory_info()
            # Windows keeps the highest working set; elsewhere psutil has no such field
            peak = getattr(memory, "peak_wset", None)
            self._peak_mib = None if peak is None else peak / MIB
            samples = [(metrics.RSS, memory.rss / MIB)]
            if now_ns >= self._slow_due_ns:
                self._slow_due_ns = now_ns + 10**9
                samples += self._slow_samples(memory.rss)
        except psutil.Error as exc:
            raise ProcessLookupError(str(exc)) from exc
        return samples

    def high_water(self) -> Iterable[Sample]:
        return () if self._peak_mib is None else ((metrics.RSS, self._peak_mib),)

    def _slow_samples(self, own_rss: int) -> list[Sample]:
        total, count = own_rss, 1
        for child in self._process.children(recursive=True):
            if child.pid == self._exclude:
                continue
            try:
                total += child.memory_info().rss
                count += 1
            except psutil.Error:
                continue
        host = psutil.virtual_memory()
        return [
            (metrics.TREE_RSS_SUM, total / MIB),
            (metrics.TREE_PROCESSES, float(count)),
            (metrics.HOST_AVAILABLE, host.available / MIB),
            (metrics.HOST_SWAP, psutil.swap_memory().used / MIB),
            (metrics.CONTAINER_LIMIT, host.total / MIB),
            (metrics.CONTAINER_HEADROOM, 100.0 * host.available / host.total),
        ]
