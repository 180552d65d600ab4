"""Distributed trainings with real launchers: the first rank's run shows all ranks, and who of them died first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from memtrack_wandb._stream import series_key

from memtrack import metrics
from memtrack.recording.reader import RecordingReader
from memtrack.report.data import collect
from memtrack.report.json_ import as_dict
from tests.integrations.kill_lab import await_delivery
from tests.integrations.mlflow_lab import environment
from tests.integrations.wandb_lab import SETTINGS, read_run

for module in ("torch", "mlflow", "wandb"):
    if find_spec(module) is None:
        pytest.skip(f"needs {module}", allow_module_level=True)

SERIES = {
    f"memory/ranks/{name}" for name in ("rss_min_mib", "rss_mean_mib", "rss_max_mib", "worst_rank", "alive")
}  # fmt: skip
MIB = 1 << 20
BALLAST_MIB, EXTRA_MIB = 60, 300

TRAINING = f"""
import json, os, sys, time
import memtrack
# a budget that lets the agent look every two seconds from the first on
monitor = memtrack.autolog(interval=0.5, flush_interval=0.5, cpu_budget=5.0, frameworks=[])
import numpy as np, torch, torch.distributed as dist
from contextlib import ExitStack
dist.init_process_group("gloo")
rank, world, what = dist.get_rank(), dist.get_world_size(), sys.argv[1:]
worst = world - 2 if world > 2 else world - 1
ballast = np.ones(rank * {BALLAST_MIB * MIB} // 8 + 1)
runs = ExitStack()
told = {{"pid": os.getpid()}}
if rank == 0 and "mlflow" in what:
    import mlflow
    told["mlflow"] = runs.enter_context(mlflow.start_run()).info.run_id
if rank == 0 and "wandb" in what:
    import wandb
    told["wandb"] = runs.enter_context(wandb.init(project="p")).id

def train(seconds):
    end, goes_on = time.time() + seconds, True
    while goes_on:
        total = torch.ones(1000)
        total[0] = rank == 0 and time.time() < end
        dist.all_reduce(total)
        assert total[1] == world
        goes_on = bool(total[0])
        time.sleep(0.02)

def tell(**more):
    told.update(more)
    with open(f"rank{{rank}}.tmp", "w") as file:
        json.dump(told, file)
    os.replace(f"rank{{rank}}.tmp", f"rank{{rank}}.json")

def rss_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / {MIB}

with runs:
    train(2.5)
    extra = np.ones({EXTRA_MIB * MIB} // 8) if rank == worst else None
    train(0.1)
    tell(since=time.time())
    if "forever" in what:
        train(3600)
    train(5.5)
    tell(until=time.time(), rss_mib=rss_mib())
    del extra
    train(1.0)
    if rank == 0:
        tell(summary=str(monitor.summary()))
dist.destroy_process_group()
"""

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


class Job:
    """A launcher with its ranks, in a folder of its own."""

    def __init__(self, folder, command, source, *arguments, **env):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        (folder / "train.py").write_text(source)
        variables = {"OMP_NUM_THREADS": "1", "MEMTRACK_DIR": str(folder / "recordings"), "WANDB_DIR": str(folder)}
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [*command, "train.py", *arguments],
                cwd=folder,
                env=environment(**{**SETTINGS, **variables, **env}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self):
        """What was printed."""
        return (self.folder / "log").read_text()[-4000:]

    def told(self, count, key, timeout_s=90.0):
        """What the ranks have told so far, once all of them have told ``key``."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            paths = sorted(self.folder.glob("rank*.json"))
            found = [json.loads(path.read_text()) for path in paths]
            if len(found) == count and all(key in one for one in found):
                return found
            assert self.process.poll() in (None, 0), self.log
            time.sleep(0.05)
        raise AssertionError(self.log)

    def finish(self, status=0, timeout_s=90.0):
        """Wait for its end."""
        assert self.process.wait(timeout_s) == status, self.log

    def recordings(self):
        """By pid."""
        found = {}
        for path in (self.folder / "recordings").glob("*.mtk"):
            with RecordingReader(str(path)) as reader:
                found[int(reader.fields["pid"])] = path
        return found


@pytest.fixture
def launch(tmp_path):
    """``launch(command, source, *arguments, **environment)`` gives a :class:`Job`; it is gone after the test."""
    jobs = []

    def start(command, source, *arguments, **env):
        jobs.append(Job(tmp_path / f"job{len(jobs)}", command, source, *arguments, **env))
        return jobs[-1]

    yield start
    for one in jobs:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


def check_series(series, told, worst, key=lambda name: name):
    """The points of the plateau say of the ranks what these say of themselves, within 10 %."""
    true = [one["rss_mib"] for one in told]
    since, until = max(one["since"] for one in told), min(one["until"] for one in told)
    expected = {
        "rss_min_mib": min(true), "rss_mean_mib": sum(true) / len(true), "rss_max_mib": max(true),
        "worst_rank": worst, "alive": len(told),
    }  # fmt: skip
    for name, value in expected.items():
        points = series[key(f"memory/ranks/{name}")]
        # what is said at a time is of the two seconds before
        there = [point for time_s, point in points if since + 3.5 <= time_s <= until]
        assert len(there) >= 2, (name, points)
        tolerance = 0.0 if name in ("worst_rank", "alive") else 0.1
        assert there == pytest.approx([value] * len(there), rel=tolerance), name
    assert max(true) > expected["rss_mean_mib"] * 1.2 > min(true) * 1.4  # 10 % tells them apart


def check_others_log_nothing(job, told):
    """Each rank has a recording; only the first one's goes to a tracker."""
    recordings = job.recordings()
    assert set(recordings) == {one["pid"] for one in told}
    for number, one in enumerate(told):
        with RecordingReader(str(recordings[one["pid"]])) as reader:
            assert bool(reader.feeds()) == (number == 0)
            assert SERIES.isdisjoint(reader.metrics()) == (number > 0)
            assert "rank" not in [event.kind for event in reader.events()]


def test_any_number_of_ranks_is_five_series(launch, mlflow_server):
    """torchrun with four ranks, in MLflow, and accelerate with two, in W&B: the same series, with the true figures."""
    experiment = f"ranks-{time.time_ns()}"
    four = launch(
        (*TORCHRUN, "--nproc-per-node", "4"),
        TRAINING,
        "mlflow",
        MLFLOW_TRACKING_URI=mlflow_server.uri,
        MLFLOW_EXPERIMENT_NAME=experiment,
    )
    accelerate = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    if find_spec("accelerate") is None:
        accelerate = (*TORCHRUN[1:], "--nproc-per-node", "2")
    two = launch((sys.executable, *accelerate), TRAINING, "wandb")
    four.finish()
    told = four.told(4, "until")
    check_others_log_nothing(four, told)
    (run,) = mlflow_server.runs(experiment)
    assert run.info.run_id == told[0]["mlflow"]
    found = mlflow_server.series(run.info.run_id)
    check_series(
        {name: [(stamp / 1000, value) for stamp, _, value in points] for name, points in found.items()}, told, 2
    )
    assert {name for name in found if "ranks" in name} == SERIES
    worst_mib = told[2]["rss_mib"]
    figures = run.data.metrics
    assert figures["system/memory/summary/ranks"] == 4
    assert figures["system/memory/summary/worst_rank"] == 2
    assert figures["system/memory/summary/worst_rank_peak_mib"] == pytest.approx(worst_mib, rel=0.1)
    (line,) = [line for line in told[0]["summary"].splitlines() if line.startswith("  ranks ")]
    assert line.startswith("  ranks     4, worst rank 2 with ")
    ranks = as_dict(collect(str(four.recordings()[told[0]["pid"]])))["ranks"]
    assert [(one["rank"], one["pid"], one["state"]) for one in ranks] == [
        (number, one["pid"], "ended") for number, one in enumerate(told)
    ]
    assert ranks[2]["peak_rss_mib"] == pytest.approx(worst_mib, rel=0.1)

    two.finish()
    told = two.told(2, "until")
    check_others_log_nothing(two, told)
    series = read_run(two.folder, told[0]["wandb"]).series
    check_series({name: [(stamp / 1000, value) for stamp, value in found] for name, found in series.items()}, told, 1)
    assert set(series) == {series_key(name) for name in found}


def test_the_rank_that_was_killed_is_named(launch, mlflow_server):
    """Of four ranks one is killed; torchrun ends the others. The verdict on the first rank, in both runs, names it."""
    job = launch(
        (*TORCHRUN, "--nproc-per-node", "4"), TRAINING, "mlflow", "wandb", "forever",
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )  # fmt: skip
    told = job.told(4, "since")
    time.sleep(2.5)
    victim = told[3]["pid"]
    os.kill(victim, signal.SIGKILL)
    job.finish(status=1)
    recording = job.recordings()[told[0]["pid"]]
    await_delivery(recording)
    words = f"s before, rank 3 (pid {victim}) was killed by SIGKILL"
    run = mlflow_server.client().get_run(told[0]["mlflow"])
    text = run.data.tags["memtrack.verdict_text"]
    assert text.endswith(words), text
    assert float(text.removesuffix(words).rpartition("; ")[2]) < 5.0
    assert f"its recording is {job.recordings()[victim].name}" in run.data.tags["memtrack.evidence"]
    assert run.info.status in ("KILLED", "FAILED")
    deadline = time.monotonic() + 20
    # W&B notes the end of the first process in a folder of its own, maybe before that which delivers has written
    while "memtrack/verdict_text" not in (offline := read_run(job.folder, told[0]["wandb"])).summary:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert offline.summary["memtrack/verdict_text"] == text
    with RecordingReader(str(recording)) as reader:
        events = [event for event in reader.events() if event.kind == "rank"]
    assert [event.text for event in events] == [f"rank 3 (pid {victim}) was killed by SIGKILL"]
    with RecordingReader(str(job.recordings()[victim])) as reader:
        assert reader.verdict().text.startswith("the process was killed by SIGKILL")
        assert not reader.feeds()


LIGHTNING = f"""
import json, os, time
import memtrack
memtrack.autolog(interval=0.5, cpu_budget=5.0, frameworks=[])
import numpy as np, torch
import lightning.pytorch as L
from memtrack.training import gather_ranks

class Gather(L.Callback):
    def setup(self, trainer, module, stage):
        assert gather_ranks()

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        if self.global_rank == 1 and index == 10:
            self.extra = np.ones({EXTRA_MIB * MIB} // 8)
        time.sleep(0.25)
        return self.layer(batch[0]).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

if __name__ == "__main__":
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(60, 4)), batch_size=1)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", callbacks=[Gather()], logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Model(), data)
    with open(f"rank{{trainer.global_rank}}.json", "w") as file:
        json.dump({{"pid": os.getpid()}}, file)
"""

SPAWN = """
import json, os, time
import memtrack
import torch, torch.distributed as dist, torch.multiprocessing
from memtrack.training import gather_ranks

def train(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meet"), rank=rank, world_size=2)
    memtrack.autolog(interval=0.5, frameworks=[], cpu_budget=5.0)
    assert gather_ranks()
    with open(f"rank{rank}.json", "w") as file:
        json.dump({"pid": os.getpid()}, file)
    for _ in range(80):
        dist.all_reduce(torch.ones(1))
        time.sleep(0.1)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(train, nprocs=2)
"""


def test_told_by_the_program(launch):
    """Where the environment does not say who is the first, ``gather_ranks`` does: the first rank has the figures of
    two. With Lightning's ddp, whose first rank launches the other, and ``torch.multiprocessing.spawn``."""
    jobs = [launch((sys.executable,), SPAWN)]
    if find_spec("lightning") is not None:
        jobs.append(launch((sys.executable,), LIGHTNING))
    wholes = []
    for job in jobs:
        job.finish()
        recordings = job.recordings()
        for one in job.told(2, "pid"):
            with RecordingReader(str(recordings[one["pid"]])) as reader:
                wholes.append(reader.phases()[""].cells)
    for first, second in zip(wholes[::2], wholes[1::2], strict=True):
        assert set(first) >= SERIES
        assert SERIES.isdisjoint(second)
        assert first["memory/ranks/alive"].max == 2
        assert first["memory/ranks/rss_min_mib"].last > 50.0
    for first, second in zip(wholes[2::2], wholes[3::2], strict=True):
        assert first["memory/ranks/worst_rank"].last == 1
        assert first["memory/ranks/rss_max_mib"].max == pytest.approx(second[metrics.RSS].max, rel=0.02)
        assert first["memory/ranks/rss_max_mib"].max > first[metrics.RSS].max + 0.8 * EXTRA_MIB
