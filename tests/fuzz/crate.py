"""Artifacts made of a few bytes: changes to tables and frames of a small whole one, well-formed again afterwards.

An input is a list of changes, each of them a header of six bytes and what is written::

    part | place (two bytes), how many bytes there give way (two bytes), length of what takes their place | the bytes

``part`` numbers PARTS; the tables are changed as text. With ``RAW`` added it is the container, as it is in the end,
that is changed. Otherwise the manifest is told the new sizes of packs, so that readers look at what is in them.
"""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from memtrack.artifacts.codecs import stored
from memtrack.artifacts.decoding import Damaged, content_size, decompress
from memtrack.artifacts.layouts import tensors_of
from memtrack.artifacts.reading import Artifact
from memtrack.artifacts.tables import END, HEAD, MARK, TABLE, TRAILER, is_safe, read_table
from memtrack.artifacts.tensor import StoredFile
from tests.artifact_lab import forged_store, safetensors, trained, weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

PARTS = ("manifest", "table 0", "table 1", "frames 0", "frames 1")
RAW = 8
MAX_BYTES = 4 << 20

_CHANGE = struct.Struct("<BHHB")


class Change(NamedTuple):
    """One change; ``part`` is a name of PARTS, with ``RAW`` as ``kind`` it is the whole file."""

    part: str
    at: int
    given: int
    content: bytes
    kind: int = 0

    def pack(self) -> bytes:
        """As a part of an input."""
        return _CHANGE.pack(PARTS.index(self.part) + self.kind, self.at, self.given, len(self.content)) + self.content


def changes(data: bytes) -> Iterator[Change]:
    """The changes of an input, whatever it is."""
    at = 0
    while at + _CHANGE.size <= len(data):
        number, place, given, length = _CHANGE.unpack_from(data, at)
        at += _CHANGE.size + length
        yield Change(PARTS[number % RAW % len(PARTS)], place, given, data[at - length : at], number & RAW)


class Crate:
    """An artifact with two packs, in memory, which changes are made to."""

    def __init__(self) -> None:
        with TemporaryDirectory() as folder:
            store = forged_store(Path(folder), _fill)
            self.content: dict[str, bytes] = store.content
            packs = store.packs_of()
            self.ids = [path.stem for path in packs]
            self.parts: dict[str, bytes] = {}
            for name, path in zip(("manifest", "0", "1"), (store.manifest(), *packs), strict=True):
                with open(path, "rb") as file:
                    _, end = read_table(file)
                    file.seek(end)
                    _, length = HEAD.unpack(file.read(HEAD.size))
                    frame = file.read(length)
                    text = decompress(frame, content_size(frame))
                    file.seek(0)
                    self.parts["manifest" if name == "manifest" else f"table {name}"] = text
                    self.parts[f"frames {name}"] = file.read(end)

    def try_input(self, data: bytes) -> None:
        """Make the changes that an input spells, and read all there is to read."""
        parts, raw = {**self.parts}, []
        for change in changes(data):
            if change.kind:
                raw.append(change)
            else:
                parts[change.part] = _changed(parts[change.part], change)
        packs = {pack: _container(parts[f"frames {at}"], parts[f"table {at}"]) for at, pack in enumerate(self.ids)}
        for change in raw:
            if change.part != "manifest":
                pack = self.ids[int(change.part[-1])]
                packs[pack] = _changed(packs[pack], change)
        manifest = _container(parts["frames manifest"], _with_sizes(parts["manifest"], packs))
        for change in raw:
            if change.part == "manifest":
                manifest = _changed(manifest, change)
        read_everything(manifest, packs, {} if parts["manifest"] != self.parts["manifest"] or raw else self.content)


def read_everything(manifest: bytes, packs: dict[str, bytes], content: dict[str, bytes]) -> None:
    """Ask a reader all it can be asked. Nothing but Damaged may come of it, with a message that can be printed.

    ``content``: what the files have to be, if they can be read at all.
    """

    def open_pack(pack: str) -> BinaryIO:
        if pack not in packs:
            raise FileNotFoundError(pack)
        return io.BytesIO(packs[pack])

    try:
        artifact = Artifact(io.BytesIO(manifest), open_pack)
    except Damaged as exc:
        _is_printable(exc)
        return
    for file in artifact.files.values():
        assert is_safe(file.path)
        assert not file.path.startswith("/")
        assert ".." not in file.path.split("/")
        assert 0 <= file.mode <= 0o777
        if file.size > MAX_BYTES:
            continue
        try:
            found = b"".join(bytes(block) for _, block in artifact.blocks(file))
            assert len(found) == file.size
            if artifact.digest(file) == file.digest:
                assert found == content.get(file.path, found)
        except Damaged as exc:
            _is_printable(exc)
        try:
            tensors_of(io.BufferedReader(StoredFile(artifact, file)), file.size)
        except Damaged as exc:
            _is_printable(exc)
    artifact.close()


def _fill(folder: Path, version: int) -> None:
    """The files of the artifact, which is small: most of it is what is told of it."""
    model = weights(1500)
    safetensors(folder / "m.safetensors", {"a": trained(model) if version else model, "b": model[:40]})
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "text").write_bytes(b"text " * 200)
    (folder / "empty").touch()


def _changed(data: bytes, change: Change) -> bytes:
    at = change.at % (len(data) + 1)
    return data[:at] + change.content + data[at + change.given :]


def _container(frames: bytes, text: bytes) -> bytes:
    (frame,) = stored(text).frames
    end = END.pack(TRAILER, END.size - HEAD.size, len(frames), MARK)
    return frames + HEAD.pack(TABLE, len(frame)) + frame + end


def _with_sizes(text: bytes, packs: dict[str, bytes]) -> bytes:
    try:
        table = json.loads(text)
        for row in table["packs"]:
            if row[0] in packs:
                row[1] = len(packs[row[0]])
    except (ValueError, RecursionError, LookupError, TypeError):
        return text
    return json.dumps(table, separators=(",", ":")).encode()


def _is_printable(exc: Damaged) -> None:
    assert str(exc).isprintable(), f"not printable: {exc!r}"
    assert len(str(exc)) < 4000


# -- what fuzzing begins with -----------------------------------------------------------------------------------------

NUMBERS = (
    b"-1",
    b"0",
    b"1",
    b"2",
    b"7",
    b"4194305",
    b"9" * 19,
    b"9" * 25,
    b"1e9",
    b"true",
    b"null",
    b'"1"',
    b"[]",
    b"NaN",
)
NAMES = (b"../x", b"/x", b"", b"a/../b", b"\\u0000", b"\\ud800", b"\\u001b[2J", b"empty", b"deep", b"x" * 200)
CODINGS = (b"plain", b"planes1", b"planes2", b"rotate1", b"rotate4", b"delta4", b"idelta8", b"planes3", b"")


def seeds() -> Iterator[bytes]:
    """Every number, name, coding and digest replaced by others, one at a time; frames flipped and cut."""
    crate = Crate()
    yield b""
    for part in PARTS[:3]:
        text = crate.parts[part]
        for pattern, values in (
            (rb"(?<=[:\[,])\d+", NUMBERS), (rb'(?<="path":")[^"]*', NAMES), (rb"(?<=\[\")[a-z]+\d?(?=\")", CODINGS),
            (rb"[0-9a-f]{64}", (b"0" * 64, b"", b"g" * 64)),
            (rb"[0-9a-f]{24}(?=\")", (*map(str.encode, crate.ids), b"")),
            (rb"null", (b"[]", b'["%b",0]' % crate.ids[0].encode(), b'["%b",1]' % crate.ids[1].encode())),
        ):  # fmt: skip
            for match in re.finditer(pattern, text):
                for value in values:
                    yield Change(part, match.start(), len(match[0]), value).pack()
        yield Change(part, 0, len(text), b"[" * 250).pack()
        yield Change(part, len(text) - 1, 0, b',"x":0').pack()
    for part in PARTS[3:]:
        for at in range(0, len(crate.parts[part]), 97):
            yield Change(part, at, 1, b"\xff").pack()
            yield Change(part, at, 5, b"").pack()
            yield Change(part, at, 0, b"", RAW).pack() + Change(part, at, 0xFFFF, b"", RAW).pack()
    for part in PARTS[:1] + PARTS[3:]:
        for back in range(1, 25):
            yield Change(part, 0xFFFF, back, b"", RAW).pack()


def main(folder: str) -> None:
    """Write the seeds to a folder."""
    for number, seed in enumerate(seeds()):
        Path(folder, f"seed-{number:04}").write_bytes(seed)


if __name__ == "__main__":
    main(sys.argv[1])
