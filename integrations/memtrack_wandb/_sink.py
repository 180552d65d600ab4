"""The sink: windows to one W&B run, through the client that the process has loaded."""

from __future__ import annotations

import math
import os
import sys
from hashlib import sha256
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any

from memtrack.errors import DeliveryError, MissingDependencyError, MonitorError, RejectedError
from memtrack.notices import warn_once
from memtrack_wandb import _where
from memtrack_wandb._figures import exit_code_of, summary_of
from memtrack_wandb._stream import held, series_key, stream_of

if TYPE_CHECKING:
    from memtrack.sinks import Batch, RunFigures

MAX_KEY = 40

UNSAVED_S = 60.0
"""How much W&B may lose of what it has taken when the process is killed: it uploads every 15 s, and what came late
is older than that."""


class WandbSink:
    """Feeds one run: the one given, else the active one of this process.

    The points go to the run's stream of system metrics, each window as one record with the time of its end. They are no
    rows of the history and have no step, so the user's own steps are as they would be without. The final figures and
    the verdict are in the summary, under ``memtrack/``.

    Of the two ways into that stream this is the one that keeps the time of a sample. An OpenMetrics endpoint would be
    read by W&B's process at times of its own: it would get the last value of what happened in between, and nothing of
    what was delivered late. It would have to be told of before ``wandb.init()``, and W&B puts numbers in the place of
    labels, so that workers would have no names.

    A window that comes twice is kept twice, with the same time and the same values, and drawn once. A disabled run gets
    nothing.

    Args:
        run: What ``wandb.init()`` returned.
        recording: Path of the recording; not used.

    Raises:
        MissingDependencyError: W&B is not installed.
        MonitorError: No run is active.
    """

    name = "wandb"

    def __init__(self, *, run: Any = None, recording: str = "") -> None:
        if run is None:
            run = next(iter(active_runs(_wandb())), None)
        if run is None:
            raise MonitorError(
                "no W&B run is active. Call wandb.init() first, or use memtrack.autolog(), which follows each run."
            )
        self._run = run
        self._id: str = run.id
        self._publish = stream_of(run)
        if self._publish is None:
            warn_once("wandb stream", "memtrack does not know this version of W&B: runs get the final figures only.")
        settings = run.settings
        self._label = _where.label_of(settings)
        self._key_and_server = getattr(settings, "api_key", None), getattr(settings, "base_url", None)
        self._exit_code: int | None = None
        self._held: dict[int, frozenset[str]] = {}
        """What the files of a run that was opened again have: keys by time."""
        self._target: dict[str, str] | None = None
        """Of a run that was opened again."""
        self._ended = False
        self.unsaved_s = math.inf if settings.mode == "offline" else UNSAVED_S
        """How many seconds of what it has taken are to be given to a sink that is opened again."""

    @property
    def key(self) -> str:
        key = f"wandb:{self._id}"
        return key if len(key.encode()) <= MAX_KEY else f"wandb:{sha256(self._id.encode()).hexdigest()[:32]}"

    @property
    def target(self) -> dict[str, str]:
        if self._target is not None:
            return self._target
        return {} if getattr(self._run, "disabled", False) else _where.address(self._run, self._exit_code)

    def environment(self) -> dict[str, str]:
        """Settings of W&B's, and the key that it has, wherever that is from."""
        return _where.environment(*self._key_and_server)

    @classmethod
    def reopen(cls, target: dict[str, str]) -> WandbSink:
        """A sink for the same run from another process; ``wandb.run`` stays what it is.

        What an offline run has of ours is not written again.
        """
        run_id = target["id"]
        if "/" in run_id:
            raise RejectedError(f"{run_id!r} is no id of a run", run_gone=True)
        kept = held(target["dir"], run_id, target.get("label", "")) if "dir" in target else {}
        sink = cls(run=_where.resume(target))
        sink._target = target
        sink._held = kept
        sink._exit_code = int(target["exit"]) if "exit" in target else None
        return sink

    def ending(self, exit_code: int) -> None:
        """The user's code ends the run with this code. Should something be delivered later, it ends so again."""
        self._exit_code = exit_code

    def write(self, batch: Batch) -> None:
        self._check()
        if self._publish is None:
            return
        try:
            for timestamp_ms, points in groupby(batch.points(), key=lambda point: point.timestamp_ms):
                values = {series_key(point.name, self._label): point.value for point in points}
                kept = self._held.get(timestamp_ms)
                if kept:
                    values = {key: value for key, value in values.items() if key not in kept}
                if values:
                    self._publish(timestamp_ms, values)
        except Exception as exc:
            raise DeliveryError(f"W&B's process does not take it: {_where.first_line(exc)}") from exc

    def finish(self, figures: RunFigures) -> None:
        self._check()
        try:
            self._run.summary.update(summary_of(figures))
            columns, rows = figures.table()
            if rows:
                # in the summary: logged as a row of the history it would have a step
                self._run.summary["memtrack/phases_and_epochs"] = _wandb().Table(columns=columns, data=rows)
        except Exception as exc:
            raise DeliveryError(f"W&B's process does not take the figures: {_where.first_line(exc)}") from exc

    def conclude(self, figures: RunFigures) -> None:
        """End the run as the user's code or else the verdict says. One that others write to is left to them."""
        if self._target is None or self._ended:
            return
        code = self._exit_code if self._exit_code is not None else exit_code_of(figures)
        self._end(code)

    def close(self) -> None:
        if self._target is not None and not self._ended:
            try:
                self._end(self._exit_code if self._exit_code is not None else 1)
            except DeliveryError:
                return  # the next who delivers ends it

    def _check(self) -> None:
        # what comes after the end of a run is dropped by W&B without a word
        if self._ended or getattr(self._run, "_is_finished", False):
            raise DeliveryError("the run has been finished")

    def _end(self, exit_code: int) -> None:
        self._ended = True
        wandb = _wandb()
        try:
            self._run.finish(exit_code=exit_code)
            # W&B's process may still be writing, and dies with this one
            if not active_runs(wandb):
                wandb.teardown()
        except (Exception, SystemExit) as exc:
            raise DeliveryError(f"W&B could not finish the run: {_where.first_line(exc)}") from exc


def active_runs(wandb: Any) -> list[Any]:
    """The runs that this process has started and not finished, the newest first."""
    singleton = getattr(sys.modules.get("wandb.sdk.wandb_setup"), "_singleton", None)
    runs = [*reversed(getattr(singleton, "_active_runs", ())), wandb.run]
    return [run for at, run in enumerate(runs) if run is not None and is_own(run) and run not in runs[:at]]


def is_own(run: Any) -> bool:
    """Whether this process has started the run, not the one that it was forked from or unpickled it."""
    return bool(getattr(run, "_init_pid", None) == os.getpid())


def _wandb() -> Any:
    try:
        return import_module("wandb")
    except ImportError as exc:
        raise MissingDependencyError("the 'wandb' sink", "wandb") from exc
