"""A program below ``memtrack run`` that starts memtrack goes on in the launcher's recording: one process, one agent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memtrack import config
from memtrack.agent import adoption
from memtrack.monitor import Monitor
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader

pytest.importorskip("typer")
if not hasattr(signal, "sigwaitinfo"):
    pytest.skip("memtrack run is for Linux", allow_module_level=True)


class Launched:
    """``memtrack run`` with a Python program; ``folder`` has the recordings."""

    def __init__(self, root, folder, code, options, env):
        self.folder = folder / "recordings"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "memtrack", "run", *options, "--", sys.executable, "-u", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(root), "MEMTRACK_DIR": "recordings", "NO_COLOR": "1", **env},
        )

    def line(self, expected=None):
        """The next line of the program."""
        found = self.process.stdout.readline().strip()
        assert found == expected or (expected is None and found), self.process.stderr.read()
        return found

    def say(self):
        """Let the program go on."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def agents(self):
        """The pids of all agents for recordings in the folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = entry.read_bytes()
            except OSError:
                continue
            if b"agent/__main__.py" in text and os.fsencode(self.folder) in text:
                found.append(int(entry.parent.name))
        return found

    def paths(self):
        """The recordings."""
        return sorted(map(str, self.folder.glob("*.mtk")))

    def path(self):
        """The only recording."""
        (path,) = self.paths()
        return path

    def finish(self):
        """What was said on stderr, at the end."""
        _, err = self.process.communicate(timeout=30)
        return err


@pytest.fixture
def launch(tools, tmp_path):
    """``launch(code, *options, **environment)``; see :class:`Launched`."""
    launched = []

    def start(code, *options, **env):
        folder = tmp_path / str(len(launched))
        folder.mkdir()
        launched.append(Launched(tools.root, folder, code, options, env))
        return launched[-1]

    yield start
    for one in launched:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        for stream in (one.process.stdin, one.process.stdout, one.process.stderr):
            stream.close()


def contents(path):
    """What a finished recording must be like, whatever has happened: its events, and the names of its phases."""
    with RecordingReader(path) as reader:
        assert reader.head().state == layout.ENDED
        numbers = [number for row in reader.windows() for number in range(row.first, row.last + 1)]
        assert numbers == list(range(len(numbers)))
        ends = [row.end_ns for row in reader.windows()]
        assert ends == sorted(ends)
        return [(event.kind, event.text) for event in reader.events()], set(reader.phases())


PROGRAM = """
import os, sys, time, memtrack
print(os.getpid()); sys.stdin.readline()
monitor = memtrack.start()
with memtrack.phase("work"):
    memtrack.step(7)
    memtrack.mark("after the start")
    print("started"); sys.stdin.readline()
memtrack.step(9)
sys.exit(4)
"""


def test_one_recording_and_one_agent(launch, tools):
    """The second agent relieves the first within a tick: nobody is doubled, nothing is missing, all marks are there."""
    launched = launch(PROGRAM, "--interval", "0.1")
    launched.line()
    first = tools.agent_of(tools.wait_until(launched.path))
    with RecordingReader(launched.path()) as reader:
        tools.wait_until(lambda: reader.head().windows >= 3)
        assert (reader.fields["own"], reader.fields["stacks"]) == ("0", "off")
        launched.say()
        launched.line("started")
        tools.wait_until(lambda: reader.head().agent_pid != first)
        tools.wait_until(lambda: len(launched.agents()) == 1)
        assert launched.agents() == [reader.head().agent_pid]
        before = reader.head().windows
        tools.wait_until(lambda: reader.head().windows >= before + 5)
        starts = [row.start_ns for row in reader.windows()]
        ends = [row.end_ns for row in reader.windows()]
        holes_ms = [(start - end) / 1e6 for start, end in zip(starts[1:], ends[:-1], strict=True)]
        assert 0.0 < max(holes_ms) < 100.0
        assert sum(hole > 0.0 for hole in holes_ms) == 1
    launched.say()
    err = launched.finish()
    assert launched.process.returncode == 4
    events, phases = contents(launched.path())
    # the mark was noted by whichever of the two was there
    assert sorted(kind for kind, _ in events) == ["exit", "mark", "start", "start"]
    assert phases == {"", "work"}
    with RecordingReader(launched.path()) as reader:
        assert reader.verdict().exit_code == 4
        assert reader.place().step == 9
        fields = reader.fields
    assert (fields["own"], fields["stacks"], fields["adopted"]) == ("1", "main", "1")
    assert fields["python"] == "{}.{}".format(*sys.version_info)
    assert "work" in err
    assert "the process ended with exit code 4" in err
    assert "gap" not in err


def test_stopped_and_started_again(launch, tools):
    """After the program's stop the launcher's recording goes on; a second monitor takes it over again."""
    code = """
import os, sys, time, memtrack
for turn in range(2):
    with memtrack.start() as monitor:
        memtrack.epoch(turn)
        memtrack.gauge("memory/cache/used_mib", turn)
        with memtrack.phase("work"), memtrack.phase(f"part {turn}"):
            time.sleep(0.5)
        memtrack.mark(f"turn {turn}")
        time.sleep(0.3)
print(monitor.path); sys.stdin.readline()
"""
    launched = launch(code, "--interval", "0.1")
    path = launched.line()
    assert [path] == launched.paths()
    time.sleep(0.3)
    assert len(launched.agents()) == 1
    launched.say()
    launched.finish()
    assert launched.process.returncode == 0
    events, phases = contents(path)
    assert [text for kind, text in events if kind == "mark"] == ["turn 0", "turn 1"]
    assert phases == {"", "work", "work/part 0", "work/part 1"}
    with RecordingReader(path) as reader:
        assert reader.names()[1:] == ["memory/cache/used_mib", "work", "work/part 0", "turn 0", "work/part 1", "turn 1"]
        assert reader.phases()["work"].end_ns > reader.phases()["work/part 0"].end_ns
        assert list(reader.windows())[-1].cells["memory/cache/used_mib"].last == 1.0


def test_another_program_in_the_same_process(launch):
    """After an exec the process is the same: the new program goes on in the recording."""
    code = """
import os, sys, time, memtrack
monitor = memtrack.start()
with memtrack.phase(sys.argv[1] if sys.argv[1:] else "first"):
    time.sleep(0.5)
    if not sys.argv[1:]:
        os.execv(sys.executable, [sys.executable, "-c", os.environ["CODE"], "second"])
"""
    launched = launch(code, "--interval", "0.1", CODE=code)
    launched.finish()
    assert launched.process.returncode == 0
    assert contents(launched.path())[1] == {"", "first", "second"}


OTHERS = {
    "another interval": "memtrack.start(interval=0.2)",
    "another folder": "memtrack.start(directory='elsewhere')",
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_settings(launch, tools, how):
    """What the launcher's recording cannot give has a recording of its own; the launcher's is as it was."""
    code = f"import time, memtrack; monitor = {OTHERS[how]}; time.sleep(0.5); print(monitor.path)"
    launched = launch(code, "--interval", "0.1")
    own = launched.line()
    launched.finish()
    (path,) = {*launched.paths()} - {own}
    contents(path)
    with RecordingReader(path) as reader:
        assert (reader.fields["own"], reader.fields["interval_s"]) == ("0", "0.1")
        assert "adopted" not in reader.fields
    tools.wait_until(lambda: RecordingReader(own).head().state == layout.ENDED)
    contents(own)


def test_a_launcher_that_is_slow(run_child, tools, tmp_path):
    """The program asks for the recording before it has been made: it waits, and does not make another one."""
    code = "import memtrack; monitor = memtrack.start(); print(monitor.path, flush=True); sys.stdin.readline()"
    child = run_child(code, env={**os.environ, "MEMTRACK_RUN": adoption.announcement(str(tmp_path))})
    time.sleep(0.4)
    assert not list(tmp_path.glob("*.mtk"))
    monitor = Monitor(config.resolve({}), pid=child.pid)
    assert child.stdout.readline().strip() == monitor.path
    tools.wait_until(lambda: len(list(tmp_path.glob("*.mtk"))) == 1)
    child.stdin.write("\n")
    child.stdin.flush()
    # it is collected afterwards, as `memtrack run` does
    with RecordingReader(monitor.path) as reader:
        tools.wait_until(lambda: reader.head().state == layout.ENDED)
        assert reader.fields["adopted"] == "1"
        assert reader.verdict().exit_code == 0
    child.communicate(timeout=20)
    monitor.stop()


def test_from_another_folder(launch):
    """A relative folder is the launcher's, wherever the program has gone."""
    launched = launch("import os, time, memtrack; os.chdir('/'); print(memtrack.start().path); time.sleep(0.3)")
    path = launched.line()
    launched.finish()
    assert launched.paths() == [path]


def test_an_agent_that_hangs_is_not_doubled(launch, tools):
    """Who is to relieve it waits; killed meanwhile, it is waited for no more, and the one that was there goes on."""
    launched = launch(PROGRAM, "--interval", "0.1")
    launched.line()
    first = tools.agent_of(tools.wait_until(launched.path))
    os.kill(first, signal.SIGSTOP)
    try:
        launched.say()
        launched.line("started")
        (second,) = tools.wait_until(lambda: {*launched.agents()} - {first})
        with RecordingReader(launched.path()) as reader:
            tools.wait_until(lambda: reader.control(layout.RELIEF) == second)
        os.kill(second, signal.SIGKILL)
        tools.wait_until(lambda: tools.is_gone(second))
    finally:
        os.kill(first, signal.SIGCONT)
    with RecordingReader(launched.path()) as reader:
        before = reader.head().windows
        tools.wait_until(lambda: reader.head().windows >= before + 3)
        assert reader.head().agent_pid == first
    launched.say()
    launched.finish()
    assert launched.process.returncode == 4
    assert contents(launched.path())[1] == {"", "work"}


def test_killed_at_any_moment(launch, tools, fault):
    """Whenever the program is killed on the way, the one recording is whole, and an agent has seen it die."""
    rng = random.Random(20)
    taken_over = 0
    for _ in range(16):
        launched = launch(PROGRAM, "--interval", "0.1")
        child = int(launched.line())
        tools.wait_until(launched.paths)
        launched.say()
        time.sleep(rng.uniform(0.0, 0.35))
        os.kill(child, signal.SIGKILL)
        launched.finish()
        assert launched.process.returncode == -signal.SIGKILL
        events, _ = contents(launched.path())
        with RecordingReader(launched.path()) as reader:
            verdict = reader.verdict()
            assert verdict is not None
            assert (verdict.kind, verdict.signal) == ("unknown_sigkill", 9)
        starts = [kind for kind, _ in events].count("start")
        taken_over += starts == 2
        tools.wait_until(lambda launched=launched: not launched.agents())
    assert 2 <= taken_over <= 14, "the moments were on both sides of it"
    fault("the program is killed while its recording is taken over from memtrack run")
