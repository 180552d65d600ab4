"""Names of sinks and trackers, as strings until somebody asks: nothing here imports a tracker.

Third parties add sinks through the entry-point group ``memtrack.sinks``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from memtrack.errors import MissingDependencyError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SINKS = {
    "comet": ("memtrack_comet:CometSink", "comet"),
    "jsonl": ("memtrack.sinks.jsonl:JsonLinesSink", ""),
    "mlflow": ("memtrack_mlflow:MlflowSink", "mlflow"),
    "wandb": ("memtrack_wandb:WandbSink", "wandb"),
}
"""Name of a sink -> (module:class, extra that brings what it needs)."""

AUTOLOG = {
    "comet": ("memtrack_comet:autolog", "comet"),
    "mlflow": ("memtrack_mlflow:autolog", "mlflow"),
    "wandb": ("memtrack_wandb:autolog", "wandb"),
}
"""Name of a tracker -> (module:function that follows its runs, extra)."""

STORES = {
    "mlflow": ("memtrack_mlflow:active_store", "memtrack_mlflow:open_store", "mlflow"),
    "wandb": ("memtrack_wandb:active_store", "memtrack_wandb:open_store", "wandb"),
    "comet": ("memtrack_comet:active_store", "memtrack_comet:open_store", "comet"),
}
"""Name of a tracker -> (module:function that finds the store of the active run, module:function that opens the store
of a run that is named, extra). Where runs of several are active, the first one's is taken."""

FRAMEWORKS = {
    "keras": ("memtrack_keras:autolog", "keras"),
    "lightning": ("memtrack_lightning:autolog", "lightning"),
    "pytorch_lightning": ("memtrack_lightning:pl_autolog", "lightning"),
    "torch": ("memtrack_pytorch:autolog", "torch"),
    "transformers": ("memtrack_huggingface:autolog", "huggingface"),
}
"""Name of a framework -> (module:function that gives its trainings a callback, extra)."""

MODULES = {
    "comet": "comet_ml",
    "lightning": "lightning.pytorch",
    "torch": "torch.optim.optimizer",
    "transformers": "transformers.trainer",
}
"""What is imported when a tracker or framework is really used, where that is another module than its name."""


def sink_names() -> list[str]:
    """The names that ``load_sink`` takes."""
    return sorted({*SINKS, *(entry.name for entry in _entry_points())})


def load_sink(name: str) -> Callable[..., Any]:
    """The class of a sink. Raises SettingsError if there is none of that name, else MissingDependencyError."""
    if name in SINKS:
        return _load(f"the {name!r} sink", *SINKS[name])
    for entry in _entry_points():
        if entry.name == name:
            loaded: Callable[..., Any] = entry.load()
            return loaded
    raise SettingsError("sinks", name, f"no such sink. There are: {', '.join(sink_names())}.")


def load_autolog(tracker: str) -> Callable[..., Any]:
    """What follows the runs of a tracker. Raises SettingsError or MissingDependencyError."""
    if tracker not in AUTOLOG:
        raise SettingsError("trackers", tracker, f"no such tracker. There are: {', '.join(sorted(AUTOLOG))}.")
    return _load(f"following the runs of {tracker!r}", *AUTOLOG[tracker])


def load_active_stores(tracker: str | None = None) -> list[Callable[..., Any]]:
    """What finds the store of the active run, for each tracker, or the one given, that this process has imported.

    Raises SettingsError if there is no such tracker, MissingDependencyError.
    """
    if tracker is not None and tracker not in STORES:
        raise SettingsError("to", tracker, f"no such tracker. There are: {', '.join(sorted(STORES))}.")
    return [
        _load(f"storing artifacts in {name!r}", active, extra)
        for name, (active, _, extra) in STORES.items()
        # no run is active of a tracker that has not been imported
        if tracker in (None, name) and MODULES.get(name, name) in sys.modules
    ]


def load_store(tracker: str) -> Callable[..., Any]:
    """What opens the store of a tracker's run. Raises SettingsError or MissingDependencyError."""
    if tracker not in STORES:
        raise SettingsError("source", tracker, f"no such tracker. There are: {', '.join(sorted(STORES))}.")
    _, opener, extra = STORES[tracker]
    return _load(f"reading artifacts from {tracker!r}", opener, extra)


def load_framework(framework: str) -> Callable[..., Any]:
    """What gives a framework's trainings a callback. Raises SettingsError or MissingDependencyError."""
    if framework not in FRAMEWORKS:
        raise SettingsError("frameworks", framework, f"no such framework. There are: {', '.join(sorted(FRAMEWORKS))}.")
    return _load(f"a callback in {framework!r}", *FRAMEWORKS[framework])


def _load(feature: str, target: str, extra: str) -> Callable[..., Any]:
    module, _, attribute = target.partition(":")
    try:
        loaded: Callable[..., Any] = getattr(import_module(module), attribute)
    except ImportError as exc:
        # a module of ours that is missing is a broken installation, not a missing extra
        if exc.name is not None and exc.name.partition(".")[0].startswith("memtrack"):
            raise
        raise MissingDependencyError(feature, extra) from exc
    return loaded


def _entry_points() -> Any:
    # imported here: it is the dearest single import of the standard library that memtrack would need
    from importlib.metadata import entry_points

    return entry_points(group="memtrack.sinks")
