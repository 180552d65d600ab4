"""Whether a file of an unknown format is numbers: what a few samples of it look like."""

from __future__ import annotations

import zlib
from codecs import getincrementaldecoder
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from memtrack.artifacts.layouts.parts import ITEM_BYTES, Tensor, read_at

if TYPE_CHECKING:
    from typing import BinaryIO

MIN_SIZE = 1 << 20
SAMPLES = 8
SAMPLE_BYTES = 24 << 10
MIN_GAIN = 0.05
"""By how much of its length a sample must become shorter as planes, of what it is without."""
MIN_AGREED = 0.75
"""Which part of the samples must be of one kind."""

_TEXT = bytes([9, 10, 13, *range(32, 127)])
_FORMATS = (
    b"PAR1", b"ARROW1", b"ORC", b"Obj\1", b"SQLite format 3", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0",
    b"MM\0*", b"BM", b"%PDF", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"\x04\x22\x4d\x18", b"7z\xbc\xaf",
    b"Rar!", b"OggS", b"fLaC", b"ID3", b"\x7fELF", b"\x50\x2a\x4d\x18", b"\xff\xfe", b"\xfe\xff",
)  # fmt: skip
"""What begins like this is data sets, pictures, sound, programs, UTF-16 or compressed: nothing to split."""

_Counts = np.ndarray[Any, np.dtype[np.int64]]


def numbers(file: BinaryIO, size: int) -> Tensor | None:
    """All of the file as one array, None if it does not look like one, or is smaller than 1 MiB.

    The dtype is right about how long an item is and whether it is a float. A mixture, such as that of a training's
    tokens and weights, is what most of it is.
    """
    if size < MIN_SIZE or read_at(file, 0, 16).startswith(_FORMATS):
        return None
    votes: Counter[str] = Counter()
    begins: Counter[tuple[str, int]] = Counter()
    empty = 0
    for number in range(SAMPLES):
        offset = (size - SAMPLE_BYTES) * (2 * number + 1) // (2 * SAMPLES) // 16 * 16
        sample = read_at(file, offset, SAMPLE_BYTES)
        if len(sample) < SAMPLE_BYTES:
            return None
        packed_bytes = len(zlib.compress(sample, 1))
        if packed_bytes < SAMPLE_BYTES // 50:
            empty += 1  # zeros are of any kind
        else:
            dtype, first = _kind_of(sample, packed_bytes)
            votes[dtype] += 1
            begins[dtype, first] += 1
    if not votes:
        return None
    dtype, agreed = votes.most_common(1)[0]
    if not dtype or agreed < MIN_AGREED * (SAMPLES - empty) or agreed < 2:
        return None
    # arrays behind each other may begin anywhere; it costs little if an item is not taken from its first byte
    first = max(range(ITEM_BYTES[dtype]), key=lambda first: begins[dtype, first])
    count = (size - first) // ITEM_BYTES[dtype]
    spelled = {"f": "float", "i": "int"}.get(dtype[0], "bfloat") + dtype.lstrip("bfi")
    return Tensor("raw", spelled, (count,), first, count * ITEM_BYTES[dtype])


def _kind_of(sample: bytes, packed_bytes: int) -> tuple[str, int]:
    """Its dtype, "" if it is none, and where the first whole item begins."""
    if _is_text(sample):
        return "", 0
    lanes = np.frombuffer(sample, np.uint8).reshape(-1, 8)
    numbered = lanes + np.arange(0, 8 * 256, 256, dtype=np.int16)
    by_lane = np.bincount(numbered.ravel(), minlength=8 * 256).reshape(8, 256)
    stride, best = 1, float(packed_bytes)
    for tried in (2, 4, 8):
        cost = float(_bytes_of(by_lane.reshape(8 // tried, tried, 256).sum(axis=0)).sum())
        if cost < best - (MIN_GAIN * len(sample) if stride == 1 else 0.015 * len(sample)):
            stride, best = tried, cost
    if stride == 1:
        return "", 0
    planes = by_lane.reshape(8 // stride, stride, 256).sum(axis=0)
    costs = _bytes_of(planes)
    top = int(costs.argmin())  # of a little-endian number the highest byte varies least
    highest = planes[top]
    zeros = planes[:, 0].min()
    small = highest[0] + highest[255] - zeros
    huge = (highest[0x60:0x80] + highest[0xE0:]).sum()  # 2**65 and more, as a half 512
    if small > 0.5 * (highest.sum() - zeros) or huge > 0.02 * highest.sum():
        return f"i{8 * stride}", 0  # which of several bytes of zeros is the highest cannot be seen
    first = (top + 1) % stride
    if stride == 2 and costs[top] < 0.55 * len(sample) / stride:
        return "bf16", first
    return f"f{8 * stride}", first


def _is_text(sample: bytes) -> bool:
    if len(sample.translate(None, _TEXT)) < len(sample) // 10:
        return True
    try:
        # a sample may begin and end within a character
        text = getincrementaldecoder("utf-8")().decode(sample.lstrip(bytes(range(0x80, 0xC0))))
    except UnicodeDecodeError:
        return False
    return "\0" not in text


def _bytes_of(planes: _Counts) -> Any:
    """How long each of these planes gets, told as how often each value occurs, if nothing else is made use of."""
    totals = planes.sum(axis=1)
    logs = np.log2(planes, out=np.zeros(planes.shape), where=planes > 0)
    # what is seen in few values looks more regular than it is
    unseen = (np.count_nonzero(planes, axis=1) - 1) / (2 * np.log(2))
    return (totals * np.log2(totals) - (planes * logs).sum(axis=1) + unseen) / 8
