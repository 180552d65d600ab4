"""The instructions of a pickle as it stands in a file, one by one. ``pickletools`` knows how long each is.

``pickletools.genops`` is not asked: it reads the arguments whole, however long.
"""

from __future__ import annotations

import pickletools
from typing import TYPE_CHECKING, NamedTuple

from memtrack.artifacts.layouts.parts import read_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

MAX_OPERATIONS = 3_000_000
"""A tensor takes about 70. That many take a few seconds."""
MAX_TEXT = 512
"""Bytes of UTF-8. Longer texts are no names."""

_WINDOW = 256 << 10
_LONGEST = 1024
"""An instruction without the part of a text that is of no interest."""


class Operation(NamedTuple):
    """What ``pickletools`` knows of an instruction: how its argument is written, and what it does to the stack."""

    name: str
    argument: int
    takes: int
    takes_marked: bool
    leaves: int


def _operation(opcode: pickletools.OpcodeInfo) -> Operation:
    marked = pickletools.markobject in opcode.stack_before
    takes = opcode.stack_before.index(pickletools.markobject) if marked else len(opcode.stack_before)
    return Operation(opcode.name, opcode.arg.n if opcode.arg else 0, takes, marked, len(opcode.stack_after))


_OPERATIONS = {ord(opcode.code): _operation(opcode) for opcode in pickletools.opcodes}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
"""How many bytes tell the length of the argument that follows them."""


def operations(file: BinaryIO, offset: int, length: int) -> Iterator[tuple[Operation, bytes]]:
    """The instructions up to STOP, with their arguments; of longer ones than MAX_TEXT nothing is read."""
    end = offset + length
    window, at = b"", 0
    for _ in range(MAX_OPERATIONS):
        if len(window) - at < _LONGEST:
            offset, at = offset + at, 0
            window = read_at(file, offset, max(0, min(_WINDOW, end - offset)))
        operation = _OPERATIONS[window[at]]
        at += 1
        size = operation.argument
        if size == pickletools.UP_TO_NEWLINE:
            size = window.index(b"\n", at, at + _LONGEST // 2) + 1 - at
            if operation.name in ("GLOBAL", "INST"):
                size = window.index(b"\n", at + size, at + _LONGEST - 1) + 1 - at
        elif size < 0:
            width = _LENGTHS[size]
            size = int.from_bytes(window[at : at + width], "little")
            at += width
        argument = window[at : at + size] if size <= MAX_TEXT else b""
        at += size
        if offset + at > end:
            raise ValueError("a pickle that ends too soon")
        yield operation, argument
        if operation.name == "STOP":
            return
    raise ValueError("too many instructions")
