"""The bytes of the checkpoint before, to which the next one tells the difference."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, BinaryIO

from memtrack.artifacts.decoding import Damaged
from memtrack.artifacts.reading import Packs

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.artifacts.ledger import Ledger

PATIENCE = 4
"""So many blocks of a file that are not what they were, and it is taken for another one."""


class Earlier:
    """An artifact that is stored, block by block: out of its files while they are there, else out of packs.

    Each block is compared with its digest, so a file that has been overwritten meanwhile does no harm. Not thread-safe.

    Args:
        ledger: What the store has.
        name: The artifact.
        held: A folder with links to its files, if there is one; else they are looked for where they were.
        open_pack: Opens a pack by its id; raises FileNotFoundError for those that are not at hand.
    """

    def __init__(self, ledger: Ledger, name: str, held: str, open_pack: Callable[[str], BinaryIO]) -> None:
        self._ledger = ledger
        self._name = name
        self._held = held
        self._packs = Packs(open_pack)
        self._files: dict[str, BinaryIO] = {}
        self._misses: dict[str, int] = {}

    def find(self, where: tuple[str, int], size: int) -> tuple[bytes, bytes] | None:
        """Digest and bytes of the block at a place, a key and a number, if it is of this size; None if it is not to be
        had."""
        laid = self._ledger.laid(self._name, *where)
        located = None if laid is None else self._ledger.find(laid.digest)
        if laid is None or located is None or located.size != size:
            return None
        for path in (os.path.join(self._held, laid.path), self._ledger.original(self._name, laid.path)):
            block = self._read(path, laid.offset, size, laid.digest)
            if block is not None:
                return laid.digest, block
        try:
            return laid.digest, bytes(self._packs.block(located.pack, located.number))
        except (Damaged, OSError):
            return None

    def close(self) -> None:
        """Close files and packs."""
        while self._files:
            self._files.popitem()[1].close()
        self._packs.close()

    def _read(self, path: str, offset: int, size: int, digest: bytes) -> bytes | None:
        if self._misses.get(path, 0) >= PATIENCE:
            return None
        try:
            file = self._files.get(path)
            if file is None:
                if len(self._files) >= 8:
                    self._files.pop(next(iter(self._files))).close()
                file = self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 - it stays open
            file.seek(offset)
            block = file.read(size)
        except OSError:
            self._misses[path] = PATIENCE
            return None
        if hashlib.sha256(block).digest() != digest:
            self._misses[path] = self._misses.get(path, 0) + 1
            return None
        return block
