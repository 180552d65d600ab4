"""The tables of containers: what stands where, checked before anything is done with it. FORMAT.md tells of both.

What is read here may be anybody's: it is not believed, and takes no more memory than in proportion to what is stored.
This module imports nothing of memtrack but what travels with the artifacts: see ``script``.
"""

from __future__ import annotations

import json
import os
import re
import struct
from array import array
from typing import TYPE_CHECKING, Any, BinaryIO

from memtrack.artifacts.decoding import Damaged, Entry, content_size, decompress

if TYPE_CHECKING:
    from typing import NoReturn, TypeGuard

NOTE, TABLE, TRAILER = 0x184D2A50, 0x184D2A51, 0x184D2A52
"""Magic numbers of the skippable frames: a text, the table as JSON in a zstd frame, and where that is."""
HEAD = struct.Struct("<II")
END = struct.Struct("<IIQ8s")
MARK = b"memtrack"
VERSION = 1

MAX_BLOCK = 4 << 20
MAX_PACK = 64 << 20
MAX_TABLE = 16 << 20
MAX_ENTRIES = 16_384
"""Bytes of a block, of a pack and of a table, and blocks in a pack: more is not written and not read."""
MAX_ITEMS = 1_000_000
"""Values in a table. In memory each takes a hundred bytes or so."""
HEX = re.compile("[0-9a-f]*")
CODINGS = re.compile(r"(plain)|(planes|rotate|delta|idelta)([1248])")


def read_table(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The table of a container, and where it begins. Raises Damaged."""
    size = file.seek(0, os.SEEK_END)
    if size < END.size:
        raise Damaged("it is cut off")
    file.seek(size - END.size)
    magic, length, at, mark = END.unpack(file.read(END.size))
    if magic != TRAILER or length != END.size - HEAD.size or mark != MARK:
        raise Damaged("it is cut off, or none of memtrack's")
    if at + HEAD.size > size - END.size or size - END.size - at - HEAD.size > MAX_TABLE:
        raise Damaged("its table is out of bounds")
    file.seek(at)
    magic, length = HEAD.unpack(file.read(HEAD.size))
    if magic != TABLE or at + HEAD.size + length != size - END.size:
        raise Damaged("its table is not where it says")
    frame = file.read(length)
    declared = content_size(frame)
    if not 0 <= declared <= most_text(length):
        raise Damaged("its table is too large")
    text = decompress(frame, declared)
    if items_of(text) > MAX_ITEMS:
        raise Damaged("its table is too large")
    try:
        table = json.loads(text.decode("ascii"), parse_int=_number, parse_float=_refuse, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        raise Damaged("its table cannot be read") from exc
    if not isinstance(table, dict):
        raise Damaged("its table cannot be read")
    version = table.get("version")
    if type(version) is not int or version != VERSION:
        raise Damaged(f"it is of version {told(version)}, and this reads version {VERSION}")
    return table, at


def items_of(text: bytes) -> int:
    """How many values there are in JSON, and what holds them, at most."""
    return sum(map(text.count, (b",", b":", b"[", b"{")))


def most_text(length: int) -> int:
    """Bytes of a table that takes ``length`` when it is compressed. It is full of digests, which cannot be; what takes
    twenty times as much in memory must not be had for nothing."""
    return min((1 << 20) + 16 * length, MAX_TABLE)


def _number(digits: str) -> int:
    if len(digits) > 20:  # which takes the longer the more there are
        raise Damaged("its table has a number out of bounds")
    return int(digits)


def _refuse(number: str) -> NoReturn:
    raise Damaged(f"its table has {number[:20]} for a number")


def shown(name: str) -> str:
    """A name as it can be printed anywhere, on one line."""
    return name if name.isprintable() else ascii(name)


def told(value: Any) -> str:
    """A value of a stranger's, to be printed."""
    return ascii(value)[:70] if isinstance(value, (str, int)) or value is None else f"a {type(value).__name__}"


def whole(value: Any, most: int = 1 << 62, least: int = 0) -> int:
    """A whole number within bounds. Raises Damaged, as those below."""
    if type(value) is not int or not least <= value <= most:
        raise Damaged(f"its table has {told(value)} for a number")
    return value


def hex_digits(value: Any, length: int) -> str:
    """So many hexadecimal digits."""
    if not isinstance(value, str) or len(value) != length or not HEX.fullmatch(value):
        raise Damaged(f"its table has {told(value)} for a digest")
    return value


def list_of(value: Any, length: int | None = None) -> list[Any]:
    """A list, of so many things if that is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise Damaged("its table has something else for a list")
    return value


class Table:
    """What is known of the blocks of a pack, by their number: eighty bytes for each. Raises Damaged."""

    def __init__(self, file: BinaryIO) -> None:
        table, end = read_table(file)
        if table.get("memtrack") != "pack":
            raise Damaged("it is no pack")
        self._codings: list[tuple[str, int]] = []
        self._sizes, self._places, self._lengths, self._firsts = array("I"), array("Q"), array("I"), array("I")
        self._digests = bytearray()
        self._bases, self._numbers = array("I"), array("Q")
        """Which of ``_packs``, one more, and the number of the block there; 0 if it rests on none."""
        codings: dict[str, tuple[str, int]] = {}
        packs: dict[str, int] = {}
        at = whole(table.get("offset"), end)
        blocks = list_of(table.get("blocks"))
        if len(blocks) > MAX_ENTRIES:
            raise Damaged("it has too many blocks")
        for row in blocks:
            spelled, size, digest, frames, base = list_of(row, 5)
            if not isinstance(spelled, str):
                raise Damaged("a block is coded in a way that this does not know")
            coding, width = codings.get(spelled) or codings.setdefault(spelled, _coding(spelled))
            if whole(size, MAX_BLOCK, 1) % width or len(list_of(frames)) != (1 if coding == "plain" else width):
                raise Damaged("a block has other frames than its coding")
            if (base is None) == (coding in ("delta", "idelta")):
                raise Damaged("a block lacks the one that it tells the difference to")
            pack, number = 0, 0
            if base is not None:
                of, number = list_of(base, 2)
                pack = packs.setdefault(hex_digits(of, 24), len(packs) + 1)
            plane = size // width
            self._codings.append(codings[spelled])
            self._sizes.append(size)
            self._digests += bytes.fromhex(hex_digits(digest, 64))
            self._places.append(at)
            self._firsts.append(len(self._lengths))
            self._lengths.extend(whole(length, plane + plane // 128 + 512) for length in frames)
            self._bases.append(pack)
            self._numbers.append(whole(number))
            at += sum(self._lengths[self._firsts[-1] :])
        if at > end:
            raise Damaged("its blocks are out of bounds")
        self._packs = list(packs)

    def __len__(self) -> int:
        return len(self._sizes)

    def entry(self, number: int) -> Entry:
        """One of the blocks."""
        coding, width = self._codings[number]
        first, base = self._firsts[number], self._bases[number]
        return Entry(
            coding,
            width,
            self._sizes[number],
            self._digests[32 * number : 32 * number + 32].hex(),
            self._places[number],
            self._lengths[first : first + (1 if coding == "plain" else width)],
            (self._packs[base - 1], self._numbers[number]) if base else None,
        )


def _coding(spelled: str) -> tuple[str, int]:
    found = CODINGS.fullmatch(spelled)
    if found is None:
        raise Damaged(f"a block is coded as {told(spelled)}, which this does not know")
    return found[1] or found[2], int(found[3] or 1)


def is_safe(path: Any) -> TypeGuard[str]:
    """Whether a path stays below the folder that it is put into, on any system, and can be printed."""
    # control characters: a terminal does what they say
    if not isinstance(path, str) or len(path) > 4096 or re.search("[\0-\x1f\x7f-\x9f]", path):
        return False
    try:
        parts = path.encode("utf-8", "surrogateescape").split(b"/")
    except UnicodeEncodeError:  # a half of a character
        return False
    if any(part in (b"", b".", b"..") or len(part) > 255 for part in parts):
        return False
    return os.name != "nt" or not re.search(r'[\\:*?"<>|]', path)
