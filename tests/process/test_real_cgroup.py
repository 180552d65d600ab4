"""Limits and usage of a child in real, nested memory cgroups made for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memtrack import metrics
from memtrack.collectors.cgroup import container_collectors
from memtrack.collectors.limits import Level, cgroup_levels, resolve

LIMIT_MIB = 400
CHILD = """
import sys
print("ready", flush=True)
held = []
for line in sys.stdin:
    held.append(b"x" * (int(line) << 20))
    print("held", flush=True)
"""


class Nest:
    """An outer cgroup of 400 MiB and an inner one without limit."""

    def __init__(self, own: Level, outer: Path) -> None:
        self.version = own.version
        self.outer = outer
        self.inner = outer / "inner"
        self.inner.mkdir()
        self.source = f"cgroup v{own.version} {own.name.rstrip('/')}/{outer.name} {own.limit_file}"

    def enter(self, pid: int) -> None:
        (self.inner / "cgroup.procs").write_text(str(pid))


def remove(directory: Path) -> None:
    """A cgroup is busy for a moment after its last process has gone."""
    deadline = time.monotonic() + 5.0
    while directory.exists():
        try:
            directory.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.fixture
def nest():
    """Nested cgroups under the one this process is in; removed afterwards."""
    levels = cgroup_levels(os.getpid())
    if not levels:
        pytest.skip("no memory cgroup is visible on this machine")
    own = levels[0]
    outer = Path(own.directory) / f"memtrack-test-{os.getpid()}"
    try:
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a cgroup in {own.directory}: {error.strerror}")
    try:
        try:
            (outer / own.limit_file).write_text(str(LIMIT_MIB << 20))
            if own.version == 2:
                (outer / "cgroup.subtree_control").write_text("+memory")
            made = Nest(own, outer)
        except OSError as error:
            pytest.skip(f"the memory controller cannot be used below {own.directory}: {error.strerror}")
        yield made
    finally:
        remove(outer / "inner")
        remove(outer)


@pytest.fixture
def child(nest):
    """A Python process in the inner cgroup: it is written a number of MiB, allocates them, and answers."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    with process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            nest.enter(process.pid)
            yield process
        finally:
            process.kill()


def hold(child: subprocess.Popen[str], mib: int) -> str:
    """The child's answer, "" if it died over it."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{mib}\n")
    return child.stdout.readline()


def test_outer_limit_binds(nest, child):
    """The resolver finds the 400 MiB of the outer level although the child's own cgroup is unlimited."""
    limits = resolve(child.pid)
    assert limits.binding is not None
    assert (LIMIT_MIB, nest.source) == (limits.binding.mib, limits.binding.source)
    assert limits.levels[0].limit is None
    headroom = limits.headroom()
    assert headroom is not None
    assert headroom.limit is limits.binding


def test_allocation_moves_usage(nest, child):
    """100 MiB allocated by the child raise usage, working set and high-water by about that, and headroom falls."""
    usage, stat = container_collectors(child.pid)
    before = {**dict(stat.collect(0)), **dict(usage.collect(0))}
    assert before[metrics.CONTAINER_LIMIT] == LIMIT_MIB
    assert hold(child, 100) == "held\n"
    after = {**dict(stat.collect(1)), **dict(usage.collect(1))}
    peak = dict(usage.high_water())
    usage.close()
    stat.close()

    risen = after[metrics.CONTAINER_USAGE] - before[metrics.CONTAINER_USAGE]
    assert risen == pytest.approx(100, abs=8)
    assert after[metrics.CONTAINER_WORKING_SET] - before[metrics.CONTAINER_WORKING_SET] == pytest.approx(100, abs=8)
    assert after[metrics.CONTAINER_ANON] == pytest.approx(100, abs=8)
    assert before[metrics.CONTAINER_HEADROOM] - after[metrics.CONTAINER_HEADROOM] == pytest.approx(25, abs=2)
    assert nest.source == usage.nearest
    if peak:
        assert peak[metrics.CONTAINER_USAGE] >= after[metrics.CONTAINER_USAGE] - 1


def test_kill_is_counted(nest, child):
    """A kill at the outer limit is counted although v1 books it in the inner cgroup, and after the child has gone."""
    if Path("/proc/swaps").read_text().count("\n") > 1:
        pytest.skip("with swap the child would be swapped out, not killed")
    usage, stat = container_collectors(child.pid)
    assert dict(stat.collect(0))[metrics.CONTAINER_OOM_KILLS] == 0.0
    assert hold(child, 2 * LIMIT_MIB) == ""
    assert child.wait(10) == -9
    assert dict(stat.collect(60_000_000_000))[metrics.CONTAINER_OOM_KILLS] == 1.0
    usage.close()
    stat.close()


def test_inside_a_cgroup_namespace(nest):
    """In a cgroup namespace that shows ``/`` while the mount is the outside's, the outer limit is still found."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare command")
    if subprocess.run(["unshare", "-C", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this process may not make a cgroup namespace")
    package_root = Path(sys.modules["memtrack.metrics"].__file__ or "").parents[1]
    script = (
        f"import os, sys; sys.path.insert(0, {str(package_root)!r})\n"
        "from memtrack.collectors.limits import resolve\n"
        "binding = resolve(os.getpid()).binding\n"
        "print(binding.mib, binding.source)\n"
    )
    shell = f'echo $$ > "{nest.inner}/cgroup.procs" && exec unshare -C "$0" -I -S -c "$1"'
    answer = subprocess.run(
        ["sh", "-c", shell, sys.executable, script], capture_output=True, text=True, check=True, timeout=30
    )
    mib, source = answer.stdout.strip().split(" ", 1)
    assert float(mib) == LIMIT_MIB
    assert source.endswith(f"/{nest.outer.name} {nest.source.rpartition(' ')[2]}")
