"""memtrack.autolog() with the real Comet: however an experiment starts and ends, its charts are in it, and nothing else
has moved."""

from __future__ import annotations

import os
import time
import zipfile

import pytest

from memtrack import metrics
from memtrack.recording.reader import RecordingReader
from tests.integrations.comet_lab import (
    API_KEY,
    FAST,
    Backend,
    check_series,
    comet_offline,
    comet_scripts,
    is_complete,
    read_archive,
    wait_until,
)

pytest.importorskip("comet_ml")

LOOP = """
report(key=exp.get_key(), since=time.time())
for step in range(10):
    memtrack.step(step)
    exp.log_metric("loss", 1.0 / (step + 1), step=step)
    time.sleep(0.08)
report(until=time.time(), curr_step=exp.curr_step)
"""

SCRIPTS = {
    "before comet is imported; ended by end()": f"""
import memtrack
report(begin=time.time())
first = memtrack.autolog({FAST})
assert "comet_ml" not in sys.modules
import comet_ml
assert memtrack.autolog({FAST}) is first
exp = comet_ml.start(project_name="p", workspace="w")
{LOOP}
assert comet_ml.get_running_experiment() is exp
exp.end()
os._exit(0)
""",
    "after the class was imported by name; ended by Comet at the exit": f"""
import memtrack
report(begin=time.time())
from comet_ml import OfflineExperiment
memtrack.autolog({FAST})
exp = OfflineExperiment(project_name="p")
{LOOP}
""",
    "after the experiment has started; ended by Comet at the exit": f"""
import comet_ml, memtrack
report(begin=time.time())
exp = comet_ml.ExistingOfflineExperiment(experiment_key="k" * 40)
first = memtrack.autolog({FAST})
assert memtrack.autolog({FAST}) is first
{LOOP}
""",
    "an exception ends the script": f"""
import memtrack, comet_ml
report(begin=time.time())
memtrack.autolog({FAST})
exp = comet_ml.start()
{LOOP}
raise ValueError("the loss is NaN")
""",
    "a flush interval of an hour": f"""
import memtrack, comet_ml
report(begin=time.time())
memtrack.autolog(interval=0.1, flush_interval="1h")
exp = comet_ml.start()
{LOOP}
comet_ml.end()
os._exit(0)
""",
}

SEQUENCE = f"""
import memtrack, comet_ml
report(begin=time.time())
memtrack.autolog({FAST})
def spell(name, start, end):
    begin = time.time()
    exp = start()
    since = time.time()
    time.sleep(0.6)
    until = time.time()
    end(exp)
    report(**{{name: [exp.get_key(), begin, since, until, time.time()]}})
spell("ended", comet_ml.start, lambda exp: exp.end())
time.sleep(0.4)
spell("replaced", comet_ml.OfflineExperiment, lambda exp: comet_ml.OfflineExperiment(disabled=True))
time.sleep(0.4)
spell("cleaned", comet_ml.OfflineExperiment, lambda exp: exp.clean())
time.sleep(0.4)
report(recordings=len(os.listdir(os.environ["MEMTRACK_DIR"])))
"""

USERS = """
import comet_ml
if os.environ.get("WITH"):
    import memtrack
    memtrack.autolog(interval=0.1, flush_interval=0.1)
exp = comet_ml.start()
for step in range(8):
    exp.log_metric("explicit", step / 8, step=step, epoch=step // 4)
    exp.log_metric("twice", step, step=step)
    exp.log_metrics({"twice": -step, "other": step}, step=step)
    time.sleep(0.07)
exp.set_epoch(7)
for step in range(100, 108):
    exp.set_step(step)
    exp.log_metric("implicit", step)
    with exp.train():
        exp.log_metric("in context", step)
        time.sleep(0.07)
    exp.log_metric("implicit", -step)
for _ in range(8):
    exp.log_metric("no step of its own", _)
    time.sleep(0.07)
report(key=exp.get_key(), curr_step=exp.curr_step, curr_epoch=exp.curr_epoch, running=sorted(exp.metrics))
exp.end()
"""

DISABLE = f"""
import memtrack, comet_ml
from comet_ml.experiment import CometExperiment
places = [(comet_ml.Experiment, "__init__"), (comet_ml.OfflineExperiment, "__init__"),
          (CometExperiment, "_clean_experiment"), (CometExperiment, "end"), (CometExperiment, "log_metric")]
def functions():
    return [owner.__dict__[name] for owner, name in places]
before = functions()
import inspect
signature = inspect.signature(comet_ml.OfflineExperiment)
memtrack.autolog({FAST})
assert [one is other for one, other in zip(functions(), before)] == [False, False, False, True, True]
assert inspect.signature(comet_ml.OfflineExperiment) == signature
exp = comet_ml.start()
time.sleep(0.5)
memtrack.autolog(disable=True)
assert all(one is other for one, other in zip(functions(), before))
report(t_off=time.time(), key=exp.get_key())
exp.log_metric("loss", 1.0)
time.sleep(0.5)
exp.end()
"""

DISABLE_BEFORE_IMPORT = f"""
import memtrack
memtrack.autolog({FAST})
memtrack.autolog(disable=True)
import comet_ml
assert not hasattr(comet_ml.OfflineExperiment.__init__, "__wrapped__")
"""

FORK = f"""
import memtrack, comet_ml
report(begin=time.time())
memtrack.autolog({FAST})
pid = os.fork()
begin = time.time()
exp = comet_ml.OfflineExperiment()
since = time.time()
time.sleep(0.8)
until = time.time()
exp.end()
report(**{{"parent" if pid else "child": [exp.get_key(), begin, since, until, time.time()]}})
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
report(pid=pid)
"""

ONLINE = f"""
import memtrack, comet_ml
report(begin=time.time())
memtrack.autolog({FAST})
exp = comet_ml.{{start}}
report(key=exp.get_key(), kind=type(exp).__name__, since=time.time())
for step in range(10):
    exp.log_metric("loss", step, step=step)
    time.sleep(0.08)
report(until=time.time(), curr_step=exp.curr_step)
exp.end()
"""

ONLINE_KILLED = f"""
import memtrack, comet_ml
report(begin=time.time())
memtrack.autolog({FAST})
exp = comet_ml.Experiment(api_key={API_KEY!r})
report(key=exp.get_key(), since=time.time())
time.sleep(1.0)
report(until=time.time())
print("READY", flush=True)
time.sleep(60)
"""

KILLED = """
import memtrack, comet_ml
report(begin=time.time())
memtrack.autolog(interval=0.1, flush_interval={flush})
exp = comet_ml.start(project_name="p", workspace="w", experiment_key={key})
report(key=exp.get_key(), since=time.time())
exp.log_asset_data("text", name="asset.txt")
for step in range(12):
    exp.log_metric("loss", 1.0 / (step + 1), step=step)
    time.sleep(0.1)
report(until=time.time(), folder=exp.tmpdir)
time.sleep(0.1)
print("READY", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """All scripts at once: most of the time of each is waiting. ``lab.done(name)`` is what came of one."""
    folder = tmp_path_factory.mktemp("comet")
    backend = Backend()
    online = {"COMET_API_KEY": API_KEY, **backend.settings}
    sources = {
        **{name: (source, {}) for name, source in SCRIPTS.items()},
        "sequence": (SEQUENCE, {}),
        "users": (USERS, {}),
        "users with memtrack": (USERS, {"WITH": "1"}),
        "disable": (DISABLE, {}),
        "disable before import": (DISABLE_BEFORE_IMPORT, {}),
        "fork": (FORK, {}),
        "online": (ONLINE.format(start="start()"), online),
        "online, existing": (ONLINE.format(start="ExistingExperiment(experiment_key='e' * 32)"), online),
        "online, killed": (ONLINE_KILLED, backend.settings),
        "killed": (KILLED.format(flush="'1h'", key=None), {}),
        "killed while flushing": (KILLED.format(flush=0.1, key="'u' * 50"), {}),
    }
    with Lab(folder, backend, sources) as lab:
        yield lab
    backend.close()


class Lab:
    """The scripts, four at a time, each in a folder of its own."""

    def __init__(self, folder, backend, sources):
        self.folder = folder
        self.backend = backend
        self._sources = sources
        self._names = list(sources)
        self._started: dict[str, tuple] = {}
        self._done = {}
        self.killed: dict[str, float] = {}
        """When a script was killed, Unix time."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for lines, _ in self._started.values():
            lines.__exit__(None, None, None)

    def script(self, name):
        """The script, running or done."""
        at = self._names.index(name)
        for near in self._names[at : at + 4]:
            if near not in self._started:
                folder = self.folder / str(self._names.index(near))
                folder.mkdir()
                source, env = self._sources[near]
                scripts = comet_scripts(folder)
                self._started[near] = scripts, scripts.__enter__()(source, wait=False, **env)
        return self._started[name][1]

    def done(self, name, check=True):
        """What the script has come to."""
        if name not in self._done:
            self._done[name] = self.script(name).finish(check=check)
        return self._done[name]

    def kill(self, name):
        """Kill the script once it is ready; what it has come to."""
        script = self.script(name)
        if name not in self._done:
            script.wait_for("READY")
            self.killed[name] = time.time()
            script.process.kill()
        return self.done(name, check=False)

    def archives(self, name):
        """Path of each archive that the script has left, by the experiment's key."""
        return {
            path.name[: -len(".zip")].partition("-")[0]: path for path in self.script(name).folder.glob("comet/*.zip")
        }

    def log(self, name, key):
        """What is in the archive of one of its experiments."""
        return read_archive(self.archives(name)[key])


def times(result):
    """For ``check_series``: the whole of the script, and the part in which the experiment certainly ran."""
    return result["begin"], result["since"], result["until"], float("inf")


# -- whenever and however -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_follows_an_experiment_however_it_starts_and_ends(name, lab):
    """Before or after the import or the start, ended by a call or at the exit: the archive has all windows, once, at
    their times, the figures, and the user's points."""
    done = lab.done(name, check="exception" not in name)
    result = done.result
    log = lab.log(name, result["key"])
    check_series(log.series, done.recording, *times(result))
    assert log.others["memtrack.peak_rss_mib"] >= max(value for _, value in log.series[metrics.RSS])
    assert log.others["memtrack.windows"] >= 7
    assert log.users[0] == [("loss", 1.0 / (step + 1), step, None) for step in range(10)]
    assert result["curr_step"] == 9
    assert "memtrack" not in done.stderr


def test_comets_own_reader_takes_the_archive(lab):
    """``comet offline`` finds as many values of each series as there are windows, and the same values."""
    name = next(iter(SCRIPTS))
    key = lab.done(name).result["key"]
    log = lab.log(name, key)
    rows = comet_offline(lab.archives(name)[key])
    for series, found in log.series.items():
        values = rows[key, "metric", f"sys.{series.replace('/', '.')}"]
        assert [float(value) for value in values] == [value for _, value in found]
    assert len(rows[key, "metric", "loss"]) == 10


def test_experiments_of_one_process_are_kept_apart(lab):
    """Ended, replaced by the next or cleaned away: each has the windows of its own time, and none is in two."""
    done = lab.done("sequence")
    stamps = []
    for name in ("ended", "replaced", "cleaned"):
        key, *times = done.result[name]
        series = lab.log("sequence", key).series
        check_series(series, done.recording, *times)
        stamps += [stamp for stamp, _ in series[metrics.RSS]]
    assert len(set(stamps)) == len(stamps)
    assert done.result["recordings"] == 1
    assert "memtrack" not in done.stderr


def test_a_forked_child_with_an_experiment_of_its_own(lab):
    """Parent and child have an experiment at once; each has its own process's memory."""
    done = lab.done("fork")
    own = {recording.stem.split("-")[2]: recording for recording in done.recordings}
    child = own.pop(str(done.result["pid"]))
    (parent,) = own.values()
    for name, recording in (("parent", parent), ("child", child)):
        key, *times = done.result[name]
        check_series(lab.log("fork", key).series, recording, *times)


# -- what is untouched ----------------------------------------------------------------------------------------------


def test_the_users_series_are_as_without_memtrack(lab):
    """Explicit steps, implicit ones, several logs a step, contexts: every point and step, in the same order, with
    memtrack delivering as often as it can between them."""
    without, with_ = (lab.done(name).result for name in ("users", "users with memtrack"))
    for what in ("curr_step", "curr_epoch", "running"):
        assert with_[what] == without[what]
    mine = lab.log("users", without["key"])
    theirs = lab.log("users with memtrack", with_["key"])
    assert len(mine.users[0]) == 8 * (4 + 3 + 1)
    assert theirs.users == mine.users
    assert len(theirs.series[metrics.RSS]) >= 12
    assert not mine.series


def test_disable_restores_the_originals(lab):
    """``autolog(disable=True)`` puts back the very functions, also while an experiment runs; nothing comes after."""
    result = lab.done("disable").result
    log = lab.log("disable", result["key"])
    assert log.series[metrics.RSS]
    assert max(stamp for stamp, _ in log.series[metrics.RSS]) <= 1000 * result["t_off"]
    assert "memtrack.peak_rss_mib" in log.others
    assert lab.done("disable before import").returncode == 0


# -- online ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["online", "online, existing"])
def test_online_experiments(name, lab):
    """The backend is sent every window with its own time and without a step, and the figures."""
    done = lab.done(name)
    result = done.result
    assert result["kind"] == ("ExistingExperiment" if "existing" in name else "Experiment")
    log = lab.backend.log(result["key"])
    check_series(log.series, done.recording, *times(result))
    assert log.users[0] == [("loss", step, step, None) for step in range(10)]
    assert result["curr_step"] == 9
    assert log.others["memtrack.windows"] >= 7


def test_an_online_experiment_that_is_killed(lab):
    """The agent sees to it that the rest is delivered, also what Comet had taken but not yet uploaded, with the API key
    that the code had, which is in no file."""
    done = lab.kill("online, killed")
    key = done.result["key"]
    log = wait_until(
        lambda: (
            "memtrack.verdict" in lab.backend.log(key).others
            and any(body.get("hasCrashed") for body in lab.backend.bodies("update-status", key))
            and lab.backend.log(key)
        )
    )
    # what had been uploaded may be there twice
    series = {name: sorted(set(found)) for name, found in log.series.items()}
    check_series(series, done.recording, *times(done.result))
    assert log.others["memtrack.verdict"] == "unknown SIGKILL"
    for path in done.recording.parent.iterdir():
        assert API_KEY.encode() not in path.read_bytes()
    with RecordingReader(str(done.recording)) as reader:
        assert wait_until(lambda: [feed.done for feed in reader.feeds()] == [True])


def test_experiments_continued_in_turns(lab, tmp_path):
    """Comet has one experiment at a time; what is sent to two of them in turns arrives, and nothing else."""
    with comet_scripts(tmp_path) as train:
        train(
            """
from memtrack.sinks import RunFigures
from memtrack.testing import example_batch
from memtrack_comet import CometSink
one, two = (CometSink.reopen({"mode": "online", "key": letter * 32}) for letter in "ab")
for number in range(2):
    one.write(example_batch(2, first=10 * number))
    two.write(example_batch(3, first=10 * number))
for sink in (one, two):
    sink.finish(RunFigures(peak_rss_mib=1.0))
    sink.close()
""",
            COMET_API_KEY=API_KEY,
            COMET_AUTO_LOG_CODE="1",
            COMET_AUTO_LOG_ENV_DETAILS="1",
            **lab.backend.settings,
        )
    for key, count in (("a" * 32, 4), ("b" * 32, 6)):
        log = lab.backend.log(key)
        assert len(log.series[metrics.RSS]) == count
        assert log.others["memtrack.peak_rss_mib"] == 1.0
    paths = {path for path, body in lab.backend.requests if body.get("experimentKey") in ("a" * 32, "b" * 32)}
    assert not [path for path in paths if "upload" in path or "system-details" in path or "output" in path]


# -- killed offline -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["killed", "killed while flushing"])
def test_the_archive_of_an_experiment_that_is_killed(name, lab):
    """It is made without a hand's turn: with all windows up to the kill, the verdict, and what the user had logged."""
    done = lab.kill(name)
    result = done.result
    key = result["key"]
    (path,) = wait_until(lambda: [path for path in lab.archives(name).values() if is_complete(path)])
    log = read_archive(path)
    check_series(log.series, done.recording, *times(result))
    assert log.users[0] == [("loss", 1.0 / (step + 1), step, None) for step in range(12)]
    assert log.others["memtrack.verdict"] == "unknown SIGKILL"
    assert log.experiment["offline_id"] == key
    assert (log.experiment["project_name"], log.experiment["workspace"]) == ("p", "w")
    assert log.experiment["resume_strategy"] == "get_or_create"
    assert log.experiment["user_provided_experiment_key"] == ("flushing" in name)
    assert log.experiment["comet_start_sourced"]
    assert log.experiment["tags"] == ["memtrack: unknown SIGKILL"]
    assert -1.0 < log.experiment["stop_time"] / 1000 - lab.killed[name] < 3.0
    assert log.experiment["start_time"] <= 1000 * result["since"]

    if name == "killed":
        rows = comet_offline(path)
        assert len(rows[key, "metric", "sys.memory.process.rss_mib"]) == len(log.series[metrics.RSS])
        assert len(rows[key, "metric", "loss"]) == 12
    (upload,) = [m["payload"] for m in log.messages if m["type"] == "file_upload"]
    with zipfile.ZipFile(path) as archive:
        assert archive.read(upload["file_path"]) == b"text"
    assert os.listdir(path.parent) == [path.name]
