"""NVIDIA GPUs: memory in use on each device that the training process sees, and its own share of it.

``memory/gpuN/…`` has N as the training process counts, see ``cuda_devices``. Everything is read here, in the agent,
through NVML: CUDA is never touched, in no process. Without the driver (no ``/dev/nvidiactl``, or no
``/proc/driver/nvidia``, which is also how WSL looks) nothing is loaded, not even ctypes.

**A driver that does not answer.** Calls of NVML wait for a lock of the driver, and while a GPU falls off the bus they
may wait for ever. So they are made in a thread of their own, one at a time, for which sampling waits 50 ms (100 ms for
the lists of processes) and no longer. When it takes longer, the series stop until it has returned, and after two such
calls in a row for another ten seconds; everything else goes on. A call that never returns costs these series and
nothing else, as long as the training process lives. If it hangs in the kernel where not even SIGKILL reaches it, the
agent cannot end either, nor deliver after the death of the process, until the driver lets go or the machine restarts.

**Errors.** A device that is lost, or does not support what is asked (memory of some integrated GPUs, lists of processes
under MIG without the right to see them), is left out from then on; with any other error, until the next turn. What
ends a series of memory for good, and a call that has not returned for ten seconds, is an event of kind ``gpu``.

**Processes** are told by pid. In the first pid namespace NVML's pids are those that the agent sees. In a container they
may be the host's, or there are none: a list with a pid that is no process here is not believed. The share of the
process is absent, never zero, until one of its tree has been seen on the device.

This was built without NVIDIA hardware at hand: after ``nvml.h`` and NVML's reference, and tested against a library that
stands in for NVML.
"""

from __future__ import annotations

import _thread
import os

from memtrack import metrics
from memtrack.collectors.base import Collector
from memtrack.collectors.cuda_devices import all_devices, visible
from memtrack.collectors.nvml_library import FOR_GOOD, LIBRARY, NvmlError, NvmlLibrary
from memtrack.collectors.procfs import pids_are_true

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from memtrack.collectors.base import Sample
    from memtrack.collectors.nvml_library import Handle
    from memtrack.collectors.tree import TreeCollector

DEVICES = 8
"""Devices beyond it are not shown: a window has room for some sixty metrics in all."""

MEMORY_PATIENCE_S, PROCESSES_PATIENCE_S = 0.05, 0.1
REST_NS = 10_000_000_000
"""How long nothing is asked after two calls in a row that took longer than that, and when a call has hung."""


class Caller:
    """A thread that does jobs one at a time, for somebody who does not wait for them longer than he wants to."""

    def __init__(self) -> None:
        self._given, self._done = _thread.allocate_lock(), _thread.allocate_lock()
        self._given.acquire()
        self._done.acquire()
        self._job: Callable[[], None] | None = None
        self._is_started = False
        self.is_busy = False

    def do(self, job: Callable[[], None], patience_s: float) -> bool:
        """Have ``job`` done; whether that was so in time. If it was not, it goes on: see ``is_free``."""
        self._job = job
        self.is_busy = True
        if not self._is_started:
            self._is_started = True
            _thread.start_new_thread(self._work, ())
        self._given.release()
        return self._wait(patience_s)

    def is_free(self) -> bool:
        """Whether the last job is done, if there was one."""
        return not self.is_busy or self._wait(0.0)

    def close(self) -> None:
        """Let the thread end, after what it is at. Called once."""
        self._job = None
        if self._is_started:
            self._given.release()

    def _wait(self, patience_s: float) -> bool:
        self.is_busy = not self._done.acquire(timeout=patience_s)
        return not self.is_busy

    def _work(self) -> None:
        while True:
            self._given.acquire()
            if self._job is None:
                return
            try:
                self._job()
            except Exception:
                pass  # nothing may end the thread, or those who wait for it would do so for ever
            self._done.release()


class Gpu:
    """A device with its number, and what is known of it. Written by the caller's thread."""

    __slots__ = ("handle", "has_list", "has_memory", "is_used", "number")

    def __init__(self, number: int, handle: Handle) -> None:
        self.number = number
        self.handle = handle
        self.has_memory = self.has_list = True
        self.is_used = False
        """Whether a process of the tree has been seen on it."""


class Gpus:
    """The devices that a process with the environment ``environ`` sees. Opened in the background at the first turn.

    ``choice`` is what is charted, as a recording's header has it: ``default``, ``all``, or names with commas. What is
    only there on request is not recorded otherwise, so that eight devices fit into a window.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        choice: str = "default",
        *,
        proc: str = "/proc",
        library: str = LIBRARY,
    ) -> None:
        self._environ = {name: environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in environ}
        self._choice: str | list[str] = choice if choice in ("default", "all") else choice.split(",")
        self._proc = proc
        self._path = library
        self._library: NvmlLibrary | None = None
        self._caller = Caller()
        self._is_opening = False
        self._asked_ns = self._rest_ns = 0
        self._is_late = self._has_complained = False
        self._turn = 0
        self._pids_are_true = pids_are_true(proc)
        self.devices: list[Gpu] = []
        self.news: list[str] = []
        """What is to become an event. Whoever takes it empties the list."""

    def memory(self, now_ns: int) -> list[Sample]:
        """Of each device; nothing if NVML is not ready, or does not answer."""
        samples: list[Sample] = []
        asked = [gpu for gpu in self.devices if gpu.has_memory]
        done = self._is_ready(now_ns) and self._do(lambda: self._read_memory(asked, samples), now_ns, MEMORY_PATIENCE_S)
        return samples if done else []

    def processes(self, now_ns: int, pids: Collection[int]) -> list[Sample] | None:
        """What ``pids`` have on each device where one of them was seen. None if NVML is not ready, or does not answer.

        First all devices are asked, then these and one of the others in turn: many may ask on one machine.
        """
        samples: list[Sample] = []
        if not self._is_ready(now_ns):
            return None
        turn, self._turn = self._turn, self._turn + 1
        asked = [
            gpu
            for place, gpu in enumerate(self.devices)
            if gpu.has_list and (turn == 0 or gpu.is_used or place == turn % len(self.devices))
        ]
        done = self._do(lambda: self._read_processes(asked, pids, samples), now_ns, PROCESSES_PATIENCE_S)
        return samples if done else None

    def close(self) -> None:
        """Let the thread end. The library stays as it is: the process is about to end, too."""
        self._caller.close()

    def _is_ready(self, now_ns: int) -> bool:
        if not self._caller.is_free():
            if now_ns >= self._asked_ns + REST_NS and not self._has_complained:
                self._has_complained = True
                self.news.append(f"the driver of the GPUs has not answered for {REST_NS // 10**9} s")
            return False
        if not self._is_opening:
            self._is_opening = True
            self._asked_ns = now_ns
            self._caller.do(self._open, 0.0)
            return False
        return now_ns >= self._rest_ns and bool(self.devices)

    def _do(self, job: Callable[[], None], now_ns: int, patience_s: float) -> bool:
        self._asked_ns = now_ns
        done = self._caller.do(job, patience_s)
        # once may be a busy machine
        if not done and self._is_late:
            self._rest_ns = now_ns + REST_NS
        self._is_late = not done
        return done

    # -- in the caller's thread -------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Once: a driver that is not there, or is of another version than its library, will not be repaired soon."""
        try:
            self._library = NvmlLibrary(self._path)
            devices = visible(all_devices(self._library), self._environ)[:DEVICES]
        except NvmlError as exc:
            self.news.append(f"no GPUs: {exc}")
            return
        self.devices = [Gpu(n, device.handle) for n, device in enumerate(devices) if device.handle is not None]

    def _read_memory(self, asked: Iterable[Gpu], samples: list[Sample]) -> None:
        for gpu in asked:
            try:
                used, total, reserved = self._library.memory(gpu.handle)  # type: ignore[union-attr]
            except NvmlError as exc:
                if exc.code in FOR_GOOD:
                    gpu.has_memory = False
                    self.news.append(f"memory of gpu{gpu.number} is not measured any more: {exc}")
                continue
            samples.append((metrics.GPU_USED.format(gpu.number), used / metrics.MIB))
            for pattern, value in ((metrics.GPU_TOTAL, total), (metrics.GPU_RESERVED, reserved)):
                name = pattern.format(gpu.number)
                if value is not None and metrics.selected(name, self._choice):
                    samples.append((name, value / metrics.MIB))

    def _read_processes(self, asked: Iterable[Gpu], pids: Collection[int], samples: list[Sample]) -> None:
        for gpu in asked:
            try:
                found = self._library.processes(gpu.handle)  # type: ignore[union-attr]
            except NvmlError as exc:
                gpu.has_list = exc.code not in FOR_GOOD
                continue
            if not (self._pids_are_true or all(os.path.exists(f"{self._proc}/{pid}") for pid in found)):
                continue
            own = [used for pid, used in found.items() if pid in pids]
            gpu.is_used = gpu.is_used or bool(own)
            known = [used for used in own if used is not None]
            if gpu.is_used and len(known) == len(own):
                samples.append((metrics.GPU_PROCESS_USED.format(gpu.number), sum(known) / metrics.MIB))


class GpuMemoryCollector(Collector):
    """Twice a second: memory in use on each device."""

    period_s = 0.5

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus

    def collect(self, now_ns: int) -> list[Sample]:
        return self._gpus.memory(now_ns)

    def close(self) -> None:
        self._gpus.close()


class GpuProcessCollector(Collector):
    """Every ten seconds: what the training process and its descendants have on each device.

    The driver's lock is the application's, too, and a list of processes holds it for milliseconds.
    """

    period_s = 10.0

    def __init__(self, gpus: Gpus, tree: TreeCollector) -> None:
        self._gpus = gpus
        self._tree = tree

    def collect(self, now_ns: int) -> list[Sample]:
        found = self._gpus.processes(now_ns, {member.pid for member in self._tree.members()})
        # while NVML is being opened it is worth while to ask again before ten seconds have passed
        self.stale = found is None
        return found or []
