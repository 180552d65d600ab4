"""An MLflow server that is down, slow or failing: the training does not notice, and every window arrives."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.integrations.mlflow_lab import Proxy, points, rows, scripts

pytest.importorskip("mlflow")

LOOP = """
import logging, memtrack, mlflow
logging.basicConfig()  # so that urllib3's "Retrying ..." would be seen
{autolog}
paces = []
print("READY", flush=True)
while not os.path.exists("go"):
    time.sleep(0.02)
with mlflow.start_run() as run:
    print("STARTED", run.info.run_id, flush=True)
    until = time.monotonic() + {seconds}
    while time.monotonic() < until and not os.path.exists("stop"):
        start = time.perf_counter()
        sum(range(60_000))      # work that needs the GIL
        time.sleep(0.01)
        paces.append([time.time(), time.perf_counter() - start])
    t_end = time.time()
t_ended = time.time()
report(paces=paces, t_end=t_end, t_ended=t_ended)
"""


def check_complete(store, run_id, recording, until):
    """Every window of the run up to a time has arrived, as it is in the recording, once. Returns how many."""
    series = store.series(run_id)
    wanted = points(rows(recording, until=until))
    start_ms = store.client().get_run(run_id).info.start_time
    for name, found in wanted.items():
        got = [(stamp, value) for stamp, _, value in series[name]]
        assert len(set(got)) == len(got), f"{name} has points twice"
        assert {point for point in found if point[0] > start_ms + 600} <= set(got), f"{name} lacks windows"
    return len(wanted["memory/process/rss_mib"])


def own_lines(stderr):
    """What memtrack itself has said."""
    return [line for line in stderr.splitlines() if "Training goes on" in line]


def pace(paces, since, until):
    """Median and 99th percentile of the time that a step took."""
    found = [seconds for at, seconds in paces if since <= at < until]
    return statistics.median(found), statistics.quantiles(found, n=100)[98]


def test_a_server_that_is_away_for_thirty_seconds(mlflow_server, train, fault):
    """Killed and started again while a run goes on: all windows arrive, no step is slowed, one line is said.

    Nobody else talks to the server meanwhile, so that all that is printed is memtrack's doing: neither MLflow's client
    nor urllib3 says a word on its behalf.
    """
    autolog = "memtrack.autolog(interval=0.5, flush_interval=1.0)"
    script = train(LOOP.format(autolog=autolog, seconds=100), mlflow_server, wait=False)
    (script.folder / "go").touch()
    run_id = script.wait_for("STARTED")
    time.sleep(5)
    down = time.time()
    mlflow_server.stop()
    time.sleep(30)
    mlflow_server.start()
    up = time.time()
    # the longest pause between two tries is 10 s
    deadline = time.monotonic() + 15
    newest = 0.0
    while newest < up and time.monotonic() < deadline:
        time.sleep(0.25)
        newest = max(stamp for stamp, *_ in mlflow_server.series(run_id)["memory/process/rss_mib"]) / 1000
    back = time.time() - up
    (script.folder / "stop").touch()
    done = script.finish()

    assert newest >= up, f"nothing new {back:.0f} s after the server was back"
    assert back <= 12
    assert check_complete(mlflow_server, run_id, done.recording, done.result["t_end"] - 0.3) >= 70
    before, during = (pace(done.result["paces"], since, until) for since, until in ((0, down), (down, up)))
    assert during[0] <= before[0] * 1.3
    assert len(own_lines(done.stderr)) == 1
    assert "They wait in the recording" in own_lines(done.stderr)[0]
    others = [line for line in done.stderr.splitlines() if line not in own_lines(done.stderr)]
    assert others == []
    run = mlflow_server.client().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["memtrack.dropped"] == "0"
    fault("MLflow: the server is killed, and started again after 30 s", delay_s=during[0] - before[0])


def test_the_end_is_not_delayed_by_a_dead_server(mlflow_server, train, fault):
    """The server is killed and the script ends: 2 s more, at the most, than the script takes without memtrack.

    MLflow itself tries to end the run for minutes; here its user has told it to try once more only.
    """
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    autolog = "memtrack.autolog(interval=0.2, flush_interval='1h')"
    pair = [
        train(LOOP.format(autolog=line, seconds=100), mlflow_server, wait=False, check=False, **patience)
        for line in ("", autolog)
    ]
    (pair[0].folder / "go").touch()
    for script in pair:
        script.wait_for("STARTED")
    time.sleep(1)
    mlflow_server.stop()
    delays = []
    start = time.monotonic()
    (pair[0].folder / "stop").touch()
    for script in pair:
        script.process.wait(60)
        delays.append(time.monotonic() - start)
    outputs = [script.finish(check=False) for script in pair]
    assert outputs[0].returncode == outputs[1].returncode == 1, "MLflow raises, with memtrack and without"
    errors = [output.stderr.splitlines()[-1].partition("(")[0] for output in outputs]
    assert errors[0] == errors[1]
    assert delays[1] - delays[0] <= 2.0
    fault("MLflow: exit while the server is dead", "nothing: it waits in the recording", delays[1] - delays[0])
    assert len(own_lines(outputs[1].stderr)) <= 1
    retries = [output.stderr.count("Retrying") for output in outputs]
    assert retries[0] == retries[1] >= 1, "those of MLflow's own requests"


MISBEHAVIOUR: dict[str, Callable[[int], tuple[Any, ...] | None]] = {
    # a request takes 10 s, and is served then
    "slow": lambda number: ("wait", 10.0) if number == 1 else None,
    # told to come back in 4 s
    "429": lambda number: ("answer", 429, {"Retry-After": "4"}) if number <= 2 else None,
    "500": lambda number: ("answer", 500, {}) if number <= 3 else None,
    # the server has taken the batch, the answer is lost
    "hang up": lambda number: ("hang up",) if number % 2 else None,
    # a gateway that has lost its server for a while
    "404": lambda number: ("answer", 404, {}) if number <= 3 else None,
}


SAID = {
    "slow": "a request takes 10 s",
    "429": "429 with Retry-After: 4",
    "500": "status 500",
    "hang up": "every other answer is lost",
    "404": "a gateway's 404",
}


@pytest.fixture(scope="module")
def misbehaved(_server, tmp_path_factory):
    """A training for each, all at the same time: name -> (proxy, run id, Training)."""
    _server.start()
    folder = tmp_path_factory.mktemp("misbehaved")
    proxies = {how: Proxy(_server) for how in MISBEHAVIOUR}
    with ExitStack() as stack:
        started = {}
        for how, proxy in proxies.items():
            stack.callback(proxy.close)
            proxy.misbehave = MISBEHAVIOUR[how]
            (folder / how).mkdir()
            train = stack.enter_context(scripts(folder / how))
            autolog = "memtrack.autolog(interval=0.2, flush_interval=0.5)"
            started[how] = train(LOOP.format(autolog=autolog, seconds=14 if how == "slow" else 10), proxy, wait=False)
        for script in started.values():
            script.wait_for("READY")
        for how in started:
            (folder / how / "go").touch()
        found = {how: (proxies[how], script.wait_for("STARTED"), script.finish()) for how, script in started.items()}
        yield found


@pytest.mark.alone
@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_a_server_that_misbehaves(how, misbehaved, fault):
    """Slow, overloaded, failing, or with answers that are lost: no step is slowed, and every window arrives once."""
    proxy, run_id, done = misbehaved[how]
    assert check_complete(proxy, run_id, done.recording, done.result["t_end"] - 0.3) >= 40
    if how == "429":
        gaps = [later - earlier for earlier, later in itertools.pairwise(proxy.requests)]
        assert min(gaps[:2]) >= 4
    paces = done.result["paces"]
    first = paces[0][0]
    good, bad = pace(paces, first, first + 0.5), pace(paces, first + 0.5, first + 8)
    assert bad[0] <= good[0] * 1.5
    assert max(seconds for _, seconds in paces) < 1
    assert len(own_lines(done.stderr)) == (0 if how == "slow" else 1)
    assert done.stderr.splitlines() == own_lines(done.stderr)
    assert done.result["t_ended"] - done.result["t_end"] <= 3
    # before the exit, and at it no more than the test above says
    fault(f"MLflow: {SAID[how]}", delay_s=bad[0] - good[0])


@pytest.mark.alone
def test_the_end_is_not_delayed_by_a_server_that_hangs(proxy, train):
    """A request that gets no answer for 20 s does not keep the run from ending: 2 s in all, then the exit."""
    proxy.misbehave = lambda number: ("wait", 20.0)
    autolog = "memtrack.autolog(interval=0.2, flush_interval=0.5)"
    script = train(LOOP.format(autolog=autolog, seconds=2) + "\nprint('EXIT', time.time())", proxy, wait=False)
    (script.folder / "go").touch()
    done = script.finish()
    gone = time.time()
    left = float(next(line for line in done.stdout.splitlines() if line.startswith("EXIT"))[5:])
    assert done.result["t_ended"] - done.result["t_end"] <= 2.0 + 0.7
    # the two seconds have been spent: the process goes without another wait
    assert gone - left <= 1.0
    assert proxy.requests
