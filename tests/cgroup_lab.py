"""Memory cgroups with a limit, made for a test, in which real processes are really killed."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from memtrack.collectors.limits import cgroup_levels


class Group:
    """A memory cgroup with a limit."""

    def __init__(self, directory: Path, version: int, name: str) -> None:
        self.directory = directory
        self.version = version
        self.name = name
        self.procs = directory / "cgroup.procs"
        self.usage = directory / ("memory.usage_in_bytes" if version == 1 else "memory.current")

    def kills(self) -> int:
        """How many processes were killed in it out of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return int(re.search(r"^oom_kill (\d+)", (self.directory / name).read_text(), re.MULTILINE)[1])  # type: ignore[index]


def remove(directory: Path) -> None:
    """A cgroup is busy until its last process has gone: an agent does by itself, a worker of a failed test does not."""
    started = time.monotonic()
    while directory.exists():
        try:
            directory.rmdir()
        except OSError:
            if time.monotonic() > started + 10.0:
                raise
            if time.monotonic() > started + 3.0:
                for pid in (directory / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)


@pytest.fixture
def make_group():
    """Makes cgroups with a limit; removed afterwards."""
    levels = cgroup_levels(os.getpid())
    if not levels:
        pytest.skip("no memory cgroup is visible on this machine")
    if Path("/proc/swaps").read_text().count("\n") > 1:
        pytest.skip("with swap nothing would be killed")
    own, made = levels[0], []

    def make(limit_mib: int = 160) -> Group:
        name = f"memtrack-oom-{os.getpid()}-{len(made)}"
        directory = Path(own.directory) / name
        try:
            directory.mkdir()
            made.append(directory)
            (directory / own.limit_file).write_text(str(limit_mib << 20))
        except OSError as error:
            pytest.skip(f"cannot make a cgroup in {own.directory}: {error.strerror}")
        return Group(directory, own.version, f"{own.name.rstrip('/')}/{name}")

    yield make
    for directory in made:
        remove(directory)
