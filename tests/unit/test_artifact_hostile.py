"""Artifacts from strangers, and what disks make of one's own: a clear error or the bytes as they were, nothing outside
of the folder that was asked for, nothing left behind, within bounds of memory and time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("zstandard")

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import memtrack
from memtrack.artifacts.codecs import stored
from memtrack.artifacts.decoding import content_size
from memtrack.artifacts.reading import MAX_DEPTH
from memtrack.artifacts.store import FolderStore
from memtrack.artifacts.tables import MAX_ENTRIES, read_table
from memtrack.errors import ArtifactError, MissingDependencyError
from tests.artifact_lab import content, digest_of, forged_store, safetensors, weights, write_container
from tests.fuzz import crate as crates
from tests.fuzz.crate import NAMES as NAMES_TOLD
from tests.fuzz.crate import NUMBERS as NUMBERS_TOLD
from tests.fuzz.crate import PARTS, RAW, Change, Crate, seeds

ROOT = Path(memtrack.__file__).parents[1]
MIB = 1 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return forged_store(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def forged(whole, tmp_path):
    return whole.copy(tmp_path / "store")


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    """Whatever is left in the folder for temporary files is seen."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


def table_of(path):
    with open(path, "rb") as file:
        return read_table(file)[0]


def restored(forged, tmp_path, **options):
    """What comes of restoring: the files, or the error, which is one line that can be printed. Nothing else is left."""
    before, error, to = content(tmp_path), None, tmp_path / "to"
    try:
        memtrack.restore(f"{forged.folder}/data", to, **options)
    except ArtifactError as exc:
        error = str(exc)
        assert error.isprintable()
        assert 10 < len(error) < 4000
    found = content(to)
    assert not any(name.endswith(".part") for name in found)
    after = content(tmp_path)
    assert {name: data for name, data in after.items() if not name.startswith("to/")} == {
        name: data for name, data in before.items() if not name.startswith("to/")
    }
    return found, error


def refuse(forged, tmp_path, saying="", **options):
    """It is an error, and there is no file."""
    found, error = restored(forged, tmp_path, **options)
    assert found == {}
    assert error is not None
    assert saying in error, error


def test_undamaged(forged, whole, tmp_path):
    assert restored(forged, tmp_path) == (whole.content, None)


# -- what disks do ----------------------------------------------------------------------------------------------------


def test_no_flipped_bit_goes_unnoticed(whole, tmp_path):
    """A bit in a note changes nothing. Any other is an error, or the file that it hits is not there."""
    forged = whole.copy(tmp_path / "store")
    for path in (forged.manifest(), *sorted(forged.packs.iterdir())):
        data = path.read_bytes()
        with open(path, "rb") as file:
            table, end = read_table(file)
        note = range(8, table.get("offset", end))
        # all of what is told of the content, and of the content itself every now and then
        places = [*range(8), *range(note[-1], end, 1999), *range(end, len(data), 1 if len(data) - end < 600 else 31)]
        for place in places:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            found, error = restored(forged, tmp_path)
            assert all(whole.content[name] == one for name, one in found.items()), (path.name, place)
            if place not in note and place >= 8:
                assert error is not None or found == whole.content
            if error is None:
                assert found == whole.content
            for name in found:
                os.unlink(tmp_path / "to" / name)
        path.write_bytes(data)


def test_what_is_cut_off_is_an_error(whole, tmp_path):
    forged = whole.copy(tmp_path / "store")
    for path in (forged.manifest(), *forged.packs.iterdir()):
        data = path.read_bytes()
        for length in {0, 1, 7, 8, 23, 24, 25, *range(0, len(data), len(data) // 20), len(data) - 24, len(data) - 1}:
            path.write_bytes(data[:length])
            found, error = restored(forged, tmp_path)
            assert error is not None
            assert "damaged" in error or "manifest" in error
            assert all(whole.content[name] == one for name, one in found.items())
        path.write_bytes(data)


def test_what_is_lost_is_named(forged, whole, tmp_path):
    """The other files are restored."""
    for path in forged.packs_of():
        os.rename(path, tmp_path / "elsewhere")
        found, error = restored(forged, tmp_path)
        assert f"deep/m.npy: pack {path.name} is missing; lost with it: " in error
        assert "empty" in found
        assert "deep/m.npy" not in found
        os.rename(tmp_path / "elsewhere", path)


def test_the_block_that_is_to_blame_is_found(forged, tmp_path):
    """Of blocks that rest on each other, the pack of the one that is damaged is named."""
    base, table = next(
        (path, table)
        for path, table in ((path, table_of(path)) for path in forged.packs_of())
        if any(row[0] == "rotate4" for row in table["blocks"])
    )
    number = next(at for at, row in enumerate(table["blocks"]) if row[0] == "rotate4")
    at = table["offset"] + sum(sum(row[3]) for row in table["blocks"][:number]) + table["blocks"][number][3][0] - 9
    data = bytearray(base.read_bytes())
    data[at] ^= 16  # of a mantissa, which is stored as it is
    base.write_bytes(data)
    assert f"deep/m.npy: pack {base.name} is damaged: a block is not what it was" in restored(forged, tmp_path)[1]


# -- forged manifests -------------------------------------------------------------------------------------------------

NUMBERS = [
    -1, True, None, 0.5, float("nan"), float("inf"), "7", [], {}, 1 << 62, 1 << 64, 10**30, [[[1] * 99] * 99] * 9,
]  # fmt: skip


@pytest.mark.parametrize("field", ["size", "mode"])
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:20])
def test_numbers_of_a_file(forged, tmp_path, field, value):
    forged.change(forged.manifest(), lambda table: table["files"][0].update({field: value}))
    refuse(forged, tmp_path, "the manifest cannot be read")


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:20])
def test_numbers_of_a_range(forged, tmp_path, place, value):
    """Nor is it one if another number of the file fits."""

    def change(table):
        file = table["files"][-1]
        file["blocks"][0][place] = value
        if place == 3 and type(value) is int:
            file["size"] = value

    forged.change(forged.manifest(), change)
    found, error = restored(forged, tmp_path)
    assert error is not None
    assert "rows.csv" not in found


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1777, 0o100644])
def test_a_mode_with_more_than_permissions(forged, tmp_path, mode):
    forged.change(forged.manifest(), lambda table: table["files"][0].update(mode=mode))
    refuse(forged, tmp_path)


NAMES = [
    "/etc/passwd", "../x", "a/../../x", "..", ".", "", "a//b", "/", "a/", "a\0b", "a\nb", "\x1b[2J", "a\x9bb", "\x7f",
    "x" * 256, "é" * 128, "x/" * 3000 + "x", "\ud800", 7, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:12])
def test_names_that_lead_elsewhere(forged, tmp_path, name):
    forged.change(forged.manifest(), lambda table: table["files"][0].update(path=name))
    refuse(forged, tmp_path, "is no name for a file")


def test_a_name_that_linux_takes_is_restored(forged, tmp_path):
    """Whatever it looks like: strange it may be, but it was there."""
    for name in ("\udcff\udcfe", "\u202exslx", "..x", " ", "a\\b", "*?", "é" * 127):
        forged.change(forged.manifest(), lambda table, name=name: table["files"][0].update(path=name))
        found, error = restored(forged, tmp_path)
        assert error is None
        assert name in found


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b/c", "a/b"), ("a", "a/b/c")])
def test_two_files_in_one_place(forged, tmp_path, names):
    def change(table):
        for file, name in zip(table["files"], names, strict=False):
            file["path"] = name

    forged.change(forged.manifest(), change)
    refuse(forged, tmp_path, "the manifest cannot be read")


def test_packs_that_are_listed_twice_or_not_at_all(forged, tmp_path):
    packs = table_of(forged.manifest())["packs"]
    for listed in ([*packs, packs[0]], [*packs, [packs[0][0], 5]], [packs[0][:1]], [["../../x" * 4, 5]], [[1, 2]], 5):
        forged.change(forged.manifest(), lambda table, listed=listed: table.update(packs=listed))
        refuse(forged, tmp_path, "the manifest cannot be read")
    for pack in packs:  # the difference needs the other one, and the manifest does not say so
        others = [pack if one == pack else ["0" * 24, 5] for one in packs]
        forged.change(forged.manifest(), lambda table, others=others: table.update(packs=others))
        assert restored(forged, tmp_path)[1]


@pytest.mark.parametrize("version", [2, 0, -1, True, 1.0, "1", None, [1], 10**30])
def test_other_versions(forged, tmp_path, version):
    forged.change(forged.manifest(), lambda table: table.update(version=version))
    refuse(forged, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"7", b"null", b"{", b"{}", b'{"version":1}', b'{"version":1,"memtrack":"pack"}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"version":1,"memtrack":"artifact","packs":[],"files":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"version":' + b"9" * 5000 + b"}", b"\xff\xfe{}", '{"version":1}'.encode("utf-16"), b'{"version":NaN}',
    ],
    ids=lambda text: repr(text)[:20],
)  # fmt: skip
def test_other_tables(forged, tmp_path, text):
    write_container(forged.manifest(), b"", text)
    refuse(forged, tmp_path, "the manifest cannot be read")


def test_a_file_of_no_bytes_that_says_to_have_blocks(forged, tmp_path):
    forged.change(forged.manifest(), lambda table: table["files"][1].update(size=0, blocks=[[0, 0, 10**9, 0]]))
    refuse(forged, tmp_path, "the manifest cannot be read")


def test_files_that_were_exchanged_are_noticed(forged, tmp_path):
    """Each block is whole; the file is not the one that was stored."""

    def change(table):
        one, other = table["files"][0], table["files"][-1]
        one["blocks"], other["blocks"] = other["blocks"], one["blocks"]
        one["size"], other["size"] = other["size"], one["size"]

    forged.change(forged.manifest(), change)
    found, error = restored(forged, tmp_path)
    assert "is not what it was" in error
    assert list(found) == ["empty"]


def test_more_than_there_is_room_for(forged, tmp_path):
    """A block can be told a million times: what it comes to is known before anything is written."""
    block = b"0" * MIB
    pack = forged.add_pack([("plain", MIB, sha256(block).hexdigest(), [zstandard.compress(block)], None)])
    forged.add_artifact([("bomb", MIB << 16, digest_of(block), [[0, 0, 1, MIB]] * (1 << 16))], [pack])
    refuse(forged, tmp_path, "max_bytes=1000000", max_bytes=10**6)
    forged.add_artifact([("bomb", 1 << 60, digest_of(block), [[0, 0, 1 << 40, 1 << 60]])], [pack])
    refuse(forged, tmp_path)


# -- forged packs -----------------------------------------------------------------------------------------------------

BLOCK_BYTES = 4096
BLOCK = bytes(range(256)) * (BLOCK_BYTES // 256)


def one_block(forged, frames, *, coding="plain", size=BLOCK_BYTES, base=None, digest=None, more=()):
    """An artifact of a single block in one pack."""
    digest = digest or sha256(BLOCK).hexdigest()
    pack = forged.add_pack([(coding, size, digest, frames, base), *more])
    file = ("file", size, sha256(bytes.fromhex(digest)).hexdigest(), [[0, 0, 1, size]])
    forged.add_artifact([file] if size else [], [pack])


FRAME = zstandard.compress(BLOCK)


def test_a_pack_made_by_hand_is_restored(forged, tmp_path):
    for frames in ([FRAME], stored(BLOCK).frames, [zstandard.ZstdCompressor(write_checksum=True).compress(BLOCK)]):
        one_block(forged, frames)
        assert restored(forged, tmp_path) == ({"file": BLOCK}, None)


def without_size(data):
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


FRAMES = {
    "declares less": FRAME[:5] + (256).to_bytes(2, "little") + FRAME[7:],
    "declares more": FRAME[:5] + (60_000).to_bytes(2, "little") + FRAME[7:],
    "no size": without_size(BLOCK),
    "a window of gigabytes": b"\x28\xb5\x2f\xfd\x40\xff" + (len(BLOCK) - 256).to_bytes(2, "little") + FRAME[7:],
    "a window above 8 MiB": b"\x28\xb5\x2f\xfd\x40\x69" + (len(BLOCK) - 256).to_bytes(2, "little") + FRAME[7:],
    "a dictionary": FRAME[:4] + bytes([FRAME[4] | 1]) + b"\7" + FRAME[5:],
    "a reserved bit": FRAME[:4] + bytes([FRAME[4] | 8]) + FRAME[5:],
    "a skippable frame": b"\x50\x2a\x4d\x18\4\0\0\0abcd" + FRAME,
    "a skippable frame alone": b"\x50\x2a\x4d\x18\4\0\0\0abcd",
    "cut off": FRAME[:-5],
    "another size": zstandard.compress(BLOCK[:-1]),
    "other bytes": zstandard.compress(BLOCK[::-1]),
    "nothing": b"",
    "no frame": b"no zstd frame at all",
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames(forged, tmp_path, name):
    one_block(forged, [FRAMES[name]])
    refuse(forged, tmp_path, "is damaged: ")


FIELDS: dict[str, list] = {
    "size": [*NUMBERS, 0, 5 << 20, 4095],
    "coding": ["", "none", "plain4", "planes3", "planes", "delta4", "rotate", "__class__", None, 5, ["plain"], "PLAIN"],
    "digest": ["", "g" * 64, "0" * 63, "0" * 64, "A" * 64, "٣" * 64, None, 7],
    "frames": [[], [1, 2], [-1], [len(FRAME) - 1], [len(FRAME) + 1], [1 << 40], [True], [None], None, "1"],
    "base": [["0" * 24, 0], [], ["x", 0], [None, None], "base", 5, {}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in FIELDS for value in FIELDS[field]])
def test_what_is_told_of_a_block(forged, tmp_path, field, value):
    one_block(forged, [FRAME])
    number = ["coding", "size", "digest", "frames", "base"].index(field)
    forged.change(forged.packs / f"{'f' * 24}.mtz", lambda table: table["blocks"][0].__setitem__(number, value))
    refuse(forged, tmp_path, "is damaged: ")


@pytest.mark.parametrize("table", [
    {"offset": -1}, {"offset": 1}, {"offset": 1 << 50}, {"offset": None}, {"blocks": None}, {"blocks": {}},
    {"blocks": []}, {"blocks": [[]]}, {"blocks": [["plain"]]}, {"blocks": "blocks"}, {"memtrack": "artifact"},
    {"version": 2},
], ids=str)  # fmt: skip
def test_what_is_told_of_a_pack(forged, tmp_path, table):
    one_block(forged, [FRAME])
    forged.change(forged.packs / f"{'f' * 24}.mtz", lambda found: found.update(table))
    refuse(forged, tmp_path, "is damaged: ")


def test_a_difference_to_itself(forged, tmp_path):
    one_block(forged, [FRAME], coding="idelta1", base=["f" * 24, 0])
    refuse(forged, tmp_path, "a block rests on too many others")


def test_differences_in_a_circle(forged, tmp_path):
    """Through two packs, each the difference to the other."""
    row = "idelta1", len(BLOCK), sha256(BLOCK).hexdigest(), [FRAME]
    packs = [forged.add_pack([(*row, [other * 24, 0])], pack=own * 24) for own, other in ("ab", "ba")]
    forged.add_artifact([("file", len(BLOCK), digest_of(BLOCK), [[0, 0, 1, len(BLOCK)]])], packs)
    refuse(forged, tmp_path, "a block rests on too many others")


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
def test_differences_to_differences(forged, tmp_path, depth):
    """Of zeros, so that each block is the same: what counts is how many there are."""
    zero = sha256(bytes(64)).hexdigest()
    frame = zstandard.compress(bytes(64))
    blocks = [("idelta1", 64, zero, [frame], ["f" * 24, number + 1]) for number in range(depth)]
    one_block(forged, [frame], coding="idelta1", size=64, digest=zero, base=["f" * 24, 1],
              more=[*blocks[1:], ("plain", 64, zero, [frame], None)])  # fmt: skip
    if depth > MAX_DEPTH:
        refuse(forged, tmp_path, "a block rests on too many others")
    else:
        assert restored(forged, tmp_path) == ({"file": bytes(64)}, None)


def test_a_difference_to_a_block_of_another_size(forged, tmp_path):
    other = ("plain", 64, sha256(bytes(64)).hexdigest(), [zstandard.compress(bytes(64))], None)
    one_block(forged, [FRAME], coding="idelta1", base=["f" * 24, 1], more=[other])
    refuse(forged, tmp_path, "a block is the difference to one of another size")


def test_other_bytes_behind_a_name_of_a_pack(forged, tmp_path):
    """A pack is what its blocks are; one that is put in its place, of the same size, does not pass."""
    one_block(forged, [FRAME])
    manifest = forged.manifest().read_bytes()
    one_block(forged, [zstandard.compress(BLOCK[::-1])[: len(FRAME)].ljust(len(FRAME), b"\0")])
    forged.manifest().write_bytes(manifest)
    refuse(forged, tmp_path, "is damaged: ")


# -- what fuzzing has found, and begins with --------------------------------------------------------------------------

CORPUS = sorted((Path(crates.__file__).parent / "artifacts").iterdir())


@pytest.fixture(scope="module")
def crate():
    return Crate()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(crate, path):
    """What fuzzing has found worth keeping: nothing but Damaged comes of it."""
    crate.try_input(path.read_bytes())


def test_seeds(crate):
    """What fuzzing begins with, likewise."""
    for seed in seeds():
        crate.try_input(seed)


CHANGES = st.builds(
    Change,
    st.sampled_from(PARTS),
    st.integers(0, 0xFFFF),
    st.integers(0, 8) | st.integers(0, 0xFFFF),
    st.binary(max_size=20) | st.sampled_from([*NUMBERS_TOLD, *NAMES_TOLD]),
    st.sampled_from([0, 0, 0, RAW]),
)


@given(st.lists(CHANGES, min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_changes(crate, found):
    """Property: the same for any changes of tables and frames, and what is read is what was written, or Damaged."""
    crate.try_input(b"".join(change.pack() for change in found))


# -- the folder that is restored into ---------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_that_leads_out_is_not_followed(forged, tmp_path, exists):
    """Nor is a folder made where it leads to."""
    outside = tmp_path / "outside"
    if exists:
        outside.mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "deep").symlink_to(outside)
    forged.change(forged.manifest(), lambda table: table["files"][0].update(path="deep/er/m.npy"))
    found, error = restored(forged, tmp_path)
    assert "a link there leads out of it" in error
    assert sorted(found) == ["empty", "rows.csv"]
    assert (list(outside.iterdir()) if exists else outside.exists()) in ([], False)


def test_a_link_in_the_place_of_a_file_is_replaced(forged, tmp_path):
    """What it leads to stays as it is."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "rows.csv").symlink_to(tmp_path / "kept")
    assert restored(forged, tmp_path)[1] is None
    assert not (tmp_path / "to" / "rows.csv").is_symlink()
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_folder_that_is_itself_a_link_is_fine(forged, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    memtrack.restore(f"{forged.folder}/data", tmp_path / "link")
    assert sorted(content(tmp_path / "real")) == ["deep/m.npy", "empty", "rows.csv"]


@pytest.mark.parametrize("made", ["deep", "rows.csv/x"])
def test_a_file_where_a_folder_should_be_and_the_other_way_round(forged, tmp_path, made):
    path = tmp_path / "to" / made
    path.parent.mkdir(parents=True)
    path.touch()
    error = restored(forged, tmp_path)[1]
    assert "cannot restore it: " in error
    assert str(tmp_path / "to" / made.split("/")[0]) in error


def test_names_in_a_tensor_file(forged, tmp_path):
    """A tensor's name becomes that of a file."""
    safetensors(tmp_path / "m.safetensors", {"../x": weights(16), "\ud800": weights(16), "a\nb": weights(16),
                                             "x" * 300: weights(16), "fine/one": weights(16)})  # fmt: skip
    data = (tmp_path / "m.safetensors").read_bytes()
    digest = sha256(data).hexdigest()
    pack = forged.add_pack([("plain", len(data), digest, stored(data).frames, None)])
    forged.add_artifact([("m.safetensors", len(data), digest_of(data), [[0, 0, 1, len(data)]])], [pack])
    for name in ("\ud800", "a\nb", "x" * 300, "nowhere"):
        refuse(forged, tmp_path, tensor=name)
    refuse(forged, tmp_path, "max_bytes=10", tensor="fine/one", max_bytes=10)
    for name in ("fine/one", "../x"):
        found, error = restored(forged, tmp_path, tensor=name)
        assert error is None
    assert sorted(found) == ["..-x.safetensors", "fine-one.safetensors"]


# -- what has to be fetched -------------------------------------------------------------------------------------------


class Remote:
    """A folder whose files are fetched, one after the other, as from a tracker."""

    key = "remote"

    def __init__(self, forged):
        self._store = FolderStore(str(forged.folder))
        self.names, self.close = self._store.names, self._store.close
        self.fetched = []

    def get(self, name, path):
        self.fetched.append(name)
        self._store.get(name, path)


@pytest.mark.parametrize(("room", "times"), [(1 << 30, 1), (1, 2)])
def test_packs_that_are_fetched_lie_on_the_disk_while_there_is_room(forged, whole, tmp_path, monkeypatch, room, times):
    """Those that are open are read on, those that had to go are fetched again; in the end there is nothing."""
    remote = Remote(forged)
    monkeypatch.setattr("memtrack.artifacts.fetch.open_store", lambda source: (remote, "data"))
    monkeypatch.setattr("memtrack.artifacts.fetch.MAX_COPIES", room)
    monkeypatch.setattr("memtrack.artifacts.reading.MAX_OPEN", 1)
    assert restored(forged, tmp_path) == (whole.content, None)
    packs = [name for name in remote.fetched if "packs" in name]
    assert len(packs) >= 2 * times
    assert len({*packs}) == 2
    assert (len(packs) == 2) == (times == 1)


def test_what_is_too_large_to_be_ours_is_not_fetched(forged, tmp_path, monkeypatch):
    remote = Remote(forged)
    monkeypatch.setattr("memtrack.artifacts.fetch.open_store", lambda source: (remote, "data"))
    os.truncate(forged.packs_of()[0], 100 * MIB)
    assert "larger than any file of memtrack's" in restored(forged, tmp_path)[1]
    os.truncate(forged.manifest(), 100 * MIB)
    assert "data.mtz in remote is larger than any file of memtrack's" in restored(forged, tmp_path)[1]
    assert len(remote.fetched) <= 2


# -- memory and time --------------------------------------------------------------------------------------------------

BOUNDED = """
import resource, sys, time
import memtrack
import memtrack.artifacts.restore
from memtrack.artifacts.decoding import decompress
from memtrack.errors import ArtifactError
decompress(bytes.fromhex("28b52ffd2000010000"), 0)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (int(sys.argv[1]) << 20),) * 2)
for store in sys.argv[2:]:
    begin = time.process_time()
    try:
        memtrack.restore(f"{store}/data", f"{store}/to")
        error = "none"
    except ArtifactError as exc:
        error = str(exc)
    print(round(time.process_time() - begin, 2), error, sep="\\t", flush=True)
"""


def bounded(mib, *stores):
    """Restore with so much memory beyond what is loaded. The error of each, none of which takes more than 20 s."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BOUNDED, str(mib), *(str(store.folder) for store in stores)]
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr
    lines = [line.split("\t") for line in found.stdout.splitlines()]
    assert len(lines) == len(stores)
    assert max(float(seconds) for seconds, _ in lines) < 20, lines
    return [error for _, error in lines]


def tables():
    """JSON that takes far more memory than bytes."""
    begin, end = b'{"version":1,"memtrack":"artifact","packs":[],"files":[', b"]}"
    yield begin + b",".join([b"[]"] * 2_000_000) + end
    yield begin + b",".join([b"{}"] * 2_000_000) + end
    yield begin + b",".join(b'"%05d"' % number for number in range(2_000_000)) + end
    yield begin + b"{" + b",".join(b'"%05d":"%05d"' % (number, number) for number in range(1_000_000)) + b"}" + end
    yield begin + b'"' + b"a" * (15 << 20) + b'\\ud83d\\ude00"' + end
    yield begin + b"9" * (15 << 20) + end
    yield begin + b"[]" + b" " * (1 << 26) + end
    for number in (350_000, 260_000):  # as much as is read
        yield begin + b",".join([b"[]" if number > 300_000 else b'{"":""}'] * number)[: (1 << 20) - 80] + end


def test_tables_that_take_more_memory_than_bytes(whole, tmp_path):
    stores = []
    for number, text in enumerate(tables()):
        stores.append(whole.copy(tmp_path / f"store-{number}"))
        write_container(stores[-1].manifest(), b"", text)
    assert all("the manifest cannot be read" in error for error in bounded(36, *stores))


def test_frames_that_take_more_memory_than_bytes(whole, tmp_path):
    """A bomb of a gigabyte that says to be 4 KiB, one that says what it is, and one that says nothing."""
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30))
    small = bomb[:4] + b"\x80\x58" + (len(BLOCK)).to_bytes(4, "little") + bomb[10:]
    assert content_size(small) == len(BLOCK)
    stores = [whole.copy(tmp_path / f"store-{number}") for number in range(4)]
    one_block(stores[0], [bomb])
    one_block(stores[1], [small])
    one_block(stores[2], [without_size(bytes(1 << 28))])
    one_block(stores[3], [bomb], size=4 << 20)
    assert all("is damaged: " in error for error in bounded(32, *stores))


def test_the_largest_blocks_there_may_be(whole, tmp_path):
    """Differences of 4 MiB to differences, out of eight planes that are stored as they are."""
    base = np.random.default_rng(1).integers(0, 256, 4 << 20, np.uint8).tobytes()
    frames = stored(bytes(1 << 19)).frames * 8
    digest = sha256(base).hexdigest()
    forged = whole.copy(tmp_path / "store")
    one_block(forged, frames, coding="idelta8", size=4 << 20, digest=digest, base=["f" * 24, 1],
              more=[("idelta8", 4 << 20, digest, frames, ["f" * 24, 2]),
                    ("plain", 4 << 20, digest, stored(base).frames, None)])  # fmt: skip
    assert bounded(4 + 32, forged) == ["none"]
    assert (forged.folder / "to" / "file").read_bytes() == base


def test_many_large_packs_by_turns(whole, tmp_path, monkeypatch):
    """Each with as many blocks as there may be: they are not all held, and not read again without end."""
    forged = whole.copy(tmp_path / "store")
    frames = stored(b"1").frames
    blocks = [("plain", 1, sha256(b"%d" % number).hexdigest(), frames, None) for number in range(1, MAX_ENTRIES + 1)]
    packs = [forged.add_pack(blocks, pack=f"{number:024x}") for number in range(10)]
    ranges = [[number % 10, 0, 1, 1] for number in range(64)]
    forged.add_artifact([("ones", 24, digest_of(*[b"1"] * 24), ranges[:24])], packs)
    assert bounded(40, forged) == ["none"]
    monkeypatch.setattr("memtrack.artifacts.reading.PATIENCE", 15 * MAX_ENTRIES)
    (tmp_path / "store" / "to" / "ones").unlink()
    refuse(forged, tmp_path, "scattered over too many packs")


def test_many_files_of_a_lost_pack(whole, tmp_path):
    """Each is an error; together they are one line, and take no longer than they have to."""
    forged = whole.copy(tmp_path / "store")
    files = [(f"folder/{number}", 1, sha256(b"%d" % number).hexdigest(), [[0, 0, 1, 1]]) for number in range(20_000)]
    forged.add_artifact(files, [["0" * 24, 100]])
    (error,) = bounded(64, forged)
    assert "19995 more are damaged" in error
    assert len(error) < 4000


def test_threads_restore_at_once(forged, whole, tmp_path):
    """A decompressor is for one thread."""
    errors = []

    def restore(number):
        try:
            for _ in range(5):
                memtrack.restore(f"{forged.folder}/data", tmp_path / f"to-{number}")
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=restore, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(content(tmp_path / f"to-{number}") == whole.content for number in range(4))


def test_without_any_zstd_it_is_told_what_to_install(forged, tmp_path, monkeypatch):
    """And a program that only tried to restore goes on."""
    for name in ("zstandard", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("memtrack.artifacts.decoding._decompress", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match="artifacts"):
        memtrack.restore(f"{forged.folder}/data", tmp_path / "to")
