"""Getting blocks and files out of packs. FORMAT.md tells how they are laid out.

What is read here may be anybody's: see ``tables``. Each block is compared with its digest before it is handed out. This
module imports nothing of memtrack but what travels with the artifacts: see ``script``.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from memtrack.artifacts.decoding import Block, Damaged, Entry, decode
from memtrack.artifacts.tables import (
    MAX_BLOCK,
    MAX_ENTRIES,
    MAX_PACK,
    Table,
    hex_digits,
    is_safe,
    list_of,
    read_table,
    shown,
    told,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MAX_DEPTH = 64
"""Blocks that are restored one from the other; memtrack stops at 8."""
MAX_OPEN = 16
MAX_HELD = 8 * MAX_ENTRIES
"""Packs that are held open, and blocks of which is held where they are."""
PATIENCE = 30_000_000
"""Blocks that are looked up again, because more packs are needed by turns than are held: some minutes."""
SMALLEST = 64
"""Bytes of a block, on average over a file of more than a few."""


class File(NamedTuple):
    """A file of an artifact."""

    path: str
    size: int
    mode: int
    digest: str
    ranges: Sequence[tuple[int, int, int, int]]
    """Number of the pack, first block, how many, and the bytes that these come to."""


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
        self._tables: dict[str, Table] = {}
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

    def _table(self, pack: str) -> Table:
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

    def _read(self, pack: str) -> Table:
        if self._sizes is not None and pack not in self._sizes:
            raise Damaged("it is needed and not listed")
        found = Table(self._file(pack))
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
            packs = [list_of(pack, 2) for pack in list_of(self.table.get("packs"))]
            self.packs = [(hex_digits(pack, 24), whole(size, MAX_PACK)) for pack, size in packs]
            sizes = dict(self.packs)
            if len(sizes) != len(self.packs):
                raise Damaged("a pack is listed twice")
            self.files = self._all_files(list_of(self.table.pop("files", None)))
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
                raise Damaged(f"{told(file.path)} is there twice")
            files[file.path] = file
            rows[at] = None  # there may be many
        places = sorted(f"{path}/" for path in files)
        for at in range(1, len(places)):
            if places[at].startswith(places[at - 1]):
                raise Damaged(f"{told(places[at - 1][:-1])} is a file and a folder")
        return files

    def _file(self, row: Any) -> File:
        if not isinstance(row, dict):
            raise Damaged("its table has something else for a file")
        ranges = []
        for one in list_of(row.get("blocks")):
            pack, first, count, size = (whole(number) for number in list_of(one, 4))
            if pack >= len(self.packs):
                raise Damaged("a file is in a pack that is not listed")
            if not count <= size <= count * MAX_BLOCK:
                raise Damaged("a file has blocks of another size than there are")
            ranges.append((pack, first, count, size))
        size = whole(row.get("size"))
        if sum(one[3] for one in ranges) != size or sum(one[2] for one in ranges) > SMALLEST + size // SMALLEST:
            raise Damaged("a file has another size than its blocks")
        path = row.get("path")
        if not is_safe(path):
            raise Damaged(f"{told(path)} is no name for a file")
        return File(path, size, whole(row.get("mode", 0o644), 0o777), hex_digits(row.get("digest"), 64), ranges)

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
