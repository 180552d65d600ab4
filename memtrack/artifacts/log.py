"""``memtrack.log_artifact`` and ``memtrack.log_checkpoint``: what is to be stored, where, and under which name."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from memtrack import config, registry
from memtrack.artifacts.pending import note, state_folder
from memtrack.artifacts.save import save
from memtrack.artifacts.store import ROOT, FolderStore, checked
from memtrack.artifacts.upload import Upload, warn
from memtrack.artifacts.uploader import Task, current
from memtrack.artifacts.worker import Job
from memtrack.errors import (
    ArtifactError,
    ArtifactFormatError,
    MemtrackError,
    MissingDependencyError,
    SettingsError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memtrack.artifacts.store import Store

COMPRESS = ("auto", "max", "off")
BASES = ("auto", "off")
RESERVED = ("packs", "README.md", "restore.py")
"""What stands beside the artifacts in a run."""
NEEDS = ("numpy", "zstandard")
FICLONE = 0x40049409
CACHE_BYTES = 1 << 30
"""Packs that are kept beside the recordings, of each run, when they are stored."""


def log_artifact(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    to: str | os.PathLike[str] | None = None,
    compress: str = "auto",
    base: str = "auto",
) -> Upload:
    """Store a file or a folder with the run: compressed, without what is there already, to be restored byte for byte.

    Returns at once. A process of low priority reads and packs it, holding 32 MiB at the most; what that has made goes
    to the tracker piece by piece. The file may be replaced, renamed or removed as soon as this has returned. Where it
    is written to before it has been read, what is stored is the later, which is told; ``wait()`` before that, or save
    under another name. A folder on another file system than the recordings must stay until ``wait()``.

    Args:
        path: The file or folder. Links in a folder are stored as what they lead to, if that is a file; 50,000 files are
            the most.
        name: What it is restored by, default its own name. What had the name in this run before is replaced.
        to: ``"mlflow"``, ``"wandb"``, ``"comet"``, or a folder. Default the active run of the first of these that has
            one, else the folder ``.memtrack/artifacts/local``.
        compress: ``"auto"``; ``"max"`` for a few percent less of text, at 3 MB a second; ``"off"`` only leaves out what
            is there already.
        base: ``"auto"`` tells weights as differences to the last artifact of the same name, numbers in it aside, so
            that ``epoch4.ckpt`` follows ``epoch3.ckpt``. A link to the file is kept for that in the folder of the
            recordings until the next comes, so a file that is removed takes its place on the disk until then. ``"off"``
            does without.

    Raises:
        ArtifactError: There is no such file, it is none that can be read, or the tracker has no active run.
        SettingsError: An argument is wrong.
        MissingDependencyError: numpy or zstandard is not installed.

    What goes wrong later is told once, as a warning and in :attr:`Upload.error`, and is tried again while the program
    runs. Its end waits for 60 s (``MEMTRACK_ARTIFACT_WAIT``); what is not stored then is left for the next call with
    the same file, or ``memtrack sync``. Thread-safe.
    """
    path = os.fspath(path)
    name = _name("name", os.path.basename(os.path.abspath(path)) if name is None else name)
    return _log(path, name, re.sub(r"\d+", "#", name), None, to, compress, base)


def log_checkpoint(
    state: Any,
    *,
    step: int | None = None,
    name: str = "checkpoint",
    to: str | os.PathLike[str] | None = None,
    compress: str = "auto",
    base: str = "auto",
) -> Upload:
    """Store a checkpoint: a file, a folder, or something to be saved first, told as the difference to the one before.

    Args:
        state: A path; or numpy arrays (one, or a dictionary of them), a matrix of scipy.sparse, or what ``torch.save``
            takes, if torch is loaded. That is saved here and now, which takes as long as saving does; the rest is done
            elsewhere.
        step: The step that it is of, which becomes part of its name: ``checkpoint/step-00000040``. Default the last
            one that was marked, if any was.
        name: What the checkpoints of a series have in common.
        to, compress, base: As in :func:`memtrack.log_artifact`, and so are the errors and what comes later.
    """
    name = _name("name", name)
    if step is None:
        from memtrack.monitor import active

        step = active.marks.last_step if active.marks is not None and active.marks.last_step >= 0 else None
    elif not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise SettingsError("step", step, "give the number of a step, 0 or more")
    full = name if step is None else f"{name}/step-{step:08d}"
    path = os.fspath(state) if isinstance(state, (str, os.PathLike)) else None
    return _log(path, full, name, step, to, compress, base, state=state)


def check_installed() -> None:
    """Raise MissingDependencyError if the process that packs could not work."""
    for module in NEEDS:
        if find_spec(module) is None:
            raise MissingDependencyError("storing artifacts", "artifacts")


def _log(
    path: str | None,
    name: str,
    family: str,
    step: int | None,
    to: str | os.PathLike[str] | None,
    compress: str,
    base: str,
    state: Any = None,
) -> Upload:
    if compress not in COMPRESS:
        raise SettingsError("compress", compress, "give 'auto', 'max' or 'off'")
    if base not in BASES:
        raise SettingsError("base", base, "give 'auto' or 'off'")
    settings = config.resolve({})
    if settings.disable:
        done = Upload(name, "nowhere")
        done.settle("memtrack is disabled")
        return done
    check_installed()
    if path is not None:
        path = os.path.abspath(path)
        _check(path)
    directory = config.make_directory(settings)
    store = _store(to, directory)
    cache_bytes = _cache_bytes()
    upload = Upload(name, store.source(name))
    place = state_folder(directory, store.key)
    held = os.path.join(place, "held", f"job-{os.urandom(8).hex()}")
    try:
        os.makedirs(held, 0o700)
        if path is None:
            path = save(state, os.path.join(held, os.path.basename(family)))
        sources, fds = _hold(path, held)
        job = Job(
            name=name,
            family=family,
            step=step,
            compress=compress,
            use_base=base == "auto",
            with_md5=store.keeps_files,
            folder=store.folder or os.path.join(place, "packs"),
            keeps_packs=store.keeps_files,
            cache_bytes=cache_bytes,
            state=place,
            held=held,
            sources=sources,
            stored=None,
            source=store.source(name),
            note=_text(name, store),
            path=[entry for entry in sys.path if entry],
        )
        current().add(Task(upload, store, job, note(job, store.source(name)), fds))
    except OSError as exc:
        shutil.rmtree(held, ignore_errors=True)
        if isinstance(exc, MemtrackError):
            raise
        # a disk that is full is no reason for a training to end
        upload.settle(f"{exc.strerror or exc}: {exc.filename or place}")
        warn(upload, "is not tried again: log it once more when there is room")
    except BaseException:
        shutil.rmtree(held, ignore_errors=True)
        raise
    return upload


def _store(to: str | os.PathLike[str] | None, directory: str) -> Store:
    """Where to. Raises ArtifactError if a tracker is named that has no run."""
    if to is None or to in registry.STORES:
        for active in registry.load_active_stores(to):
            found: Store | None = active()
            if found is not None:
                return found
        if to is not None:
            raise ArtifactError(
                f"to={to!r}: no run of it is active in this process. Start one first, or give a folder."
            )
        return FolderStore(os.path.join(directory, "artifacts", "local"), link=True)
    if not isinstance(to, (str, os.PathLike)) or not os.fspath(to):
        raise SettingsError("to", to, f"give {', '.join(map(repr, registry.STORES))}, or a folder")
    return FolderStore(os.fspath(to), link=True)


def _name(argument: str, name: Any) -> str:
    try:
        checked(f"{ROOT}/{name}")
        if not isinstance(name, str) or name.split("/")[0] in RESERVED or name.endswith(".mtz"):
            raise ArtifactFormatError
    except ArtifactFormatError:
        raise SettingsError(
            argument, name, f"give a name such as 'model' or 'data/train', none of {', '.join(RESERVED)}, without '..'"
        ) from None
    return name


def _check(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as exc:
        raise ArtifactError(f"cannot store {path}: {exc.strerror}") from exc
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ArtifactError(f"cannot store {path}: it is neither a file nor a folder")
    if stat.S_ISDIR(mode):
        return
    if not os.access(path, os.R_OK):
        raise ArtifactError(f"cannot store {path}: it may not be read")


def _hold(path: str, held: str) -> tuple[list[list[Any]], tuple[int, ...]]:
    """What there is to pack, held by links so that it can be removed or replaced; or by being open, if it is one file
    for which there can be no link."""
    if os.path.dirname(path) == held:  # it has been saved there
        return [_row(os.path.basename(path), path, path)], ()
    if not os.path.isdir(path):
        place = os.path.join(held, os.path.basename(path))
        if _link(path, place):
            return [_row(os.path.basename(path), place, path)], ()
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        opened = f"/proc/self/fd/{fd}" if os.path.isdir("/proc/self/fd") else path
        return [_row(os.path.basename(path), opened, path)], (fd,)
    rows = []
    for file in _files(path):
        inside = os.path.relpath(file, path)
        place = os.path.join(held, inside)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        rows.append(_row(inside.replace(os.sep, "/"), place if _link(file, place) else file, file))
    if not rows:
        raise ArtifactError(f"cannot store {path}: there is no file in it")
    return rows, ()


def _row(inside: str, opened: str, path: str) -> list[Any]:
    """A file as the process that packs is told of it, see ``Job.sources``."""
    status = os.stat(opened)
    return [inside, opened, stat.S_IMODE(os.stat(path).st_mode) & 0o777, path, status.st_size, status.st_mtime_ns]


def _files(folder: str) -> Iterator[str]:
    for at, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            _check(os.path.join(at, file))
            yield os.path.join(at, file)


def _link(path: str, place: str) -> bool:
    """Make a clone of the file, which stays as it is whatever is written to the file, or else a link to it."""
    if _clone(path, place):
        return True
    try:
        os.link(os.path.realpath(path), place)
    except OSError:
        return False
    return True


def _clone(path: str, place: str) -> bool:
    """Whether the file system could share the file's blocks, as btrfs and xfs do: ioctl_ficlone(2)."""
    try:
        from fcntl import ioctl
    except ImportError:
        return False
    try:
        with open(path, "rb") as source, open(place, "xb") as clone:
            ioctl(clone.fileno(), FICLONE, source.fileno())
        return True
    except OSError:
        if os.path.exists(place):
            os.unlink(place)
        return False


def _cache_bytes() -> int:
    text = os.environ.get("MEMTRACK_ARTIFACT_CACHE") or CACHE_BYTES
    return 0 if text == "0" else config.size_bytes("MEMTRACK_ARTIFACT_CACHE", text)


def _text(name: str, store: Store) -> str:
    # where a folder is now, it need not be when this is read
    source = f"FOLDER/{name}" if isinstance(store, FolderStore) else store.source(name)
    return (
        f"memtrack artifact {name}: a manifest, of packs in memtrack/packs.\n"
        f"To restore it: memtrack restore {source}\n"
        f"Without memtrack, with Python, numpy and a zstd: python memtrack/restore.py memtrack/{name}.mtz --to FOLDER"
    )
