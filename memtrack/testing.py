"""For tests of collectors, sinks and integrations: a clock, a ``/proc``, a sink that remembers, and what every sink
must do. No test framework is needed, except for :class:`SinkContract`, which is written for pytest.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

from memtrack import metrics
from memtrack.errors import DeliveryError, RejectedError
from memtrack.sampling.window import Place, Row
from memtrack.sinks.base import Batch, Point, RunFigures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memtrack.sinks.base import Sink

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


class RecordingSink:
    """A sink that keeps what it is given, and fails when it is told to."""

    def __init__(self, key: str = "recording") -> None:
        self.key = key
        self.batches: list[Batch] = []
        """What was taken, as it came."""
        self.figures: RunFigures | None = None
        self.closed = 0
        """How often it was closed."""
        self.attempts = 0
        """How often ``write`` or ``finish`` was called, also in vain."""
        self._failures: list[DeliveryError] = []

    def fail(self, times: int = 1, retry_after_s: float | None = None) -> None:
        """Let the next deliveries fail, as with a tracker that cannot be reached."""
        self._failures += [DeliveryError("told to fail", retry_after_s) for _ in range(times)]

    def refuse(self, times: int = 1) -> None:
        """Let the next deliveries be refused for good."""
        self._failures += [RejectedError("told to refuse") for _ in range(times)]

    @property
    def windows(self) -> list[Row]:
        """The windows of all batches."""
        return [row for batch in self.batches for row in batch.windows]

    @property
    def points(self) -> list[Point]:
        """The points of all batches."""
        return [point for batch in self.batches for point in batch.points()]

    def write(self, batch: Batch) -> None:
        """Keep the batch."""
        self._attempt()
        self.batches.append(batch)

    def finish(self, figures: RunFigures) -> None:
        """Keep the figures."""
        self._attempt()
        self.figures = figures

    def close(self) -> None:
        """Count."""
        self.closed += 1

    def _attempt(self) -> None:
        self.attempts += 1
        if self._failures:
            raise self._failures.pop(0)


def example_batch(windows: int = 3, *, names: Sequence[str] = (metrics.RSS, metrics.TREE_PSS), first: int = 0) -> Batch:
    """Windows of one second that ended a short while ago, each metric with a mean, and a maximum that is higher."""
    now_ns = time.time_ns() // _SECOND_NS * _SECOND_NS
    rows = []
    for number in range(first, first + windows):
        start_ns = number * _SECOND_NS
        row = Row(number, start_ns)
        row.end_ns = start_ns + _SECOND_NS
        row.end_wall_ns = now_ns + row.end_ns
        row.step = number
        for at, name in enumerate(names):
            value = 100.0 + number + at / 8
            for part in (0.25, 0.75, 0.5):
                row.add(name, value + part, start_ns + round(part * 1e9), Place(number, 0, (1,)), 1.0)
        rows.append(row)
    return Batch(rows, "all")


class SinkContract:
    """What every sink must do: subclass it in a test module as ``class TestMySink(SinkContract)`` and fill the hooks.

    Each test makes its own sink with ``make_sink`` and looks at what the tracker has with ``read_back``.
    """

    def make_sink(self) -> Sink:
        """A new sink, to a place of its own that is empty."""
        raise NotImplementedError

    def read_back(self) -> Iterable[Point]:
        """All points that have arrived from the sinks that this test made, in any order, under our names."""
        raise NotImplementedError

    def make_broken_sink(self) -> Sink | None:
        """A sink whose tracker cannot be reached; None if there is no such thing."""
        return None

    # -- the contract -----------------------------------------------------------------------------------------------

    def test_points_arrive(self) -> None:
        """Every point of a batch arrives with its name, its value and its time stamp, and no other does."""
        batch = example_batch()
        sink = self.make_sink()
        sink.write(batch)
        sink.close()
        arrived = list(self.read_back())
        assert sorted(arrived) == sorted(batch.points())
        assert {metrics.RSS, metrics.peak_name(metrics.RSS), metrics.TREE_PSS} == {point.name for point in arrived}

    def test_batches_follow_each_other(self) -> None:
        """A later batch adds to what an earlier one has left."""
        batches = [example_batch(3), example_batch(2, first=3)]
        sink = self.make_sink()
        for batch in batches:
            sink.write(batch)
        sink.close()
        assert {*self.read_back()} == {point for batch in batches for point in batch.points()}

    def test_repeated_batch(self) -> None:
        """A batch that comes again, because its delivery seemed to have failed, makes no point that is wrong."""
        batch = example_batch()
        sink = self.make_sink()
        sink.write(batch)
        sink.write(batch)
        sink.close()
        assert {*self.read_back()} == {*batch.points()}

    def test_empty_batch(self) -> None:
        """A batch without windows is taken, and adds nothing."""
        sink = self.make_sink()
        sink.write(example_batch(0))
        sink.close()
        assert list(self.read_back()) == []

    def test_large_batch(self) -> None:
        """1,500 points in one batch arrive, whatever the tracker takes in one request."""
        batch = example_batch(100, names=[f"memory/example/q{number}_mib" for number in range(15)])
        sink = self.make_sink()
        sink.write(batch)
        sink.close()
        expected = {*batch.points()}
        assert len(expected) == 1500
        assert {*self.read_back()} == expected

    def test_finish(self) -> None:
        """The final figures are taken after the last batch, and change no point."""
        batch = example_batch()
        sink = self.make_sink()
        sink.write(batch)
        sink.finish(RunFigures(peak_rss_mib=512.0, peak_label="exact", peak_step=3, windows=len(batch)))
        sink.close()
        assert {*self.read_back()} >= {*batch.points()}

    def test_finish_without_figures(self) -> None:
        """A run in which nothing was measured ends like any other."""
        sink = self.make_sink()
        sink.finish(RunFigures())
        sink.close()

    def test_close_twice(self) -> None:
        """Closing again does no harm."""
        sink = self.make_sink()
        sink.close()
        sink.close()

    def test_key(self) -> None:
        """The key, under which the cursor is kept, is stable and short."""
        sink = self.make_sink()
        key = sink.key
        assert 0 < len(key.encode()) <= 40
        sink.write(example_batch(1))
        assert sink.key == key
        sink.close()

    def test_unreachable_tracker(self) -> None:
        """A tracker that cannot be reached is a DeliveryError that says so, and closing afterwards is quiet."""
        sink = self.make_broken_sink()
        if sink is None:
            import pytest

            pytest.skip("needs make_broken_sink()")
        raised: DeliveryError | None = None
        try:
            sink.write(example_batch(1))
        except DeliveryError as exc:
            raised = exc
        assert raised is not None, "the batch was taken"
        assert str(raised), "the error says nothing"
        assert not isinstance(raised, RejectedError), "the tracker may be reachable again later"
        sink.close()
