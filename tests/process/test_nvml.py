"""The agent on a machine with NVIDIA's driver, or so it looks to it: in a mount namespace of its own, with a library
that stands in for NVML."""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtrack import metrics
from memtrack.recording import layout
from memtrack.recording.reader import RecordingReader
from tests.nvml_lab import MIB, T4, nvml, nvml_builds

__all__ = ["nvml", "nvml_builds"]

DRIVER = """
set -e
mount -t tmpfs none /proc/driver
mkdir /proc/driver/nvidia
mount -t tmpfs none "$1"
for name in null zero full random urandom; do touch "$1/$name"; mount --bind /dev/$name "$1/$name"; done
mkdir "$1/shm"
mount --bind /dev/shm "$1/shm"
ln -s /proc/self/fd "$1/fd"
touch "$1/nvidiactl"
mount --rbind "$1" /dev
shift
exec "$@"
"""


@pytest.fixture
def driver(tmp_path, nvml):
    """What to put before a command to have it run on such a machine, and its environment."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, and unshare")
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    (tmp_path / "dev").mkdir()
    prefix = ["unshare", "--mount", "sh", "-c", DRIVER, "sh", str(tmp_path / "dev")]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "MEMTRACK_DIR": str(tmp_path / "recordings")}
    return prefix, {name: value for name, value in environment.items() if not name.startswith("CUDA_")}


@pytest.fixture
def training(driver, tools, tmp_path):
    """Starts a training that goes on until its input ends: the process, its recording, and its agent's pid."""
    prefix, environment = driver
    children = []

    def start(code=""):
        script = tmp_path / "train.py"
        script.write_text(f"""
import sys
sys.path.insert(0, {str(tools.root)!r})
import os, memtrack
{code}
with memtrack.start(interval=0.2) as monitor:
    print(monitor.path, monitor.wait_ready(), flush=True)
    sys.stdin.read()
""")
        command = [*prefix, sys.executable, "-I", "-S", str(script)]
        child = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(child)
        path, is_ready = child.stdout.readline().split()
        assert is_ready == "True"
        return child, path, tools.agent_of(path)

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def newest(path):
    """The last values of the newest window."""
    with RecordingReader(path) as reader:
        rows = list(reader.windows())
    return {name: cell.last for name, cell in rows[-1].cells.items()} if rows else {}


def used(number):
    return metrics.GPU_USED.format(number)


def own(number):
    return metrics.GPU_PROCESS_USED.format(number)


def test_agent_records_gpus(training, nvml, tools):
    """Numbers are those of the program, which chose its devices in code; the agent stays below 10 MiB; a device that is
    lost ends its series and is an event, and the rest goes on."""
    # an agent that has to compile its modules first is a MiB larger
    compileall.compile_dir(tools.root / "memtrack", quiet=1)
    nvml.use(2000, gpu=0)
    nvml.use(3000, gpu=1)
    child, path, agent = training('os.environ["CUDA_VISIBLE_DEVICES"] = "1,0"')
    nvml.set(processes=[("c", 1, child.pid, 700 * MIB)])
    tools.wait_until(lambda: newest(path).get(used(1)) == 2000.0)
    assert newest(path)[used(0)] == 3000.0
    tools.wait_until(lambda: newest(path).get(own(0)) == 700.0)
    assert own(1) not in newest(path)
    assert not set(newest(path)) & {metrics.GPU_TOTAL.format(0), metrics.GPU_RESERVED.format(0)}
    nvml.use(3500, gpu=1)
    tools.wait_until(lambda: newest(path).get(used(0)) == 3500.0)
    assert float(tools.status(agent, "VmRSS").split()[0]) / 1024 < 10.0
    assert nvml.calls()["nvmlInit_v2"] == 1
    nvml.set(errors=[("nvmlDeviceGetMemoryInfo_v2", 15, 1)])
    tools.wait_until(lambda: used(0) not in newest(path))
    assert newest(path)[used(1)] == 2000.0
    child.communicate("", timeout=20)
    assert child.returncode == 0
    with RecordingReader(path) as reader:
        tools.wait_until(lambda: reader.head().state == layout.STOPPED)
        texts = [event.text for event in reader.events() if event.kind == "gpu"]
        highest = max(row.cells[used(0)].max for row in reader.windows() if used(0) in row.cells)
    assert texts == ["memory of gpu0 is not measured any more: GPU is lost"]
    assert highest == 3500.0


@pytest.mark.parametrize("function", ["nvmlInit_v2", "nvmlDeviceGetMemoryInfo_v2"])
def test_driver_that_hangs(training, nvml, tools, function):
    """A call that does not return holds nothing up: sampling goes on, and the verdict is there after a kill."""
    nvml.set(delays=[(function, 3_600_000)])
    child, path, agent = training()
    tools.wait_until(lambda: nvml.calls()[function] == 1)
    with RecordingReader(path) as reader:
        before = reader.head().ticks
        tools.wait_until(lambda: reader.head().ticks >= before + 10)
        os.kill(child.pid, signal.SIGKILL)
        tools.wait_until(lambda: reader.head().state == layout.ENDED)
        assert "SIGKILL" in reader.verdict().text
        assert not [row for row in reader.windows() if used(0) in row.cells]
    tools.wait_until(lambda: tools.is_gone(agent))
    assert nvml.calls()[function] == 1


def doctor(driver, **variables):
    prefix, environment = driver
    code = f"""
import sys
sys.path[:0] = [{str(Path(metrics.__file__).parents[1])!r}]
from memtrack.cli.checks import gpu
check = gpu()
print(check.state, check.name, check.text)
"""
    command = [*prefix, sys.executable, "-c", code]
    environment = {**environment, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_doctor_names_the_devices(driver, nvml):
    """Driver, and the devices as a process counts them; a note where CUDA may count otherwise."""
    assert doctor(driver) == (
        "ok GPU NVIDIA driver 550.54.15: gpu0 NVIDIA-A100-SXM4-40GB 40.00 GiB GPU-4c1e7a90, "
        "gpu1 NVIDIA-A100-SXM4-40GB 40.00 GiB GPU-4c8f2b11\n"
    )
    assert "gpu0 NVIDIA-A100-SXM4-40GB 40.00 GiB GPU-4c8f2b11\n" in doctor(driver, CUDA_VISIBLE_DEVICES="1")
    nvml.gpus[1][1] = T4
    nvml.write()
    mixed = doctor(driver)
    assert mixed.startswith("note GPU NVIDIA driver 550.54.15")
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in mixed
    assert doctor(driver, CUDA_DEVICE_ORDER="PCI_BUS_ID").startswith("ok GPU")


def test_doctor_says_what_is_wrong(driver, nvml):
    """With NVML's own words, and it waits for no answer longer than 5 s."""
    nvml.set(errors=[("nvmlInit_v2", 18)])
    assert doctor(driver) == (
        "note GPU NVIDIA driver, but no NVML (Driver/library version mismatch): no memory/gpuN metrics\n"
    )
    nvml.set(errors=[("nvmlDeviceGetHandleByIndex_v2", 15, 0), ("nvmlDeviceGetMemoryInfo_v2", 3, 1)])
    assert doctor(driver) == (
        "ok GPU NVIDIA driver 550.54.15: gpu0 of unknown model cannot be opened, "
        "gpu1 NVIDIA-A100-SXM4-40GB without figures (Not Supported) GPU-4c8f2b11\n"
    )
    nvml.set(errors=[], delays=[("nvmlInit_v2", 60_000)])
    assert doctor(driver).startswith("note GPU NVIDIA's driver has not answered for 5 s")
