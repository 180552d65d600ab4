"""How a block is coded: which of a few ways makes it smallest, judged by samples. ``decoding.decode`` is the way back.

Floats are rotated left by one bit, which brings the exponent to a byte of its own and the sign to the mantissa, and cut
into byte planes. The exponents of weights have few values, and in no order: Huffman codes alone are smaller there than
what any higher level of zstd finds, whose matches are chance (bf16 MiniLM: 1.503 against 1.419 at level 3), and faster.

Where there is the same block of an earlier checkpoint, the difference is coded: the bits of floats as integers in the
order of their values, subtracted and folded so that small differences of either sign have their high bytes zero. So a
carry does not flip all bits, as XOR has it, which is 3 to 10 % larger. The mapping is that of FM-Delta (NeurIPS 2024).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import zstandard

from memtrack.artifacts.decoding import ordered

FLOATS = {"f64": 8, "c128": 8, "f32": 4, "c64": 4, "f16": 2, "bf16": 2, "f8": 1}
INTEGERS = {"i64": 8, "u64": 8, "i32": 4, "u32": 4, "i16": 2, "u16": 2, "i8": 1, "u8": 1, "bool": 1}
WIDTHS = {**FLOATS, **INTEGERS}
"""Bytes of a word by kind of number."""

SAMPLES, SAMPLE_BYTES = 8, 4096
"""A block is judged by so many places of it; two places are too few (1.5 % lost), see ``codecs`` in FORMAT.md."""
RAW_BYTES = 128 << 10
"""What a zstd block may hold."""
WORTH = 0.97
"""What takes longer must be smaller by this."""
FEW = 0.75
"""Floats that planes make smaller than this repeat themselves, unlike weights: they may be smaller as they are."""


class Coded(NamedTuple):
    """A block as it is stored."""

    coding: str
    frames: list[bytes]

    @property
    def size(self) -> int:
        """Bytes of the frames."""
        return sum(map(len, self.frames))

    @property
    def is_difference(self) -> bool:
        """Whether it takes the earlier block to decode it."""
        return self.coding.startswith(("delta", "idelta"))


def _huffman_only() -> Any:
    # a window that no match of seven bytes is looked for in: what remains of zstd is its Huffman coder
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=17,
            chain_log=6,
            hash_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
        )
    )


def stored(block: Any) -> Coded:
    """Bytes as they are, in a zstd frame of blocks that are not compressed (RFC 8878, 3.1.1.2)."""
    view = memoryview(block)
    # a single segment, with its size in four bytes
    parts: list[Any] = [b"\x28\xb5\x2f\xfd\xa0", len(view).to_bytes(4, "little")]
    for at in range(0, len(view) or 1, RAW_BYTES):
        part = view[at : at + RAW_BYTES]
        parts += [(len(part) << 3 | (at + len(part) == len(view))).to_bytes(3, "little"), part]
    return Coded("plain", [b"".join(parts)])


class Codec:
    """Codes blocks of numbers and of bytes. Not thread-safe.

    Args:
        is_max: Take the time for what may be smaller by a few percent: level 19 for bytes (3 MB/s).
    """

    def __init__(self, *, is_max: bool = False) -> None:
        self._huffman = _huffman_only()
        self._fast = zstandard.ZstdCompressor(level=1)
        self._plain = zstandard.ZstdCompressor(level=19 if is_max else 3)

    def plain(self, block: Any) -> Coded:
        """Bytes, compressed as they are."""
        return Coded("plain", [self._plain.compress(block)])

    def numbers(self, block: Any, dtype: str, base: Any = None) -> Coded:
        """A block of whole numbers or floats; ``base``: the same block of an earlier checkpoint, of the same size."""
        width = WIDTHS[dtype]
        words = np.frombuffer(block, f"<u{width}")
        is_float = dtype in FLOATS
        places = _places(len(words), width)
        sample = words[places]
        split = f"{'rotate' if is_float and width > 1 else 'planes'}{width}"
        best, coding = self._estimate(sample, split), split
        if base is not None:
            delta = f"{'delta' if is_float else 'idelta'}{width}"
            difference = _difference(sample, np.frombuffer(base, words.dtype)[places], is_float)
            size = self._estimate(difference, delta)
            # a keyframe is easier to restore: the difference must be worth it
            if size < 0.95 * best:
                best, coding, words = size, delta, _difference(words, np.frombuffer(base, words.dtype), is_float)
        # on floats of 16 bits trying costs more than all else, and never pays
        if (not is_float or (width != 2 and best < FEW * sample.nbytes)) and not coding.startswith(("delta", "idelta")):
            whole = np.frombuffer(block, np.uint8)
            if len(self._plain.compress(whole[: len(whole) // 4].data)) < best / sample.nbytes * (len(whole) // 4):
                return self._smaller(self.plain(block), self._planes(words, coding))
        return self._planes(words, coding)

    @staticmethod
    def _smaller(one: Coded, other: Coded) -> Coded:
        return min(one, other, key=lambda coded: coded.size)

    def _planes(self, words: Any, coding: str) -> Coded:
        frames = []
        for plane in _planes(words, coding):
            frame = self._huffman.compress(plane)
            # planes that repeat themselves, as of zeros or of few values in runs
            if len(frame) < 0.9 * len(plane):
                part = plane[: max(len(plane) // 8, SAMPLE_BYTES)]
                if len(self._fast.compress(part)) < WORTH * len(self._huffman.compress(part)):
                    frame = min(frame, self._fast.compress(plane), key=len)
            frames.append(frame)
        return Coded(coding, frames)

    def _estimate(self, sample: Any, coding: str) -> int:
        """Bytes that the planes of a sample come to."""
        return sum(len(self._huffman.compress(plane)) for plane in _planes(sample, coding))


def _places(count: int, width: int) -> Any:
    """Where the words of a sample are."""
    length = SAMPLE_BYTES // width
    if count <= SAMPLES * length:
        return slice(None)
    starts = np.linspace(0, count - length, SAMPLES).astype(np.int64)
    return (starts[:, None] + np.arange(length)).reshape(-1)


def _difference(words: Any, before: Any, is_float: bool) -> Any:
    """Small numbers where words differ little, whichever is larger."""
    difference = ordered(words) - ordered(before) if is_float else words - before
    bits = difference.itemsize * 8 - 1
    negative = (difference.view(f"i{difference.itemsize}") >> bits).view(difference.dtype)
    return (difference << difference.dtype.type(1)) ^ negative


def _planes(words: Any, coding: str) -> Any:
    width = words.itemsize
    if coding.startswith("rotate"):
        words = (words << words.dtype.type(1)) | (words >> words.dtype.type(8 * width - 1))
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, width).T)
