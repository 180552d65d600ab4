"""The training process, the machine and memtrack itself: on a made-up /proc, and on the real one."""

from __future__ import annotations

import os
import sys

import pytest

from memtrack import metrics
from memtrack.collectors.host import HostCollector, PressureCollector
from memtrack.collectors.own import GaugeCollector, OwnCollector
from memtrack.collectors.process import ProcessCollector, ProcessDetailCollector
from memtrack.collectors.procfs import HeldFile, field_kib, open_held, program_name, start_ticks
from memtrack.testing import FakeProc

PID = 4242
SECOND_NS = 10**9
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def proc(tmp_path):
    made = FakeProc(tmp_path)
    made.add(PID, rss_mib=300.0, file_mib=50.0, shmem_mib=20.0, swap_mib=7.0, major_faults=100)
    return made


def test_rss_and_high_water(proc):
    """Each look gives the RSS and the kernel's high-water mark of that moment, through a held descriptor."""
    process = ProcessCollector(PID, proc.path)
    assert dict(process.collect(0)) == {metrics.RSS: 300.0}
    assert dict(process.high_water()) == {metrics.RSS: 300.0}
    proc.update(PID, rss_mib=120.5, peak_mib=900.25)
    assert dict(process.collect(1)) == {metrics.RSS: 120.5}
    assert dict(process.high_water()) == {metrics.RSS: 900.25}
    process.close()


def test_process_that_is_gone(proc):
    """Without memory lines, as of a zombie, it raises; another process with the same pid is never mistaken for it."""
    process = ProcessCollector(PID, proc.path)
    process.collect(0)
    proc.kill(PID)
    proc.add(PID, rss_mib=999.0)
    with pytest.raises(ValueError, match="no memory"):
        process.collect(1)
    assert list(process.high_water()) == []
    with pytest.raises(FileNotFoundError):
        ProcessCollector(PID + 1, proc.path)


def test_details(proc):
    """What resident memory consists of, and how many faults a second needed the disk."""
    process = ProcessCollector(PID, proc.path)
    details = ProcessDetailCollector(process, PID, proc.path)
    process.high_water()
    assert dict(details.collect(SECOND_NS)) == {
        metrics.ANON: 230.0, metrics.FILE: 50.0, metrics.SHMEM: 20.0, metrics.SWAP: 7.0,
    }  # fmt: skip
    proc.update(PID, major_faults=150)
    process.high_water()
    assert dict(details.collect(3 * SECOND_NS))[metrics.MAJOR_FAULTS] == 25.0
    details.close()


def test_details_before_the_first_look(proc):
    """Nothing is made up before the process was looked at."""
    details = ProcessDetailCollector(ProcessCollector(PID, proc.path), PID, proc.path)
    assert dict(details.collect(0)) == {}


def test_host(proc, tmp_path):
    """Available memory, and swap in use."""
    proc.set_meminfo(available_mib=5000.0, swap_total_mib=2048.0, swap_free_mib=2000.0)
    host = HostCollector(proc.path, shm=str(tmp_path))
    found = dict(host.collect(0))
    assert (found[metrics.HOST_AVAILABLE], found[metrics.HOST_SWAP]) == (5000.0, 48.0)
    assert found[metrics.HOST_DEV_SHM] >= 0.0
    host.close()


def test_host_without_shm(proc, tmp_path):
    """A machine without /dev/shm has no such value, not zero."""
    found = dict(HostCollector(proc.path, shm=str(tmp_path / "missing")).collect(0))
    assert metrics.HOST_DEV_SHM not in found
    assert metrics.HOST_AVAILABLE in found


def test_pressure(proc):
    """The share of the last ten seconds in which some task waited; absent where the kernel has no PSI."""
    proc.set_pressure(12.34)
    pressure = PressureCollector(proc.path)
    assert dict(pressure.collect(0)) == {metrics.HOST_PRESSURE: 12.34}
    pressure.close()
    proc.set_pressure(None)
    assert dict(PressureCollector(proc.path).collect(0)) == {}


def test_own_cost():
    """The agent's share of a core is that since the last look; counters are passed on."""
    cpu_ns = 0
    own = OwnCollector(lambda: cpu_ns, lambda: [(metrics.SELF_MERGED, 3.0)])
    first = dict(own.collect(SECOND_NS))
    assert metrics.SELF_CPU not in first
    cpu_ns = 4 * 10**6
    found = dict(own.collect(3 * SECOND_NS))
    assert found[metrics.SELF_CPU] == pytest.approx(0.2)
    assert found[metrics.SELF_MERGED] == 3.0
    own.close()


def test_gauges():
    """Gauges are passed on as they are."""
    assert list(GaugeCollector(lambda: [("a", 1.0)]).collect(0)) == [("a", 1.0)]


# -- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"VmPeak:\t  900 kB\nVmRSS:\t  2048 kB\nVmHWM:\t 1 kB\n", 2.0),
        (b"VmRSS:\t1 kB\n", 1 / 1024),
        (b"VmRSS: 1024 kB", 1.0),
        (b"Name:\tx\n", None),
        (b"", None),
    ],
)
def test_field(text, value):
    """A labelled number of kB in MiB; None where there is no such line."""
    if not text.endswith(b"\n") and value is not None:
        text += b"\n"
    assert field_kib(text, b"VmRSS:") == value


def test_start_ticks_of_a_process_with_an_odd_name(proc):
    """Blanks and brackets in the name do not shift the fields."""
    proc.update(PID, name="a) b (c", start_ticks=987654)
    assert start_ticks(PID, proc.path) == 987654
    with pytest.raises(FileNotFoundError):
        start_ticks(1, proc.path)


def test_held_file(tmp_path):
    """It sees what was written later, may be closed twice, and is None where there is nothing to open."""
    path = tmp_path / "file"
    path.write_text("one")
    file = HeldFile(str(path))
    path.write_text("three")
    assert file.read() == b"three"
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read()
    assert open_held(str(tmp_path / "missing")) is None


@linux
def test_this_process():
    """On the real /proc: RSS is what statm says, the peak is no lower, and growth shows."""
    process = ProcessCollector(os.getpid())
    details = ProcessDetailCollector(process, os.getpid())
    before = dict(process.collect(0))[metrics.RSS]
    held = b"x" * (64 << 20)
    after = dict(process.collect(1))[metrics.RSS]
    with open("/proc/self/statm", encoding="ascii") as file:
        statm = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert after - before == pytest.approx(64.0, abs=4.0)
    assert after == pytest.approx(statm, abs=1.0)
    assert dict(process.high_water())[metrics.RSS] >= after - 1.0
    parts = dict(details.collect(1))
    assert parts[metrics.ANON] + parts[metrics.FILE] + parts[metrics.SHMEM] == pytest.approx(after, abs=0.1)
    del held
    details.close()
    process.close()


@linux
def test_this_machine():
    """On the real /proc, every value of the machine is there and plausible."""
    found = dict(HostCollector().collect(0))
    assert 0 < found[metrics.HOST_AVAILABLE] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert found[metrics.HOST_SWAP] >= 0
    pressure = dict(PressureCollector().collect(0))
    assert all(0 <= value <= 100 for value in pressure.values())
    assert start_ticks(os.getpid()) > 0
    assert program_name(os.getpid())
