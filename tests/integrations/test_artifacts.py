"""Checkpoints of a real training in the runs of real trackers, and back; a run ends when all is stored."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import pytest

import memtrack
from tests.integrations.comet_lab import comet_scripts
from tests.integrations.mlflow_lab import Server
from tests.integrations.wandb_lab import folders, read_run

pytest.importorskip("torch")
pytest.importorskip("zstandard")

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
