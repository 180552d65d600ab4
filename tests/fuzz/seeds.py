"""The inputs that fuzzing begins with: each part of a recording changed once in every way that we could think of.

``python -m tests.fuzz.seeds FOLDER`` writes them.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memtrack.recording import layout
from tests.fuzz.splice import CUT, LATER, NAMES, PARTS, RENDER, REPLACE, Change

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMBERS = (0, 1, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), 5e-324, -1.0, 1.7e308)
TEXTS = (
    b"\x1b[31mred\x1b[0m", b"[bold]\\[/] [/nothing]", b"a\nb\rc\x00d", b"../../etc/passwd", b"$\\frac{$",
    b"\xff\xfe\x80", "\u202esdrawkcab".encode(), b"=" * 60, b":bomb:", b"",
)  # fmt: skip
FIELDS = ("size", "pid", "start_ticks", "wall_ns", "mono_ns", "keep", "keep_days", "interval_s")
VALUES = ("", "-1", "1e3", "1e999", "nan", "9" * 40, "9" * 3000, "1" + "0" * 18, "0x10", "1_0", "1\u0663")


def seeds() -> Iterator[bytes]:
    """Every input, in a fixed order."""
    for part in NAMES:
        binary = part not in ("header", "farewell", "feed", "verdict", "name", "metric")
        if binary:
            words = [struct.pack("<Q", number) for number in NUMBERS] + [struct.pack("<d", value) for value in FLOATS]
            places = range(8, min(PARTS[part].size, 128), 8)
            for word in words:
                yield _input(*(Change(part, 0, at, word) for at in places))
            yield from (_input(Change(part, 3, at, word)) for at, word in zip(places, words, strict=False))
        if part not in ("window", "phase", "control", "mark", "head", "pulse", "header"):
            yield _input(*(Change(part, slot, 40 * binary, text, REPLACE) for slot, text in enumerate(TEXTS)))
    for field in FIELDS:
        yield from (_header(field, value) for value in VALUES)
    for fields in (b"", b"pid=1\npid=2\n", b"no equals sign", b"program=\x1b]0;title\x07\n", b"a=\xff"):
        yield _input(Change("header", 0, 0, fields, REPLACE))
    for kind in (b"clean", b"out_of_memory", b"eaten"):
        for number in (b"", b"9" * 19, b"9" * 400, b"-9", b"nine"):
            text = b"kind=%b\nconfidence=certain\nwall_ns=%b\nsignal=%b\nexit_code=3\ntext=\x1b[2J\n" % (
                kind,
                number,
                number,
            )
            yield _input(Change("verdict", 0, 0, text, REPLACE), Change("verdict", 1, 0, text, REPLACE))
            text = b"key=a\nnext=%b\nstart_ns=%b\nend_ns=\ndropped=0\ndone=1\nsink=mlflow\ntarget.uri=x\n" % (
                number,
                number,
            )
            yield _input(*(Change("feed", slot, 0, text, REPLACE) for slot in range(4)))
    for size in (0, 20, 4096, 5000, layout.PHASES + 1, layout.MIN_SIZE - 1):
        cut = Change("header", size >> 16, size & 0xFFFF, b"", CUT)
        yield _input(cut)
        yield _input(Change("header", 0, 0, b"", LATER), cut)
    for turn in NUMBERS:
        head = Change("head", 0, 0, struct.pack("<Q", 2**63)), Change("head", 0, 32, struct.pack("<Q", turn))
        row = struct.pack("<QQ", turn, turn)
        yield _input(*head, *(Change("window", slot, 8, row) for slot in (0, 1, 69, 70)))
        yield _input(*head, *(Change("window", slot, 8, struct.pack("<QQ", 0, turn)) for slot in (69, 70, 71)))
        yield _input(Change("header", 0, 0, b"", LATER), *(Change("window", slot, 8, row) for slot in range(69, 75)))


def _header(field: str, value: str) -> bytes:
    fields = {
        "pid": "1",
        "wall_ns": "5",
        "mono_ns": "0",
        "start_ticks": "1",
        "size": str(layout.MIN_SIZE),
        field: value,
    }
    text = "".join(f"{key}={one}\n" for key, one in fields.items())
    return _input(Change("header", 0, 0, text.encode(), REPLACE))


def _input(*found: Change) -> bytes:
    packed = bytearray(b"".join(change.pack() for change in found))
    if found[0].kind == REPLACE:
        packed[0] |= RENDER
    return bytes(packed)


def main(folder: str) -> None:
    """Write the seeds to a folder."""
    for number, seed in enumerate(seeds()):
        Path(folder, f"seed-{number:03}").write_bytes(seed)


if __name__ == "__main__":
    main(sys.argv[1])
