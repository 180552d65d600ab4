"""Folders, disks and /proc that are not as they should be: a clear error at the start, or never again a word."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

import memtrack
from memtrack.errors import RecordingError
from memtrack.monitor import active
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from tests.faults.lab import Child, check_delivered, check_whole, ended, until


def in_namespace(command):
    """What puts a program into a mount namespace of its own, after a command there."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, to make namespaces")
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")
    return ["unshare", "--mount", "sh", "-c", f'{command} && exec "$@"', "sh"]


# -- while it runs --------------------------------------------------------------------------------------------------

REMOVED = """
import logging, shutil
from memtrack.testing import RecordingSink
logging.basicConfig()
sink, later = RecordingSink(), RecordingSink("later")
monitor = memtrack.start(sinks=[sink] if sys.argv[1] == "relay" else [], interval=0.05, flush_interval=0.1)
monitor.wait_ready()
time.sleep(0.3)
print(monitor.path, flush=True)
sys.stdin.readline()
seen = len(sink.windows)
for number in range(100):
    memtrack.step(number)
    with memtrack.phase("train"):
        time.sleep(0.005)
assert monitor.flush()
assert monitor.summary().figures.windows > 10
monitor.attach(later)
time.sleep(0.3)
if sys.argv[2] == "killed":
    os.kill(monitor._reader.head().agent_pid, 9)
    time.sleep(3.2)
    for _ in range(100):
        with memtrack.phase("train"):
            time.sleep(0.02)
    kinds = [event.kind for event in monitor._reader.events()]
    assert kinds == ["start", "gap", "start"], kinds
begun = time.monotonic()
monitor.stop()
print(time.monotonic() - begun, monitor.summary().figures.windows > 10, len(sink.windows) > seen + 5,
      sink.figures is not None, len(later.windows) > 2, later.figures is not None)
"""


def test_folder_removed_while_running(child, watched, fault):
    """Delivery goes on, new runs are fed, the agent is started again if need be, and the summary tells everything."""
    trainings = [child(REMOVED, *words) for words in (("relay", "alive"), ("none", "alive"), ("relay", "killed"))]
    for training in trainings:
        training.read()
        shutil.rmtree(training.recordings)
        training.say()
    for training, has_sink in zip(trainings, (True, False, True), strict=True):
        delay_s, *found = training.finish().split()
        assert (training.process.returncode, training.err) == (0, "")
        assert found == ["True", str(has_sink), str(has_sink), "True", "True"]
        assert float(delay_s) < 1
        assert not training.recordings.exists()
        fault(
            "the folder of the recordings is removed while running"
            + (", and the agent is killed" if training is trainings[2] else "" if has_sink else ", without a sink"),
            "the recording itself, and samples of 3 s" if training is trainings[2] else "the recording itself",
            float(delay_s),
        )


CUT = """
monitor = memtrack.start(interval=0.05)
monitor.wait_ready()
time.sleep(0.2)
agent = monitor._reader.head().agent_pid
os.truncate(monitor.path, int(sys.argv[1]))
print(agent, flush=True)
for number in range(30):
    memtrack.step(number)
    with memtrack.phase("train"):
        time.sleep(0.01)
monitor.flush()
monitor.summary()
monitor.stop()
str(monitor.summary())
print("done")
"""


def test_recording_cut_by_somebody(child, fault):
    """Cut behind the marks, it costs the windows. Cut before them, the kernel kills who writes there: SIGBUS.

    The latter is so with all mapped files. The recording is its owner's alone, and removing it does no harm.
    """
    behind, before = child(CUT, layout.METRICS), child(CUT, 0)
    agents = [int(one.read()) for one in (behind, before)]
    assert behind.finish() == "done\n"
    assert (behind.process.returncode, behind.err) == (0, "")
    before.finish()
    assert before.process.returncode == -signal.SIGBUS
    for agent in agents:
        until(lambda agent=agent: not os.path.exists(f"/proc/{agent}"))
    fault("somebody cuts the recording behind the marks", "the windows that were cut off")
    fault("somebody cuts the recording to nothing", "the training: killed by SIGBUS. Only its owner can do that")


FULL_LATER = """
from memtrack.testing import RecordingSink
sink = RecordingSink()
monitor = memtrack.start(sinks=[sink, "jsonl"], recording_size="1MiB", interval=0.05, flush_interval=0.1)
monitor.wait_ready()
with open(os.path.join(os.path.dirname(monitor.path), "filler"), "wb") as file:
    try:
        while True:
            os.write(file.fileno(), bytes(65536))
    except OSError:
        pass
with memtrack.phase("train"):
    for number in range(100):
        memtrack.step(number)
        time.sleep(0.01)
os.unlink(file.name)
begun = time.monotonic()
assert monitor.flush(20)
monitor.stop()
print(len(sink.windows) > 15, sink.figures.dropped, monitor.path)
"""


def test_disk_full_for_a_while(child, small_disk, fault):
    """The recording's space was allocated: it loses nothing; a sink that writes there goes on once there is room."""
    folder = small_disk("size=3m")
    one = child(FULL_LATER, environment={"MEMTRACK_DIR": str(folder)})
    windows, dropped, path = one.finish().split()
    assert (windows, dropped, one.process.returncode) == ("True", "0", 0)
    assert ended(path) == layout.STOPPED
    check_whole(path)
    fault("the disk is full for a while, the recording's and a sink's")


# -- at the start ---------------------------------------------------------------------------------------------------


def test_full_shared_memory(small_disk, fault, monkeypatch):
    """A full tmpfs, such as a container's /dev/shm, is an error at the start that says what to do; nothing is left."""
    folder = small_disk("size=64m")
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 62 << 20)
    monkeypatch.setenv("MEMTRACK_DIR", str(folder / "recordings"))
    with pytest.raises(RecordingError, match=r"cannot allocate 4194304 bytes .*No space left on device"):
        memtrack.start()
    with pytest.raises(RecordingError, match="cannot allocate"):
        memtrack.autolog(trackers=[])
    assert active.monitor is None
    assert os.listdir(folder / "recordings") == []
    fault("/dev/shm, where MEMTRACK_DIR is, is full at the start", "nothing: start() is refused in a sentence")


FALLBACK = """
import logging
logging.basicConfig()
os.environ.pop("MEMTRACK_DIR", None)
os.chdir(sys.argv[1])
os.environ["HOME"] = sys.argv[1]
with memtrack.start(interval=0.05, sinks=["jsonl"]) as monitor:
    monitor.wait_ready()
    time.sleep(0.2)
print(monitor.path)
"""


def test_read_only_home_and_working_directory(child, small_disk, tmp_path, fault):
    """The recording goes to the folder for temporary files, which is said once."""
    folder = small_disk("size=1m,ro")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    one = child(FALLBACK, folder, environment={"TMPDIR": str(temporary)})
    path = one.finish().strip()
    assert one.process.returncode == 0
    assert path.startswith(str(temporary))
    assert one.err.count("\n") == 1
    assert "Recordings go to" in one.err
    assert ended(path) == layout.STOPPED
    check_whole(path)
    check_delivered(path)
    fault("home and working directory are read-only", "nothing: the recording goes to the temporary folder")


UMASK = """
os.umask(0o777)
try:
    monitor = memtrack.start(interval=0.05)
    print(monitor.wait_ready(), oct(os.stat(monitor.path).st_mode & 0o777))
except memtrack.errors.RecordingError as exc:
    print("refused", exc)
"""


def test_umask_that_takes_everything(child, fault):
    """As another user than root, too: it works, or is refused in a sentence."""
    for as_nobody in (False, True):
        one = child(UMASK, as_nobody=as_nobody)
        words = one.finish().split()
        assert (one.process.returncode, one.err) == (0, "")
        assert words == ["True", "0o600"] or words[0] == "refused"
    fault("umask 0777")


# -- /proc ----------------------------------------------------------------------------------------------------------

REFUSED = """
for start in (memtrack.start, lambda: memtrack.autolog(trackers=[])):
    try:
        start()
    except memtrack.errors.MemtrackError as exc:
        print(exc)
with memtrack.phase("train"):
    memtrack.step(1)
"""


def test_no_proc(child, fault):
    """Without /proc there is nothing to measure: one clear error, before anything was started."""
    one = child(REFUSED, prefix=in_namespace("mount -t tmpfs none /proc"))
    lines = one.finish().splitlines()
    assert lines == ["cannot see any process: /proc is not mounted. Mount it: mount -t proc proc /proc"] * 2
    assert (one.process.returncode, one.err, one.made()) == (0, "", [])
    fault("/proc is not mounted", "nothing: start() is refused in a sentence")


WATCHED = """
import ctypes, logging
logging.basicConfig()
def hide():
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
if sys.argv[1] == "before":
    hide()
monitor = memtrack.start(interval=0.1)
ready = monitor.wait_ready(4.0)
if sys.argv[1] == "after":
    hide()
held = b"x" * (60 << 20)
time.sleep(2.6)
monitor.stop()
print(ready, monitor.path)
print(monitor.summary())
"""
HIDEPID = "mount -t proc -o hidepid=2 none /proc"


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Trainings that hide themselves or are hidden, as another user than root. They run beside the other tests."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, to become another user")
    folder = tmp_path_factory.mktemp("watched")
    started = {
        (hidepid, when): Child(
            folder / f"{hidepid}-{when}",
            WATCHED,
            when,
            prefix=in_namespace(HIDEPID) if hidepid else (),
            as_nobody=True,
        )
        for hidepid, when in ((True, "never"), (True, "before"), (False, "before"), (False, "after"))
    }
    yield started
    for one in started.values():
        one.kill()


def test_proc_that_hides_others(watched, fault):
    """hidepid=2: everything is there."""
    one = watched[True, "never"]
    one.finish()
    ready, path = one.out.splitlines()[0].split()
    assert (ready, one.process.returncode, one.err) == ("True", 0, "")
    assert any("memory/tree/pss_mib" in row.cells for row in check_whole(path))
    fault("/proc is mounted with hidepid=2")


@pytest.mark.parametrize("when", ["before", "after"])
def test_not_dumpable(watched, fault, when):
    """PR_SET_DUMPABLE 0: RSS and the rest are there, PSS is not, and RSS does not pass for it."""
    one = watched[False, when]
    one.finish()
    ready, path = one.out.splitlines()[0].split()
    assert (ready, one.process.returncode, one.err) == ("True", 0, "")
    rows = check_whole(path)
    names = {name for row in rows for name in row.cells}
    assert {"memory/process/rss_mib", "memory/process/anon_mib", "memory/tree/rss_sum_mib"} <= names
    assert max(row.cells["memory/process/rss_mib"].max for row in rows) > 60
    if when == "before":
        assert "memory/tree/pss_mib" not in names
    fault(f"the training is not dumpable from {when} the start on", "PSS and stacks, which nobody may read then")


def test_hidden_from_the_agent(watched, fault):
    """Not dumpable and hidepid=2 together hide the training from its agent: nothing is sampled, and that is said."""
    one = watched[True, "before"]
    one.finish()
    assert one.process.returncode == 0
    assert one.out.startswith("False ")
    assert one.out.endswith("memtrack: nothing was sampled\n")
    assert one.err.count("\n") == 1
    assert "cannot be seen: /proc is mounted with hidepid" in one.err
    with RecordingReader(one.out.split()[1]) as reader:
        assert [event.kind for event in reader.events()] == ["error"]
    fault("the training is not dumpable and /proc has hidepid=2", "every sample, which is said")
