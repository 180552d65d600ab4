"""Which memory limit binds a process, on recorded machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memtrack.collectors.limits import Limits, cgroup_levels, resolve

TREES = Path(__file__).parents[1] / "data" / "proc"
PID = 4242
DOCKER = "/docker/3f9a1c7e5b2d8046a1f4c9e7d3b5806f2c4e6a8091b3d5f7e9a0c2b4d6f81357"
PHYSICAL_BYTES = 25_276_502_016
V2_MOUNT = "32 22 0:27 {} {} rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
V1_MOUNT = "34 31 0:31 {} {} ro,relatime - cgroup cgroup rw,memory\n"


def on(case: str) -> Limits:
    return resolve(PID, f"{TREES / case}/proc", str(TREES / case))


def machine(path: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Limits:
    """A machine with 1 GiB of which 600 MiB are available, resolved."""
    everything = {
        f"proc/{PID}/cgroup": cgroup,
        f"proc/{PID}/mountinfo": mountinfo,
        "proc/meminfo": "MemTotal:        1048576 kB\nMemFree:          102400 kB\nMemAvailable:     614400 kB\n",
        **files,
    }
    for name, text in everything.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return resolve(PID, f"{path}/proc", str(path))


@pytest.mark.parametrize(
    ("case", "limit_bytes", "source"),
    [
        ("v1", 1 << 30, f"cgroup v1 {DOCKER} memory.limit_in_bytes"),
        ("v2", 4 << 30, "cgroup v2 /user.slice/user-1000.slice/session-3.scope memory.max"),
        ("hybrid", 512 << 20, f"cgroup v1 {DOCKER} memory.limit_in_bytes"),
        ("nested", 399_998_976, "cgroup v1 /slurm/job_77 memory.limit_in_bytes"),
        ("namespaced", 2 << 30, "cgroup v2 /kubepods.slice/cri-containerd-a94c.scope memory.max"),
        ("unlimited", PHYSICAL_BYTES, "physical memory"),
        ("v2_readonly", 3 << 30, "cgroup v2 / memory.max"),
    ],
)
def test_binding(case, limit_bytes, source):
    """The smallest limit over all ancestors is found, and named, on every kind of machine."""
    binding = on(case).binding
    assert binding is not None
    assert (limit_bytes, source) == (binding.bytes, binding.source)
    assert limit_bytes / 2**20 == binding.mib


@pytest.mark.parametrize(
    ("case", "headroom_bytes", "source"),
    [
        ("v1", 935_858_176, f"cgroup v1 {DOCKER} memory.limit_in_bytes"),
        ("v2", 79_691_776, "cgroup v2 /user.slice/user-1000.slice memory.max"),
        ("hybrid", 398_983_168, f"cgroup v1 {DOCKER} memory.limit_in_bytes"),
        ("nested", 262_119_424, "cgroup v1 /slurm/job_77 memory.limit_in_bytes"),
        ("namespaced", 512 << 20, "cgroup v2 /kubepods.slice/cri-containerd-a94c.scope memory.max"),
        ("unlimited", 24_004_088 * 1024, "physical memory"),
        ("v2_readonly", 768 << 20, "cgroup v2 / memory.max"),
    ],
)
def test_headroom(case, headroom_bytes, source):
    """Headroom is that of the level nearest to its limit, which on v2 here is not the one with the smallest limit."""
    headroom = on(case).headroom()
    assert headroom is not None
    assert (headroom_bytes, source) == (headroom.bytes, headroom.limit.source)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("v1", [DOCKER]),
        ("hybrid", [DOCKER, "/docker", "/"]),
        ("nested", ["/slurm/job_77/step_0", "/slurm/job_77", "/slurm", "/"]),
        ("v2", ["/user.slice/user-1000.slice/session-3.scope", "/user.slice/user-1000.slice", "/user.slice"]),
        ("namespaced", ["/kubepods.slice/cri-containerd-a94c.scope", "/kubepods.slice"]),
        ("v2_readonly", ["/"]),
    ],
)
def test_levels(case, names):
    """All ancestors with a memory controller are walked, innermost first; v2's real root has none."""
    levels = cgroup_levels(PID, f"{TREES / case}/proc", str(TREES / case))
    assert names == [level.name for level in levels]
    assert {1 if case in ("v1", "hybrid", "nested") else 2} == {level.version for level in levels}


def test_usage_level():
    """Usage is read where the smallest limit is, or at the process's own cgroup when none is limited."""
    nested, unlimited = on("nested").usage_level, on("unlimited").usage_level
    assert nested is not None
    assert unlimited is not None
    assert (nested.name, unlimited.name) == ("/slurm/job_77", DOCKER)


def test_all_limits_of_nested():
    """Limits that apply but do not bind are listed too, RLIMIT_AS among them."""
    assert [(limit.bytes, limit.source) for limit in on("nested").limits] == [
        (399_998_976, "cgroup v1 /slurm/job_77 memory.limit_in_bytes"),
        (1 << 40, "RLIMIT_AS"),
        (PHYSICAL_BYTES, "physical memory"),
    ]


def test_address_space_binds(tmp_path):
    """A small RLIMIT_AS binds, and its headroom is the limit less VmSize, not less RSS."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    limits = machine(
        tmp_path,
        "0::/\n",
        "",
        {
            f"proc/{PID}/limits": "Max address space         536870912            unlimited            bytes\n",
            f"proc/{PID}/statm": "65536 10 5 1 0 27822 0\n",
        },
    )
    headroom = limits.headroom()
    assert limits.binding is not None
    assert headroom is not None
    assert (limits.binding.bytes, limits.binding.source) == (512 << 20, "RLIMIT_AS")
    assert ((512 << 20) - 65536 * page_bytes, "RLIMIT_AS") == (headroom.bytes, headroom.limit.source)


def test_limit_above_physical_memory_is_none(tmp_path):
    """A cgroup limit of physical memory or more is no limit: the machine is full first."""
    limits = machine(
        tmp_path,
        "0::/job\n",
        V2_MOUNT.format("/", "/sys/fs/cgroup"),
        {"sys/fs/cgroup/job/memory.max": f"{1 << 30}\n", "sys/fs/cgroup/job/memory.current": "5\n"},
    )
    assert [limit.source for limit in limits.limits] == ["physical memory"]
    assert limits.usage_level is not None


def test_no_cgroup_at_all(tmp_path):
    """Without cgroups physical memory binds; without /proc nothing is known, and nothing is raised."""
    limits = machine(tmp_path, "", "", {})
    assert (limits.binding and limits.binding.bytes, limits.usage_level, limits.levels) == (1 << 30, None, ())
    nothing = resolve(PID, f"{tmp_path}/absent", str(tmp_path))
    assert (nothing.binding, nothing.headroom()) == (None, None)


def test_bind_mounted_subtree(tmp_path):
    """The mount's root is stripped from the process's path: a container may see only its own part of the hierarchy."""
    limits = machine(
        tmp_path,
        "0::/pod/box/inner\n",
        V2_MOUNT.format("/pod/box", "/sys/fs/cgroup"),
        {"sys/fs/cgroup/memory.max": "7340032\n", "sys/fs/cgroup/inner/memory.max": "max\n"},
    )
    assert [level.name for level in limits.levels] == ["/pod/box/inner", "/pod/box"]
    assert limits.binding is not None
    assert (limits.binding.bytes, limits.binding.source) == (7 << 20, "cgroup v2 /pod/box memory.max")


def test_mount_of_another_subtree(tmp_path):
    """A mount that shows somebody else's cgroup is not believed, also when a ``..`` leads out of the namespace."""
    files = {"sys/fs/cgroup/memory.max": "7340032\n"}
    elsewhere = machine(tmp_path, "0::/pod/other\n", V2_MOUNT.format("/pod/box", "/sys/fs/cgroup"), files)
    sibling = machine(tmp_path, "0::/../sibling\n", V2_MOUNT.format("/", "/sys/fs/cgroup"), files)
    assert (elsewhere.levels, sibling.levels) == ((), ())


def test_mount_that_shows_most_ancestors_wins(tmp_path):
    """Of several mounts of the hierarchy that with the most ancestors is used: an outer limit binds as well."""
    limits = machine(
        tmp_path,
        "0::/pod/box\n",
        V2_MOUNT.format("/pod/box", "/narrow") + V2_MOUNT.format("/", "/wide\\040one"),
        {
            "narrow/memory.max": "9437184\n",
            "wide one/pod/memory.max": "8388608\n",
            "wide one/pod/box/memory.max": "9437184\n",
        },
    )
    assert limits.binding is not None
    assert limits.binding.source == "cgroup v2 /pod memory.max"


def test_hidden_mount(tmp_path):
    """A mount covered by a later one on the same point is not read through it."""
    covered = V2_MOUNT.format("/", "/sys/fs/cgroup") + "40 32 0:50 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    limits = machine(tmp_path, "0::/job\n", covered, {"sys/fs/cgroup/job/memory.max": "4096\n"})
    assert limits.levels == ()


def test_reader_sees_its_own_mounts(tmp_path):
    """From outside a container its path is resolved in the reader's mounts, not in those the container has."""
    limits = machine(
        tmp_path,
        "3:memory:/docker/abc\n0::/\n",
        V1_MOUNT.format("/docker/abc", "/sys/fs/cgroup/memory"),
        {
            "proc/self/mountinfo": V1_MOUNT.format("/", "/sys/fs/cgroup/memory"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "4194304\n",
        },
    )
    assert limits.binding is not None
    assert (limits.binding.bytes, limits.binding.source) == (4 << 20, "cgroup v1 /docker/abc memory.limit_in_bytes")


@pytest.mark.parametrize(("use_hierarchy", "source"), [("0", "/a/b"), ("1", "/a")])
def test_v1_without_hierarchy(tmp_path, use_hierarchy, source):
    """On old kernels a v1 ancestor that opted out of hierarchy is not charged for the process, so does not bind."""
    base = "sys/fs/cgroup/memory"
    limits = machine(
        tmp_path,
        "3:memory:/a/b\n",
        V1_MOUNT.format("/", f"/{base}"),
        {
            f"{base}/a/memory.limit_in_bytes": "4194304\n",
            f"{base}/a/memory.use_hierarchy": f"{use_hierarchy}\n",
            f"{base}/a/b/memory.limit_in_bytes": "8388608\n",
            f"{base}/a/b/memory.use_hierarchy": "0\n",
        },
    )
    assert limits.binding is not None
    assert f"cgroup v1 {source} memory.limit_in_bytes" == limits.binding.source


def test_equal_limits(tmp_path):
    """Of two equal limits the outer one binds: it holds at least as much as the inner."""
    limits = machine(
        tmp_path,
        "0::/a/b\n",
        V2_MOUNT.format("/", "/cg"),
        {"cg/a/memory.max": "4096\n", "cg/a/b/memory.max": "4096\n", "cg/a/b/memory.current": "8192\n"},
    )
    assert limits.binding is not None
    assert limits.usage_level is not None
    assert (limits.binding.source, limits.usage_level.name) == ("cgroup v2 /a memory.max", "/a")


def test_headroom_is_never_negative(tmp_path):
    """Usage may stand above a limit that was lowered; nothing is left then, rather than less than nothing."""
    limits = machine(
        tmp_path,
        "0::/a\n",
        V2_MOUNT.format("/", "/cg"),
        {"cg/a/memory.max": "0\n", "cg/a/memory.current": "8192\n"},
    )
    headroom = limits.headroom()
    assert headroom is not None
    assert (headroom.bytes, headroom.limit.source) == (0, "cgroup v2 /a memory.max")


def test_process_not_found_behind_a_namespace(tmp_path):
    """When the namespace hides the names and no ``cgroup.procs`` lists the process, no level is made up."""
    limits = machine(
        tmp_path,
        "0::/\n",
        V2_MOUNT.format("/..", "/cg"),
        {"cg/a/memory.max": "4096\n", "cg/a/cgroup.procs": "1\n42\n", "cg/b/memory.max": "4096\n"},
    )
    assert limits.levels == ()
