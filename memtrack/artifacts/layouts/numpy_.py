"""Where the numbers of npy files and npz archives lie."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from memtrack.artifacts.layouts.parts import DTYPE_OF, ITEM_BYTES, Tensor, count_of, read_at

if TYPE_CHECKING:
    from typing import BinaryIO

    from memtrack.artifacts.layouts.zips import Member

MAGIC = b"\x93NUMPY"

# NumPy evaluates the header as an expression, with all that this may take; of plain arrays it always looks like this
_HEADER = re.compile(
    rb"\s*\{'descr': '([<|][a-z]\d{1,2})', 'fortran_order': (?:True|False), "
    rb"'shape': \(((?:\d{1,19}, ?)*(?:\d{1,19})?)\),? ?\}\s*"
)
_MAX_HEADER = 4096


def array(file: BinaryIO, offset: int, length: int) -> Tensor:
    """The array, without a name, that an npy file in this place of ``file`` holds.

    Raises ValueError or LookupError if it is none, is broken, or holds other things than plain little-endian numbers.
    """
    head = read_at(file, offset, min(length, _MAX_HEADER))
    first = {1: 10, 2: 12, 3: 12}[head[6]]
    begin = first + int.from_bytes(head[8:first], "little")
    header = _HEADER.fullmatch(head[first:begin])
    if not head.startswith(MAGIC) or begin > len(head) or header is None:
        raise ValueError("no header of a plain array")
    dtype = header[1].decode()
    shape = tuple(int(side) for side in header[2].replace(b",", b" ").split())
    item_bytes = ITEM_BYTES[DTYPE_OF[dtype]]
    if count_of(shape) * item_bytes != length - begin:
        raise ValueError("the file does not end where the array does")
    return Tensor("", dtype, shape, offset + begin, length - begin)


def archive(file: BinaryIO, members: list[Member]) -> list[Tensor]:
    """The arrays of an npz archive that are not compressed."""
    found = []
    for member in members:
        if member.stored and member.name.endswith(".npy"):
            try:
                found.append(array(file, member.offset, member.length)._replace(name=member.name))
            except (ValueError, LookupError):
                pass
    return found
