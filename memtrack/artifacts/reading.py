"""Reading containers, and getting blocks and files out of them. FORMAT.md tells how they are laid out.

What is read here may be anybody's: sizes are checked before memory is taken, and each block is compared with its digest
before it is handed out. This module imports nothing of memtrack but what travels with the artifacts: see ``script``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from array import array
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from memtrack.artifacts.decoding import Block, Damaged, Entry, content_size, decode, decompress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
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
MAX_DEPTH = 64
"""Blocks that are restored one from the other; memtrack stops at 8."""
MAX_OPEN = 16
MAX_HELD = 8 * MAX_ENTRIES
"""Packs that are held open, and blocks of which is held where they are."""
PATIENCE = 30_000_000
"""Blocks that are looked up again, because more packs are needed by turns than are held: some minutes."""
SMALLEST = 64
"""Bytes of a block, on average over a file of more than a few."""
HEX = re.compile("[0-9a-f]*")
CODINGS = re.compile(r"(plain)|(planes|rotate|delta|idelta)([1248])")


class File(NamedTuple):
    """A file of an artifact."""

    path: str
    size: int
    mode: int
    digest: str
    ranges: Sequence[tuple[int, int, int, int]]
    """Number of the pack, first block, how many, and the bytes that these come to."""


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
        raise Damaged(f"it is of version {_told(version)}, and this reads version {VERSION}")
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


def _told(value: Any) -> str:
    """A value of a stranger's, to be printed."""
    return ascii(value)[:70] if isinstance(value, (str, int)) or value is None else f"a {type(value).__name__}"


def _whole(value: Any, most: int = 1 << 62, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Damaged(f"its table has {_told(value)} for a number")
    return value


def _hex(value: Any, length: int) -> str:
    if not isinstance(value, str) or len(value) != length or not HEX.fullmatch(value):
        raise Damaged(f"its table has {_told(value)} for a digest")
    return value


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise Damaged("its table has something else for a list")
    return value


class Pack:
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
        at = _whole(table.get("offset"), end)
        blocks = _list(table.get("blocks"))
        if len(blocks) > MAX_ENTRIES:
            raise Damaged("it has too many blocks")
        for row in blocks:
            spelled, size, digest, frames, base = _list(row, 5)
            if not isinstance(spelled, str):
                raise Damaged("a block is coded in a way that this does not know")
            coding, width = codings.get(spelled) or codings.setdefault(spelled, _coding(spelled))
            if _whole(size, MAX_BLOCK, 1) % width or len(_list(frames)) != (1 if coding == "plain" else width):
                raise Damaged("a block has other frames than its coding")
            if (base is None) == (coding in ("delta", "idelta")):
                raise Damaged("a block lacks the one that it tells the difference to")
            pack, number = (0, 0) if base is None else _list(base, 2)
            if base is not None:
                pack = packs.setdefault(_hex(pack, 24), len(packs) + 1)
            plane = size // width
            self._codings.append(codings[spelled])
            self._sizes.append(size)
            self._digests += bytes.fromhex(_hex(digest, 64))
            self._places.append(at)
            self._firsts.append(len(self._lengths))
            self._lengths.extend(_whole(length, plane + plane // 128 + 512) for length in frames)
            self._bases.append(pack)
            self._numbers.append(_whole(number))
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
        raise Damaged(f"a block is coded as {_told(spelled)}, which this does not know")
    return found[1] or found[2], int(found[3] or 1)


class Packs:
    """Blocks by pack and number, out of packs that are opened when they are needed. Not thread-safe.

    Args:
        open_pack: Gets the id of a pack and gives the file; raises FileNotFoundError if there is none.
        sizes: The packs that may be read, and how large each is. None: any.
        tell_lost: What to say behind the name of a pack that is missing or damaged.
    """

    def __init__(
        self,
        open_pack: Callable[[str], BinaryIO],
        sizes: dict[str, int] | None = None,
        tell_lost: Callable[[str], str] = lambda _pack: "",
    ) -> None:
        self._open_pack = open_pack
        self._sizes = sizes
        self._tell_lost = tell_lost
        self._tables: dict[str, Pack] = {}
        self._files: dict[str, BinaryIO] = {}
        self._lost: dict[str, str] = {}
        """What is wrong with packs that cannot be read: they are not asked for again for each block."""
        self._patience = PATIENCE

    def entry(self, pack: str, number: int) -> Entry:
        """What is known of a block. Raises Damaged."""
        table = self._table(pack)
        if number >= len(table):
            raise self._damaged(pack, "it has fewer blocks than it should")
        return table.entry(number)

    def block(self, pack: str, number: int) -> Block:
        """The bytes of a block, which have been compared with their digest. Raises Damaged."""
        entry = self.entry(pack, number)
        chain = [(pack, entry)]
        while entry.base is not None:
            if len(chain) > MAX_DEPTH:
                raise self._damaged(pack, "a block rests on too many others")
            of, entry = entry.base[0], self.entry(*entry.base)
            chain.append((of, entry))
        block = self._decode(chain)
        if not _is_whole(block, chain[0][1]):
            self._decode(chain, is_checked=True)
            raise self._damaged(pack, "a block is not what it was")
        return block

    def close(self) -> None:
        """Close the packs."""
        while self._files:
            self._files.popitem()[1].close()

    def _table(self, pack: str) -> Pack:
        found = self._tables.pop(pack, None)
        if found is None:
            if pack in self._lost:
                raise Damaged(self._lost[pack])
            try:
                found = self._read(pack)
            except FileNotFoundError:
                self._lost[pack] = str(self._missing(pack))
                raise Damaged(self._lost[pack]) from None
            except Damaged as exc:
                self._lost[pack] = str(self._damaged(pack, exc))
                raise Damaged(self._lost[pack]) from exc
        self._tables[pack] = found  # the newest last: the oldest goes first
        return found

    def _read(self, pack: str) -> Pack:
        if self._sizes is not None and pack not in self._sizes:
            raise Damaged("it is needed and not listed")
        found = Pack(self._file(pack))
        held = len(found) + sum(map(len, self._tables.values()))
        while self._tables and held > MAX_HELD:
            held -= len(self._tables.pop(next(iter(self._tables))))
        self._patience -= len(found)
        if self._patience < 0:
            raise Damaged("what it is needed for is scattered over too many packs")
        return found

    def _file(self, pack: str) -> BinaryIO:
        file = self._files.pop(pack, None)
        if file is None:
            while len(self._files) >= MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = self._open_pack(pack)
            size = file.seek(0, os.SEEK_END)
            if size != (size if self._sizes is None else self._sizes[pack]):
                file.close()
                raise Damaged("its size is not what the manifest says")
        self._files[pack] = file
        return file

    def _frames(self, pack: str, entry: Entry) -> list[bytes]:
        file = self._file(pack)
        file.seek(entry.at)
        return [file.read(length) for length in entry.frames]

    def _decode(self, chain: Sequence[tuple[str, Entry]], *, is_checked: bool = False) -> Block:
        """The bytes of a block that rests on others. ``is_checked``: which of them is to blame, if any is."""
        block: Block = None
        for pack, entry in reversed(chain):
            try:
                block = decode(entry, self._frames(pack, entry), block)
            except FileNotFoundError:
                raise self._missing(pack) from None
            except Damaged as exc:
                raise self._damaged(pack, exc) from exc
            if is_checked and not _is_whole(block, entry):
                raise self._damaged(pack, "a block is not what it was")
        return block

    def _missing(self, pack: str) -> Damaged:
        return Damaged(f"pack {pack}.mtz is missing{self._tell_lost(pack)}")

    def _damaged(self, pack: str, what: object) -> Damaged:
        return Damaged(f"pack {pack}.mtz is damaged: {what}{self._tell_lost(pack)}")


def _is_whole(block: Block, entry: Entry) -> bool:
    return hashlib.sha256(block).hexdigest() == entry.digest


class Artifact:
    """An artifact that is open to read: ``files``, and their bytes. ``open_pack`` is as for Packs. Not thread-safe.

    Raises Damaged if the manifest cannot be read.
    """

    def __init__(self, manifest: BinaryIO, open_pack: Callable[[str], BinaryIO]) -> None:
        try:
            self.table, _ = read_table(manifest)
            if self.table.get("memtrack") != "artifact":
                raise Damaged("it is no manifest of an artifact")
            packs = [_list(pack, 2) for pack in _list(self.table.get("packs"))]
            self.packs = [(_hex(pack, 24), _whole(size, MAX_PACK)) for pack, size in packs]
            sizes = dict(self.packs)
            if len(sizes) != len(self.packs):
                raise Damaged("a pack is listed twice")
            self.files = self._all_files(_list(self.table.pop("files", None)))
        except Damaged as exc:
            raise Damaged(f"the manifest cannot be read: {exc}") from exc
        self._packs = Packs(open_pack, sizes, self._tell_lost)
        self._lost_with: dict[int, list[str]] = {}
        """The files that lie in a pack, by its number: made when the first pack is lost."""

    def _all_files(self, rows: list[Any]) -> dict[str, File]:
        files: dict[str, File] = {}
        for at, row in enumerate(rows):
            file = self._file(row)
            if file.path in files:
                raise Damaged(f"{_told(file.path)} is there twice")
            files[file.path] = file
            rows[at] = None  # there may be many
        places = sorted(f"{path}/" for path in files)
        for at in range(1, len(places)):
            if places[at].startswith(places[at - 1]):
                raise Damaged(f"{_told(places[at - 1][:-1])} is a file and a folder")
        return files

    def _file(self, row: Any) -> File:
        if not isinstance(row, dict):
            raise Damaged("its table has something else for a file")
        ranges = []
        for one in _list(row.get("blocks")):
            pack, first, count, size = (_whole(number) for number in _list(one, 4))
            if pack >= len(self.packs):
                raise Damaged("a file is in a pack that is not listed")
            if not count <= size <= count * MAX_BLOCK:
                raise Damaged("a file has blocks of another size than there are")
            ranges.append((pack, first, count, size))
        size = _whole(row.get("size"))
        if sum(one[3] for one in ranges) != size or sum(one[2] for one in ranges) > SMALLEST + size // SMALLEST:
            raise Damaged("a file has another size than its blocks")
        path = row.get("path")
        if not is_safe(path):
            raise Damaged(f"{_told(path)} is no name for a file")
        return File(path, size, _whole(row.get("mode", 0o644), 0o777), _hex(row.get("digest"), 64), ranges)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def blocks(self, file: File, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Block]]:
        """The blocks of a file that lie in the bytes from ``first`` to before ``last``, each with its offset.

        Only the packs of these are opened. Raises Damaged.
        """
        last = file.size if last is None else last
        at = 0
        for number, start, count, size in file.ranges:
            end = at + size
            if end <= first or at >= last:
                at = end
                continue
            pack = self.packs[number][0]
            for block in range(start, start + count):
                size = self._packs.entry(pack, block).size
                if at + size > end:
                    break
                if at + size > first and at < last:
                    yield at, self._packs.block(pack, block)
                at += size
            if at != end:
                raise Damaged(f"pack {pack}.mtz has other blocks than the manifest says{self._tell_lost(pack)}")

    def digest(self, file: File) -> str:
        """What the digests of the file's blocks come to; it must be that of the file."""
        digests = hashlib.sha256()
        for number, start, count, _ in file.ranges:
            for block in range(start, start + count):
                digests.update(bytes.fromhex(self._packs.entry(self.packs[number][0], block).digest))
        return digests.hexdigest()

    def close(self) -> None:
        """Close the packs."""
        self._packs.close()

    def _tell_lost(self, pack: str) -> str:
        if not self._lost_with:
            for file in self.files.values():
                for number in {one[0] for one in file.ranges}:
                    self._lost_with.setdefault(number, []).append(file.path)
        number = next((at for at, (one, _) in enumerate(self.packs) if one == pack), -1)
        lost = self._lost_with.get(number)
        if not lost:
            return "; what is told as a difference to it is lost"
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        return f"; lost with it: {', '.join(shown(path[:200]) for path in lost[:10])}{more}"


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
