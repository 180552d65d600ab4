"""What the callbacks of all frameworks have in common: they tell where a training stands, and get figures for its log.

It is public for those who write a callback for another framework.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from memtrack import api, autologging, config
from memtrack.agent import job
from memtrack.allocators import shared as allocators
from memtrack.collectors.procfs import PAGE_MIB, open_held
from memtrack.monitor import active
from memtrack.notices import warn_once
from memtrack.sampling.window import NO_STEP

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STEP_PEAK = "memory/step/rss_peak_mib"
"""The highest resident memory since the row before: the peak of the steps that a row of the user's log is of. Where
the framework has a row for each epoch, it is ``memory/epoch/rss_peak_mib``."""


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
    """The highest RSS of this process, from call to call."""

    def __init__(self) -> None:
        self._statm = open_held("/proc/self/statm", 256)
        self._high_water: Callable[[], float] = float
        if sys.platform != "win32":
            import resource

            usage, who = resource.getrusage, resource.RUSAGE_SELF
            per_mib = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB elsewhere: getrusage(2)
            self._high_water = lambda: usage(who).ru_maxrss / per_mib
        self._before_mib = self._high_water()

    def take_mib(self, sampled_mib: float) -> float:
        """The highest since the last call. ``sampled_mib`` is what the agent saw, NaN if it did not look.

        The kernel's mark of the highest ever tells of each new peak exactly, though it may have lasted no time; of one
        that is lower than an earlier one the agent tells, if it lasted from one sample to the next.
        """
        peak_mib = sampled_mib if sampled_mib == sampled_mib else 0.0
        if self._statm is not None:
            peak_mib = max(peak_mib, int(self._statm.read().split(None, 2)[1]) * PAGE_MIB)
        high_water_mib = self._high_water()
        # what execve has replaced counts in the mark as well, so its height alone says nothing
        if high_water_mib > self._before_mib:
            self._before_mib = high_water_mib
            peak_mib = max(peak_mib, high_water_mib)
        return peak_mib


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
            figures = {f"memory/{of}/rss_peak_mib": peak.take_mib(marks.take_peak_mib())}
            figures.update(self.allocations())
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
