"""A build of torch for CUDA, as far as memory goes, on a machine without a GPU.

torch for CPUs has all Python of ``torch.cuda`` and none of the functions in ``torch._C`` that it calls. Those are here,
over a compiled library that stands in for the driver (``data/cuda/cuda.c``). The statistics are those that torch's
reference of ``torch.cuda.memory_stats`` describes, nested as ``memory_stats_as_nested_dict`` gives them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "data/cuda/cuda.c"
ROOT = Path(__file__).resolve().parents[1]
SEGMENT = 20 << 20
"""The allocator asks the driver for pieces of this size at the least."""

BUILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.cuda_lab import build
cuda = build()
"""
"""At the head of a script: from here on its torch is one for CUDA, and ``cuda`` the allocator."""


class Driver:
    """The stand-in for the driver's library, in a folder of its own."""

    def __init__(self, path):
        self.path = path
        self.environment = {"LD_LIBRARY_PATH": str(path.parent)}

    def calls(self, pid=None):
        """How often each function was called, by one process or by all."""
        try:
            lines = [line.split() for line in Path(f"{self.path}.calls").read_text().splitlines()]
        except FileNotFoundError:
            return Counter()
        return Counter(name for name, caller in lines if pid in (None, int(caller)))


def build_driver(folder):
    """``libcuda.so.1``, which counts, in a folder."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    path = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-o", path, SOURCE, "-ldl"], check=True)
    return Driver(path)


@pytest.fixture
def driver(tmp_path_factory):
    """A driver of its own."""
    pytest.importorskip("torch")
    return build_driver(tmp_path_factory.mktemp("driver"))


def _stat(current=0):
    return {"current": current, "peak": current, "allocated": current, "freed": 0}


def _pools():
    return {pool: _stat() for pool in ("all", "small_pool", "large_pool")}


class Cuda:
    """What ``torch._C`` has for the allocator of one device; blocks are taken and given back by hand."""

    def __init__(self, torch):
        self._torch = torch
        self._forked = False
        self._initialised = False
        self._used = []
        self._stats = {
            name: _pools()
            for name in (
                "allocation", "segment", "active", "inactive_split", "allocated_bytes", "reserved_bytes",
                "active_bytes", "inactive_split_bytes", "requested_bytes",
            )
        } | {"oversize_allocations": _stat(), "oversize_segments": _stat(), "max_split_size": -1}  # fmt: skip
        for counter in (
            "num_alloc_retries", "num_ooms", "num_sync_all_streams", "num_device_alloc", "num_device_free",
        ):  # fmt: skip
            self._stats[counter] = 0
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self):
        self._forked = self._initialised

    def _call(self, name, *arguments):
        # torch's runtime loads the driver when it is first needed; its first call initialises it
        library = ctypes.CDLL("libcuda.so.1")
        if not self._initialised:
            self._check(library.cuInit(0))
            self._initialised = True
        return getattr(library, name)(*arguments)

    def _check(self, code):
        if code:
            raise RuntimeError(f"CUDA error {code}")

    def _change(self, name, by):
        for pool in ("all", "large_pool"):
            stat = self._stats[name][pool]
            stat["current"] += by
            stat["peak"] = max(stat["peak"], stat["current"])
            stat["allocated" if by > 0 else "freed"] += abs(by)

    # -- what a program does ----------------------------------------------------------------------------------------

    def take(self, mib):
        """A tensor of so many MiB comes."""
        self._torch.cuda.init()
        size = mib << 20
        reserved, allocated = (self._stats[name]["all"]["current"] for name in ("reserved_bytes", "allocated_bytes"))
        if size > reserved - allocated:
            segment = max(size, SEGMENT)
            self._check(self._call("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_void_p()), 0))
            if self._call("cuMemAlloc_v2", ctypes.byref(ctypes.c_ulonglong()), ctypes.c_size_t(segment)) == 2:
                self._stats["num_alloc_retries"] += 1
                self._stats["num_ooms"] += 1
                raise self._torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            self._stats["num_device_alloc"] += 1
            self._change("segment", 1)
            self._change("reserved_bytes", segment)
        for name in ("allocated_bytes", "active_bytes", "requested_bytes"):
            self._change(name, size)
        self._split()

    def give(self, mib):
        """A tensor of so many MiB goes: its memory stays reserved."""
        for name in ("allocated_bytes", "active_bytes", "requested_bytes"):
            self._change(name, -(mib << 20))
        self._split()

    def _split(self):
        free = self._stats["reserved_bytes"]["all"]["current"] - self._stats["allocated_bytes"]["all"]["current"]
        wanted = free if self._stats["allocated_bytes"]["all"]["current"] else 0
        self._change("inactive_split_bytes", wanted - self._stats["inactive_split_bytes"]["all"]["current"])

    # -- what torch._C has ------------------------------------------------------------------------------------------

    def functions(self):
        """By name."""

        def count():
            found = ctypes.c_int()
            return found.value if self._call("cuDeviceGetCount", ctypes.byref(found)) == 0 else 0

        def has_context(device):
            active = ctypes.c_int()
            code = self._call("cuDevicePrimaryCtxGetState", device, ctypes.byref(ctypes.c_uint()), ctypes.byref(active))
            self._check(code)
            return bool(active.value)

        def reset_peak(device):
            for value in self._stats.values():
                if isinstance(value, dict) and "all" in value:
                    for stat in value.values():
                        stat["peak"] = stat["current"]

        def copied(value):
            return {key: copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value

        return {
            "_cuda_init": lambda: self._check(0 if count() else 100),
            "_cuda_isInBadFork": lambda: self._forked,
            "_cuda_getDeviceCount": count,
            "_cuda_getDevice": lambda: 0,
            "_cuda_getCurrentRawStream": lambda device: 0,
            "_cuda_hasPrimaryContext": has_context,
            "_cuda_memoryStats": lambda device: copied(self._stats),
            "_cuda_resetPeakMemoryStats": reset_peak,
        }


def build():
    """Let the torch of this process be one for CUDA. Returns the allocator."""
    import torch
    import torch.cuda

    cuda = Cuda(torch)
    for name, function in cuda.functions().items():
        setattr(torch._C, name, function)
    torch.cuda._is_in_bad_fork = torch._C._cuda_isInBadFork
    torch.cuda._cudart = object()
    torch.cuda.default_generators = (torch.Generator(),)
    return cuda
