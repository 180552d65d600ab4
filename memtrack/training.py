"""What the callbacks of all frameworks have in common: they tell where a training stands, and get figures for its log.

It is public for those who write a callback for another framework.
"""

from __future__ import annotations

import os
import sys
from time import monotonic_ns
from typing import TYPE_CHECKING

from memtrack import api, autologging, config
from memtrack.agent import job
from memtrack.allocators import shared as allocators
from memtrack.collectors.procfs import PAGE_MIB, open_held
from memtrack.metrics import MIB
from memtrack.monitor import active
from memtrack.notices import warn_once
from memtrack.sampling.window import NO_STEP

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STEP_PEAK = "memory/step/rss_peak_mib"
"""The highest resident memory since the row before: the peak of the steps that a row of the user's log is of. Where
the framework has a row for each epoch, it is ``memory/epoch/rss_peak_mib``."""
PEAKS = {"step": STEP_PEAK, "epoch": "memory/epoch/rss_peak_mib"}

UNSEEN_MIB = 4.0
LEVEL_NS = 100_000_000
# places in what getrusage gives; names would have to be looked up
_MAXRSS, _MINFLT, _MAJFLT = 2, 6, 7
_PAGE_BYTES = PAGE_MIB * MIB
_FEW_FAULTS = int(UNSEEN_MIB * MIB / (_PAGE_BYTES * _PAGE_BYTES / 8))
"""How many page faults cannot bring more than ``UNSEEN_MIB``, should each bring a huge page. That is as many pages as
there is room in one for entries of eight bytes: 2 MiB with pages of 4 KiB."""


def step_reached() -> int | None:
    """The step that was marked last in this process, by whomever; -1 if none was, None while nothing is monitoring."""
    marks = active.marks
    return None if marks is None else marks.last_step


def gather_ranks() -> bool:
    """Tell memtrack that the ranks of a distributed training have been started, this process being one of them.

    On each node the first rank's run then shows all of them: ``memory/ranks/…``. There is no need to call it where
    the launcher says in the environment which rank a process is (``torchrun``, ``accelerate launch``, ``mpirun``,
    ``srun``), but where that is known only later: in the first rank of Lightning's ``ddp``, and in what
    ``torch.multiprocessing.spawn`` has started, after ``init_process_group`` and :func:`memtrack.autolog`.

    Returns whether this process is a rank among several, and monitored. May be called twice. Never raises.
    """
    try:
        if active.monitor is None:
            autologging.join(None)
        rank, marks = job.rank_now(), active.marks
        if rank is None or marks is None:
            return False
        marks.tell_rank(rank)
        return True
    except Exception as exc:
        warn_once("ranks", f"memtrack does not gather the ranks ({type(exc).__name__}: {exc}).")
        return False


class _Peak:
    """The highest RSS of this process, from call to call.

    It is asked in the middle of a training, when nothing of this is in the processor's caches: each line, and each
    system call above all, takes ten times as long as in a loop of its own.
    """

    def __init__(self) -> None:
        self._statm = open_held("/proc/self/statm", 64)
        self._usage: Callable[[int], Any] | None = None
        self._who, self._per_mib = 0, 1
        if sys.platform != "win32":
            import resource

            self._usage, self._who = resource.getrusage, resource.RUSAGE_SELF
            self._per_mib = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB elsewhere: getrusage(2)
        self._high_water = 0
        self._faults = 0
        self._level_mib = 0.0
        self._level_ns = 0
        """What the process stood at, when that was read, and how many page faults it had had by then."""
        self.take_mib(0.0, 0)

    def take_mib(self, sampled_mib: float, now_ns: int) -> float:
        """The highest since the last call. ``sampled_mib`` is what the agent saw, NaN if it did not look.

        The kernel's mark of the highest ever tells of each new peak exactly, though it may have lasted no time; of one
        that is lower than an earlier one the agent tells, if it lasted from one sample to the next. What the process
        stands at counts, too. It is read only if it may be higher by more than ``UNSEEN_MIB`` than it was: no memory
        comes without a page fault.
        """
        has_looked = sampled_mib == sampled_mib
        peak_mib = sampled_mib if has_looked else 0.0
        faults = 0
        if self._usage is not None:
            usage = self._usage(self._who)
            faults, high_water = usage[_MINFLT] + usage[_MAJFLT], int(usage[_MAXRSS])
            # what execve has replaced counts in the mark as well, so its height alone says nothing
            if high_water > self._high_water:
                self._high_water = high_water
                self._level_ns = self._faults = 0
                return max(peak_mib, high_water / self._per_mib)
        if faults - self._faults <= _FEW_FAULTS:
            if has_looked:
                return sampled_mib
            # it may have fallen, which the agent would have seen by then
            if now_ns - self._level_ns < LEVEL_NS:
                return self._level_mib
        if self._statm is None:
            return peak_mib or self._high_water / self._per_mib
        self._level_mib = level_mib = int(self._statm.read().split(None, 2)[1]) * PAGE_MIB
        self._level_ns, self._faults = now_ns, faults
        return level_mib if level_mib > peak_mib else peak_mib


class Training:
    """A training as its framework's callback sees it: ``begin``, then phases, epochs, steps and rows, then ``end``.

    Phases follow each other here, they do not nest: ``enter("validation")`` leaves ``train`` for a while, ``leave()``
    comes back to it. What the program opens itself with ``memtrack.phase`` lies inside. Not thread-safe. Nothing but
    the making of it raises.
    """

    def __init__(
        self,
        *,
        automatic: bool = False,
        checkpoints: bool | str | os.PathLike[str] = False,
        **settings: Any,
    ) -> None:
        """``settings`` are those of :func:`memtrack.autolog`, for a process in which nothing is monitoring yet.

        ``automatic``: of a callback that autolog has put there; it begins nothing if autolog was taken back meanwhile.
        ``checkpoints``: whether what the framework saves is stored with the run, see :func:`memtrack.log_checkpoint`;
        other than True it is where to. Raises SettingsError, or MissingDependencyError if that needs what is missing.
        """
        if checkpoints:
            from memtrack.artifacts.log import check_installed

            check_installed()
        self._checkpoints = checkpoints
        self._stored_step: int | None = None
        config.resolve({name: value for name, value in settings.items() if name not in ("trackers", "frameworks")})
        self._asked = None if automatic else settings
        self._phases: list[str] = []
        self._open: tuple[str, api.phase] | None = None
        self._peak: _Peak | None = None
        self.step = api.step
        """``step(number)``: the training has reached this step, as :func:`memtrack.step`."""
        self.epoch = api.epoch
        """``epoch(number)``, as :func:`memtrack.epoch`."""

    def begin(self) -> bool:
        """The training begins: from now on this process is monitored, if it was not. Returns whether it is."""
        try:
            if active.monitor is None:
                autologging.join(self._asked)
            if active.marks is None:
                return False
            if self._peak is None:
                self._peak = _Peak()
            gather_ranks()  # by now the framework has launched them
            self.row()  # what was before is no step's
        except Exception as exc:
            warn_once("training", f"memtrack does not follow this training ({type(exc).__name__}: {exc}).")
        return active.marks is not None

    def end(self) -> None:
        """The training is over, however it went; monitoring goes on. What comes now is in none of its epochs."""
        self._phases.clear()
        self._reopen()
        api.epoch(NO_STEP)

    def enter(self, phase: str) -> None:
        """A phase begins; the one that was open pauses, unless it is the same."""
        self._phases.append(phase)
        self._reopen()

    def leave(self, phase: str) -> None:
        """A phase ends, and those that were entered in it and not left; the one before goes on. If it is open."""
        if phase in self._phases:
            while self._phases.pop() != phase:
                pass
            self._reopen()

    def saved(self, path: Any, step: int) -> None:
        """The framework has saved a checkpoint of this step; it is stored with the run if that was asked for.

        What is saved of the same step under another name, as the last or the best one, is the same state.
        """
        if not self._checkpoints or step == self._stored_step:
            return
        try:
            from memtrack.artifacts.log import log_checkpoint

            log_checkpoint(os.fspath(path), step=step, to=None if self._checkpoints is True else self._checkpoints)
            self._stored_step = step
        except Exception as exc:
            warn_once("checkpoint", f"memtrack does not store this checkpoint ({type(exc).__name__}: {exc}).")

    def row(self, of: str = "step") -> dict[str, float]:
        """Figures for the user's own row of metrics, since the last call; empty while nothing is monitoring.

        ``of`` is what the framework has a row of, "step" or "epoch"; it stands in the name of the first figure.
        ``memory/step/rss_peak_mib`` is the highest resident memory in MiB: exact if the process never stood higher,
        else as sampled. Where a framework's allocator has figures these come along, see ``memtrack.allocators``; they
        are set as gauges, too, once a second. Takes some microseconds.
        """
        marks, peak = active.marks, self._peak
        if marks is None or peak is None:
            return {}
        try:
            now_ns = monotonic_ns()
            figures = {PEAKS[of]: peak.take_mib(marks.take_peak_mib(), now_ns)}
            if now_ns >= allocators.idle_until_ns:
                figures.update(allocators.publish(marks))
            return figures
        except Exception as exc:
            warn_once("row", f"memtrack has no figures for this step ({type(exc).__name__}: {exc}).")
            return {}

    def allocations(self) -> dict[str, float]:
        """What the allocators of the frameworks say, in MiB by name of metric; set as gauges once a second."""
        marks = active.marks
        return {} if marks is None else allocators.publish(marks)

    def _reopen(self) -> None:
        phase = self._phases[-1] if self._phases else None
        if self._open is not None:
            if self._open[0] == phase:
                return
            self._open[1].__exit__(None, None, None)
            self._open = None
        if phase is not None:
            self._open = (phase, api.phase(phase).__enter__())
