"""Offline runs of W&B whose process is killed: what its file lost is delivered into another folder of the same run."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.integrations.kill_lab import await_delivery, kill_at, recording_of, sync
from tests.integrations.mlflow_lab import scripts
from tests.integrations.wandb_lab import SETTINGS, check_run, folders, in_folder, inspect, read_run

pytest.importorskip("wandb")

INTERVAL_S = 0.5

TRAINING = f"""
import memtrack, wandb
memtrack.autolog(interval={INTERVAL_S})
run = wandb.init(project="p", name="mine", group="g")
print("STARTED", run.id, time.time(), flush=True)
for step in range(1000):
    run.log({{"loss": 1 / (step + 1)}})
    time.sleep(0.1)
"""

KILLS = {"the agent delivers": (9.0, False), "the agent is killed, too; memtrack sync delivers": (28.0, True)}


def test_kill_of_an_offline_run(tmp_path, fault):
    """After 9 s, when W&B has saved nothing, and after 28 s, when it has saved the first half: after the kill the run
    has every window up to then, once, and the verdict, in a second folder which says that it goes on with the run."""
    with ExitStack() as stack:
        started = {}
        for number, name in enumerate(KILLS):
            folder = tmp_path / str(number)
            folder.mkdir()
            train = in_folder(stack.enter_context(scripts(folder)), folder)
            script = train(TRAINING, wait=False, MEMTRACK_SELECTIVE="0")
            run_id, since = script.wait_for("STARTED").split()
            started[name] = folder, script, run_id, float(since)
        for name, (after_s, with_agent) in KILLS.items():
            folder, script, run_id, since = started[name]
            died = kill_at(script, since + after_s, agent_too=with_agent)
            recording = recording_of(script)
            if with_agent:
                assert len(folders(folder, run_id)) == 1
                sync(recording, **SETTINGS)
            else:
                await_delivery(recording)
            check_killed(folder, run_id, recording, since, died, with_agent=with_agent)
            fault(f"kill -9 after {after_s:.0f} s of a training with an offline W&B run; {name}")


def check_killed(folder, run_id, recording, since, died, *, with_agent):
    """Assert what is in the two folders of a run."""
    first, second = (inspect(path) for path in folders(folder, run_id))
    saved = [record for record in first if record["type"] == "stats"]
    assert bool(saved) == with_agent, "W&B saves every 15 s"
    assert not [record for record in first if record["type"] == "exit"]
    head = next(record["run"] for record in second if record["type"] == "run")
    assert (head["run_id"], head["display_name"], head["run_group"]) == (run_id, "mine", "g")
    assert head["resume"] is True

    run = read_run(folder, run_id)
    series = check_run(run, recording, since, died, slack_s=INTERVAL_S, outer_s=1.0)
    for name, found in series.items():
        assert died - INTERVAL_S - 0.1 <= found[-1][0] / 1000 <= died + 0.5, name
    assert (
        len(series["proc.memory.rssMB/l:memtrack"]) >= (died - since) // INTERVAL_S - 1
    )  # the last may not have ended
    steps = [step for step, _ in run.history]
    assert steps == list(range(len(steps)))
    assert bool(steps) == with_agent
    assert run.summary["memtrack/verdict"] == ("unknown" if with_agent else "unknown SIGKILL")
    assert run.exit_codes == [1 if with_agent else 137]
