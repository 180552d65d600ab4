"""Cutting by content: chunks are the bytes, of the sizes that they may have, and the same wherever the content is."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrack.artifacts.chunks import MAX_BYTES, MEAN_BYTES, MIN_BYTES, WINDOW, chunks, cuts
from tests.artifact_lab import rows

RANDOM = np.random.default_rng(0).bytes(12 << 20)


def cut(data, length=None, read=None):
    found = list(chunks(read or io.BytesIO(data).read, len(data) if length is None else length))
    assert b"".join(found) == data[:length]
    assert all(MIN_BYTES <= len(chunk) <= MAX_BYTES for chunk in found[:-1])
    assert all(0 < len(chunk) <= MAX_BYTES for chunk in found)
    return found


def odd(data, seed):
    """Reads that give less than was asked for, as pipes do."""
    file, sizes = io.BytesIO(data), np.random.default_rng(seed)
    return lambda size: file.read(int(sizes.integers(1, max(size, 2))))


@pytest.mark.parametrize(
    "size", [0, 1, 7, 8, WINDOW, MIN_BYTES - 1, MIN_BYTES, MIN_BYTES + 1, MAX_BYTES, MAX_BYTES + 1]
)
def test_any_length(size):
    cut(RANDOM[:size])
    cut(bytes(size))


def test_the_mean_is_what_it_should_be():
    assert 0.7 * MEAN_BYTES < len(RANDOM) / len(cut(RANDOM)) < 1.5 * MEAN_BYTES


def test_it_ends_where_the_file_does():
    """One that has become shorter, or longer, meanwhile."""
    assert cut(RANDOM[:500_000], length=10**9) == cut(RANDOM[:500_000])
    cut(RANDOM, length=3_000_001)


@pytest.mark.parametrize("seed", range(3))
def test_however_it_is_read(seed):
    assert cut(RANDOM, read=odd(RANDOM, seed)) == cut(RANDOM)


@pytest.mark.parametrize("inserted", [b"x", b"y" * 31, RANDOM[:100_000]], ids=len)
@pytest.mark.parametrize("kind", ["random", "rows"])
def test_what_is_inserted_changes_the_chunks_around_it(inserted, kind):
    """The others stay what they are, so they are there already."""
    data = RANDOM if kind == "random" else "".join(rows(200_000)).encode()
    middle = len(data) // 2
    before, after = {*cut(data)}, cut(data[:middle] + inserted + data[middle:])
    new = [chunk for chunk in after if chunk not in before]
    assert sum(map(len, new)) <= len(inserted) + 4 * MAX_BYTES
    assert len(new) < len(after) / 2


def test_what_is_the_same_at_another_place_is_cut_alike():
    """After a chunk or two, wherever it begins."""
    tail = {*cut(RANDOM[1_234_567:])}
    assert sum(len(chunk) for chunk in cut(RANDOM) if chunk in tail) > len(RANDOM) - 1_234_567 - 3 * MAX_BYTES


PERIODS = [b"\0", b"\xff", b"ab", b"\x01\x02\x03", RANDOM[:8], RANDOM[:31], RANDOM[:64], RANDOM[:4096]]


@pytest.mark.parametrize("period", PERIODS, ids=len)
def test_what_repeats_itself_takes_no_longer(period):
    """A hash that comes again and again must not make cuts without end."""
    begin = time.process_time()
    cut(RANDOM[: 8 << 20])
    usual = time.process_time() - begin
    begin = time.process_time()
    cut(period * ((8 << 20) // len(period)))
    assert time.process_time() - begin < 8 * usual + 0.5


def test_words_that_somebody_has_chosen_to_be_cuts():
    """For which the hash is zero: every eighth place is a cut, and chunks are as small as they may be, no smaller."""
    words = np.random.default_rng(7).integers(0, 1 << 63, 1 << 20, np.uint64)
    blocks = np.repeat(words, 4)  # four alike are a whole window
    found = cuts(blocks.view(np.uint8))
    word = words[(found[found % 32 == 0][0] - 32) // 32].tobytes()
    chosen = cut(word * (1 << 18))
    assert len(chosen) == -(-(8 << 18) // MIN_BYTES)


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 400_000)), max_size=6), st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_pieces(pieces, part):
    """Property: of what is put together from pieces, repeats and zeros."""
    data = b"".join(RANDOM[at : at + length] + part * 50 + bytes(length // 2) for at, length in pieces)
    assert cut(data, read=odd(data, 0)) == cut(data)
