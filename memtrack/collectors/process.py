"""The training process itself."""

from __future__ import annotations

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.collectors.procfs import PAGE_MIB, HeldFile, field_kib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.collectors.base import Sample


class ProcessCollector(Collector):
    """Resident memory at every tick from ``statm``, and what the kernel says its highest value was from ``status``.

    Neither depends on the size of the process, but ``status`` takes twice as long. ``VmHWM`` is kept by the kernel
    (since 6.2 from counters that are summed lazily, so it may lag or even fall by some 100 KiB); a rise between two
    reads is the exact height of a spike that no sample saw.

    The memory of a zombie reads as none: ``collect`` then raises ValueError.
    """

    period_s = 0.0

    def __init__(self, pid: int, proc: str = "/proc") -> None:
        self._statm = HeldFile(f"{proc}/{pid}/statm", 128)
        self._status = HeldFile(f"{proc}/{pid}/status")
        self._text = b""
        self._last = b""

    def collect(self, now_ns: int) -> Iterable[Sample]:
        self._last = self._statm.read()
        fields = self._last.split(None, 2)
        if len(fields) < 2 or fields[1] == b"0":
            raise ValueError("the process has no memory any more")
        return ((metrics.RSS, int(fields[1]) * PAGE_MIB),)

    def moved(self) -> bool:
        return self._statm.read() != self._last

    def high_water(self) -> Iterable[Sample]:
        self._text = self._status.read()
        peak = field_kib(self._text, b"VmHWM:")
        return () if peak is None else ((metrics.RSS, peak),)

    def text(self) -> bytes:
        """``status`` as it was read last, at most a second ago."""
        return self._text

    def close(self) -> None:
        self._statm.close()
        self._status.close()


class ProcessDetailCollector(Collector):
    """What the resident memory consists of, every two seconds, from the text that was read for the high-water mark."""

    period_s = 2.0

    KINDS = (
        (metrics.ANON, b"RssAnon:"),
        (metrics.FILE, b"RssFile:"),
        (metrics.SHMEM, b"RssShmem:"),
        (metrics.SWAP, b"VmSwap:"),
    )

    def __init__(self, process: ProcessCollector, pid: int, proc: str = "/proc") -> None:
        self._process = process
        self._stat = HeldFile(f"{proc}/{pid}/stat")
        self._faults = -1
        self._faults_ns = 0

    def collect(self, now_ns: int) -> Iterable[Sample]:
        text = self._process.text()
        for metric, label in self.KINDS:
            value = field_kib(text, label)
            if value is not None:
                yield metric, value
        # field 12 of stat is majflt; fields are counted behind the last bracket because a name may hold spaces
        stat = self._stat.read()
        faults = int(stat[stat.rindex(b")") + 2 :].split(None, 10)[9])
        if self._faults >= 0 and now_ns > self._faults_ns:
            yield metrics.MAJOR_FAULTS, (faults - self._faults) * 1e9 / (now_ns - self._faults_ns)
        self._faults, self._faults_ns = faults, now_ns

    def close(self) -> None:
        self._stat.close()
