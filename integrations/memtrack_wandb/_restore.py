"""Artifacts in W&B, to be read: from the folder of an offline run, or from the server."""

from __future__ import annotations

import os
import tempfile
from base64 import b64decode
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from memtrack.artifacts.store import PACKS, ROOT, checked, write_whole
from memtrack.errors import ArtifactError, ArtifactFormatError, ArtifactNotFoundError, DeliveryError, RejectedError
from memtrack_wandb._files import CheckedFile, RunFiles, kept_name, stream_files
from memtrack_wandb._stream import log_records
from memtrack_wandb._where import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memtrack.artifacts.store import Pack

TYPE = "memtrack"
"""The type of our artifacts in W&B."""


class Noted(NamedTuple):
    """What W&B has noted of a file in an artifact."""

    size_bytes: int
    md5: str
    """In hexadecimal digits; "" if W&B has another kind of digest."""


class Reader:
    """Something that nothing is stored in."""

    keeps_files = False
    folder = ""
    key = ""

    def put(self, path: str, name: str, md5: str) -> None:
        raise RejectedError(f"{self.key} is open to be read: artifacts are stored in a run that is active")

    def commit(self, path: str, name: str, md5: str, packs: Mapping[str, Pack]) -> None:
        self.put(path, name, md5)

    def source(self, name: str) -> str:
        return f"{self.key}/{name}"

    def before_end(self, wait: Callable[[], None]) -> None:
        """Nothing is stored here that could be waited for."""

    def close(self) -> None:
        """Nothing is held."""


class OfflineRun(Reader):
    """The folder of an offline run, on the machine where it was made.

    What W&B has noted in the run's file of artifacts is checked. Of a run that was killed the last is not noted, but
    its files are there.
    """

    def __init__(self, path: str) -> None:
        self._files = RunFiles(path)
        self.key = f"wandb:{self._files.run_id}"
        self._noted = _noted(self._files.own.path)

    @staticmethod
    def is_one(path: str) -> bool:
        """Whether a path is the folder of a run."""
        return bool(stream_files(path))

    def names(self) -> dict[str, int]:
        return {**self._files.names(), **{name: noted.size_bytes for name, noted in self._noted.items()}}

    def get(self, name: str, path: str) -> None:
        md5 = self._noted[name].md5 if checked(name) in self._noted else ""
        kept = self._files.own.place(kept_name(name, md5)) if md5 else ""
        found = kept if os.path.isfile(kept) else self._files.find(name)
        try:
            with open(found, "rb") as file:
                write_whole(CheckedFile(file, name, md5) if md5 else file, path)
        except ArtifactError:
            raise
        except OSError as exc:
            raise DeliveryError(f"cannot read {found} or write {path}: {exc.strerror or exc}") from exc

    def delete(self, name: str) -> None:
        checked(name)
        raise ArtifactError(
            f"{name} cannot be deleted from an offline run, which W&B would then fail to upload: sync the run and "
            f"delete the version in W&B, or delete the whole folder {self._files.own.path}"
        )


def _noted(path: str) -> dict[str, Noted]:
    """What the file of a run has noted of our artifacts, by name: of several versions the last."""
    try:
        protocol = import_module("wandb.proto.wandb_internal_pb2")
    except ImportError:
        return {}  # the files are there without W&B, too
    found: dict[str, Noted] = {}
    for file in stream_files(path):
        for data in log_records(file):
            record = protocol.Record.FromString(data)
            if record.HasField("artifact") and record.artifact.type == TYPE:
                has_md5 = is_md5(record.artifact)
                for one in record.artifact.manifest.contents:
                    if one.path.startswith(f"{ROOT}/"):
                        found[checked(one.path)] = Noted(one.size, _hex(one.digest, one.path) if has_md5 else "")
    return found


def is_md5(artifact: Any) -> bool:
    """Whether what W&B calls the digests of an artifact's files are MD5s; older versions know no other."""
    return "MD5" in (str(getattr(artifact, "digest_algorithm", "")) or "MD5")


def _hex(digest: str, name: str) -> str:
    try:
        return b64decode(digest, validate=True).hex()
    except ValueError as exc:
        raise ArtifactFormatError(f"W&B has noted {digest!r} as the MD5 of {name}") from exc


class ArtifactVersion(Reader):
    """One version of an artifact at W&B's server, through its public API.

    Args:
        reference: ``ENTITY/PROJECT/NAME[:VERSION]``; without a version the latest.

    Raises DeliveryError, ArtifactNotFoundError or ArtifactFormatError.
    """

    def __init__(self, reference: str) -> None:
        self.key = f"wandb:{reference.replace('/', '-')}"
        try:
            self._artifact = import_module("wandb").Api().artifact(reference)
            entries = self._artifact.manifest.entries
        except ValueError as exc:
            raise ArtifactNotFoundError(f"W&B has no artifact {reference}: {first_line(exc)}") from exc
        except Exception as exc:
            raise DeliveryError(f"W&B does not give out {reference}: {first_line(exc)}") from exc
        self._entries: dict[str, Any] = {str(name): entry for name, entry in entries.items()}
        found = [name for name in self._entries if name.endswith(".mtz") and not name.startswith(PACKS)]
        if len(found) != 1:
            raise ArtifactFormatError(f"the artifact {reference} was not made by memtrack")
        self._manifest = checked(found[0])

    @property
    def name(self) -> str:
        """What we call the artifact."""
        return self._manifest.removeprefix(f"{ROOT}/").removesuffix(".mtz")

    def names(self) -> dict[str, int]:
        return {name: -1 if entry.size is None else entry.size for name, entry in self._entries.items()}

    def get(self, name: str, path: str) -> None:
        entry = self._entries.get(checked(name))
        if entry is None:
            raise ArtifactNotFoundError(f"{self.key} has no {name}")
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as beside:
            try:
                found = self._artifact.get_entry(name).download(root=beside, skip_cache=True)
                with open(found, "rb") as file:
                    md5 = _hex(entry.digest, name) if is_md5(self._artifact) else ""
                    write_whole(CheckedFile(file, name, md5) if md5 else file, path)
            except ArtifactError:
                raise
            except Exception as exc:
                raise DeliveryError(f"W&B does not give out {name}: {first_line(exc)}") from exc

    def delete(self, name: str) -> None:
        """Remove the version if ``name`` is its manifest; packs go with the last version that has them."""
        if checked(name) != self._manifest or self._artifact is None:
            return
        try:
            self._artifact.delete(delete_aliases=True)
        except Exception as exc:
            raise DeliveryError(f"W&B does not delete {self.key}: {first_line(exc)}") from exc
        self._artifact = None
