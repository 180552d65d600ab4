"""Trackers that are away, broken or out of their mind: every window arrives all the same, and no step waits."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from contextlib import ExitStack

import pytest

from memtrack.recording.reader import RecordingReader
from tests.faults import gate
from tests.faults.gate import Gate
from tests.faults.lab import until
from tests.integrations.mlflow_lab import Store, points, rows, scripts

pytest.importorskip("mlflow")

PROLOGUE = """
import logging
logging.basicConfig()
{before}
import memtrack, memtrack.monitor, mlflow
{autolog}
ends = []
def timed(self, *args, detach=memtrack.monitor.Attached.detach):
    start = time.monotonic()
    try:
        return detach(self, *args)
    finally:
        ends.append(time.monotonic() - start)
memtrack.monitor.Attached.detach = timed
paces = []
"""
TRAINING = (
    PROLOGUE
    + """
with mlflow.start_run() as run:
    print("STARTED", run.info.run_id, flush=True)
    until = time.monotonic() + 150
    while time.monotonic() < until and not os.path.exists("stop"):
        start = time.perf_counter()
        memtrack.step(len(paces))
        with memtrack.phase("work"):
            sum(range(20_000))
        paces.append([time.time(), time.perf_counter() - start])
        time.sleep(0.05)
report(paces=paces, end_s=ends[0])
"""
)

HOSTS = """
import ctypes, subprocess
if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):
    raise OSError(ctypes.get_errno(), "unshare")
for words in (["--make-rprivate", "/"], ["--bind", "hosts", "/etc/hosts"], ["--bind", "resolv", "/etc/resolv.conf"]):
    subprocess.run(["mount", *words], check=True)
"""
"""A mount namespace, in which the test says which names there are."""

NAME = "tracker.memtrack.test"
BAD_S = 3.0

FAULTS = {
    "refused": "the server is down",
    "reset": "connections are reset",
    "half": "answers break off half-way",
    "page": "HTML is answered, with status 200",
    "nothing": "status 200 is answered, with nothing",
    "full": "the server's disk is full: status 500",
    "busy": "429 with Retry-After: 2",
    "flap": "up for a second, down for a second",
    "poison": "one point is refused for good",
    "dns": "the server's name does not resolve",
    "tls": "the server's certificate is not the right one",
}
TRAININGS = {
    "plain": ("refused", "reset", "half", "page"),
    "odd": ("nothing", "full", "busy"),
    "named": ("dns", "tls"),
    "poor": ("flap", "poison"),
}


class Days:
    """A training behind a gate of its own, and the bad days that it has: fault -> from when to when, Unix time."""

    def __init__(self, gate, script):
        self.gate = gate
        self.script = script
        self.bad = {}
        self.poisoned = []
        """Time stamps that the tracker refuses, in ms."""

    def live(self, faults, store, certificates):
        """Go through the faults, one after the other; after each, wait until everything has arrived."""
        time.sleep(1.5)
        for how in faults:
            begun = time.time()
            self._set(how, certificates)
            time.sleep(BAD_S)
            if how != "poison":
                self._set("", certificates)
            good = time.time()
            self.bad[how] = (begun, good)
            until(lambda good=good: newest(store, self.run_id) >= good, 40, 0.3)
        (self.script.folder / "stop").touch()

    def _set(self, how, certificates):
        hosts = self.script.folder / "hosts"
        if hosts.exists():
            hosts.write_text("127.0.0.1 localhost" + ("" if how == "dns" else f" {NAME}") + "\n")
            self.gate.certificate = certificates["bad" if how == "tls" else "good"]
        if not how:
            self.gate.reopen()
            return
        self.gate.misbehave = getattr(gate, how, None)
        if how == "poison":
            self.gate.misbehave = poison = gate.Poison()
            self.poisoned = poison.stamps
        self.gate.shut(refuse=how == "refused")


def newest(store, run_id):
    """When the newest window ended that has arrived, Unix time."""
    history = store.client().get_metric_history(run_id, "system/memory/process/rss_mib")
    return max((metric.timestamp for metric in history), default=0) / 1000


@pytest.fixture(scope="module")
def trainings(_server, tmp_path_factory):
    """Trainings that have bad days, and one whose server is away for a minute, all at the same time."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to make namespaces")
    _server.start()
    folder = tmp_path_factory.mktemp("trackers")
    authority, contexts = gate.certificates(folder, NAME)
    with ExitStack() as stack:
        found, threads = {}, []
        # the longest first: it is away for a minute while the others start
        for name in ("minute", *TRAININGS):
            (folder / name).mkdir()
            train = stack.enter_context(scripts(folder / name))
            one = Gate(_server, certificate=contexts["good"] if name == "named" else None)
            stack.callback(one.close)
            uri, more, before = f"http://127.0.0.1:{one.port}", {}, ""
            if name == "named":
                uri, before = f"https://{NAME}:{one.port}", HOSTS
                more = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority)}
                (folder / name / "hosts").write_text(f"127.0.0.1 localhost {NAME}\n")
                (folder / name / "resolv").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            autolog = "memtrack.autolog(interval=0.2, flush_interval=0.5)"
            source = SPIKES if name == "minute" else TRAINING.format(before=before, autolog=autolog)
            days = found[name] = Days(one, train(source, Store(uri), wait=False, **more))
            if name == "minute":
                days.run_id = days.script.wait_for("STARTED")
                time.sleep(1)
                days.bad["minute"] = (time.time(), 0.0)
                days.gate.shut(refuse=True)
        for name in TRAININGS:
            days = found[name]
            days.run_id = days.script.wait_for("STARTED")
            threads.append(threading.Thread(target=days.live, args=(TRAININGS[name], _server, contexts)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        for name in TRAININGS:
            found[name].done = found[name].script.finish()
        yield found


@pytest.mark.parametrize("how", FAULTS)
def test_bad_days(how, trainings, mlflow_server, fault):
    """Every window arrives once; no step waits for anything; what is said is one line; the end is not delayed."""
    (days,) = (days for name, days in trainings.items() if how in TRAININGS.get(name, ()))
    assert how in days.bad, f"what came meanwhile has not arrived; {days.done.stderr}"
    since, until_ = days.bad[how]
    series = mlflow_server.series(days.run_id)
    wanted = points(rows(days.done.recording, since, until_))
    assert len(wanted["memory/process/rss_mib"]) >= 10
    refused = days.poisoned if how == "poison" else []
    for name, found in wanted.items():
        got = [(stamp, value) for stamp, _, value in series[name]]
        assert len({*got}) == len(got), f"{name} has points twice"
        assert {stamp for stamp, _ in {*found} - {*got}} <= {*refused}, f"{name} lacks windows"
        assert {stamp for stamp, _ in got}.isdisjoint(refused), "the server has taken it after all"
    slowest = max(seconds for at, seconds in days.done.result["paces"] if since <= at <= until_)
    assert slowest <= 0.5, "a step has waited"
    own = [line for line in days.done.stderr.splitlines() if "Training goes on" in line]
    assert days.done.stderr.splitlines() == own
    assert len(own) <= 2, "each thing is said once: that windows wait, that one was refused"
    run = mlflow_server.client().get_run(days.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["memtrack.dropped"] == str(len(days.poisoned))
    lost = "that window, which is counted" if how == "poison" else "nothing"
    fault(f"tracker: {FAULTS[how]}", lost, days.done.result["end_s"])


# -- a minute, and a small recording ----------------------------------------------------------------------------------

SPIKES = PROLOGUE.format(
    before="",
    autolog="memtrack.autolog(interval=0.05, flush_interval=0.5, recording_size='1MiB', metrics='all')",
) + (
    """
def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) / 256

with mlflow.start_run() as run:
    print("STARTED", run.info.run_id, flush=True)
    spikes = []
    until = time.monotonic() + 150
    due = time.monotonic() + 5
    while time.monotonic() < until and not os.path.exists("stop"):
        memtrack.step(len(spikes))
        if time.monotonic() > due:
            due += 5
            held = b"x" * ((60 + len(spikes) * 17 % 13 * 12) << 20)
            begun = time.time()
            spikes.append([begun, resident_mib()])
            time.sleep(0.5)  # as long as a tick of an agent that has used up its budget, and longer
            del held
        time.sleep(0.05)
report(spikes=spikes, summary=str(memtrack.monitor.active.monitor.summary()), end_s=ends[0])
"""
)


def test_a_minute_of_outage_with_a_small_recording(trainings, mlflow_server, fault):
    """1200 windows go through a recording that has room for 139: resolution falls, every spike is in MLflow."""
    case = trainings["minute"]
    bad = case.bad["minute"][0]
    time.sleep(max(bad + 61 - time.time(), 0))
    good = time.time()
    case.gate.reopen()
    until(lambda: newest(mlflow_server, case.run_id) >= good, 30, 0.3)
    (case.script.folder / "stop").touch()
    case.done = case.script.finish()
    spikes = case.done.result["spikes"]
    assert len([at for at, *_ in spikes if bad < at < good - 3]) >= 8
    client = mlflow_server.client()
    rss, peaks, mergers = (
        [(metric.timestamp / 1000, metric.value) for metric in client.get_metric_history(case.run_id, f"system/{name}")]
        for name in ("memory/process/rss_mib", "memory/process/rss_peak_mib", "memory/self/merged")
    )
    for at, height_mib in spikes:
        shown = max(value for stamp, value in peaks if at <= stamp <= at + 4)
        assert shown >= height_mib - 1, "a spike is lost"
        assert shown <= height_mib + 30
    with RecordingReader(str(case.done.recording)) as reader:
        head = reader.head()
        assert head.merged > 500
        merged = max(
            row.cells["memory/self/merged"].max for row in reader.windows() if "memory/self/merged" in row.cells
        )
    assert 500 < merged <= head.merged
    assert max(value for _, value in mergers) > 500
    said = re.search(r"(\d+) windows, because the recording was full", case.done.result["summary"])
    assert 500 < int(said[1]) <= head.merged
    windows = len({stamp for stamp, _ in rss})
    run = client.get_run(case.run_id)
    assert run.data.metrics["system/memory/summary/peak_rss_mib"] >= max(height for _, height in spikes) - 1
    assert run.data.tags["memtrack.dropped"] == "0"
    fault(
        f"tracker: away for {good - bad:.0f} s, with room for 139 windows of 1200",
        f"resolution: {head.merged} mergers, {windows} points a series; every one of {len(spikes)} spikes is there",
        case.done.result["end_s"],
    )
