"""The epochs of a training in a recording: one record each, and of so many that it is full, pairs merged into one.

The record of an epoch lies at its number divided by the width, which is 1 at first and doubles whenever there is no
room: the first of two is written over with both. A reader that finds an epoch in two records, because a kill came in
between, believes the wider one.
"""

from __future__ import annotations

import os
import struct
from binascii import crc32

from memtrack import metrics
from memtrack.recording import layout
from memtrack.sampling.window import NO_STEP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.sampling.window import Cell, Row

_EPOCH = struct.Struct("<IHBxQQqqqqqqdddddd8x")
_NAN = float("nan")


class Epoch:
    """One epoch, or several that follow each other. Memory in MiB, times in monotonic nanoseconds; NaN: not known."""

    __slots__ = (
        "end_ns", "first", "first_number", "growth_mib", "headroom_min_pct", "label", "last", "last_mib", "last_number",
        "max_ns", "peak_mib", "peak_pss_mib", "peak_usage_mib", "phase", "start_ns", "step",
    )  # fmt: skip

    def __init__(self, row: Row, epoch: int, number: int) -> None:
        self.first = self.last = epoch
        """As the program counts them."""
        self.first_number = self.last_number = number
        """As they came: a program may count from 0 again."""
        self.start_ns, self.end_ns = row.start_ns, row.end_ns
        rss: Cell | None = row.cells.get(metrics.RSS)
        self.peak_mib, self.last_mib = (_NAN, _NAN) if rss is None else (rss.max, rss.last)
        self.label, self.phase = (0, 0) if rss is None else (rss.label, rss.phase)
        self.max_ns, self.step = (row.start_ns, NO_STEP) if rss is None else (rss.max_ns, rss.step)
        growth, pss = row.cells.get(metrics.GROWTH), row.cells.get(metrics.TREE_PSS)
        usage, headroom = row.cells.get(metrics.CONTAINER_USAGE), row.cells.get(metrics.CONTAINER_HEADROOM)
        self.growth_mib = _NAN if growth is None else growth.last
        self.peak_pss_mib = _NAN if pss is None else pss.max
        self.peak_usage_mib = _NAN if usage is None else usage.max
        self.headroom_min_pct = _NAN if headroom is None else headroom.min

    @property
    def seconds(self) -> float:
        """From its beginning to its end."""
        return (self.end_ns - self.start_ns) / 1e9

    def merge(self, later: Epoch) -> None:
        """Take in the epochs that follow."""
        self.last, self.last_number, self.end_ns = later.last, later.last_number, later.end_ns
        if not later.peak_mib <= self.peak_mib:
            self.peak_mib, self.max_ns, self.step = later.peak_mib, later.max_ns, later.step
            self.label, self.phase = later.label, later.phase
        self.last_mib = later.last_mib
        self.growth_mib += later.growth_mib
        self.peak_pss_mib = max(self.peak_pss_mib, later.peak_pss_mib)
        self.peak_usage_mib = max(self.peak_usage_mib, later.peak_usage_mib)
        self.headroom_min_pct = min(self.headroom_min_pct, later.headroom_min_pct)

    def copy(self) -> Epoch:
        """An independent copy."""
        twin = Epoch.__new__(Epoch)
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    def pack(self) -> bytes:
        """A record of ``layout.EPOCH_SIZE`` bytes."""
        body = _EPOCH.pack(
            0, self.phase, self.label, self.first_number, self.last_number, self.first, self.last, self.start_ns,
            self.end_ns, self.max_ns, self.step, self.peak_mib, self.last_mib, self.growth_mib, self.peak_pss_mib,
            self.peak_usage_mib, self.headroom_min_pct,
        )[4:]  # fmt: skip
        return crc32(body).to_bytes(4, "little") + body

    @classmethod
    def unpack(cls, record: bytes) -> Epoch | None:
        """The epoch of a record; None if it is empty, torn, damaged, or of a time that cannot be."""
        epoch = cls.__new__(cls)
        (
            crc, epoch.phase, epoch.label, epoch.first_number, epoch.last_number, epoch.first, epoch.last,
            epoch.start_ns, epoch.end_ns, epoch.max_ns, epoch.step, epoch.peak_mib, epoch.last_mib, epoch.growth_mib,
            epoch.peak_pss_mib, epoch.peak_usage_mib, epoch.headroom_min_pct,
        ) = _EPOCH.unpack(record)  # fmt: skip
        if crc == 0 or crc32(record[4:]) != crc or not epoch.first_number <= epoch.last_number < layout.MAX_NUMBER:
            return None
        is_possible = 0 <= epoch.start_ns <= epoch.end_ns < layout.MAX_NUMBER and 0 <= epoch.max_ns < layout.MAX_NUMBER
        return epoch if is_possible else None


class EpochWriter:
    """Writes the records of epochs into the recording behind ``fd``. One writer, one thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept: dict[int, Epoch] = {}
        """By slot."""
        self._before: Epoch | None = None
        """What the slot of the newest epoch had of those before it."""
        self._width = 1

    def go_on(self, epochs: list[Epoch]) -> None:
        """Take up where another agent has stopped: ``epochs`` is what it left."""
        for epoch in epochs:
            self._width = max(self._width, 1 << (epoch.last_number - epoch.first_number).bit_length())
        for epoch in epochs:
            slot = epoch.first_number // self._width
            if slot in self._kept:
                self._kept[slot].merge(epoch)
            else:
                self._kept[slot] = epoch.copy()
        self._before = self._kept[max(self._kept)].copy() if self._kept else None

    def put(self, epoch: Epoch) -> None:
        """Store what is known of an epoch so far: a new one, or again the newest."""
        while epoch.first_number // self._width >= layout.EPOCH_COUNT:
            self._widen()
        slot = epoch.first_number // self._width
        kept = self._kept.get(slot)
        if kept is None:
            self._before = None
        elif kept.last_number < epoch.first_number:
            self._before = kept
        if self._before is not None:
            whole = self._before.copy()
            whole.merge(epoch)
            epoch = whole
        self._write(slot, epoch)

    def _widen(self) -> None:
        self._width *= 2
        kept, self._kept, self._before = self._kept, {}, None
        for slot in sorted(kept):
            half = self._kept.get(slot // 2)
            if half is None:
                self._kept[slot // 2] = kept[slot]
            else:
                half.merge(kept[slot])
        for slot, epoch in self._kept.items():
            self._write(slot, epoch)
        empty = bytes(layout.EPOCH_SIZE * (layout.EPOCH_COUNT - len(self._kept)))
        os.pwrite(self._fd, empty, layout.EPOCHS + len(self._kept) * layout.EPOCH_SIZE)

    def _write(self, slot: int, epoch: Epoch) -> None:
        self._kept[slot] = epoch
        os.pwrite(self._fd, epoch.pack(), layout.EPOCHS + slot * layout.EPOCH_SIZE)


def unpack_epochs(table: bytes) -> list[Epoch]:
    """The epochs that are there, oldest first, each once."""
    size = layout.EPOCH_SIZE
    found = [Epoch.unpack(table[at : at + size]) for at in range(0, len(table), size)]
    whole = sorted(
        (epoch for epoch in found if epoch is not None), key=lambda epoch: (epoch.first_number, -epoch.last_number)
    )
    kept: list[Epoch] = []
    for epoch in whole:
        if not kept or epoch.first_number > kept[-1].last_number:
            kept.append(epoch)
    return kept
