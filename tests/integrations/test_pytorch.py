"""memtrack in plain PyTorch loops, by hand and by autolog alone: real trainings, logged to a real MLflow server and to
W&B offline, with real DataLoader workers, one of which is really killed."""

from __future__ import annotations

import re
import time

import pytest

from memtrack import metrics
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from memtrack.training import STEP_PEAK
from tests.cgroup_lab import make_group
from tests.cuda_lab import BUILD, build_driver
from tests.integrations.mlflow_lab import rows, scripts
from tests.integrations.wandb_lab import in_folder, read_run

pytest.importorskip("torch", reason="PyTorch is not installed")

__all__ = ["make_group"]

LOOP = """
import numpy, torch
from torch.utils.data import DataLoader, TensorDataset

def hold(mib):
    block = numpy.ones(mib << 17)
    time.sleep(0.3)
    return block[0]

torch.manual_seed(1)
DATA = TensorDataset(torch.randn(32, 4), torch.arange(32) % 2)

def model():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    return net, torch.optim.SGD(net.parameters(), 0.1)

def train(batches, optimizer, net, log=lambda loss: None, plan={}):
    losses = []
    for number, (x, y) in enumerate(batches):
        hold(plan[number]) if number in plan else None
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        log(losses[-1])
    return losses
"""


def spikes(recording, since=0.0, until=float("inf")):
    """``(phase, step, epoch) -> MiB`` of what stood out by 100 MiB or more in a time: its height over the lowest in
    the seconds before, which filling memory takes on a busy machine."""
    with RecordingReader(str(recording)) as reader:
        names = reader.names()
    # the last window may be of a process that has no memory any more
    cells = [row.cells[metrics.RSS] for row in rows(recording, since, until) if metrics.RSS in row.cells]
    found: dict[tuple[str, int, int], float] = {}
    for number, cell in enumerate(cells):
        height = cell.max - min(other.min for other in cells[max(number - 25, 0) : number + 1])
        if height > 100:
            key = (names[cell.phase], cell.step, cell.epoch)
            found[key] = max(found.get(key, 0.0), height)
    return found


# -- autolog --------------------------------------------------------------------------------------------------------

AUTOLOG = (
    BUILD
    + """
import memtrack, mlflow, sys
"""
    + LOOP
    + """
hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
from memtrack.monitor import active
from memtrack.training import step_reached

net, optimizer = model()
report(plain=train(DataLoader(DATA, 4), optimizer, net))

report(path=memtrack.autolog(interval=0.1, flush_interval=0.2).path, hooks=len(hooks))
net, optimizer = model()
_, other = model()
seen = []

def log(loss):
    other.step()
    other.step()
    seen.append(step_reached())
    mlflow.log_metric("loss", loss, step=len(seen) - 1)

with mlflow.start_run() as run:
    losses = train(DataLoader(DATA, 4), optimizer, net, log, {5: 300})
report(run=run.info.run_id, losses=losses, seen=seen)

# once an optimizer is gone the next one counts
del optimizer
other.step()
report(after=step_reached())

# the program marks a step itself: from now on only it does
memtrack.step(100)
train(DataLoader(DATA, 4), *model()[::-1])
report(own=step_reached())

report(touched=os.path.exists(os.environ["LIBRARY"] + ".calls"))
pid = os.fork()
if pid == 0:
    try:
        cuda.take(10)
        other.step()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
report(child=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

memtrack.autolog(disable=True)
report(left=len(hooks))
"""
)


@pytest.fixture(scope="module")
def by_autolog(_server, tmp_path_factory):
    """A program that only says ``memtrack.autolog()``, with a torch that is built for CUDA, as it were."""
    pytest.importorskip("mlflow")
    driver = build_driver(tmp_path_factory.mktemp("driver"))
    _server.start()
    with scripts(tmp_path_factory.mktemp("pytorch")) as train:
        done = train(AUTOLOG, _server, MLFLOW_EXPERIMENT_NAME="pytorch", LIBRARY=str(driver.path), **driver.environment)
        yield done, done.result, _server.history(done.result["run"])


def test_autolog_marks_the_steps_of_the_first_optimizer(by_autolog):
    """Up to the optimizer's step 6 it is step 5, counted from 0: there the memory is. Another optimizer counts none."""
    done, result, _ = by_autolog
    assert result["seen"] == list(range(1, 9))
    found = spikes(result["path"])
    assert {step for _, step, _ in found} == {5}
    assert max(found.values()) == pytest.approx(300, rel=0.1)
    assert "Training goes on" not in done.stderr


def test_autolog_changes_nothing_else(by_autolog):
    """The loss is bit for bit as without, each point is in MLflow once, and the run has its charts."""
    _, result, history = by_autolog
    assert result["losses"] == result["plain"]
    assert [(step, value) for _, step, value in history["loss"]] == list(enumerate(result["plain"]))
    assert f"system/{metrics.RSS}" in history


def test_autolog_stands_aside(by_autolog):
    """An optimizer that has gone is followed by another; where the program marks steps, no other are; taken back, no
    hook is left."""
    _, result, _ = by_autolog
    assert result["after"] == 9
    assert result["own"] == 100
    assert (result["hooks"], result["left"]) == (1, 0)


def test_autolog_touches_no_device(by_autolog):
    """No call reaches CUDA's driver while MLflow's run is followed, so that a forked child can use the device."""
    _, result, _ = by_autolog
    assert result["touched"] is False
    assert result["child"] == 0


# -- by hand --------------------------------------------------------------------------------------------------------

BY_HAND = f"""
{LOOP}
import wandb
from memtrack.training import step_reached
from memtrack_pytorch import watch

def names():
    with open(f"/proc/self/task/{{os.getpid()}}/children") as file:
        found = [open(f"/proc/{{pid}}/comm").read().strip() for pid in file.read().split()]
    return [name for name in found if "worker" in name or "Loader" in name]

def seed(worker):
    print("WORKER", worker, flush=True)

def loader():
    return DataLoader(DATA, 4, num_workers=2, worker_init_fn=seed)

net, optimizer = model()
plain = [train(loader(), optimizer, net) for _ in range(2)]
report(plain=plain)

net, optimizer = model()
batches = watch(loader(), interval=0.1, flush_interval=0.2)
checks = watch(DataLoader(DATA, 16), phase="validation")
seen, losses = [], []
report(before=batches.row())
t0 = time.time()
run = wandb.init(project="p")
def put(loss):
    seen.append((batches.step, batches.epoch, step_reached()))
    run.log({{"loss": loss, **batches.row()}}, step=batches.step)
for epoch in range(2):
    losses.append(train(batches, optimizer, net, put, {{3: 300}} if epoch else {{}}))
    for number, (x, _) in enumerate(checks):
        hold(200) if epoch == 0 and number == 1 else None
run.finish()
from memtrack.monitor import active
report(run=run.id, seen=seen, losses=losses, path=active.monitor.path, time=[t0, time.time()])

for _ in batches:
    report(called=names())
    break
hold(250)
report(kept=batches.loader.worker_init_fn is seed, length=len(batches), resumed=[batches.step, batches.epoch])
for _ in watch([1, 2], epoch=7, step=500):
    pass
report(last=step_reached())
"""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A loop with two workers that iterates over ``watch(loader)`` and logs ``row()`` to W&B."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("pytorch")
    with scripts(folder) as train:
        done = in_folder(train, folder)(BY_HAND)
        yield done, done.result, read_run(folder, done.result["run"])


def test_steps_go_on_over_epochs(by_hand):
    """Each batch is a step, marked before it is used; batches of a validation are none."""
    done, result, _ = by_hand
    assert result["seen"] == [[step, step // 8, step] for step in range(16)]
    assert result["resumed"] == [16, 2]
    assert result["last"] == 501
    assert result["length"] == 8
    assert "Training goes on" not in done.stderr


def test_memory_is_of_its_step_and_phase(by_hand):
    """What is held in a batch is of that step and epoch; after a break the phase has ended."""
    _, result, _ = by_hand
    found = spikes(result["path"], *result["time"])
    assert set(found) == {("train", 11, 1), ("validation", 7, 0)}
    assert found["train", 11, 1] == pytest.approx(300, rel=0.1)
    assert found["validation", 7, 0] == pytest.approx(200, rel=0.1)
    # while the run was being finished nothing was held: the first window after that may be that of the spike
    late = spikes(result["path"], result["time"][1] - 0.3)
    assert {phase for phase, _, _ in late} == {""}


def test_wandb_has_loss_and_peak_in_the_same_row(by_hand):
    """At the program's own steps, with the loss that it has without memtrack."""
    _, result, run = by_hand
    assert result["losses"] == result["plain"]
    logged = [loss for epoch in result["plain"] for loss in epoch]
    assert [(step, row["loss"]) for step, row in run.history] == list(enumerate(logged))
    peaks = [row[STEP_PEAK] for _, row in run.history]
    assert peaks[11] - peaks[3] == pytest.approx(300, rel=0.1)
    assert peaks[8] - peaks[3] == pytest.approx(200, rel=0.1)  # the validation before
    assert max(abs(peak - peaks[3]) for at, peak in enumerate(peaks) if at not in (8, 11)) < 30
    assert all(set(row) == {"loss", STEP_PEAK} for _, row in run.history)
    assert result["before"] == {}


def test_workers_have_names(by_hand):
    """By their numbers; the program's own function for them is called as before, and stays where it was."""
    done, result, _ = by_hand
    assert sorted(result["called"]) == ["DataLoader 0", "DataLoader 1"]
    assert result["kept"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("WORKER")]
    assert sorted(lines) == [f"WORKER {worker}" for worker in (0, 1) for _ in range(5)]


# -- a worker dies --------------------------------------------------------------------------------------------------

LIMIT_MIB = 700

EATING = """
with open(os.environ["PROCS"], "w") as file:
    file.write(str(os.getpid()))
import numpy, torch
from torch.utils.data import DataLoader, Dataset
from memtrack_pytorch import watch

class Images(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, number):
        worker = torch.utils.data.get_worker_info().id
        if worker == 1 and number > 6:
            time.sleep(2.2)  # by then it is known by name
            held = []
            while True:
                held.append(numpy.ones(4 << 17))
                time.sleep(0.01)
        return torch.ones(2)

batches = watch(DataLoader(Images(), 2, num_workers=3), interval=0.1)
for _ in batches:
    pass
"""


def test_a_killed_worker_is_told_by_its_number(tmp_path, make_group):
    """torch raises in the training process; the event and the verdict say which of its workers it was."""
    group = make_group(LIMIT_MIB)
    with scripts(tmp_path) as train:
        done = train(EATING, check=False, PROCS=str(group.procs))
    assert done.returncode == 1
    assert group.kills() == 1
    pid = int(re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)\) (?:is killed|exited)", done.stderr)[1])  # type: ignore[index]
    with RecordingReader(str(done.recording)) as reader:
        deadline = time.monotonic() + 10
        while reader.head().state != layout.ENDED and time.monotonic() < deadline:
            time.sleep(0.01)
        (event,) = [event for event in reader.events() if event.kind == "oom_kill"]
        verdict = reader.verdict()
    assert event.text.startswith(f"DataLoader worker 1 ({pid}), last ")
    assert f"worker 1 ({pid}) was killed out of memory (confirmed)" in verdict.text
