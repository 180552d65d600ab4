"""Where the interpreter's own variables lie in the memory of another process."""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_LOAD, _DYNSYM = 1, 11
_MAX_TABLE = 16 << 20


def find(pid: int, names: Iterable[str], proc: str = "/proc") -> dict[str, int]:
    """Addresses of exported variables of the Python interpreter in process ``pid``; empty if it runs none.

    They are in ``libpython`` where there is one, else in the program itself. Raises OSError if the process has gone or
    may not be looked at. Takes some 2 ms.
    """
    for path, base in _candidates(pid, proc):
        try:
            found = exported(path, names)
        except (OSError, ValueError, struct.error):
            continue  # replaced since it was started, or no ELF file: what it says is not true of this process
        if found:
            return {name: base + offset for name, offset in found.items()}
    return {}


def _candidates(pid: int, proc: str) -> list[tuple[str, int]]:
    """Files that may hold the interpreter, with the address of their beginning; libraries first."""
    program = os.readlink(f"{proc}/{pid}/exe")
    libraries: list[tuple[str, int]] = []
    programs: list[tuple[str, int]] = []
    with open(f"{proc}/{pid}/maps", "rb") as file:
        for line in file:
            fields = line.split(None, 5)
            if len(fields) < 6 or fields[2] != b"00000000":
                continue
            path = os.fsdecode(fields[5].rstrip(b"\n"))
            mapped = path, int(fields[0].partition(b"-")[0], 16)
            if os.path.basename(path).startswith("libpython3"):
                libraries.append(mapped)
            elif path == program and not programs:
                programs.append(mapped)
    return libraries + programs


def exported(path: str, names: Iterable[str]) -> dict[str, int]:
    """How far behind the beginning of a loaded 64-bit ELF file its exported symbols lie. {} if one is missing.

    Raises OSError, ValueError or struct.error if the file cannot be read or is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
        if header[0][:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a little-endian 64-bit ELF file")
        segments = _table(fd, _SEGMENT, header[5], header[10])
        sections = _table(fd, _SECTION, header[6], header[12])
        first = min((fields[3] for fields in segments if fields[0] == _LOAD), default=0)
        dynamic = next((fields for fields in sections if fields[1] == _DYNSYM), None)
        if dynamic is None:
            return {}
        strings = sections[dynamic[6]]
        if max(dynamic[5], strings[5]) > _MAX_TABLE:
            raise ValueError("symbol table too large")
        text = os.pread(fd, strings[5], strings[4])
        wanted = {text.find(b"\0" + name.encode() + b"\0") + 1: name for name in names}
        table = os.pread(fd, dynamic[5] - dynamic[5] % _SYMBOL.size, dynamic[4])
        # an index of 0 is an undefined symbol: used here, defined elsewhere
        found = {
            wanted[symbol[0]]: symbol[4] - (first & ~0xFFF)
            for symbol in _SYMBOL.iter_unpack(table)
            if symbol[0] in wanted and symbol[3]
        }
        return found if len(found) == len(wanted) else {}
    finally:
        os.close(fd)


def _table(fd: int, entry: struct.Struct, offset: int, count: int) -> list[tuple[int, ...]]:
    return list(entry.iter_unpack(os.pread(fd, entry.size * count, offset)))
