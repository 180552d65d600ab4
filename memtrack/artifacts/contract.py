"""What every store of artifacts must do, written for pytest."""

from __future__ import annotations

import os
from hashlib import md5
from typing import TYPE_CHECKING

from memtrack.artifacts.store import PACKS, Pack
from memtrack.errors import ArtifactError, ArtifactFormatError, ArtifactNotFoundError, DeliveryError, RejectedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from memtrack.artifacts.store import Store

MANIFEST = "memtrack/model/step-00000040.mtz"
SCRIPT = "memtrack/restore.py"


class StoreContract:
    """What every store must do: subclass it in a test module as ``class TestMyStore(StoreContract)``, fill the hooks.

    Each test has a folder of its own, ``tmp_path``, and a run of its own.
    """

    def make_store(self) -> Store:
        """The store of a run that is active and has nothing of ours yet; the same run each time in one test."""
        raise NotImplementedError

    def open_again(self, store: Store) -> Store:
        """A store to restore from, as another process would open it after the run."""
        raise NotImplementedError

    def make_broken_store(self) -> Store | None:
        """A store whose tracker cannot be reached; None if there is no such thing."""
        return None

    # -- the contract -----------------------------------------------------------------------------------------------

    def test_round_trip(self, tmp_path: Path) -> None:
        """What an artifact consists of is listed with its size and comes back as it was, in this process and later."""
        store = self.make_store()
        assert store.names() == {}
        files = self._log(store, tmp_path)
        for one in (store, self.open_again(store)):
            assert {name: size for name, size in one.names().items() if size >= 0} == {
                name: len(data) for name, data in files.items()
            }
            for name, data in files.items():
                one.get(name, str(tmp_path / "back"))
                assert (tmp_path / "back").read_bytes() == data
            one.close()

    def test_file_may_go(self, tmp_path: Path) -> None:
        """Once it is stored, a file may be deleted, unless the store says that it must stay; then it is there."""
        store = self.make_store()
        path, name, data, digest = self._file(store, tmp_path, "pack")
        store.put(path, name, digest)
        if store.keeps_files:
            assert os.path.commonpath([path, store.folder]) == store.folder
            assert os.path.exists(path)
        else:
            assert store.folder == ""
            os.unlink(path)
        store.get(name, str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == data

    def test_put_twice(self, tmp_path: Path) -> None:
        """What is put again, as after a failure, is there once; what differs takes the place of what was there."""
        store = self.make_store()
        path, name, _, digest = self._file(store, tmp_path, "pack")
        store.put(path, name, digest)
        store.put(path, name, digest)
        for content in (b"print('old')\n", b"print('new, and longer')\n"):
            script = tmp_path / "restore.py"
            script.unlink(missing_ok=True)
            script.write_bytes(content)
            store.put(str(script), SCRIPT, md5(content, usedforsecurity=False).hexdigest())
        assert sorted(store.names()) == sorted([name, SCRIPT])
        store.get(SCRIPT, str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == b"print('new, and longer')\n"

    def test_missing(self, tmp_path: Path) -> None:
        """What was never stored is an ArtifactNotFoundError that names it, and leaves no file."""
        store = self.make_store()
        self._log(store, tmp_path)
        for one in (store, self.open_again(store)):
            for name in (f"{PACKS}{24 * 'f'}.mtz", "memtrack/nothing.mtz", "memtrack/packs"):
                assert name in str(_raised(ArtifactNotFoundError, one.get, name, str(tmp_path / "back")))
        assert not (tmp_path / "back").exists()

    def test_delete(self, tmp_path: Path) -> None:
        """What is deleted is gone, also if it was gone before; a store that cannot says what to do instead."""
        store = self.make_store()
        files = self._log(store, tmp_path)
        one = self.open_again(store)
        try:
            one.delete(MANIFEST)
        except ArtifactError as exc:
            refusal = str(exc)
        else:
            one.delete(MANIFEST)
            assert sorted(one.names()) == sorted({*files} - {MANIFEST})
            return
        assert len(refusal) > 40
        assert {*files} <= {*one.names()}

    def test_names_are_checked(self, tmp_path: Path) -> None:
        """A name that leads out of the run, as a stranger's manifest may have it, is refused and nothing is touched."""
        store = self.make_store()
        path, _, _, digest = self._file(store, tmp_path, "pack")
        _raised(ArtifactFormatError, store.put, path, "memtrack/../x.mtz", digest)
        self._log(store, tmp_path)
        for one in (store, self.open_again(store)):
            for name in ("/etc/passwd", "memtrack/../../x", "memtrack//x", "other/x.mtz", "memtrack/a\\..\\b", ""):
                _raised(ArtifactFormatError, one.get, name, str(tmp_path / "back"))
                _raised(ArtifactFormatError, one.delete, name)
        assert not (tmp_path / "back").exists()

    def test_file_that_is_not_there(self, tmp_path: Path) -> None:
        """A file that has vanished before it was stored is refused for good."""
        store = self.make_store()
        path, name, _, digest = self._file(store, tmp_path, "pack")
        os.unlink(path)
        _raised(RejectedError, store.put, path, name, digest)

    def test_key(self) -> None:
        """The key is stable, and names the tracker."""
        key = self.make_store().key
        assert key == self.make_store().key
        assert key.partition(":")[1:] != ("", "")
        assert key.isprintable()

    def test_unreachable_tracker(self, tmp_path: Path) -> None:
        """A tracker that cannot be reached is a DeliveryError that says so, within seconds, not a refusal for good."""
        store = self.make_broken_store()
        if store is None:
            import pytest

            pytest.skip("needs make_broken_store()")
        path, name, _, digest = self._file(store, tmp_path, "pack")
        raised = _raised(DeliveryError, store.put, path, name, digest)
        assert str(raised)
        assert not isinstance(raised, RejectedError)
        store.close()

    # -- what the tests store ---------------------------------------------------------------------------------------

    def _log(self, store: Store, tmp_path: Path) -> dict[str, bytes]:
        """An artifact of two packs, as the uploader stores one. Returns the content of what was stored, by name."""
        files, packs = {}, {}
        for content in ("one", "two"):
            path, name, data, digest = self._file(store, tmp_path, content)
            store.put(path, name, digest)
            files[name], packs[name] = data, Pack(len(data), digest, path if store.keeps_files else "")
            if not store.keeps_files:
                os.unlink(path)
        for name, data in ((SCRIPT, b"print('restored')\n"), (MANIFEST, b"manifest" * 100)):
            (tmp_path / "made.mtz").write_bytes(data)
            digest, files[name] = md5(data, usedforsecurity=False).hexdigest(), data
            if name == MANIFEST:
                store.commit(str(tmp_path / "made.mtz"), name, digest, packs)
            else:
                store.put(str(tmp_path / "made.mtz"), name, digest)
            os.unlink(tmp_path / "made.mtz")
        return files

    def _file(self, store: Store, tmp_path: Path, content: str) -> tuple[str, str, bytes, str]:
        """A pack, made where the store wants it: path, name, content, digest."""
        data = content.encode() * 50_000
        digest = md5(data, usedforsecurity=False).hexdigest()
        folder = store.folder or str(tmp_path)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{digest[:24]}.mtz")
        with open(path, "wb") as file:
            file.write(data)
        return path, f"{PACKS}{digest[:24]}.mtz", data, digest


def _raised(kind: type[BaseException], call: Callable[..., object], *args: object) -> BaseException:
    """What a call raises, which must be of a kind."""
    try:
        call(*args)
    except kind as exc:
        return exc
    raise AssertionError(f"no {kind.__name__} was raised")
