"""From files to packs and a manifest: what is stored already is referred to, the rest is coded, block by block."""

from __future__ import annotations

import hashlib
import os
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from memtrack.artifacts import codecs
from memtrack.artifacts.base import Earlier
from memtrack.artifacts.chunks import MIN_BYTES, chunks
from memtrack.artifacts.codecs import WIDTHS, Codec, Coded
from memtrack.artifacts.container import PackWriter, Written, write_manifest
from memtrack.artifacts.layouts import layout_of
from memtrack.artifacts.ledger import Located
from memtrack.artifacts.tables import is_safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memtrack.artifacts.layouts import Layout
    from memtrack.artifacts.ledger import Ledger

BLOCK_BYTES = 1 << 20
"""Of numbers. Larger blocks compress as well (1.2197 with 64 KiB, 1.2204 with 16 MiB) and take more memory."""
MAX_DEPTH = 8
"""Blocks that rest on each other: the next one is a key frame, so that restoring it does not take ever longer."""
MAX_LAID = 2048
MAX_FILES = 50_000
"""What is known of each is held in memory, here and where it is restored."""
SMALL_BYTES = 512
"""Of a block that is not worth being cut into planes."""
PROGRESS_S = 0.2


class Source(NamedTuple):
    """A file to be packed."""

    path: str
    """In the artifact, with slashes."""
    opened: str
    """Where to read it."""
    mode: int
    state: tuple[int, int]
    """Its size in bytes, and when it was written to last in nanoseconds of Unix time, as it was to be stored."""


class Progress(NamedTuple):
    """How far it is, in bytes."""

    done: int
    total: int
    stored: int
    """What ``done`` comes to so far, in packs."""


class Packed(NamedTuple):
    """An artifact whose packs have all been made."""

    manifest: Written
    packs: list[str]
    """Ids of all that it needs, earlier ones included."""
    is_plain: bool
    """Whether ``zstd -dc`` of the packs is the file."""
    raw_bytes: int
    new_bytes: int
    """Of its files, and of what was not stored before, as it is stored."""
    has_numbers: bool
    """Whether the next artifact can be told as a difference to this one."""
    changed: list[str]
    """Files that were written to after they were to be stored; what is stored is what they were when they were read,
    or, of one that was written to all the time, parts of this and that."""


class _Place(NamedTuple):
    """A block in an artifact: the number of its pack among those of the artifact, and its own in the pack."""

    pack: int
    number: int
    size: int


class Packer:
    """Packs one artifact. Not thread-safe.

    Args:
        ledger: What is stored.
        folder: Where packs are made; at most one at a time is unfinished.
        on_pack: Gets each pack that has to be stored: one that was just completed, or one that an earlier attempt has
            left. May block, to let storing catch up.
        on_progress: Gets how far it is, some five times a second.
        name: The artifact.
        compress: "auto", "max" or "off".
        earlier: The checkpoint before, to tell the difference to.
        with_md5: Whether the md5 of packs is wanted.
    """

    def __init__(
        self,
        ledger: Ledger,
        folder: str,
        on_pack: Callable[[str], None],
        on_progress: Callable[[Progress], None],
        *,
        name: str,
        compress: str = "auto",
        earlier: Earlier | None = None,
        with_md5: bool = False,
    ) -> None:
        self._ledger = ledger
        self._folder = folder
        self._on_pack = on_pack
        self._on_progress = on_progress
        self._name = name
        self._is_raw = compress == "off"
        self._codec = Codec(is_max=compress == "max")
        self._earlier = earlier
        self._with_md5 = with_md5
        self._pack: PackWriter | None = None
        self._fresh: dict[bytes, Located] = {}
        """The blocks of the pack that is being made."""
        self._packs: list[str] = []
        """Of the artifact, in the order in which it came to need them. "" for the one that is being made."""
        self._numbers: dict[str, int] = {}
        self._needed: dict[str, None] = {}
        self._laid: list[tuple[str, int, bytes, str, int]] = []
        self._made: dict[str, int] = {}
        """Packs made here, and how many blocks they have."""
        self._changed: list[str] = []
        self._done = self._total = self._stored = 0
        self._next_progress = 0.0

    def pack(self, sources: list[Source], step: int | None, note: Callable[[str], str]) -> Packed:
        """Pack the files and write the manifest.

        ``note`` makes the text at its head from what is special about it. Raises OSError, and ValueError if the files
        could not be restored: too many, or names that no reader takes.
        """
        _check(sources)
        self._total = sum(os.stat(source.opened).st_size for source in sources)
        try:
            files = [self._file(source) for source in sources]
            self._finish_pack()
            self._lay()
        except BaseException:
            if self._pack is not None:
                self._pack.discard()
            raise
        self._tell_progress(at_once=True)
        is_plain = self._is_plain(files)
        sizes = {pack: found[0] for pack in self._needed if (found := self._ledger.pack(pack)) is not None}
        order = [*self._packs, *(pack for pack in self._needed if pack not in self._numbers)]
        table = {
            "name": self._name,
            "step": step,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "raw_bytes": (raw_bytes := sum(file["size"] for file in files)),
            "new_bytes": self._stored,
            "files": files,
            "packs": [[pack, sizes[pack]] for pack in order],
        }
        plain = f"\nOr: zstd -dc {' '.join(f'memtrack/packs/{pack}.mtz' for pack in self._packs)}" if is_plain else ""
        written = write_manifest(os.path.join(self._folder, f"manifest-{os.getpid()}.part"), table, note(plain))
        has_numbers = any(file["layout"] != "bytes" for file in files)
        return Packed(written, order, is_plain, raw_bytes, self._stored, has_numbers, self._changed)

    # -- a file -------------------------------------------------------------------------------------------------------

    def _file(self, source: Source) -> dict[str, Any]:
        with open(source.opened, "rb", buffering=0) as file:
            state = state_of(os.fstat(file.fileno()))
            found = self._read(source, file, state[0])
            after = state_of(os.fstat(file.fileno()))
            if after != state:
                # once more: what has not changed is there already
                self._total += after[0]
                found = self._read(source, file, after[0])
            if after != source.state or state_of(os.fstat(file.fileno())) != after:
                self._changed.append(source.path)
            return found

    def _read(self, source: Source, file: BinaryIO, size: int) -> dict[str, Any]:
        layout = layout_of(file, size)
        digests, read = hashlib.sha256(), 0
        ranges: list[list[int]] = []
        for key, number, dtype, offset, block in _blocks(file, layout):
            digest = hashlib.sha256(block).digest()
            digests.update(digest)
            _add_to(ranges, self._place(block, digest, dtype, (key, number)))
            self._lay((key, number, digest, source.path, offset))
            read += len(block)
            self._done += len(block)
            self._tell_progress()
        return {
            "path": source.path,
            "size": read,
            "mode": source.mode,
            "layout": layout.kind,
            "digest": digests.hexdigest(),
            "blocks": ranges,
        }

    def _place(self, block: bytes, digest: bytes, dtype: str, where: tuple[str, int]) -> _Place:
        known = self._fresh.get(digest) or self._find(digest)
        if known is None:
            known = self._add(block, digest, dtype, where)
        if known.pack not in self._numbers:
            self._numbers[known.pack] = len(self._packs)
            self._packs.append(known.pack)
        return _Place(self._numbers[known.pack], known.number, known.size)

    def _find(self, digest: bytes) -> Located | None:
        """Where the block is, if it is in a pack that is complete; its packs are needed from now on."""
        known, needed = self._complete(digest)
        self._need(needed)
        return known

    def _complete(self, digest: bytes) -> tuple[Located | None, list[str]]:
        """Where the block is, and the packs that it takes to restore it; None if there are not all of them."""
        known = self._ledger.find(digest)
        if known is None:
            return None, []
        needed = [one.pack for one in (known, *self._ledger.rests_on(known))]
        if len(needed) != known.depth + 1 or not all(map(self._is_there, needed)):
            return None, []
        return known, needed

    def _is_there(self, pack: str) -> bool:
        """Whether a pack is stored, or can be."""
        if pack in self._needed:
            return True
        found = self._ledger.pack(pack)
        if found is None:
            return False
        if not found[2] and not os.path.exists(self.path_of(pack)):
            self._ledger.drop_pack(pack)
            return False
        return True

    def _need(self, packs: list[str]) -> None:
        for pack in packs:
            if pack not in self._needed:
                self._needed[pack] = None
                found = self._ledger.pack(pack)
                if found is not None and not found[2]:
                    self._on_pack(pack)

    def _add(self, block: bytes, digest: bytes, dtype: str, where: tuple[str, int]) -> Located:
        if self._is_raw:
            coded, base = codecs.stored(block), None
        elif len(block) < SMALL_BYTES or dtype == "" or len(block) % WIDTHS[dtype]:
            coded, base = self._codec.plain(block), None
        else:
            coded, base = self._code(block, dtype, where)
        if self._pack is not None and not self._pack.has_room(coded.size):
            self._finish_pack()
        if self._pack is None:
            self._pack = PackWriter(os.path.join(self._folder, f"pack-{os.getpid()}.part"), with_md5=self._with_md5)
            self._numbers[""] = len(self._packs)
            self._packs.append("")
        of = None if base is None else (base[1].pack, base[1].number)
        number = self._pack.add(coded, len(block), digest.hex(), of)
        self._stored += coded.size
        depth, rests_on = (0, None) if base is None else (base[1].depth + 1, base[0])
        self._fresh[digest] = found = Located("", number, len(block), depth, rests_on)
        return found

    def _code(self, block: bytes, dtype: str, where: tuple[str, int]) -> tuple[Coded, tuple[bytes, Located] | None]:
        """Code a block of numbers; the second is the digest and the place of the one that it is the difference to."""
        earlier = self._earlier.find(where, len(block)) if self._earlier is not None else None
        if earlier is None:
            return self._codec.numbers(block, dtype), None
        digest, before = earlier
        base, needed = self._complete(digest)
        if base is None or base.depth + 1 >= MAX_DEPTH:
            return self._codec.numbers(block, dtype), None
        coded = self._codec.numbers(block, dtype, before)
        if not coded.is_difference:
            return coded, None
        self._need(needed)
        return coded, (digest, base)

    def _finish_pack(self) -> None:
        if self._pack is not None:
            written = self._pack.finish()
            os.replace(written.path, self.path_of(written.id))
            rows = [(digest, one.number, one.size, one.depth, one.base) for digest, one in self._fresh.items()]
            self._ledger.add_pack(written, rows)
            self._made[written.id] = len(self._pack)
            number = self._numbers.pop("")
            self._numbers[written.id], self._packs[number] = number, written.id
            self._pack = None
            self._fresh.clear()
            self._need([written.id])

    def _lay(self, *rows: tuple[str, int, bytes, str, int]) -> None:
        """Note where blocks are; without one, what is not noted yet."""
        self._laid += rows
        if not rows or len(self._laid) >= MAX_LAID:
            self._ledger.lay(self._name, self._laid)
            self._laid.clear()

    def path_of(self, pack: str) -> str:
        """Where a pack is before it is stored, and where it stays if the store reads it there."""
        return os.path.join(self._folder, f"{pack}.mtz")

    def _is_plain(self, files: list[dict[str, Any]]) -> bool:
        """Whether the frames of the packs, one after the other, are the file."""
        if len(files) != 1 or files[0]["layout"] != "bytes":
            return False
        whole = [[number, 0, self._made.get(pack, -1)] for number, pack in enumerate(self._packs)]
        return [one[:3] for one in files[0]["blocks"]] == whole

    def _tell_progress(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now >= self._next_progress:
            self._next_progress = now + PROGRESS_S
            self._on_progress(Progress(self._done, max(self._total, self._done), self._stored))


def state_of(status: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written to."""
    return status.st_size, status.st_mtime_ns


def _check(sources: list[Source]) -> None:
    if len(sources) > MAX_FILES:
        raise ValueError(f"{len(sources)} files are too many for one artifact ({MAX_FILES}): store an archive of them")
    for source in sources:
        if not is_safe(source.path):
            raise ValueError(f"{source.path[:80]!r} is a name that may not be restored: rename the file")


def _blocks(file: BinaryIO, layout: Layout) -> Iterator[tuple[str, int, str, int, bytes]]:
    """Key, number below that key, kind of number, offset and bytes of each block of a file."""
    for run in layout.runs:
        file.seek(run.offset)
        if run.dtype == "" and run.length >= MIN_BYTES:
            parts: Iterator[bytes] = chunks(file.read, run.length)
        else:
            parts = _parts(file, run.length)
        offset = run.offset
        for number, block in enumerate(parts):
            # bytes have no place that stays the same: what is inserted moves them
            yield run.key or f"@{run.offset}", number, run.dtype, offset, block
            offset += len(block)
        # the pages are of no use to anybody else
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), run.offset, run.length, os.POSIX_FADV_DONTNEED)


def _parts(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0:
        block = file.read(min(BLOCK_BYTES, length))
        while len(block) < min(BLOCK_BYTES, length):
            more = file.read(min(BLOCK_BYTES, length) - len(block))
            if not more:
                break
            block += more
        if not block:
            return  # the file has become shorter
        yield block
        length -= len(block)


def _add_to(ranges: list[list[int]], place: _Place) -> None:
    """Add a block to ranges of blocks that follow each other: pack, first block, how many, and their bytes."""
    last = ranges[-1] if ranges else None
    if last is not None and last[0] == place.pack and last[1] + last[2] == place.number:
        last[2] += 1
        last[3] += place.size
    else:
        ranges.append([place.pack, place.number, 1, place.size])
