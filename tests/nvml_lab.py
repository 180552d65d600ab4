"""A library that stands in for NVIDIA's, compiled for the tests: ``data/nvml/nvml.c``."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "data/nvml/nvml.c"
GIB = 1 << 30
MIB = 1 << 20
A100, T4 = "NVIDIA-A100-SXM4-40GB", "Tesla-T4"
UUIDS = (
    "GPU-4c1e7a90-0b1e-4d0a-9d57-0a1b2c3d4e5f",
    "GPU-4c8f2b11-5a2f-4e1b-8c68-1b2c3d4e5f60",
    "GPU-9d3a6c52-6b30-4f2c-9b79-2c3d4e5f6071",
)
PARTS = ("MIG-1f0b6d2e-63a1-5b7c-8d9e-0f1a2b3c4d5e", "MIG-2a1c7e3f-74b2-5c8d-9eaf-1a2b3c4d5e6f")
NOT_KNOWN = (1 << 64) - 1


@pytest.fixture(scope="session")
def nvml_builds(tmp_path_factory):
    """The library, as a driver of today and one of long ago have it: "new" and "old" -> path."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("nvml")
    built = {"new": folder / "new.so", "old": folder / "old.so"}
    for age, path in built.items():
        flags = ["-DOLD"] if age == "old" else []
        command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wno-unused", *flags, "-o", path, SOURCE, "-ldl"]
        subprocess.run(command, check=True)
    return built


class StandIn:
    """A copy of the library, which nobody else has loaded, with what there is and what was called."""

    def __init__(self, build, folder, devices=2):
        """``devices`` of one model with 40 GiB, of which the driver has 0.5 and 1 GiB is in use."""
        self.path = str(folder / "libnvidia-ml.so.1")
        shutil.copy(build, self.path)
        self.gpus = [[UUIDS[n], A100, 40 * GIB, GIB // 2, GIB, 0] for n in range(devices)]
        self.parts = []
        self.processes = []
        self.errors = []
        self.delays = []
        self.write()

    def write(self):
        """Let what the attributes say be so."""
        kinds = {
            "gpu": self.gpus,
            "mig": self.parts,
            "process": self.processes,
            "error": self.errors,
            "delay": self.delays,
        }
        lines = [" ".join(map(str, (kind, *values))) for kind, entries in kinds.items() for values in entries]
        Path(f"{self.path}.new").write_text("".join(f"{line}\n" for line in lines))
        os.replace(f"{self.path}.new", f"{self.path}.state")

    def set(self, **values):
        """Set attributes, and let it be so."""
        for name, value in values.items():
            setattr(self, name, value)
        self.write()

    def use(self, mib, gpu=0):
        """Let so much be in use on a device."""
        self.gpus[gpu][4] = mib * MIB
        self.write()

    def calls(self):
        """How often each function was called, without its version, and the functions of which version: two counters."""
        try:
            lines = Path(f"{self.path}.calls").read_text().splitlines()
        except FileNotFoundError:
            return Counter()
        return Counter(line.partition(" ")[0] for line in lines)


@pytest.fixture
def nvml(nvml_builds, tmp_path):
    """Two devices behind a driver of today."""
    return StandIn(nvml_builds["new"], tmp_path)


@pytest.fixture
def old_nvml(nvml_builds, tmp_path):
    """Two devices behind a driver that has the first version of each function only."""
    return StandIn(nvml_builds["old"], tmp_path)
