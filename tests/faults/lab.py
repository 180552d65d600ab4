"""Training processes that come to grief, each beside one of the same program without memtrack, to tell the delay."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import memtrack
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from memtrack.sinks.feeds import holds

ROOT = Path(memtrack.__file__).parents[1]

START = f"""
import atexit, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import memtrack
"""

NOBODY = [
    *("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"),
    *("--inh-caps", "+dac_override,+dac_read_search", "--ambient-caps", "+dac_override,+dac_read_search"),
]
"""Runs what follows as a user who may read every file, as the interpreter may be root's, and nothing else."""


class Child:
    """A Python program that can import memtrack, and a folder of its own for what it leaves."""

    def __init__(self, folder, code, *arguments, prefix=(), environment=None, as_nobody=False, **options):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._is_nobodys = as_nobody
        if as_nobody:
            prefix = [*prefix, *NOBODY]
            self.folder = Path(tempfile.mkdtemp())  # the folders of pytest are closed to others
            os.chown(self.folder, 65534, 65534)
        self.recordings = self.folder / "recordings"
        script = self.folder / "train.py"
        script.write_text(START + code)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTRACK_")}
        environment = {**kept, "MEMTRACK_DIR": str(self.recordings), "MEMTRACK_SELECTIVE": "0", **(environment or {})}
        command = [*prefix, sys.executable, "-I", "-S", str(script), *map(str, arguments)]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment, text=True, **options)

    def read(self):
        """The next line that it prints."""
        line = self.process.stdout.readline()
        assert line, f"it said nothing; stderr:\n{self.process.communicate()[1]}"
        return line.strip()

    def say(self, line="go"):
        """Give it a line to read."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def finish(self, timeout_s=30):
        """Wait for its end; what it has printed since."""
        self.out, self.err = self.process.communicate(timeout=timeout_s)
        return self.out

    def made(self):
        """Its recordings, oldest first."""
        return sorted(self.recordings.glob("*.mtk"), key=lambda path: path.stat().st_mtime)

    @property
    def recording(self):
        """Its one recording."""
        (path,) = self.made()
        return str(path)

    def kill(self):
        """Make sure that it has gone."""
        if self.process.poll() is None:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except OSError:
                    pass
        self.process.wait()
        if self._is_nobodys:
            shutil.rmtree(self.folder, ignore_errors=True)


def until(condition, timeout_s=20.0, pause_s=0.01):
    """Wait until it is true, and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(pause_s)
    raise AssertionError(f"not within {timeout_s} s")


def ended(path, timeout_s=10.0):
    """Wait until the agent has finished a recording; its state."""
    with RecordingReader(path) as reader:
        return until(lambda: reader.head().state in (layout.STOPPED, layout.ENDED) and reader.head().state, timeout_s)


def check_whole(path):
    """No window is missing, none is told twice, and each begins where the one before ended. Returns them."""
    with RecordingReader(path) as reader:
        rows = list(reader.windows())
        assert rows, "nothing was recorded"
        number, end_ns = rows[0].first, rows[0].start_ns
        assert number == 0
        for row in rows:
            assert (row.first, row.start_ns) == (number, end_ns)
            assert row.end_ns >= row.start_ns
            number, end_ns = row.last + 1, row.end_ns
        assert reader.head().windows == number
    return rows


def lines_of(path):
    """The points that the sink ``jsonl`` has of a recording, and its final figures, None if they are not there yet."""
    points, figures = [], None
    try:
        text = Path(path).with_suffix(".jsonl").read_text()
    except FileNotFoundError:
        return [], None
    for line in text.splitlines():
        found = json.loads(line)
        if "figures" in found:
            figures = found["figures"]
        else:
            points.append((found["name"], found["timestamp_ms"], found["value"]))
    return points, figures


def check_delivered(path, timeout_s=30.0):
    """Every window of the one feed is in the file of the sink ``jsonl``, once, whoever has brought it there."""
    until(lambda: lines_of(path)[1] is not None, timeout_s, 0.05)
    points, figures = lines_of(path)
    name = "memory/process/rss_mib"
    got = [(stamp, value) for found, stamp, value in points if found == name]
    with RecordingReader(path) as reader:
        (feed,) = reader.feeds()
        mine = [row for row in reader.windows() if holds(feed, row) and name in row.cells]
        assert (feed.done, feed.dropped) == (True, 0)
    assert got == [(round(row.end_wall_ns / 1e6), row.cells[name].mean) for row in mine]
    return figures
