"""The store of artifacts: versions of W&B's artifacts in one run, through the client that the process has loaded."""

from __future__ import annotations

import os
import re
import sys
from base64 import b64encode
from hashlib import sha256
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.artifacts.store import PACKS, ROOT, FolderStore, checked
from memtrack.errors import (
    ArtifactError,
    ArtifactNotFoundError,
    DeliveryError,
    MissingDependencyError,
    RejectedError,
    SettingsError,
)
from memtrack.sinks.following import Ends
from memtrack_wandb._autolog import FINISHED
from memtrack_wandb._files import RunFiles, md5_of
from memtrack_wandb._restore import TYPE, ArtifactVersion, OfflineRun, is_md5
from memtrack_wandb._sink import active_runs
from memtrack_wandb._where import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memtrack.artifacts.store import Pack

SCRIPT = f"{ROOT}/restore.py"

PATIENCE_S = 600
"""How long W&B may take, online, to make a version, besides a second for each MiB that it may have to upload."""

MAX_NAME = 110
"""Characters of an artifact's name that W&B has room for, less those that tell it from others cut off there."""


def active_store() -> WandbStore | None:
    """The store of the run that is active in this process, the newest of several; None if there is none.

    Imports nothing of W&B.
    """
    wandb = sys.modules.get("wandb")
    if wandb is None or not hasattr(wandb, "run"):
        return None
    runs = [run for run in active_runs(wandb) if not getattr(run, "disabled", False)]
    return WandbStore(runs[0]) if runs else None


def open_store(reference: str) -> tuple[OfflineRun | ArtifactVersion, str]:
    """The store that an artifact is in, and the artifact's name.

    ``reference`` is ``ENTITY/PROJECT/NAME[:VERSION]``, as W&B has it, or ``PATH/NAME`` with the folder of an offline
    run, which is read without W&B's server. Raises SettingsError, MissingDependencyError, ArtifactError, DeliveryError.
    """
    parts = reference.split("/")
    for at in range(len(parts) - 1, 0, -1):
        path = "/".join(parts[:at])
        if path and parts[at] and OfflineRun.is_one(path):
            return OfflineRun(path), "/".join(parts[at:])
    if not all(parts) or len(parts) > 3 or ".." in parts or "." in parts:
        raise SettingsError(
            "source",
            f"wandb:{reference}",
            "there is no such folder of an offline run. It has to be wandb:ENTITY/PROJECT/NAME:VERSION, or "
            "wandb:PATH/offline-run-…/NAME.",
        )
    try:
        import_module("wandb")
    except ImportError as exc:
        raise MissingDependencyError("reading artifacts from 'wandb'", "wandb") from exc
    version = ArtifactVersion(reference)
    return version, version.name


_ends = Ends()


class WandbStore:
    """The artifacts of a run that is active.

    W&B uploads the very files that it is told of, offline when the run is synced. They are in the folder ``memtrack``
    of the run's own, and stay there. Each artifact is an artifact of W&B's, ``run-RUN_ID-NAME``, of type ``memtrack``;
    what is logged again becomes its next version, a checkpoint with the alias ``step-N``. A version has everything
    that it is restored from; what an earlier one has already is not uploaded again.

    Args:
        run: What ``wandb.init()`` returned.
    """

    keeps_files = True

    def __init__(self, run: Any) -> None:
        self._run = run
        self._files = RunFiles(run.settings.sync_dir, run.id)
        self._digests: dict[str, str] = {}

    @property
    def key(self) -> str:
        return f"wandb:{self._run.id}"

    @property
    def folder(self) -> str:
        return os.path.join(self._files.own.path, *PACKS.strip("/").split("/"))

    def source(self, name: str) -> str:
        run = self._run
        if run.settings.mode == "offline":
            return f"wandb:{run.settings.sync_dir}/{name}"
        return f"wandb:{run.entity}/{run.project}/{artifact_of(run.id, name)[0]}"

    def before_end(self, wait: Callable[[], None]) -> None:
        _ends.add(type(self._run), FINISHED, self._run, wait)

    def put(self, path: str, name: str, md5: str) -> None:
        if getattr(self._run, "_is_finished", False):
            raise RejectedError("the run has been finished", run_gone=True)
        self._files.own.put(path, name, md5)
        self._digests[name] = md5

    def commit(self, path: str, name: str, md5: str, packs: Mapping[str, Pack]) -> None:
        self.put(path, name, md5)
        files = {name: (self._files.keep(name, md5), md5)}
        if SCRIPT in self.names():
            digest = self._digests.get(SCRIPT) or md5_of(self._files.find(SCRIPT))
            files[SCRIPT] = (self._files.keep(SCRIPT, digest), digest)
        for pack_name, pack in packs.items():
            files[pack_name] = (self._pack(pack_name, pack), pack.md5)
        size = sum(os.path.getsize(path) for path, _ in files.values())
        artifact_name, aliases = artifact_of(self._run.id, name)
        try:
            artifact = import_module("wandb").Artifact(artifact_name, type=TYPE, metadata={ROOT: name})
            for stored_name, (stored, digest) in files.items():
                _add(artifact, stored_name, stored, digest)
            # no step is logged: the record of an artifact stands beside the history
            logged = self._run.log_artifact(artifact, aliases=aliases)
            if self._run.settings.mode != "offline":
                logged.wait(timeout=PATIENCE_S + (size >> 20))
        except Exception as exc:
            raise DeliveryError(f"W&B does not take the artifact {artifact_name}: {first_line(exc)}") from exc

    def names(self) -> dict[str, int]:
        return self._files.names()

    def get(self, name: str, path: str) -> None:
        checked(name)
        found = self._files.find(name)
        FolderStore(found.removesuffix(f"/{name}")).get(name, path)

    def delete(self, name: str) -> None:
        checked(name)
        raise ArtifactError(
            f"{name} cannot be deleted while its run is active: W&B may still have to read it. Delete the version of "
            "the artifact in W&B afterwards"
        )

    def close(self) -> None:
        """Nothing is held."""

    def _pack(self, name: str, pack: Pack) -> str:
        try:
            return self._files.find(name)
        except ArtifactNotFoundError:
            if not pack.path:
                raise RejectedError(
                    f"{name} is no longer in {self._files.own.path}, and W&B makes a version of all that it needs: "
                    "log it again without a base"
                ) from None
        self.put(pack.path, name, pack.md5)
        return self._files.find(name)


def artifact_of(run_id: str, name: str) -> tuple[str, list[str]]:
    """What W&B calls an artifact, and the aliases of its version: its alphabet has no slash and no space."""
    stem = name.removeprefix(f"{ROOT}/").removesuffix(".mtz")
    match = re.fullmatch(r"(.+)/step-(\d+)", stem)
    wanted = f"run-{run_id}-{match[1] if match else stem}"
    allowed = re.sub(r"[^A-Za-z0-9_.-]", "-", wanted)[:MAX_NAME]
    if allowed != wanted:
        allowed = f"{allowed}-{sha256(wanted.encode()).hexdigest()[:8]}"
    return allowed, ["latest", *([f"step-{int(match[2])}"] if match else [])]


def _add(artifact: Any, name: str, path: str, md5: str) -> None:
    """Add a file that stays where it is, without a copy, and without reading it where this version of W&B can do so."""
    how = {"skip_cache": True, "policy": "immutable"}
    add = getattr(artifact, "_add_local_file", None)
    # what is handed over is an MD5; later versions of W&B know other digests
    if callable(add) and md5 and is_md5(artifact):
        try:
            add(name, path, digest=b64encode(bytes.fromhex(md5)).decode(), **how)
            return
        except TypeError:
            pass  # a version that has changed it
    artifact.add_file(path, name=name, **how)
