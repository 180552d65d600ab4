"""memtrack.autolog() with the real MLflow: whatever starts a run, its charts are there and nothing else moves."""

from __future__ import annotations

import itertools

import pytest

from memtrack import metrics
from tests.integrations.mlflow_lab import SUMMARY, check_run, rows, scripts, sqlite_copy

pytest.importorskip("mlflow")

FAST = "interval=0.1, flush_interval=0.1"


def default_series():
    """The names of the default charts of a process that is no rank among several."""
    names = [metric.name for metric in metrics.TABLE if metric.default and "/ranks/" not in metric.name]
    return set(names) | {metrics.peak_name(name) for name in names if metrics.has_peak(name)}


# -- when autolog is called -----------------------------------------------------------------------------------------

TRAINING = """
    run_id = run.info.run_id
    t0 = time.time()
    for step in range(10):
        memtrack.step(step)
        mlflow.log_metric("loss", 1.0 / (step + 1), step=step)
        time.sleep(0.08)
    t1 = time.time()
report(run_id=run_id, t0=t0, t1=t1)
"""

ORDERS = {
    "before mlflow is imported, and again": f"""
import memtrack
first = memtrack.autolog({FAST})
assert "mlflow" not in sys.modules
import mlflow
assert memtrack.autolog({FAST}) is first
with mlflow.start_run() as run:
""",
    "after start_run was imported by name": f"""
import mlflow, memtrack
from mlflow import start_run
memtrack.autolog({FAST})
run = start_run(run_name="by name")
if True:
""",
    "after the run has started, and again": f"""
import mlflow, memtrack
with mlflow.start_run() as run:
    first = memtrack.autolog({FAST})
    assert memtrack.autolog({FAST}) is first
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_follows_a_run_whenever_autolog_is_called(order, sqlite_store, train):
    """Before or after the import or the start of the run, once or twice, the run has all its windows, once."""
    done = train(ORDERS[order] + TRAINING, sqlite_store)
    result = done.result
    check_run(sqlite_store, result["run_id"], done.recording, result["t0"], result["t1"], slack_s=0.15)
    (run,) = sqlite_store.runs()
    assert run.info.status == "FINISHED"
    loss = sqlite_store.history(result["run_id"])["loss"]
    assert [(step, value) for _, step, value in loss] == [(step, 1.0 / (step + 1)) for step in range(10)]
    assert "memtrack" not in done.stderr


# -- which runs -----------------------------------------------------------------------------------------------------


GALLERY = f"""
import memtrack, mlflow
memtrack.autolog({FAST})

def spell(run, name):
    t0 = time.time()
    time.sleep(0.6)
    report(**{{name: [run.info.run_id, t0, time.time()]}})

with mlflow.start_run() as parent:
    t0 = time.time()
    for number in range(2):
        with mlflow.start_run(nested=True) as child:
            spell(child, f"child {{number}}")
    time.sleep(0.3)
    report(parent=[parent.info.run_id, t0, time.time()])
time.sleep(0.4)
mlflow.set_experiment("elsewhere")
with mlflow.start_run() as run:
    spell(run, "elsewhere")

error = ValueError("the loss is NaN")
try:
    with mlflow.start_run() as run:
        spell(run, "failed")
        raise error
except ValueError as caught:
    assert caught is error and caught.__cause__ is None and caught.__context__ is None
    frames, trace = [], caught.__traceback__
    while trace:
        frames.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    assert not any("memtrack" in frame for frame in frames), frames

run = mlflow.start_run()
spell(run, "killed")
assert mlflow.MlflowClient().set_terminated(run_id=run.info.run_id, status="KILLED") is None
report(t_killed=time.time())
time.sleep(0.5)
os._exit(0)
"""


@pytest.fixture(scope="module")
def gallery(mlflow_template, tmp_path_factory):
    """One process that makes several runs: nested, in another experiment, one that fails, one that is killed."""
    folder = tmp_path_factory.mktemp("gallery")
    with sqlite_copy(mlflow_template, folder) as store, scripts(folder) as train:
        yield store, train(GALLERY, store)


@pytest.mark.parametrize("name", ["parent", "child 0", "child 1", "elsewhere", "failed", "killed"])
def test_each_run_of_a_process_has_its_own_windows(name, gallery):
    """Nested or one after the other: a run has the windows of its own time, the parent also those of its children."""
    store, done = gallery
    run_id, since, until = done.result[name]
    series = check_run(store, run_id, done.recording, since, until, slack_s=0.15)
    assert len(series[metrics.RSS]) >= 4
    assert "memtrack.peak" in store.client().get_run(run_id).data.tags


def test_no_window_is_in_two_runs_that_follow_each_other(gallery):
    """Where one run ends and the next begins, a window belongs to one of them."""
    store, done = gallery
    names = ["parent", "elsewhere", "failed", "killed"]
    ends = [stamp for name in names for stamp, *_ in store.series(done.result[name][0])[metrics.RSS]]
    assert len(set(ends)) == len(ends)


def test_a_run_keeps_the_status_it_ended_with(gallery):
    """FAILED after an exception, which passes unchanged; or as ``set_terminated`` says, with no windows since."""
    store, done = gallery
    status = {run.info.run_id: run.info.status for run in store.runs()}
    found = {name: status[done.result[name][0]] for name in ("parent", "child 0", "elsewhere", "failed", "killed")}
    assert found == {
        **dict.fromkeys(("parent", "child 0", "elsewhere"), "FINISHED"),
        "failed": "FAILED",
        "killed": "KILLED",
    }
    series = store.series(done.result["killed"][0])
    assert max(stamp for stamp, *_ in series[metrics.RSS]) <= 1000 * done.result["t_killed"]
    assert store.runs("elsewhere")[0].info.run_id == done.result["elsewhere"][0]


def test_parallel_runs_in_two_threads_both_have_all_windows(mlflow_server, train):
    """MLflow keeps the active run by thread; the process has one memory, so both get the windows of their time."""
    done = train(
        f"""
import memtrack, mlflow
memtrack.autolog({FAST})
mlflow.set_experiment("threads")
def work(name):
    with mlflow.start_run(run_name=name) as run:
        t0 = time.time()
        for step in range(10):
            mlflow.log_metric("loss", step, step=step)
            time.sleep(0.1)
        report(**{{name: [run.info.run_id, t0, time.time()]}})
threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
        mlflow_server,
    )
    for run_id, since, until in (done.result["one"], done.result["two"]):
        check_run(mlflow_server, run_id, done.recording, since, until, slack_s=0.15)
        assert len(mlflow_server.history(run_id)["loss"]) == 10


def test_a_run_resumed_in_another_process_goes_on(sqlite_store, train):
    """Steps and times go on where they were; the windows of both processes are there once, and no time between."""
    source = f"""
import memtrack, mlflow
memtrack.autolog({FAST})
with mlflow.start_run(run_id=os.environ.get("RESUME")) as run:
    t0 = time.time()
    time.sleep(1.0)
    report(run_id=run.info.run_id, t0=t0, t1=time.time())
"""
    first = train(source, sqlite_store)
    run_id = first.result["run_id"]
    before = check_run(sqlite_store, run_id, first.recording, first.result["t0"], first.result["t1"])
    second = train(source, sqlite_store, RESUME=run_id)
    assert second.result["run_id"] == run_id

    after = sqlite_store.series(run_id)
    wanted = rows(second.recording, second.result["t0"] + 0.1, second.result["t1"] - 0.1)
    assert len(wanted) >= 7
    for name, found in before.items():
        assert after[name][: len(found)] == found
        steps = [step for _, step, _ in after[name]]
        assert steps == sorted(steps)
        assert len(set(after[name])) == len(after[name])
    new = {stamp for stamp, *_ in after[metrics.RSS]} - {stamp for stamp, *_ in before[metrics.RSS]}
    assert {round(row.end_wall_ns / 1e6) for row in wanted} <= new
    assert len(new) <= len(wanted) + 4


@pytest.mark.parametrize("how", ["set_tracking_uri", "MLFLOW_RUN_ID"])
def test_the_ways_to_say_where(how, sqlite_store, train):
    """The tracking URI and the experiment by call, or the run by variable: the charts go along."""
    lines, env, store = "", {}, sqlite_store
    if how == "set_tracking_uri":
        store = None
        lines = f"mlflow.set_tracking_uri({sqlite_store.uri!r}); mlflow.set_experiment('elsewhere')"
    else:
        env["MLFLOW_RUN_ID"] = sqlite_store.client().create_run("0").info.run_id
    done = train(
        f"""
import memtrack
memtrack.autolog({FAST})
import mlflow
{lines}
with mlflow.start_run() as run:
    t0 = time.time()
    time.sleep(0.6)
    report(run_id=run.info.run_id, t0=t0, t1=time.time())
""",
        store,
        **env,
    )
    result = done.result
    check_run(sqlite_store, result["run_id"], done.recording, result["t0"], result["t1"])
    (run,) = sqlite_store.runs("elsewhere" if how == "set_tracking_uri" else None)
    assert run.info.run_id == result["run_id"]
    assert env.get("MLFLOW_RUN_ID") in (None, result["run_id"])


def test_a_run_that_log_metric_creates(sqlite_store, train):
    """``mlflow.log_metric`` without a run starts one, which MLflow ends when the process exits."""
    done = train(
        f"""
import memtrack, mlflow
memtrack.autolog({FAST})
mlflow.log_metric("loss", 1.0)
t0 = time.time()
time.sleep(0.6)
report(run_id=mlflow.active_run().info.run_id, t0=t0, t1=time.time())
""",
        sqlite_store,
    )
    result = done.result
    check_run(sqlite_store, result["run_id"], done.recording, result["t0"], result["t1"])
    (run,) = sqlite_store.runs()
    assert run.info.status == "FINISHED"
    assert "memtrack.peak" in run.data.tags


def test_beside_mlflows_own_autologging(sqlite_store, train):
    """The run that ``mlflow.autolog()`` makes of a scikit-learn training has its charts, and all that MLflow logs."""
    pytest.importorskip("sklearn")
    done = train(
        f"""
import memtrack, mlflow
mlflow.autolog(log_models=False, silent=True)
memtrack.autolog({FAST})
from sklearn.linear_model import LogisticRegression
import numpy as np
rng = np.random.default_rng(0)
x = rng.normal(size=(300, 4))
LogisticRegression().fit(x, x[:, 0] > 0)
run = mlflow.last_active_run()
report(run_id=run.info.run_id, t0=run.info.start_time / 1000, t1=run.info.end_time / 1000)
""",
        sqlite_store,
    )
    (run,) = sqlite_store.runs()
    assert run.info.run_id == done.result["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["training_score"] > 0.9
    assert run.data.params["solver"] == "lbfgs"
    check_run(sqlite_store, run.info.run_id, done.recording, done.result["t0"], done.result["t1"], slack_s=0.3)


def test_a_forked_child_with_a_run_of_its_own(sqlite_store, train):
    """The child of ``os.fork()`` gets an agent of its own; its run has the child's memory, not the parent's."""
    done = train(
        f"""
import memtrack, mlflow
memtrack.autolog({FAST})
pid = os.fork()
if pid == 0:
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    with mlflow.start_run(run_name="child") as run:
        t0 = time.time()
        time.sleep(1.0)
        report(child=[run.info.run_id, t0, time.time()])
    os._exit(0)
with mlflow.start_run(run_name="parent") as run:
    t0 = time.time()
    time.sleep(1.0)
    report(parent=[run.info.run_id, t0, time.time()])
assert os.waitpid(pid, 0)[1] == 0
report(pid=pid)
""",
        sqlite_store,
    )
    own = {recording.stem.split("-")[2]: recording for recording in done.recordings}
    child = own.pop(str(done.result["pid"]))
    (parent,) = own.values()
    in_child = check_run(sqlite_store, done.result["child"][0], child, *done.result["child"][1:])
    in_parent = check_run(sqlite_store, done.result["parent"][0], parent, *done.result["parent"][1:])
    assert in_child[metrics.RSS][-1][2] > in_parent[metrics.RSS][-1][2] + 150


# -- how runs end ---------------------------------------------------------------------------------------------------


def test_a_finished_run_is_complete(mlflow_server, train):
    """When the status says FINISHED everything is there: a flush interval of an hour does not matter at the end."""
    done = train(
        """
import memtrack, mlflow
memtrack.autolog(interval=0.1, flush_interval="1h")
with mlflow.start_run() as run:
    t0 = time.time()
    time.sleep(0.8)
    t1 = time.time()
run = mlflow.get_run(run.info.run_id)
report(run_id=run.info.run_id, t0=t0, t1=t1, keys=sorted(run.data.metrics), tags=sorted(run.data.tags))
os._exit(0)
""",
        mlflow_server,
    )
    result = done.result
    assert "system/memory/process/rss_mib" in result["keys"]
    assert "memtrack.peak" in result["tags"]
    check_run(mlflow_server, result["run_id"], done.recording, result["t0"], result["t1"])


# -- what is untouched ----------------------------------------------------------------------------------------------


def test_mlflow_behaves_as_without_memtrack(sqlite_store, train):
    """The same calls give the same types, values and exceptions with memtrack and without; so do the signatures."""
    source = """
import mlflow
if os.environ.get("WITH"):
    import memtrack
    memtrack.autolog(interval=0.1, flush_interval=0.1)
def outcome(call):
    try:
        found = call()
    except BaseException as exc:
        text = str(exc)
        for run in runs: text = text.replace(run.info.run_id, "RUN")
        return [type(exc).__name__, text]
    return [type(found).__module__ + "." + type(found).__qualname__, found is None]
runs = []
def start(**kwargs):
    runs.append(mlflow.start_run(**kwargs))
    return runs[-1]
seen = []
seen.append(outcome(lambda: start(run_name="first", tags={"a": "b"}, description="words")))
seen.append(outcome(lambda: start()))
seen.append(outcome(lambda: start(nested=True)))
seen.append(outcome(lambda: mlflow.active_run()))
seen.append(outcome(lambda: mlflow.end_run("FAILED")))
seen.append(outcome(lambda: mlflow.end_run("NONSENSE")))
seen.append(outcome(lambda: mlflow.end_run()))
seen.append(outcome(lambda: start(run_id="0" * 32)))
seen.append(outcome(lambda: mlflow.MlflowClient().set_terminated("0" * 32)))
seen.append(outcome(lambda: mlflow.MlflowClient().set_terminated()))
import inspect
seen.append([str(inspect.signature(mlflow.start_run)), str(inspect.signature(mlflow.MlflowClient.set_terminated)),
             str(inspect.signature(mlflow.ActiveRun)), mlflow.ActiveRun.__init__.__name__])
seen.append([mlflow.get_run(run.info.run_id).info.status for run in runs])
seen.append(sorted(k for k in mlflow.get_run(runs[0].info.run_id).data.tags if not k.startswith("memtrack.")))
report(seen=seen)
"""
    without = train(source, sqlite_store).result["seen"]
    assert train(source, sqlite_store, WITH="1").result["seen"] == without


def test_disable_restores_the_originals(sqlite_store, train):
    """``autolog(disable=True)`` puts back the very objects, also when runs are open, and lets go of the import hook."""
    train(
        f"""
import memtrack
memtrack.autolog({FAST})
memtrack.autolog(disable=True)
import mlflow
originals = mlflow.start_run, mlflow.end_run, mlflow.ActiveRun.__init__, mlflow.MlflowClient.set_terminated
assert not any(hasattr(one, "__wrapped__") for one in originals), "caught an import after it was taken back"
for _ in range(2):
    memtrack.autolog({FAST})
    with mlflow.start_run() as run:
        assert mlflow.MlflowClient.set_terminated is not originals[3]
        time.sleep(0.3)
        memtrack.autolog(disable=True)
        now = mlflow.start_run, mlflow.end_run, mlflow.ActiveRun.__init__, mlflow.MlflowClient.set_terminated
        assert all(one is original for one, original in zip(now, originals))
        assert "memtrack-relay" not in [thread.name for thread in threading.enumerate()]
    assert "memtrack.peak" in mlflow.get_run(run.info.run_id).data.tags
# who has patched over memtrack keeps what it has
memtrack.autolog({FAST})
ours = mlflow.MlflowClient.set_terminated
calls = []
def theirs(self, *args, **kwargs):
    calls.append(args)
    return ours(self, *args, **kwargs)
mlflow.MlflowClient.set_terminated = theirs
memtrack.autolog(disable=True)
assert mlflow.MlflowClient.set_terminated is theirs
with mlflow.start_run() as run:
    pass
assert len(calls) == 1
assert not any(key.startswith("system/memory/") for key in mlflow.get_run(run.info.run_id).data.metrics)
""",
        sqlite_store,
    )


def test_the_users_series_is_intact(mlflow_server, train):
    """Every point, step and value of the user's own series, while memtrack delivers as often as it can."""
    done = train(
        """
import memtrack, mlflow
memtrack.autolog(interval=0.05, flush_interval=0.1, metrics="all")
with mlflow.start_run() as run:
    for step in range(80):
        mlflow.log_metric("loss", 1.0 / (step + 1), step=step)
        mlflow.log_metric("unstepped", step)
        if step % 10 == 0:
            mlflow.log_metrics({"a": step, "b": -step}, step=1000 - step)
report(run_id=run.info.run_id)
""",
        mlflow_server,
    )
    history = mlflow_server.history(done.result["run_id"])
    by_step = {key: sorted((step, value) for _, step, value in history[key]) for key in ("loss", "unstepped", "a", "b")}
    assert by_step["loss"] == [(step, 1.0 / (step + 1)) for step in range(80)]
    assert by_step["unstepped"] == [(0, float(step)) for step in range(80)]
    assert by_step["a"] == sorted((1000 - step, float(step)) for step in range(0, 80, 10))
    assert by_step["b"] == sorted((1000 - step, float(-step)) for step in range(0, 80, 10))
    assert len(history["system/memory/process/rss_mib"]) >= 10


# -- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_thirty_seconds_at_the_default_cadence(mlflow_server, train):
    """Each default chart has at least 28 points after 30 s, each within 0.2 s of when its window really ended.

    The true time is the script's: it moves its memory at known times, and the charts show it in the window it was in.
    The run ends with tags and figures that name the peak, its phase and step, the limit, the room left, and the cost.
    """
    done = train(
        """
import memtrack, mlflow
memtrack.autolog()
with mlflow.start_run() as run:
    t0 = time.time()
    with memtrack.phase("load"):
        time.sleep(10.25)
    with memtrack.phase("train"):
        for step in range(100):
            memtrack.step(step)
            if step == 40:
                ballast = bytearray(300 << 20)
                ballast[::4096] = b"x" * len(ballast[::4096])
                grown = time.time()
                time.sleep(0.35)
            if step == 42:
                del ballast
                shrunk = time.time()
            time.sleep(0.195)
    t1 = time.time()
report(run_id=run.info.run_id, t0=t0, t1=t1, grown=grown, shrunk=shrunk)
""",
        mlflow_server,
    )
    result = done.result
    series = check_run(mlflow_server, result["run_id"], done.recording, result["t0"], result["t1"], slack_s=0.6)
    measured = {name for row in rows(done.recording) for name in row.cells}
    expected = {name for name in default_series() if name in measured or name.replace("_peak_", "_") in measured}
    assert expected >= default_series() - {metrics.HOST_PRESSURE}
    assert set(series) == expected
    for name, found in series.items():
        assert len(found) >= 28, name
        stamps = [stamp / 1000 for stamp, *_ in found]
        # what is dear to measure, such as PSS, comes with the second window
        assert result["t0"] <= stamps[0] <= result["t0"] + (1.2 if name == metrics.RSS else 2.2)
        assert result["t1"] - 0.2 <= stamps[-1] <= result["t1"] + 0.2
        assert all(0 < later - earlier < 1.4 for earlier, later in itertools.pairwise(stamps)), name

    # the 300 MiB stood from `grown` to `shrunk`: in the windows that overlap that time, and in no other
    peaks = series[metrics.peak_name(metrics.RSS)]
    high = [stamp / 1000 for stamp, _, value in peaks if value > max(v for *_, v in peaks) - 100]
    assert result["grown"] - 0.2 <= high[0] <= result["grown"] + 1.2
    assert result["shrunk"] - 0.2 <= high[-1] <= result["shrunk"] + 1.2
    for stamp, _, value in peaks:
        if stamp / 1000 < result["grown"] - 0.2 or stamp / 1000 > result["shrunk"] + 1.2:
            assert value < max(v for *_, v in peaks) - 100

    run = mlflow_server.client().get_run(result["run_id"])
    tags = {key.removeprefix("memtrack."): value for key, value in run.data.tags.items() if "memtrack." in key}
    figures = {key.removeprefix(SUMMARY): value for key, value in run.data.metrics.items() if key.startswith(SUMMARY)}
    assert tags["peak_phase"] == "train"
    assert tags["peak_step"] in ("40", "41")
    assert tags["peak"].endswith((" MiB (exact)", " MiB (sampled)"))
    assert tags["limit"].split()[1] == "MiB"
    assert tags["headroom_min"].endswith(" %")
    assert tags["cost"].startswith("agent ")
    assert int(tags["windows"]) >= 28
    assert tags["dropped"] == "0"
    assert figures["peak_rss_mib"] == max(value for *_, value in peaks)
    assert figures["peak_step"] in (40, 41)
    assert figures["limit_mib"] == series[metrics.CONTAINER_LIMIT][0][2]
    assert 0 < figures["headroom_min_pct"] <= 100
    assert figures["agent_rss_mib"] <= 16
    assert figures["agent_cpu_pct"] <= 2
