"""The protocol of a store of artifacts, and the store that is a folder."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple, Protocol

from memtrack.errors import ArtifactFormatError, ArtifactNotFoundError, DeliveryError, MemtrackError, RejectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import IO, Any

ROOT = "memtrack"
"""The folder that has everything of ours in a run."""

PACKS = f"{ROOT}/packs/"
"""What the names of packs begin with; what else ends in ``.mtz`` is the manifest of an artifact."""

_PART_BYTES = 1 << 18


class Pack(NamedTuple):
    """A pack that an artifact needs."""

    size_bytes: int
    md5: str
    """In hexadecimal digits."""
    path: str
    """Where it is on this machine; "" if it is only in the store."""


class Store(Protocol):
    """Where the artifacts of one run are kept. Called from one thread at a time.

    ``put`` and ``commit`` raise :class:`~memtrack.errors.DeliveryError` if it may work later, and
    :class:`~memtrack.errors.RejectedError` if it never will; so do ``names``, ``get`` and ``delete`` if the tracker
    does not answer. No file is ever held in memory as a whole. Try it with ``memtrack.artifacts.contract``.
    """

    @property
    def key(self) -> str:
        """Which run of which tracker: ``mlflow:RUN_ID``."""

    def source(self, name: str) -> str:
        """What ``memtrack.restore`` takes for the artifact of this name: ``mlflow:RUN_ID/NAME``."""

    @property
    def keeps_files(self) -> bool:
        """Whether the tracker reads later on the very files that it was given: they have to stay where they are."""

    @property
    def folder(self) -> str:
        """Where files that have to stay are made; "" where they need not."""

    def put(self, path: str, name: str, md5: str) -> None:
        """Store a local file of at most 33 MiB under a name such as ``memtrack/packs/0123.mtz``.

        Replaces what has that name. Returns when it is stored and its size there was checked. ``md5``: of the file, in
        hexadecimal digits.
        """

    def commit(self, path: str, name: str, md5: str, packs: Mapping[str, Pack]) -> None:
        """Store the manifest of an artifact, once the packs have been: ``packs`` are all that it needs, by name."""

    def names(self) -> dict[str, int]:
        """What is stored below ``memtrack/``: name -> size in bytes, -1 if it is not known."""

    def get(self, name: str, path: str) -> None:
        """Fetch what is stored under a name into a local file, which is there as a whole or not at all.

        Raises :class:`~memtrack.errors.ArtifactNotFoundError` if nothing is.
        """

    def delete(self, name: str) -> None:
        """Remove what is stored under a name, if anything is.

        Raises :class:`~memtrack.errors.ArtifactError` where that cannot be done, with what to do instead.
        """

    def before_end(self, wait: Callable[[], None]) -> None:
        """Let ``wait`` be called before the run ends, where nothing can be stored afterwards. Called once a run."""

    def close(self) -> None:
        """Release what is held. Never raises."""


class Readable(Protocol):
    """What can be copied."""

    def read(self, size: int, /) -> bytes: ...


class FolderStore:
    """A local folder, with what a run would have: ``FOLDER/memtrack/…``. It is made with the first file.

    Args:
        path: The folder.
        link: Link to the packs that are put instead of copying them, where the file system can: they never change.
    """

    keeps_files = False
    folder = ""

    def __init__(self, path: str, *, link: bool = False) -> None:
        self.path = os.path.abspath(path)
        self._link = link

    @property
    def key(self) -> str:
        return f"folder:{os.path.realpath(self.path)}"

    def source(self, name: str) -> str:
        return os.path.join(self.path, name)

    def put(self, path: str, name: str, md5: str) -> None:
        place = self.place(name)
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            self.place(name)  # again: of a folder that was not there nobody knew where it leads
            if os.path.exists(place) and os.path.samefile(path, place):
                return
            with _opened(path) as source:
                write_whole(source, place, link=path if self._link and name.startswith(PACKS) else "")
        except MemtrackError:
            raise
        except OSError as exc:
            raise _unwritable(place, exc) from exc

    def commit(self, path: str, name: str, md5: str, packs: Mapping[str, Pack]) -> None:
        self.put(path, name, md5)

    def names(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for folder, _, files in os.walk(os.path.join(self.path, ROOT)):
            for file in files:
                place = os.path.join(folder, file)
                status = os.lstat(place)
                if stat.S_ISREG(status.st_mode) and not file.endswith(PART):
                    found[os.path.relpath(place, self.path).replace(os.sep, "/")] = status.st_size
        return found

    def get(self, name: str, path: str) -> None:
        with self.open(name) as source:
            try:
                write_whole(source, path)
            except OSError as exc:
                raise _unwritable(path, exc) from exc

    def open(self, name: str) -> IO[bytes]:
        """What is stored under a name, to be read. Raises as ``get`` does."""
        place = self.place(name)
        try:
            return open(place, "rb", opener=_open_file)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise ArtifactNotFoundError(f"{self.path} has no {name}") from exc
        except OSError as exc:
            raise _unwritable(place, exc) from exc

    def delete(self, name: str) -> None:
        place = self.place(name)
        try:
            os.unlink(place)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise _unwritable(place, exc) from exc

    def before_end(self, wait: Callable[[], None]) -> None:
        """A folder does not end."""

    def close(self) -> None:
        """Nothing is held."""

    def place(self, name: str) -> str:
        """Where a name stands. Raises ArtifactFormatError if it would lead out of the folder."""
        place = os.path.join(self.path, *checked(name).split("/"))
        inside = os.path.join(os.path.realpath(self.path), "")
        if not os.path.join(os.path.realpath(os.path.dirname(place)), "").startswith(inside):
            raise ArtifactFormatError(f"{name!r} leads out of {self.path}: a folder in it is a link")
        return place


PART = ".part"
"""What the name of a file ends with that is being written."""


def checked(name: str) -> str:
    """A name, if it may stand in a store. Raises ArtifactFormatError: it may come from a manifest of a stranger's."""
    parts = name.split("/")
    if parts[0] != ROOT or len(parts) < 2 or not all(_is_plain(part) for part in parts) or name.endswith(PART):
        raise ArtifactFormatError(f"{name!r} is no name of a stored file: it has to be {ROOT}/… without '..'")
    return name


def _is_plain(part: str) -> bool:
    return part not in ("", ".", "..") and part.isprintable() and not {*'\\:*?"<>|'} & {*part}


def write_whole(source: Readable, place: str, *, link: str = "") -> None:
    """Write what is read from ``source`` to a file that appears as a whole or not at all, and outlives a power cut.

    ``link``: the path of ``source``, to be linked to where that can be done. Raises OSError.
    """
    part = f"{place}.{os.urandom(4).hex()}{PART}"
    try:
        if not link or not _linked(link, part):
            with open(part, "xb") as file:
                while data := source.read(_PART_BYTES):
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, place)
    except BaseException:
        remove(part)
        raise


class Body:
    """The body of an answer that ``requests`` is still receiving, as a file to be read. Raises as ``requests`` does."""

    def __init__(self, answer: Any) -> None:
        answer.raise_for_status()
        self._parts = answer.iter_content(_PART_BYTES)

    def read(self, size: int = -1, /) -> bytes:
        part: bytes = next(self._parts, b"")
        return part


def _linked(path: str, part: str) -> bool:
    try:
        os.link(os.path.realpath(path), part)
    except OSError:
        return False
    return True


def remove(path: str) -> None:
    """Remove a file, if it is there and can be."""
    try:
        os.unlink(path)
    except OSError:
        pass


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError as exc:
        raise RejectedError(f"{path} is no longer there") from exc


def _open_file(path: str, flags: int) -> int:
    """Opens files only: a link that somebody has put there is not followed, a pipe is not waited for."""
    fd = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(path)
    return fd


def _unwritable(path: str, exc: OSError) -> DeliveryError:
    return DeliveryError(f"cannot read or write {path}: {exc.strerror or exc}")
