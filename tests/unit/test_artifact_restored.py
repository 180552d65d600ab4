"""Generated artifacts, files of all kinds in up to three versions, come back from packs and manifests as they were."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("zstandard")

from memtrack.artifacts.codecs import WIDTHS
from memtrack.artifacts.ledger import Ledger
from memtrack.artifacts.restore import restore_file
from tests.artifact_lab import Shelf
from tests.unit.test_artifact_codecs import CONTENTS, words_of
from tests.unit.test_layouts import SAFETENSORS, Storage, npz, torch_zip

SPELLED = {dtype: spelled for spelled, dtype in SAFETENSORS.items()}
NUMPY = {"f64": "<f8", "f32": "<f4", "f16": "<f2", "i64": "<i8", "i32": "<i4", "i16": "<i2", "u16": "<u2", "i8": "i1",
         "u8": "u1", "bool": "?", "c64": "<c8", "c128": "<c16"}  # fmt: skip
TORCH = {"f64": "DoubleStorage", "f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage",
         "i64": "LongStorage", "i32": "IntStorage", "u8": "ByteStorage", "bool": "BoolStorage"}  # fmt: skip


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Packs are made to last; on a disk that is what takes the time."""


class Spec(NamedTuple):
    """A file, and what becomes of it from version to version."""

    name: str
    kind: str
    parts: list[tuple[str, str, int, int]]
    """Of each tensor, or piece of bytes: dtype, content, bytes, seed."""
    fates: list[str]


SIZES = st.sampled_from([0, 1, 7, 8, 63, 511, 512, 513, 1000, 4096, 5000, 9999]) | st.sampled_from(
    [33_000, 70_001, 263_000, 1 << 18] + 6 * [2000]
)
LARGE = st.sampled_from([(1 << 20) - 8, 1 << 20, (1 << 20) + 5, 2_500_000])
PARTS = st.tuples(st.sampled_from(sorted(WIDTHS)), st.sampled_from(CONTENTS), SIZES, st.integers(0, 3))
SPECS = st.builds(
    Spec,
    st.sampled_from(["a", "b.bin", "deep/a", "deep/er/c.npy", "ünï/\udcff", " x", "d"]),
    st.sampled_from(["safetensors", "npy", "npz", "torch", "bytes", "numbers", "text"]),
    st.lists(PARTS, min_size=1, max_size=4),
    st.lists(st.sampled_from(["same", "trained", "trained", "inserted", "gone", "new"]), min_size=2, max_size=2),
)
ARTIFACTS = st.fixed_dictionaries({
    "specs": st.lists(SPECS, min_size=1, max_size=4, unique_by=lambda spec: spec.name.split("/")[-1]),
    "large": st.none() | st.none() | st.none() | st.tuples(st.sampled_from(sorted(WIDTHS)), LARGE),
    "versions": st.integers(1, 3),
    "compress": st.sampled_from(["auto", "auto", "auto", "max", "off"]),
    "is_kept": st.booleans(),
    "is_alone": st.booleans(),
})  # fmt: skip


def trained(block, dtype, seed):
    """Words that differ a little here and there."""
    words = np.frombuffer(block, f"<u{WIDTHS[dtype]}").copy()
    steps = np.random.default_rng(seed).integers(-2, 3, len(words))
    return (words + steps.astype(f"<i{WIDTHS[dtype]}").view(words.dtype)).tobytes()


def content_of(spec, version):
    """The bytes of a file in a version; None if it is gone."""
    fates = spec.fates[:version]
    if "gone" in fates:
        return None
    seed = 100 * fates.count("new")
    blocks = []
    for dtype, content, size, own in spec.parts:
        block = words_of(content, dtype, -(-size // WIDTHS[dtype]), own + seed) if size else b""
        if dtype == "bool":
            block = (np.frombuffer(block, np.uint8) & 1).tobytes()
        for at, fate in enumerate(fates):
            if fate == "trained" and dtype != "bool":
                block = trained(block, dtype, own + at)
        blocks.append((dtype, block))
    data = FORMATS[spec.kind](blocks)
    for at, fate in enumerate(fates):
        if fate == "inserted":
            data = data[: len(data) // 2] + bytes(range(at, at + 100)) + data[len(data) // 2 :]
    return data


def _safetensors(blocks):
    head, at = {}, 0
    for number, (dtype, block) in enumerate(blocks):
        spelled = SPELLED.get(dtype, "F8_E4M3")
        head[f"layer.{number}"] = {
            "dtype": spelled, "shape": [len(block) // WIDTHS[dtype]], "data_offsets": [at, at + len(block)],
        }  # fmt: skip
        at += len(block)
    text = str(head).replace("'", '"').encode()
    return struct.pack("<Q", len(text)) + text + b"".join(block for _, block in blocks)


def _npy(blocks):
    dtype, block = blocks[0]
    head = f"{{'descr': '{np.dtype(NUMPY.get(dtype, 'u1')).str}', 'fortran_order': False, 'shape': ({len(block)},), }}"
    text = head.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + block


def _npz(blocks):
    return npz(**{
        f"array_{number}": np.frombuffer(block[: len(block) // 16 * 16], NUMPY.get(dtype, "u1"))
        for number, (dtype, block) in enumerate(blocks)
    })  # fmt: skip


def _torch(blocks):
    state = {
        f"layer{number}": Storage(TORCH.get(dtype, "ByteStorage"), str(number), len(block) // WIDTHS[dtype])
        for number, (dtype, block) in enumerate(blocks)
    }
    return torch_zip("archive", state, {str(number): block for number, (_, block) in enumerate(blocks)})


FORMATS = {
    "safetensors": _safetensors,
    "npy": _npy,
    "npz": _npz,
    "torch": _torch,
    "numbers": lambda blocks: b"".join(block for _, block in blocks),
    "bytes": lambda blocks: b"?" + b"\r\n".join(block for _, block in blocks),
    "text": lambda blocks: b"\n".join(block[: len(block) // 2].hex().encode() for _, block in blocks),
}


def comes_back(example, seen):
    """Store the versions one after the other, and restore all of them. ``seen`` collects how blocks were coded."""
    specs = [*example["specs"]]
    if example["large"] is not None:
        dtype, size = example["large"]
        specs.append(Spec("large", "numbers", [(dtype, "weights", size, 0)], ["trained", "inserted"]))
    with TemporaryDirectory(dir=MEMORY) as top:
        ledger = Ledger(f"{top}/state")
        shelf, stored = Shelf(ledger, f"{top}/packs"), {}
        for version in range(example["versions"]):
            folder = Path(top, f"files-{version}" if example["is_kept"] else "files")
            rmtree(folder, ignore_errors=True)
            files = {spec.name: content_of(spec, version) for spec in specs}
            files = {name: data for name, data in files.items() if data is not None}
            if not files:
                break
            for name, data in files.items():
                os.makedirs(os.path.dirname(folder / name), exist_ok=True)
                (folder / name).write_bytes(data)
            alone = example["is_alone"] and len(files) == 1
            path = folder / next(iter(files)) if alone else folder
            shelf.pack(path, f"artifact/{version}", compress=example["compress"])
            stored[version] = {Path(name).name: data for name, data in files.items()} if alone else files
        for version, files in stored.items():
            artifact = shelf.artifact(f"artifact/{version}")
            assert {path: file.size for path, file in artifact.files.items()} == {
                path: len(data) for path, data in files.items()
            }
            for path, file in artifact.files.items():
                restored = restore_file(artifact, file, f"{top}/back-{version}")
                assert Path(restored).read_bytes() == files[path], path
                for number, first, count, _ in file.ranges:
                    pack = artifact.packs[number][0]
                    seen |= {artifact._packs.entry(pack, block).coding for block in range(first, first + count)}
            artifact.close()
        ledger.close()


def check(examples, *, is_random):
    """Try so many; together they are coded in every way that there is."""
    seen = set()

    @given(ARTIFACTS)
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=not is_random,
        suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )  # fmt: skip
    def run(example):
        comes_back(example, seen)

    run()
    assert seen == {"plain", "planes", "rotate", "delta", "idelta"}


def test_generated_artifacts_come_back():
    """Property: whatever the files are, all versions of them are restored."""
    check(150, is_random=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_generated_artifacts_come_back():
    check(10_000, is_random=True)
