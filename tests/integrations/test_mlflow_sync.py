"""Runs whose process has died: everything arrives in MLflow, once, and the run says how it ended."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from memtrack.recording.reader import RecordingReader
from memtrack.recording.standing import waiting
from tests.integrations.mlflow_lab import SUMMARY, Proxy, environment, points, rows, scripts

pytest.importorskip("mlflow")

TRAIN = """
import memtrack, mlflow
{before}
memtrack.autolog(interval={interval}, flush_interval={flush!r}{more})
{between}
with mlflow.start_run() as run:
    memtrack.step(7)
    print("STARTED", run.info.run_id, flush=True)
    {body}
    time.sleep(100)
"""

IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MEMTRACK_TEST_PATIENCE": "1",
}
"""MLflow's client gives up at once, and so does, after a second, who delivers for the dead."""


def training(*, flush="1h", interval=0.1, before="", between="", more="", body="pass"):
    """A script: what it does before autolog and behind it, further settings, and its body; then it sleeps."""
    return TRAIN.format(flush=flush, interval=interval, before=before, between=between, more=more, body=body)


def until(condition, timeout_s=30.0):
    """Wait until it is true, and return how long that took; fail when it takes too long."""
    start = time.monotonic()
    while time.monotonic() < start + timeout_s:
        if condition():
            return time.monotonic() - start
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s")


def recordings(script):
    """The recordings in a script's folder."""
    return sorted(script._folder.glob("*.mtk"))


def delivered(path):
    """Whether nothing of a recording waits."""
    with RecordingReader(str(path)) as reader:
        return bool(reader.feeds()) and not waiting(reader)


def agent_of(path):
    """Pid of the agent, once it has said so: 0 would be this process's own group."""
    with RecordingReader(str(path)) as reader:
        until(lambda: reader.head().agent_pid > 0)
        return reader.head().agent_pid


def kill(script):
    """Kill the training process, and only that."""
    script.process.kill()
    script.process.wait()


def kill_all(script):
    """Kill the training process and its agent in one go: neither sees the other die."""
    (path,) = recordings(script)
    agent = agent_of(path)
    script.process.send_signal(signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)
    kill(script)


def sync(folder, store, *, env=None):
    """``memtrack sync`` of a folder, started."""
    command = [sys.executable, "-m", "memtrack", "sync", "--directory", str(folder)]
    variables = environment(
        COLUMNS="200", **({} if store is None else {"MLFLOW_TRACKING_URI": store.uri}), **(env or {})
    )
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )


def check_once(store, run_id, recording):
    """Assert that each window of the recording is in MLflow exactly once, and nothing else. Returns how many."""
    found = rows(recording)
    with RecordingReader(str(recording)) as reader:
        (feed,) = [feed for feed in reader.feeds() if run_id in feed.key]
        assert feed.done
        assert feed.dropped == 0
    middles = {row: (row.start_ns + row.end_ns) // 2 for row in found}
    mine = [row for row, at in middles.items() if at >= feed.start_ns and (feed.end_ns is None or at < feed.end_ns)]
    series = store.series(run_id)
    wanted = points(mine)
    assert {*series} == {*wanted}
    for name, expected in wanted.items():
        assert sorted((stamp, value) for stamp, _, value in series[name]) == sorted(expected), name
    return len(mine)


def check_ended(store, run_id, status):
    """Assert how a run ended; returns its tags of ours."""
    run = store.client().get_run(run_id)
    assert run.info.status == status
    assert (run.info.end_time is None) == (status == "RUNNING")
    assert SUMMARY + "peak_rss_mib" in run.data.metrics
    return {
        name.removeprefix("memtrack."): text for name, text in run.data.tags.items() if name.startswith("memtrack.")
    }


# -- how a process may die ------------------------------------------------------------------------------------------

DEATHS = {
    "SIGKILL": ({}, "KILLED", "unknown SIGKILL"),
    "SIGTERM": ({}, "KILLED", "killed"),
    "SIGSEGV": ({}, "FAILED", "killed"),
    "left open": ({"more": ", end_run=False"}, "RUNNING", "unknown SIGKILL"),
    "os._exit": ({"body": "time.sleep(0.7); os._exit(3)"}, "FAILED", "failed"),
}


@pytest.fixture(scope="module")
def deaths(_server, tmp_path_factory):
    """A training for each, all at the same time: name -> (run id, recording, seconds until the run was complete)."""
    _server.start()
    folder = tmp_path_factory.mktemp("deaths")
    with ExitStack() as stack:
        started = {}
        for how, (what, *_) in DEATHS.items():
            (folder / how).mkdir()
            started[how] = stack.enter_context(scripts(folder / how))(training(**what), _server, wait=False)
        runs = {how: script.wait_for("STARTED") for how, script in started.items()}
        time.sleep(0.8)
        for how, script in started.items():
            if how != "os._exit":
                script.process.send_signal(getattr(signal, how, signal.SIGKILL))
            script.process.wait(30)
        died = time.monotonic()
        paths = {how: recordings(script)[0] for how, script in started.items()}
        took = {}
        while len(took) < len(paths) and time.monotonic() < died + 60:
            for how in paths:
                if how not in took and delivered(paths[how]):
                    took[how] = time.monotonic() - died
            time.sleep(0.02)
        yield {how: (runs[how], paths[how], took.get(how, float("inf"))) for how in paths}


@pytest.mark.parametrize("how", DEATHS)
def test_death(how, deaths, mlflow_server):
    """All windows once, the final figures, the verdict as tags; the run has ended as it says, unless it was not to."""
    run_id, path, took_s = deaths[how]
    _, status, verdict = DEATHS[how]
    # five at the same time, on a machine that may be loaded: a process that imports MLflow takes seconds of processor
    assert took_s < 40
    assert check_once(mlflow_server, run_id, path) >= 6
    tags = check_ended(mlflow_server, run_id, status)
    assert tags["verdict"] == verdict
    assert tags["verdict_text"]
    assert tags["dropped"] == "0"
    run = mlflow_server.client().get_run(run_id)
    if status != "RUNNING":
        with RecordingReader(str(path)) as reader:
            assert run.info.end_time == round(reader.verdict().wall_ns / 1e6)


def test_within_ten_seconds(mlflow_server, train):
    """From the death to a run that is complete and KILLED; with the settings of every day but for the interval."""
    script = train(training(flush="10s"), mlflow_server, wait=False)
    run_id = script.wait_for("STARTED")
    time.sleep(0.5)
    kill(script)
    took_s = until(lambda: mlflow_server.client().get_run(run_id).info.status == "KILLED")
    print(f"complete {took_s:.1f} s after the death")
    assert took_s < 10
    check_once(mlflow_server, run_id, script.finish(check=False).recording)


def test_sqlite_and_a_relative_address(sqlite_store, train, tmp_path):
    """A store that the process writes to itself, named from a directory that nobody else stands in."""
    script = train(
        training(before="mlflow.set_tracking_uri('sqlite:///mlflow.db')"), None, wait=False, MLFLOW_TRACKING_URI=""
    )
    run_id = script.wait_for("STARTED")
    time.sleep(0.5)
    kill(script)
    path = script.finish(check=False).recording
    until(lambda: delivered(path))
    check_once(sqlite_store, run_id, path)
    check_ended(sqlite_store, run_id, "KILLED")


# -- a server that is down when the process ends --------------------------------------------------------------------


def test_the_next_start_and_sync_deliver(proxy, mlflow_server, train, tmp_path):
    """Three trainings fail while the server is down: an exception, a kill, and a kill of everything.

    The first is then delivered by the next training in its folder, the others by two `memtrack sync` at once.
    """
    down = []
    proxy.gate = lambda headers: 503 if down else None
    with ExitStack() as stack:
        runs = {}
        for how in ("exception", "kill", "kill all"):
            (tmp_path / how).mkdir()
            go = "while not os.path.exists('go'):\n        time.sleep(0.02)\n    1 / 0"
            more = stack.enter_context(scripts(tmp_path / how))
            script = more(training(body=go if how == "exception" else "pass"), proxy, wait=False, **IMPATIENT)
            runs[how] = (more, script)
        ids = {how: script.wait_for("STARTED") for how, (_, script) in runs.items()}
        time.sleep(0.6)
        down.append(True)
        (runs["exception"][1].folder / "go").touch()
        assert runs["exception"][1].process.wait(30) == 1
        kill(runs["kill"][1])
        kill_all(runs["kill all"][1])
        paths = {how: recordings(script)[0] for how, (_, script) in runs.items()}
        until(lambda: not any(couriers(path) for path in paths.values()), 60)
        assert not any(delivered(path) for path in paths.values())
        assert all(mlflow_server.client().get_run(run_id).info.status == "RUNNING" for run_id in ids.values())

        down.clear()
        again = runs["exception"][0](training(), proxy, wait=False, **IMPATIENT)
        # one folder for both, as it would be
        for name in ("kill", "kill all"):
            shutil.copy(paths[name], paths["kill"].parent / f"{name.replace(' ', '-')}.mtk")
        folder = paths["kill"].parent
        paths["kill"].unlink()
        paths["kill"], paths["kill all"] = folder / "kill.mtk", folder / "kill-all.mtk"
        racing = [sync(folder, proxy) for _ in range(2)]
        outputs = [process.communicate(timeout=90)[0] for process in racing]
        assert [process.returncode for process in racing] == [0, 0], outputs
        counts = {how: check_once(mlflow_server, ids[how], paths[how]) for how in ("kill", "kill all")}
        for how, count in counts.items():
            run = f"mlflow:{ids[how]}"
            assert sum(f"{run}: {count} windows delivered" in output for output in outputs) == 1, outputs
        again.wait_for("STARTED")
        until(lambda: delivered(paths["exception"]), 60)
        check_once(mlflow_server, ids["exception"], paths["exception"])
    tags = check_ended(mlflow_server, ids["exception"], "FAILED")
    assert tags["verdict"] == "failed"
    assert "MlflowException" in tags["verdict_text"], "what MLflow raised when it could not end the run"
    check_ended(mlflow_server, ids["kill"], "KILLED")
    # nobody saw this one die
    status = mlflow_server.client().get_run(ids["kill all"]).info.status
    tags = check_ended(mlflow_server, ids["kill all"], status)
    assert status == ("KILLED" if tags["verdict"] == "unknown SIGKILL" else "FAILED")


def couriers(path):
    """Pids of the processes that deliver a recording."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"courier.py" in command and os.fsencode(path) in command:
            found.append(int(pid))
    return found


# -- credentials ----------------------------------------------------------------------------------------------------


def traces(folder, secrets):
    """Files below a folder, and processes by their arguments, that show one of these texts."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets):
            found.append(str(path))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if any(secret.encode() in command for secret in secrets):
            found.append(command.decode(errors="replace"))
    return found


def test_credentials_that_only_the_dead_process_knew(mlflow_server, tmp_path):
    """A token that was set, and exchanged, in the process; and a password in the address that it gave to MLflow.

    Both are there for the delivery after the kill, and in no file and no process's arguments at any time.
    """
    secrets = ("tok3n-one", "tok3n-two", "s3cret-passw0rd", "YWRhOnMzY3JldC1wYXNzdzByZA==")
    valid = {"Bearer tok3n-one"}
    exchange = (
        "while not os.path.exists('go'):\n        time.sleep(0.02)\n"
        "    os.environ['MLFLOW_TRACKING_TOKEN'] = 'tok3n-' + 'two'\n    print('CHANGED', flush=True)"
    )
    with ExitStack() as stack:
        token, password = Proxy(mlflow_server), Proxy(mlflow_server)
        stack.callback(token.close)
        stack.callback(password.close)
        token.gate = lambda headers: None if headers.get("Authorization") in valid else 401
        password.gate = lambda headers: None if headers.get("Authorization", "").startswith("Basic YWRhOn") else 401
        folders = [tmp_path / "token", tmp_path / "password"]
        for folder in folders:
            folder.mkdir()
        address = password.uri.replace("http://", "http://' + 'ada:s3cret-' + 'passw0rd' + '@")
        started = [
            stack.enter_context(scripts(folders[0]))(
                training(flush=0.2, between="os.environ['MLFLOW_TRACKING_TOKEN'] = 'tok3n-' + 'one'", body=exchange),
                token,
                wait=False,
            ),
            stack.enter_context(scripts(folders[1]))(
                training(between=f"mlflow.set_tracking_uri('{address}')"), None, wait=False
            ),
        ]
        ids = [script.wait_for("STARTED") for script in started]
        time.sleep(0.5)
        (folders[0] / "go").touch()
        started[0].wait_for("CHANGED")
        time.sleep(0.5)
        valid.clear()
        valid.add("Bearer tok3n-two")
        for script in started:
            kill(script)
        paths = [recordings(script)[0] for script in started]
        deadline = time.monotonic() + 60
        seen = []
        while not all(delivered(path) for path in paths) and time.monotonic() < deadline:
            seen += [trace for folder in folders for trace in traces(folder / "recordings", secrets)]
            time.sleep(0.05)
        assert all(delivered(path) for path in paths)
        assert not seen
        assert not [trace for folder in folders for trace in traces(folder / "recordings", secrets)]
    for run_id, path in zip(ids, paths, strict=True):
        check_once(mlflow_server, run_id, path)
        check_ended(mlflow_server, run_id, "KILLED")


def test_a_token_for_sync(mlflow_server, tmp_path):
    """Without its token nothing is lost; with that in the environment, `memtrack sync` delivers."""
    proxy = Proxy(mlflow_server)
    proxy.gate = lambda headers: None if headers.get("Authorization") == "Bearer tok3n" else 401
    with ExitStack() as stack:
        stack.callback(proxy.close)
        train = stack.enter_context(scripts(tmp_path))
        script = train(
            training(between="os.environ['MLFLOW_TRACKING_TOKEN'] = 'tok3n'"), proxy, wait=False, **IMPATIENT
        )
        run_id = script.wait_for("STARTED")
        time.sleep(0.4)
        kill_all(script)
        (path,) = recordings(script)
        output = (process := sync(path.parent, proxy)).communicate(timeout=60)[0]
        assert process.returncode == 1
        assert re.search(r"\d+ wait: .*401", output), output
        token = {"MLFLOW_TRACKING_TOKEN": "tok3n"}
        before = len(proxy.requests)
        output = (process := sync(path.parent, None, env=token)).communicate(timeout=60)[0]
        assert process.returncode == 1
        assert "may be for another server" in output
        assert len(proxy.requests) == before, "a token goes to the configured server only, whatever a recording says"
        output = (process := sync(path.parent, proxy, env=token)).communicate(timeout=60)[0]
        assert process.returncode == 0, output
    check_once(mlflow_server, run_id, path)


# -- kills while it is delivered ------------------------------------------------------------------------------------


class Lane:
    """Trainings in a folder of their own, one after the other, and kills of whoever delivers; threads share nothing."""

    def __init__(self, server, folder, seed, stack):
        folder.mkdir()
        self.rng = random.Random(seed)
        self.store = server
        self.proxy = Proxy(server)
        stack.callback(self.proxy.close)
        self.proxy.misbehave = lambda number: ("wait", self.rng.uniform(0.0, 0.08))
        self.train = stack.enter_context(scripts(folder))
        self.kills = {"trainer": 0, "trainer and agent": 0, "who delivers": 0}
        self.inside = 0
        """How often somebody was killed who had sent something, and was not done."""
        self.runs = []
        self.started = []

    def life(self, kills):
        """A training that is killed, and at most so many kills of who delivers what it left."""
        rng = self.rng
        flush = rng.choice((0.1, 0.1, "1h"))
        script = self.train(training(flush=flush, interval=0.05), self.proxy, wait=False, MEMTRACK_TEST_PATIENCE="20")
        run_id = script.wait_for("STARTED")
        known = {path for _, path in self.runs}
        (path,) = (path for path in recordings(script) if path not in known)
        self.runs.append((run_id, path))
        time.sleep(rng.uniform(0.1, 5.0))
        if rng.random() < 0.3:
            agent = agent_of(path)
            script.process.send_signal(signal.SIGSTOP)
            os.kill(agent, signal.SIGKILL)
            self.kills["trainer and agent"] += 1
        else:
            self.kills["trainer"] += 1
        kill(script)
        for _ in range(kills):
            if not self._kill_courier(path):
                return

    def _kill_courier(self, path):
        """Kill who delivers, at some moment after its first request; False if all was delivered before."""
        asked = len(self.proxy.requests)
        deadline = time.monotonic() + 60
        pids = []
        after = self.rng.choice((0.0, 0.02, 0.1, 0.3)) * self.rng.random()
        while len(self.proxy.requests) == asked and not delivered(path) and time.monotonic() < deadline:
            pids = couriers(path)
            with RecordingReader(str(path)) as reader:
                over = not Path(f"/proc/{reader.head().agent_pid}").exists()
            if not pids and over:
                # as the next starts would, and sometimes two at once
                for _ in range(self.rng.choice((1, 1, 2))):
                    self._start_courier(path)
            time.sleep(0.01)
        time.sleep(after)
        if delivered(path):
            return False
        began, hit = len(self.proxy.requests) > asked, 0
        for pid in couriers(path):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            hit += 1
        self.kills["who delivers"] += hit
        # one of them at the most: the others wait for its lock. It may have finished between the look and the kill
        self.inside += began and hit > 0 and not delivered(path)
        return True

    def _start_courier(self, path):
        from memtrack.agent.aftermath import COURIER

        process = subprocess.Popen(
            [sys.executable, COURIER, "-1", str(path)],
            env=environment(MLFLOW_TRACKING_URI=self.proxy.uri, MEMTRACK_DISABLE="1", MEMTRACK_TEST_PATIENCE="20"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.started.append(process)

    def check(self):
        """Deliver the rest; every window of every run must be there once. Returns how many windows in how many runs."""
        for process in self.started:
            process.wait(90)
        with sync(self.runs[0][1].parent, self.proxy) as process:
            output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        windows = 0
        for run_id, path in self.runs:
            windows += check_once(self.store, run_id, path)
            assert self.store.client().get_run(run_id).info.status in ("KILLED", "FAILED")
        return windows, len(self.runs)


def kill_at_random(server, folder, count, lanes, seed):
    """At least ``count`` kills in some lanes at the same time. Prints, and returns, what was done."""
    with ExitStack() as stack:
        running = [Lane(server, folder / f"lane{number}", seed + number, stack) for number in range(lanes)]
        failed = []

        def drive(lane):
            try:
                while sum(sum(other.kills.values()) for other in running) < count:
                    lane.life(4)
            except BaseException as exc:
                failed.append(exc)

        threads = [threading.Thread(target=drive, args=(lane,)) for lane in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        found = [lane.check() for lane in running]
        kills = {how: sum(lane.kills[how] for lane in running) for how in running[0].kills}
        inside = sum(lane.inside for lane in running)
    windows, runs = (sum(column) for column in zip(*found, strict=True))
    print(
        f"{sum(kills.values())} kills {kills}, {inside} of who had begun to deliver: {windows} windows of {runs} runs"
    )
    assert sum(kills.values()) >= count
    assert count // 4 <= inside <= kills["who delivers"]
    return kills


@pytest.mark.timeout(240)
def test_kills_during_delivery(mlflow_server, tmp_path):
    """Of the training process, of its agent with it, and of who delivers for them: every window arrives once."""
    kill_at_random(mlflow_server, tmp_path, 8, 3, seed=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills_during_delivery(mlflow_server, tmp_path):
    """The same, many times."""
    kill_at_random(mlflow_server, tmp_path, 200, 4, seed=4711)
