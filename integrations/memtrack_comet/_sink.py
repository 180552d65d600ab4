"""The sink: windows to one Comet experiment, through the client that the process has loaded."""

from __future__ import annotations

import os
import re
from importlib import import_module
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from memtrack.errors import DeliveryError, MissingDependencyError, MonitorError, RejectedError
from memtrack.notices import warn_once
from memtrack_comet._figures import UNSAVED_S, others_of, series_name, tags_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from memtrack.sinks import Batch, RunFigures, Sink

    Log = Callable[[Any, str, float, int], None]

TAKEN_TIMEOUT_S = 1.0
"""How long Comet's thread may take to write what it was given; it also copies the user's assets."""

_NUMBER = re.compile(rb'"message_id":(\d+)')
_TAIL = 1 << 16

_QUIET = {"COMET_LOGGING_CONSOLE": "ERROR", "COMET_DISABLE_AUTO_LOGGING": "1"}
_BY_ITSELF = (
    "log_code", "log_graph", "log_env_details", "log_git_metadata", "log_git_patch", "parse_args", "auto_log_co2",
    "auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_histogram_tensorboard_logging",
)  # fmt: skip
"""What Comet logs by itself: another process has nothing to say of that."""


class CometSink:
    """Feeds one experiment that is running: the one given, else ``comet_ml.get_running_experiment()``.

    The points are metrics called ``sys.memory.…``, each with the time of its window's end. They have no step: to log a
    step is to move the experiment's own, and with it the x axis of the user's series. Comet keeps a point that comes
    twice twice.

    ``memtrack.autolog()`` learns when an experiment ends and delivers the rest before. A monitor that was started with
    this sink has to be stopped before the experiment is; what it would deliver afterwards is refused.

    Args:
        experiment: Any of Comet's, online or offline.
        recording: Path of the recording; not used.

    Raises:
        MissingDependencyError: Comet is not installed.
        MonitorError: No experiment is running.
    """

    name = "comet"

    def __init__(self, *, experiment: Any = None, recording: str = "") -> None:
        if experiment is None:
            experiment = _comet().get_running_experiment()
        if experiment is None or not is_running(experiment):
            raise MonitorError(
                "no Comet experiment is running. Start it first, or use memtrack.autolog(), which follows each one."
            )
        self._experiment = experiment
        self._log: Log = _log_with_time(experiment) or _log_without_time
        self._owned = False
        experiment_key: str = experiment.get_key()
        # the end of it: keys that users choose often begin alike
        self._key = f"comet:{experiment_key[-34:]}"
        self._target = target_of(experiment, experiment_key)

    @property
    def key(self) -> str:
        return self._key

    @property
    def target(self) -> dict[str, str]:
        return self._target

    @property
    def unsaved_s(self) -> float:
        """What had been uploaded of the last seconds is there twice then, at the same time and with the same value."""
        return UNSAVED_S

    def environment(self) -> dict[str, str]:
        """Comet's settings, and the key that was given in the code; an archive can be made without either."""
        if self._target.get("mode") != "online":
            return {}
        found = {name: value for name, value in os.environ.items() if name.startswith("COMET_")}
        api_key = getattr(self._experiment, "api_key", None)
        return {**found, "COMET_API_KEY": api_key} if isinstance(api_key, str) else found

    @classmethod
    def reopen(cls, target: dict[str, str]) -> Sink:
        """A sink for the same experiment from another process: through Comet if it was online, else to its archive.

        An online experiment is continued as ``comet_ml.ExistingExperiment``, and is the running one of this process
        until it has been finished or closed.
        """
        if target.get("mode") == "offline":
            from memtrack_comet._archive import Archive

            return Archive(target)
        sink = cls(experiment=_continue(target["key"]))
        sink._owned = True
        return sink

    def write(self, batch: Batch) -> None:
        self._check()
        for name, value, timestamp_ms in batch.points():
            self._log(self._experiment, series_name(name), value, timestamp_ms)
        self._await_taken()

    def finish(self, figures: RunFigures) -> None:
        self._check()
        self._experiment.log_others(others_of(figures))
        if figures.is_bad_end:
            self._experiment.add_tags(tags_of(figures))
        columns, rows = figures.table()
        if rows:
            self._experiment.log_table("memtrack_phases_and_epochs.csv", rows, headers=columns)
        self._await_taken()

    def conclude(self, figures: RunFigures) -> None:
        """Mark the experiment as crashed if its process has come to a bad end, as Comet does after an exception."""
        report = getattr(self._experiment, "_report_experiment_error", None)
        if self._owned and figures.is_bad_end and report is not None:
            report(figures.verdict_text or tags_of(figures)[0], has_crashed=True)

    def close(self) -> None:
        experiment, self._experiment = self._experiment, None  # it holds on to models, if not to tensors
        if self._owned and experiment is not None and is_running(experiment):
            try:
                experiment.end()
            except Exception:
                return  # everything that was to be delivered had been taken

    def _check(self) -> None:
        if not is_running(self._experiment):
            if not self._owned:
                raise RejectedError("the experiment has ended", run_gone=True)
            # Comet has one experiment at a time, and another has been continued since
            self._experiment = _continue(self._target["key"])

    def _await_taken(self) -> None:
        """Wait until Comet has it somewhere that outlives this process, offline; online it uploads in its own time."""
        if self._owned:
            if not self._experiment.flush():
                raise DeliveryError("Comet has not uploaded it in time")
        elif self._target.get("mode") == "offline":
            # a thread of Comet's writes its queue to a file, line by line; messages are numbered
            number = getattr(self._experiment.streamer, "_counter", 0)
            deadline = monotonic() + TAKEN_TIMEOUT_S
            while _last_number(self._target["folder"]) < number and monotonic() < deadline:
                sleep(0.005)


def _last_number(folder: str) -> int:
    """The number of the last message that Comet has written to its file."""
    try:
        with open(os.path.join(folder, "messages.json"), "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
            tail = file.read()
    except OSError:
        return 0
    return max(map(int, _NUMBER.findall(tail, 0, tail.rfind(b"\n") + 1)), default=0)


def _continue(experiment_key: str) -> Any:
    """An experiment of another process, as one that runs here and logs nothing by itself. Raises DeliveryError."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        experiment = _comet().ExistingExperiment(
            experiment_key=experiment_key, display_summary_level=0, **dict.fromkeys(_BY_ITSELF, False)
        )
    except MissingDependencyError:
        raise
    except Exception as exc:
        # not refused: this process may lack the API key that the other one had
        raise DeliveryError(f"Comet cannot continue the experiment: {first_line(exc)}") from exc
    if not is_running(experiment):
        raise DeliveryError("Comet does not answer, or does not let this experiment be continued")
    return experiment


def is_running(experiment: Any) -> bool:
    """Whether an experiment takes messages; Comet goes on to call it the running one after its end."""
    return bool(getattr(experiment, "alive", False)) and not getattr(experiment, "ended", False)


def _log_with_time(experiment: Any) -> Log | None:
    """What logs a value at a time of its own, which ``log_metric`` cannot: it takes that of the call. None if there is
    no such way in this version of Comet."""
    try:
        message_type = import_module("comet_ml.messages").MetricMessage
        message_type(timestamp=0).set_metric("sys.memory", 0.0)
        if not callable(experiment._enqueue_message):
            return None
    except (AttributeError, ImportError, TypeError):
        return None

    def log(experiment: Any, name: str, value: float, timestamp_ms: int) -> None:
        message = message_type(timestamp=timestamp_ms)
        message.set_metric(name, value)
        experiment._enqueue_message(message)

    return log


def _log_without_time(experiment: Any, name: str, value: float, _timestamp_ms: int) -> None:
    warn_once(
        "comet time",
        "this version of Comet takes no time with a metric: memtrack's points stand where they were delivered.",
        " Training goes on.",
    )
    experiment.log_metric(name, value, include_context=False)


def target_of(experiment: Any, experiment_key: str) -> dict[str, str]:
    """Which experiment it is, for ``reopen``; empty for an offline one of which this version does not say where."""
    directory = getattr(experiment, "offline_directory", None)
    if directory is None:
        return {"mode": "online", "key": experiment_key}
    try:
        # in the name the key is a star: there is little room
        archive = experiment._get_offline_archive_file_name().replace(experiment_key, "*", 1)
        flags = {"comet_start": experiment.comet_start_sourced, "own_key": experiment.user_provided_experiment_key}
        found = {
            "mode": "offline",
            "key": experiment_key,
            "archive": os.path.join(os.path.abspath(directory), archive),
            "folder": os.path.abspath(experiment.tmpdir),
            "start": str(int(experiment.start_time)),
            "how": " ".join([experiment.resume_strategy, *(name for name, is_set in flags.items() if is_set)]),
            "project": experiment.project_name or "",
            "workspace": experiment.workspace or "",
        }
    except (AttributeError, TypeError, ValueError):
        return {}
    return {name: value for name, value in found.items() if value}


def first_line(exc: BaseException) -> str:
    return str(exc).partition("\n")[0] or type(exc).__name__


def _comet() -> Any:
    try:
        return import_module("comet_ml")
    except ImportError as exc:
        raise MissingDependencyError("the 'comet' sink", "comet") from exc
