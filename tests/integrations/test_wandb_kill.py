"""Offline runs of W&B whose process is killed: what its file lost is delivered into another folder of the same run."""

from __future__ import annotations

import time

import pytest

from memtrack.recording.reader import RecordingReader
from tests.integrations.wandb_lab import check_run, folders, inspect, read_run

pytest.importorskip("wandb")
pytest.importorskip("wrapt")

KILLED = """
import memtrack, wandb
memtrack.autolog(interval=INTERVAL, flush_interval=0.2)
run = wandb.init(project="p", name="mine", group="g")
t0 = time.time()
report(run_id=run.id, t0=t0)
while time.time() < t0 + 3.5:
    run.log({"loss": time.time() - t0})
    time.sleep(0.1)
report(t1=time.time())
os.kill(os.getpid(), 9)
"""


def await_delivery(recording, timeout=60.0):
    """Wait until nothing of a recording is left to deliver."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with RecordingReader(str(recording)) as reader:
            feeds = reader.feeds()
        if feeds and all(feed.done for feed in feeds):
            return
        time.sleep(0.1)
    raise AssertionError(f"not delivered: {feeds}")


def test_kill_of_an_offline_run(wandb_train, tmp_path, fault):
    """Whether W&B has saved nothing yet or a part: after the kill the run has every window, once, and the verdict."""
    # by default it saves every 15 s or 32 KiB
    before = wandb_train(KILLED.replace("INTERVAL", "0.3"), wait=False)
    between = wandb_train(KILLED.replace("INTERVAL", "0.1"), wait=False, WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="1.3")
    saved = {}
    for name, script in (("nothing", before), ("a part", between)):
        done = script.finish(check=False)
        assert done.returncode == -9
        result = done.result
        recording = script_recording(done, result["run_id"])
        await_delivery(recording)
        first, second = folders(tmp_path, result["run_id"])
        saved[name] = len([record for record in inspect(first) if record["type"] == "stats"])
        run = read_run(tmp_path, result["run_id"])
        series = check_run(run, recording, result["t0"], result["t1"], slack_s=0.3, outer_s=0.5)
        last = max(timestamp for timestamp, _ in series["proc.memory.rssMB/l:memtrack"])
        assert last >= 1000 * (result["t1"] - 0.5)
        assert run.summary["memtrack/verdict"] == "unknown SIGKILL"
        assert run.exit_codes == [137]
        head = next(record["run"] for record in inspect(second) if record["type"] == "run")
        assert (head["run_id"], head["display_name"], head["run_group"]) == (result["run_id"], "mine", "g")
        assert head["resume"] is True
    assert saved["nothing"] == 0 < saved["a part"]
    fault("kill -9 of a training with an offline W&B run")


def script_recording(done, run_id):
    """The recording of a run among those that were made meanwhile."""
    for path in done.recordings:
        with RecordingReader(str(path)) as reader:
            if any(feed.target.get("id") == run_id for feed in reader.feeds()):
                return path
    raise AssertionError("no recording of this run")
