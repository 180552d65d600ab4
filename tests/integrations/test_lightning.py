"""Lightning, as either package, with memtrack's callback by hand and by autolog alone: real trainings, logged to a real
MLflow server, to W&B offline and to files."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from memtrack import metrics
from memtrack.recording.reader import RecordingReader
from memtrack.training import STEP_PEAK
from tests.integrations import wandb_lab
from tests.integrations.lightning_lab import FAST, GROUPS, LAB, logged, need, peaks, phases, spikes, without_ours
from tests.integrations.mlflow_lab import check_run, points, rows, scripts
from tests.integrations.wandb_lab import in_folder, read_run

PLAN = "sanity_1=120, train_5=300, validation_1=150, save_1=200, test_1=250, predict_1=180"

HEIGHTS = {
    ("sanity check", -1, -1): 120,
    ("train", 2, 0): 300,
    ("validation", 3, 0): 150,
    ("checkpoint", 3, 0): 200,
    ("test", 7, -1): 250,
    ("predict", 7, -1): 180,
}
"""What PLAN holds, in MiB: (phase, step, epoch) of it."""

WAYS = {
    "by hand": f"""
from memtrack_lightning import MemoryCallback
mine = [MemoryCallback({FAST})]
""",
    "by autolog": f"""
import memtrack
memtrack.autolog({FAST})
mine = []
""",
}

# 4 steps an epoch, each of 2 batches, and a row every second step; at an epoch's end validation and a checkpoint
TRAINING = """
SETTINGS = {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "enable_checkpointing": True}
plain = Net()
plain_trainer = trainer(logger=loggers.CSVLogger("plain"), **SETTINGS)
plain_trainer.fit(plain, data(8), data(2))
report(plain=plain.losses, plain_table=table(plain_trainer.logger), uninvited=len(ours(plain_trainer)))
WAY
net = Net(PLAN)
mlflow = loggers.MLFlowLogger(os.environ["EXPERIMENT"], tracking_uri=os.environ["STORE"])
t = trainer(*mine, logger=[loggers.CSVLogger("ours"), mlflow], **SETTINGS)
t.fit(net, data(8), data(2))
report(losses=net.losses, table=table(t.logger), run_id=mlflow.run_id, fit_time=net.times)
report(ours=len(ours(t)), wrapped="save_checkpoint" in vars(t), progress=sorted(t.progress_bar_metrics))
t.test(net, data(1))
report(test_time=net.times)
t.predict(net, data(1))
report(loaded=[name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules])
"""


@pytest.fixture(scope="module", params=[(package, way) for package in GROUPS for way in WAYS], ids=" ".join)
def trained(request, _server, tmp_path_factory):
    """A process that trains without memtrack, then with it, then tests and predicts; logged to a file and to MLflow."""
    package, way = request.param
    pytest.importorskip("mlflow")
    need(package)
    _server.start()
    source = LAB + TRAINING.replace("WAY", WAYS[way]).replace("PLAN", PLAN)
    with scripts(tmp_path_factory.mktemp("lightning")) as train:
        # not by MLFLOW_TRACKING_URI: the logger alone knows where its run is
        done = train(source, PACKAGE=package, STORE=_server.uri, EXPERIMENT=f"{package} {way}")
        yield package, _server, done, done.result


def test_steps_epochs_and_phases_are_marked(trained):
    """What is held in a known batch stands at the step, epoch and phase that it is of, within 10 %."""
    _, _, done, _ = trained
    found = spikes(done.recording)
    assert set(found) == set(HEIGHTS)
    for where, mib in HEIGHTS.items():
        assert found[where] == pytest.approx(mib, rel=0.1)
    entered = phases(done.recording)
    epoch = ["train", "validation", "train", "checkpoint"]
    assert entered in (
        ["sanity check", *epoch, *epoch, "train", "test", "predict"],
        # a checkpoint may be saved while validation still counts, and after the last epoch nothing more happens
        ["sanity check", *epoch, *epoch, "test", "predict"],
    )
    # Lightning itself says whose callbacks it adds, some versions also that there are none
    assert not [line for line in done.stderr.splitlines() if "memtrack" in line and not line.startswith("Adding ")]


def test_the_rows_have_the_peaks_and_are_otherwise_as_without(trained):
    """Each row of a training step has the peak since the one before, no other row has one, all else is equal."""
    *_, result = trained
    assert result["losses"] == result["plain"]
    found = logged(result["table"])
    assert without_ours(found) == logged(result["plain_table"])
    peak = peaks(found)
    assert list(peak) == [1, 3, 5, 7]
    assert peak[3] - peak[1] == pytest.approx(300, rel=0.1)
    assert peak[5] - peak[7] == pytest.approx(200, rel=0.1)  # validation, and the checkpoint
    assert abs(peak[7] - peak[1]) < 30
    assert len(result["progress"]) == len([name for name in result["progress"] if "memory" not in name])


def test_mlflow_has_loss_and_peak_in_the_same_row_and_the_charts(trained):
    """The run of an MLFlowLogger, which the fluent API knows nothing of: each point once, at Lightning's own steps."""
    _, server, done, result = trained
    run_id, found = result["run_id"], logged(result["table"])
    history = server.history(run_id)
    for key in ("loss", STEP_PEAK):
        wanted = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in found if key in row]
        assert [(step, value) for _, step, value in history[key]] == wanted
    assert [stamp for stamp, *_ in history["loss"]] == [stamp for stamp, *_ in history[STEP_PEAK]]
    series = check_run(server, run_id, done.recording, *result["fit_time"], outer_s=60)
    tested = points(rows(done.recording, result["test_time"][0] + 0.15, result["test_time"][1] - 0.15))
    assert set(tested[metrics.RSS]) <= {(stamp, value) for stamp, _, value in series[metrics.RSS]}
    run = server.client().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["memtrack.peak"].endswith(")")


def test_the_callback_is_there_once_and_leaves_nothing_behind(trained):
    """Not before memtrack is asked for; then once; and neither a changed Trainer nor the other package are left."""
    package, *_, result = trained
    assert (result["uninvited"], result["ours"], result["wrapped"]) == (0, 1, False)
    assert result["loaded"] == [package]


# -- W&B, and both together -----------------------------------------------------------------------------------------

TOGETHER = f"""
import memtrack, wandb
memtrack.autolog({FAST})
from memtrack_lightning import MemoryCallback
mine = MemoryCallback()
# Lightning adds what autolog has for it to this very list
callbacks = [mine]
for name in ("one", "two"):
    logger = loggers.WandbLogger(name=name)
    t = trainer(logger=logger, callbacks=callbacks)
    net = Net(train_3=300)
    t.fit(net, data(4))
    report(**{{name: logger.experiment.id, name + "_time": net.times}})
    wandb.finish()
report(callbacks=len(callbacks), active=[one._on for one in callbacks])

error = ValueError("the loss is NaN")
logger = loggers.WandbLogger(name="three")
t = trainer(logger=logger, enable_checkpointing=True)
try:
    t.fit(Net(train_3=error), data(4))
except ValueError as caught:
    assert caught is error and caught.__cause__ is None and caught.__context__ is None
report(wrapped="save_checkpoint" in vars(t), three=logger.experiment.id)
with memtrack.phase("after"):
    hold(200)
wandb.finish()
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A process with autolog and a callback of the user's: two trainings logged to W&B, and one that fails."""
    pytest.importorskip("wandb")
    package = "lightning.pytorch"
    need(package)
    folder = tmp_path_factory.mktemp("lightning-wandb")
    with scripts(folder) as train:
        done = in_folder(train, folder)(LAB + TOGETHER, PACKAGE=package)
        result = done.result
        yield done, result, {name: read_run(folder, result[name]) for name in ("one", "two", "three")}


def test_wandb_has_loss_and_peak_in_the_same_row(together):
    """Every row that has a loss has a peak, also in the second training of a process, each step once; and charts."""
    done, result, runs = together
    for name in ("one", "two"):
        found = [row for _, row in runs[name].history if "loss" in row]
        assert [row["trainer/global_step"] for row in found] == list(range(8))
        height = [row[STEP_PEAK] for row in found]
        assert height[2] - height[1] == pytest.approx(300, rel=0.1)
        assert max(abs(one - height[1]) for at, one in enumerate(height) if at != 2) < 30
        assert sum(STEP_PEAK in row for _, row in runs[name].history) == 8
        wandb_lab.check_run(runs[name], done.recording, *result[f"{name}_time"], outer_s=60)


def test_a_callback_of_the_users_wins(together):
    """The one that the program has added works, those of autolog beside it do not: phases and steps come once."""
    done, result, _ = together
    assert result["callbacks"] > 1
    assert phases(done.recording) == ["train", "train", "train", "after"]
    # from the first training on: before it, the process has not yet what it stands at afterwards
    since = result["one_time"][0]
    assert set(spikes(done.recording, since)) == {("train", 2, 0), ("after", 2, -1)}


def test_a_training_that_fails_leaves_its_phases(together):
    """The exception passes unchanged, what comes then is not part of the training, and the Trainer is as it was."""
    _, result, runs = together
    assert not result["wrapped"]
    assert [row["trainer/global_step"] for _, row in runs["three"].history if "loss" in row] == [0, 1]


# -- what else trainers do ------------------------------------------------------------------------------------------

ALONE = f"""
import copy, pickle
import memtrack_lightning
from memtrack.errors import SettingsError
try:
    memtrack_lightning.MemoryCallback(interval="soon")
except SettingsError as exc:
    report(refused=str(exc))

mine = memtrack_lightning.MemoryCallback({FAST})
# not in a list
t = trainer(callbacks=mine)
for phase in ("validate", "test", "predict"):
    getattr(t, phase)(Net(), data(1))
net = Net(train_1=KeyboardInterrupt())
try:
    t.fit(net, data(2))
except (KeyboardInterrupt, SystemExit):
    pass  # swallowed by some versions
t = trainer(mine, enable_checkpointing=True, max_epochs=1)
t.fit(Net(), data(4))
report(logged=sorted(t.callback_metrics))
t.save_checkpoint("last.ckpt")

# goes on where the other has stopped, and is stopped in a step without a row, so that it gets one
class Stop(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 8
for name, callbacks in (("before", [Stop(), mine]), ("after", [mine, Stop()])):
    t = trainer(logger=loggers.CSVLogger(name), max_epochs=3, log_every_n_steps=3, callbacks=callbacks)
    t.fit(Net(train_2=200), data(4), ckpt_path="last.ckpt")
    report(**{{f"stopped_{{name}}": table(t.logger)}})

copies = [pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)]
report(copies=[[type(one) is type(mine), one._settings, one._on] for one in copies])
import memtrack
t = trainer(logger=loggers.CSVLogger("automatic"))
report(automatic=len(ours(t)))
memtrack.autolog(disable=True)
t.fit(Net(), data(1))
report(taken_back=table(t.logger), after=len(ours(trainer())))

both = []
for package in (lightning, importlib.import_module(os.environ["OTHER"])) if "OTHER" in os.environ else ():
    mine = memtrack_lightning.MemoryCallback()
    t = package.Trainer(callbacks=mine, logger=False, enable_checkpointing=False, accelerator="cpu")
    both.append([mine in t.callbacks, isinstance(mine, package.Callback), type(copy.copy(mine)) is type(mine)])
report(both=both)
"""


@pytest.fixture(scope="module", params=GROUPS)
def alone(request, tmp_path_factory):
    """A process without any tracker, with a callback that is given to one Trainer after the other."""
    need(request.param)
    (other,) = set(GROUPS) - {request.param}
    more = {"OTHER": other} if find_spec(other.partition(".")[0]) is not None else {}
    with scripts(tmp_path_factory.mktemp("lightning-alone")) as train:
        done = train(LAB + ALONE, PACKAGE=request.param, **more)
        yield done, done.result


def test_phases_without_training_and_without_logger(alone):
    """``validate``, ``test`` and ``predict`` are phases of their own; without a logger no row is made."""
    done, result = alone
    assert phases(done.recording)[:5] == ["validation", "test", "predict", "train", "train"]
    assert result["logged"] == ["loss"]
    assert result["refused"].startswith("interval='soon'")


def test_steps_go_on_where_a_checkpoint_has_stopped(alone):
    """Rows of a training that goes on have the loggers' numbers; the one at an early stop has a peak of its own, also
    where it is decided on after the callback has been asked."""
    done, result = alone
    before, after = logged(result["stopped_before"]), logged(result["stopped_after"])
    assert [row["step"] for row in before if "loss" in row] == [5, 7]
    assert without_ours(before) == without_ours(after)
    for found in (peaks(before), peaks(after)):
        assert list(found) == [5, 7]
        assert found[5] - found[7] == pytest.approx(200, rel=0.1)
    assert set(spikes(done.recording)) == {("train", 5, 1)}


def test_what_goes_to_another_process_is_as_new(alone):
    """Strategies that spawn pickle the callbacks, also such as have worked before."""
    _, result = alone
    assert result["copies"] == [[True, {"interval": 0.1, "flush_interval": 0.2}, False]] * 2


def test_autolog_is_taken_back(alone):
    """The callback of a Trainer that is there already does nothing from then on, others get none."""
    _, result = alone
    assert result["automatic"] == 1
    assert STEP_PEAK not in result["taken_back"]
    assert result["after"] == 0


def test_a_program_that_has_imported_both_packages(alone):
    """One object is a callback of either, and stays one in another process."""
    _, result = alone
    for package in GROUPS:
        need(package)
    assert result["both"] == [[True, True, True]] * 2


def test_a_trainer_without_autolog_loads_nothing(train):
    """Lightning asks for callbacks in every Trainer of everybody: who has not called autolog has no cost of it."""
    source = """
import memtrack_lightning
found = memtrack_lightning.callbacks() + memtrack_lightning.pl_callbacks()
report(found=found, loaded=[name for name in ("torch", "memtrack.training", "logging") if name in sys.modules])
"""
    assert train(source).result == {"found": [], "loaded": []}


# -- MLflow's fluent API beside MLFlowLogger ------------------------------------------------------------------------

FLUENT = f"""
import memtrack, mlflow
memtrack.autolog({FAST})
mlflow.set_experiment("lightning fluent")
STORE = {{"experiment_name": "lightning fluent", "tracking_uri": os.environ["MLFLOW_TRACKING_URI"]}}
with mlflow.start_run() as run:
    logger = loggers.MLFlowLogger(run_id=run.info.run_id, **STORE)
    trainer(logger=logger).fit(Net(train_2=200), data(4))
    report(active=run.info.run_id)

logger = loggers.MLFlowLogger(**STORE)
try:
    trainer(logger=logger).fit(Net(train_2=200, train_3=ValueError()), data(4))
except ValueError:
    report(failed=logger.run_id)

memtrack.autolog(disable=True)
memtrack.autolog(trackers=["wandb"] if WANDB else [], {FAST})
logger = loggers.MLFlowLogger(**STORE)
trainer(logger=logger).fit(Net(train_2=200), data(4))
report(unfollowed=logger.run_id)
"""


def test_no_run_is_fed_twice_or_unasked(mlflow_server, train):
    """An MLFlowLogger of the active run, one whose training fails, and one though MLflow shall not be followed."""
    need("lightning.pytorch")
    done = train(LAB + FLUENT.replace("WANDB", "False"), mlflow_server, PACKAGE="lightning.pytorch")
    result = done.result
    fed = []
    for recording in done.recordings:
        with RecordingReader(str(recording)) as reader:
            fed += [feed.key for feed in reader.feeds()]
    assert sorted(fed) == sorted(f"mlflow:{result[name]}"[:40] for name in ("active", "failed"))
    statuses = {name: mlflow_server.client().get_run(result[name]).info.status for name in result}
    assert statuses == {"active": "FINISHED", "failed": "FAILED", "unfollowed": "FINISHED"}
    for name in result:
        history = mlflow_server.history(result[name])
        assert [step for _, step, _ in history[STEP_PEAK]] == [step for _, step, _ in history["loss"]]
        assert (f"system/{metrics.RSS}" in history) == (name != "unfollowed")
        assert ("memtrack.peak" in mlflow_server.client().get_run(result[name]).data.tags) == (name != "unfollowed")


# -- two processes --------------------------------------------------------------------------------------------------

DDP = f"""
import memtrack
memtrack.autolog({FAST})
rank = int(os.environ.get("LOCAL_RANK", 0))
t = trainer(strategy="ddp", devices=2, logger=loggers.CSVLogger("ddp"), max_epochs=1, use_distributed_sampler=False)
t.fit(Net(**({{"train_3": 300}} if rank else {{}})), data(4))
report(**{{f"rank{{rank}}": [os.getpid(), t.global_rank, t.world_size, t.global_step]}})
if rank == 0:
    report(table=table(t.logger))
"""


def test_ddp_with_two_processes(train):
    """Each rank has a recording with its own memory, steps and phases; rows are those of rank 0, once a step."""
    need("lightning.pytorch")
    done = train(LAB + DDP, PACKAGE="lightning.pytorch")
    result = done.result
    assert [result[f"rank{rank}"][1:] for rank in (0, 1)] == [[0, 2, 4], [1, 2, 4]]
    found = logged(result["table"])
    peak = peaks(found)
    assert list(peak) == [0, 1, 2, 3]
    assert len(found) == 4
    assert max(peak.values()) - min(peak.values()) < 100
    own = {recording.stem.split("-")[2]: spikes(recording) for recording in done.recordings}
    assert len(own) == 2
    assert own[str(result["rank0"][0])] == {}
    assert set(own[str(result["rank1"][0])]) == {("train", 2, 0)}
    assert all(phases(recording)[-1] == "train" for recording in done.recordings)
