"""Ranks of a distributed training: the control word that says which one a process is, and who belongs together."""

from __future__ import annotations

import os

from memtrack.recording import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from memtrack.recording.reader import RecordingReader

_MOST = (1 << 24) - 1


class Rank:
    """Rank ``number`` of ``world``; ``local`` is its number on its node, None if that is not known."""

    __slots__ = ("local", "number", "world")

    def __init__(self, number: int, world: int, local: int | None = None) -> None:
        self.number = number
        self.world = world
        self.local = local

    def __repr__(self) -> str:
        return f"Rank({self.number}, {self.world}, {self.local})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rank) and self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]

    def pack(self) -> int:
        """The control word; 0, which says nothing, for one rank alone and for what cannot be."""
        local = -1 if self.local is None else self.local
        if not (1 < self.world <= _MOST and 0 <= self.number < self.world and -1 <= local < 0xFFFF):
            return 0
        return self.world << 40 | self.number << 16 | (local + 1)

    @classmethod
    def unpack(cls, word: int) -> Rank | None:
        """What a control word says; None if it says nothing, or what cannot be."""
        rank = cls(word >> 16 & _MOST, word >> 40, (word & 0xFFFF) - 1 if word & 0xFFFF else None)
        return rank if rank.pack() else None


def rank_of(reader: RecordingReader) -> Rank | None:
    """The rank of the process of a recording; None if it is none of a distributed training, or not yet."""
    return Rank.unpack(reader.control(layout.RANK))


def identity(fields: Mapping[str, str]) -> str:
    """What names a process on its machine, as ``launcher`` in the header of its children's recordings does."""
    return f"{fields.get('pid')}:{fields.get('start_ticks')}"


def are_siblings(own: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether the processes with these headers may be ranks of one training on one node.

    They have the same launcher, or one has launched the other, as Lightning's first rank does.
    """
    if any(own.get(key) != other.get(key) for key in ("boot_id", "pid_ns")):
        return False
    launcher = other.get("launcher", "")
    return launcher != "" and launcher in (own.get("launcher"), identity(own))


def is_of(reader: RecordingReader, owner: int) -> bool:
    """Whether the file belongs to user ``owner``: what others put into the folder is not asked."""
    return os.fstat(reader.fileno()).st_uid == owner
