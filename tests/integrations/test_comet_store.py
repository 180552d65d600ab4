"""The store of artifacts in Comet: offline experiments and their archives, and uploads to a backend on loopback."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile

import pytest

from memtrack import registry
from memtrack.artifacts.contract import MANIFEST, StoreContract
from memtrack.errors import ArtifactFormatError, ArtifactNotFoundError, DeliveryError, RejectedError, SettingsError
from tests.integrations.comet_lab import API_KEY, QUIET, Backend, comet_offline, read_archive

pytest.importorskip("jsonschema", reason="needs comet_ml")

from memtrack_comet import active_store, open_store

NAME = "memtrack/packs/0123456789abcdef01234567.mtz"


@pytest.fixture(scope="module")
def comet():
    """Comet, imported into this process without what it does there by itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        hook = sys.excepthook
        found = pytest.importorskip("comet_ml")
        yield found
        if found.get_running_experiment() is not None:
            found.get_running_experiment().clean()
        sys.excepthook = hook


@pytest.fixture
def experiment(comet, tmp_path, monkeypatch):
    """An offline experiment that runs; the next one ends it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = comet.OfflineExperiment(project_name="p", workspace="w", offline_directory=str(tmp_path / "comet"))
    yield found
    found.end()


def archive_of(experiment):
    """The archive of an experiment, which is ended."""
    experiment.end()
    return os.path.join(experiment.offline_directory, f"{experiment.get_key()}.zip")


class TestCometStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _experiment(self, experiment):
        self.experiment = experiment

    def make_store(self):
        return active_store()

    def open_again(self, store):
        found, name = open_store(f"{archive_of(self.experiment)}/model/step-00000040")
        assert name == "model/step-00000040"
        return found

    def make_broken_store(self):
        store = active_store()
        shutil.rmtree(self.experiment.tmpdir)
        os.mkdir(self.experiment.tmpdir)
        return store

    def test_the_archive_is_what_comet_takes(self, tmp_path):
        """Comet's own reader sees the assets, under our names."""
        self._log(self.make_store(), tmp_path)
        path = archive_of(self.experiment)
        names = [
            m["payload"]["additional_params"]["fileName"] for m in read_archive(path).messages if "file" in m["type"]
        ]
        assert {name.rpartition("/")[0] for name in names} == {"memtrack", "memtrack/model", "memtrack/packs"}
        assert MANIFEST in names
        assert comet_offline(path)


def put(store, tmp_path, content=b"content" * 1000):
    """Store something under NAME, and delete the file at once."""
    (tmp_path / "made.mtz").write_bytes(content)
    store.put(str(tmp_path / "made.mtz"), NAME, "")
    (tmp_path / "made.mtz").unlink()


def test_steps_stay_the_users(experiment, tmp_path):
    """Storing logs no step and changes none: Comet's log has what the user's code has set, and nothing else."""
    store = active_store()
    for step in range(5):
        experiment.log_metric("loss", 1.0, step=step)
        put(store, tmp_path, b"%d" % step)
    assert experiment.curr_step == 4
    logged, steps = read_archive(archive_of(experiment)).users
    assert [(step, name) for name, _, step, _ in logged] == [(step, "loss") for step in range(5)]
    assert [value for name, value, _ in steps if name == "curr_step"] == [*range(5)]


def test_an_archive_of_a_strangers(experiment, tmp_path):
    """Members are reached by their names in the archive only; a damaged one, or one too large, is refused."""
    put(active_store(), tmp_path)
    path = archive_of(experiment)
    with zipfile.ZipFile(path) as archive:
        lines = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        files = {name: archive.read(name) for name in archive.namelist()}
    (upload,) = [line["payload"] for line in lines if line["type"] == "file_upload"]
    member = upload["file_path"]

    def made(**change):
        other = str(tmp_path / "other.zip")
        with zipfile.ZipFile(other, "w") as archive:
            for name, data in files.items():
                if name != "messages.json":
                    archive.writestr(change.get("member", member) if name == member else name, data)
            upload.update(file_path=change.get("file_path", member))
            archive.writestr("messages.json", "".join(json.dumps(line) + "\n" for line in lines))
        return open_store(f"{other}/x")[0]

    back = str(tmp_path / "back")
    for file_path in ("/etc/passwd", "../../etc/passwd", "messages.json"):
        with pytest.raises(ArtifactNotFoundError):
            made(file_path=file_path).get(NAME, back)
    made(member="../evil", file_path="../evil").get(NAME, back)
    assert sorted(os.listdir(tmp_path)) == sorted({*os.listdir(tmp_path)} - {"evil"})
    os.unlink(back)
    with open(path, "r+b") as file:
        at = file.read().index(files[member])
        file.seek(at)
        file.write(b"damaged")
    with pytest.raises(ArtifactFormatError, match="damaged"):
        open_store(f"{path}/x")[0].get(NAME, back)
    assert not os.path.exists(back)


def test_what_is_missing_is_told(tmp_path, experiment):
    """No archive, one that is not complete, and an experiment that has ended, are each told of by a sentence."""
    store = active_store()
    with pytest.raises(ArtifactNotFoundError, match="cannot read"):
        open_store(f"{tmp_path}/none.zip/x")[0].names()
    with pytest.raises(ArtifactNotFoundError, match="memtrack sync"):
        open_store(f"{experiment.offline_directory}/{experiment.get_key()}.zip/x")[0].names()
    experiment.end()
    assert active_store() is None
    with pytest.raises(RejectedError, match="has ended"):
        put(store, tmp_path)


@pytest.mark.parametrize("reference", ["", "x", "a/b", "a" * 32, "a" * 32 + "/", "w/p/short/x", ".zip/", "a.zip/"])
def test_references(reference):
    """What names no experiment and artifact is refused, with the three ways to name one."""
    with pytest.raises(SettingsError, match="comet:KEY/NAME"):
        open_store(reference)


def test_names_of_experiments(comet):
    """Both ways to name an experiment at Comet, with names that have slashes."""
    key = "b2" * 16
    for reference in (f"{key}/model/step-1", f"workspace/project/{key}/model/step-1"):
        store, name = open_store(reference)
        assert (store.key, name) == (f"comet:{key}", "model/step-1")
    assert registry.load_store("comet") is open_store
    assert active_store in registry.load_active_stores("comet")


@pytest.fixture
def backend(comet, monkeypatch):
    """A backend on loopback, which Comet is told to use."""
    found = Backend()
    for name, value in found.settings.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


def test_online_it_waits_for_the_upload(comet, backend, tmp_path, monkeypatch):
    """Online, put returns once the backend has the file, and raises if it did not take it; nothing is left behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    experiment = comet.Experiment(api_key=API_KEY, project_name="p", workspace="w")
    store = active_store()
    assert store.key == f"comet:{experiment.get_key()}"
    put(store, tmp_path)
    (asked,) = [what for where, what in backend.requests if where.endswith("/upload")]
    assert asked["fileName"] == [NAME]
    assert asked["overwrite"] == ["True"]
    backend.upload_status = 400
    with pytest.raises(DeliveryError, match="has not uploaded") as caught:
        put(store, tmp_path)
    assert API_KEY not in str(caught.value)
    experiment.end()
