"""Where the numbers lie in what ``torch.save`` and ``torch.jit.save`` write: a zip archive of storages and a pickle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtrack.artifacts.layouts.parts import DTYPE_OF, ITEM_BYTES, Tensor, count_of, read_at
from memtrack.artifacts.layouts.pickles import contents_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from memtrack.artifacts.layouts.pickles import Contents, View
    from memtrack.artifacts.layouts.zips import Member

_PICKLES = {"data.pkl": "data/", "constants.pkl": "constants/"}
"""Where the storages lie that a pickle of the archive names. TorchScript has the second, too."""


def is_torch(members: list[Member]) -> bool:
    """Whether this is such an archive: all that is in it lies in one folder, ``data.pkl`` at its top."""
    return any(_inner(member) == "data.pkl" and member.stored for member in members)


def storages(file: BinaryIO, members: list[Member]) -> list[Tensor]:
    """All storages, flat, called ``data/17``, as they lie in the file.

    Raises ValueError and whatever else a broken pickle gives rise to.
    """
    return _in_order([storage for flat, _ in _read(file, members) for storage in flat.values()])


def tensors(file: BinaryIO, members: list[Member]) -> list[Tensor]:
    """The tensors that dicts of the pickle have names for, then the storages that none of them lies in.

    Raises ValueError and whatever else a broken pickle gives rise to.
    """
    named: list[Tensor] = []
    unnamed: list[Tensor] = []
    for flat, contents in _read(file, members):
        taken = set()
        for path, view in contents.views:
            tensor = _within(flat[view.storage], path, view) if view.storage in flat else None
            if tensor is not None:
                named.append(tensor)
                taken.add(view.storage)
        unnamed += [storage for key, storage in flat.items() if key not in taken]
    return named + _in_order(unnamed)


def _in_order(found: list[Tensor]) -> list[Tensor]:
    return sorted(found, key=lambda tensor: tensor.offset)


def _read(file: BinaryIO, members: list[Member]) -> Iterator[tuple[dict[str, Tensor], Contents]]:
    """For each pickle the storages that it names, and what else it tells."""
    inside = {_inner(member): member for member in members if member.stored}
    order = inside.get("byteorder")
    if order is not None and read_at(file, order.offset, min(order.length, 16)) != b"little":
        raise ValueError("not little-endian")
    for pickle, folder in _PICKLES.items():
        if pickle in inside:
            contents = contents_of(file, inside[pickle].offset, inside[pickle].length)
            flat = {}
            for key, dtype in contents.storages.items():
                member = inside.get(folder + key)
                if member is not None and dtype in DTYPE_OF:
                    count = member.length // ITEM_BYTES[DTYPE_OF[dtype]]
                    flat[key] = Tensor(folder + key, dtype, (count,), member.offset, member.length)
            yield flat, contents


def _within(storage: Tensor, path: str, view: View) -> Tensor | None:
    """The tensor, None if its elements do not lie in order or it is larger than its storage."""
    stride = 1
    for side, step in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if side != 1 and step != stride:
            return None
        stride *= side
    item_bytes = ITEM_BYTES[DTYPE_OF[storage.dtype]]
    length = count_of(view.shape) * item_bytes
    offset = storage.offset + view.first * item_bytes
    if view.first < 0 or offset + length > storage.offset + storage.length:
        return None
    return Tensor(path, storage.dtype, view.shape, offset, length)


def _inner(member: Member) -> str:
    """The name without the top folder, which is called after the file: each checkpoint has another."""
    return member.name.partition("/")[2]
