"""Real processes for the tests: started, followed, killed, and gone at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memtrack
from memtrack.recording.reader import RecordingReader
from tests.integrations.mlflow_lab import _server, mlflow_server, mlflow_template, train

__all__ = ["_server", "mlflow_server", "mlflow_template", "train"]

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

ROOT = Path(memtrack.__file__).parents[1]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has collected yet counts as ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return True
    return text[text.rindex(b")") + 2 :][:1] in (b"Z", b"X")


class Tools:
    """Waiting with a deadline, and looking at processes."""

    root = ROOT
    is_gone = staticmethod(is_gone)

    @staticmethod
    def wait_until(condition, timeout_s=10.0, pause_s=0.002):
        """Wait until ``condition()`` is true, and return what it gave; fail when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(pause_s)
        raise AssertionError(f"not within {timeout_s} s: {condition}")

    @staticmethod
    def recordings(folder):
        """The recordings in a folder, oldest first."""
        return sorted(Path(folder).glob("*.mtk"), key=lambda path: path.stat().st_mtime)

    @staticmethod
    def status(pid, label):
        """A field of ``/proc/PID/status``, as text."""
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(label + ":"):
                return line.partition(":")[2].strip()
        raise KeyError(label)

    @staticmethod
    def agent_of(path):
        """The pid of the agent that fills a recording, once it has said so."""
        with RecordingReader(str(path)) as reader:
            return Tools.wait_until(lambda: reader.head().agent_pid)


@pytest.fixture
def tools():
    return Tools


@pytest.fixture
def run_child(tmp_path):
    """Starts Python programs that can import memtrack and nothing else; all of them are dead after the test."""
    children: list[subprocess.Popen] = []

    def run(code, *arguments, flags=("-I", "-S"), **options):
        script = tmp_path / f"child-{len(children)}.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
        child = subprocess.Popen([sys.executable, *flags, str(script), *map(str, arguments)], **options)
        children.append(child)
        return child

    yield run
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait(timeout=20)
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of its own: ``small_disk(options)`` gives its folder."""
    mounted = []

    def mount(options):
        if os.geteuid() != 0:
            pytest.skip("needs root, to mount a file system")
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "memtrack-test", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        # an agent that has said that it is done still has its files open for a moment
        Tools.wait_until(lambda folder=folder: not subprocess.run(["umount", str(folder)], check=False).returncode, 5.0)
