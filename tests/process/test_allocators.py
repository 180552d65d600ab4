"""Allocators in real processes: nothing is initialised by memtrack, and what happens on a device is in the recording.

CUDA is a build of torch that stands in (``tests/cuda_lab.py``); JAX and TensorFlow are real, on CPUs.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import pytest

from memtrack.recording.reader import RecordingReader
from tests.cuda_lab import BUILD, ROOT, driver

__all__ = ["driver"]


@pytest.fixture
def run(run_child, tmp_path):
    """Runs a program to its end; what it has printed, as JSON, line by line."""

    def run(code, **environment):
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "integrations"),
            "MEMTRACK_DIR": str(tmp_path),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **environment,
        }
        child = run_child(
            f"import json, os\ndef say(*what):\n    print(json.dumps(what), flush=True)\n{code}", flags=(), env=env
        )
        out, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        return [json.loads(line) for line in out.splitlines() if line.startswith("[")]

    return run


# A loop as a callback sees it, before anything touches the device; then a fork; then the device is used.
TRAINING = (
    BUILD
    + """
import time
import memtrack
from memtrack.sinks.jsonl import JsonLinesSink
from memtrack.training import Training
import torch

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except RuntimeError as error:
            print(error, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

monitor = memtrack.autolog(trackers=[], interval=0.2)
sink = monitor.attach(JsonLinesSink(path=os.environ["CHARTS"]))
training = Training()
training.begin()
training.enter("train")
rows = []
for step in range(3):
    training.step(step)
    rows.append(sorted(training.row()))
monitor.flush()
print(monitor.summary())
if "TOUCH" in os.environ:
    torch.cuda.is_available()
say("before", rows, os.path.exists(f"{os.environ['LIBRARY']}.calls"), torch.cuda.is_initialized())
say("child", fork(lambda: cuda.take(64)))
if "TOUCH" in os.environ:
    sys.exit()

time.sleep(1.1)  # whether an allocator is in use is looked for once a second
for step in range(3, 9):
    training.step(step)
    if step == 3:
        cuda.take(300)
        cuda.take(100)
        cuda.give(100)
    elif step == 5:
        try:
            cuda.take(2000)
        except torch.cuda.OutOfMemoryError:
            pass
    elif step == 7:
        torch.cuda.reset_peak_memory_stats()
    rows.append(training.row())
    time.sleep(0.1)
time.sleep(1.1)  # once a second gauges are sampled
training.end()
sink.detach()
say("rows", *rows[3:])
say("path", monitor.path)
"""
)

SCOPE = "memory/torch_cuda0/"


def test_cuda(run, driver, tmp_path):
    """No call of memtrack's reaches the driver in a process that has not used it, so its children can; then the figures
    are in the user's rows, in the recording and in the charts, and what has happened are events with step and phase."""
    charts = tmp_path / "charts.jsonl"
    lines = run(TRAINING, CHARTS=str(charts), LIBRARY=str(driver.path), **driver.environment)
    before, child, (_, *rows), (_, path) = lines
    assert before == ["before", [["memory/step/rss_peak_mib"]] * 3, False, False]
    assert child == ["child", 0]

    told = [{name.removeprefix(SCOPE): value for name, value in row.items()} for row in rows]
    for row in told:
        assert row.pop("memory/step/rss_peak_mib") > 50.0
    charted = {"allocated_mib": 300.0, "allocated_peak_mib": 400.0, "reserved_mib": 400.0}
    assert told[:4] == [charted] * 4
    assert told[4:] == [{**charted, "allocated_peak_mib": 300.0, "peak_resets": 1.0}] * 2

    with RecordingReader(path) as reader:
        marks = [(event.text, event.value, event.step) for event in reader.events() if event.kind == "mark"]
        last = {name.removeprefix(SCOPE): cell.last for name, cell in list(reader.windows())[-1].cells.items()}
    assert marks == [
        ("out of memory on cuda0: 300 MiB allocated, 400 reserved", 1.0, 5),
        ("peak of torch_cuda0 was reset, MiB before", 400.0, 7),
    ]
    expected = {**told[-1], "slack_pct": 25.0, "inactive_split_mib": 100.0, "unusable_pct": 25.0}
    expected |= {"alloc_retries": 1.0, "ooms": 1.0}
    assert {name: last[name] for name in expected} == expected

    names = {json.loads(line).get("name", "") for line in charts.read_text().splitlines()}
    assert {name.removeprefix(SCOPE) for name in names if name.startswith(SCOPE)} == set(told[-1])


def test_the_stand_in_is_poisoned_by_a_touch(run, driver, tmp_path):
    """What memtrack must not do, done by hand: the driver is called, and a child can use it no more."""
    before, child = run(TRAINING, TOUCH="1", CHARTS=str(tmp_path / "c"), LIBRARY=str(driver.path), **driver.environment)
    assert before[2:] == [True, False]
    assert child == ["child", 1]


@pytest.mark.skipif(find_spec("jax") is None, reason="needs jax")
def test_jax(run):
    """Loaded, it is left as it is; on CPUs it has no figures."""
    ((_, *found),) = run("""
from memtrack.allocators import shared
import jax
from jax._src import xla_bridge
first = shared.read()
made = sorted(xla_bridge._backends)
jax.numpy.ones(1000).block_until_ready()
stats = [device.memory_stats() for device in jax.devices()]
say("jax", first, made, sorted(xla_bridge._backends), stats, shared.read())
""")
    assert found == [{}, [], ["cpu"], [None], {}]


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs tensorflow")
def test_tensorflow(run):
    """Loaded, it is left as it is; on CPUs it reports zeros, which are no figures."""
    ((_, *found),) = run("""
from memtrack.allocators import figures, shared
import tensorflow
from tensorflow.python.eager import context
first = shared.read()
made = context._context is not None and context._context._initialized
tensorflow.ones(1000)
info = tensorflow.config.experimental.get_memory_info("CPU:0")
say("tensorflow", first, made, context._context._initialized, info, figures.of_tensorflow(info), shared.read())
""")
    assert found == [{}, False, True, {"current": 0, "peak": 0}, {}, {}]
