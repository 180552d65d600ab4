"""Writing containers: the one file format of packs and manifests, see FORMAT.md. ``reading`` reads them."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import zstandard

from memtrack.artifacts.tables import (
    END,
    HEAD,
    MARK,
    MAX_ENTRIES,
    MAX_ITEMS,
    NOTE,
    TABLE,
    TRAILER,
    VERSION,
    items_of,
    most_text,
)

if TYPE_CHECKING:
    from memtrack.artifacts.codecs import Coded

MAX_BYTES = 32 << 20
"""Of a pack: a unit of upload that is cheap to repeat, and what a tracker's client may hold in memory of it."""
PACK_NOTE = """memtrack pack: a part of an artifact, in standard zstd frames.
restore.py, beside the folder that this is in, puts the artifact together: python restore.py memtrack/NAME.mtz
"""


class Written(NamedTuple):
    """A container that is complete and on disk."""

    path: str
    id: str
    """The first 24 hex digits of its sha256."""
    size: int
    md5: str
    """"" if nobody wants it."""


class _Container:
    """A container that is being written, as ``path``. Its digests are made on the way."""

    def __init__(self, path: str, note: str, *, with_md5: bool) -> None:
        self.path = path
        # unbuffered: what is written is large, or the end
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - it stays open
        self._sha256 = hashlib.sha256()
        # it takes as long as coding what it is of
        self._md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None
        self.size = 0
        text = note.encode()
        self._write(HEAD.pack(NOTE, len(text)) + text)

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        self._sha256.update(view)
        if self._md5 is not None:
            self._md5.update(view)
        self.size += len(view)
        while view:
            view = view[self._file.write(view) :]

    def _finish(self, table: dict[str, Any]) -> Written:
        text = json.dumps(table, separators=(",", ":")).encode()
        # blocks have digests; nothing else would tell that a name is not what it was
        frame, at = zstandard.ZstdCompressor(level=9, write_checksum=True).compress(text), self.size
        if len(text) > most_text(len(frame)) or items_of(text) > MAX_ITEMS:
            raise ValueError("it has more files or blocks than one artifact can: store it in parts")
        self._write(HEAD.pack(TABLE, len(frame)) + frame)
        self._write(END.pack(TRAILER, END.size - HEAD.size, at, MARK))
        os.fsync(self._file.fileno())
        self._file.close()
        return Written(self.path, self._sha256.hexdigest()[:24], self.size, self._md5.hexdigest() if self._md5 else "")

    def discard(self) -> None:
        """Remove it, whatever there is of it."""
        self._file.close()
        if os.path.exists(self.path):
            os.unlink(self.path)


class PackWriter(_Container):
    """A pack that is being written. Not thread-safe. Raises OSError if the disk is full."""

    def __init__(self, path: str, *, with_md5: bool = False) -> None:
        super().__init__(path, PACK_NOTE, with_md5=with_md5)
        self._begin = self.size
        self._entries: list[list[Any]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def has_room(self, size: int) -> bool:
        """Whether a block that is stored in so many bytes fits."""
        # an entry takes some 130 bytes, of which half are digests and cannot be compressed
        table = 130 * (len(self._entries) + 1) + 4096
        return not self._entries or (self.size + size + table <= MAX_BYTES and len(self._entries) < MAX_ENTRIES)

    def add(self, coded: Coded, size: int, digest: str, base: tuple[str, int] | None) -> int:
        """Append a block of ``size`` bytes. Returns its number in the pack."""
        for frame in coded.frames:
            self._write(frame)
        self._entries.append([coded.coding, size, digest, [len(frame) for frame in coded.frames], base])
        return len(self._entries) - 1

    def finish(self) -> Written:
        """Complete it. Of the same blocks in the same order it is the same, to the byte."""
        return self._finish({"memtrack": "pack", "version": VERSION, "offset": self._begin, "blocks": self._entries})


def write_manifest(path: str, table: dict[str, Any], note: str) -> Written:
    """Write the manifest of an artifact. ``table`` is what FORMAT.md says, without the kind and the version.

    Raises ValueError if there is more in it than would be read, or OSError, and leaves nothing then.
    """
    container = _Container(path, note, with_md5=True)
    try:
        return container._finish({"memtrack": "artifact", "version": VERSION, **table})
    except BaseException:
        container.discard()
        raise
