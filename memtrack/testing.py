"""For tests of collectors, sinks and integrations: a clock, a ``/proc``, a sink that remembers, and what every sink
must do. No test framework is needed, except for :class:`SinkContract`, which is written for pytest.
"""

from __future__ import annotations

import os
import shutil

from memtrack import metrics
from memtrack.sinks.contract import RecordingSink, SinkContract, example_batch

__all__ = ["FakeClock", "FakeProc", "FakeProcess", "RecordingSink", "SinkContract", "example_batch"]

_SECOND_NS = 10**9


class FakeClock:
    """Virtual time: monotonic, wall and CPU nanoseconds that move when they are told to.

    >>> clock = FakeClock()
    >>> before = clock.monotonic_ns()
    >>> clock.advance(1.5)
    >>> clock.monotonic_ns() - before
    1500000000
    """

    def __init__(self, now_ns: int = 1000 * _SECOND_NS, wall_ns: int = 1_700_000_000 * _SECOND_NS) -> None:
        self.now_ns = now_ns
        self.wall_ns = wall_ns
        self.cpu_ns = 0

    def advance(self, seconds: float) -> None:
        """Let time pass, on both clocks."""
        self.advance_to(self.now_ns + round(seconds * _SECOND_NS))

    def advance_to(self, now_ns: int) -> None:
        """Let time pass until the monotonic clock shows ``now_ns``; never back."""
        passed_ns = max(now_ns - self.now_ns, 0)
        self.now_ns += passed_ns
        self.wall_ns += passed_ns

    def spend_cpu(self, seconds: float) -> None:
        """Let the process have used the processor; time does not pass by it."""
        self.cpu_ns += round(seconds * _SECOND_NS)

    def monotonic_ns(self) -> int:
        """Like ``time.monotonic_ns``."""
        return self.now_ns

    def time_ns(self) -> int:
        """Like ``time.time_ns``."""
        return self.wall_ns

    def process_time_ns(self) -> int:
        """Like ``time.process_time_ns``."""
        return self.cpu_ns


class FakeProcess:
    """What :class:`FakeProc` shows of one process. Change the attributes, then call ``FakeProc.update``. MiB."""

    def __init__(self, pid: int, parent: int) -> None:
        self.pid = pid
        self.parent = parent
        self.name = "python (train) 3"
        self.start_ticks = 12345
        self.major_faults = 0
        self.rss_mib = 100.0
        self.peak_mib: float | None = None
        """``VmHWM``; None: the highest ``rss_mib`` so far."""
        self.file_mib = 0.0
        self.shmem_mib = 0.0
        self.swap_mib = 0.0
        self.pss_mib: float | None = None
        """``Pss`` of ``smaps_rollup``; None: all of ``rss_mib``."""
        self.threads: dict[int, list[int]] = {pid: []}
        """Thread ids, and the children that each thread has forked."""
        self.highest_mib = 0.0


class FakeProc:
    """A ``/proc`` in a folder, for collectors that take ``proc=``. Files are rewritten in place, descriptors stay good.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> proc = FakeProc(folder.name)
    >>> process = proc.add(4242, rss_mib=300)
    >>> proc.update(4242, rss_mib=200)
    >>> sorted(os.listdir(proc.path))
    ['4242', 'meminfo', 'pressure']
    >>> folder.cleanup()
    """

    def __init__(self, folder: str | os.PathLike[str], *, children_files: bool = True) -> None:
        """``children_files`` False: a kernel without CONFIG_PROC_CHILDREN."""
        self.path = os.path.join(os.fspath(folder), "proc")
        self.processes: dict[int, FakeProcess] = {}
        self._children_files = children_files
        os.makedirs(os.path.join(self.path, "pressure"))
        self.set_meminfo()
        self.set_pressure(0.0)

    def set_meminfo(
        self,
        *,
        total_mib: float = 16384.0,
        available_mib: float = 8192.0,
        swap_total_mib: float = 0.0,
        swap_free_mib: float = 0.0,
    ) -> None:
        """What the machine has."""
        lines = {
            "MemTotal": total_mib,
            "MemFree": available_mib / 2,
            "MemAvailable": available_mib,
            "SwapTotal": swap_total_mib,
            "SwapFree": swap_free_mib,
        }
        self._write("meminfo", _kib_lines(lines))

    def set_pressure(self, some_avg10: float | None) -> None:
        """Memory pressure in percent; None: a kernel without PSI."""
        if some_avg10 is None:
            os.unlink(os.path.join(self.path, "pressure/memory"))
            return
        line = f"avg10={some_avg10:.2f} avg60=0.00 avg300=0.00 total=0\n"
        self._write("pressure/memory", f"some {line}full {line}")

    def add(self, pid: int, *, parent: int = 1, thread: int | None = None, **values: object) -> FakeProcess:
        """A new process, forked by ``thread`` of ``parent``, or by its main thread; ``values`` as in ``update``."""
        process = self.processes[pid] = FakeProcess(pid, parent)
        self.update(pid, **values)
        if parent in self.processes:
            self.processes[parent].threads.setdefault(thread or parent, []).append(pid)
            self.update(parent)
        return process

    def update(self, pid: int, **values: object) -> None:
        """Set attributes of :class:`FakeProcess` and write its files anew."""
        process = self.processes[pid]
        for name, value in values.items():
            if not hasattr(process, name):
                raise AttributeError(f"a FakeProcess has no {name!r}")
            setattr(process, name, value)
        process.highest_mib = max(process.highest_mib, process.rss_mib)
        self._write_process(process)

    def end_thread(self, pid: int, thread: int) -> None:
        """Let a thread end; the kernel gives its children to another one."""
        threads = self.processes[pid].threads
        orphans = threads.pop(thread)
        threads[pid] += orphans
        shutil.rmtree(os.path.join(self.path, f"{pid}/task/{thread}"), ignore_errors=True)
        self._write_process(self.processes[pid])

    def kill(self, pid: int) -> None:
        """The process is gone: its folder is not there, and descriptors that were held on it give nothing."""
        process = self.processes.pop(pid)
        folder = os.path.join(self.path, str(pid))
        for place, _, names in os.walk(folder):
            for name in names:
                os.truncate(os.path.join(place, name), 0)
        shutil.rmtree(folder)
        if process.parent in self.processes:
            for children in self.processes[process.parent].threads.values():
                if pid in children:
                    children.remove(pid)
            self.update(process.parent)

    def _write_process(self, process: FakeProcess) -> None:
        pid, rss_mib = process.pid, process.rss_mib
        private_mib = rss_mib - process.file_mib - process.shmem_mib
        peak_mib = process.highest_mib if process.peak_mib is None else process.peak_mib
        head = f"Name:\t{process.name}\nState:\tS (sleeping)\nPid:\t{pid}\nPPid:\t{process.parent}\n"
        sizes = {
            "VmSize": rss_mib * 3,
            "VmHWM": peak_mib,
            "VmRSS": rss_mib,
            "RssAnon": private_mib,
            "RssFile": process.file_mib,
            "RssShmem": process.shmem_mib,
            "VmSwap": process.swap_mib,
        }
        self._write(f"{pid}/status", f"{head}{_kib_lines(sizes)}Threads:\t{len(process.threads)}\n")
        pages = [round(mib * metrics.MIB / os.sysconf("SC_PAGE_SIZE")) for mib in (rss_mib * 3, rss_mib, 0.0)]
        self._write(f"{pid}/statm", f"{pages[0]} {pages[1]} {pages[2]} 1 0 {pages[1]} 0\n")
        fields = ["S", process.parent, pid, pid, 0, -1, 0, 100, 0, process.major_faults, 0, *(0,) * 8]
        fields += [process.start_ticks, *(0,) * 30]
        self._write(f"{pid}/stat", f"{pid} ({process.name}) {' '.join(map(str, fields))}\n")
        pss_mib = rss_mib if process.pss_mib is None else process.pss_mib
        rollup = _kib_lines({"Rss": rss_mib, "Pss": pss_mib, "Pss_Anon": pss_mib / 2})
        self._write(f"{pid}/smaps_rollup", f"00400000-7fff0000 ---p 00000000 00:00 0 [rollup]\n{rollup}")
        for thread, children in process.threads.items():
            os.makedirs(os.path.join(self.path, f"{pid}/task/{thread}"), exist_ok=True)
            if self._children_files:
                self._write(f"{pid}/task/{thread}/children", "".join(f"{child} " for child in children))

    def _write(self, name: str, text: str) -> None:
        path = os.path.join(self.path, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="ascii") as file:
            file.write(text)


def _kib_lines(sizes: dict[str, float]) -> str:
    return "".join(f"{label}:\t{round(mib * 1024):8d} kB\n" for label, mib in sizes.items())
