"""Container usage, headroom and breakdown, on recorded machines."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from memtrack import metrics
from memtrack.collectors.cgroup import (
    RESOLVE_NS,
    CgroupStatCollector,
    CgroupUsageCollector,
    container_collectors,
)
from memtrack.collectors.procfs import HeldFile

TREES = Path(__file__).parents[1] / "data" / "proc"
PID = 4242
NESTED = "sys/fs/cgroup/memory/slurm/job_77"
V2_USER = "sys/fs/cgroup/user.slice/user-1000.slice"


def on(tree: Path) -> tuple[CgroupUsageCollector, CgroupStatCollector]:
    return container_collectors(PID, f"{tree}/proc", str(tree))


@pytest.fixture
def copy(tmp_path):
    """A recorded machine that may be changed."""

    def copy_tree(case: str) -> Path:
        return Path(shutil.copytree(TREES / case, tmp_path / case))

    return copy_tree


@pytest.mark.parametrize(
    ("case", "usage_mib", "headroom_pct", "peak_mib"),
    [
        ("v1", 137_883_648 / 2**20, 100 * 935_858_176 / 2**30, 154_402_816 / 2**20),
        ("v2", 1280.0, 100 * 79_691_776 / 2**32, 2048.0),
        ("hybrid", 131.5, 74.31640625, 154_664_960 / 2**20),
        ("nested", 137_879_552 / 2**20, 100 * (262_119_424 / 399_998_976), 154_664_960 / 2**20),
        ("namespaced", 1536.0, 25.0, 1792.0),
        ("unlimited", 137_883_648 / 2**20, 100 * (24_004_088 / 24_684_084), 154_402_816 / 2**20),
        ("v2_readonly", 2304.0, 25.0, None),
    ],
)
def test_usage(case, usage_mib, headroom_pct, peak_mib):
    """Usage of the cgroup that binds, least headroom as a share of the smallest limit, the kernel's peak if kept."""
    usage, _ = on(TREES / case)
    assert [
        (metrics.CONTAINER_USAGE, usage_mib),
        (metrics.CONTAINER_HEADROOM, pytest.approx(headroom_pct, rel=1e-12)),
    ] == usage.collect(0)
    assert ([] if peak_mib is None else [(metrics.CONTAINER_USAGE, peak_mib)]) == usage.high_water()
    usage.close()


def test_nearest():
    """The limit with the least headroom is named, here that of an ancestor with a greater limit."""
    usage, _ = on(TREES / "v2")
    usage.collect(0)
    assert usage.nearest == "cgroup v2 /user.slice/user-1000.slice memory.max"
    usage.close()


@pytest.mark.parametrize(
    ("case", "limit", "working_set", "anon", "file", "shmem", "kernel", "oom_kills"),
    [
        ("v1", 1024.0, 107.49609375, 98.87890625, 32.0, 8.0, 0.3828125, 0.0),
        ("v2", 4096.0, 1080.0, 900.0, 360.0, 8.0, 20.0, 1.0),
        ("hybrid", 512.0, 107.5, 98.87890625, 32.0, 8.0, 0.3828125, 0.0),
        ("nested", 381.46875, 107.4921875, 98.87890625, 32.0, 8.0, 0.3984375, 0.0),
        ("namespaced", 2048.0, 1436.0, 1200.0, 300.0, 24.0, 36.0, 0.0),
        ("unlimited", 24105.55078125, 107.49609375, 98.87890625, 32.0, 8.0, 0.37890625, 0.0),
        ("v2_readonly", 3072.0, 2104.0, 1800.0, 430.0, 100.0, None, 1.0),
    ],
)
def test_stat(case, limit, working_set, anon, file, shmem, kernel, oom_kills):
    """Limit and breakdown in MiB; what a kernel does not have (``kernel`` before 5.18) is absent."""
    _, stat = on(TREES / case)
    expected = {
        metrics.CONTAINER_LIMIT: limit,
        metrics.CONTAINER_WORKING_SET: working_set,
        metrics.CONTAINER_ANON: anon,
        metrics.CONTAINER_FILE: file,
        metrics.CONTAINER_SHMEM: shmem,
        metrics.CONTAINER_KERNEL: kernel,
        metrics.CONTAINER_OOM_KILLS: oom_kills,
    }
    assert {name: value for name, value in expected.items() if value is not None} == dict(stat.collect(0))
    stat.close()


def test_without_cgroup(copy):
    """Without a memory cgroup there is no usage; limit and headroom are the machine's."""
    tree = copy("unlimited")
    shutil.rmtree(tree / "sys")
    usage, stat = on(tree)
    assert [name for name, _ in usage.collect(0)] == [metrics.CONTAINER_HEADROOM]
    assert stat.collect(0) == [(metrics.CONTAINER_LIMIT, 24105.55078125)]
    assert usage.high_water() == []


def test_without_anything(tmp_path):
    """Where nothing can be read nothing is reported, never a zero."""
    usage, stat = on(tmp_path)
    assert (usage.collect(0), stat.collect(0), usage.high_water()) == ([], [], [])


def test_usage_moves(copy):
    """A tick reads the files anew through held descriptors; ``nearest`` follows."""
    tree = copy("v2")
    usage, stat = on(tree)
    usage.collect(0)
    (tree / V2_USER / "session-3.scope" / "memory.current").write_text(f"{4096 << 20}\n")
    assert usage.collect(1) == [(metrics.CONTAINER_USAGE, 4096.0), (metrics.CONTAINER_HEADROOM, 0.0)]
    assert usage.nearest == "cgroup v2 /user.slice/user-1000.slice/session-3.scope memory.max"
    usage.close()
    stat.close()


def test_working_set_is_not_negative(copy):
    """Usage lags behind the statistics at times; the working set stops at 0."""
    tree = copy("v2_readonly")
    (tree / "sys/fs/cgroup/memory.current").write_text("4096\n")
    _, stat = on(tree)
    assert dict(stat.collect(0))[metrics.CONTAINER_WORKING_SET] == 0.0
    stat.close()


def test_limit_changed_at_run_time(copy):
    """A changed limit is noticed within 10 s by both collectors, not at once: resolving is not for every second."""
    tree = copy("v2")
    usage, stat = on(tree)
    stat.collect(0)
    usage.collect(0)
    (tree / V2_USER / "memory.max").write_text("max\n")
    (tree / V2_USER / "session-3.scope" / "memory.max").write_text(f"{2560 << 20}\n")
    assert dict(stat.collect(RESOLVE_NS - 1))[metrics.CONTAINER_LIMIT] == 4096.0
    assert dict(stat.collect(RESOLVE_NS))[metrics.CONTAINER_LIMIT] == 2560.0
    assert dict(usage.collect(RESOLVE_NS))[metrics.CONTAINER_HEADROOM] == 50.0
    usage.close()
    stat.close()


def test_available_memory_is_refreshed_by_the_slow_collector(copy):
    """Where only physical memory binds, headroom is as of the last second."""
    tree = copy("unlimited")
    usage, stat = on(tree)
    meminfo = (tree / "proc/meminfo").read_text().replace("MemAvailable:   24004088", "MemAvailable:   12342042")
    (tree / "proc/meminfo").write_text(meminfo)
    assert dict(usage.collect(0))[metrics.CONTAINER_HEADROOM] > 90.0
    stat.collect(0)
    assert dict(usage.collect(0))[metrics.CONTAINER_HEADROOM] == 50.0
    usage.close()
    stat.close()


def test_high_water_after_another_level_binds(copy):
    """The old peak of a cgroup that only now binds is no rise of the metric; a new one is."""
    tree = copy("nested")
    usage, stat = on(tree)
    stat.collect(0)
    usage.collect(0)
    first = usage.high_water()
    (tree / NESTED / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tree / "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes").write_text("900000000\n")
    stat.collect(RESOLVE_NS)
    assert dict(usage.collect(RESOLVE_NS))[metrics.CONTAINER_USAGE] == 205_430_784 / 2**20
    assert first == usage.high_water()
    (tree / "sys/fs/cgroup/memory/slurm/memory.max_usage_in_bytes").write_text("314572800\n")
    assert usage.high_water() == [(metrics.CONTAINER_USAGE, 300.0)]
    usage.close()
    stat.close()


def test_v1_kills_are_summed_up_to_the_binding_level(copy):
    """v1 counts a kill in the victim's own cgroup even if an ancestor's limit was hit; both are asked."""
    tree = copy("nested")
    for name, kills in (("step_0/", 2), ("", 1), ("../", 40)):
        text = f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
        (tree / NESTED / f"{name}memory.oom_control").write_text(text)
    _, stat = on(tree)
    assert dict(stat.collect(0))[metrics.CONTAINER_OOM_KILLS] == 3.0
    stat.close()


def test_kernel_without_kill_count(copy):
    """Before 4.13 ``memory.oom_control`` has no count of kills: absent, not zero."""
    tree = copy("v1")
    (tree / "sys/fs/cgroup/memory/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\n")
    _, stat = on(tree)
    assert metrics.CONTAINER_OOM_KILLS not in dict(stat.collect(0))
    stat.close()


@pytest.mark.parametrize("statm", ["0 0 0 0 0 0 0\n", None])
def test_dead_process_keeps_its_cgroup(copy, statm):
    """v1 shows a zombie in the root cgroup; what it was killed in is still watched, for the count of kills."""
    tree = copy("nested")
    usage, stat = on(tree)
    stat.collect(0)
    usage.collect(0)
    (tree / f"proc/{PID}/cgroup").write_text("3:memory:/\n")
    if statm is None:
        shutil.rmtree(tree / f"proc/{PID}")
    else:
        (tree / f"proc/{PID}/statm").write_text(statm)
    (tree / NESTED / "step_0/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert dict(stat.collect(2 * RESOLVE_NS))[metrics.CONTAINER_OOM_KILLS] == 1.0
    assert dict(usage.collect(2 * RESOLVE_NS))[metrics.CONTAINER_USAGE] == 137_879_552 / 2**20
    usage.close()
    stat.close()


def test_process_moved(copy):
    """A process that was moved to another cgroup is followed there."""
    tree = copy("nested")
    usage, stat = on(tree)
    stat.collect(0)
    (tree / f"proc/{PID}/cgroup").write_text("3:memory:/slurm\n")
    assert dict(stat.collect(RESOLVE_NS))[metrics.CONTAINER_LIMIT] == 24105.55078125
    assert dict(usage.collect(RESOLVE_NS))[metrics.CONTAINER_USAGE] == 205_430_784 / 2**20
    usage.close()
    stat.close()


class Gone(HeldFile):
    """Stands in for a held file whose cgroup was removed: the kernel answers ENODEV."""

    def __init__(self) -> None:
        super().__init__("/dev/null")

    def read(self) -> bytes:
        raise OSError(errno.ENODEV, "No such device")


def test_removed_cgroup(copy):
    """A removed cgroup is an OSError at that turn, and is looked for anew at the next, even under the same path."""
    usage, stat = on(copy("nested"))
    stat.collect(0)
    usage.collect(0)
    assert usage._usage is not None
    usage._usage.close()
    usage._usage = Gone()
    with pytest.raises(OSError, match="No such device"):
        usage.collect(1)
    stat.collect(2)
    assert dict(usage.collect(3))[metrics.CONTAINER_USAGE] == 137_879_552 / 2**20
    assert stat._stat is not None
    stat._stat.close()
    stat._stat = Gone()
    with pytest.raises(OSError, match="No such device"):
        stat.collect(4)
    assert dict(stat.collect(5))[metrics.CONTAINER_WORKING_SET] == 107.4921875
    usage.close()
    stat.close()
