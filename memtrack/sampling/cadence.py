"""How often to look: fast when memory moves or the limit is near, slowly when nothing happens."""

from __future__ import annotations

FASTEST_S = 0.02
CALM_S = 0.2
SPIKY_S = 0.04
SPIKY_FOR_NS = 60 * 10**9
MOVE_MIB = (4.0, 64.0)
UNLIMITED_MIB = float("inf")


class Cadence:
    """The interval to the next tick, from how fast memory moves and how much room is left.

    The aim is that memory moves by no more than a fiftieth of the headroom (but 4 to 64 MiB) between two ticks. While
    it moves, the interval is at most ``base_s``; when it has not moved for some ticks it relaxes to 0.2 s. A process
    that has shown a spike, up and down again by more than 64 MiB within a second, is watched every 40 ms for a
    minute, because spikes come again and the next one may be no new high-water mark that the kernel would tell.
    """

    __slots__ = ("_base_s", "_interval_s", "_last_mib", "_last_ns", "_low_mib", "_rise_ns", "_spiky_until_ns")

    def __init__(self, base_s: float) -> None:
        self._base_s = base_s
        self._interval_s = base_s
        self._last_mib = -1.0
        self._last_ns = 0
        self._low_mib = 0.0
        self._rise_ns = -SPIKY_FOR_NS
        self._spiky_until_ns = 0

    def next_interval_s(self, now_ns: int, used_mib: float, headroom_mib: float) -> float:
        """The interval to the next tick in seconds, given what is used and what is left now."""
        change = used_mib - self._last_mib if self._last_mib >= 0.0 else 0.0
        seconds = (now_ns - self._last_ns) / 1e9
        self._last_mib, self._last_ns = used_mib, now_ns
        # back to slow in a few steps, so that a short rest in a fast climb is not mistaken for its end
        interval_s = self._interval_s * 1.3
        if change != 0.0 and seconds > 0.0:
            move = min(max(headroom_mib / 50.0, MOVE_MIB[0]), MOVE_MIB[1])
            interval_s = min(interval_s, move * seconds / abs(change))
            if change > MOVE_MIB[1] or change < -MOVE_MIB[1]:
                self._watch_spikes(now_ns, change, used_mib)
            if abs(change) > 1.0:
                interval_s = min(interval_s, self._base_s)
        slowest_s = SPIKY_S if now_ns < self._spiky_until_ns else max(CALM_S, self._base_s)
        self._interval_s = interval_s = max(min(interval_s, slowest_s), FASTEST_S)
        return interval_s

    def spike_seen(self, now_ns: int) -> None:
        """The kernel's high-water mark told of a spike that no sample saw."""
        self._spiky_until_ns = now_ns + SPIKY_FOR_NS

    def _watch_spikes(self, now_ns: int, change: float, used_mib: float) -> None:
        if change > 0.0:
            if now_ns - self._rise_ns > 10**9:
                self._low_mib = used_mib - change
            self._rise_ns = now_ns
        elif now_ns - self._rise_ns < 10**9 and used_mib < self._low_mib + MOVE_MIB[1]:
            self.spike_seen(now_ns)


class Budget:
    """A share of one core that the agent may take, as a bucket of CPU time that fills with the wall clock.

    What is saved in quiet times, up to a minute's worth, may be spent when memory moves. When the bucket is empty the
    cadence is stretched to its slowest until a tenth of it is full again. It starts with what starting up costs.
    """

    __slots__ = ("_balance_ns", "_cap_ns", "_cpu_ns", "_share", "_wall_ns", "exhausted")

    def __init__(self, share: float, now_ns: int, cpu_ns: int, credit_s: float = 0.05) -> None:
        self._share = share
        self._wall_ns = now_ns
        self._cpu_ns = cpu_ns
        self._cap_ns = max(share * 60e9, credit_s * 1e9)
        self._balance_ns = credit_s * 1e9
        self.exhausted = False

    def spend(self, now_ns: int, cpu_ns: int) -> bool:
        """Account for the time since the last call. Returns whether the budget is exhausted."""
        balance_ns = self._balance_ns + (now_ns - self._wall_ns) * self._share - (cpu_ns - self._cpu_ns)
        self._wall_ns, self._cpu_ns = now_ns, cpu_ns
        self._balance_ns = min(balance_ns, self._cap_ns)
        # once empty, wait until a tenth is saved, or ticks would alternate between fast and slow
        self.exhausted = self._balance_ns < (self._cap_ns / 10 if self.exhausted else 0.0)
        return self.exhausted
