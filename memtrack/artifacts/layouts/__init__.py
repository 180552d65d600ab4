"""What is known of the bytes of a file before it is packed: where tensors lie in it, and what numbers they are of.

Known are safetensors, what ``torch.save`` and ``torch.jit.save`` write, npy and npz. Of any other file of 1 MiB or more
a few samples tell whether it is numbers. Nothing is ever executed: see
:mod:`memtrack.artifacts.layouts.pickles`. Only headers, directories and samples are read, and a file
that is broken or made to mislead costs no more than one that is whole: it is taken for plain bytes, or for what its
samples look like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtrack.artifacts.layouts import numpy_, safetensors_, torch_, zips
from memtrack.artifacts.layouts.joining import cover
from memtrack.artifacts.layouts.parts import Layout, Run, Tensor, read_at
from memtrack.artifacts.layouts.probe import numbers

if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = ["Layout", "Run", "Tensor", "layout_of", "tensors_of"]


def layout_of(file: BinaryIO, size: int) -> Layout:
    """What the ``size`` bytes of an open file are: runs in order, without gaps, that cover it completely.

    Raises OSError if the file cannot be read, and nothing else whatever stands in it. Moves the file's position.
    """
    kind, tensors = _parsed(file, size, named=False)
    if kind:
        return Layout(kind, cover(size, tensors))
    found = numbers(file, size)
    if found:
        return Layout("raw", cover(size, [found]))
    return Layout("bytes", cover(size, []))


def tensors_of(file: BinaryIO, size: int) -> list[Tensor]:
    """The tensors that can be taken out of a file one by one; none if its format is not known.

    Of safetensors and npz by name; an npy is one, called "". Of torch those of a state dict by their path, such as
    ``model/layer.weight``, if their elements lie in order; then the storages that no such tensor lies in, flat, as
    ``data/17``. ``file`` needs ``seek`` and ``read`` and may decode what is read only then. Raises OSError if it cannot
    be read, and nothing else whatever stands in it.
    """
    return _parsed(file, size, named=True)[1]


def _parsed(file: BinaryIO, size: int, *, named: bool) -> tuple[str, list[Tensor]]:
    """The format, "" if it is none of those known or broken, and what lies in the file, in order and apart.

    ``named``: tensors are wanted as they are called, and may lie within each other; otherwise where storages lie.
    """
    try:
        head = read_at(file, 0, 16)
        if head.startswith(numpy_.MAGIC):
            return "npy", [numpy_.array(file, 0, size)]
        if head.startswith(zips.MAGIC):
            members = zips.members_of(file, size)
            if torch_.is_torch(members):
                return "torch", torch_.tensors(file, members) if named else torch_.storages(file, members)
            found = numpy_.archive(file, members)
            return "npz" if found else "", found
        if head[8:9] == b"{":
            return "safetensors", safetensors_.tensors(file, size)
    except OSError:
        raise
    except Exception:  # what a parser trips over in a stranger's file is not worth a list
        pass
    return "", []
