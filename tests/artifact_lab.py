"""Checkpoints and tables as trainings leave them, small, and packing them without a process of its own."""

from __future__ import annotations

import json
import os
import struct
from hashlib import sha256
from pathlib import Path
from shutil import copy, copytree

import numpy as np
import zstandard

from memtrack.artifacts.base import Earlier
from memtrack.artifacts.ledger import Ledger
from memtrack.artifacts.packing import Packer, Source, state_of
from memtrack.artifacts.reading import Artifact
from memtrack.artifacts.tables import END, HEAD, MARK, TABLE, TRAILER, read_table


def weights(count, seed=0):
    """Floats as weights are."""
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)


def trained(before, seed=1):
    """The same weights some steps later."""
    return (before + np.random.default_rng(seed).standard_normal(before.shape) * 1e-5).astype(np.float32)


def safetensors(path, tensors):
    """A file of safetensors, written by its specification."""
    head, at = {}, 0
    for name, tensor in tensors.items():
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(head).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
    return str(path)


def rows(count, seed=0):
    """Lines of a table, no two alike."""
    numbers = np.random.default_rng(seed)
    return [f"{at},{numbers.integers(1000)},{numbers.random():.4f},name {at % 97}\n" for at in range(count)]


class Shelf:
    """A folder of packs and manifests: what a store is, for a packer without a process around it."""

    def __init__(self, ledger, folder):
        self.ledger = ledger
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        self.told = []
        self.progress = []
        self.notes = []

    def pack(self, path, name, *, family="model", step=None, commit=True, fail_at=None, base=True, held="", **options):
        """Pack a file, or a folder, and note it as stored. ``fail_at``: die when so many packs have been told of."""
        self.told.clear()

        def on_pack(pack):
            self.told.append(pack)
            if fail_at is not None and len(self.told) >= fail_at:
                raise KeyboardInterrupt
            self.ledger.mark_stored(pack)

        def note(plain):
            self.notes.append(plain)
            return f"{name}{plain}"

        before = self.ledger.earlier(name, family) if base else None
        earlier = None if before is None else Earlier(self.ledger, before, held, self.open_pack)
        packer = Packer(
            self.ledger, str(self.folder), on_pack, self.progress.append, name=name, earlier=earlier, **options
        )
        try:
            packed = packer.pack(sources_of(path), step, note)
        finally:
            if earlier is not None:
                earlier.close()
        if commit:
            self.ledger.commit(name, family, [(one.path, one.opened) for one in sources_of(path)])
        os.replace(packed.manifest.path, self.folder / f"{name.replace('/', '-')}.manifest")
        return packed

    def open_pack(self, pack):
        return open(self.folder / f"{pack}.mtz", "rb")

    def artifact(self, name):
        """The artifact, open to read."""
        with open(self.folder / f"{name.replace('/', '-')}.manifest", "rb") as manifest:
            return Artifact(manifest, self.open_pack)

    def content(self, name):
        """The bytes of each file, by path."""
        artifact = self.artifact(name)
        found = {
            path: b"".join(bytes(block) for _, block in artifact.blocks(file)) for path, file in artifact.files.items()
        }
        for file in artifact.files.values():
            assert artifact.digest(file) == file.digest
        artifact.close()
        return found

    def bytes_of(self, packs):
        return sum((self.folder / f"{pack}.mtz").stat().st_size for pack in packs)


class Forged:
    """A folder with artifacts in which anything can be changed, and is well-formed again afterwards."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.packs = self.folder / "memtrack" / "packs"

    @classmethod
    def of(cls, shelf, folder):
        """What a shelf has, as a store that is a folder has it."""
        forged = cls(folder)
        forged.packs.mkdir(parents=True)
        for path in shelf.folder.iterdir():
            manifest = forged.folder / "memtrack" / f"{path.stem}.mtz"
            manifest.write_bytes(path.read_bytes()) if path.suffix == ".manifest" else copy(path, forged.packs)
        return forged

    def copy(self, folder):
        """Another one like it."""
        copytree(self.folder, folder)
        return Forged(folder)

    def manifest(self, name="data"):
        """Where the manifest of an artifact is."""
        return self.folder / "memtrack" / f"{name}.mtz"

    def packs_of(self, name="data"):
        """The packs that a manifest lists."""
        with open(self.manifest(name), "rb") as file:
            return [self.packs / f"{pack}.mtz" for pack, _ in read_table(file)[0]["packs"]]

    def change(self, path, change):
        """Change the table of a pack or a manifest, which ``change`` gets; manifests know how large a pack is then."""
        with open(path, "rb") as file:
            table, end = read_table(file)
        change(table)
        write_container(path, path.read_bytes()[:end], table)
        if path.parent == self.packs:
            size = path.stat().st_size
            for one in self.folder.glob("memtrack/*.mtz"):
                self.change(
                    one, lambda table: [row.__setitem__(1, size) for row in table["packs"] if row[0] == path.stem]
                )

    def add_pack(self, blocks, *, pack="f" * 24):
        """Write a pack: rows of its table without the lengths of frames, each with its frames. Gives id and size."""
        rows = [[coding, size, digest, [*map(len, frames)], base] for coding, size, digest, frames, base in blocks]
        content = b"".join(frame for *_, frames, _ in blocks for frame in frames)
        path = self.packs / f"{pack}.mtz"
        write_container(path, content, {"memtrack": "pack", "version": 1, "offset": 0, "blocks": rows})
        return [pack, path.stat().st_size]

    def add_artifact(self, files, packs, name="data"):
        """Write a manifest. ``files``: path, size, digest, ranges."""
        rows = [
            {"path": path, "size": size, "digest": digest, "blocks": ranges} for path, size, digest, ranges in files
        ]
        table = {"memtrack": "artifact", "version": 1, "files": rows, "packs": packs}
        write_container(self.manifest(name), b"", table)


def filled(folder, version):
    """Write three files: one that is told as a difference to its version before, one that is empty."""
    model = weights(20_000)
    (folder / "deep").mkdir(exist_ok=True)
    np.save(folder / "deep" / "m.npy", trained(model) if version else model)
    (folder / "rows.csv").write_text("".join(rows(3000)))
    (folder / "empty").touch()


def forged_store(folder, fill=filled):
    """A folder with the second version of an artifact, ``data``, in two packs. ``content``: what its files are."""
    ledger = Ledger(str(folder / "state"))
    shelf = Shelf(ledger, folder / "packs")
    (folder / "data").mkdir()
    for version in range(2):
        fill(folder / "data", version)
        packed = shelf.pack(folder / "data", "data")
    assert len(packed.packs) == 2
    ledger.close()
    forged = Forged.of(shelf, folder / "store")
    forged.content = content(folder / "data")
    return forged


def content(folder):
    """The bytes of all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def write_container(path, content, table):
    """Write a container by its specification; ``table`` may be text that is no JSON."""
    text = table if isinstance(table, bytes) else json.dumps(table, separators=(",", ":")).encode()
    frame = zstandard.ZstdCompressor(level=9).compress(text)
    end = END.pack(TRAILER, END.size - HEAD.size, len(content), MARK)
    path.write_bytes(content + HEAD.pack(TABLE, len(frame)) + frame + end)


def digest_of(*blocks):
    """The digest of a file that consists of these blocks."""
    return sha256(b"".join(sha256(block).digest() for block in blocks)).hexdigest()


def sources_of(path):
    path = Path(path)
    if path.is_file():
        return [Source(path.name, str(path), 0o644, state_of(path.stat()))]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [Source(file.relative_to(path).as_posix(), str(file), 0o600, state_of(file.stat())) for file in files]
