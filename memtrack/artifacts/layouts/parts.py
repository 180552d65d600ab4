"""The parts of a file: what all formats are told in."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import BinaryIO

MAX_PARTS = 1 << 16
"""Of a file with more tensors, or more members, none is looked at: what is known of them is kept in memory."""

ITEM_BYTES = {
    "": 1, "f8": 1, "i8": 1, "u8": 1, "bool": 1, "f16": 2, "bf16": 2, "i16": 2, "u16": 2, "f32": 4, "i32": 4, "u32": 4,
    "f64": 8, "i64": 8, "u64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""How long one number of a :class:`Run` is."""

_DTYPES = {
    "f8": "F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"
    " float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu",
    "f16": "F16 float16 <f2",
    "bf16": "BF16 bfloat16",
    "f32": "F32 float32 <f4",
    "f64": "F64 float64 <f8",
    "i8": "I8 int8 qint8 |i1 <i1",
    "i16": "I16 int16 <i2",
    "i32": "I32 int32 qint32 <i4",
    "i64": "I64 int64 <i8",
    "u8": "U8 uint8 quint8 |u1 <u1",
    "u16": "U16 uint16 <u2",
    "u32": "U32 uint32 <u4",
    "u64": "U64 uint64 <u8",
    "bool": "BOOL bool |b1 <b1",
    "c64": "C64 complex64 <c8",
    "c128": "complex128 <c16",
}
DTYPE_OF = {spelled: dtype for dtype, spellings in _DTYPES.items() for spelled in spellings.split()}
"""As safetensors, torch and npy spell them. Of others (big-endian ones, those of less than a byte) nothing is known."""


class Run(NamedTuple):
    """Consecutive bytes of a file that are of one kind.

    ``dtype``: "f32" "f64" "f16" "bf16" "f8" (all floats of one byte) "i8" "i16" "i32" "i64" "u8" "u16" "u32" "u64"
    "bool" "c64" "c128" (pairs of f32, of f64), always a whole number of them, or "" for plain bytes. ``key``: what the
    format calls the tensor, or the first of several, the same from one checkpoint to the next; "" for plain bytes.
    """

    offset: int
    length: int
    dtype: str
    key: str


class Layout(NamedTuple):
    """``kind``: "safetensors", "torch", "npy", "npz", "raw" (samples look like numbers) or "bytes"."""

    kind: str
    runs: list[Run]


class Tensor(NamedTuple):
    """One tensor among others: ``dtype`` as the format spells it ("BF16"), the place of its bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def count_of(shape: tuple[int, ...]) -> int:
    """How many elements a tensor has. Raises ValueError if these are not the lengths of its sides."""
    if len(shape) > 64 or any(type(side) is not int or not 0 <= side < 1 << 63 for side in shape):
        raise ValueError("not a shape")
    return prod(shape)


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """What stands there; less only where the file ends."""
    file.seek(offset)
    found = file.read(length)
    while 0 < len(found) < length:
        more = file.read(length - len(found))
        if not more:
            break
        found += more
    return found
