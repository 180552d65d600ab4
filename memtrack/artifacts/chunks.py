"""Cutting bytes where their content says so: what is inserted into a file changes the chunks around it, and no others.

A cut is where a hash over the 32 bytes before it has certain bits zero. Most places are ruled out by the last 8 of
these alone, so that it takes one multiplication a byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIN_BYTES, MEAN_BYTES, MAX_BYTES = 64 << 10, 256 << 10, 1 << 20
"""Of a chunk. Smaller ones would find a few more repeats, in data versions at most a tenth, and compress worse."""

WINDOW = 32
_STRIDE = 1 << 18
_FIRST_BITS = 8
_OTHER_BITS = 10
"""Together 2**18 places to a cut: the mean beyond the smallest chunk."""
# any odd numbers whose bits are well mixed: here the fractional parts of square roots of primes
_FACTORS = np.array([0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1], np.uint64)


def cuts(data: Any) -> Any:
    """The places in ``data``, bytes in an array, at which a chunk may end: offsets in ascending order."""
    found = []
    for phase in range(8):
        count = (len(data) - phase) // 8
        if count < 1:
            continue
        # a constant more: else every place among zeros would be one
        words = data[phase : phase + 8 * count].view("<u8") ^ _FACTORS[3]
        first = np.flatnonzero((words * _FACTORS[0]) >> np.uint64(64 - _FIRST_BITS) == 0)
        first = first[first >= WINDOW // 8 - 1]
        sums = np.zeros(len(first), np.uint64)
        for back, factor in enumerate(_FACTORS):
            sums = (sums ^ words[first - back]) * factor
        first = first[sums >> np.uint64(64 - _OTHER_BITS) == 0]
        found.append(first * 8 + 8 + phase)
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)


def chunks(read: Callable[[int], bytes], length: int) -> Iterator[bytes]:
    """The next ``length`` bytes that ``read`` gives, cut by content; ends early where it does.

    Holds 2 MiB at the most.
    """
    held, ends = b"", np.empty(0, np.int64)
    scanned, left = 0, length
    while True:
        while len(held) < MAX_BYTES and left:
            more = read(min(_STRIDE, left))
            left = left - len(more) if more else 0
            held += more
        if not held:
            return
        if scanned < len(held):
            # the windows that reach back over what has been looked at already
            start = max(scanned - WINDOW + 1, 0)
            fresh = cuts(np.frombuffer(held, np.uint8)[start:]) + start
            ends = np.concatenate([ends, fresh[fresh > scanned]])
            scanned = len(held)
        at = int(np.searchsorted(ends, MIN_BYTES))
        end = min(int(ends[at]) if at < len(ends) else MAX_BYTES, MAX_BYTES, len(held))
        yield held[:end]
        held, ends, scanned = held[end:], ends[ends > end] - end, scanned - end
