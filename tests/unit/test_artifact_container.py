"""Packs and manifests: standard zstd, the same of the same blocks, and none larger than it may be."""

from __future__ import annotations

import io
import json
import os
import subprocess
from hashlib import md5, sha256
from shutil import which

import numpy as np
import pytest

pytest.importorskip("zstandard")

import zstandard

from memtrack.artifacts.codecs import Codec, stored
from memtrack.artifacts.container import MAX_BYTES, PACK_NOTE, PackWriter, write_manifest
from memtrack.artifacts.reading import Artifact, Packs
from memtrack.artifacts.tables import MAX_ENTRIES, read_table
from tests.artifact_lab import weights

BLOCKS = [np.random.default_rng(at).bytes(1000 * at) if at % 2 else b"text" * 999 * at for at in range(1, 9)]


def pack(path, blocks=BLOCKS, codec=None, **options):
    writer = PackWriter(str(path), **options)
    for block in blocks:
        coded = Codec().plain(block) if codec is None else codec(block)
        assert writer.has_room(coded.size)
        writer.add(coded, len(block), sha256(block).hexdigest(), None)
    assert len(writer) == len(blocks)
    return writer.finish()


def test_of_the_same_blocks_it_is_the_same(tmp_path):
    one, other = pack(tmp_path / "1", with_md5=True), pack(tmp_path / "2", with_md5=True)
    data = (tmp_path / "1").read_bytes()
    assert data == (tmp_path / "2").read_bytes()
    assert one[1:] == other[1:] == (
        sha256(data).hexdigest()[:24], len(data), md5(data, usedforsecurity=False).hexdigest(),
    )  # fmt: skip
    assert pack(tmp_path / "3", BLOCKS[::-1]).id != one.id


def test_any_zstd_reads_it(tmp_path):
    """Over all frames it gives the blocks, one after the other; notes and tables are left out."""
    pack(tmp_path / "pack")
    with open(tmp_path / "pack", "rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        assert reader.read() == b"".join(BLOCKS)
    if which("zstd"):
        assert subprocess.run(["zstd", "-tq", str(tmp_path / "pack")], capture_output=True).returncode == 0
        found = subprocess.run(["zstd", "-dcq", str(tmp_path / "pack")], capture_output=True, check=True)
        assert found.stdout == b"".join(BLOCKS)


def test_blocks_are_found_by_their_number(tmp_path):
    pack(tmp_path / "pack")
    packs = Packs(lambda _: open(tmp_path / "pack", "rb"))  # noqa: SIM115
    assert [bytes(packs.block("0" * 24, number)) for number in range(len(BLOCKS))] == BLOCKS
    packs.close()


def test_what_a_person_reads(tmp_path):
    """The note is at the head of the file, as text."""
    pack(tmp_path / "pack")
    assert (tmp_path / "pack").read_bytes()[8:].startswith(PACK_NOTE.encode())
    write_manifest(str(tmp_path / "manifest"), {"files": [], "packs": []}, "à note\n")
    assert (tmp_path / "manifest").read_bytes()[8:].startswith("à note\n".encode())


def test_a_table_is_what_was_written(tmp_path):
    table = {"name": "modèle \udcff", "files": [], "packs": [["0" * 24, 7]], "step": None}
    write_manifest(str(tmp_path / "manifest"), table, "")
    with open(tmp_path / "manifest", "rb") as file:
        found, _ = read_table(file)
        assert found == {"memtrack": "artifact", "version": 1, **table}
        assert Artifact(file, open).packs == [("0" * 24, 7)]


@pytest.mark.parametrize("size", [1 << 20, 300_001, 2000])
def test_no_pack_is_larger_than_it_may_be(tmp_path, size):
    """Nor has more blocks than it may, however small they are; and it is nearly full."""
    writer, number = PackWriter(str(tmp_path / "pack")), 0
    block = os.urandom(size)
    coded = stored(block)
    while writer.has_room(coded.size):
        writer.add(coded, size, sha256(b"%d" % number).hexdigest(), ("0" * 24, 7))
        number += 1
    written = writer.finish()
    assert written.size <= MAX_BYTES
    assert number == MAX_ENTRIES or written.size > MAX_BYTES - 2 * size - (2 << 20)
    with open(tmp_path / "pack", "rb") as file:
        assert len(read_table(file)[0]["blocks"]) == number


def test_the_longest_entries_there_are(tmp_path):
    """Eight frames and a base each: as many as there may be are written, and read."""
    coded = Codec().numbers(weights(64).astype("<f8").tobytes(), "f64")
    writer = PackWriter(str(tmp_path / "pack"))
    while writer.has_room(coded.size):
        digest = sha256(b"%d" % len(writer)).hexdigest()
        writer.add(coded, 512, digest, None)
    assert writer.finish().size <= MAX_BYTES
    packs = Packs(lambda _: open(tmp_path / "pack", "rb"))  # noqa: SIM115
    assert packs.entry("0" * 24, MAX_ENTRIES - 1).size == 512
    packs.close()


def test_more_files_than_can_be_read_are_not_written(tmp_path):
    """Rather an error now than when it is to be restored; and there is no file."""
    row = {"path": "", "size": 5, "mode": 420, "layout": "bytes", "digest": "", "blocks": [[0, 0, 1, 5]]}
    files = [{**row, "path": f"{at}", "digest": sha256(b"%d" % at).hexdigest()} for at in range(70_000)]
    with pytest.raises(ValueError, match="store it in parts"):
        write_manifest(str(tmp_path / "manifest"), {"files": files, "packs": [["0" * 24, 7]]}, "")
    assert not (tmp_path / "manifest").exists()
    write_manifest(str(tmp_path / "manifest"), {"files": files[:50_000], "packs": [["0" * 24, 7]]}, "")
    with open(tmp_path / "manifest", "rb") as file:
        assert len(Artifact(file, open).files) == 50_000


def test_a_file_that_is_one_block_again_and_again(tmp_path):
    """Zeros, for a hundred gigabytes nearly: the table has much of the same, and is read."""
    size, count = 1 << 20, 64_000
    file = {
        "path": "zeros", "size": size * count, "digest": "0" * 64, "blocks": [[0, 0, 1, size]] * count,
    }  # fmt: skip
    write_manifest(str(tmp_path / "manifest"), {"files": [file], "packs": [["0" * 24, 7]]}, "")
    with open(tmp_path / "manifest", "rb") as manifest:
        assert Artifact(manifest, open).files["zeros"].size == size * count


def test_what_is_given_up_leaves_nothing(tmp_path):
    writer = PackWriter(str(tmp_path / "pack"))
    writer.add(stored(b"block"), 5, "0" * 64, None)
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_end_tells_where_the_table_is(tmp_path):
    """As FORMAT.md has it."""
    pack(tmp_path / "pack")
    data = (tmp_path / "pack").read_bytes()
    assert data[-24:-16] == (0x184D2A52).to_bytes(4, "little") + (16).to_bytes(4, "little")
    assert data[-8:] == b"memtrack"
    at = int.from_bytes(data[-16:-8], "little")
    assert data[at : at + 4] == (0x184D2A51).to_bytes(4, "little")
    length = int.from_bytes(data[at + 4 : at + 8], "little")
    table = json.loads(zstandard.ZstdDecompressor().decompress(data[at + 8 : at + 8 + length]))
    assert at + 8 + length == len(data) - 24
    file = io.BytesIO(data)
    assert read_table(file) == (table, at)
