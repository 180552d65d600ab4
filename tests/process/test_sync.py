"""What a process leaves undelivered is delivered by its agent, or by the next start in the folder, and once."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memtrack.agent import aftermath
from memtrack.collectors.procfs import start_ticks
from memtrack.recording import layout
from memtrack.recording.layout import Head
from memtrack.recording.reader import RecordingReader
from memtrack.recording.records import Feed
from memtrack.recording.standing import boot_id, waiting
from memtrack.recording.writer import RecordingWriter, create
from memtrack.sinks.feeds import FeedWriter, holds

TRAIN = """
import os, time
import memtrack
monitor = memtrack.start(sinks=["jsonl"], directory=sys.argv[1], interval=0.1, flush_interval=sys.argv[2])
monitor.wait_ready()
print(monitor.path, flush=True)
time.sleep(float(sys.argv[3]))
"""
"""Arguments: folder, flush interval, and how long it lives."""


def delivered(path):
    """Whether nothing of a recording waits."""
    with RecordingReader(str(path)) as reader:
        return reader.feeds() and not waiting(reader)


def windows(path):
    """The windows of a recording that its sink is due: one that was half over when it was attached is not."""
    with RecordingReader(str(path)) as reader:
        (feed,) = reader.feeds()
        return [round(row.end_wall_ns / 1e6) for row in reader.windows() if holds(feed, row)]


def lines(path):
    """The points of the RSS and the figures in the file of the 'jsonl' sink of a recording."""
    found = [json.loads(line) for line in Path(path).with_suffix(".jsonl").read_text().splitlines()]
    points = [one["timestamp_ms"] for one in found if one.get("name") == "memory/process/rss_mib"]
    return points, [one["figures"] for one in found if "figures" in one]


def start(run_child, folder, *, flush="1h", lives=60):
    """A child that trains; and the path of its recording."""
    child = run_child(TRAIN, folder, flush, lives)
    return child, child.stdout.readline().strip()


def kill_with_agent(tools, child, path):
    """As a container that is killed as a whole: neither sees the other die."""
    agent = tools.agent_of(path)
    child.send_signal(signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)
    child.kill()
    child.wait()
    tools.wait_until(lambda: tools.is_gone(agent))


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


# -- the agent delivers ---------------------------------------------------------------------------------------------


def test_killed(run_child, tools, tmp_path):
    """Every window is delivered once, then the figures with the verdict; the process that does it is nobody's child."""
    child, path = start(run_child, tmp_path)
    time.sleep(0.7)
    child.kill()
    child.wait()
    tools.wait_until(lambda: delivered(path))
    points, figures = lines(path)
    assert points == windows(path)
    assert len(points) >= 5
    assert len(figures) == 1
    assert figures[0]["verdict"] in ("unknown_sigkill", "killed")
    assert figures[0]["windows"] == len(points)
    tools.wait_until(lambda: not couriers(path))


def test_nothing_is_left_to_deliver(run_child, tools, tmp_path):
    """After an orderly end the agent ends as well: no process is started for nothing."""
    child, path = start(run_child, tmp_path, flush="0.1", lives=0.4)
    agent = tools.agent_of(path)
    child.wait(20)
    assert delivered(path)
    seen = False
    while not tools.is_gone(agent):
        seen = seen or bool(couriers(path))
        time.sleep(0.005)
    assert not seen


def test_folder_deleted_meanwhile(run_child, tools, tmp_path):
    """The recording is delivered from the descriptor that the agent holds."""
    folder = tmp_path / "recordings"
    code = TRAIN.replace('sinks=["jsonl"]', f"sinks=[JsonLinesSink(path={str(tmp_path / 'kept.jsonl')!r})]")
    child = run_child("from memtrack.sinks.jsonl import JsonLinesSink\n" + code, folder, "1h", "60")
    path = child.stdout.readline().strip()
    time.sleep(0.5)
    with RecordingReader(path) as reader:
        shutil.rmtree(folder)
        child.kill()
        child.wait()
        tools.wait_until(lambda: not waiting(reader))
        (feed,) = reader.feeds()
        expected = [round(row.end_wall_ns / 1e6) for row in reader.windows() if holds(feed, row)]
    points, figures = lines(tmp_path / "kept.mtk")
    assert points == expected
    assert len(points) >= 3
    assert len(figures) == 1
    assert not folder.exists()


def test_stopped_in_a_process_that_goes_on(run_child, tools, tmp_path):
    """A sink that hangs when the monitor is stopped: the rest is delivered beside the process, each window once."""
    code = """
import os, time
import memtrack
from memtrack.sinks.jsonl import JsonLinesSink

class Hanging(JsonLinesSink):
    def write(self, batch):
        time.sleep(3600)

monitor = memtrack.start(sinks=[Hanging(path=sys.argv[2])], directory=sys.argv[1], interval=0.1, flush_interval=0.2)
monitor.wait_ready()
print(monitor.path, flush=True)
time.sleep(0.6)
monitor.stop()
print("stopped", flush=True)
time.sleep(60)
"""
    child = run_child(code, tmp_path, tmp_path / "kept.jsonl")
    path = child.stdout.readline().strip()
    assert child.stdout.readline() == "stopped\n"
    tools.wait_until(lambda: delivered(path))
    assert child.poll() is None
    points, figures = lines(tmp_path / "kept.mtk")
    assert points == windows(path)
    assert len(points) >= 4
    assert [found["verdict"] for found in figures] == [""]


# -- the next start -------------------------------------------------------------------------------------------------


def test_the_next_start_picks_up(run_child, tools, tmp_path):
    """The training was killed with its agent: several that start at once deliver it, all of it once."""
    child, path = start(run_child, tmp_path)
    time.sleep(0.7)
    kill_with_agent(tools, child, path)
    assert not delivered(path)
    before = [start(run_child, tmp_path, lives=60) for _ in range(3)]
    tools.wait_until(lambda: delivered(path), 20)
    points, figures = lines(path)
    assert points == windows(path)
    assert len(figures) == 1
    for _, living in before:
        assert not delivered(living)
        assert not lines(living)[0], "what lives delivers by itself"


def test_a_kill_while_it_is_delivered(run_child, tools, tmp_path):
    """The file may end in half a line then; whoever comes next begins behind the last whole one."""
    child, path = start(run_child, tmp_path)
    time.sleep(0.5)
    kill_with_agent(tools, child, path)
    with open(Path(path).with_suffix(".jsonl"), "a", encoding="utf-8") as file:
        file.write('{"name": "memory/process/rss_mib", "va')
    start(run_child, tmp_path)
    tools.wait_until(lambda: delivered(path), 20)
    points, _ = lines(path)
    assert points == windows(path)


# -- by hand --------------------------------------------------------------------------------------------------------


def sync(folder, *arguments):
    """``memtrack sync`` in a process of its own."""
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "memtrack", "sync", "--directory", str(folder), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )


def test_two_syncs_at_once(run_child, tools, tmp_path):
    """One delivers, the other finds nothing left or that the first is at it; a third has nothing to do."""
    child, path = start(run_child, tmp_path)
    time.sleep(0.6)
    kill_with_agent(tools, child, path)
    expected = windows(path)
    racing = [sync(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in racing]
    assert [process.returncode for process in racing] == [0, 0], outputs
    assert sum(f"{len(expected)} windows delivered" in out for out, _ in outputs) == 1
    points, figures = lines(path)
    assert points == expected
    assert len(figures) == 1
    last = sync(tmp_path)
    assert "nothing in" in last.communicate(timeout=60)[0]
    assert last.returncode == 0


def test_sync_says_what_remains(run_child, tools, tmp_path):
    """A target that cannot be written: exit status 1 and the reason; a live recording is skipped with a word."""
    child, path = start(run_child, tmp_path)
    _, other = start(run_child, tmp_path)
    time.sleep(0.4)
    kill_with_agent(tools, child, path)
    file = Path(path).with_suffix(".jsonl")
    file.unlink()
    file.symlink_to("elsewhere")
    out, _ = (process := sync(tmp_path)).communicate(timeout=60)
    assert process.returncode == 1
    assert f"{len(windows(path))} wait" in out
    assert "skipped, its process is running" in out
    file.unlink()
    file.touch()
    out, _ = (process := sync(tmp_path, Path(path).name)).communicate(timeout=60)
    assert process.returncode == 0
    assert "skipped" not in out
    assert lines(path)[0] == windows(path)
    out, _ = (process := sync(tmp_path, Path(other).name)).communicate(timeout=60)
    assert process.returncode == 0
    assert "skipped" in out


# -- old recordings -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_of(tmp_path):
    """``folder_of(own fields)`` makes the recording of a new start; ``add(name, …)`` others beside it."""

    def add(name, *, age_days=0.0, state=layout.ENDED, done=True, target=True, **fields):
        path = str(tmp_path / f"{name}.mtk")
        own = {"pid": "4194303", "start_ticks": "1", "boot_id": boot_id()}
        create(path, layout.MIN_SIZE, {"size": str(layout.MIN_SIZE), **own, **fields})
        writer = RecordingWriter(path)
        head = Head()
        head.state = state
        writer.publish(head)
        writer.close()
        feed = Feed("jsonl:x", "jsonl", {"path": str(tmp_path / "nowhere" / "x.jsonl")} if target else None)
        feed.done = done
        records = FeedWriter(path)
        records.put(feed)
        records.close()
        os.utime(path, (time.time() - age_days * 86400.0,) * 2)
        return path

    add.own = lambda **fields: add("99999999-own", state=layout.RUNNING, **fields)
    add.names = lambda: sorted(path.stem for path in tmp_path.glob("*.mtk") if "own" not in path.name)
    return add


@pytest.fixture
def started(monkeypatch):
    """What would be delivered; nothing is started."""
    asked = []
    monkeypatch.setattr(aftermath, "_start_courier", asked.extend)
    return asked


def test_old_recordings_go(folder_of, started):
    """Of those that are delivered and over, the newest stay, and none longer than their days."""
    own = folder_of.own(keep="3", keep_days="10.0")
    for day in range(1, 7):
        folder_of(f"2026010{day}", age_days=7 - day)
    folder_of("20260109", age_days=11)
    aftermath.tidy(own)
    assert folder_of.names() == ["20260105", "20260106"]
    assert not started


def test_what_is_needed_stays(folder_of, started, tmp_path):
    """Undelivered, living, being delivered, damaged or no recordings at all, links: none of them is touched."""
    own = folder_of.own(keep="1", keep_days="0.001")
    folder_of("20260101-undelivered", age_days=100, done=False)
    living = {"pid": str(os.getpid()), "start_ticks": str(start_ticks(os.getpid()))}
    folder_of("20260102-living", age_days=100, state=layout.RUNNING, **living)
    locked = os.open(folder_of("20260103-locked", age_days=100), os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)
    (tmp_path / "20260104-damaged.mtk").write_bytes(b"MEMTRACK" + bytes(layout.MIN_SIZE))
    (tmp_path / "20260105-other.mtk").write_text("my notes")
    os.utime(tmp_path / "20260105-other.mtk", (0, 0))
    outside = tmp_path / "outside"
    outside.mkdir()
    os.rename(folder_of("moved", age_days=100), outside / "moved.mtk")
    (tmp_path / "20260106-link.mtk").symlink_to(outside / "moved.mtk")
    folder_of("20260107-old", age_days=100)
    folder_of("20260108-undeliverable", age_days=100, done=False, target=False)
    (tmp_path / "20260107-old.jsonl").touch()
    aftermath.tidy(own)
    assert folder_of.names() == [
        "20260101-undelivered",
        "20260102-living",
        "20260103-locked",
        "20260104-damaged",
        "20260105-other",
        "20260106-link",
    ]
    assert (tmp_path / "20260107-old.jsonl").exists()
    assert (outside / "moved.mtk").exists()
    assert [Path(path).stem for path in started] == ["20260101-undelivered"]
    os.close(locked)


def test_a_folder_with_very_many(folder_of, started, tmp_path, monkeypatch):
    """A few hundred are looked at, the newest and the oldest, so that each start takes some of the oldest away."""
    monkeypatch.setattr(aftermath, "NEWEST", 10)
    monkeypatch.setattr(aftermath, "OLDEST", 5)
    own = folder_of.own(keep="2")
    first = folder_of("0000")
    for number in range(1, 40):
        os.link(first, tmp_path / f"{number:04}.mtk")
    aftermath.tidy(own)
    names = folder_of.names()
    assert names[0] == "0005"
    assert names[-2:] == ["0038", "0039"]
    assert len(names) == 40 - 8 - 5


def test_tidying_never_raises(tmp_path):
    """A folder that is gone is somebody's wish."""
    aftermath.tidy(str(tmp_path / "gone" / "x.mtk"))


def test_tidying_is_quick(folder_of, started):
    """It happens in the agent, between two samples."""
    own = folder_of.own(keep="1000")
    for number in range(100):
        folder_of(f"{number:04}")
    spent = []
    for _ in range(3):
        before = time.process_time()
        aftermath.tidy(own)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.1
