"""The store of artifacts in MLflow: a plain folder behind SQLite, and a server that hands files on."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest

import memtrack
from memtrack import registry
from memtrack.artifacts.contract import MANIFEST, StoreContract
from memtrack.errors import DeliveryError, RejectedError, SettingsError

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy", reason="needs the full mlflow, with its SQL store")

from memtrack_mlflow import active_store, open_store  # noqa: E402 - needs mlflow

from tests.integrations.mlflow_lab import Proxy, Server, sqlite_copy  # noqa: E402


@pytest.fixture(scope="module")
def serving(mlflow_template, tmp_path_factory):
    """A server that keeps the artifacts itself: ``mlflow-artifacts:`` is the URI of its runs."""
    folder = tmp_path_factory.mktemp("mlflow-serving")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    options = ("--serve-artifacts", "--artifacts-destination", f"file://{folder}/artifacts")
    server = Server(folder, *options, "--default-artifact-root", "mlflow-artifacts:/")
    server.start()
    # not the default one, whose place is that of the template
    server.experiment_id = server.client().create_experiment("served")
    assert server.client().get_experiment(server.experiment_id).artifact_location.startswith("mlflow-artifacts:")
    yield server
    server.stop()


@pytest.fixture
def _uri():
    """MLflow's tracking URI is afterwards what it was before."""
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(params=["sqlite", "server"])
def place(request, mlflow_template, tmp_path, _uri):
    """Both kinds of place, set as MLflow's tracking URI."""
    if request.param == "server":
        server = request.getfixturevalue("serving")
        server.start()
        mlflow.set_tracking_uri(server.uri)
        yield server
        server.start()
    else:
        with sqlite_copy(mlflow_template, tmp_path) as store:
            mlflow.set_tracking_uri(store.uri)
            store.experiment_id = store.client().create_experiment("e", f"file://{tmp_path}/artifacts")
            yield store
    while mlflow.active_run() is not None:
        mlflow.end_run()


class TestMlflowStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _run(self, place):
        self.place = place
        self.run = mlflow.start_run(experiment_id=place.experiment_id)

    def make_store(self):
        return active_store()

    def open_again(self, store):
        mlflow.end_run()
        found, name = open_store(f"{self.run.info.run_id}/model/step-00000040")
        assert name == "model/step-00000040"
        return found

    def make_broken_store(self):
        if isinstance(self.place, Server):
            self.place.stop()
        else:
            folder = self.run.info.artifact_uri.removeprefix("file://")
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            with open(folder, "w"):
                pass  # a file where the folder of the run has to be
        return active_store()

    def test_the_artifacts_are_in_the_run(self, tmp_path):
        """MLflow itself lists what was stored, under its name."""
        self._log(self.make_store(), tmp_path)
        folders = self.place.client().list_artifacts(self.run.info.run_id, "memtrack")
        assert [(one.path, one.is_dir) for one in folders] == [
            ("memtrack/model", True),
            ("memtrack/packs", True),
            ("memtrack/restore.py", False),
        ]
        (manifest,) = self.place.client().list_artifacts(self.run.info.run_id, "memtrack/model")
        assert (manifest.path, manifest.file_size) == (MANIFEST, 800)


@pytest.mark.usefixtures("_uri")
def test_outages_come_back_at_once(serving, tmp_path):
    """A server that is down, or refuses, is told of within seconds: no repetition happens inside of the call."""
    serving.start()
    mlflow.set_tracking_uri(serving.uri)
    run = serving.client().create_run(serving.experiment_id)
    store = open_store(f"{run.info.run_id}/x")[0]
    (tmp_path / "x.mtz").write_bytes(b"x" * 100_000)
    store.put(str(tmp_path / "x.mtz"), "memtrack/packs/x.mtz", "")
    serving.stop()
    since = time.monotonic()
    # the connection that was open is broken off, or there is none to be had any more
    with pytest.raises(DeliveryError, match=r"Connection (refused|reset by peer)"):
        store.put(str(tmp_path / "x.mtz"), "memtrack/packs/x.mtz", "")
    with pytest.raises(DeliveryError, match="Connection refused"):
        store.get("memtrack/packs/x.mtz", str(tmp_path / "back"))
    with pytest.raises(DeliveryError, match="no answer from the tracking server"):
        open_store(f"{run.info.run_id}/x")[0].names()
    assert time.monotonic() - since < 10
    serving.start()
    store.put(str(tmp_path / "x.mtz"), "memtrack/packs/x.mtz", "")
    assert store.names() == {"memtrack/packs/x.mtz": 100_000}


@pytest.fixture
def front(serving):
    """A proxy in front of that server."""
    serving.start()
    proxy = Proxy(serving)
    yield proxy
    proxy.close()


@pytest.mark.usefixtures("_uri")
@pytest.mark.parametrize(
    ("status", "error", "says"),
    [(413, RejectedError, "client_max_body_size"), (503, DeliveryError, "HTTP 503"), (403, DeliveryError, "HTTP 403")],
)
def test_what_a_proxy_answers(serving, front, tmp_path, status, error, says):
    """A proxy that is in the way is told apart from one that is down, and no password gets into the message."""
    uri = front.uri.replace("://", "://user:s3cret@")
    run = serving.client().create_run(serving.experiment_id)
    mlflow.set_tracking_uri(uri)
    store = open_store(f"{run.info.run_id}/x")[0]
    assert store.names() == {}
    front.gate = lambda headers: status
    (tmp_path / "x.mtz").write_bytes(b"x" * 1000)
    with pytest.raises(error, match=says) as caught:
        store.put(str(tmp_path / "x.mtz"), "memtrack/packs/x.mtz", "")
    assert type(caught.value) is error
    assert "s3cret" not in str(caught.value)


def test_a_run_of_another_thread_is_found(place):
    """MLflow knows an active run in its own thread only; one that memtrack follows is found from any."""
    found = []

    def look():
        thread = threading.Thread(target=lambda: found.append(active_store()))
        thread.start()
        thread.join()

    run = mlflow.start_run(experiment_id=place.experiment_id)
    look()
    memtrack.autolog(trackers=["mlflow"], frameworks=[])
    look()
    mlflow.end_run()
    look()
    assert [one and one.key for one in found] == [None, f"mlflow:{run.info.run_id}", None]
    assert active_store() is None


def test_by_the_registry(place):
    """The registry finds both functions; a reference without a name is refused."""
    with mlflow.start_run(experiment_id=place.experiment_id) as run:
        assert active_store in registry.load_active_stores()
        assert registry.load_active_stores("mlflow") == [active_store]
        assert active_store().key == f"mlflow:{run.info.run_id}"
    assert registry.load_store("mlflow") is open_store
    for reference in ("", "abc", "abc/", "/name"):
        with pytest.raises(SettingsError, match="mlflow:RUN_ID/NAME"):
            open_store(reference)
