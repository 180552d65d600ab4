"""``memtrack run -- python train.py`` with real trackers: runs get their charts, and the script knows of nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from memtrack.recording.reader import RecordingReader
from tests.integrations.comet_lab import QUIET, check_series, is_complete, read_archive, wait_until
from tests.integrations.mlflow_lab import HEADER, check_run, environment
from tests.integrations.wandb_lab import SETTINGS as WANDB_SETTINGS
from tests.integrations.wandb_lab import check_run as check_wandb
from tests.integrations.wandb_lab import read_run

pytest.importorskip("mlflow")
pytest.importorskip("typer")
if not hasattr(signal, "sigwaitinfo"):
    pytest.skip("memtrack run is for Linux", allow_module_level=True)

FAST = {"MEMTRACK_FLUSH_INTERVAL": "0.1", "MEMTRACK_SELECTIVE": "0"}


class Launched:
    """``memtrack run`` with a command, which runs in a folder of its own."""

    def __init__(self, folder, command, options, env):
        self.folder = folder
        self._out, self._err = folder / "out", folder / "err"
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "memtrack", "run", "--interval", "0.1", *options, "--", *command],
                cwd=folder,
                env=environment(PYTHONUNBUFFERED="1", NO_COLOR="1", **{**FAST, **env}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def stderr(self):
        """What was said so far."""
        return self._err.read_text()

    @property
    def result(self):
        """What the script has reported so far."""
        lines = [line[7:] for line in self._out.read_text().splitlines(keepends=True) if line.startswith("RESULT ")]
        return {key: value for line in lines if line.endswith("\n") for key, value in json.loads(line).items()}

    def wait_for(self, *keys, timeout=90):
        """Wait until the script has reported these; what it has reported."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None and not set(keys) <= set(self.result):
            time.sleep(0.02)
        assert set(keys) <= set(self.result), self.stderr
        return self.result

    def finish(self, status=0, timeout=90):
        """Wait for its end, which must have this status; what the script has reported."""
        assert self.process.wait(timeout) == status, self.stderr
        return self.result

    def agents(self):
        """``(pid, the pid that it watches)`` of each agent for a recording in this folder."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0") if entry.isdigit() else []
            except OSError:
                continue
            if len(words) > 4 and words[3].endswith(b"agent/__main__.py") and os.fsencode(self.folder) in words[4]:
                with RecordingReader(os.fsdecode(words[4])) as reader:
                    found.append((int(entry), int(reader.fields["pid"])))
        return found

    def settled_agents(self):
        """The same, once the one that is relieved has gone."""
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            watched = [pid for _, pid in self.agents()]
            if watched and len(set(watched)) == len(watched):
                break
            time.sleep(0.02)
        time.sleep(0.3)
        return self.agents()

    def recordings(self):
        """All of them."""
        return sorted((self.folder / ".memtrack").glob("*.mtk"))

    def recording(self):
        """The only one."""
        (path,) = self.recordings()
        return path


@pytest.fixture
def launch(tmp_path):
    """``launch(source, *options, store=, command=, **environment)`` gives a :class:`Launched` with ``train.py``."""
    launched = []

    def start(source, *options, store=None, command=(sys.executable, "train.py"), **env):
        (tmp_path / "train.py").write_text(HEADER + source)
        uri = {} if store is None else {"MLFLOW_TRACKING_URI": store.uri}
        launched.append(Launched(tmp_path, command, options, {**uri, **env}))
        return launched[-1]

    yield start
    for one in launched:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def check_end(launched, exit_code):
    """One recording, whose verdict and number of windows are right; last words that tell of it."""
    path = launched.recording()
    with RecordingReader(str(path)) as reader:
        verdict = reader.verdict()
        assert verdict is not None
        assert verdict.exit_code == exit_code
        numbers = [row.first for row in reader.windows()]
        events = [event.kind for event in reader.events()]
    assert numbers == list(range(len(numbers)))
    assert "gap" not in events
    assert "error" not in events
    assert "memtrack: peak" in launched.stderr
    assert f"recording .memtrack/{path.name}" in launched.stderr
    assert "less telemetry" not in launched.stderr
    return path


# -- one program ----------------------------------------------------------------------------------------------------

MLFLOW = """
import mlflow
with mlflow.start_run() as run:
    report(run_id=run.info.run_id, t0=time.time())
    for step in range(20):
        mlflow.log_metric("loss", 1.0 / (step + 1), step=step)
        time.sleep(0.08)
    report(t1=time.time())
assert "memtrack" not in __import__("__main__").__dict__
sys.exit(3)
"""


def test_mlflow(mlflow_server, launch):
    """The run has its charts and figures; there is one recording and, while it runs, one agent."""
    launched = launch(MLFLOW, store=mlflow_server)
    launched.wait_for("run_id")
    ((_, watched),) = launched.settled_agents()
    (child,) = Path(f"/proc/{launched.process.pid}/task/{launched.process.pid}/children").read_text().split()
    assert watched == int(child)
    result = launched.finish(status=3)
    path = check_end(launched, 3)
    check_run(mlflow_server, result["run_id"], path, result["t0"], result["t1"], slack_s=0.4)
    run = mlflow_server.client().get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["system/memory/summary/peak_rss_mib"] > 20
    assert "memtrack.peak" in run.data.tags
    with RecordingReader(str(path)) as reader:
        assert (reader.fields["own"], reader.fields["program"]) == ("1", "train.py")
        assert [event.kind for event in reader.events()].count("start") == 2
    listed = subprocess.run(
        [sys.executable, "-m", "memtrack", "ls"], cwd=launched.folder, env=environment(), capture_output=True, text=True
    )
    assert re.search(r"train\.py.*failed \(3\)|failed \(3\).*train\.py", listed.stdout), listed.stdout
    assert "delivered" in listed.stdout


def test_wandb(launch, tmp_path):
    """Offline, read back with W&B's own reader."""
    pytest.importorskip("wandb")
    source = """
import wandb
with wandb.init(project="p") as run:
    report(run_id=run.id, t0=time.time())
    for step in range(15):
        run.log({"loss": 1.0 / (step + 1)})
        time.sleep(0.08)
    report(t1=time.time())
"""
    launched = launch(source, WANDB_DIR=str(tmp_path), **WANDB_SETTINGS)
    launched.wait_for("run_id")
    assert len(launched.settled_agents()) == 1
    result = launched.finish()
    path = check_end(launched, 0)
    run = read_run(tmp_path, result["run_id"])
    check_wandb(run, path, result["t0"], result["t1"], slack_s=0.4)
    assert run.history == [(step, {"loss": 1.0 / (step + 1)}) for step in range(15)]
    assert run.exit_codes == [0]
    assert run.summary["memtrack/peak_rss_mib"] > 20


def test_comet(launch, tmp_path):
    """Offline, the archive read back."""
    pytest.importorskip("comet_ml")
    source = """
report(begin=time.time())
import comet_ml
exp = comet_ml.start(project_name="p")
report(key=exp.get_key(), since=time.time())
for step in range(15):
    exp.log_metric("loss", 1.0 / (step + 1), step=step)
    time.sleep(0.08)
report(until=time.time())
exp.end()
"""
    launched = launch(source, COMET_START_ONLINE="0", COMET_OFFLINE_DIRECTORY=str(tmp_path), **QUIET)
    launched.wait_for("key")
    assert len(launched.settled_agents()) == 1
    result = launched.finish()
    path = check_end(launched, 0)
    (archive,) = wait_until(lambda: [path for path in tmp_path.glob("*.zip") if is_complete(path)])
    log = read_archive(archive)
    check_series(log.series, path, result["begin"], result["since"] + 0.4, result["until"], time.time())
    assert len(log.users[0]) == 15
    assert log.others["memtrack.peak_rss_mib"] > 20


def test_below_a_shell(mlflow_server, launch):
    """A shell that becomes the program has the same recording; one that stays has its own, and so has the program."""
    launched = launch(MLFLOW, store=mlflow_server, command=["bash", "-c", f"{sys.executable} train.py"])
    result = launched.finish(status=3)
    path = check_end(launched, 3)
    check_run(mlflow_server, result["run_id"], path, result["t0"], result["t1"], slack_s=0.4)


def test_below_a_shell_that_stays(mlflow_server, launch):
    """The launcher's recording is of the shell with all below it; the program has its own, and its own agent."""
    command = ["bash", "-c", f"{sys.executable} train.py; exit $?"]
    launched = launch(MLFLOW, store=mlflow_server, command=command)
    launched.wait_for("run_id")
    agents = launched.settled_agents()
    assert len(agents) == len({watched for _, watched in agents}) == 2
    result = launched.finish(status=3)
    programs = {}
    for path in launched.recordings():
        with RecordingReader(str(path)) as reader:
            programs[reader.fields["program"]] = path
    assert set(programs) == {"bash", "train.py"}
    check_run(mlflow_server, result["run_id"], programs["train.py"], result["t0"], result["t1"], slack_s=0.4)
    assert programs["bash"].name in launched.stderr


OWN = {
    "autolog, before the run": """
import mlflow, memtrack
memtrack.autolog()
run = mlflow.start_run()
report(run_id=run.info.run_id, t0=time.time())
time.sleep(1.5)
report(t1=time.time())
mlflow.end_run()
""",
    "start, without a sink": """
import mlflow, memtrack
with memtrack.start(), mlflow.start_run() as run:
    time.sleep(0.5)
    report(left_alone=run.info.run_id)
""",
    "start with a sink, after the run has started": """
import mlflow, memtrack
run = mlflow.start_run()
time.sleep(0.5)
with memtrack.start(sinks=["mlflow"]):
    report(run_id=run.info.run_id, t0=time.time())
    with memtrack.phase("late"):
        memtrack.step(7)
        time.sleep(1.5)
    report(t1=time.time())
mlflow.end_run()
""",
    "autolog, taken back": """
import memtrack
memtrack.autolog(disable=True)
import mlflow
with mlflow.start_run() as run:
    time.sleep(0.5)
    report(left_alone=run.info.run_id)
""",
    "autolog, after the run has started": """
import mlflow
run = mlflow.start_run()
time.sleep(0.5)
import memtrack
memtrack.autolog(metrics="all")
report(run_id=run.info.run_id, t0=time.time())
with memtrack.phase("late"):
    memtrack.step(7)
    time.sleep(1.5)
report(t1=time.time())
mlflow.end_run()
""",
}


@pytest.mark.parametrize("case", OWN)
def test_what_the_program_says_itself_wins(case, mlflow_server, launch):
    """A script that calls memtrack has what it asked for, once, in the one recording, by one agent."""
    launched = launch(OWN[case], store=mlflow_server)
    if "run_id=" in OWN[case]:
        launched.wait_for("run_id")
        assert len(launched.settled_agents()) == 1
    result = launched.finish()
    path = check_end(launched, 0)
    if "left_alone" in result:
        assert mlflow_server.series(result["left_alone"]) == {}
    else:
        series = mlflow_server.series(result["run_id"])["memory/process/rss_mib"]
        assert len({timestamp for timestamp, _, _ in series}) == len(series)
        if "late" not in OWN[case]:
            check_run(mlflow_server, result["run_id"], path, result["t0"], result["t1"], slack_s=0.4)
        else:
            inside = [time_ms for time_ms, _, _ in series if result["t0"] < time_ms / 1e3 < result["t1"]]
            assert len(inside) >= 10
            assert "memory/process/anon_mib" in mlflow_server.series(result["run_id"]) or "sinks" in OWN[case]
            assert re.search(r"^    late +1.\d s", launched.stderr, re.MULTILINE)


@pytest.mark.parametrize("how", ["--no-autolog", "MEMTRACK_DISABLE"])
def test_switched_off(how, mlflow_server, launch):
    """The run of the script has nothing of memtrack."""
    source = MLFLOW.replace("range(20)", "range(3)")
    if how == "--no-autolog":
        launched = launch(source, how, store=mlflow_server)
    else:
        launched = launch(source, store=mlflow_server, MEMTRACK_DISABLE="1")
    result = launched.finish(status=3)
    assert mlflow_server.series(result["run_id"]) == {}
    assert len(launched.recordings()) == (1 if how == "--no-autolog" else 0)


@pytest.mark.parametrize("after_s", [0.0, 0.15, 1.0])
def test_killed(after_s, mlflow_server, launch):
    """The launcher dies of the same signal, and the run in MLflow is told how it ended; also if the recording has not
    been taken over yet, or is just being."""
    source = MLFLOW.replace("range(20)", "range(2000)").replace("t0=", "pid=os.getpid(), t0=")
    launched = launch(source, store=mlflow_server)
    result = launched.wait_for("run_id")
    time.sleep(after_s)
    killed_s = time.time()
    os.kill(result["pid"], signal.SIGKILL)
    launched.finish(status=-signal.SIGKILL)
    path = launched.recording()
    run = wait_until(
        lambda: (run := mlflow_server.client().get_run(result["run_id"])).info.status != "RUNNING" and run, timeout=60
    )
    assert run.info.status == "KILLED"
    assert run.data.tags["memtrack.verdict"].startswith("unknown")
    assert "SIGKILL" in launched.stderr
    if after_s >= 1.0:
        check_run(mlflow_server, result["run_id"], path, result["t0"], killed_s, slack_s=0.4)
    wait_until(lambda: not launched.agents())


# -- launchers of frameworks ----------------------------------------------------------------------------------------

DISTRIBUTED = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run = None
if rank == 0:
    import mlflow
    run = mlflow.start_run()
    report(run_id=run.info.run_id, pid=os.getpid(), t0=time.time())
else:
    report(other=os.getpid())
for step in range(25):
    loss = model(torch.ones(4, 16)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if run:
        mlflow.log_metric("loss", loss.item(), step=step)
    time.sleep(0.08)
if run:
    report(t1=time.time())
    mlflow.end_run()
dist.destroy_process_group()
"""

# `accelerate launch --cpu` starts one process, whatever it is told; on a machine without a GPU this starts two
ACCELERATE = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHERS = {
    "torch": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "train.py"],
    "accelerate": ["-m", "accelerate.commands.launch", *ACCELERATE.split(), "train.py"],
}


@pytest.mark.parametrize("package", LAUNCHERS)
def test_distributed(package, mlflow_server, launch):
    """The run of rank 0 has the charts of that process; rank 1 records alone, the launcher does not."""
    if find_spec("torch") is None or find_spec(package) is None:
        pytest.skip("needs torch")
    launched = launch(DISTRIBUTED, store=mlflow_server, command=[sys.executable, *LAUNCHERS[package]])
    result = launched.wait_for("run_id", "other")
    (command,) = Path(f"/proc/{launched.process.pid}/task/{launched.process.pid}/children").read_text().split()
    # that of `memtrack run`, which watches the whole tree, and those of the ranks
    watched = sorted([int(command), result["pid"], result["other"]])
    assert sorted(pid for _, pid in launched.settled_agents()) == watched
    result = launched.finish()
    assert len(launched.recordings()) == 3
    (path,) = [path for path in launched.recordings() if f"-{result['pid']}" in path.name]
    series = check_run(mlflow_server, result["run_id"], path, result["t0"], result["t1"], slack_s=0.4)
    assert series["memory/tree/processes"][-1][2] == 1.0
    assert mlflow_server.client().get_run(result["run_id"]).info.status == "FINISHED"
    assert "tree" in launched.stderr
