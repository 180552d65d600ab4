"""``memtrack run`` and ``memtrack attach`` with real processes, signals and a terminal."""

from __future__ import annotations

import glob
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memtrack
from memtrack.recording.reader import RecordingReader

pytest.importorskip("typer")
pytest.importorskip("rich")
if not hasattr(signal, "sigwaitinfo"):
    pytest.skip("memtrack run is for Linux", allow_module_level=True)

MEMTRACK = [sys.executable, "-m", "memtrack"]
SETTLED = "too short to be sampled"

# Writes a line for each signal, and exits with status 5 after the one that is named last.
TRAP = """
import signal, sys, time
names = sys.argv[1:]
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    if signal.Signals(number).name == names[-1]:
        time.sleep(0.2)  # time for a second delivery, were there one
        sys.exit(5)
for name in names:
    signal.signal(getattr(signal, name), note)
print("ready", flush=True)
while True:
    time.sleep(10)
"""


@pytest.fixture
def environment(tmp_path):
    """The tested package, and recordings in a folder of the test's own."""
    root = Path(memtrack.__file__).parents[1]
    roots = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": roots, "MEMTRACK_DIR": str(tmp_path / "recordings"), "NO_COLOR": "1"}


@pytest.fixture
def run(environment, tmp_path):
    """Run a verb to its end."""

    def call(*arguments, **variables):
        return subprocess.run(
            [*MEMTRACK, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={**environment, **variables},
        )

    return call


@pytest.fixture
def start(environment, tmp_path):
    """Start something; it is killed at the end of the test if need be."""
    started = []

    def call(*arguments, **options):
        process = subprocess.Popen(
            arguments,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment,
            **options,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        # not read to the end: the command may hold the pipes
        with process:
            pass


def made(tmp_path):
    """The recordings that were made, oldest first."""
    return sorted(glob.glob(str(tmp_path / "recordings" / "*.mtk")), key=os.path.getmtime)


def until(condition, timeout_s=20.0):
    """Wait until it is true, and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to pass in time")


def has_samples(path):
    with RecordingReader(path) as reader:
        return bool(reader.pulse().mono_ns)


# -- exit status ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 3])
def test_exit_status_is_that_of_the_command(run, status):
    """Whoever starts `memtrack run` learns what it would have learned from the command itself."""
    done = run("run", "--", "sh", "-c", f"echo out; echo err >&2; exit {status}")
    assert done.returncode == status
    assert done.stdout == "out\n"
    assert done.stderr.startswith("err\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_death_by_signal_is_passed_on(run, number):
    """If a signal kills the command, memtrack dies of the same, so that shells see 128+n and schedulers the signal."""
    done = run("run", "--", "sh", "-c", f"kill -{number.value} $$")
    assert done.returncode == -number


def test_no_second_core_dump(run, tmp_path):
    """The core dump of the command is the one that matters; memtrack leaves none of its own."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        done = run("run", "--", "sh", "-c", "ulimit -c 0; kill -QUIT $$")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    assert done.returncode == -signal.SIGQUIT
    assert not [name for name in os.listdir(tmp_path) if name.startswith("core")]


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [
        ("no-such-command-anywhere", 127, "there is no such command"),
        ("./plain", 126, "Permission denied"),
        ("./orphan", 127, "the interpreter in its first line does not exist"),
        (".", 126, "Permission denied"),
    ],
)
def test_command_that_cannot_be_run(run, tmp_path, command, status, text):
    """The statuses that shells give, a sentence that says why, and no recording."""
    (tmp_path / "plain").write_text("text")
    (tmp_path / "orphan").write_text("#!/no/such/interpreter\n")
    (tmp_path / "orphan").chmod(0o755)
    done = run("run", "--", command)
    assert done.returncode == status
    assert done.stderr == f"memtrack: cannot run {command}: {text}\n"
    assert made(tmp_path) == []


def test_folder_that_cannot_be_made_is_an_error_before_the_start(run, tmp_path):
    """Nothing has been started when memtrack finds that it cannot record."""
    (tmp_path / "file").write_text("")
    done = run("run", "-d", "file", "--", "touch", "started")
    assert done.returncode == 2
    assert "recordings folder" in done.stderr
    assert not (tmp_path / "started").exists()


# -- what is recorded -----------------------------------------------------------------------------------------------


def test_summary_and_recording_of_a_python_command(run, tmp_path):
    """The peak is that of the command, and the recording ends as its process did."""
    code = "import time; held = b'x' * (150 << 20); time.sleep(0.8)"
    done = run("run", "--interval", "200ms", "--", sys.executable, "-c", code)
    assert done.returncode == 0
    peak_mib = float(re.search(r"peak ([\d.]+) MiB resident", done.stderr)[1])  # type: ignore[index]
    assert 150.0 < peak_mib < 250.0
    (path,) = made(tmp_path)
    assert f"recording {os.path.relpath(path, tmp_path)}" in done.stderr
    with RecordingReader(path) as reader:
        assert reader.fields["program"] == "python -c"
        assert reader.fields["interval_s"] == "0.2"
        assert reader.head().state == 3, "ended"


def test_any_command_with_its_descendants(run):
    """It need not be Python: what counts is the tree of processes."""
    done = run("run", "--", "sh", "-c", "head -c 100000000 /dev/zero | tail -c 1; sleep 0.3")
    assert done.returncode == 0
    assert "peak" in done.stderr
    assert "recording" in done.stderr


@pytest.mark.parametrize("command", [["true"], ["sh", "-c", "exit 3"]])
def test_command_too_short_to_be_sampled(run, command):
    """It may have ended before the agent looks: that is said, and nothing else happens."""
    done = run("run", "--", *command)
    assert done.returncode == (0 if command == ["true"] else 3)
    assert "Traceback" not in done.stderr
    assert SETTLED in done.stderr or "peak" in done.stderr


def test_quiet(run, tmp_path):
    """--quiet leaves stderr to the command; the recording is made all the same."""
    done = run("run", "--quiet", "--", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(made(tmp_path)) == 1


def test_switched_off_it_only_runs_the_command(run, tmp_path):
    """With MEMTRACK_DISABLE=1 there is no agent, no summary, no recording, and not even a process in between."""
    done = run("run", "--", "sh", "-c", "echo $MEMTRACK_DISABLE; kill -TERM $$", MEMTRACK_DISABLE="1")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "1\n", "")
    assert made(tmp_path) == []
    assert run("run", "--", "no-such-command-anywhere", MEMTRACK_DISABLE="1").returncode == 127


def test_options_of_the_command_are_its_own(run):
    """Also without `--`, what comes after the command is not memtrack's."""
    done = run("run", "-q", "echo", "--quiet", "--interval", "--", "-x")
    assert done.stdout == "--quiet --interval -- -x\n"


def test_python_child_gets_the_same_settings(run, tmp_path):
    """A command that calls memtrack itself has the options of `memtrack run`; its standard input is untouched."""
    code = "import sys, memtrack.config as c; s = c.resolve({}); print(s.interval_s, s.directory, sys.stdin.read())"
    done = run("run", "-q", "--interval", "3", "-d", "other", "--", sys.executable, "-c", code)
    assert done.stdout.split() == ["3.0", str(tmp_path / "other")]


def test_signals_that_python_ignores_are_as_before(run):
    """Python ignores SIGPIPE; the command must not inherit that, nor a blocked signal."""
    done = run("run", "-q", "--", "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    for line in done.stdout.splitlines():
        assert int(line.split()[1], 16) & 0x7FFF_FFFF == 0, line  # 32 and up are the C library's own


# -- signals --------------------------------------------------------------------------------------------------------


def test_signals_are_passed_on(start):
    """Sent to memtrack alone, as schedulers do, a signal reaches the command once, and its answer counts."""
    names = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGALRM", "SIGQUIT"]
    process = start(*MEMTRACK, "run", "-q", "--", sys.executable, "-c", TRAP, *names)
    assert process.stdout.readline() == "ready\n"
    for name in names[:-1]:
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == f"{name}\n"
    process.send_signal(signal.SIGQUIT)
    out, _ = process.communicate(timeout=20)
    assert out == "SIGQUIT\n"
    assert process.returncode == 5


def test_ignored_signal_stays_ignored(start):
    """Under nohup a hangup ends neither memtrack nor the command."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    code = "import time; print('ready', flush=True); time.sleep(0.5); print('survived')"
    process = start(*MEMTRACK, "run", "-q", "--", sys.executable, "-c", code, preexec_fn=ignore)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("survived\n", 0)


def test_ctrl_c_arrives_once(environment, tmp_path, fault):
    """The terminal signals the whole foreground group: memtrack must not pass on what the command has already got."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        command = [*MEMTRACK, "run", "-q", "--", sys.executable, "-c", TRAP, "SIGINT"]
        os.execve(command[0], command, environment)
    seen = b""
    try:
        while b"ready" not in seen:
            seen += os.read(terminal, 4096)
        os.write(terminal, b"\x03")
        while True:
            chunk = os.read(terminal, 4096)
            if not chunk:
                break
            seen += chunk
    except OSError:
        pass  # the terminal has hung up
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert seen.count(b"SIGINT") == 1
    fault("Ctrl-C at a terminal, under memtrack run")


def test_waiting_takes_little_memory(start):
    """While the command runs, what is left of memtrack is a bare interpreter of one thread."""
    process = start(*MEMTRACK, "run", "-q", "--", "sleep", "20")
    status = Path(f"/proc/{process.pid}/status")
    until(lambda: "waiter.py" in Path(f"/proc/{process.pid}/cmdline").read_text())
    time.sleep(0.2)
    text = status.read_text()
    assert int(re.search(r"VmRSS:\s+(\d+)", text)[1]) < 12 * 1024  # type: ignore[index]
    assert re.search(r"Threads:\s+1\n", text)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def test_removed_recording_is_no_disaster(start, tmp_path, fault):
    """If somebody removes the recording meanwhile, the command's status still counts."""
    process = start(*MEMTRACK, "run", "--", "sh", "-c", "read line; exit 4", stdin=subprocess.PIPE)
    (path,) = until(lambda: made(tmp_path))
    until(lambda: has_samples(path))
    os.unlink(path)
    _, err = process.communicate("\n", timeout=20)
    assert process.returncode == 4
    assert "cannot open the recording" in err
    assert "Traceback" not in err
    fault("the recording is removed under memtrack run", "the recording and the summary; the exit status is right")


# -- attach, ls and report ------------------------------------------------------------------------------------------


def test_attach_until_interrupted(start, tmp_path):
    """Ctrl-C ends the watching, not the process; the summary is printed, and the status is 0."""
    watched = start("sleep", "30")
    process = start(*MEMTRACK, "attach", str(watched.pid), "--interval", "0.1")
    assert f"watching process {watched.pid}" in process.stderr.readline()
    (path,) = made(tmp_path)
    until(lambda: has_samples(path))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "peak" in out
    assert watched.poll() is None


def test_attach_until_the_process_ends(start, tmp_path):
    """When the process ends, so does the watching."""
    watched = start("sh", "-c", "read line", stdin=subprocess.PIPE)
    process = start(*MEMTRACK, "attach", str(watched.pid))
    (path,) = until(lambda: made(tmp_path))
    until(lambda: has_samples(path))
    watched.communicate("\n", timeout=20)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "peak" in out


def test_attach_follows_a_recording_that_is_being_made(start, tmp_path):
    """A process that monitors itself is not monitored twice."""
    code = "import memtrack; m = memtrack.start(); m.wait_ready(); print('ready', flush=True); input(); m.stop()"
    watched = start(sys.executable, "-c", code, stdin=subprocess.PIPE)
    assert watched.stdout.readline() == "ready\n"
    process = start(*MEMTRACK, "attach", str(watched.pid))
    assert "following the recording of" in process.stderr.readline()
    watched.communicate("\n", timeout=20)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert made(tmp_path)[0] in out
    assert len(made(tmp_path)) == 1


def test_attach_to_a_process_of_another_user(start):
    """Not permitted is said in a sentence."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    watched = start("sleep", "30")
    code = "import os, sys; from memtrack.cli.attach import check; os.setuid(65534); check(int(sys.argv[1]))"
    process = start(sys.executable, "-c", code, str(watched.pid))
    _, err = process.communicate(timeout=20)
    assert "not permitted to measure" in err
    assert "belongs to root" in err


def test_ls_while_running_and_after_the_agent_was_killed(start, run, tmp_path):
    """A recording that is being made is running; one whose agent was killed says so."""
    process = start(*MEMTRACK, "run", "-q", "--", "sleep", "8")
    (path,) = until(lambda: made(tmp_path))
    until(lambda: has_samples(path))
    assert re.search(r"sleep \(\d+\) .* running", run("ls").stdout)
    with RecordingReader(path) as reader:
        agent_pid = until(lambda: reader.head().agent_pid)
    os.kill(agent_pid, signal.SIGKILL)
    until(lambda: "lost its agent" in run("ls").stdout)
    process.terminate()
    process.communicate(timeout=20)


def test_report_on_what_was_run(run, tmp_path):
    """Terminal, JSON and picture of the newest recording."""
    pytest.importorskip("matplotlib")
    code = """
import memtrack, time
with memtrack.start(interval=0.1):
    with memtrack.phase("load"):
        held = b"x" * (100 << 20)
        time.sleep(0.4)
    with memtrack.phase("train"):
        for number in range(4):
            memtrack.step(number)
            time.sleep(0.1)
"""
    assert run("run", "-q", "--", sys.executable, "-c", code).returncode == 0
    done = run("report", "--json", "--png", "out.png")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"]["rss_mib"] > 100.0
    assert {phase["name"] for phase in found["phases"]} == {"load", "train"}
    assert found["state"] == "stopped"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    text = run("report").stdout
    assert "process/rss_mib" in text
    assert "load" in text
