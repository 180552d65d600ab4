"""What a process that delivers later needs of the training process, secrets among it: in memory, never on a disk.

The training process writes it into anonymous memory (``memfd``), which the agent holds on to and hands to the process
that delivers, as its standard input. So it is in no file, in no argument, and gone with the last of them.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from binascii import crc32

from memtrack.recording.descriptor import Descriptor, above_stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADER = struct.Struct("<III")
"""crc32 of the rest, turn, length."""
SLOT = 1 << 18


class Handover:
    """The training process's end. Thread-safe; ``put`` after ``close`` does nothing."""

    def __init__(self) -> None:
        self._file = Descriptor(-1)
        if hasattr(os, "memfd_create"):
            try:
                self._file = Descriptor(above_stdio(os.memfd_create("memtrack", os.MFD_CLOEXEC)))
            except OSError:
                pass
        self._lock = threading.Lock()
        self._turn = 0
        self._last = b""

    @property
    def fd(self) -> int:
        """The descriptor to start the agent with; -1 where there is no anonymous memory, or somebody has closed it."""
        return self._file.fd if self._file.is_ours else -1

    def put(self, environments: Mapping[str, Mapping[str, str]]) -> None:
        """Leave the environment that each feed's sink needs, by the feed's key; module path and directory go along.

        A kill at any moment leaves this or what was there before. Does nothing if nothing has changed. Never raises.
        """
        body = _pack(environments)
        with self._lock:
            if self.fd < 0 or body == self._last:
                return
            self._last = body
            self._turn += 1
            rest = _HEADER.pack(0, self._turn, len(body))[4:] + body
            try:
                os.pwrite(self.fd, crc32(rest).to_bytes(4, "little") + rest, (self._turn & 1) * SLOT)
            except OSError:
                self._last = b""

    def close(self) -> None:
        """Close the descriptor; the agent has its own."""
        with self._lock:
            self._file.close()


class Handed:
    """The receiver's end: what was left last, empty if nothing was."""

    def __init__(self, fd: int) -> None:
        self.environments: dict[str, dict[str, str]] = {}
        """By the key of the feed."""
        self.path: list[str] = []
        """``sys.path`` of the training process."""
        self.folder = ""
        """Its working directory when it left this."""
        found: dict[str, str] = {}
        for field in _newest(fd).split(b"\0"):
            kind, text = field[:1], os.fsdecode(field[1:])
            if kind == b"P":
                self.path.append(text)
            elif kind == b"C":
                self.folder = text
            elif kind == b"K":
                found = self.environments.setdefault(text, {})
            elif kind == b"E" and "=" in text:
                name, _, value = text.partition("=")
                found[name] = value


def _pack(environments: Mapping[str, Mapping[str, str]]) -> bytes:
    """Fields, each a letter and a text, with zeros between; what has no room is left out, whole fields at a time."""
    fields = []
    for key, environment in environments.items():
        fields.append(f"K{key}")
        fields += [f"E{name}={value}" for name, value in environment.items()]
    folder = _folder()
    fields.append(f"C{folder}")
    # relative entries are looked up in the working directory
    fields += [f"P{os.path.join(folder, entry)}" for entry in sys.path if isinstance(entry, str)]
    kept, room = [], SLOT - _HEADER.size
    for field in fields:
        try:
            data = os.fsencode(field)
        except UnicodeError:
            continue
        if b"\0" not in data and len(data) < room:
            kept.append(data)
            room -= len(data) + 1
    return b"\0".join(kept)


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return "/"


def _newest(fd: int) -> bytes:
    best_turn, best = 0, b""
    for slot in (0, 1):
        try:
            data = os.pread(fd, SLOT, slot * SLOT)
        except OSError:
            continue  # the null device, a terminal, nothing
        if len(data) < _HEADER.size:
            continue
        crc, turn, length = _HEADER.unpack_from(data)
        rest = data[4 : _HEADER.size + length]
        if turn > best_turn and len(rest) == length + _HEADER.size - 4 and crc32(rest) == crc:
            best_turn, best = turn, rest[_HEADER.size - 4 :]
    return best
