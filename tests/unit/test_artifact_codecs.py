"""Blocks come back as they were, whatever the numbers are and however they are coded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("zstandard")

from memtrack.artifacts.codecs import FLOATS, WIDTHS, Codec, _difference, stored
from memtrack.artifacts.decoding import Entry, decode, disordered, ordered
from memtrack.artifacts.packing import BLOCK_BYTES, SMALL_BYTES
from memtrack.artifacts.tables import CODINGS
from tests.artifact_lab import trained, weights

CODECS = {"auto": Codec(), "max": Codec(is_max=True)}


def decoded(coded, size, base=None):
    """A block from its frames, as they stand in a pack."""
    found = CODINGS.fullmatch(coded.coding)
    width = int(found[3] or 1)
    assert len(coded.frames) == (1 if found[1] else width)
    assert coded.size <= size + size // 128 + 512 * width, "no reader takes longer frames"
    return bytes(decode(Entry(found[1] or found[2], width, size, "", 0, [], None), coded.frames, base))


def comes_back(block, dtype, base=None):
    for codec in CODECS.values():
        coded = codec.numbers(block, dtype, base)
        assert coded.is_difference <= (base is not None)
        assert decoded(coded, len(block), base if coded.is_difference else None) == block
    return coded


# -- numbers of every kind --------------------------------------------------------------------------------------------

SPECIAL = {
    8: [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324, 1.7e308, -1.0, 1.0],
    4: [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -1.0, 1.0],
    2: [0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, -6e-8, 65504.0, -1.0, 1.0],
}


def words_of(content, dtype, count, seed=0):
    """So many words of a kind, as bytes."""
    width, random = WIDTHS[dtype], np.random.default_rng(seed)
    if content == "zeros":
        return bytes(count * width)
    if content == "ones":
        return b"\xff" * (count * width)
    if content == "constant":
        return random.bytes(width) * count
    if content == "random":
        return random.bytes(count * width)
    if content == "special" and width > 1:
        values = np.array(SPECIAL[width], f"<f{width}").view(f"<u{width}")
        # NaNs with something in them, of either sign, signalling ones too
        bits = 8 * width
        payloads = [(1 << bits) - 1, (1 << bits - 1) - 1, ((1 << bits) - 1) ^ (1 << (bits - 8)), 1 << bits - 1]
        values = np.concatenate([values, np.array(payloads, f"<u{width}")])
        return random.choice(values, count).tobytes()
    if content == "sorted":
        return np.sort(random.integers(0, 1 << 7, count)).astype(f"<u{width}").tobytes()
    if content == "small":
        return random.integers(-3, 4, count).astype(f"<i{width}").tobytes()
    numbers = weights(count, seed)
    return {8: numbers.astype("<f8"), 4: numbers, 2: numbers.astype("<f2"), 1: (numbers * 999).astype("i1")}[
        width
    ].tobytes()


CONTENTS = ["zeros", "ones", "constant", "random", "special", "sorted", "small", "weights"]
COUNTS = [1, 2, 3, 7, 128, 4095, 4096, 8192, 8193]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", WIDTHS)
def test_every_kind_comes_back(dtype, content):
    for count in COUNTS:
        block = words_of(content, dtype, count)
        comes_back(block, dtype)
        for other in ("weights", "zeros", content):
            comes_back(block, dtype, words_of(other, dtype, count, seed=1))
        comes_back(block, dtype, block)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_blocks_of_a_mebibyte_and_nearly_so(dtype):
    width = WIDTHS[dtype]
    for count in (BLOCK_BYTES // width, BLOCK_BYTES // width - 1, BLOCK_BYTES // width + 1):
        block = words_of("weights", dtype, count)
        comes_back(block, dtype)
        comes_back(block, dtype, words_of("weights", dtype, count, seed=1))


@given(
    st.sampled_from(sorted(WIDTHS)),
    st.lists(st.tuples(st.sampled_from(CONTENTS), st.integers(1, 5000), st.integers(0, 9)), min_size=1, max_size=4),
    st.sampled_from([None, *CONTENTS]),
    st.binary(max_size=64),
)
@settings(max_examples=150, deadline=None)
def test_any_mixture_comes_back(dtype, parts, of, odd):
    """Property: several contents behind each other, as where tensors are joined, with any bytes at the end."""
    block = b"".join(words_of(content, dtype, count, seed) for content, count, seed in parts)
    block += odd[: len(odd) - len(odd) % WIDTHS[dtype]]
    base = None if of is None else words_of(of, dtype, len(block) // WIDTHS[dtype], seed=5)
    comes_back(block, dtype, base)


@given(
    st.binary(max_size=3000), st.integers(1, 60), st.sampled_from(["plain", "stored"]), st.sampled_from(sorted(CODECS))
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_come_back(part, times, way, codec):
    """Property: as plain bytes, compressed or not."""
    block = part * times
    coded = CODECS[codec].plain(block) if way == "plain" else stored(block)
    assert decoded(coded, len(block)) == block


@pytest.mark.parametrize("size", [0, 1, (128 << 10) - 1, 128 << 10, (128 << 10) + 1, 1 << 20])
def test_what_is_stored_costs_next_to_nothing(size):
    block = np.random.default_rng(0).bytes(size)
    coded = stored(block)
    assert decoded(coded, size) == block
    assert coded.size <= size + 9 + 3 * (size // (128 << 10) + 1)


# -- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_order_of_floats_is_that_of_their_integers(width):
    """And back again, for all there are of one and two bytes."""
    bits = 8 * width
    if width <= 2:
        words = np.arange(1 << bits, dtype=np.uint64).astype(f"<u{width}")
    else:
        edges = [0, 1, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits - 1) + 1, (1 << bits) - 1]
        words = np.concatenate([
            np.array(edges, f"<u{width}"), np.frombuffer(np.random.default_rng(0).bytes(width << 12), f"<u{width}")
        ])  # fmt: skip
    assert np.array_equal(disordered(ordered(words)), words)
    if width > 1:
        floats = words.view(f"<f{width}")
        finite = ~np.isnan(floats)
        values, integers = floats[finite], ordered(words)[finite]
        at = np.argsort(integers, kind="stable")
        assert np.all(np.diff(values[at][np.isfinite(values[at])]) >= 0)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("is_float", [True, False])
def test_small_differences_of_either_sign_are_small_numbers(width, is_float):
    words = np.full(5, 100, f"<u{width}")
    before = np.array([99, 100, 101, 102, 98], f"<u{width}")
    assert sorted(_difference(words, before, is_float)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
def test_a_step_of_training_is_a_difference(dtype):
    """And it is smaller than what it is the difference of."""
    before = weights(1 << 17)
    if dtype == "bf16":
        one, other = ((part.view(np.uint32) >> 16).astype(np.uint16).tobytes() for part in (before, trained(before)))
    else:
        one, other = (part.astype(f"<f{FLOATS[dtype]}").tobytes() for part in (before, trained(before)))
    coded = comes_back(other, dtype, one)
    assert coded.coding == f"delta{FLOATS[dtype]}"
    assert coded.size < 0.9 * CODECS["auto"].numbers(other, dtype).size


def test_what_has_nothing_to_do_with_it_is_no_difference():
    """A key frame is easier to restore."""
    block = words_of("weights", "f32", 1 << 16)
    assert not comes_back(block, "f32", np.random.default_rng(0).bytes(len(block))).is_difference


def test_weights_are_smaller_than_zstd_makes_them():
    """By what the exponents are: 15 % of float32, a third of bfloat16."""
    block = words_of("weights", "f32", BLOCK_BYTES // 4)
    assert CODECS["auto"].numbers(block, "f32").size < 0.87 * len(block)
    half = (weights(BLOCK_BYTES // 2).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    assert CODECS["auto"].numbers(half, "bf16").size < 0.68 * len(half)
    assert CODECS["auto"].numbers(bytes(BLOCK_BYTES), "f32").size < 500
    assert SMALL_BYTES % max(WIDTHS.values()) == 0
