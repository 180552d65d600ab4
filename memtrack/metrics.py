"""The one table of metric names, units and meanings.

A name is ``memory/<scope>/<quantity>_<unit>``. MiB is 2**20 bytes. Values are kept in the metric's own unit everywhere
(a byte count divided by a power of two is exact in a float), so nothing is converted between collector and chart.

What there are several of (workers, GPUs) stands in ``PATTERNS``, with ``{}`` for the number.

A metric with a peak twin is shown as two series: the mean of each window under its own name, and the maximum of the
window under ``peak_name(name)``.

``otel`` is the nearest name of OpenTelemetry's semantic conventions (2026-08), None where there is none.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

RSS = "memory/process/rss_mib"
ANON = "memory/process/anon_mib"
FILE = "memory/process/file_mib"
SHMEM = "memory/process/shmem_mib"
SWAP = "memory/process/swap_mib"
MAJOR_FAULTS = "memory/process/major_faults_per_s"
GROWTH = "memory/process/growth_mib"
"""How much the process has grown in a phase or an epoch so far: in their rows only, no series."""

TREE_PSS = "memory/tree/pss_mib"
TREE_RSS_SUM = "memory/tree/rss_sum_mib"
TREE_PROCESSES = "memory/tree/processes"
WORKER_RSS = "memory/worker/{}/rss_mib"

CONTAINER_USAGE = "memory/container/usage_mib"
CONTAINER_WORKING_SET = "memory/container/working_set_mib"
CONTAINER_LIMIT = "memory/container/limit_mib"
CONTAINER_HEADROOM = "memory/container/headroom_pct"
CONTAINER_ANON = "memory/container/anon_mib"
CONTAINER_FILE = "memory/container/file_mib"
CONTAINER_SHMEM = "memory/container/shmem_mib"
CONTAINER_KERNEL = "memory/container/kernel_mib"
CONTAINER_OOM_KILLS = "memory/container/oom_kills"

HOST_AVAILABLE = "memory/host/available_mib"
HOST_PRESSURE = "memory/host/pressure_some_pct"
HOST_SWAP = "memory/host/swap_mib"
HOST_DEV_SHM = "memory/host/dev_shm_mib"

GPU_USED = "memory/gpu{}/used_mib"
GPU_PROCESS_USED = "memory/gpu{}/process_used_mib"
GPU_RESERVED = "memory/gpu{}/reserved_mib"
GPU_TOTAL = "memory/gpu{}/total_mib"

ALLOCATED = "memory/torch_cuda{}/allocated_mib"
ALLOCATED_PEAK = "memory/torch_cuda{}/allocated_peak_mib"
ALLOCATOR_RESERVED = "memory/torch_cuda{}/reserved_mib"
ALLOCATOR_PEAK_RESETS = "memory/torch_cuda{}/peak_resets"
ALLOCATOR_SLACK = "memory/torch_cuda{}/slack_pct"
ALLOCATOR_SPLIT = "memory/torch_cuda{}/inactive_split_mib"
ALLOCATOR_UNUSABLE = "memory/torch_cuda{}/unusable_pct"
ALLOCATOR_RETRIES = "memory/torch_cuda{}/alloc_retries"
ALLOCATOR_OOMS = "memory/torch_cuda{}/ooms"
ALLOCATOR_LIMIT = "memory/torch_cuda{}/limit_mib"
ALLOCATOR_LARGEST_FREE = "memory/torch_cuda{}/largest_free_mib"
"""Of the frameworks' own allocators, on any kind of device: ``find`` takes ``torch_xpu0``, ``jax_0``, ``tf_0`` too."""
RANKS_MIN = "memory/ranks/rss_min_mib"
RANKS_MEAN = "memory/ranks/rss_mean_mib"
RANKS_MAX = "memory/ranks/rss_max_mib"
RANKS_WORST = "memory/ranks/worst_rank"
RANKS_ALIVE = "memory/ranks/alive"

SELF_AGENT_RSS = "memory/self/agent_rss_mib"
SELF_CPU = "memory/self/cpu_pct"
SELF_LATENESS = "memory/self/lateness_ms"
SELF_MERGED = "memory/self/merged"
SELF_DROPPED = "memory/self/dropped"
SELF_UNDELIVERED = "memory/self/undelivered"

MIB = float(1 << 20)


class Metric:
    """One quantity. ``default``: charted unless the user chose otherwise. ``peak``: has a ``_peak_`` twin."""

    __slots__ = ("default", "meaning", "name", "otel", "peak", "unit")

    def __init__(
        self,
        name: str,
        unit: str,
        meaning: str,
        *,
        default: bool = False,
        peak: bool = False,
        otel: str | None = None,
    ) -> None:
        self.name = name
        self.unit = unit
        self.meaning = meaning
        self.default = default
        self.peak = peak
        self.otel = otel

    def __repr__(self) -> str:
        return f"Metric({self.name!r}, {self.unit!r})"


TABLE: tuple[Metric, ...] = (
    Metric(RSS, "MiB", "resident memory of the training process", default=True, peak=True, otel="process.memory.usage"),
    Metric(ANON, "MiB", "its private and heap pages"),
    Metric(FILE, "MiB", "its resident file pages (libraries, mapped files)"),
    Metric(SHMEM, "MiB", "its resident shared-memory pages"),
    Metric(SWAP, "MiB", "its pages in swap"),
    Metric(MAJOR_FAULTS, "1/s", "page faults that had to read from disk", otel="process.paging.faults"),
    Metric(TREE_PSS, "MiB", "process and descendants, shared pages counted once (PSS)", default=True),
    Metric(TREE_RSS_SUM, "MiB", "sum of their RSS: an upper bound, shared pages count once a process", default=True),
    Metric(TREE_PROCESSES, "1", "number of processes in the tree", default=True),
    Metric(
        CONTAINER_USAGE,
        "MiB",
        "memory charged to the cgroup that binds",
        default=True,
        peak=True,
        otel="container.memory.usage",
    ),
    Metric(
        CONTAINER_WORKING_SET,
        "MiB",
        "that less the inactive page cache",
        default=True,
        otel="container.memory.working_set",
    ),
    Metric(CONTAINER_LIMIT, "MiB", "the smallest limit that applies", default=True, otel="system.memory.limit"),
    Metric(CONTAINER_HEADROOM, "%", "share of that limit still free", default=True),
    Metric(CONTAINER_ANON, "MiB", "anonymous memory of the cgroup"),
    Metric(CONTAINER_FILE, "MiB", "page cache of the cgroup"),
    Metric(CONTAINER_SHMEM, "MiB", "shared memory and tmpfs charged to the cgroup"),
    Metric(CONTAINER_KERNEL, "MiB", "kernel memory charged to the cgroup"),
    Metric(CONTAINER_OOM_KILLS, "1", "kills by the kernel's OOM killer in the cgroup, since it was made"),
    Metric(
        HOST_AVAILABLE,
        "MiB",
        "memory that can be had on this machine without swapping",
        default=True,
        otel="system.memory.linux.available",
    ),
    Metric(HOST_PRESSURE, "%", "share of the last 10 s in which some task waited for memory (PSI)", default=True),
    Metric(HOST_SWAP, "MiB", "swap in use on this machine", otel="system.paging.usage"),
    Metric(HOST_DEV_SHM, "MiB", "/dev/shm in use (DataLoader workers pass batches through it)"),
    Metric(RANKS_MIN, "MiB", "smallest resident memory among the ranks of a distributed training here", default=True),
    Metric(RANKS_MEAN, "MiB", "mean of their resident memory", default=True),
    Metric(RANKS_MAX, "MiB", "largest of their peaks", default=True),
    Metric(RANKS_WORST, "1", "number of the rank that has had the largest peak so far", default=True),
    Metric(RANKS_ALIVE, "1", "how many of them live and are recorded", default=True),
    Metric(SELF_AGENT_RSS, "MiB", "resident memory of memtrack's agent", default=True),
    Metric(SELF_CPU, "%", "share of one core that the agent takes", default=True),
    Metric(SELF_LATENESS, "ms", "how late samples were taken"),
    Metric(SELF_MERGED, "1", "windows merged so far because the recording was full"),
    Metric(SELF_DROPPED, "1", "marks, metrics and phases that found no room so far"),
    Metric(SELF_UNDELIVERED, "1", "windows that wait for the tracker that is furthest behind"),
)

PATTERNS: tuple[Metric, ...] = (
    Metric(WORKER_RSS, "MiB", "resident memory of a descendant: N is 0 to 7, or `rest` for all others"),
    Metric(
        GPU_USED,
        "MiB",
        "memory in use on NVIDIA GPU N, as the training process counts, by whomever",
        default=True,
        peak=True,
        otel="hw.gpu.memory.usage",
    ),
    Metric(GPU_PROCESS_USED, "MiB", "of that, by the training process and its descendants, every 10 s", default=True),
    Metric(GPU_RESERVED, "MiB", "set aside by driver and firmware; not in the recording unless asked for"),
    Metric(
        GPU_TOTAL, "MiB", "memory of GPU N in all; not in the recording unless asked for", otel="hw.gpu.memory.limit"
    ),
    Metric(ALLOCATED, "MiB", "held by tensors on device N; likewise `torch_xpuN`, `jax_N`, `tf_N`", default=True),
    Metric(ALLOCATED_PEAK, "MiB", "the most that was, by the allocator's own count", default=True),
    Metric(ALLOCATOR_RESERVED, "MiB", "what the allocator has taken from the device", default=True),
    Metric(ALLOCATOR_PEAK_RESETS, "1", "how often somebody has reset that count of the most, if so", default=True),
    Metric(ALLOCATOR_SLACK, "%", "share of the reserved memory that no tensor uses"),
    Metric(ALLOCATOR_SPLIT, "MiB", "free parts of blocks that are in use: cannot be given back"),
    Metric(ALLOCATOR_UNUSABLE, "%", "share of the reserved memory that is such parts"),
    Metric(ALLOCATOR_RETRIES, "1", "how often the cache was given back for want of memory"),
    Metric(ALLOCATOR_OOMS, "1", "how often the allocator has run out of memory"),
    Metric(ALLOCATOR_LIMIT, "MiB", "the most that JAX's allocator may take"),
    Metric(ALLOCATOR_LARGEST_FREE, "MiB", "the largest piece that JAX's allocator has free"),
)

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in (*TABLE, *PATTERNS)}


def find(name: str) -> Metric | None:
    """The metric that ``name`` is a series of; None for gauges: ``memory/gpu0/used_mib`` is of ``GPU_USED``."""
    known = BY_NAME.get(name)
    if known is None:
        parts = name.split("/")
        if len(parts) == 4 and parts[1] == "worker":
            parts[2] = "{}"
        elif len(parts) == 3 and parts[1].startswith("gpu") and parts[1][3:].isdecimal():
            parts[1] = "gpu{}"
        elif len(parts) == 3 and parts[1].startswith(("torch_", "jax_", "tf_")) and parts[1][-1].isdecimal():
            parts[1] = "torch_cuda{}"
        known = BY_NAME.get("/".join(parts))
    return known


def peak_name(name: str) -> str:
    """The name of the ``_peak_`` twin: ``memory/process/rss_mib`` gives ``memory/process/rss_peak_mib``."""
    stem, _, unit = name.rpartition("_")
    return f"{stem}_peak_{unit}"


def unit_of(name: str) -> str:
    """The unit that a name carries, also for names outside the table (gauges)."""
    known = find(name)
    if known is not None:
        return known.unit
    suffix = name.rpartition("_")[2]
    return {"mib": "MiB", "pct": "%", "s": "s", "ms": "ms"}.get(suffix, "1")


def has_peak(name: str) -> bool:
    """Whether the series has a ``_peak_`` twin."""
    known = find(name)
    return known is not None and known.peak


def selected(name: str, choice: str | Iterable[str]) -> bool:
    """Whether ``name`` is charted under ``choice``: ``"default"``, ``"all"``, or names and prefixes of names.

    Gauges that the user or a framework integration writes are wanted by definition; they are not in the table.
    """
    if choice == "all":
        return True
    if choice == "default":
        known = find(name)
        return known is None or known.default
    return any(name == wanted or name.startswith(wanted.rstrip("/") + "/") for wanted in choice)
