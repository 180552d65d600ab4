"""What the frameworks' own memory allocators say: read in the training process, where alone they can be asked.

Only a framework that is loaded and has been initialised by the program is asked; nothing here initialises one, and no
peak is ever reset.
"""

from __future__ import annotations

import sys
from time import monotonic_ns

from memtrack.allocators import jax_, tensorflow_, torch_
from memtrack.allocators.figures import CHARTED, PEAK, PEAK_RESETS
from memtrack.notices import warn_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from memtrack.recording.marks import MarkWriter

    Read = Callable[[], Iterable[tuple[str, dict[str, float]]]]

PERIOD_NS = 1_000_000_000
"""Gauges are set once a second, which is how often the agent samples them."""
DETAILED = 2
"""Of how many devices all figures are kept: there is room for 60 gauges, and the program's own need some."""
FEW = 8
"""How many times running out of memory is told with figures: each such text takes one of the recording's 255 names."""


class Allocators:
    """The allocators of the frameworks that are loaded and initialised. Nothing raises.

    One is shared by all who read, see ``shared``: what it remembers is that a peak was reset or memory ran out.
    """

    def __init__(self) -> None:
        self.details: dict[str, float] = {}
        """What the last ``read`` has found besides, by name of metric: charts of it are there on request."""
        self._sources: dict[str, Read] = {
            "torch": torch_.read,
            "jax": jax_.Reader().read,
            "tensorflow": tensorflow_.read,
        }
        self._detailed: set[str] = set()
        self._peaks_mib: dict[str, float] = {}
        self._resets: dict[str, int] = {}
        self._ooms: dict[str, float] = {}
        self._news: list[tuple[str, float]] = []
        self._due_ns = 0
        self.idle_until_ns = 0
        """Where no allocator is in use, that is looked for once a second, not in each row of the user's; monotonic."""

    def read(self) -> dict[str, float]:
        """Value by name of metric, as ``memory/torch_cuda0/allocated_mib``; nothing of a framework that is not in use.

        Allocated, the peak of that since the process began, and reserved memory in MiB; what the allocator does not
        tell is left out. If somebody else has reset the peak, ``peak_resets`` is there as well, the number of times: a
        reset is seen by the peak being lower than at an earlier reading, one that nobody has read before it has risen
        again is not.
        """
        figures: dict[str, float] = {}
        details: dict[str, float] = {}
        modules = sys.modules
        for name, read in list(self._sources.items()):
            if name in modules:
                try:
                    for scope, found in read():
                        self._take(scope, found, figures, details)
                except Exception as exc:
                    del self._sources[name]
                    text = f"memtrack has no figures of {name}'s allocator ({type(exc).__name__}: {exc})."
                    warn_once(f"allocator {name}", text)
        self.details = details
        return figures

    def publish(self, marks: MarkWriter) -> dict[str, float]:
        """``read``, and leave it in the recording: as gauges once a second, and as an event what has happened.

        Events are that a device's memory ran out, also if the program has caught that, and that a peak was reset.
        """
        now_ns = monotonic_ns()
        if now_ns < self.idle_until_ns:
            return {}
        figures = self.read()
        if not figures:
            self.idle_until_ns = now_ns + PERIOD_NS
        else:
            if self._news or now_ns >= self._due_ns:
                self._due_ns = now_ns + PERIOD_NS
                try:
                    for name, value in (*figures.items(), *self.details.items()):
                        marks.gauge(name, value)
                    # at once, because another thread may be here as well
                    news, self._news = self._news, []
                    for event in news:
                        marks.mark(*event)
                except Exception as exc:
                    warn_once("gauges", f"memtrack could not note what the allocators say ({type(exc).__name__}).")
        return figures

    def _take(self, scope: str, found: dict[str, float], figures: dict[str, float], details: dict[str, float]) -> None:
        self._watch_peak(scope, found)
        self._watch_ooms(scope, found)
        if scope not in self._detailed and len(self._detailed) < DETAILED:
            self._detailed.add(scope)
        for quantity, value in found.items():
            if quantity in CHARTED:
                figures[f"memory/{scope}/{quantity}"] = value
            elif scope in self._detailed:
                details[f"memory/{scope}/{quantity}"] = value

    def _watch_peak(self, scope: str, found: dict[str, float]) -> None:
        peak_mib = found.get(PEAK, 0.0)
        before_mib = self._peaks_mib.get(scope, 0.0)
        self._peaks_mib[scope] = peak_mib
        if peak_mib < before_mib:
            self._resets[scope] = self._resets.get(scope, 0) + 1
            self._news.append((f"peak of {scope} was reset, MiB before", before_mib))
        if scope in self._resets:
            found[PEAK_RESETS] = float(self._resets[scope])

    def _watch_ooms(self, scope: str, found: dict[str, float]) -> None:
        ooms = found.get("ooms", 0.0)
        if ooms > self._ooms.get(scope, 0.0):
            text = f"out of memory on {scope.removeprefix('torch_')}"
            if ooms <= FEW:
                text += f": {found['allocated_mib']:.0f} MiB allocated, {found['reserved_mib']:.0f} reserved"
            self._news.append((text, ooms))
        self._ooms[scope] = ooms


shared = Allocators()
"""What all in this process read, so that each thing that happens is told once."""
