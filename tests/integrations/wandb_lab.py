"""Real offline runs of W&B, by its own core, in processes of their own, read back with W&B's own reader."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from memtrack_wandb._stream import series_key

from memtrack import metrics
from tests.integrations.mlflow_lab import points, rows, scripts

WANDB = os.path.join(os.path.dirname(sys.executable), "wandb")

SETTINGS = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "1"}

SIGNS = {"proc.memory.rssMB/l:memtrack", "proc.memory.rssMB/l:peak", "proc.memory.rssMB/l:tree-pss"}


@dataclass
class Run:
    """What the files of a run hold, of one folder or of several with the same id."""

    records: list[dict[str, Any]]

    def of(self, kind):
        """The records of a kind."""
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def stats(self):
        """``[(time in ms, {key: value})]``: the records of the stream that have something of memtrack."""
        found = []
        for record in self.of("stats"):
            ours = {key: value for key, value in record["item"].items() if key.startswith("memory/") or "/l:" in key}
            if ours:
                found.append((milliseconds(record["timestamp"]), ours))
        return found

    @property
    def series(self):
        """``key -> [(time in ms, value)]`` of memtrack's series, in the order of time."""
        found: dict[str, list[tuple[int, float]]] = {}
        for timestamp, items in sorted(self.stats, key=lambda record: record[0]):
            for key, value in items.items():
                found.setdefault(key, []).append((timestamp, value))
        return found

    @property
    def own_keys(self):
        """The keys of what W&B measures itself."""
        return {key for record in self.of("stats") for key in record["item"]} - set(self.series)

    @property
    def history(self):
        """``[(step, {key: value})]`` as the user has logged it."""
        return [
            (row["step"]["num"], {key: value for key, value in row["item"].items() if not key.startswith("_")})
            for row in self.of("history")
        ]

    @property
    def summary(self):
        """The summary after the last record."""
        found: dict[str, Any] = {}
        for record in self.of("summary"):
            found.update(record["update"])
        return found

    @property
    def exit_codes(self):
        """One for each folder that was finished; W&B leaves out a 0 in some versions."""
        return [record.get("exit_code", 0) for record in self.of("exit")]


def milliseconds(text):
    """A time of W&B's reader as milliseconds of Unix time."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp()
    return round(1000 * (seconds + float(f"0.{fraction or 0}")))


def folders(root, run_id):
    """The folders of a run, oldest first."""
    paths = Path(root).glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    return sorted((path.parent for path in paths), key=lambda path: (len(path.name), path.name))


def inspect(path):
    """The records of one folder, read by W&B; none from a file that nothing was written to."""
    (file,) = Path(path).glob("*.wandb")
    # what `wandb leet inspect` starts, a second sooner
    spec = find_spec("wandb")
    core = os.path.join(os.path.dirname(spec.origin), "bin", "wandb-core")
    done = subprocess.run(
        [core, "leet", "inspect", "--no-observability", "--json", "--run-file", str(file), str(file.parent.parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def read_run(root, run_id, timeout=20.0):
    """A run, from all its folders. W&B writes the last of it, the exit code, a moment after ``finish()``."""
    deadline = time.monotonic() + timeout
    while True:
        run = Run([record for path in folders(root, run_id) for record in inspect(path)])
        if run.exit_codes or time.monotonic() > deadline:
            return run
        time.sleep(0.2)


def expected(found, writer=""):
    """``key -> [(time in ms, value)]``: what the default charts of these windows must show."""
    return {series_key(name, writer): series for name, series in points(found).items()}


def check_run(run, recording, since, until, *, slack_s=0.15, outer_s=0.3, writer=""):
    """Assert that a run has every window of the recording between two times, once, and none from outside of them.

    Windows within ``slack_s`` inside of the two times, or ``outer_s`` outside of them, may be there or not: the script
    notes its times a little after the start and before the end. ``writer`` is the label of the process. Returns the
    run's series.
    """
    series = run.series
    must = expected(rows(recording, since + slack_s, until - slack_s), writer)
    may = expected(rows(recording, since - outer_s, until + outer_s), writer)
    assert must, "no windows in that time"
    assert set(must) <= set(series) <= set(may)
    for key, got in series.items():
        assert len({timestamp for timestamp, _ in got}) == len(got), f"{key} has points twice"
        assert not set(must.get(key, ())) - set(got), f"{key} lacks windows"
        assert not set(got) - set(may[key]), f"{key} has points of no window of this run"
    assert set(must) >= {sign.replace("/l:", f"/l:{writer}-") if writer else sign for sign in SIGNS}
    assert metrics.RSS not in series
    return series


@pytest.fixture
def wandb_train(tmp_path):
    """``wandb_train(source, **environment)`` runs a script like the fixture ``train``, W&B offline in ``tmp_path``."""
    with scripts(tmp_path) as train:
        yield in_folder(train, tmp_path)


def in_folder(train, folder):
    """What runs scripts with W&B's files in a folder."""

    def run(source, *, wait=True, check=True, **env):
        return train(source, None, wait=wait, check=check, **{**SETTINGS, "WANDB_DIR": str(folder), **env})

    return run


# -- W&B's terminal UI --------------------------------------------------------------------------------------------


def screen_of(path, *, rows, columns, until, timeout=30.0, **environment):
    """The terminal, as pyte has it, on which ``wandb leet run`` shows a run, once ``until`` is there and nothing
    changes."""
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", **environment)
        os.execv(WANDB, [WANDB, "leet", "run", str(path)])
    try:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not select.select([fd], [], [], 1.0)[0]:
                if any(until in line for line in screen.display):
                    break
                continue
            # what a terminal is asked, and some modes, are more than the emulator understands
            stream.feed(re.sub(rb"\x1b\[[<>=?][0-9;]*[$a-zA-Z]p?|\x1bP.*?\x1b\\", b"", os.read(fd, 1 << 16)))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(fd)
    return screen


def draw(path, *, rows=56, columns=200, until="Process Memory (B)"):
    """What ``wandb leet run`` shows, as lines of text; see ``screen_of``."""
    return [line.rstrip() for line in screen_of(path, rows=rows, columns=columns, until=until).display]


def chart(lines, title):
    """The lines of the chart with a title."""
    for top, line in enumerate(lines):
        left = line.find(title)
        if left >= 0:
            right = line.find("│", left)
            bottom = next(at for at in range(top, len(lines)) if lines[at][left - 1 : left] in ("╰",))
            return [row[left:right] for row in lines[top:bottom]]
    raise AssertionError(f"{title} is not drawn:\n" + "\n".join(lines))
