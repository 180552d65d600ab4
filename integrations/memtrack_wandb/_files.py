"""Files of artifacts in the folders of a W&B run, where W&B reads them when it uploads the run."""

from __future__ import annotations

import glob
import os
from hashlib import md5 as new_md5
from typing import TYPE_CHECKING

from memtrack.artifacts.store import ROOT, FolderStore
from memtrack.errors import ArtifactFormatError, ArtifactNotFoundError

if TYPE_CHECKING:
    from memtrack.artifacts.store import Readable

KEPT = f"{ROOT}/kept/"
"""Below this are the files of versions that W&B has been told of, named by their content: no later one takes their
place. Packs never change, and are handed over where they are."""


class RunFiles:
    """What is in the folder of a run, and in others of the same run, which W&B makes each time it is resumed.

    Args:
        path: The folder, or that of W&B's file of an offline run.
        run_id: The id of the run; default what the file in the folder is called by.
    """

    def __init__(self, path: str, run_id: str = "") -> None:
        self.own = FolderStore(path)
        self._links = FolderStore(path, link=True)
        self.run_id = run_id or next((_id_in(file) for file in stream_files(self.own.path)), "")
        pattern = os.path.join(
            glob.escape(os.path.dirname(self.own.path)), "*run-*", f"run-{glob.escape(self.run_id)}.wandb"
        )
        others = sorted((os.path.dirname(file) for file in glob.glob(pattern)), reverse=True)
        self._folders = [self.own, *(FolderStore(other) for other in others if other != self.own.path)]

    def names(self) -> dict[str, int]:
        """All names with their sizes in bytes; those in the run's own folder come before others."""
        found: dict[str, int] = {}
        for folder in reversed(self._folders):
            found.update({name: size for name, size in folder.names().items() if not name.startswith(KEPT)})
        return found

    def find(self, name: str) -> str:
        """The path of a file. Raises ArtifactNotFoundError or ArtifactFormatError."""
        for folder in self._folders:
            place = folder.place(name)
            if os.path.isfile(place) and not os.path.islink(place):
                return place
        raise ArtifactNotFoundError(f"{self.own.path} has no {name}")

    def keep(self, name: str, md5: str) -> str:
        """The path of a file that stays as it is, whatever takes its name later."""
        kept = kept_name(name, md5)
        self._links.put(self.find(name), kept, md5)
        return self.own.place(kept)


def stream_files(path: str) -> list[str]:
    """The files, mostly one, in which W&B notes what happens in the run whose folder this is."""
    return glob.glob(os.path.join(glob.escape(path), "run-*.wandb"))


def _id_in(path: str) -> str:
    return os.path.basename(path).removeprefix("run-").removesuffix(".wandb")


def kept_name(name: str, md5: str) -> str:
    """Where a version of a file stands below ``KEPT``."""
    return f"{KEPT}{md5}{os.path.splitext(name)[1]}"


class CheckedFile:
    """A file to be read, which raises ArtifactFormatError at its end if its content is not what it should be."""

    def __init__(self, file: Readable, name: str, md5: str) -> None:
        self._file = file
        self._name = name
        self._expected = md5
        self._digest = new_md5(usedforsecurity=False)

    def read(self, size: int = -1, /) -> bytes:
        part = self._file.read(size)
        self._digest.update(part)
        if not part and self._digest.hexdigest() != self._expected:
            raise ArtifactFormatError(f"{self._name} is damaged: its MD5 is not the one that W&B has noted")
        return part


def md5_of(path: str) -> str:
    """The digest of a file, which is read in small parts. Raises OSError."""
    digest = new_md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while part := file.read(1 << 18):
            digest.update(part)
    return digest.hexdigest()
