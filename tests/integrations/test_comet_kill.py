"""Offline experiments of Comet whose process is killed: the archive is made, of what Comet had written and of the
recording."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from memtrack import metrics
from tests.integrations.comet_lab import QUIET, check_series, comet_offline, comet_scripts, is_complete, read_archive
from tests.integrations.kill_lab import await_delivery, kill_at, recording_of, sync

pytest.importorskip("comet_ml")

INTERVAL_S = 0.5

TRAINING = f"""
import memtrack, comet_ml
memtrack.autolog(interval={INTERVAL_S}, flush_interval=2)
begin = time.time()
exp = comet_ml.start(project_name="p", workspace="w")
print("STARTED", exp.get_key(), begin, time.time(), flush=True)
for step in range(1000):
    exp.log_metric("loss", 1 / (step + 1), step=step)
    time.sleep(0.1)
"""

KILLS = {"the agent delivers": (9.0, False), "the agent is killed, too; memtrack sync delivers": (28.0, True)}


@pytest.mark.timeout(150)
def test_kill_of_an_offline_experiment(tmp_path, fault):
    """After 9 s and after 28 s: Comet has left an empty archive; then there is one with every window up to the kill,
    once, the verdict, and the user's points, as ``comet offline`` reads them."""
    with ExitStack() as stack:
        started = {}
        for number, name in enumerate(KILLS):
            folder = tmp_path / str(number)
            folder.mkdir()
            script = stack.enter_context(comet_scripts(folder))(TRAINING, wait=False, MEMTRACK_SELECTIVE="0")
            key, begin, since = script.wait_for("STARTED").split()
            started[name] = folder, script, key, float(begin), float(since)
        for name, (after_s, with_agent) in KILLS.items():
            folder, script, key, begin, since = started[name]
            died = kill_at(script, since + after_s, agent_too=with_agent)
            recording = recording_of(script)
            (path,) = folder.glob("comet/*.zip")
            if with_agent:
                assert not is_complete(path)
                sync(recording, **QUIET)
            else:
                await_delivery(recording)
            log = read_archive(path)
            check_killed(log, recording, begin, since, died, with_agent=with_agent)
            values = comet_offline(path)
            for series, found in log.series.items():
                read = values[key, "metric", f"sys.{series.replace('/', '.')}"]
                assert [float(value) for value in read] == [value for _, value in found]
            assert len(values[key, "metric", "loss"]) == len(log.users[0])
            fault(f"kill -9 after {after_s:.0f} s of a training with an offline Comet experiment; {name}")


def check_killed(log, recording, begin, since, died, *, with_agent):
    """Assert what is in the archive of an experiment."""
    check_series(log.series, recording, begin, since, died - INTERVAL_S, died + 0.5)
    for name, found in log.series.items():
        assert died - INTERVAL_S - 0.1 <= max(found)[0] / 1000 <= died + 0.5, name
    assert len(log.series[metrics.RSS]) >= (died - since) // INTERVAL_S - 1  # the last may not have ended
    steps = [step for _, _, step, _ in log.users[0]]
    assert log.users[0] == [("loss", 1 / (step + 1), step, None) for step in range(len(steps))]
    # what Comet has logged by the last tenths of a second may still have been on its way to the file
    assert len(steps) >= 8 * (died - since)
    verdict = "unknown" if with_agent else "unknown SIGKILL"
    assert log.others["memtrack.verdict"] == verdict
    assert log.experiment["tags"] == [f"memtrack: {verdict}"]
