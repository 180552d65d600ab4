"""One tensor out of an artifact, decoded from no more than the blocks it lies in."""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
from typing import TYPE_CHECKING

from memtrack.artifacts.layouts import tensors_of
from memtrack.artifacts.layouts.parts import DTYPE_OF
from memtrack.artifacts.tables import is_safe, shown
from memtrack.errors import ArtifactError, ArtifactNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.artifacts.layouts import Tensor
    from memtrack.artifacts.reading import Artifact, File

READ_BYTES = 1 << 20
SPELLED = {
    "f64": "F64", "f32": "F32", "f16": "F16", "bf16": "BF16", "c64": "C64", "i64": "I64", "i32": "I32", "i16": "I16",
    "i8": "I8", "u64": "U64", "u32": "U32", "u16": "U16", "u8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""Kinds of numbers as safetensors calls them; those of one byte only if they are the same there."""


class StoredFile(io.RawIOBase):
    """A file of an artifact, which is decoded where it is read. Not thread-safe."""

    def __init__(self, artifact: Artifact, file: File) -> None:
        self._artifact = artifact
        self._file = file
        self._at = 0
        self._held = (0, b"")
        """The block that was read last, and where it begins."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + (0, self._at, self._file.size)[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        begin, block = self._held
        if not begin <= self._at < begin + len(block):
            if self._at >= self._file.size:
                return 0
            begin, found = next(self._artifact.blocks(self._file, self._at, self._at + 1))
            block = bytes(found)
            self._held = begin, block
        part = block[self._at - begin :][: len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)


def restore_tensor(artifact: Artifact, files: list[File], name: str, to: str, check_size: Callable[[int], None]) -> str:
    """Write the tensor of this name to ``to`` as ``NAME.safetensors``, with its dtype and shape. Gives the path.

    ``check_size`` gets its bytes, and raises if these are too many. Raises ArtifactNotFoundError, ArtifactError,
    Damaged or OSError.
    """
    known: list[str] = []
    for file in files:
        stored: io.BufferedReader[io.RawIOBase] = io.BufferedReader(StoredFile(artifact, file), 1 << 16)
        tensors = tensors_of(stored, file.size)
        known += [tensor.name for tensor in tensors]
        for tensor in tensors:
            if tensor.name == name:
                check_size(tensor.length)
                stored.seek(tensor.offset)
                return _write(stored, tensor, os.path.basename(file.path) if name == "" else name, to)
    there = (
        f"there are: {', '.join(shown(one[:80]) for one in known[:20])}{' …' if len(known) > 20 else ''}"
        if known
        else "it has none that is known"
    )
    raise ArtifactNotFoundError(f"there is no tensor {name[:200]!r} in it; {there}")


def _write(stored: io.BufferedReader[io.RawIOBase], tensor: Tensor, name: str, to: str) -> str:
    """A file of safetensors with one tensor: its header's length, the header as JSON, the bytes."""
    plain = name.replace("/", "-")
    if not is_safe(plain):
        raise ArtifactError(f"the tensor's name {name[:80]!r} is none for a file")
    dtype = tensor.dtype if tensor.dtype in SPELLED.values() else SPELLED.get(DTYPE_OF.get(tensor.dtype, tensor.dtype))
    dtype = dtype or SPELLED.get(tensor.dtype)
    if dtype is None:
        raise ArtifactError(f"safetensors has no kind of numbers for {tensor.dtype}: restore the file instead")
    entry = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [0, tensor.length]}
    head = json.dumps({name: entry}).encode()
    head += b" " * (-len(head) % 8)
    os.makedirs(to, exist_ok=True)
    path = os.path.join(to, f"{plain}.safetensors")
    fd, part = tempfile.mkstemp(prefix=".memtrack-", suffix=".part", dir=to)
    try:
        with open(fd, "wb") as out:
            out.write(struct.pack("<Q", len(head)) + head)
            left = tensor.length
            while left:
                data = stored.read(min(left, READ_BYTES))
                if not data:
                    raise ArtifactError("the file ends before the tensor does")
                out.write(data)
                left -= len(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    return path
