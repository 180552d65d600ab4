"""The machine: available memory, swap, /dev/shm, and memory pressure."""

from __future__ import annotations

import os

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.collectors.procfs import field_kib, open_held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.collectors.base import Sample


class HostCollector(Collector):
    """``MemAvailable``, swap in use, and ``/dev/shm`` in use."""

    period_s = 2.0

    def __init__(self, proc: str = "/proc", shm: str = "/dev/shm") -> None:
        self._meminfo = open_held(f"{proc}/meminfo")
        self._shm = shm

    def collect(self, now_ns: int) -> Iterable[Sample]:
        if self._meminfo is not None:
            text = self._meminfo.read()
            available = field_kib(text, b"MemAvailable:")
            if available is not None:
                yield metrics.HOST_AVAILABLE, available
            total, free = field_kib(text, b"SwapTotal:"), field_kib(text, b"SwapFree:")
            if total is not None and free is not None:
                yield metrics.HOST_SWAP, total - free
        try:
            space = os.statvfs(self._shm)
        except OSError:
            return
        yield metrics.HOST_DEV_SHM, (space.f_blocks - space.f_bfree) * space.f_frsize / metrics.MIB

    def close(self) -> None:
        if self._meminfo is not None:
            self._meminfo.close()


class PressureCollector(Collector):
    """Pressure stall information: the share of the last 10 s in which at least one task waited for memory.

    A process that thrashes at its limit shows here long before its RSS tells anything; a fast burst of allocations does
    not show at all. Absent on kernels without PSI (before 4.20, or ``psi=0``).
    """

    period_s = 2.0

    def __init__(self, proc: str = "/proc") -> None:
        self._file = open_held(f"{proc}/pressure/memory", 256)

    def collect(self, now_ns: int) -> Iterable[Sample]:
        if self._file is not None:
            text = self._file.read()
            start = text.find(b"avg10=") + 6
            yield metrics.HOST_PRESSURE, float(text[start : text.find(b" ", start)])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
