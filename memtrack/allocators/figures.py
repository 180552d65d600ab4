"""Quantities of an allocator, and what follows from them. Pure functions; memory in MiB, shares in percent."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

ALLOCATED, PEAK, RESERVED = "allocated_mib", "allocated_peak_mib", "reserved_mib"
PEAK_RESETS = "peak_resets"
CHARTED = (ALLOCATED, PEAK, RESERVED, PEAK_RESETS)
"""What is charted by default; all else is on request."""

MIB = float(1 << 20)


def cache_slack_pct(reserved_mib: float, allocated_mib: float) -> float:
    """Share of what the allocator holds that no tensor uses: (reserved - allocated) / reserved.

    From the framework's own counters. High is harmless until the device is full: the cache is given back then.
    """
    return 100.0 * (reserved_mib - allocated_mib) / reserved_mib if reserved_mib > 0.0 else 0.0


def unusable_pct(reserved_mib: float, inactive_split_mib: float) -> float:
    """Share of what the allocator holds that is split and can neither be given back: inactive split / reserved.

    From torch's own counters. It is the fragmentation that ends in "out of memory" while much is free.
    """
    return 100.0 * inactive_split_mib / reserved_mib if reserved_mib > 0.0 else 0.0


def non_framework_mib(process_used_mib: float, reserved_mib: float) -> float:
    """Memory of a device that the process has besides the framework's allocator: process used - reserved.

    That is the context, kernels, NCCL's and cuBLAS's buffers, other allocators. ``process_used_mib`` is NVML's, as in
    ``memory/gpuN/process_used_mib``, of the training process alone: with descendants on the same device theirs is in it
    too. The two were not read at the same moment, so a small negative difference is none.
    """
    return max(process_used_mib - reserved_mib, 0.0)


def of_torch(stats: Mapping[str, Any]) -> dict[str, float]:
    """The quantities in torch's nested statistics of a device; empty if the allocator does not report.

    That is so if all is zero: nothing was ever allocated, or it is the allocator of another library, as
    ``cudaMallocAsync`` was in older versions.
    """
    allocated, reserved = stats.get("allocated_bytes"), stats.get("reserved_bytes")
    if not allocated or not reserved or not reserved["all"]["peak"]:
        return {}
    allocated_mib, reserved_mib = allocated["all"]["current"] / MIB, reserved["all"]["current"] / MIB
    found = {
        ALLOCATED: allocated_mib,
        PEAK: allocated["all"]["peak"] / MIB,
        RESERVED: reserved_mib,
        "slack_pct": cache_slack_pct(reserved_mib, allocated_mib),
    }
    if "segment" in stats and not stats["segment"]["all"]["peak"]:
        return found  # the driver's pool, under cudaMallocAsync: it keeps no account of the rest
    split = stats.get("inactive_split_bytes")
    if split:
        found["inactive_split_mib"] = split_mib = split["all"]["current"] / MIB
        found["unusable_pct"] = unusable_pct(reserved_mib, split_mib)
    for quantity, name in (("alloc_retries", "num_alloc_retries"), ("ooms", "num_ooms")):
        if name in stats:
            found[quantity] = float(stats[name])
    return found


def of_jax(stats: Mapping[str, int] | None) -> dict[str, float]:
    """The quantities in what ``memory_stats()`` of a JAX device gives; empty if the backend does not report.

    ``pool_bytes``, what the allocator has taken from the device, is shown as reserved. A backend says -1, 0 or nothing
    of what it does not know.
    """
    if not stats or stats.get("bytes_in_use", -1) < 0 or stats.get("peak_bytes_in_use", 0) <= 0:
        return {}
    found = {ALLOCATED: stats["bytes_in_use"] / MIB}
    names = {
        PEAK: "peak_bytes_in_use",
        RESERVED: "pool_bytes",
        "limit_mib": "bytes_limit",
        "largest_free_mib": "largest_free_block_bytes",
    }
    found.update({quantity: stats[name] / MIB for quantity, name in names.items() if stats.get(name, 0) > 0})
    if RESERVED in found:
        found["slack_pct"] = cache_slack_pct(found[RESERVED], found[ALLOCATED])
    return found


def of_tensorflow(info: Mapping[str, int]) -> dict[str, float]:
    """The quantities in what ``get_memory_info`` gives; empty if the device does not report, as CPUs do not."""
    return {ALLOCATED: info["current"] / MIB, PEAK: info["peak"] / MIB} if info.get("peak", 0) > 0 else {}
