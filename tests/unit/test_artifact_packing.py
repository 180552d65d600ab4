"""From files to packs: what is referred to, what is a difference, what an attempt that was broken off leaves."""

from __future__ import annotations

import os
import subprocess
from shutil import which

import numpy as np
import pytest

pytest.importorskip("zstandard")

from memtrack.artifacts.ledger import Ledger
from memtrack.artifacts.packing import MAX_DEPTH
from tests.artifact_lab import Shelf, rows, safetensors, trained, weights


@pytest.fixture
def shelf(tmp_path):
    ledger = Ledger(str(tmp_path / "state"))
    yield Shelf(ledger, tmp_path / "packs")
    ledger.close()


def codings(shelf, name):
    artifact = shelf.artifact(name)
    file = next(iter(artifact.files.values()))
    found = [
        artifact._packs.entry(artifact.packs[number][0], block).coding
        for number, first, count, _ in file.ranges
        for block in range(first, first + count)
    ]
    artifact.close()
    return found


def test_a_series_of_checkpoints_is_told_as_differences_and_restored(shelf, tmp_path):
    model, sizes, contents = weights(1 << 20), [], []
    for step in range(3):
        path = tmp_path / f"{step}.safetensors"  # whose name changes, and the files before it stay
        safetensors(path, {"a": model[: 3 << 18], "b": model[3 << 18 :]})
        packed = shelf.pack(path, f"model/step-{step}")
        sizes.append(shelf.bytes_of(shelf.told))
        contents.append(path.read_bytes())
        assert shelf.content(f"model/step-{step}") == {path.name: contents[-1]}
        assert len(packed.packs) == step + 1
        model = trained(model, step)
    assert sizes[1] < 0.66 * sizes[0]
    assert codings(shelf, "model/step-2").count("delta") >= 4
    assert [list(shelf.content(f"model/step-{step}").values()) for step in range(3)] == [[one] for one in contents]


def test_after_eight_differences_comes_a_key_frame(shelf, tmp_path):
    """Restoring gets no longer with the length of the series; the others rest on no more than seven."""
    model, path = weights(1 << 17), tmp_path / "m.npy"
    kinds = []
    for step in range(MAX_DEPTH + 2):
        np.save(path, model)
        shelf.pack(path, f"model/step-{step}")
        kinds.append("delta" in codings(shelf, f"model/step-{step}"))
        assert shelf.content(f"model/step-{step}") == {"m.npy": path.read_bytes()}
        model = trained(model, step)
    assert kinds == [False, *[True] * (MAX_DEPTH - 1), False, True]


def test_a_file_that_was_overwritten_is_taken_from_the_packs(shelf, tmp_path):
    """torch.save to the same path leaves nothing of the checkpoint before but what was packed."""
    model, path = weights(1 << 19), tmp_path / "last.npy"
    np.save(path, model)
    shelf.pack(path, "last.npy")
    np.save(path, trained(model))
    shelf.pack(path, "last.npy")
    assert "delta" in codings(shelf, "last.npy")
    assert shelf.content("last.npy") == {"last.npy": path.read_bytes()}


def test_without_the_packs_and_the_file_it_is_stored_by_itself(shelf, tmp_path):
    model, path = weights(1 << 19), tmp_path / "last.npy"
    np.save(path, model)
    packed = shelf.pack(path, "last.npy")
    np.save(path, trained(model))
    for pack in packed.packs:
        os.rename(shelf.folder / f"{pack}.mtz", tmp_path / f"{pack}.mtz")
    shelf.pack(path, "last.npy")
    for pack in packed.packs:  # they are somewhere else, not lost
        os.rename(tmp_path / f"{pack}.mtz", shelf.folder / f"{pack}.mtz")
    assert "delta" not in codings(shelf, "last.npy")
    assert shelf.content("last.npy") == {"last.npy": path.read_bytes()}


def test_what_is_there_is_not_stored_again(shelf, tmp_path):
    path = safetensors(tmp_path / "m.safetensors", {"a": weights(1 << 19)})
    shelf.pack(path, "model/step-1")
    packed = shelf.pack(path, "model/step-2")
    assert shelf.told == []
    assert len(packed.packs) == 1
    assert shelf.content("model/step-2") == shelf.content("model/step-1")


def test_shards_with_numbers_follow_their_own_names(shelf, tmp_path):
    """model-1-of-2 and model-2-of-2 are of one family, and each follows itself."""
    parts = {number: weights(1 << 18, number) for number in (1, 2)}
    for round_ in range(2):
        for number, part in parts.items():
            path = tmp_path / f"model-{number}-of-2.npy"
            np.save(path, part)
            shelf.pack(path, path.name)
            assert ("delta" in codings(shelf, path.name)) == bool(round_)
            parts[number] = trained(part)


def test_rows_that_are_inserted_cost_what_they_are(shelf, tmp_path):
    path, lines = tmp_path / "rows.csv", rows(120_000)
    path.write_text("".join(lines))
    shelf.pack(path, "rows-1.csv", family="rows-#.csv")
    first = shelf.bytes_of(shelf.told)
    path.write_text("".join([*lines[:60_000], *rows(1_200, 9), *lines[60_000:]]))
    shelf.pack(path, "rows-2.csv", family="rows-#.csv")
    assert shelf.bytes_of(shelf.told) < 0.3 * first
    assert shelf.content("rows-2.csv") == {"rows.csv": path.read_bytes()}


def test_an_attempt_that_was_broken_off_is_gone_on_with(shelf, tmp_path):
    """What it had packed is told of again, as it was never stored, and is not packed again."""
    path = safetensors(tmp_path / "m.safetensors", {"a": weights(20 << 20)})  # three packs
    with pytest.raises(KeyboardInterrupt):
        shelf.pack(path, "model", fail_at=2)
    assert len(shelf.ledger.packs(is_stored=True)) == 1
    left = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(shelf.folder)}
    assert len(left) == 2, "the one that was being made is gone"
    packed = shelf.pack(path, "model")
    assert shelf.told == packed.packs[1:]
    assert len(packed.packs) == 3
    assert all((shelf.folder / name).stat().st_mtime_ns == at for name, at in left.items())
    assert shelf.content("model") == {"m.safetensors": (tmp_path / "m.safetensors").read_bytes()}


def test_a_pack_that_got_lost_before_it_was_stored_is_made_again(shelf, tmp_path):
    path = safetensors(tmp_path / "m.safetensors", {"a": weights(1 << 18)})
    with pytest.raises(KeyboardInterrupt):
        shelf.pack(path, "model", fail_at=1)
    lost = shelf.told[0]
    os.unlink(shelf.folder / f"{lost}.mtz")
    assert shelf.pack(path, "model").packs == [lost], "the same blocks are the same pack"
    assert shelf.content("model")


def test_a_pack_that_the_store_has_lost_is_made_again_with_all_that_rest_on_it(shelf, tmp_path):
    model, path = weights(1 << 18), tmp_path / "m.npy"
    np.save(path, model)
    first = shelf.pack(path, "model/step-1")
    np.save(path, trained(model))
    shelf.pack(path, "model/step-2")
    shelf.ledger.drop_pack(first.packs[0])
    again = shelf.pack(path, "model/step-3")
    assert first.packs[0] not in again.packs
    assert shelf.content("model/step-3") == {"m.npy": path.read_bytes()}


def test_a_block_that_comes_again_does_not_bring_back_what_rested_on_it(shelf, tmp_path):
    """A difference is to a block in a certain pack: the same block in another pack is of no use to it."""
    model, first, second = weights(1 << 18), tmp_path / "first.npy", tmp_path / "second.npy"
    np.save(first, model)
    np.save(second, trained(model))
    lost = shelf.pack(first, "model/step-1").packs[0]
    shelf.pack(second, "model/step-2")
    shelf.ledger.drop_pack(lost)
    os.unlink(shelf.folder / f"{lost}.mtz")
    shelf.pack(tmp_path / "first.npy", "other", family="other", compress="max")
    shelf.pack(second, "model/step-3")
    assert shelf.content("model/step-3") == {"second.npy": second.read_bytes()}


def test_a_folder_with_empty_and_small_files(shelf, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    contents = {"empty": b"", "one": b"1", "deep/er/notes.txt": b"text" * 50, "deep/a.bin": os.urandom(70_000)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    shelf.pack(folder, "folder")
    assert shelf.content("folder") == contents
    assert {file.mode for file in shelf.artifact("folder").files.values()} == {0o600}


def test_names_that_are_no_text(shelf, tmp_path):
    """Of files, which Linux takes, and of tensors, which JSON does."""
    folder, model = tmp_path / "folder", weights(1 << 17)
    folder.mkdir()
    for step in range(2):
        safetensors(folder / "m\udcff.safetensors", {"half \ud800": model})
        shelf.pack(folder, f"model/{step}")
        content = (folder / "m\udcff.safetensors").read_bytes()
        assert shelf.content(f"model/{step}") == {"m\udcff.safetensors": content}
        model = trained(model)
    assert "delta" in codings(shelf, "model/1")


def test_what_could_not_be_restored_is_refused(shelf, tmp_path):
    """At once, before anything is packed."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "two\nlines").touch()
    with pytest.raises(ValueError, match=r"'two\\nlines' is a name that may not be restored: rename the file"):
        shelf.pack(tmp_path / "folder", "folder")
    assert list(shelf.folder.iterdir()) == []


@pytest.mark.parametrize("compress", ["auto", "max", "off"])
def test_bytes_come_back_with_zstd_alone(shelf, tmp_path, compress):
    path = tmp_path / "rows.csv"
    path.write_text("".join(rows(30_000)))
    packed = shelf.pack(path, "rows.csv", compress=compress)
    assert packed.is_plain
    assert f"zstd -dc memtrack/packs/{packed.packs[0]}.mtz" in shelf.notes[-1]
    assert shelf.content("rows.csv") == {"rows.csv": path.read_bytes()}
    if which("zstd"):
        names = [str(shelf.folder / f"{pack}.mtz") for pack in packed.packs]
        assert subprocess.run(["zstd", "-dcq", *names], capture_output=True, check=True).stdout == path.read_bytes()
        manifest = str(shelf.folder / "rows.csv.manifest")
        assert subprocess.run(["zstd", "-tq", *names, manifest], capture_output=True).returncode == 0


def test_weights_are_not_said_to_come_back_with_zstd_alone(shelf, tmp_path):
    packed = shelf.pack(safetensors(tmp_path / "m.safetensors", {"a": weights(1 << 18)}), "model")
    assert not packed.is_plain
    assert shelf.notes == [""]


def test_off_does_not_compress_and_still_leaves_out_what_is_there(shelf, tmp_path):
    path = safetensors(tmp_path / "m.safetensors", {"a": np.zeros(1 << 18, np.float32)})
    shelf.pack(path, "model", compress="off")
    assert os.path.getsize(path) < shelf.bytes_of(shelf.told) + 4096
    shelf.pack(path, "again", compress="off")
    assert shelf.told == []


def test_a_file_that_is_written_to_meanwhile_is_read_once_more(shelf, tmp_path, monkeypatch):
    """What is restored is what it was at one moment, and it is told that it is the later one."""
    path = tmp_path / "m.bin"
    path.write_bytes(os.urandom(3 << 20))
    reads = []
    from memtrack.artifacts import packing

    blocks = packing._blocks

    def written_to(file, layout):
        reads.append(file.name)
        yield from blocks(file, layout)
        if len(reads) == 1:
            path.write_bytes(os.urandom(2 << 20))

    monkeypatch.setattr(packing, "_blocks", written_to)
    packed = shelf.pack(path, "m.bin")
    assert len(reads) == 2
    assert packed.changed == ["m.bin"]
    assert shelf.content("m.bin") == {"m.bin": path.read_bytes()}


def test_progress_ends_with_everything(shelf, tmp_path):
    path = safetensors(tmp_path / "m.safetensors", {"a": weights(1 << 19)})
    shelf.pack(path, "model")
    done, total, stored = shelf.progress[-1]
    assert done == total == os.path.getsize(path)
    assert 0 < stored < done


def test_a_ledger_that_is_damaged_is_begun_anew(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (state / "ledger.db").write_bytes(b"no database" * 1000)
    ledger = Ledger(str(state))
    assert ledger.packs(is_stored=True) == []
    ledger.close()
