"""What samples belong to besides their window: everything, each open phase, the epoch. One row each."""

from __future__ import annotations

from memtrack import metrics
from memtrack.sampling.window import NO_STEP, Cell, Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from memtrack.sampling.window import Place

STORE_NS = 5 * 10**9
"""How often a row is stored if it has no new maximum."""


class Scope:
    """A phase or an epoch, what is known of it, and what of that has been stored."""

    __slots__ = ("number", "row", "stored_max", "stored_ns")

    def __init__(self, key: int, number: int, now_ns: int) -> None:
        self.row = Row(key, now_ns)
        self.number = number
        """Of an epoch: the how-many-eth it is."""
        self.stored_ns = 0
        self.stored_max = 0.0

    def worth_storing(self, now_ns: int) -> bool:
        """After five seconds, or as soon as the process stood higher than what is stored."""
        cell = self.row.cells.get(metrics.RSS)
        highest = cell.max if cell is not None else 0.0
        if highest <= self.stored_max and now_ns < self.stored_ns + STORE_NS:
            return False
        self.stored_ns, self.stored_max = now_ns, highest
        return True


def keys(place: Place) -> tuple[int, ...]:
    """The rows that a sample at this place belongs to: 0 is everything, then the ids of the phases, and ``~epoch``."""
    return (0, *place.phases) if place.epoch == NO_STEP else (0, *place.phases, ~place.epoch)


class Scopes:
    """The rows of phases and of the epochs that are not over. Not thread-safe.

    ``on_phase`` gets a phase's row, whose ``first`` is the phase's id, when it is worth storing again; ``on_epoch``
    gets an epoch's, with its number and the how-many-eth it is: the numbers may begin anew. Of phases no more than
    ``phase_limit`` are kept. How much the process grew in a phase is a cell of its own, ``metrics.GROWTH``, whose
    ``last`` counts.
    """

    def __init__(
        self, on_phase: Callable[[Row], None], on_epoch: Callable[[Row, int, int], None], phase_limit: int
    ) -> None:
        self._on_phase = on_phase
        self._on_epoch = on_epoch
        self._phase_limit = phase_limit
        self._known: dict[int, Scope] = {}
        self._phases = 0
        self._epochs = 0
        self._refused: set[int] = set()
        self._rss_mib: float | None = None
        self.dropped = 0

    def go_on(self, phases: Iterable[Row], epochs: int) -> None:
        """Go on with the rows of phases known so far, after so many epochs."""
        for row in phases:
            self._known[row.first] = known = Scope(row.first, 0, row.start_ns)
            known.row = row
        self._phases, self._epochs = len(self._known), epochs

    def open(self, place: Place, start_ns: int, now_ns: int, wall_ns: int) -> list[Row]:
        """The rows that a sample at ``place`` belongs to; those that are new began at ``start_ns``."""
        rows = []
        for key in keys(place):
            known = self._known.get(key) or self._begin(key, start_ns)
            if known is not None:
                known.row.end_ns, known.row.end_wall_ns = now_ns, wall_ns
                rows.append(known.row)
        return rows

    def grow(self, place: Place, rss_mib: float | None) -> None:
        """The process has ``rss_mib`` now; what it had less before it grew by at ``place``."""
        if rss_mib is None:
            return
        before, self._rss_mib = self._rss_mib, rss_mib
        if before is None:
            return
        for key in keys(place):
            known = self._known.get(key)
            if known is not None:
                cell = known.row.cells.get(metrics.GROWTH)
                if cell is None:
                    cell = known.row.cells[metrics.GROWTH] = Cell(0.0, known.row.start_ns, place)
                cell.last += rss_mib - before
                cell.min, cell.max = min(cell.min, cell.last), max(cell.max, cell.last)

    def leave(self, places: Sequence[Place], now: Place) -> None:
        """The training has been at these places and is at another now: store what is over, and forget epochs."""
        still = keys(now)
        for key in {key for place in places for key in keys(place)}:
            if key not in still and key in self._known:
                self._store(self._known[key])
                if key < 0:
                    del self._known[key]

    def store(self, place: Place, now_ns: int) -> None:
        """Store what is worth it of what is open."""
        for key in keys(place):
            known = self._known.get(key)
            if known is not None and known.worth_storing(now_ns):
                self._store(known)

    def store_all(self) -> None:
        """Store every row as it stands."""
        for known in self._known.values():
            self._store(known)

    def _begin(self, key: int, start_ns: int) -> Scope | None:
        if key < 0:
            number, self._epochs = self._epochs, self._epochs + 1
        elif self._phases <= self._phase_limit:
            number, self._phases = 0, self._phases + 1
        else:
            if key not in self._refused:
                self._refused.add(key)
                self.dropped += 1
            return None
        known = self._known[key] = Scope(key, number, start_ns)
        return known

    def _store(self, known: Scope) -> None:
        if known.row.first < 0:
            self._on_epoch(known.row, ~known.row.first, known.number)
        else:
            self._on_phase(known.row)
