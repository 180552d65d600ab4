"""``memtrack.restore`` and ``memtrack.delete_checkpoint``: back from a tracker or a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from memtrack import config, registry
from memtrack.artifacts.store import PACKS, ROOT, FolderStore, remove
from memtrack.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactNotFoundError,
    MemtrackError,
    MissingDependencyError,
    SettingsError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.artifacts.reading import Artifact, File
    from memtrack.artifacts.store import Store

    Found = TypeVar("Found")


MAX_STORED = 80 << 20
"""Bytes of a pack or a manifest that is fetched: more than are written, so that room is left for later versions."""
MAX_COPIES = 1 << 30
"""Bytes on the disk of packs that have been fetched: as a rule they are needed one after the other."""
MAX_TOLD = 5
"""Files that an error names."""


class DeletedArtifact(NamedTuple):
    """What came of deleting an artifact."""

    name: str
    freed_bytes: int
    """Of packs that were removed."""
    kept_bytes: int
    """Of its packs that others need: they go with the last of these."""
    needed_by: tuple[str, ...]
    """The artifacts that need them."""


def restore(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str] = ".",
    *,
    file: str | None = None,
    tensor: str | None = None,
    max_bytes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """Restore an artifact below the folder ``to``, byte for byte. Returns the path of the file, or of the folder.

    Each block is compared with its digest, and a file appears when it is complete; nothing in it is ever executed. What
    a restored file does when it is loaded is another matter: a ``.pt`` is as safe as it was.

    Args:
        source: ``"mlflow:RUN_ID/NAME"``, ``"wandb:ENTITY/PROJECT/NAME"`` or ``"wandb:RUN_FOLDER/NAME"``,
            ``"comet:KEY/NAME"`` or ``"comet:ARCHIVE.zip/NAME"``, or ``"FOLDER/NAME"``. The name of a checkpoint alone
            is its newest.
        to: A folder, which is made. What is there under the same name is replaced.
        file: Only this file of a folder.
        tensor: Only this tensor of a file, as ``TENSOR.safetensors``: by its name in safetensors, by its member in
            ``.npz``, by its name in the state or its record, such as ``data/17``, in what torch has saved.
        max_bytes: Refuse artifacts that come to more than that. Default what the disk has free.
        on_progress: Called with the bytes that are restored so far and in all.

    Raises:
        ArtifactNotFoundError: There is no such run, artifact, file or tensor.
        ArtifactFormatError: It is damaged; the message names the pack and what is lost. Other files are restored.
        ArtifactError: It is too large, or cannot be written.
        DeliveryError: The tracker does not answer.
        MissingDependencyError: numpy or zstandard, or the tracker's client, is not installed.

    Takes some 10 MiB, whatever the size, and 1 KiB for each file; of packs that have to be fetched up to 1 GiB lie
    meanwhile in the folder for temporary files. Thread-safe.
    """
    to = os.fspath(to)
    with _opened(os.fspath(source)) as artifact:
        files = _chosen(artifact.artifact, file)
        if tensor is not None:
            from memtrack.artifacts.tensor import restore_tensor

            check = partial(_check_size, max_bytes=max_bytes, to=to)
            return _translated(lambda: restore_tensor(artifact.artifact, files, tensor, to, check))
        _check_size(sum(one.size for one in files), max_bytes, to)
        return _restore_files(artifact.artifact, files, to, on_progress)


def delete_checkpoint(source: str | os.PathLike[str]) -> DeletedArtifact:
    """Delete an artifact, in the middle of a series as well. What others are told as differences to stays for them.

    Args:
        source: As in :func:`memtrack.restore`, the whole name.

    Raises:
        ArtifactNotFoundError: There is no such artifact.
        ArtifactError: The tracker cannot delete from here; the message tells what to do.
        DeliveryError: The tracker does not answer.

    Not to be called while an artifact is being stored in the same run. Needs as many requests as there are artifacts.
    """
    from memtrack.artifacts.ledger import Ledger
    from memtrack.artifacts.pending import state_folder
    from memtrack.artifacts.uploader import OVERVIEW

    store, name = open_store(os.fspath(source))
    try:
        known = store.names()
        name = _full_name(store, known, name)
        manifests = [one for one in known if _is_manifest(one)]
        needs = {one: _packs_of(store, one) for one in manifests}
        own = needs.pop(f"{ROOT}/{name}.mtz")
        kept = {pack for packs in needs.values() for pack in packs}
        # first what leads to the packs: killed in between, there are packs too many, and none is missing
        store.delete(f"{ROOT}/{name}.mtz")
        for pack in own:
            if pack not in kept:
                store.delete(f"{PACKS}{pack}.mtz")
        if OVERVIEW in known:  # it would tell of what is gone; the next artifact brings another
            store.delete(OVERVIEW)
        state = state_folder(config.find_directory(config.resolve({})), store.key)
        if os.path.isdir(state):
            ledger = Ledger(state)
            ledger.forget(name)
            ledger.close()
        needed_by = [one[len(ROOT) + 1 : -4] for one, packs in needs.items() if own.keys() & packs.keys()]
        return DeletedArtifact(
            name,
            sum(size for pack, size in own.items() if pack not in kept),
            sum(size for pack, size in own.items() if pack in kept),
            tuple(sorted(needed_by)),
        )
    finally:
        store.close()


def open_store(source: str) -> tuple[Store, str]:
    """The store that ``source`` names, and the name of the artifact in it."""
    tracker, mark, rest = source.partition(":")
    if mark and tracker in registry.STORES:
        if not rest:
            raise SettingsError("source", source, f"give {tracker}:RUN/NAME")
        opened: tuple[Store, str] = registry.load_store(tracker)(rest)
        return opened
    folder, name = os.path.split(source.rstrip("/"))
    while folder and not os.path.isdir(os.path.join(folder, ROOT)):
        folder, _, part = folder.rpartition("/")
        name = f"{part}/{name}"
    if not folder and not os.path.isdir(ROOT):
        raise ArtifactNotFoundError(f"there is no artifact {source}: no folder on its way has a folder {ROOT!r}")
    return FolderStore(folder or "."), name


class _opened:
    """The artifact of a source, for a ``with`` block. Its packs are fetched when they are needed."""

    def __init__(self, source: str) -> None:
        try:
            from memtrack.artifacts.reading import Artifact
        except ImportError as exc:
            raise MissingDependencyError("restoring artifacts", "artifacts") from exc
        self._store, name = open_store(source)
        self._folder = tempfile.mkdtemp(prefix="memtrack-restore-")
        self._copies: dict[str, int] = {}
        """What has been fetched, and the bytes that it takes on the disk."""
        try:
            self._sizes = self._store.names()
            self.name = _full_name(self._store, self._sizes, name)
            with self._fetch(f"{ROOT}/{self.name}.mtz") as manifest:
                self.artifact: Artifact = _translated(lambda: Artifact(manifest, self._open_pack))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> _opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.artifact.close()
        self._close()

    def _close(self) -> None:
        self._store.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _open_pack(self, pack: str) -> BinaryIO:
        try:
            return self._fetch(f"{PACKS}{pack}.mtz")
        except ArtifactNotFoundError as exc:
            raise FileNotFoundError(pack) from exc

    def _fetch(self, name: str) -> BinaryIO:
        if isinstance(self._store, FolderStore):
            return self._store.open(name)  # type: ignore[return-value]
        if self._sizes.get(name, -1) > MAX_STORED:
            raise ArtifactFormatError(f"{name} in {self._store.key} is larger than any file of memtrack's")
        path = os.path.join(self._folder, name.replace("/", "-"))
        size = self._copies.pop(path, 0)
        if not size:
            self._store.get(name, path)
            size = os.path.getsize(path)
        self._copies[path] = size  # the newest last: the oldest goes first
        while sum(self._copies.values()) > MAX_COPIES and len(self._copies) > 1:
            oldest = next(iter(self._copies))
            del self._copies[oldest]
            remove(oldest)
        return open(path, "rb")


def _full_name(store: Store, known: dict[str, int], name: str) -> str:
    """The name of an artifact; of a series of checkpoints the newest."""
    if f"{ROOT}/{name}.mtz" in known:
        return name
    steps = sorted(one for one in known if _is_manifest(one) and one.startswith(f"{ROOT}/{name}/"))
    if steps:
        return steps[-1][len(ROOT) + 1 : -4]
    there = sorted(one[len(ROOT) + 1 : -4] for one in known if _is_manifest(one))
    raise ArtifactNotFoundError(
        f"there is no artifact {store.source(name)}; {'there are: ' + ', '.join(there[:20]) if there else 'nor any'}"
    )


def _is_manifest(name: str) -> bool:
    return name.endswith(".mtz") and not name.startswith(PACKS) and name.isprintable()


def _packs_of(store: Store, manifest: str) -> dict[str, int]:
    """Id and size of the packs that an artifact needs."""
    from memtrack.artifacts.reading import Artifact

    with tempfile.TemporaryDirectory(prefix="memtrack-") as folder:
        path = os.path.join(folder, "manifest.mtz")
        store.get(manifest, path)
        with open(path, "rb") as file:
            found: Artifact = _translated(lambda: Artifact(file, _no_pack))
            return dict(found.packs)


def _no_pack(pack: str) -> BinaryIO:
    raise FileNotFoundError(pack)


def _chosen(artifact: Artifact, file: str | None) -> list[File]:
    if file is None:
        return list(artifact.files.values())
    if file not in artifact.files:
        from memtrack.artifacts.tables import shown

        there = sorted(shown(one[:200]) for one in artifact.files)
        more = f" and {len(there) - 20} more" if len(there) > 20 else ""
        raise ArtifactNotFoundError(f"there is no file {file!r} in it; there are: {', '.join(there[:20])}{more}")
    return [artifact.files[file]]


def _check_size(size: int, max_bytes: int | None, to: str) -> None:
    if max_bytes is None:
        from memtrack.artifacts.restore import room_in

        max_bytes = room_in(to)
        if size > max_bytes:
            raise ArtifactError(f"it comes to {size / 1e6:.1f} MB, and {to} has {max_bytes / 1e6:.1f} MB free")
    if size > max_bytes:
        raise ArtifactError(f"it comes to {size} bytes, and max_bytes={max_bytes}")


def _restore_files(
    artifact: Artifact, files: list[File], to: str, on_progress: Callable[[int, int], None] | None
) -> str:
    from memtrack.artifacts.restore import restore_file
    from memtrack.artifacts.tables import shown

    total, done = sum(one.size for one in files), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    path = to
    errors: list[str] = []
    for one in files:
        try:
            path = _translated(partial(restore_file, artifact, one, to, on_bytes))
        except ArtifactFormatError as exc:
            errors.append(f"{shown(one.path[:200])}: {exc}" if len(errors) < MAX_TOLD else "")
    if errors:
        more = f"; and {len(errors) - MAX_TOLD} more are damaged" if len(errors) > MAX_TOLD else ""
        raise ArtifactFormatError("; ".join(errors[:MAX_TOLD]) + more)
    return path if len(artifact.files) == 1 or len(files) == 1 else to


def _translated(call: Callable[[], Found]) -> Found:
    """What restore.py raises, which knows nothing of memtrack, as errors of memtrack's."""
    from memtrack.artifacts.decoding import Damaged
    from memtrack.artifacts.tables import shown

    try:
        return call()
    except Damaged as exc:
        raise ArtifactFormatError(str(exc)) from exc
    except MemtrackError:
        raise
    except ImportError as exc:
        raise MissingDependencyError("restoring artifacts", "artifacts") from exc
    except OSError as exc:
        raise ArtifactError(
            f"cannot restore it: {exc.strerror or exc}{f': {shown(str(exc.filename))}' if exc.filename else ''}"
        ) from exc
