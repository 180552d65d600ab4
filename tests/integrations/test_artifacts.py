"""Checkpoints of a real training in the runs of real trackers, and back; a run ends when all is stored."""

from __future__ import annotations

import random
import shutil
import time
from hashlib import sha256
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("zstandard")
import numpy as np

import memtrack
from memtrack import registry
from memtrack.artifacts.reading import Artifact
from tests.artifact_lab import trained, weights
from tests.integrations.comet_lab import comet_scripts
from tests.integrations.mlflow_lab import Proxy, Server
from tests.integrations.wandb_lab import folders, read_run

TRAINING = """
import memtrack, torch, hashlib
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(400, 900), torch.nn.ReLU(), torch.nn.Linear(900, 10))
optimizer = torch.optim.Adam(net.parameters(), 1e-5)
digests, uploads = {}, []
def train(log):
    for step in range(0, 30):
        loss = net(torch.randn(64, 400)).square().mean()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        log(step, float(loss))
        if step % 10 == 9:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, "last.pt")
            digests[step] = hashlib.sha256(open("last.pt", "rb").read()).hexdigest()
            uploads.append(memtrack.log_checkpoint("last.pt", step=step, name="model"))
            # the file is written to again, which is no more than ten steps away
            assert uploads[-1].wait(60), uploads[-1]
    with open("rows.csv", "w") as file:
        file.writelines(f"{at},{at * at % 977}\\n" for at in range(50_000))
    uploads.append(memtrack.log_artifact("rows.csv", compress="max"))
"""
REPORT = """
report(digests=digests, sources=[upload.source for upload in uploads], stored=[upload.done for upload in uploads],
       ratios=[upload.bytes_done / max(upload.bytes_stored, 1) for upload in uploads])
"""


def check_restored(result, folder):
    """All checkpoints and the table come back from the run as they were."""
    assert result["stored"] == [True] * 4, "the end of the run waited for what was under way"
    for source, (step, digest) in zip(result["sources"], result["digests"].items(), strict=False):
        assert f"step-{int(step):08d}" in source or source.startswith("wandb:")
        path = memtrack.restore(source, folder / step)
        assert sha256(Path(path).read_bytes()).hexdigest() == digest
    table = memtrack.restore(result["sources"][-1], folder)
    assert Path(table).read_text().startswith("0,0\n1,1\n")
    assert result["ratios"][2] > 1.1 * result["ratios"][0], "differences are smaller"


@pytest.fixture(scope="module")
def serving(mlflow_template, tmp_path_factory):
    """A server that keeps the artifacts itself, as most do."""
    folder = tmp_path_factory.mktemp("serving")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    destination = ("--artifacts-destination", f"file://{folder}/artifacts")
    server = Server(folder, "--serve-artifacts", *destination, "--default-artifact-root", "mlflow-artifacts:/")
    server.start()
    server.experiment_id = server.client().create_experiment("served")
    yield server
    server.stop()


def test_mlflow_server(serving, train, tmp_path, monkeypatch):
    training = train(
        TRAINING
        + f"""
import mlflow
with mlflow.start_run(experiment_id="{serving.experiment_id}") as run:
    train(lambda step, loss: mlflow.log_metric("loss", loss, step=step))
for upload in uploads:
    upload.wait(60)
report(run=run.info.run_id)
"""
        + REPORT,
        serving,
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serving.uri)
    check_restored(training.result, tmp_path / "back")
    assert [point[1] for point in serving.history(training.result["run"])["loss"]] == list(range(30))


def test_wandb_offline(wandb_train, tmp_path):
    training = wandb_train(
        TRAINING
        + """
import wandb
with wandb.init(project="p") as run:
    train(lambda step, loss: run.log({"loss": loss}, step=step))
report(run=run.id)
"""
        + REPORT
    )
    check_restored(training.result, tmp_path / "back")
    run = read_run(tmp_path, training.result["run"])
    assert [step for step, row in run.history if "loss" in row] == list(range(30))
    assert len(folders(tmp_path, training.result["run"])) == 1


def test_comet_offline(tmp_path):
    with comet_scripts(tmp_path) as comet_train:
        training = comet_train(
            TRAINING
            + """
import comet_ml
experiment = comet_ml.start(project_name="p", workspace="w")
train(lambda step, loss: experiment.log_metric("loss", loss, step=step))
experiment.end()
"""
            + REPORT
        )
    check_restored(training.result, tmp_path / "back")


KILLED = """
import memtrack, mlflow, numpy as np, sys
with mlflow.start_run(run_id=RUN):
    upload = memtrack.log_checkpoint("m.npy", step=STEP, name="model")
    print("BEGUN now")
    assert upload.wait(60), upload
"""


def kills_in_mlflow(serving, train, folder, monkeypatch, kills):
    """Kill programs that pack and upload; each time another call for the same file finishes it."""
    randomness, model = random.Random(kills[0]), weights(9 << 20)
    run = serving.client().create_run(serving.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serving.uri)
    for step, count in enumerate(kills):
        np.save(folder / "m.npy", model)
        source = KILLED.replace("RUN", repr(run)).replace("STEP", str(step))
        for _ in range(count):
            script = train(source, serving, wait=False)
            script.wait_for("BEGUN")
            time.sleep(randomness.uniform(0, 1.5))
            script.process.kill()
            script.finish(check=False)
        train(source, serving)
        back = memtrack.restore(f"mlflow:{run}/model", folder / "back")
        assert Path(back).read_bytes() == (folder / "m.npy").read_bytes()
        model = trained(model, step)
    store, _ = registry.load_store("mlflow")(f"{run}/model")
    names, needed = store.names(), set()
    for name in names:
        if name.endswith(".mtz") and not name.startswith("memtrack/packs/"):
            store.get(name, str(folder / "manifest"))
            with open(folder / "manifest", "rb") as manifest:
                needed |= {f"memtrack/packs/{pack}.mtz" for pack, _ in Artifact(manifest, open).packs}
    assert {name for name in names if name.startswith("memtrack/packs/")} == needed
    assert len([name for name in names if name.startswith("memtrack/model/")]) == len(kills)


def test_a_second_call_finishes_what_was_killed(serving, train, tmp_path, monkeypatch):
    kills_in_mlflow(serving, train, tmp_path, monkeypatch, [2])


@pytest.mark.slow
def test_fifty_kills(serving, train, tmp_path, monkeypatch):
    kills_in_mlflow(serving, train, tmp_path, monkeypatch, [10] * 5)


def test_a_server_that_is_away_is_told_once_and_gets_the_rest(serving, train, tmp_path, monkeypatch):
    np.save(tmp_path / "m.npy", weights(12 << 20))
    script = train(
        f"""
import logging, memtrack, mlflow
logging.basicConfig(format="%(message)s")
mlflow.start_run(experiment_id="{serving.experiment_id}")
upload = memtrack.log_checkpoint("m.npy", step=1, name="model")
print("BEGUN now")
while not upload.error and not upload.done:
    time.sleep(0.01)
print("ERROR", upload.error)
report(stored=upload.wait(60), error=upload.error, source=upload.source)
""",
        serving,
        wait=False,
    )
    script.wait_for("BEGUN")
    serving.stop()
    assert "no answer from the tracking server" in script.wait_for("ERROR")
    serving.start()
    training = script.finish()
    assert training.result["stored"]
    assert training.result["error"] == ""
    assert training.stderr.count("memtrack cannot store model/step-00000001") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serving.uri)
    back = memtrack.restore(training.result["source"], tmp_path / "back")
    assert Path(back).read_bytes() == (tmp_path / "m.npy").read_bytes()


def test_a_pack_that_is_refused_is_told_once_and_stored_later(serving, train, tmp_path, monkeypatch):
    """As by a proxy that takes no bodies of that size until somebody has set it right."""
    np.save(tmp_path / "m.npy", weights(1 << 20))
    front = Proxy(serving)
    # packs have megabytes; all else that is sent has not
    front.gate = lambda headers: 413 if int(headers.get("Content-Length", 0)) > 1 << 20 else None
    try:
        script = train(
            f"""
import logging, memtrack, mlflow
from memtrack.artifacts import uploader
logging.basicConfig(format="%(message)s")
uploader.LONGEST_PAUSE_S = 0.3  # a minute, else
mlflow.start_run(experiment_id="{serving.experiment_id}")
upload = memtrack.log_checkpoint("m.npy", step=1, name="model")
while not upload.error:
    time.sleep(0.01)
print("ERROR", upload.error)
time.sleep(1)
print("AGAIN", upload.done)
report(stored=upload.wait(60), source=upload.source)
""",
            front,
            wait=False,
        )
        assert "client_max_body_size" in script.wait_for("ERROR")
        assert script.wait_for("AGAIN") == "False"
        front.gate = lambda headers: None
        training = script.finish()
    finally:
        front.close()
    assert training.result["stored"]
    assert training.stderr.count("memtrack cannot store model/step-00000001") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serving.uri)
    back = memtrack.restore(training.result["source"], tmp_path / "back")
    assert Path(back).read_bytes() == (tmp_path / "m.npy").read_bytes()
