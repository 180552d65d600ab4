"""From the frames of a block to its bytes. ``codecs`` is the other way.

It may be anybody's: a size is compared before memory is taken for it. This module imports nothing of memtrack, because
it travels with the artifacts: see ``script``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Decompress = Callable[[bytes, int], bytes]

Block = Any
"""The bytes of a block: bytes or an array of them."""


class Damaged(Exception):
    """What was read is not as it was written, or is missing. The message says what, and what is lost with it."""


class Entry(NamedTuple):
    """A block in a pack."""

    coding: str
    width: int
    size: int
    digest: str
    at: int
    frames: Sequence[int]
    base: tuple[str, int] | None


# -- zstd -------------------------------------------------------------------------------------------------------------


def content_size(frame: bytes) -> int:
    """The size that a zstd frame says its content has (RFC 8878).

    -1 if it does not, or wants a window above 8 MiB, a dictionary, or what there is not in version 1 of the format.
    """
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    descriptor = frame[4]
    is_single, size_flag = descriptor >> 5 & 1, descriptor >> 6
    if descriptor & 0b1011 or (not is_single and frame[5] > 13 << 3):
        return -1
    length = (is_single, 2, 4, 8)[size_flag]
    at = 5 + (not is_single)
    if length == 0 or len(frame) < at + length:
        return -1
    return int.from_bytes(frame[at : at + length], "little") + (256 if length == 2 else 0)


def _with_stdlib(zstd: Any) -> Decompress:
    def decompress(frame: bytes, size: int) -> bytes:
        found: bytes = zstd.ZstdDecompressor().decompress(frame, size + 1)
        return found

    return decompress


def _with_zstandard(zstd: Any) -> Decompress:
    # one a frame: they are for one thread at a time, and cost nothing. The limit is ignored where a frame tells its
    # size, which therefore has been compared before
    return lambda frame, size: zstd.ZstdDecompressor().decompress(frame, max_output_size=size or 1)


def _with_program(frame: bytes, size: int) -> bytes:
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as source:
        source.write(frame)
        source.seek(0)
        with subprocess.Popen(
            ["zstd", "-dcq"], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as zstd:
            assert zstd.stdout is not None
            found = zstd.stdout.read(size + 1)
            if len(found) > size:
                zstd.kill()
    if zstd.returncode and len(found) <= size:
        raise ValueError("zstd says so")
    return found


def _find_zstd() -> Decompress:
    """Whichever zstd there is. Raises ImportError."""
    import shutil
    from importlib import import_module

    for name, use in (
        ("zstandard", _with_zstandard),
        ("compression.zstd", _with_stdlib),
        ("backports.zstd", _with_stdlib),
    ):
        try:
            return use(import_module(name))
        except ImportError:
            continue
    if shutil.which("zstd"):
        return _with_program
    raise ImportError("no zstd was found. Install one: pip install zstandard")


_decompress: Decompress | None = None


def decompress(frame: bytes, size: int) -> bytes:
    """The content of a frame, which must be of this size. Raises Damaged, and ImportError if there is no zstd."""
    global _decompress
    if _decompress is None:
        _decompress = _find_zstd()
    if content_size(frame) != size:
        raise Damaged("a frame has another size than the table says")
    try:
        found = _decompress(frame, size)
    except MemoryError:
        raise
    except Exception as exc:
        raise Damaged(f"a frame cannot be decompressed ({exc})") from exc
    if len(found) != size:
        raise Damaged("a frame has another size than it says")
    return found


# -- blocks -----------------------------------------------------------------------------------------------------------


def ordered(words: Any) -> Any:
    """Bits of floats as unsigned integers in the order of their values; ``disordered`` is the way back."""
    bits = words.itemsize * 8 - 1
    sign = words.dtype.type(1 << bits)
    return words ^ ((words.view(f"i{words.itemsize}") >> bits).view(words.dtype) | sign)


def disordered(words: Any) -> Any:
    """Bits of floats from integers in the order of their values."""
    bits = words.itemsize * 8 - 1
    sign = words.dtype.type(1 << bits)
    return words ^ ((~words.view(f"i{words.itemsize}") >> bits).view(words.dtype) | sign)


def decode(entry: Entry, frames: Sequence[bytes], base: Block | None) -> Block:
    """The bytes of a block from its frames, and from those of the block that it tells the difference to."""
    if entry.coding == "plain":
        return decompress(frames[0], entry.size)
    width, count = entry.width, entry.size // entry.width
    planes = np.empty((count, width), np.uint8)
    for number, frame in enumerate(frames):
        planes[:, number] = np.frombuffer(decompress(frame, count), np.uint8)
    if entry.coding == "planes":
        return planes.reshape(-1)
    words = planes.reshape(-1).view(f"<u{width}")
    one = words.dtype.type(1)
    if entry.coding == "rotate":
        return ((words >> one) | (words << words.dtype.type(8 * width - 1))).view(np.uint8)
    if base is None or len(base) != entry.size:
        raise Damaged("a block is the difference to one of another size")
    difference = (words >> one) ^ (~(words & one) + one)
    before = np.frombuffer(base, words.dtype)
    if entry.coding == "idelta":
        return (before + difference).view(np.uint8)
    return disordered(ordered(before) + difference).view(np.uint8)
