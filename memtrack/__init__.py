"""memtrack tells whoever trains a model where the memory went.

The names below are loaded when they are first used: ``import memtrack`` by itself loads nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.api import epoch, gauge, mark, open_recording, phase, start, step
    from memtrack.artifacts.fetch import delete_checkpoint, restore
    from memtrack.artifacts.log import log_artifact, log_checkpoint
    from memtrack.autologging import autolog
    from memtrack.monitor import Monitor

__version__ = "0.1.0"

__all__ = [
    "Monitor",
    "autolog",
    "delete_checkpoint",
    "epoch",
    "gauge",
    "log_artifact",
    "log_checkpoint",
    "mark",
    "open_recording",
    "phase",
    "restore",
    "start",
    "step",
]

_HOMES = {
    "Monitor": "memtrack.monitor",
    "autolog": "memtrack.autologging",
    "delete_checkpoint": "memtrack.artifacts.fetch",
    "log_artifact": "memtrack.artifacts.log",
    "log_checkpoint": "memtrack.artifacts.log",
    "restore": "memtrack.artifacts.fetch",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES.get(name, "memtrack.api")), name)
    # from now on the name is found without coming here
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
