"""memtrack.autolog() with the real W&B, offline: whatever starts and ends a run, its windows are in the stream of
system metrics, and nothing of the user's moves."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.integrations.mlflow_lab import scripts
from tests.integrations.wandb_lab import check_run, in_folder, read_run

pytest.importorskip("wandb")

FAST = "interval=0.1, flush_interval=0.1"

TRAINING = """
    t0 = time.time()
    for step in range(8):
        memtrack.step(step)
        run.log({"loss": 1.0 / (step + 1)})
        time.sleep(0.08)
    report(run_id=run.id, t0=t0, t1=time.time())
"""

SCRIPTS = {
    "before wandb is imported, twice; left to the end of the interpreter": f"""
import memtrack
first = memtrack.autolog({FAST})
assert "wandb" not in sys.modules
import wandb
assert memtrack.autolog({FAST}) is first
run = wandb.init(project="p")
if True:
{TRAINING}
sys.exit(3)
""",
    "after init was imported by name; ended by an exception": f"""
import memtrack, wandb
from wandb import init
memtrack.autolog({FAST})
with init(project="p") as run:
{TRAINING}
    raise ValueError("the loss is NaN")
""",
    "after the start of a run that is not the global one; ended by finish": f"""
import memtrack, wandb
run = wandb.init(project="p", reinit="create_new")
assert wandb.run is None
first = memtrack.autolog({FAST})
assert memtrack.autolog({FAST}) is first
if True:
{TRAINING}
run.finish()
""",
}
CODES = dict(zip(SCRIPTS, (3, 1, 0), strict=True))


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """All the scripts, at the same time."""
    with ExitStack() as stack:
        started = {}
        for name, source in SCRIPTS.items():
            folder = tmp_path_factory.mktemp("wandb")
            train = in_folder(stack.enter_context(scripts(folder)), folder)
            started[name] = train(source, wait=False), folder
        yield {name: (script.finish(check=False), folder) for name, (script, folder) in started.items()}


@pytest.mark.parametrize("order", SCRIPTS)
def test_follows_a_run_whenever_autolog_is_called(order, trainings):
    """Whatever comes first and however the run ends: it has all its windows, once, and its figures."""
    done, root = trainings[order]
    assert done.returncode == CODES[order], done.stderr
    result = done.result
    run = read_run(root, result["run_id"])
    check_run(run, done.recording, result["t0"], result["t1"])
    assert run.history == [(step, {"loss": 1.0 / (step + 1)}) for step in range(8)]
    assert run.exit_codes == [CODES[order]]
    assert run.summary["memtrack/peak_rss_mib"] > 20
    assert "memtrack/verdict" not in run.summary
    assert "memtrack:" not in done.stderr
    assert "less telemetry" not in done.stderr


# -- what is the user's ---------------------------------------------------------------------------------------------

LOOPS = """
import wandb
def explicit(run):
    for step in range(0, 60, 3):
        run.log({"loss": float(step)}, step=step)
        time.sleep(0.02)
        run.log({"accuracy": step / 60}, step=step)
def implicit(run):
    for step in range(20):
        run.log({"loss": float(step)})
        time.sleep(0.02)
def in_parts(run):
    for step in range(20):
        run.log({"loss": float(step)}, commit=False)
        time.sleep(0.02)
        run.log({"accuracy": step / 20}, commit=False)
        time.sleep(0.02)
        run.log({"rate": 0.1})
for loop in (explicit, implicit, in_parts):
    with wandb.init(project="p") as run:
        loop(run)
        report(**{loop.__name__: [run.id, run.step]})
"""


def test_the_history_is_as_without_memtrack(wandb_train, tmp_path):
    """Explicit steps, implicit ones, rows in several parts: every point and every step is there."""
    with_memtrack = wandb_train(
        f"import memtrack\nmemtrack.autolog(interval=0.05, flush_interval=0.1)\n{LOOPS}", wait=False
    )
    alone = wandb_train(LOOPS, wait=False)
    fed, plain = with_memtrack.finish().result, alone.finish().result
    assert set(fed) == {"explicit", "implicit", "in_parts"}
    for loop in fed:
        (run_id, step), (plain_id, plain_step) = fed[loop], plain[loop]
        run, other = read_run(tmp_path, run_id), read_run(tmp_path, plain_id)
        assert run.history == other.history
        assert len(run.history) == 20
        assert step == plain_step
        own = {key: value for key, value in run.summary.items() if not key.startswith(("memtrack/", "_"))}
        assert own == {key: value for key, value in other.summary.items() if not key.startswith("_")}
        assert len(run.stats) >= 5
        assert not other.stats
        assert run.own_keys == other.own_keys


# -- which runs -----------------------------------------------------------------------------------------------------

GALLERY = f"""
import memtrack, wandb
from wandb.sdk.wandb_run import Run
originals = {{name: vars(Run)[name] for name in ("_on_start", "_finish")}}
init = wandb.init
memtrack.autolog({FAST})
assert all(vars(Run)[name] is not originals[name] for name in originals) and wandb.init is init

def spell(run, name):
    t0 = time.time()
    time.sleep(0.6)
    report(**{{name: [run.id, t0, time.time()]}})

first = wandb.init(project="p", reinit="create_new")
t0 = time.time()
second = wandb.init(project="p", reinit="create_new")
spell(second, "second")
second.finish()
time.sleep(0.3)
report(first=[first.id, t0, time.time()])
first.finish()

# as wandb.agent does with each trial
def trial():
    with wandb.init(project="p") as run:
        spell(run, "in a thread")
thread = threading.Thread(target=trial)
thread.start()
thread.join()

run = wandb.init(project="p")
spell(run, "replaced")
again = wandb.init(project="p", reinit="finish_previous")
spell(again, "in its place")
assert wandb.init(project="p") is again
pid = os.fork()
if pid == 0:
    # a child that goes on with its parent's run, and says so at its end
    time.sleep(0.2)
    os._exit(0 if memtrack.monitor.active.monitor is None else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
again.finish()

before = threading.active_count()
silent = wandb.init(mode="disabled")
silent.log({{"loss": 1}})
silent.finish()
assert threading.active_count() == before

parts = []
for _ in range(2):
    with wandb.init(project="p", id="twice", resume="allow"):
        t0 = time.time()
        time.sleep(0.5)
        parts.append([t0, time.time()])
    time.sleep(0.8)
report(parts=parts)

# taken back while a run goes on
run = wandb.init(project="p")
time.sleep(0.5)
memtrack.autolog(disable=True)
assert {{name: vars(Run)[name] for name in originals}} == originals and wandb.init is init
report(taken_back=[run.id, 0, time.time()])
time.sleep(0.3)
run.finish()
with wandb.init(project="p") as later:
    report(later=[later.id, 0, 0])
    time.sleep(0.3)
"""


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """One process that makes several runs: at once, in a thread, one that takes another's place, a disabled one."""
    folder = tmp_path_factory.mktemp("gallery")
    with scripts(folder) as train:
        done = in_folder(train, folder)(GALLERY)
        assert "memtrack:" not in done.stderr
        assert "less telemetry" not in done.stderr
        yield done, folder


@pytest.mark.parametrize("name", ["first", "second", "in a thread", "replaced", "in its place"])
def test_each_run_of_a_process_has_its_own_windows(name, gallery):
    """Side by side or one after the other, a run has the windows of its own time and its own figures."""
    done, root = gallery
    run_id, since, until = done.result[name]
    run = read_run(root, run_id)
    check_run(run, done.recording, since, until, outer_s=0.5)
    assert "memtrack/peak_rss_mib" in run.summary
    assert run.exit_codes == [0]


def test_a_run_that_is_gone_on_with_is_followed_again(gallery):
    """The same id twice in a process: the windows of both parts are in the run, those between are not."""
    done, root = gallery
    parts = done.result["parts"]
    run = read_run(root, "twice")
    times = [timestamp / 1000 for timestamp, _ in run.stats]
    for since, until in parts:
        assert sum(since <= at <= until for at in times) >= 2
    assert not [at for at in times if parts[0][1] + 0.3 < at < parts[1][0] - 0.3]


def test_taking_it_back(gallery):
    """The functions are the originals again; a run that goes on keeps what it has, and gets nothing more."""
    done, root = gallery
    run_id, _, until = done.result["taken_back"]
    run = read_run(root, run_id)
    assert len(run.stats) >= 2
    assert max(timestamp for timestamp, _ in run.stats) <= 1000 * until + 1
    assert "memtrack/peak_rss_mib" in run.summary
    assert not read_run(root, done.result["later"][0]).stats


WORKERS = f"""
import memtrack, multiprocessing, wandb
memtrack.autolog({FAST})
def train(how):
    # without W&B's own series, which have the label as well
    with wandb.init(project="p", settings=wandb.Settings(x_label=how, x_disable_stats=True)) as run:
        t0 = time.time()
        time.sleep(0.7)
        report(**{{how: [run.id, os.getpid(), t0, time.time()]}})
if __name__ == "__main__":
    with wandb.init(project="p") as run:
        t0 = time.time()
        workers = [multiprocessing.get_context(how).Process(target=train, args=[how]) for how in ("spawn", "fork")]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        report(parent=[run.id, os.getpid(), t0, time.time()])
    sys.exit(sum(worker.exitcode for worker in workers))
"""


def test_runs_of_worker_processes(wandb_train, tmp_path):
    """Workers of both kinds, and the process that has started them, each with a run of its own at the same time: each
    has its own process's windows, under the label that it writes with."""
    done = wandb_train(WORKERS)
    recordings = {int(path.stem.split("-")[2]): path for path in done.recordings}
    assert len(recordings) == len(done.result) == 3
    for name, (run_id, pid, since, until) in done.result.items():
        run = read_run(tmp_path, run_id)
        check_run(run, recordings[pid], since, until, outer_s=0.5, writer="" if name == "parent" else name)
        assert run.exit_codes == [0]
    assert "memtrack:" not in done.stderr
