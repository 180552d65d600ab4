"""``memtrack.autolog()``: monitor this process, feed every run that a tracker starts in it, mark steps and phases."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from memtrack import config, imports, registry
from memtrack.errors import MissingDependencyError
from memtrack.monitor import Monitor, active
from memtrack.notices import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from memtrack.config import Duration, Settings, Size
    from memtrack.monitor import Attached
    from memtrack.sinks.base import Sink

    Undo = Callable[[], None]

_undo: dict[str, Undo] = {}
_settings: Settings | None = None
_is_unasked = False
"""Whether it is ``memtrack run`` that wants trackers to be followed, and not the program."""


def autolog(
    *,
    trackers: Iterable[str] | None = None,
    frameworks: Iterable[str] | None = None,
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
    disable: bool = False,
) -> Monitor:
    """Monitor this process from now on, and send the charts to each run that a tracker starts, until that run ends.

    Trainings with Lightning, Keras and Hugging Face's Trainer get memtrack's callback, unless they have it already:
    it marks steps, epochs and phases, and adds the peak of the steps to what they log. In a plain PyTorch loop the
    optimizer's steps are marked, unless the program marks steps itself.

    May be called before or after the tracker is imported or its run started, and twice; before a framework's trainer
    is made. Returns the monitor, whose ``summary()`` tells how it went.

    Args:
        trackers: Which trackers to follow; default all that are there. One that is named must be installed.
        frameworks: Which frameworks' trainings get a callback; default all that are there, ``[]`` for none.
        disable: Take it all back: trackers and frameworks are as they were, the monitor is stopped.
        interval, flush_interval, recording_size, directory, metrics, selective, cpu_budget, tick, stacks, end_run,
            keep, keep_days: see :func:`memtrack.start`.

    Raises:
        SettingsError, MissingDependencyError, RecordingError, AgentError: as :func:`memtrack.start`.

    In a worker process that multiprocessing has spawned, which runs the main script again, nothing is started until a
    run starts there.
    """
    global _settings
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
            "disable": disable or None,
        }
    )
    if settings.disable:
        return _take_back()
    if _is_unasked:
        _take_back()
    _forget_imports()
    _settings = settings
    _follow_all(trackers, registry.AUTOLOG, registry.load_autolog)
    _follow_all(frameworks, registry.FRAMEWORKS, registry.load_framework)
    if _is_worker():
        from memtrack.disabled import DisabledMonitor

        return active.monitor or DisabledMonitor()
    if trackers is None and not any(tracker in _undo for tracker in registry.AUTOLOG):
        warn_once(
            "no tracker",
            "no tracker is installed (MLflow, Weights & Biases, Comet): memtrack only records locally, "
            "see memtrack report.",
            "",
        )
    return active.monitor or Monitor(settings)


def follow_unasked(name: str) -> None:
    """Follow a tracker or framework that was just imported below ``memtrack run``; nothing starts before one of its
    runs or trainings does.

    Raises SettingsError.
    """
    global _settings, _is_unasked
    if _settings is None:
        settings = config.resolve({})
        if settings.disable:
            return
        _settings, _is_unasked = settings, True
    if name not in _undo:
        _follow_now(name)


def join(asked: dict[str, Any] | None) -> Monitor | None:
    """The monitor of this process, for a training that begins: the one that is there, else one as ``autolog`` was told.

    ``asked``: what the program itself has told a framework's callback, which then works as if it had called
    ``autolog`` so; None for a callback that it did not ask for. None if nothing shall monitor. Raises as ``autolog``.
    """
    if active.monitor is None and asked is not None and (_settings is None or _is_unasked):
        autolog(**asked)
    if active.monitor is None and _settings is not None:
        # a worker that has a training of its own, or a program below `memtrack run`
        return Monitor(_settings, is_unasked=_is_unasked)
    return active.monitor


def follows(tracker: str) -> bool:
    """Whether the runs of a tracker are followed: for who knows of runs that its own functions do not tell of."""
    return tracker in _undo


def _follow_all(names: Iterable[str] | None, known: Iterable[str], load: Callable[[str], object]) -> None:
    for name in known if names is None else [names] if isinstance(names, str) else list(names):
        if name not in known:
            load(name)  # says so
        if name not in _undo:
            _follow(name, asked_for=names is not None)


def _follow(name: str, *, asked_for: bool) -> None:
    module = _module_of(name)
    if module in sys.modules:
        # which waits, should another thread be importing it right now
        import_module(module)
        if not getattr(sys.modules[module].__spec__, "_initializing", False):
            _follow_now(name)
        else:
            warn_once(f"autolog {name}", f"memtrack.autolog() does not follow {name} from within its import.")
    elif find_spec(module.partition(".")[0]) is not None:  # of a submodule it would import the package
        # most programs import one, and what follows the others need not be held in memory
        _undo[name] = functools.partial(imports.forget, module)
        imports.when_imported(module, functools.partial(_follow_now, name))
    elif asked_for:
        extra = (registry.AUTOLOG.get(name) or registry.FRAMEWORKS[name])[1]
        raise MissingDependencyError(f"following {name!r}", extra)


def _follow_now(name: str) -> None:
    """The tracker or framework has been imported, completely."""
    try:
        if name in registry.AUTOLOG:
            _undo[name] = registry.load_autolog(name)(attach)
        else:
            _undo[name] = registry.load_framework(name)()
    except Exception as exc:
        warn_once(f"autolog {name}", f"memtrack does not follow {name} ({type(exc).__name__}: {exc}).")


def _module_of(name: str) -> str:
    return registry.MODULES.get(name, name)


def _forget_imports() -> None:
    """Wait no more for what the program has not asked for."""
    for name in (*registry.AUTOLOG, *registry.FRAMEWORKS):
        if name not in _undo:
            imports.forget(_module_of(name))


def attach(make_sink: Callable[[], Sink]) -> Attached | None:
    """What follows a tracker calls this when a run has started. Never raises; None if the run cannot be fed."""
    try:
        monitor = active.monitor
        if monitor is None:
            # a worker, or a forked child, that has a run of its own; or a program below `memtrack run`
            if _settings is None:
                return None
            monitor = Monitor(_settings, is_unasked=_is_unasked)
        elif _is_unasked and not monitor.is_unasked:
            return None  # the program has started one, and knows what it wants
        return monitor.attach(make_sink())
    except Exception as exc:
        warn_once("attach", f"memtrack does not follow this run ({type(exc).__name__}: {exc}).")
        return None


def _take_back() -> Monitor:
    global _settings, _is_unasked
    _settings, _is_unasked = None, False
    _forget_imports()
    while _undo:
        _undo.popitem()[1]()
    if active.monitor is not None:
        active.monitor.stop()
    from memtrack.disabled import DisabledMonitor

    return DisabledMonitor()


def _is_worker() -> bool:
    """Whether multiprocessing started this process; it need not be loaded to know that it did not."""
    process = sys.modules.get("multiprocessing.process")
    if process is None:
        return False
    # while a spawned worker runs the main script, it has no parent yet, but this mark, by which multiprocessing itself
    # refuses to start processes then
    return process.parent_process() is not None or getattr(process.current_process(), "_inheriting", False)
