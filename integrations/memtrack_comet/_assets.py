"""The assets of a Comet experiment, to be read: from its archive, or from Comet."""

from __future__ import annotations

import json
import os
import zipfile
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.artifacts.store import ROOT, Body, checked, write_whole
from memtrack.errors import ArtifactError, ArtifactFormatError, ArtifactNotFoundError, DeliveryError, RejectedError
from memtrack_comet._archive import Left
from memtrack_comet._sink import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memtrack.artifacts.store import Pack

MAX_BYTES = 64 << 20
"""More than any file that memtrack stores has: one that claims to be larger is not fetched."""


class CometReader:
    """What is stored in an experiment, to be read."""

    keeps_files = False
    folder = ""

    def __init__(self, experiment_key: str) -> None:
        self.experiment_key = experiment_key

    @property
    def key(self) -> str:
        return f"comet:{self.experiment_key[-34:]}"

    def source(self, name: str) -> str:
        return f"comet:{self.experiment_key}/{name}"

    def before_end(self, wait: Callable[[], None]) -> None:
        """Nothing is stored here that could be waited for."""

    def put(self, path: str, name: str, md5: str) -> None:
        raise RejectedError(f"{self.key} is open to be read: artifacts are stored in an experiment that is running")

    def commit(self, path: str, name: str, md5: str, packs: Mapping[str, Pack]) -> None:
        self.put(path, name, md5)

    def names(self) -> dict[str, int]:
        raise NotImplementedError

    def get(self, name: str, path: str) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


class ArchivedAssets(CometReader):
    """The archive of an offline experiment, or the folder that it will be made of."""

    def __init__(self, path: str, target: dict[str, str]) -> None:
        super().__init__(target.get("key") or os.path.basename(path).removesuffix(".zip"))
        self._path, self._target = os.path.abspath(path), target

    def names(self) -> dict[str, int]:
        with self._opened() as left:
            return {name: left.size(member) for name, member in _assets(left).items()}

    def get(self, name: str, path: str) -> None:
        checked(name)
        with self._opened() as left:
            member = _assets(left).get(name)
            if member is None:
                raise ArtifactNotFoundError(f"{self._path} has no {name}")
            if left.size(member) > MAX_BYTES:
                raise ArtifactFormatError(f"{name} in {self._path} is larger than anything that memtrack stores")
            try:
                with left.open(member) as source:
                    write_whole(source, path)
            except (zipfile.BadZipFile, EOFError) as exc:
                raise ArtifactFormatError(f"{name} in {self._path} is damaged: {first_line(exc)}") from exc
            except OSError as exc:
                raise DeliveryError(f"cannot write {path}: {exc.strerror or exc}") from exc

    def delete(self, name: str) -> None:
        checked(name)
        raise ArtifactError(
            f"{name} cannot be deleted from an experiment that is offline: upload it first (comet upload), then delete "
            "it from there"
        )

    def _opened(self) -> Left:
        try:
            left = Left(self._path, self._target)
        except OSError as exc:
            raise ArtifactNotFoundError(f"cannot read {self._path}: {exc.strerror or exc}") from exc
        if not left.experiment and not self._target:
            raise ArtifactNotFoundError(
                f"{self._path} is not complete: its experiment is running, or was killed; memtrack sync completes it"
            )
        return left


def _assets(left: Left) -> dict[str, str]:
    """What we call an asset -> the member of the archive; of several under one name the last."""
    found: dict[str, str] = {}
    for line, members in left.messages():
        if b'"file_upload"' in line and members:
            name = (json.loads(line)["payload"].get("additional_params") or {}).get("fileName")
            if isinstance(name, str) and name.startswith(f"{ROOT}/"):
                found[name] = members[0]
    return found


class UploadedAssets(CometReader):
    """An experiment at Comet, through its public API."""

    def __init__(self, experiment_key: str, api_key: str | None) -> None:
        super().__init__(experiment_key)
        self._api_key = api_key
        self._experiment: Any = None

    def names(self) -> dict[str, int]:
        return {name: int(asset.get("fileSize") or -1) for name, asset in self._assets().items()}

    def get(self, name: str, path: str) -> None:
        asset = self._assets().get(checked(name))
        if asset is None:
            raise ArtifactNotFoundError(f"the Comet experiment {self.experiment_key} has no asset {name}")
        answer = self._ask(lambda experiment: experiment.get_asset(asset["assetId"], "response", stream=True))
        self._ask(lambda _: write_whole(Body(answer), path))

    def delete(self, name: str) -> None:
        asset = self._assets().get(checked(name))
        if asset is not None:
            self._ask(lambda experiment: experiment.delete_asset(asset["assetId"]))

    def _assets(self) -> dict[str, dict[str, Any]]:
        found = self._ask(lambda experiment: experiment.get_asset_list("all"))
        found = sorted(found or (), key=lambda asset: asset.get("createdAt") or 0)
        return {one["fileName"]: one for one in found if str(one.get("fileName")).startswith(f"{ROOT}/")}

    def _ask(self, what: Callable[[Any], Any]) -> Any:
        try:
            if self._experiment is None:
                api = import_module("comet_ml").API(api_key=self._api_key, cache=False)
                self._experiment = api.get_experiment_by_key(self.experiment_key)
            if self._experiment is not None:
                return what(self._experiment)
        except Exception as exc:
            text = first_line(exc)
            if self._api_key:
                text = text.replace(self._api_key, "…")
            raise DeliveryError(f"Comet does not answer as it should: {text}") from None
        raise ArtifactNotFoundError(f"Comet has no experiment {self.experiment_key}, or this API key may not see it")
