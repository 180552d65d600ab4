"""memtrack.autolog() with MLflow, W&B and Comet in one process: the same windows in each, in each run those of its own
time, and the user's series as without memtrack."""

from __future__ import annotations

import csv
import json
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from memtrack_wandb._stream import series_key

from memtrack import metrics
from memtrack.api import start
from memtrack.recording.reader import RecordingReader
from tests.integrations import mlflow_lab, wandb_lab
from tests.integrations.comet_lab import comet_offline, comet_scripts, read_archive
from tests.integrations.mlflow_lab import points, rows

for library in ("mlflow", "wandb", "comet_ml"):
    pytest.importorskip(library)

SAME = """
import memtrack, mlflow, wandb, comet_ml
monitor = memtrack.autolog(interval=0.1, flush_interval=0.1)
starts = {"mlflow": mlflow.start_run, "wandb": lambda: wandb.init(project="p"), "comet": comet_ml.start}
ends = {"mlflow": mlflow.end_run, "wandb": lambda: wandb.run.finish(), "comet": comet_ml.end}
run = {name: starts[name]() for name in STARTS}
since = time.time()
time.sleep(0.4)
grown = time.time()
held = b"1" * (100 << 20)
in_place = time.time()
for step in range(10):
    if step == 5:
        # what several threads do that start and end runs at the same time
        for _ in range(20):
            monitor._request_cut()
            monitor._agent.wake()
            time.sleep(0.0005)
    memtrack.step(step)
    time.sleep(0.08)
until = time.time()
report(since=since, until=until, grown=grown, in_place=in_place, wandb=run["wandb"].id, comet=run["comet"].get_key(),
       mlflow=run["mlflow"].info.run_id)
for name in ENDS:
    ends[name]()
"""

ORDERS = {
    "ended in the order of their starts": (["comet", "mlflow", "wandb"], ["comet", "mlflow", "wandb"]),
    "left to the end of the interpreter": (["wandb", "comet", "mlflow"], []),
}

APART = """
import memtrack, mlflow, wandb
memtrack.autolog(interval=0.1, flush_interval=0.1)
times = {}
def begun(name, run_id):
    times[name] = [run_id, time.time()]
    time.sleep(0.7)
def ending(name):
    times[name].append(time.time())
with mlflow.start_run() as run:
    begun("outer", run.info.run_id)
    first = wandb.init(project="p", reinit="create_new")
    begun("first", first.id)
    with mlflow.start_run(nested=True) as run:
        begun("inner", run.info.run_id)
        second = wandb.init(project="p", reinit="create_new")
        begun("second", second.id)
        ending("first")
        first.finish()
        time.sleep(0.7)
        ending("inner")
    time.sleep(0.7)
    ending("outer")
time.sleep(0.7)
ending("second")
second.finish()
time.sleep(0.5)
report(**times)
"""

USERS = """
import comet_ml, mlflow, wandb
if os.environ.get("WITH"):
    import memtrack
    memtrack.autolog(interval=0.05, flush_interval=0.1)
calls, steps = {}, {}
def count(owner, name):
    original = getattr(owner, name)
    def counted(*args, **kwargs):
        calls[name] = calls.get(name, 0) + 1
        return original(*args, **kwargs)
    setattr(owner, name, counted)
count(wandb.Run, "log")
count(comet_ml.CometExperiment, "log_metric")
count(comet_ml.CometExperiment, "log_metrics")
exp = comet_ml.start()
active = mlflow.start_run()
def log(values, step=None, commit=None):
    run.log(values, step=step, commit=commit)
    steps[loop.__name__].append(run.step)
    for name, value in values.items():
        mlflow.log_metric(name, value, step=step)
    if len(values) == 1:
        exp.log_metric(name, value, step=step)
    else:
        exp.log_metrics(values, step=step)
    steps["comet"].append([exp.curr_step, exp.curr_epoch])
    time.sleep(0.015)
def explicit():
    for step in range(0, 30, 3):
        log({"loss": step / 7}, step=step)
        log({"loss": step / 8, "accuracy": step / 30}, step=step)
def implicit():
    for step in range(10):
        log({"loss": step / 9})
def in_parts():
    for step in range(10):
        log({"loss": float(step)}, commit=False)
        log({"accuracy": step / 10}, commit=False)
        log({"rate": 0.1, "loss": -float(step)})
def defined():
    run.define_metric("epoch", hidden=True)
    run.define_metric("loss", step_metric="epoch", summary="min")
    run.define_metric("val/*", step_metric="epoch", summary="max")
    for epoch in range(5):
        log({"epoch": epoch, "loss": abs(epoch - 2.0), "val/rate": epoch % 4})
        exp.set_step(1000 + epoch)
        log({"val/other": epoch % 3, "epoch": epoch})
steps["comet"] = []
for loop in (explicit, implicit, in_parts, defined):
    steps[loop.__name__] = []
    with wandb.init(project="p") as run:
        loop()
        report(**{loop.__name__: run.id})
report(steps=steps, calls=calls, mlflow=active.info.run_id, comet=exp.get_key(), running=sorted(exp.metrics))
"""
PARTS = """
import memtrack, mlflow, wandb, comet_ml
import numpy as np
monitor = memtrack.autolog(interval=0.2, flush_interval=0.2)
run, active, exp = wandb.init(project="p"), mlflow.start_run(), comet_ml.start()
mlflow.log_dict({"own": 1}, "own.json")
held = []
for epoch in range(3):
    memtrack.epoch(epoch)
    with memtrack.phase("train"):
        for step in range(10 * epoch, 10 * epoch + 10):
            memtrack.step(step)
            if step == 15:
                spike = np.ones(200 << 17)
                time.sleep(0.3)
                del spike
            time.sleep(0.02)
        held.append(np.ones(20 << 17))
    with memtrack.phase("validation"):
        time.sleep(0.1)
report(wandb=run.id, comet=exp.get_key(), mlflow=active.info.run_id)
mlflow.end_run()
run.finish()
exp.end()
report(summary=str(monitor.summary()))
"""
LOOPS = ["explicit", "implicit", "in_parts", "defined"]

SCRIPTS = {
    **{
        order: (SAME.replace("STARTS", repr(starts)).replace("ENDS", repr(ends)), {})
        for order, (starts, ends) in ORDERS.items()
    },
    "apart": (APART, {}),
    "parts": (PARTS, {}),
    "users": (USERS, {}),
    "users with memtrack": (USERS, {"WITH": "1"}),
}

# -- all scripts at once --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainings(_server, tmp_path_factory):
    """``trainings(name)`` is what came of a script, and its folder; W&B and Comet are offline, MLflow's server is real.
    Most of the time of each is waiting."""
    _server.start()
    started, done = {}, {}
    with ExitStack() as stack:
        for name, (source, more) in SCRIPTS.items():
            folder = tmp_path_factory.mktemp("together")
            train = stack.enter_context(comet_scripts(folder))
            in_folder = {**wandb_lab.SETTINGS, "WANDB_DIR": str(folder), "MEMTRACK_SELECTIVE": "0"}
            started[name] = train(source, store=_server, wait=False, **in_folder, **more), folder

        def finished(name):
            if name not in done:
                done[name] = started[name][0].finish()
            return done[name], started[name][1]

        yield finished


def archive(folder, key):
    """The archive of an experiment."""
    (path,) = folder.glob(f"comet/{key}*.zip")
    return path


# -- the same run in all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_run_has_the_same_windows_in_each(order, trainings, mlflow_server):
    """Over the time in which all three are open each has the windows of the recording, and none of its own making:
    count, values and, to the millisecond, times.

    Two windows have ended in the same millisecond: Comet then had a point twice, MLflow and W&B one less.
    """
    done, folder = trainings(order)
    result = done.result
    path = archive(folder, result["comet"])
    in_comet = read_archive(path).series
    in_wandb = wandb_lab.read_run(folder, result["wandb"]).series
    in_mlflow = mlflow_server.series(result["mlflow"])
    found = {
        "mlflow": {name: [(stamp, value) for stamp, _, value in series] for name, series in in_mlflow.items()},
        "wandb": {name: in_wandb[series_key(name)] for name in in_mlflow},
        "comet": {name: sorted(series) for name, series in in_comet.items()},
    }

    windows = rows(done.recording, result["since"], result["until"])
    stamps = {round(row.end_wall_ns / 1e6) for row in windows}
    assert len(stamps) == len(windows) >= 12
    expected, all_there_are = points(windows), points(rows(done.recording))
    assert len(expected) >= 10
    for tracker, series in found.items():
        shared = {name: [point for point in got if point[0] in stamps] for name, got in series.items()}
        assert shared == expected, tracker
        assert all(set(got) <= set(all_there_are[name]) for name, got in series.items()), tracker
        stood = [value for stamp, value in series[metrics.RSS] if stamp < 1000 * result["grown"]][-1]
        risen = [stamp for stamp, value in series[metrics.peak_name(metrics.RSS)] if value > stood + 80]
        assert result["grown"] <= risen[0] / 1000 < result["in_place"] + 0.5, tracker
    assert len(in_wandb) == len(in_mlflow)

    values = comet_offline(path)
    for name, series in in_comet.items():
        read = values[result["comet"], "metric", f"sys.{name.replace('/', '.')}"]
        assert [float(value) for value in read] == [value for _, value in series]
    assert "memtrack" not in done.stderr


def test_windows_that_are_asked_for_end_apart(tmp_path):
    """Whenever the end of a window is asked for, the next ends in another millisecond: trackers know no finer time."""
    with start(interval=0.1) as monitor:
        assert monitor.wait_ready()
        with RecordingReader(monitor.path) as reader:
            for _ in range(60):
                cut = monitor._request_cut()
                while reader.head().cut < cut:
                    pass
    stamps = [round(row.end_wall_ns / 1e6) for row in rows(monitor.path)]
    assert len(set(stamps)) == len(stamps) >= 61


# -- phases and epochs ----------------------------------------------------------------------------------------------


def test_the_table_of_phases_and_epochs(trainings, mlflow_server):
    """Each tracker has it as a table, with the peak where it stood and the growth, and as text; the user's artifacts
    and steps are as they were."""
    done, folder = trainings("parts")
    client, run_id = mlflow_server.client(), done.result["mlflow"]
    path = client.download_artifacts(run_id, "memtrack/phases_and_epochs.json", str(folder))
    tables = {"mlflow": json.loads(Path(path).read_text())}
    (path,) = folder.glob(f"**/*{done.result['wandb']}/files/media/table/memtrack/*.table.json")
    tables["wandb"] = json.loads(path.read_text())
    experiment = archive(folder, done.result["comet"])
    with zipfile.ZipFile(experiment) as packed:
        (upload,) = [
            message["payload"]
            for message in read_archive(experiment).messages
            if message["payload"].get("additional_params", {}).get("fileName") == "memtrack_phases_and_epochs.csv"
        ]
        columns, *lines = csv.reader(packed.read(upload["file_path"]).decode().splitlines())
    tables["comet"] = {"columns": columns, "data": lines}

    for tracker, table in tables.items():
        parts = {row[1]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
        assert list(parts) == ["train", "validation", "0", "1", "2"], tracker
        peaks = {name: float(part["peak_rss_mib"]) for name, part in parts.items()}
        assert peaks["1"] == peaks["train"], tracker
        assert peaks["1"] - peaks["0"] == pytest.approx(200.0, rel=0.1), tracker
        assert int(parts["1"]["peak_step"]) == int(parts["train"]["peak_step"]) == 15, tracker
        growths = {name: float(part["growth_mib"]) for name, part in parts.items()}
        assert growths["train"] == pytest.approx(60.0, abs=8.0), tracker
        assert [growths[name] for name in "012"] == pytest.approx([20.0] * 3, abs=6.0), tracker
        assert 0.0 < float(parts["1"]["limit_pct"]) < 100.0, tracker

    tags = client.get_run(run_id).data.tags
    assert [line.partition(":")[0] for line in tags["memtrack.epochs"].splitlines()] == ["0", "1", "2"]
    shown = json.loads(tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "memtrack/phases_and_epochs.json", "type": "table"}]
    assert sorted(found.path for found in client.list_artifacts(run_id)) == ["memtrack", "own.json"]
    assert not wandb_lab.read_run(folder, done.result["wandb"]).history
    assert "  epochs\n    0 " in done.result["summary"]
    assert "memtrack" not in done.stderr


# -- several runs of several trackers -------------------------------------------------------------------------------


def test_nested_and_parallel_runs_of_two_trackers_are_kept_apart(trainings, mlflow_server):
    """Of four runs that begin and end one after the other, each has all windows of its own time and no other."""
    done, folder = trainings("apart")
    for name, (run_id, since, until) in done.result.items():
        if name in ("outer", "inner"):
            mlflow_lab.check_run(mlflow_server, run_id, done.recording, since, until)
        else:
            run = wandb_lab.read_run(folder, run_id)
            wandb_lab.check_run(run, done.recording, since, until)
    assert "memtrack" not in done.stderr


# -- what is the user's ---------------------------------------------------------------------------------------------


def test_the_users_series_are_as_without_memtrack(trainings, mlflow_server):
    """With memtrack at its fastest every point, step, row and definition is as it would be, in all three trackers, the
    step is the same after each call, and nobody else has called what users log with."""
    (with_memtrack, folder), (alone, other_folder) = (trainings(name) for name in ("users with memtrack", "users"))
    fed, plain = with_memtrack.result, alone.result
    for same in ("steps", "calls", "running"):
        assert fed[same] == plain[same]
    assert fed["calls"] == {"log": 70, "log_metric": 40, "log_metrics": 30}

    for loop in LOOPS:
        run, other = wandb_lab.read_run(folder, fed[loop]), wandb_lab.read_run(other_folder, plain[loop])
        assert history(run) == history(other)
        assert len(run.history) == 10
        assert run.of("metric") == other.of("metric")
        assert summary(run) == summary(other)
        assert run.exit_codes == other.exit_codes == [0]
        assert len(run.stats) >= 4
        assert not other.stats
    assert "min" in str(run.of("metric"))

    mine = read_archive(archive(folder, fed["comet"]))
    theirs = read_archive(archive(other_folder, plain["comet"]))
    assert mine.users == theirs.users
    assert len(mine.users[0]) == 105
    assert len(mine.series[metrics.RSS]) >= 20
    assert not theirs.series

    logged, as_well = (mlflow_server.history(result["mlflow"]) for result in (fed, plain))
    assert sorted(as_well) == ["accuracy", "epoch", "loss", "rate", "val/other", "val/rate"]
    for name, found in as_well.items():
        assert sorted(point[1:] for point in logged[name]) == sorted(point[1:] for point in found)
    assert len(logged["system/" + metrics.RSS]) >= 20


def history(run):
    """The rows as W&B has them, but for the times."""
    found = []
    for row in run.of("history"):
        items = {name: value for name, value in row["item"].items() if name not in ("_timestamp", "_runtime")}
        found.append((row["step"], items))
    return found


def summary(run):
    """The summary without what is memtrack's, and without the times."""
    ours = ("memtrack/", "_timestamp", "_runtime", "_wandb")
    return {name: value for name, value in run.summary.items() if not name.startswith(ours)}
