"""The functions that users call. Where nothing is monitoring, marks are no-ops that cost some 50 ns."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, TypeVar

from memtrack.monitor import active
from memtrack.notices import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from memtrack.config import Duration, Size
    from memtrack.monitor import Monitor
    from memtrack.recording.marks import Phase as OpenPhase
    from memtrack.recording.tables import Recording
    from memtrack.sinks.base import Sink

    OpenPhases = tuple[OpenPhase | None, "OpenPhases | None"]  # the innermost, and those around it
    Function = TypeVar("Function", bound=Callable[..., object])


def start(
    *,
    sinks: Iterable[str | Sink] = (),
    interval: Duration | None = None,
    flush_interval: Duration | None = None,
    recording_size: Size | None = None,
    directory: str | None = None,
    metrics: str | Iterable[str] | None = None,
    selective: bool | None = None,
    cpu_budget: float | None = None,
    tick: Duration | None = None,
    stacks: str | None = None,
    end_run: bool | None = None,
    keep: int | None = None,
    keep_days: float | None = None,
) -> Monitor:
    """Monitor this process until ``stop()``, the end of the ``with`` block, or the end of the process.

    Args:
        sinks: Where the windows go: names (``"mlflow"``, ``"jsonl"``) or :class:`~memtrack.sinks.Sink` objects. None is
            fine: the recording is there all the same, see ``memtrack report``.
        interval: Length of a window, which is one point of a chart: seconds or ``"500ms"``. Default 1 s. Peaks are
            exact whatever it is.
        flush_interval: How often the trackers get what is new. Default 10 s.
        recording_size: Size of the recording file, bytes or ``"8MiB"``. Default 4 MiB; at least 1 MiB.
        directory: Folder of the recordings. Default ``.memtrack``, or ``MEMTRACK_DIR``.
        metrics: Which series the trackers get: ``"default"``, ``"all"``, or names and prefixes of names.
        selective: Whether the trackers get only those points without which a chart would look different: by more than
            1 % of the series' range, and each peak as it is. A series that stands still costs a point a minute at the
            most. Default True; False sends every window.
        cpu_budget: Share of one core that the agent may take, in percent. Default 0.2.
        tick: Time between two samples while memory moves. Default 0.1 s.
        stacks: Whose Python stack is taken at new peaks and when the limit is near: that of the ``"main"`` thread, of
            ``"all"`` threads, or ``"off"``. Default ``"main"``. The agent reads it from the memory of this process,
            where the kernel lets it; with ``"off"`` it never opens that.
        end_run: Whether a tracker's run that is still running when this process has died is ended, as failed or killed.
            Default True.
        keep, keep_days: How many finished, delivered recordings stay in the folder, and for how many days. Default 20
            and 30.

    Raises:
        SettingsError: An argument or a ``MEMTRACK_*`` variable is wrong, or there is no such sink.
        MissingDependencyError: A sink needs an extra that is not installed.
        RecordingError: The recording cannot be made: folder not writable, disk full.
        MonitorError: This process is being monitored already.
        AgentError: The agent could not be started.

    With ``MEMTRACK_DISABLE=1`` nothing is started; the monitor that is returned does nothing.
    """
    from memtrack import config, registry

    settings = config.resolve(
        {
            "interval": interval,
            "flush_interval": flush_interval,
            "recording_size": recording_size,
            "directory": directory,
            "metrics": metrics,
            "selective": selective,
            "cpu_budget": cpu_budget,
            "tick": tick,
            "stacks": stacks,
            "end_run": end_run,
            "keep": keep,
            "keep_days": keep_days,
        }
    )
    if settings.disable:
        from memtrack.disabled import DisabledMonitor

        return DisabledMonitor()
    wanted = _list_of(sinks)
    named = {sink: registry.load_sink(sink) for sink in wanted if isinstance(sink, str)}
    from memtrack.monitor import Monitor

    monitor = Monitor(settings)
    try:
        for sink in wanted:
            monitor.attach(named[sink](recording=monitor.path) if isinstance(sink, str) else sink)
    except BaseException:
        monitor.stop()
        os.unlink(monitor.path)
        raise
    return monitor


def step(number: int) -> None:
    """The training has reached step ``number``. Under a microsecond; never raises. Thread-safe."""
    marks = active.marks
    if marks is not None:
        try:
            marks.step(number)
        except Exception:
            _tolerate("step", number, marks.step)


def epoch(number: int) -> None:
    """The training has reached epoch ``number``. Never raises. Thread-safe."""
    marks = active.marks
    if marks is not None:
        try:
            marks.epoch(number)
        except Exception:
            _tolerate("epoch", number, marks.epoch)


def mark(name: str, value: float = 0.0) -> None:
    """Something worth a note has happened: it appears among the recording's events. Never raises. Thread-safe."""
    marks = active.marks
    if marks is not None:
        try:
            marks.mark(name, value)
        except Exception as exc:
            _complain("mark", exc)


def gauge(name: str, value: float) -> None:
    """Set a gauge of your own, such as an allocator's counter; the agent samples it once a second from then on.

    ``name`` carries scope and unit, as in ``"memory/cache/used_mib"``. At most 60 of them. Never raises. Thread-safe.
    """
    marks = active.marks
    if marks is not None:
        try:
            marks.gauge(name, value)
        except Exception as exc:
            _complain("gauge", exc)


class phase:
    """A phase of the training, for a ``with`` block or as a decorator: ``with memtrack.phase("load"): ...``.

    Phases nest, at most eight deep; inside ``train``, ``phase("forward")`` is ``train/forward``. Peaks are kept for
    each of the first 31. Entering costs about a microsecond; never raises. A name without ``/`` reads best.
    """

    __slots__ = ("_name", "_open")

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: OpenPhases | None = None

    def __enter__(self) -> phase:
        marks = active.marks
        if marks is not None:
            try:
                self._open = (marks.begin(self._name), self._open)
            except Exception as exc:
                _complain("phase", exc)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        marks = active.marks
        if marks is not None and self._open is not None:
            opened, self._open = self._open
            if opened is None:
                return
            try:
                marks.end(opened)
            except Exception as exc:
                _complain("phase", exc)

    def __call__(self, function: Function) -> Function:
        name = self._name

        @functools.wraps(function)
        def inside(*args: object, **kwargs: object) -> object:
            with phase(name):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


def open_recording(path: str) -> Recording:
    """Open a recording to read, also while it is being written. Raises RecordingError or RecordingFormatError."""
    from memtrack.recording.tables import Recording

    return Recording(path)


def _list_of(sinks: object) -> list[str | Sink]:
    from memtrack.errors import SettingsError

    try:
        wanted = [sinks] if isinstance(sinks, str) else list(sinks)  # type: ignore[call-overload]
    except TypeError:
        wanted = [sinks]
    for sink in wanted:
        if not isinstance(sink, str) and not callable(getattr(sink, "write", None)):
            raise SettingsError("sinks", sinks, "give names such as 'jsonl', or memtrack.sinks.Sink objects")
    return wanted


def _tolerate(what: str, number: object, write: Callable[[int], None]) -> None:
    """A number that is none of the integers, such as 3.0 or a tensor: take it if it can be made one."""
    try:
        write(int(number))  # type: ignore[call-overload]
    except Exception as exc:
        _complain(what, exc)


def _complain(what: str, exc: Exception) -> None:
    warn_once(f"api {what}", f"memtrack.{what}() did not work ({type(exc).__name__}: {exc}).")
