"""From the tensors of a file to the runs that it is packed in."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from memtrack.artifacts.layouts.parts import DTYPE_OF, ITEM_BYTES, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memtrack.artifacts.layouts.parts import Tensor

LARGE = 256 << 10
"""From this length on, a tensor is a run of its own. That it stays the same from one checkpoint to the next, or is
frozen, must not depend on its neighbours."""

_RUN_BYTES = 64
_PLANE_BYTES = 100
"""What a run costs, however short, once and, of numbers, for each byte of an item: entries, frames, code tables."""
_AS_BYTES = 0.35
_AS_ALIKE = 0.05
_AS_OTHERS = 0.4
"""What is lost for each byte of a number that is packed as plain bytes, for one packed as a number of the same length,
and for any byte packed as a number that it is no part of."""
_KINDS = 4
"""How many kinds of runs are considered where small tensors of many kinds follow each other."""

_BYTES = ("", 0)
_Kind = tuple[str, int]
"""A dtype, and where its items begin: the remainder of their offset in the file."""


def cover(size: int, tensors: list[Tensor]) -> list[Run]:
    """Runs that cover a file, given tensors that lie in it in order and apart.

    What lies between tensors, and small ones between others, becomes part of a run wherever one of its own would cost
    more: a run begins and ends with numbers of its own dtype, and may hold anything else.
    """
    runs: list[Run] = []
    small: list[Run] = []
    for piece in _pieces(size, tensors):
        if piece.dtype and piece.length >= LARGE:
            runs += _joined(small)
            runs.append(piece)
            small = []
        else:
            small.append(piece)
    return runs + _joined(small)


def _pieces(size: int, tensors: list[Tensor]) -> Iterator[Run]:
    """The tensors, and as plain bytes what lies between."""
    end = 0
    for tensor in tensors:
        dtype = DTYPE_OF.get(tensor.dtype, "")
        length = tensor.length - tensor.length % ITEM_BYTES[dtype]
        if dtype and length:
            if tensor.offset > end:
                yield Run(end, tensor.offset - end, "", "")
            yield Run(tensor.offset, length, dtype, tensor.name or dtype)
            end = tensor.offset + length
    if end < size:
        yield Run(end, size - end, "", "")


def _joined(pieces: list[Run]) -> list[Run]:
    """The cheapest runs of small pieces that follow each other: a shortest path, kind by kind along the file."""
    if not pieces:
        return []
    sizes: Counter[_Kind] = Counter()
    for piece in pieces:
        sizes[_kind(piece)] += piece.length
    del sizes[_BYTES]
    kinds = [_BYTES, *(kind for kind, _ in sizes.most_common(_KINDS))]
    prices = {kind: _RUN_BYTES + (_PLANE_BYTES * ITEM_BYTES[kind[0]] if kind[0] else 0) for kind in kinds}
    rates = {own: [_rate(own, kind) for kind in kinds] for own in (_BYTES, *sizes)}

    infinite = float("inf")
    costs = [infinite] * len(kinds)  # of all up to here, by the kind of the last run
    closed, last = 0.0, 0  # the least of those whose last run may end here, and that run's kind
    steps = []  # for each piece, by kind: the kind that the piece before has
    for piece in pieces:
        own = _kind(piece)
        step = list(range(len(kinds)))
        for number, kind in enumerate(kinds):
            if kind in (own, _BYTES) and closed + prices[kind] < costs[number]:
                costs[number], step[number] = closed + prices[kind], last
            costs[number] += piece.length * rates[own][number]
        steps.append(bytes(step))
        closed, last = min((costs[number], number) for number, kind in enumerate(kinds) if kind in (own, _BYTES))
    return _cut(pieces, kinds, steps, last)


def _cut(pieces: list[Run], kinds: list[_Kind], steps: list[bytes], last: int) -> list[Run]:
    """The runs along the path that ends with kind number ``last``."""
    path = []
    for step in reversed(steps):
        path.append(last)
        last = step[last]
    path.reverse()
    runs: list[Run] = []
    before = -1
    for piece, number in zip(pieces, path, strict=True):
        dtype = kinds[number][0]
        if number != before:
            # it begins with a piece of its own, so with a key
            runs.append(Run(piece.offset, piece.length, dtype, piece.key if dtype else ""))
            before = number
        else:
            runs[-1] = runs[-1]._replace(length=piece.offset + piece.length - runs[-1].offset)
    return runs


def _kind(piece: Run) -> _Kind:
    return piece.dtype, piece.offset % ITEM_BYTES[piece.dtype]


def _rate(own: _Kind, packed_as: _Kind) -> float:
    if own == packed_as:
        return 0.0
    if packed_as == _BYTES:
        return _AS_BYTES
    alike = own != _BYTES and ITEM_BYTES[own[0]] == ITEM_BYTES[packed_as[0]] and own[1] == packed_as[1]
    return _AS_ALIKE if alike else _AS_OTHERS
