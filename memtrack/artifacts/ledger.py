"""What the store of a run has, as far as this machine knows: packs, the blocks in them, the checkpoint before.

It makes a second call go on where one that was killed had come to, and tells what need not be stored again. Losing it
costs nothing but that: what is stored can be restored without.
"""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memtrack.artifacts.container import Written

_SCHEMA = """
CREATE TABLE IF NOT EXISTS packs (id TEXT PRIMARY KEY, size INTEGER, md5 TEXT, stored INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blocks (
    digest BLOB PRIMARY KEY, pack TEXT, number INTEGER, size INTEGER, depth INTEGER, base BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blocks_by_pack ON blocks (pack);
CREATE INDEX IF NOT EXISTS blocks_by_base ON blocks (base) WHERE base IS NOT NULL;
CREATE TABLE IF NOT EXISTS artifacts (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, family TEXT, raw INTEGER, new INTEGER, is_laid INTEGER
);
CREATE TABLE IF NOT EXISTS files (
    name TEXT, is_new INTEGER, path BLOB, original BLOB, PRIMARY KEY (name, is_new, path)
);
CREATE TABLE IF NOT EXISTS laid (
    name TEXT, is_new INTEGER, key BLOB, number INTEGER, digest BLOB, path BLOB, offset INTEGER,
    PRIMARY KEY (name, is_new, key, number)
) WITHOUT ROWID;
"""
_DROP = """
DELETE FROM blocks WHERE digest IN (
    WITH RECURSIVE gone (digest) AS (
        SELECT digest FROM blocks WHERE pack = ? UNION SELECT blocks.digest FROM blocks JOIN gone ON base = gone.digest
    ) SELECT digest FROM gone
)
"""
_CACHE_KIB = 1024
_ANY = "utf-8", "surrogatepass"
"""Names of files need not be text, and those of tensors may be half a character: SQLite would not take them as text."""
REMEMBERED = 16
"""Artifacts of a family whose blocks can be told differences to: as many may be shards of one checkpoint."""


class Located(NamedTuple):
    """Where a block is."""

    pack: str
    number: int
    """Among the blocks of the pack."""
    size: int
    depth: int
    """How many blocks it rests on, one upon the other."""
    base: bytes | None
    """Digest of the one that it is the difference to."""


class Laid(NamedTuple):
    """Where the block of a checkpoint was."""

    digest: bytes
    path: str
    """Of its file, in the artifact."""
    offset: int


class Ledger:
    """One a store, in a folder of its own; whoever opens it has it alone until ``close``. Not thread-safe.

    One that is damaged is begun anew. Raises OSError if the folder cannot be written to.
    """

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, 0o700, exist_ok=True)
        self._lock = _lock(os.path.join(folder, "lock"))
        path = os.path.join(folder, "ledger.db")
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError:
            for end in ("", "-wal", "-shm"):
                if os.path.exists(path + end):
                    os.unlink(path + end)
            self._db = self._open(path)

    @staticmethod
    def _open(path: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            db.executescript(_SCHEMA)
            db.execute("DELETE FROM laid WHERE is_new")
            db.execute("DELETE FROM files WHERE is_new")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Let the next have it."""
        self._db.close()
        os.close(self._lock)

    # -- packs and blocks ---------------------------------------------------------------------------------------------

    def find(self, digest: bytes) -> Located | None:
        """Where a block is, if it is in any pack."""
        row = self._db.execute("SELECT pack, number, size, depth, base FROM blocks WHERE digest = ?", (digest,))
        found = row.fetchone()
        return None if found is None else Located(*found)

    def rests_on(self, located: Located) -> Iterator[Located]:
        """The blocks that one is told as a difference to, the nearest first."""
        while located.base is not None:
            below = self.find(located.base)
            if below is None:
                return
            yield below
            located = below

    def add_pack(self, pack: Written, blocks: Iterable[tuple[bytes, int, int, int, bytes | None]]) -> None:
        """A pack is complete, though not stored. ``blocks``: digest, number, size, depth, digest of the base."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("INSERT OR REPLACE INTO packs VALUES (?, ?, ?, 0)", (pack.id, pack.size, pack.md5))
            rows = ((digest, pack.id, *rest) for digest, *rest in blocks)
            self._db.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?)", rows)

    def pack(self, pack: str) -> tuple[int, str, bool] | None:
        """Size in bytes of a pack, its md5, and whether it is stored."""
        found = self._db.execute("SELECT size, md5, stored FROM packs WHERE id = ?", (pack,)).fetchone()
        return None if found is None else (found[0], found[1], bool(found[2]))

    def packs(self, *, is_stored: bool) -> list[str]:
        """The packs that are stored, or those that are still to be."""
        return [row[0] for row in self._db.execute("SELECT id FROM packs WHERE stored = ?", (is_stored,))]

    def mark_stored(self, pack: str) -> None:
        """The store has the pack."""
        self._db.execute("UPDATE packs SET stored = 1 WHERE id = ?", (pack,))

    def drop_pack(self, pack: str) -> None:
        """The pack is gone, and what rests on its blocks is of no use any more, though the same may come again.

        A difference is to a block in a certain pack.
        """
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute(_DROP, (pack,))
            self._db.execute("DELETE FROM packs WHERE id = ?", (pack,))

    # -- the checkpoint before ----------------------------------------------------------------------------------------

    def earlier(self, name: str, family: str) -> str | None:
        """The artifact to tell the difference to: the last of this name, else the newest of the family."""
        row = self._db.execute(
            "SELECT name FROM artifacts WHERE is_laid AND (name = ? OR family = ?)"
            " ORDER BY name = ? DESC, number DESC LIMIT 1",
            (name, family, name),
        ).fetchone()
        return None if row is None else row[0]

    def laid(self, name: str, key: str, number: int) -> Laid | None:
        """The block that was at a place in an artifact."""
        row = self._db.execute(
            "SELECT digest, path, offset FROM laid WHERE name = ? AND is_new = 0 AND key = ? AND number = ?",
            (name, _blob(key), number),
        ).fetchone()
        return None if row is None else Laid(row[0], row[1].decode(*_ANY), row[2])

    def original(self, name: str, path: str) -> str:
        """Where the file of an artifact was when it was stored; "" if that is not known."""
        row = self._db.execute(
            "SELECT original FROM files WHERE name = ? AND is_new = 0 AND path = ?", (name, _blob(path))
        ).fetchone()
        return "" if row is None else row[0].decode(*_ANY)

    def lay(self, name: str, rows: Iterable[tuple[str, int, bytes, str, int]]) -> None:
        """Note where blocks are in the artifact that is being stored: key, number, digest, path, offset."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR REPLACE INTO laid VALUES (?, 1, ?, ?, ?, ?, ?)",
                ((name, _blob(key), number, digest, _blob(path), at) for key, number, digest, path, at in rows),
            )

    def commit(
        self, name: str, family: str, originals: Iterable[tuple[str, str]], raw_bytes: int = 0, new_bytes: int = 0
    ) -> None:
        """The artifact is stored: the newest of its family from now on.

        ``originals``: path in it, and where it was. ``new_bytes``: what its blocks come to that were not there before.
        """
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, 1, ?, ?)", ((name, *map(_blob, row)) for row in originals)
            )
            self._db.execute("DELETE FROM artifacts WHERE name = ?", (name,))
            self._db.execute(
                "INSERT INTO artifacts (name, family, raw, new, is_laid) VALUES (?, ?, ?, ?, 1)",
                (name, family, raw_bytes, new_bytes),
            )
            old = self._db.execute(
                "SELECT name FROM artifacts WHERE is_laid AND family = ? ORDER BY number DESC LIMIT -1 OFFSET ?",
                (family, REMEMBERED),
            ).fetchall()
            for (one,) in old:
                self._db.execute("UPDATE artifacts SET is_laid = 0 WHERE name = ?", (one,))
            for table in ("laid", "files"):
                self._db.executemany(f"DELETE FROM {table} WHERE name = ? AND is_new = 0", [*old, (name,)])
                self._db.execute(f"UPDATE {table} SET is_new = 0 WHERE name = ?", (name,))

    # -- what there is ------------------------------------------------------------------------------------------------

    def artifacts(self) -> list[tuple[str, int, int]]:
        """The artifacts in the order of their storing: name, bytes, and what was new of it as it is stored."""
        return list(self._db.execute("SELECT name, raw, new FROM artifacts ORDER BY number"))

    def forget(self, name: str) -> None:
        """The artifact has been deleted."""
        with self._db:
            self._db.execute("BEGIN")
            for table in ("artifacts", "laid", "files"):
                self._db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))


def _blob(text: str) -> bytes:
    return text.encode(*_ANY)


def _lock(path: str) -> int:
    """Wait until no other process has it. The kernel gives it back, whatever becomes of this one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX)
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(fd, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
    return fd
