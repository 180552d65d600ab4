"""Where the members of a zip archive lie.

``zipfile`` is not asked: it makes an object of half a kilobyte of each entry there is, before one can tell it to stop.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from memtrack.artifacts.layouts.parts import MAX_PARTS, read_at

if TYPE_CHECKING:
    from typing import BinaryIO

MAGIC = b"PK\3\4"
MAX_DIRECTORY = 16 << 20

_END = struct.Struct("<4s4xHHLLH")
_END64 = struct.Struct("<4s28xQQQ")
_LOCATOR = struct.Struct("<4s4xQ4x")
_ENTRY = struct.Struct("<4s4xHH8xLLHHH8xL")
_LOCAL = struct.Struct("<4s22xHH")
_UNKNOWN = 0xFFFFFFFF
"""Stands where a number has more than 32 bits and is to be found in the extra field."""


class Member(NamedTuple):
    """A file in an archive. ``length`` is what it takes there; ``stored``: it stands there as it is."""

    name: str
    offset: int
    length: int
    stored: bool


def members_of(file: BinaryIO, size: int) -> list[Member]:
    """All members, as they lie in the file.

    Raises ValueError, struct.error or LookupError if the file is no zip archive or has something before it, if members
    overlap, or if there are too many.
    """
    begin, length = _directory(file, size)
    if length > MAX_DIRECTORY:
        raise ValueError("too long a directory")
    directory = read_at(file, begin, length)
    entries = []
    at = 0
    while at < length:
        entry, at = _entry(directory, at)
        entries.append(entry)
        if len(entries) > MAX_PARTS:
            raise ValueError("too many members")
    entries.sort(key=lambda entry: entry.offset)
    members = []
    end = 0
    for name, header, stored_length, stored in entries:
        if not end <= header <= begin - _LOCAL.size:
            raise ValueError("members overlap, or lie outside")
        magic, name_length, extra_length = _LOCAL.unpack(read_at(file, header, _LOCAL.size))
        offset = header + _LOCAL.size + name_length + extra_length
        if magic != MAGIC or offset + stored_length > begin:
            raise ValueError("a member that is not where the directory says")
        members.append(Member(name, offset, stored_length, stored))
        end = offset + stored_length
    return members


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the directory begins, and its length."""
    tail_length = min(size, (1 << 16) + _END.size + _LOCATOR.size)
    tail = read_at(file, size - tail_length, tail_length)
    at = tail.rindex(b"PK\5\6")
    _, _, _, length, begin, comment_length = _END.unpack_from(tail, at)
    end = size - tail_length + at
    if end + _END.size + comment_length != size:
        raise ValueError("something follows the archive")
    if at >= _LOCATOR.size and tail.startswith(b"PK\6\7", at - _LOCATOR.size):
        _, end = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        if end > size:
            raise ValueError("no directory")
        magic, _, length, begin = _END64.unpack(read_at(file, end, _END64.size))
        if magic != b"PK\6\6":
            raise ValueError("no directory")
    if begin + length != end:
        raise ValueError("something precedes the archive")
    return begin, length


def _entry(directory: bytes, at: int) -> tuple[Member, int]:
    """An entry, with the place of its header as offset, and where the next one begins."""
    magic, flags, method, packed, whole, name_length, extra_length, comment_length, offset = _ENTRY.unpack_from(
        directory, at
    )
    if magic != b"PK\1\2":
        raise ValueError("no entry")
    at += _ENTRY.size
    name = directory[at : at + name_length].decode("utf-8", "replace")
    at += name_length
    extra = directory[at : at + extra_length]
    while len(extra) >= 4 and _UNKNOWN in (whole, packed, offset):
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            large = [number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
            whole, packed, offset = (large.pop(0) if old == _UNKNOWN else old for old in (whole, packed, offset))
            break
        extra = extra[4 + length :]
    stored = method == 0 and not flags & 1 and packed == whole
    return Member(name, offset, packed, stored), at + extra_length + comment_length
