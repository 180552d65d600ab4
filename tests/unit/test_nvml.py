"""NVIDIA GPUs, by a library that stands in for NVML: what is read, how often, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from memtrack import collectors, metrics
from memtrack.collectors.cuda_devices import Device, environment_of, visible
from memtrack.collectors.nvml import GpuMemoryCollector, GpuProcessCollector, Gpus
from memtrack.collectors.nvml_library import NvmlError, NvmlLibrary
from memtrack.collectors.procfs import INITIAL_PID_NAMESPACE
from memtrack.collectors.tree import TreeCollector
from memtrack.sampling.cadence import Budget
from memtrack.sampling.sampler import Sampler
from memtrack.sampling.window import Place
from memtrack.testing import FakeClock, FakeProc
from tests.nvml_lab import A100, GIB, MIB, NOT_KNOWN, PARTS, T4, UUIDS, nvml, nvml_builds, old_nvml

__all__ = ["nvml", "nvml_builds", "old_nvml"]

PID = 4242
SECOND_NS = 10**9


@pytest.fixture
def proc(tmp_path):
    """A made-up /proc in the first pid namespace, with the training process."""
    made = FakeProc(tmp_path)
    made.add(PID, rss_mib=400.0)
    os.makedirs(f"{made.path}/self/ns")
    os.symlink(INITIAL_PID_NAMESPACE, f"{made.path}/self/ns/pid")
    return made


def wait_until(condition):
    """Ten seconds at most."""
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Bench:
    """The two collectors over a stand-in, asked at a time that is told."""

    def __init__(self, library, proc, environ=None, choice="default"):
        self.gpus = Gpus(environ or {}, choice, proc=proc.path, library=library.path)
        self.tree = TreeCollector(PID, proc=proc.path)
        self.memory_collector = GpuMemoryCollector(self.gpus)
        self.process_collector = GpuProcessCollector(self.gpus, self.tree)
        self.now_s = 0.0
        self.memory()
        # nobody waits for the library to be opened
        wait_until(self.gpus._caller.is_free)

    def memory(self, after_s=0.5):
        self.now_s += after_s
        return dict(self.memory_collector.collect(int(self.now_s * SECOND_NS)))

    def processes(self, after_s=10.0):
        self.now_s += after_s
        list(self.tree.collect(0))
        return dict(self.process_collector.collect(int(self.now_s * SECOND_NS)))

    def close(self):
        self.memory_collector.close()
        self.tree.close()


@pytest.fixture
def bench(request, proc):
    """A function that makes a bench."""

    def make(library, **arguments):
        made = Bench(library, proc, **arguments)
        request.addfinalizer(made.close)
        return made

    return make


def used(number):
    return metrics.GPU_USED.format(number)


def own(number):
    return metrics.GPU_PROCESS_USED.format(number)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_memory_of_two_devices(bench, nvml):
    """What is in use on each, in MiB; what is only there on request is not recorded."""
    nvml.use(3 * 1024, gpu=1)
    looked = bench(nvml)
    assert looked.memory() == {used(0): 1024.0, used(1): 3072.0}
    nvml.use(2000)
    assert looked.memory() == {used(0): 2000.0, used(1): 3072.0}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("all", {"used_mib", "total_mib", "reserved_mib"}),
        ("memory/gpu0/total_mib", {"used_mib", "total_mib"}),
        ("memory/process,memory/gpu0", {"used_mib", "total_mib", "reserved_mib"}),
        ("memory/gpu1", {"used_mib"}),
    ],
)
def test_on_request(bench, nvml, choice, names):
    """The total, and what driver and firmware have set aside, are recorded where they are charted."""
    found = bench(nvml, choice=choice).memory()
    ours = {name.rpartition("/")[2]: value for name, value in found.items() if name.startswith("memory/gpu0/")}
    assert ours == {name: {"used_mib": 1024.0, "total_mib": 40960.0, "reserved_mib": 512.0}[name] for name in names}


def test_first_versions_only(bench, old_nvml):
    """An old driver counts what is set aside as used, does not say how much it is, and lists processes in 16 bytes."""
    old_nvml.set(processes=[("c", 0, PID, 700 * MIB), ("c", 0, 999, 100 * MIB), ("c", 0, 998, 50 * MIB)])
    looked = bench(old_nvml, choice="all")
    assert looked.memory() == {used(0): 1536.0, used(1): 1536.0} | {
        metrics.GPU_TOTAL.format(number): 40960.0 for number in range(2)
    }
    assert looked.processes() == {own(0): 700.0}
    assert old_nvml.calls()["nvmlInit"] == 1


def test_memory_v2_that_is_there_and_does_not_work(bench, nvml):
    """Driver 510.39 had the function, which said that there is none."""
    nvml.set(errors=[("nvmlDeviceGetMemoryInfo_v2", 13)])
    looked = bench(nvml)
    assert looked.memory()[used(0)] == looked.memory()[used(0)] == 1536.0
    assert nvml.calls()["nvmlDeviceGetMemoryInfo_v2"] == 1


class NoMarks:
    """A training that marks nothing."""

    def place(self):
        return Place(-1, -1, ())

    def written(self):
        return 0

    def drain(self):
        return []


def sampler_of(found, clock, on_window):
    """A sampler in virtual time."""
    return Sampler(
        found,
        NoMarks(),
        interval_s=5.0,
        tick_s=0.1,
        budget=Budget(1.0, clock.now_ns, 0),
        now_ns=clock.now_ns,
        cpu_clock_ns=clock.process_time_ns,
        on_window=on_window,
        on_phase=lambda row: None,
        on_epoch=lambda *epoch: None,
    )


def test_first_list_does_not_wait_for_ten_seconds(nvml, proc):
    """When NVML is ready, which it is not at the first turn, processes are looked for soon, and then at their pace."""
    clock, gpus, tree = FakeClock(), Gpus({}, proc=proc.path, library=nvml.path), TreeCollector(PID, proc=proc.path)
    found = [GpuMemoryCollector(gpus), GpuProcessCollector(gpus, tree)]
    sampler = sampler_of(found, clock, lambda row: None)
    began_ns = clock.now_ns
    for until_s, lists in ((5, 2), (25, 2 + 1)):
        while clock.now_ns < began_ns + until_s * SECOND_NS:
            sampler.tick(clock.now_ns, clock.time_ns())
            wait_until(gpus._caller.is_free)
            clock.advance_to(sampler.due_ns)
        assert nvml.calls()["nvmlDeviceGetComputeRunningProcesses_v2"] == lists
    gpus.close()
    tree.close()


def test_peak_is_kept_and_rates_hold(bench, nvml):
    """In two minutes of virtual time: each window has its highest value, memory is read 2 times a second at most, lists
    of processes once in 10 s, and the library is initialised once."""
    looked = bench(nvml)
    nvml.set(processes=[("c", 0, PID, 300 * MIB)])
    clock, rows = FakeClock(), []
    sampler = sampler_of([looked.memory_collector, looked.process_collector], clock, rows.append)
    before = nvml.calls()
    assert before["nvmlInit_v2"] == 1
    began_ns = clock.now_ns
    while clock.now_ns < began_ns + 120 * SECOND_NS:
        second = (clock.now_ns - began_ns) / 1e9
        nvml.use(30000 if 41.0 <= second < 42.0 else 1000)
        clock.advance_to(sampler.due_ns)
        sampler.tick(clock.now_ns, clock.time_ns())
    made = nvml.calls() - before
    assert 2 * 230 <= made["nvmlDeviceGetMemoryInfo_v2"] <= 2 * 241
    # every device first, then the one where the process was seen, and every other time the other one
    assert made["nvmlDeviceGetComputeRunningProcesses_v2"] == made["nvmlDeviceGetGraphicsRunningProcesses_v2"]
    assert 2 + 10 + 5 <= made["nvmlDeviceGetComputeRunningProcesses_v2"] <= 2 + 12 + 6
    assert set(made) == {
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetComputeRunningProcesses_v2",
        "nvmlDeviceGetGraphicsRunningProcesses_v2",
    }
    highs = [row.cells[used(0)].max for row in rows]
    assert (highs.count(30000.0), highs.count(1000.0)) == (1, len(rows) - 1)
    means = [row.cells[used(0)].mean for row in rows]
    assert 1000.0 < max(means) < 10000.0
    assert [row.cells[own(0)].last for row in rows] == [300.0] * len(rows), "held in between"


# -- processes ------------------------------------------------------------------------------------------------------


def test_processes_of_the_tree_are_summed(bench, nvml, proc):
    """The trainer and its workers count, others do not; a process with two kinds of context counts once."""
    proc.add(5000, parent=PID, rss_mib=50.0)
    nvml.set(
        processes=[
            ("c", 0, PID, 300 * MIB),
            ("g", 0, PID, 300 * MIB),
            ("c", 0, 5000, 200 * MIB),
            ("g", 0, 777, 99 * MIB),
            ("c", 1, 778, 98 * MIB),
        ]
    )
    looked = bench(nvml)
    assert looked.processes() == {own(0): 500.0}
    nvml.set(processes=[("g", 1, 5000, 40 * MIB)])
    # device 1 is looked at again in its turn; what has left device 0 is nothing there, and that is known
    assert {**looked.processes(), **looked.processes()} == {own(0): 0.0, own(1): 40.0}


def test_absent_until_seen(bench, nvml):
    """No zero is reported of a process that uses no GPU."""
    assert bench(nvml).processes() == {}


def test_unknown_amount(bench, nvml):
    """Where the driver does not know how much a process has, there is no sum."""
    nvml.set(processes=[("c", 0, PID, NOT_KNOWN), ("c", 1, PID, MIB)])
    assert bench(nvml).processes() == {own(1): 1.0}


def test_many_processes(bench, nvml):
    """A list that has no room is asked for again with more: the buffer grows with what the driver says."""
    others = [("c", 0, 10_000 + number, MIB) for number in range(500)]
    nvml.set(processes=[*others, ("c", 0, PID, 7 * MIB)])
    looked = bench(nvml)
    assert looked.processes() == {own(0): 7.0}
    # twice on device 0, once on device 1
    assert nvml.calls()["nvmlDeviceGetComputeRunningProcesses_v2"] == 3


def test_room_that_never_suffices(bench, nvml):
    """A driver that always wants more room is not asked for ever."""
    nvml.set(errors=[("nvmlDeviceGetComputeRunningProcesses_v2", 7)])
    looked = bench(nvml)
    assert looked.processes() == {}
    assert nvml.calls()["nvmlDeviceGetComputeRunningProcesses_v2"] <= 2 * 12


@pytest.mark.parametrize("code", [3, 4], ids=["not supported", "no permission"])
def test_no_rights_to_see_processes(bench, nvml, code):
    """The series is absent, memory of the device goes on, and nobody asks again."""
    nvml.set(errors=[("nvmlDeviceGetComputeRunningProcesses_v2", code)], processes=[("c", 0, PID, MIB)])
    looked = bench(nvml)
    assert [looked.processes() for _ in range(4)] == [{}] * 4
    assert nvml.calls()["nvmlDeviceGetComputeRunningProcesses_v2"] == 2
    assert set(looked.memory()) == {used(0), used(1)}


def test_no_list_of_graphics(bench, nvml):
    """Devices for computing only have the other list all the same."""
    nvml.set(errors=[("nvmlDeviceGetGraphicsRunningProcesses_v2", 3)], processes=[("c", 0, PID, MIB)])
    assert bench(nvml).processes() == {own(0): 1.0}


def test_pids_of_the_host(bench, nvml, proc):
    """In a container a pid that is none here shows that the list is the host's; then one that is may be another's."""
    os.unlink(f"{proc.path}/self/ns/pid")
    os.symlink("pid:[4026532201]", f"{proc.path}/self/ns/pid")
    nvml.set(processes=[("c", 0, PID, 300 * MIB), ("c", 0, 31_337, 200 * MIB)])
    looked = bench(nvml)
    assert looked.processes() == {}
    nvml.set(processes=[("c", 0, PID, 300 * MIB)])
    assert {**looked.processes(), **looked.processes()} == {own(0): 300.0}


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_device_is_lost_midway(bench, nvml):
    """Its series stop, the other's go on, it is said once, and the driver is not asked about it any more."""
    nvml.set(processes=[("c", 0, PID, MIB), ("c", 1, PID, 2 * MIB)])
    looked = bench(nvml)
    assert set(looked.memory()) == {used(0), used(1)}
    assert set(looked.processes()) == {own(0), own(1)}
    nvml.set(
        errors=[(name, 15, 0) for name in ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetComputeRunningProcesses_v2")]
    )
    assert [set(looked.memory()) for _ in range(3)] == [{used(1)}] * 3
    assert looked.processes() == {own(1): 2.0}
    assert looked.gpus.news == ["memory of gpu0 is not measured any more: GPU is lost"]
    before = nvml.calls()
    looked.memory()
    looked.processes()
    made = nvml.calls() - before
    assert made["nvmlDeviceGetMemoryInfo_v2"] == made["nvmlDeviceGetComputeRunningProcesses_v2"] == 1


def test_errors_that_pass(bench, nvml):
    """An error that need not last costs a point."""
    looked = bench(nvml)
    nvml.set(errors=[("nvmlDeviceGetMemoryInfo_v2", 999, 1)])
    assert set(looked.memory()) == {used(0)}
    nvml.set(errors=[])
    assert set(looked.memory()) == {used(0), used(1)}
    assert looked.gpus.news == []


def test_memory_is_not_supported(bench, nvml):
    """Integrated GPUs have no memory of their own."""
    nvml.set(errors=[("nvmlDeviceGetMemoryInfo_v2", 3)])
    looked = bench(nvml)
    assert [looked.memory() for _ in range(3)] == [{}] * 3
    assert nvml.calls()["nvmlDeviceGetMemoryInfo_v2"] == 2


@pytest.mark.parametrize(("code", "text"), [(9, "Driver Not Loaded"), (18, "Driver/library version mismatch")])
def test_library_that_cannot_be_initialised(bench, nvml, code, text):
    """It is said once, and not tried again."""
    nvml.set(errors=[("nvmlInit_v2", code)])
    looked = bench(nvml)
    assert [looked.memory() for _ in range(3)] == [{}] * 3
    assert looked.processes() == {}
    assert looked.gpus.news == [f"no GPUs: {text}"]
    assert nvml.calls() == {"nvmlInit_v2": 1}


def test_library_that_is_not_there(bench, nvml):
    """A container may have the device and not the library."""
    os.unlink(nvml.path)
    looked = bench(nvml)
    assert looked.memory() == {}
    assert len(looked.gpus.news) == 1
    assert looked.gpus.news[0].startswith(f"no GPUs: {nvml.path}: cannot open shared object file")


def test_a_call_that_hangs(bench, nvml):
    """The series stop, whoever asks waits 50 ms once, and they go on when the driver answers again."""
    looked = bench(nvml)
    assert set(looked.memory()) == {used(0), used(1)}
    nvml.set(delays=[("nvmlDeviceGetMemoryInfo_v2", 400)])
    began = time.monotonic()
    assert looked.memory() == {}
    first_s = time.monotonic() - began
    assert 0.045 <= first_s < 0.3
    began = time.monotonic()
    assert [looked.memory() for _ in range(100)] == [{}] * 100
    assert looked.processes() == {}
    assert time.monotonic() - began < 0.05
    assert nvml.calls()["nvmlDeviceGetMemoryInfo_v2"] == 2 + 1
    assert looked.gpus.news == ["the driver of the GPUs has not answered for 10 s"]
    nvml.set(delays=[])
    wait_until(looked.gpus._caller.is_free)
    assert looked.memory() == {used(0): 1024.0, used(1): 1024.0}
    assert len(looked.gpus.news) == 1


def test_one_late_answer_costs_a_point(bench, nvml):
    """That may be a busy machine."""
    looked = bench(nvml)
    nvml.set(delays=[("nvmlDeviceGetMemoryInfo_v2", 60)])
    assert looked.memory() == {}
    wait_until(looked.gpus._caller.is_free)
    nvml.set(delays=[])
    assert set(looked.memory()) == {used(0), used(1)}
    assert looked.gpus.news == []


def test_after_two_late_answers_there_is_a_rest(bench, nvml):
    """A driver that answers late each time is asked once in ten seconds then: sampling waits 0.5 % of the time."""
    nvml.set(delays=[("nvmlDeviceGetMemoryInfo_v2", 60)])
    looked = bench(nvml)
    for _ in range(2):
        assert looked.memory() == {}
        wait_until(looked.gpus._caller.is_free)
    before = nvml.calls()
    assert [looked.memory() for _ in range(18)] == [{}] * 18
    assert nvml.calls() == before


def test_one_thread(nvml, proc):
    """It is there while the collectors are, and not longer."""
    before = set(os.listdir("/proc/self/task"))
    looked = Bench(nvml, proc)
    looked.memory()
    looked.processes()
    (thread,) = set(os.listdir("/proc/self/task")) - before
    looked.close()
    wait_until(lambda: thread not in os.listdir("/proc/self/task"))


# -- which devices, and their numbers -------------------------------------------------------------------------------


def three():
    """Devices 0, 1 and 2, the first two of which have UUIDs that begin alike."""
    return [Device(None, uuid) for uuid in UUIDS]


@pytest.mark.parametrize(
    ("variable", "numbers"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("1gpu2,2ampere", [1, 2]),
        ("0,7,1", [0]),
        ("0,-1,1", [0]),
        ("-1", []),
        ("none", []),
        ("1,1", []),
        (UUIDS[2], [2]),
        ("GPU-9,GPU-4c1e", [2, 0]),
        ("GPU-4c", []),
        ("0,GPU-9", [0, 2]),
        ("GPU-ffff,0", []),
        ("MIG-1f", []),
    ],
)
def test_visible_devices(variable, numbers):
    """As CUDA reads the variable: numbers and UUIDs, up to the first word that is neither, and none named twice."""
    devices = three()
    found = visible(devices, {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable})
    assert [devices.index(device) for device in found] == numbers


OLD_NAME = f"MIG-{UUIDS[0]}/2/0"


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        (None, PARTS[0]),
        (PARTS[1], PARTS[1]),
        ("MIG-2a1c", PARTS[1]),
        (f"{PARTS[1]},{PARTS[0]}", PARTS[1]),
        (OLD_NAME, PARTS[1]),
        ("0", PARTS[0]),
        ("0,1", PARTS[0]),
        ("1", UUIDS[1]),
        (UUIDS[1], UUIDS[1]),
        ("MIG-3", None),
        ("2", None),
    ],
)
def test_parts_of_a_device(bench, nvml, variable, name):
    """In MIG mode a process sees one part, and with it no other device: memory and processes are those of the part."""
    nvml.gpus[0][5] = 1
    nvml.gpus.append([UUIDS[2], A100, 40 * GIB, 0, 0, 1])
    nvml.parts = [(0, PARTS[0], 1, 0, 20 * GIB, 0, 11 * MIB), (0, PARTS[1], 2, 0, 10 * GIB, 0, 22 * MIB)]
    nvml.processes = [("c", 100, PID, 5 * MIB), ("c", 101, PID, 6 * MIB)]
    nvml.use(33, gpu=1)
    looked = bench(nvml, environ={} if variable is None else {"CUDA_VISIBLE_DEVICES": variable})
    expected = {PARTS[0]: ({used(0): 11.0}, {own(0): 5.0}), PARTS[1]: ({used(0): 22.0}, {own(0): 6.0})}
    expected |= {UUIDS[1]: ({used(0): 33.0}, {}), None: ({}, {})}
    assert (looked.memory(), looked.processes()) == expected[name]


def test_numbers_are_those_of_the_process(bench, nvml):
    """With CUDA_VISIBLE_DEVICES=1,0 the second device is gpu0, and the third is nowhere."""
    nvml.gpus.append([UUIDS[2], A100, 40 * GIB, 0, 0, 0])
    nvml.use(111, gpu=0)
    nvml.use(222, gpu=1)
    looked = bench(nvml, environ={"CUDA_VISIBLE_DEVICES": "1,0"})
    assert looked.memory() == {used(0): 222.0, used(1): 111.0}


@pytest.mark.parametrize(("code", "numbers"), [(4, [0]), (15, [1])], ids=["may not be used", "lost at the start"])
def test_device_that_cannot_be_opened(bench, nvml, code, numbers):
    """CUDA does not count one that it may not open; one that is lost keeps its number, and the rest theirs."""
    nvml.use(222, gpu=1)
    nvml.set(errors=[("nvmlDeviceGetHandleByIndex_v2", code, 0)])
    assert bench(nvml).memory() == {used(number): 222.0 for number in numbers}


def test_at_most_eight_devices(bench, nvml):
    """A window has room for some sixty metrics."""
    nvml.set(gpus=[[f"GPU-{number}", T4, GIB, 0, MIB, 0] for number in range(16)])
    assert bench(nvml).memory() == {used(number): 1.0 for number in range(8)}


def test_environment_of_a_process(tmp_path):
    """It is that of its start; None of one whose environment may not be read."""
    os.mkdir(tmp_path / "7")
    (tmp_path / "7/environ").write_bytes(b"A=1\0CUDA_VISIBLE_DEVICES=1,0\0B=\xff=\0")
    assert environment_of(7, str(tmp_path)) == {"A": "1", "CUDA_VISIBLE_DEVICES": "1,0", "B": "�=", "": ""}
    assert environment_of(8, str(tmp_path)) is None


# -- without a driver -----------------------------------------------------------------------------------------------

WITHOUT = """
import os, sys
sys.path.append(sys.argv[1])
from memtrack import collectors
found, sight = collectors.build(os.getpid(), root=sys.argv[2])
print(sight.gpus, "ctypes" in sys.modules, *(name for name in sys.modules if "nvml" in name or "cuda" in name))
"""


@pytest.mark.parametrize("places", [(), ("dev/nvidiactl",), ("proc/driver/nvidia",)])
def test_without_a_driver_nothing_is_loaded(tmp_path, places):
    """Neither the device alone nor the folder alone is a driver."""
    for place in places:
        os.makedirs(tmp_path / place)
    proc = FakeProc(tmp_path / "fake")
    proc.add(PID)
    _, sight = collectors.build(PID, proc=proc.path, root=str(tmp_path))
    assert sight.gpus is None
    root = os.path.dirname(os.path.dirname(collectors.__file__))
    command = [sys.executable, "-I", "-S", "-c", WITHOUT, os.path.dirname(root), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "None False\n"


def test_with_a_driver(tmp_path, proc):
    """Both are there: collectors are built, and nothing is loaded before the first turn."""
    os.makedirs(f"{proc.path}/driver/nvidia")
    os.makedirs(tmp_path / "dev")
    (tmp_path / "dev/nvidiactl").touch()
    found, sight = collectors.build(PID, proc=proc.path, root=str(tmp_path), environ={})
    assert sight.gpus is not None
    assert [type(one) for one in found[-2:]] == [GpuMemoryCollector, GpuProcessCollector]
    assert sight.gpus._library is None
    _, sight = collectors.build(PID, proc=proc.path, root=str(tmp_path))
    assert sight.gpus is None, "without its environment, the numbers of the devices are not known"


def test_errors_have_nvml_s_own_words(nvml):
    """And the code."""
    nvml.set(errors=[("nvmlInit_v2", 18)])
    with pytest.raises(NvmlError, match="Driver/library version mismatch") as caught:
        NvmlLibrary(nvml.path)
    assert caught.value.code == 18


# -- names ----------------------------------------------------------------------------------------------------------


def test_names_of_the_series():
    """Of any device: the unit, whether there is a peak twin, and whether it is charted by default."""
    for number in (0, 7, 12):
        assert metrics.unit_of(used(number)) == "MiB"
        assert metrics.has_peak(used(number))
        assert not metrics.has_peak(own(number))
        assert metrics.peak_name(used(number)) == f"memory/gpu{number}/used_peak_mib"
        assert metrics.selected(used(number), "default")
        assert metrics.selected(own(number), "default")
        for pattern in (metrics.GPU_TOTAL, metrics.GPU_RESERVED):
            assert not metrics.selected(pattern.format(number), "default")
            assert metrics.selected(pattern.format(number), ("memory/gpu12", "memory/gpu0", "memory/gpu7"))
    assert not metrics.selected(used(1), ("memory/gpu12",))
    for gauge in (
        "loss",
        "gpu0/total",
        "memory/gpu/total_mib",
        "memory/gpux/total_mib",
        "gpu0/total_mib",
        "memory/a/gpu0/total_mib",
    ):
        assert metrics.find(gauge) is None
        assert metrics.selected(gauge, "default")
    assert not metrics.selected(metrics.WORKER_RSS.format("rest"), "default")
