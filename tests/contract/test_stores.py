"""What every store of artifacts must do, done by the one that is a folder."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from memtrack.artifacts.contract import StoreContract
from memtrack.artifacts.store import FolderStore
from memtrack.errors import ArtifactFormatError, ArtifactNotFoundError, DeliveryError
from tests.integrations.mlflow_lab import environment

NAME = "memtrack/packs/0123456789abcdef01234567.mtz"


class TestFolderStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path / "store"

    def make_store(self):
        return FolderStore(str(self.folder))

    def open_again(self, store):
        return FolderStore(str(self.folder))

    def make_broken_store(self):
        return FolderStore("/proc/none")


class TestFolderOfLinks(TestFolderStore):
    def make_store(self):
        return FolderStore(str(self.folder), link=True)


def put(store, tmp_path, content=b"content"):
    """Store something under NAME."""
    (tmp_path / "made").write_bytes(content)
    store.put(str(tmp_path / "made"), NAME, "")


def test_links_that_lead_out_are_not_followed(tmp_path):
    """Neither a folder nor a file in the store may be a link to somewhere else."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.mtz").write_bytes(b"secret")
    store = FolderStore(str(tmp_path / "store"))
    put(store, tmp_path)
    os.symlink(outside / "secret.mtz", tmp_path / "store" / "memtrack" / "packs" / "link.mtz")
    os.symlink(outside, tmp_path / "store" / "memtrack" / "away")
    assert list(store.names()) == [NAME]
    with pytest.raises(DeliveryError):
        store.get("memtrack/packs/link.mtz", str(tmp_path / "back"))
    for act in (store.delete, lambda name: store.get(name, str(tmp_path / "back"))):
        with pytest.raises(ArtifactFormatError, match="leads out of"):
            act("memtrack/away/secret.mtz")
    assert (outside / "secret.mtz").exists()
    assert not (tmp_path / "back").exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    """A pipe in the store that nobody writes to has nothing in it."""
    store = FolderStore(str(tmp_path / "store"))
    put(store, tmp_path)
    os.mkfifo(tmp_path / "store" / "memtrack" / "pipe.mtz")
    with pytest.raises(ArtifactNotFoundError):
        store.get("memtrack/pipe.mtz", str(tmp_path / "back"))
    assert list(store.names()) == [NAME]


def test_linked_files_share_their_room(tmp_path):
    """With links a file takes its room once, and what replaces it leaves what others have linked as it was."""
    store = FolderStore(str(tmp_path / "store"), link=True)
    put(store, tmp_path)
    place = tmp_path / "store" / NAME
    assert os.path.samefile(tmp_path / "made", place)
    (tmp_path / "made").unlink()
    put(store, tmp_path, b"other")
    assert place.read_bytes() == b"other"
    assert not [name for name in os.listdir(place.parent) if name.endswith(".part")]


LOOKING = """
import sys
import memtrack_comet, memtrack_mlflow, memtrack_wandb
from memtrack import registry
assert registry.load_active_stores() == registry.load_active_stores("mlflow") == []
assert [one.active_store() for one in (memtrack_comet, memtrack_mlflow, memtrack_wandb)] == [None, None, None]
print([name for name in ("comet_ml", "mlflow", "numpy", "wandb") if name in sys.modules])
"""


def test_looking_for_a_run_imports_no_tracker():
    """A process that has imported no tracker has no active run in one, and imports none to find out."""
    done = subprocess.run(
        [sys.executable, "-c", LOOKING], capture_output=True, text=True, env=environment(), timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_full_disk_leaves_no_half_file(tmp_path):
    """What cannot be written is not there at all, and says why."""
    store = FolderStore(str(tmp_path / "store"))
    put(store, tmp_path, b"x")
    with pytest.raises(DeliveryError, match="cannot read or write /dev/full"):
        store.get(NAME, "/dev/full/x")
    (tmp_path / "store" / "memtrack" / "packs").chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid():
        with pytest.raises(DeliveryError, match="Permission denied"):
            put(store, tmp_path, b"y")
    (tmp_path / "store" / "memtrack" / "packs").chmod(0o700)
    store.get(NAME, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"x"
