"""What a collector is: something that reads values now. The clock belongs to the sampler, the memory to the window."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Sample = tuple[str, float]
    """One reading: metric name and value in the metric's unit. The sampler stamps it with the monotonic time."""


class Collector:
    """Reads values now. Subclass and set ``period_s``; the agent calls from one thread, so no locking is needed.

    ``collect`` may raise OSError or ValueError: the sampler counts it and asks again at the next turn. A value that the
    system does not have is left out, never reported as zero.
    """

    period_s: float = 1.0
    """Seconds between two calls. 0 means at every tick of the sampler (tier 0). The sampler stretches it when the
    collector turns out to be expensive."""

    asked_at_end: bool = False
    """Whether ``collect`` is called once more when a window is cut on request, and when the recording ends."""

    stale: bool = False
    """Set by a collector that knows that what it said last no longer holds, and wants to be asked again early."""

    def collect(self, now_ns: int) -> Iterable[Sample]:
        """The values as they are now. ``now_ns`` is the monotonic time, for those that report rates."""
        raise NotImplementedError

    def moved(self) -> bool:
        """Whether ``collect`` might say something else than it said last. Asked of those that run at every tick."""
        return True

    def high_water(self) -> Iterable[Sample]:
        """High-water marks that the kernel keeps, as they are now.

        A rise since the last call proves that the metric stood this high in between, even if no sample saw it. Asked
        when a window or a phase ends, and once a second.
        """
        return ()

    def between(self) -> Iterable[Sample]:
        """Estimates from what is known without reading anything, for windows in which it is not due.

        Nothing means that the last values are held.
        """
        return ()

    def close(self) -> None:
        """Release held descriptors. Called once."""
