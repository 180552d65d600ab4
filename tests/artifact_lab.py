"""Checkpoints and tables as trainings leave them, small, and packing them without a process of its own."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np

from memtrack.artifacts.base import Earlier
from memtrack.artifacts.packing import Packer, Source, state_of
from memtrack.artifacts.reading import Artifact


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


def sources_of(path):
    path = Path(path)
    if path.is_file():
        return [Source(path.name, str(path), 0o644, state_of(path.stat()))]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [Source(file.relative_to(path).as_posix(), str(file), 0o600, state_of(file.stat())) for file in files]
