"""What memtrack itself costs, and how well it keeps up."""

from __future__ import annotations

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.collectors.procfs import field_kib, open_held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from memtrack.collectors.base import Sample


class OwnCollector(Collector):
    """The agent's RSS and its share of one core since the last call, and the counters that ``counters`` gives."""

    period_s = 2.0

    def __init__(
        self,
        cpu_clock_ns: Callable[[], int],
        counters: Callable[[], Iterable[Sample]],
        proc: str = "/proc",
    ) -> None:
        self._status = open_held(f"{proc}/self/status")
        self._cpu_clock_ns = cpu_clock_ns
        self._counters = counters
        self._cpu_ns = 0
        self._at_ns = 0

    def collect(self, now_ns: int) -> Iterable[Sample]:
        if self._status is not None:
            rss = field_kib(self._status.read(), b"VmRSS:")
            if rss is not None:
                yield metrics.SELF_AGENT_RSS, rss
        cpu_ns = self._cpu_clock_ns()
        if self._at_ns and now_ns > self._at_ns:
            yield metrics.SELF_CPU, 100.0 * (cpu_ns - self._cpu_ns) / (now_ns - self._at_ns)
        self._cpu_ns, self._at_ns = cpu_ns, now_ns
        yield from self._counters()

    def close(self) -> None:
        if self._status is not None:
            self._status.close()


class GaugeCollector(Collector):
    """The gauges that the training process has set, such as the counters of a framework's allocator."""

    def __init__(self, gauges: Callable[[], Iterable[Sample]]) -> None:
        self._gauges = gauges

    def collect(self, now_ns: int) -> Iterable[Sample]:
        return self._gauges()
