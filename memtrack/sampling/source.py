"""What the sampler knows of each collector and of each phase."""

from __future__ import annotations

from memtrack import metrics
from memtrack.sampling.window import Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from memtrack.collectors.base import Collector, Sample

COST_FACTOR = 3000
"""A collector that took t is asked again no sooner than after 3000 t: no more than 0.03 % of a core each."""

STALE_FACTOR = 200
"""The same for one that knows that its values are out of date. It may be one call ahead of its time, no more."""

PHASE_STORE_NS = 5 * 10**9
"""How often the row of a phase is stored if it has no new maximum."""


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


class PhaseRow:
    """What is known of a phase: a row with the phase's id as ``first``, and what of it has been stored."""

    __slots__ = ("row", "stored_max", "stored_ns")

    def __init__(self, phase: int, now_ns: int) -> None:
        self.row = Row(phase, now_ns)
        self.stored_ns = 0
        self.stored_max = 0.0

    def worth_storing(self, now_ns: int) -> bool:
        """After five seconds, or as soon as the process stood higher than what is stored."""
        cell = self.row.cells.get(metrics.RSS)
        highest = cell.max if cell is not None else 0.0
        if highest <= self.stored_max and now_ns < self.stored_ns + PHASE_STORE_NS:
            return False
        self.stored_ns, self.stored_max = now_ns, highest
        return True
