"""Where the tensors of a safetensors file lie: its header, which is JSON, tells all."""

from __future__ import annotations

import json
from sys import intern
from typing import TYPE_CHECKING

from memtrack.artifacts.layouts.parts import DTYPE_OF, ITEM_BYTES, MAX_PARTS, Tensor, count_of, read_at

if TYPE_CHECKING:
    from typing import Any, BinaryIO, NoReturn

MAX_HEADER = 16 << 20
"""Bytes; the format itself allows 100 MB. 65,536 tensors have about 10."""

MAX_VALUES = 16 * MAX_PARTS
"""What JSON makes of a header takes up to a hundred times its length: a list of empty lists."""


def tensors(file: BinaryIO, size: int) -> list[Tensor]:
    """All tensors, as they lie in the file. Raises ValueError and whatever else a broken header gives rise to."""
    length = int.from_bytes(read_at(file, 0, 8), "little")
    begin = 8 + length
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError("no header")
    header = read_at(file, 8, length)
    if len(header) < length or sum(map(header.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError("too much of a header, or too little")
    if length > MAX_HEADER // 4 and not header.isascii():
        raise ValueError("a text that takes four bytes for each of its characters")
    # no number in a header has a point or many digits
    entries = json.loads(header, object_hook=_entry, parse_int=_small, parse_float=_refuse, parse_constant=_refuse)
    del header
    entries.pop("__metadata__", None)
    if len(entries) > MAX_PARTS:
        raise ValueError("too many tensors")
    found = [
        Tensor(name, dtype, shape, begin + first, last - first) for name, (dtype, shape, first, last) in entries.items()
    ]
    found.sort(key=lambda tensor: (tensor.offset, tensor.length))
    end = begin
    for tensor in found:
        if tensor.offset < end:
            raise ValueError("tensors overlap")
        end = tensor.offset + tensor.length
    if end > size:
        raise ValueError("the file is too short")
    return found


def _entry(entry: dict[str, Any]) -> Any:
    """What the header says of a tensor, while it is read: as a dict of lists it is four times as large."""
    if "data_offsets" not in entry:
        return entry
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if type(first) is not int or type(last) is not int or not 0 <= first <= last:
        raise ValueError("not a place")
    count = count_of(shape)
    if dtype in DTYPE_OF and count * ITEM_BYTES[DTYPE_OF[dtype]] != last - first:
        raise ValueError("its place does not fit its shape")
    return intern(dtype), shape, first, last


def _small(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("too large a number")
    return int(digits)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"no number of a header: {text[:20]}")
