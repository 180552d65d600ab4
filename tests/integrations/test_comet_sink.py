"""CometSink and the archive of an experiment whose process has died, by themselves."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import zipfile

import pytest
from memtrack_comet import CometSink

import memtrack
from memtrack import metrics
from memtrack.errors import DeliveryError, MonitorError, RejectedError
from memtrack.recording import records
from memtrack.sinks import Batch, Point, RunFigures
from memtrack.testing import SinkContract, example_batch
from tests.integrations.comet_lab import QUIET, comet_offline, comet_scripts, is_complete, read_archive, read_messages

pytest.importorskip("jsonschema", reason="needs comet_ml")

KEY = "a1" * 16
EMPTY_ZIP = b"PK\x05\x06" + bytes(18)
KILLED = RunFigures(
    peak_rss_mib=512.0,
    windows=3,
    verdict="out_of_memory",
    verdict_confidence="confirmed",
    verdict_text="Out of memory: the kernel killed it.",
    verdict_evidence=("The cgroup's oom_kill counter rose by one.",),
    end_wall_s=1_900_000_000.5,
)


@pytest.fixture(scope="module")
def comet():
    """Comet, imported into this process without what it does there by itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        hook = sys.excepthook
        found = pytest.importorskip("comet_ml")
        yield found
        if found.get_running_experiment() is not None:
            found.get_running_experiment().clean()
        sys.excepthook = hook


@pytest.fixture
def experiment(comet, tmp_path, monkeypatch):
    """An offline experiment that runs; the next one ends it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return comet.OfflineExperiment(project_name="p", workspace="w", offline_directory=str(tmp_path / "comet"))


def points_of(log):
    """What memtrack has logged, in the words of ``SinkContract``."""
    return [Point(name, value, stamp) for name, found in log.series.items() for stamp, value in found]


class TestCometSink(SinkContract):
    @pytest.fixture(autouse=True)
    def _experiment(self, experiment, monkeypatch):
        self.experiment = experiment
        self.environ = monkeypatch

    def make_sink(self):
        return CometSink(experiment=self.experiment)

    def make_broken_sink(self):
        """One that was opened again, and cannot be continued once more: there is no API key."""
        self.environ.delenv("COMET_API_KEY", raising=False)
        self.environ.setenv("HOME", "/nonexistent")
        sink = self.make_sink()
        sink._owned = True
        self.experiment.clean()
        return sink

    def read_back(self):
        target = self.make_sink().target
        archive = target["archive"].replace("*", target["key"])
        return points_of(read_archive(archive) if is_complete(archive) else read_messages(self.experiment.tmpdir))

    def test_the_experiment_stays_where_it_was(self):
        """Neither its step nor its context is taken or moved."""
        self.experiment.set_step(7)
        self.experiment.context = "train"
        sink = self.make_sink()
        sink.write(example_batch(2))
        sink.finish(KILLED)
        assert (self.experiment.curr_step, self.experiment.context) == (7, "train")
        assert "sys.memory.process.rss_mib" not in self.experiment.metrics
        payloads = [m["payload"] for m in read_messages(self.experiment.tmpdir).messages if m["type"] == "metric_msg"]
        assert not any("context" in payload for payload in payloads)

    def test_nothing_is_logged_after_the_end(self):
        """Windows and figures are refused for good once the experiment has ended."""
        sink = self.make_sink()
        self.experiment.clean()
        for deliver in (lambda: sink.write(example_batch(1)), lambda: sink.finish(RunFigures())):
            with pytest.raises(RejectedError, match="has ended") as raised:
                deliver()
            assert raised.value.run_gone

    def test_values_that_are_no_numbers(self):
        """NaN and the infinities become Comet's words for them."""
        batch = example_batch(3, names=["memory/a/x_mib"])
        for row, odd in zip(batch.windows, (float("nan"), float("inf"), float("-inf")), strict=True):
            row.cells["memory/a/x_mib"].mean = odd
        self.make_sink().write(batch)
        assert [point.value for point in self.read_back()] == ["NaN", "Infinity", "-Infinity"]

    def test_without_a_way_to_give_a_time(self, monkeypatch, notices):
        """A Comet that takes no time gets the points all the same, and it is said once."""
        import comet_ml.messages

        monkeypatch.delattr(comet_ml.messages, "MetricMessage")
        sink = self.make_sink()
        before_ms = 1000 * time.time() - 1
        monkeypatch.undo()
        batch = example_batch(2, names=["memory/a/x_mib"])
        sink.write(batch)
        assert [point.value for point in self.read_back()] == [point.value for point in batch.points()]
        assert all(point.timestamp_ms >= before_ms for point in self.read_back())
        assert len(notices) == 1
        assert "takes no time" in notices[0]

    def test_what_is_kept_of_it_for_later(self):
        """The address of an experiment fits into the recording; an archive needs no secrets."""
        sink = self.make_sink()
        feed = records.Feed(sink.key, sink.name, sink.target)
        assert records.Feed.unpack(feed.pack(1))[1].target == sink.target
        assert sink.target["mode"] == "offline"
        assert sink.environment() == {}

    def test_a_closed_sink_lets_go_of_the_experiment(self):
        """What the experiment holds can be collected as soon as it has ended, whatever still knows the sink."""
        sink = self.make_sink()
        target = sink.target
        sink.close()
        assert self.experiment not in vars(sink).values()
        assert (sink.target, sink.key) == (target, f"comet:{self.experiment.get_key()}")


def test_start_feeds_the_running_experiment(experiment):
    """``memtrack.start(sinks=["comet"])`` feeds it until the monitor stops, and leaves it open."""
    with memtrack.start(sinks=["comet"], interval=0.1, flush_interval=0.1):
        time.sleep(0.5)
    assert experiment.alive
    log = read_messages(experiment.tmpdir)
    assert len(log.series[metrics.RSS]) >= 4
    assert log.others["memtrack.peak_rss_mib"] > 0


def test_start_without_an_experiment(comet, experiment):
    """One that has ended, which Comet still calls the running one, is none; the error says what to do."""
    experiment.clean()
    assert comet.get_running_experiment() is experiment
    with pytest.raises(MonitorError, match=r"Start it first, or use memtrack\.autolog\(\)"):
        memtrack.start(sinks=["comet"])


# -- archives -------------------------------------------------------------------------------------------------------


class Place:
    """What a killed experiment leaves behind: an empty archive, and Comet's temporary folder."""

    def __init__(self, folder):
        self.archive = folder / "comet" / f"{KEY}-AbCdEf.zip"
        self.archive.parent.mkdir()
        self.archive.write_bytes(EMPTY_ZIP)
        self.folder = folder / "tmpabcd"
        self.folder.mkdir()
        self.target = {
            "mode": "offline",
            "key": KEY,
            "archive": str(self.archive).replace(KEY, "*"),
            "folder": str(self.folder),
            "start": "1899999999000",
            "how": "get_or_create comet_start",
            "project": "p",
        }

    def leave(self, *lines):
        """Write Comet's file of messages."""
        (self.folder / "messages.json").write_bytes(b"\n".join(lines))

    def reopen(self):
        """The sink of another process."""
        return CometSink.reopen(self.target)


def metric(name, value, stamp=1_899_999_999_500, step=1):
    """A line of Comet's."""
    inner = {"epoch": None, "metricName": name, "metricValue": value, "step": step}
    payload = {"local_timestamp": stamp, "message_id": 1, "metric": inner}
    return json.dumps({"payload": payload, "type": "metric_msg"}).encode()


def upload(name):
    """A line of Comet's about an asset."""
    payload = {"file_path": name, "upload_type": "asset", "local_timestamp": 1, "additional_params": {}}
    return json.dumps({"payload": payload, "type": "file_upload"}).encode()


@pytest.fixture
def place(tmp_path):
    """A killed experiment."""
    return Place(tmp_path)


class TestArchive(SinkContract):
    @pytest.fixture(autouse=True)
    def _place(self, place):
        self.place = place

    def make_sink(self):
        return self.place.reopen()

    def reopen(self, sink):
        return self.place.reopen()

    def read_back(self):
        sink = self.place.reopen()
        sink.finish(RunFigures())
        return points_of(read_archive(self.place.archive))

    def make_broken_sink(self):
        sink = self.place.reopen()
        os.mkdir(f"{self.place.archive}.memtrack")
        return sink


def test_a_killed_experiment_gets_its_archive(place):
    """What Comet had written of it but for the line that the kill has torn and the assets that are not there, the
    windows, the figures and the verdict, as ``comet offline`` reads them."""
    place.leave(
        metric("loss", 0.5), upload("tmpasset"), upload("tmpgone"), upload("../outside"), upload("tmplink"),
        metric("loss", 0.25, step=2), metric("loss", 0.125)[:-9],
    )  # fmt: skip
    (place.folder / "tmpasset").write_bytes(b"weights")
    (place.folder / "tmpunfinished").write_bytes(b"half")
    (place.folder.parent / "outside").write_bytes(b"not Comet's")
    (place.folder / "tmplink").symlink_to(place.folder.parent / "outside")
    place.archive.chmod(0o640)
    batch = example_batch(70)
    sink = place.reopen()
    sink.write(batch)
    sink.finish(KILLED)

    log = read_archive(place.archive)
    assert set(points_of(log)) == set(batch.points())
    assert log.users[0] == [("loss", 0.5, 1, None), ("loss", 0.25, 2, None)]
    assert [m["payload"]["file_path"] for m in log.messages if m["type"] == "file_upload"] == ["tmpasset"]
    assert log.others["memtrack.verdict"] == "out of memory (confirmed)"
    assert log.others["memtrack.evidence"] == KILLED.verdict_evidence[0]
    assert log.experiment == {
        "offline_id": KEY,
        "project_name": "p",
        "workspace": None,
        "start_time": 1_899_999_999_000,
        "stop_time": 1_900_000_000_500,
        "tags": ["memtrack: out of memory"],
        "resume_strategy": "get_or_create",
        "user_provided_experiment_key": False,
        "comet_start_sourced": True,
        "customer_error_reported": True,
        "customer_error_message": "Out of memory: the kernel killed it.",
    }
    assert place.archive.stat().st_mode & 0o777 == 0o640
    assert os.listdir(place.archive.parent) == [place.archive.name]
    assert (place.folder / "messages.json").exists()
    rows = comet_offline(place.archive)
    assert len(rows[KEY, "metric", "sys.memory.process.rss_mib"]) == 70
    assert rows[KEY, "metric", "loss"] == ["0.5", "0.25"]


def test_without_comets_temporary_folder(place):
    """Where a reboot has emptied it, the windows and the verdict are there."""
    place.folder.rmdir()
    batch = example_batch(2)
    sink = place.reopen()
    sink.write(batch)
    sink.finish(KILLED)
    assert set(points_of(read_archive(place.archive))) == set(batch.points())


def test_a_kill_between_any_two_steps_of_a_delivery(place):
    """Who comes next makes the same archive, with each point once: those that Comet's folder has, those that wait."""
    windows = example_batch(6, names=[metrics.TREE_PSS]).windows
    first = next(Batch(windows[:1]).points())
    place.leave(metric("loss", 0.5), metric("sys.memory.tree.pss_mib", first.value, first.timestamp_ms, None))
    waiting = f"{place.archive}.memtrack"
    place.reopen().write(Batch(windows[:4]))
    with open(waiting, "ab") as file:
        file.write(metric("sys.memory.tree.pss_mib", 1.0)[:40])
    sink = place.reopen()
    sink.write(Batch(windows[2:]))
    with open(waiting, "rb") as file:
        kept = file.read()
    sink.finish(KILLED)
    with open(waiting, "wb") as file:  # as if it had not been removed any more
        file.write(kept)
    sink = place.reopen()
    sink.write(Batch(windows[4:]))
    sink.finish(KILLED)
    log = read_archive(place.archive)
    found = points_of(log)
    assert len(found) == len(set(found)) == 6
    assert set(found) == set(Batch(windows).points())
    assert len(log.users[0]) == 1
    assert log.experiment["tags"] == ["memtrack: out of memory"]


def test_an_archive_that_comet_has_made_gets_what_it_lacks(experiment):
    """Messages, assets and description stay as they are."""
    target = CometSink(experiment=experiment).target
    experiment.add_tag("mine")
    experiment.log_metric("loss", 1.0, step=3)
    experiment.log_asset_data("text", name="asset.txt")
    experiment.end()
    path = target["archive"].replace("*", target["key"])
    before = read_archive(path)
    sink = CometSink.reopen(target)
    sink.write(example_batch(2))
    sink.finish(RunFigures(peak_rss_mib=1.0, verdict="clean"))
    after = read_archive(path)
    assert after.experiment == before.experiment
    assert after.experiment["tags"] == ["mine"]
    assert [m for m in after.messages if m in before.messages] == before.messages
    assert len(after.series[metrics.RSS]) == 2
    with zipfile.ZipFile(path) as archive:
        (asset,) = set(archive.namelist()) - {"messages.json", "experiment.json"}
        assert archive.read(asset) == b"text"


def test_archives_that_are_none(place, tmp_path):
    """An archive that was removed, a file of another kind, a link to one: refused for good, and left as it is."""
    other = tmp_path / "other.zip"
    other.write_bytes(b"something else")
    place.archive.unlink()
    targets = [
        place.target,
        {**place.target, "archive": str(other)},
        {**place.target, "archive": f"{tmp_path}/comet/*.zip", "key": "../" + KEY},
        {"mode": "offline"},
    ]
    for target in targets:
        with pytest.raises(RejectedError) as raised:
            CometSink.reopen(target)
        assert raised.value.run_gone
    place.archive.symlink_to(other)
    with pytest.raises(DeliveryError):
        CometSink.reopen(place.target)
    assert other.read_bytes() == b"something else"


def test_keys_that_begin_alike_are_told_apart():
    """Users choose keys of up to 50 characters; the cursor's key holds the end of it."""
    ends = {f"comet:{('sweep' * 9 + end)[-34:]}" for end in map("".join, itertools.product("ab", repeat=3))}
    assert len(ends) == 8


def test_an_online_experiment_that_cannot_be_continued(tmp_path):
    """Without the API key, which its process had, it can be tried again later."""
    with comet_scripts(tmp_path) as train:
        done = train(
            f"""
from memtrack_comet import CometSink
from memtrack.errors import DeliveryError, RejectedError
try:
    CometSink.reopen({{"mode": "online", "key": {KEY!r}}})
except DeliveryError as exc:
    report(said=str(exc), is_final=isinstance(exc, RejectedError))
""",
            HOME=str(tmp_path),
        )
    assert "API key" in done.result["said"]
    assert not done.result["is_final"]
