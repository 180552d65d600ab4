"""What the sampler knows of each collector."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from memtrack.collectors.base import Collector, Sample

COST_FACTOR = 3000
"""A collector that took t is asked again no sooner than after 3000 t: no more than 0.03 % of a core each."""

STALE_FACTOR = 200
"""The same for one that knows that its values are out of date. It may be one call ahead of its time, no more."""


class Source:
    """A collector, when it is due, and what it said last."""

    __slots__ = ("collector", "cost_ns", "due_ns", "errors", "high_water", "last", "last_ns", "period_ns", "ran")

    def __init__(self, collector: Collector, now_ns: int) -> None:
        self.collector = collector
        self.period_ns = int(collector.period_s * 1e9)
        self.cost_ns = 0
        """CPU time of the last call."""
        self.due_ns = now_ns
        self.last_ns = 0
        self.last: Sequence[Sample] = ()
        self.high_water: dict[str, float] = {}
        self.ran = False
        """Whether it ran in the current window."""
        self.errors = 0

    def is_due(self, now_ns: int) -> bool:
        """At its time, or sooner if its values are known to be out of date."""
        if now_ns >= self.due_ns:
            return True
        if not self.collector.stale or self.due_ns - now_ns > max(self.period_ns, COST_FACTOR * self.cost_ns):
            return False
        return now_ns >= self.last_ns + max(self.period_ns // 4, STALE_FACTOR * self.cost_ns)
