"""Settings, validated once, before anything starts: arguments over ``MEMTRACK_*`` variables over defaults."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from memtrack.errors import RecordingError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Duration = float | int | str
    Size = int | str

MIN_RECORDING_BYTES = 1 << 20
MAX_RECORDING_BYTES = 1 << 40
MAX_SECONDS = 86400.0

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class Settings(NamedTuple):
    """What can be set. Make one with :func:`resolve`, which knows where a value came from when it has to complain."""

    interval_s: float = 1.0
    """Length of a window, in seconds: one point of a chart. At least 0.05."""
    flush_interval_s: float = 10.0
    """How often finished windows are handed to the trackers, in seconds. At least ``interval_s`` is sensible."""
    recording_bytes: int = 4 << 20
    """Size of the recording file, in bytes. It never grows; more keeps more windows at full resolution."""
    directory: str = ".memtrack"
    """Folder of the recordings, made with mode 0700 if it is not there."""
    metrics: str | tuple[str, ...] = "default"
    """Which series the trackers get: ``"default"``, ``"all"``, or names and prefixes such as ``memory/process``.
    The recording always holds all of them."""
    cpu_budget_pct: float = 0.2
    """Share of one core that the agent may take, in percent."""
    tick_s: float = 0.1
    """Time between two samples while memory moves, in seconds; the agent looks up to five times as often when it moves
    fast or the limit is near, and less often when nothing moves."""
    stacks: str = "main"
    """Whose Python stack is taken at a new peak and when the limit is near: that of the thread which the kernel gives
    the signal to, nearly always the ``"main"`` one; of ``"all"`` threads; or ``"off"``."""
    end_run: bool = True
    """Whether a tracker's run that is still running when its process has died is ended, as failed or killed."""
    keep: int = 20
    """How many finished, delivered recordings stay in the folder."""
    keep_days: float = 30.0
    """How long they stay at the most."""
    disable: bool = False
    """Make every function of memtrack a no-op."""


_ARGUMENTS = {
    "interval": "interval_s",
    "flush_interval": "flush_interval_s",
    "recording_size": "recording_bytes",
    "directory": "directory",
    "metrics": "metrics",
    "cpu_budget": "cpu_budget_pct",
    "tick": "tick_s",
    "stacks": "stacks",
    "end_run": "end_run",
    "keep": "keep",
    "keep_days": "keep_days",
    "disable": "disable",
}
_VARIABLES = {f"MEMTRACK_{argument.upper()}": argument for argument in _ARGUMENTS} | {"MEMTRACK_DIR": "directory"}
_OTHER_VARIABLES = {"MEMTRACK_DEBUG", "MEMTRACK_SINKS"}


def resolve(arguments: Mapping[str, object], environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the arguments of a call (None means not given) and the environment. Raises SettingsError."""
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if variable.startswith("MEMTRACK_") and variable not in _OTHER_VARIABLES and text != "":
            known = _VARIABLES.get(variable)
            if known is not None:
                values[_ARGUMENTS[known]] = _parse(variable, known, text)
            elif not variable.startswith("MEMTRACK_TEST_"):
                raise SettingsError(variable, text, f"no such setting. {_nearest(variable, _VARIABLES)}")
    for argument, value in arguments.items():
        if argument not in _ARGUMENTS:
            raise SettingsError(argument, value, f"no such setting. {_nearest(argument, _ARGUMENTS)}")
        if value is not None:
            values[_ARGUMENTS[argument]] = _parse(argument, argument, value)
    return Settings(**values)  # type: ignore[arg-type]


def environment(settings: Settings) -> dict[str, str]:
    """``MEMTRACK_*`` variables that give a child process the settings that differ from the defaults."""
    variables = {}
    for field, value in settings._asdict().items():
        if value != Settings._field_defaults[field]:
            argument = next(name for name, known in _ARGUMENTS.items() if known == field)
            variables[f"MEMTRACK_{argument.upper()}"] = value if isinstance(value, str) else _text(value)
    return variables


def seconds(name: str, value: object) -> float:
    """A duration: a number of seconds, or a text such as ``"500ms"``, ``"2s"``, ``"1min"``. Raises SettingsError."""
    return _quantity(name, value, _SECONDS, "a duration in seconds such as 1.0, '500ms' or '2s'", default_unit="s")


def size_bytes(name: str, value: object) -> int:
    """A size: a number of bytes, or a text such as ``"8MiB"`` (2**20) or ``"8MB"`` (10**6). Raises SettingsError."""
    return int(_quantity(name, value, _BYTES, "a size in bytes such as 4194304, '8MiB' or '1GiB'", default_unit=""))


def _parse(name: str, argument: str, value: object) -> object:
    if argument in ("interval", "flush_interval", "tick"):
        found = seconds(name, value)
        smallest = {"interval": 0.05, "flush_interval": 0.1, "tick": 0.02}[argument]
        if not smallest <= found <= MAX_SECONDS:
            raise SettingsError(name, value, f"give {smallest:g} to {MAX_SECONDS:g} seconds")
        return found
    if argument == "recording_size":
        size = size_bytes(name, value)
        if not MIN_RECORDING_BYTES <= size <= MAX_RECORDING_BYTES:
            raise SettingsError(name, value, "a recording needs at least 1MiB, and 1TiB at the most")
        return size - size % 4096
    if argument == "cpu_budget":
        share = _number(name, value, "a share of one core in percent, such as 0.2")
        if share > 100:
            raise SettingsError(name, value, "a share of one core in percent cannot be above 100")
        return share
    if argument == "metrics":
        return _metrics(name, value)
    if argument in ("disable", "end_run"):
        return value if isinstance(value, bool) else str(value).lower() not in ("0", "false", "no", "off")
    if argument == "stacks":
        known = {"True": "main", "False": "off"}.get(str(value), value)
        if known not in ("main", "all", "off"):
            raise SettingsError(name, value, "give 'main', 'all' or 'off'")
        return known
    if argument == "keep":
        return int(_number(name, value, "a number of recordings, at least 1"))
    if argument == "keep_days":
        return _number(name, value, "a number of days such as 30")
    try:
        return os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise SettingsError(name, value, "give the path of a folder") from None


def _metrics(name: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        chosen: Sequence[str] = [part.strip() for part in value.split(",") if part.strip()]
    else:
        try:
            chosen = [str(part) for part in value]  # type: ignore[attr-defined]
        except TypeError:
            chosen = []
    if len(chosen) == 1 and chosen[0] in ("default", "all"):
        return chosen[0]
    if not chosen or any(not part.startswith("memory/") for part in chosen):
        raise SettingsError(
            name, value, "give 'default', 'all', or names that begin with 'memory/' (memtrack doctor lists them)"
        )
    return tuple(chosen)


def _quantity(name: str, value: object, units: Mapping[str, float], wanted: str, *, default_unit: str) -> float:
    if isinstance(value, str):
        text = value.strip()
        digits = len(text) - len(text.lstrip("0123456789.eE+-"))
        # "8e3" and "8MiB": the exponent's letter is only part of the number if digits follow
        while digits and text[digits - 1] in "eE+-":
            digits -= 1
        unit = text[digits:].strip().lower() or default_unit
        if unit not in units:
            raise SettingsError(name, value, f"give {wanted}")
        return min(_number(name, text[:digits], wanted, shown=value) * units[unit], sys.float_info.max)
    return _number(name, value, wanted)


def _number(name: str, value: object, wanted: str, *, shown: object = None) -> float:
    shown = value if shown is None else shown
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise SettingsError(name, shown, f"give {wanted}") from None
    if not math.isfinite(number) or number <= 0:
        raise SettingsError(name, shown, f"must be positive and finite; give {wanted}")
    return number


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(int(value)) if isinstance(value, bool) else str(value)


def _nearest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    # what all variables have in common would make any two of them look alike
    short = {other.removeprefix("MEMTRACK_"): other for other in known}
    close = get_close_matches(name.removeprefix("MEMTRACK_"), short, n=1)
    return f"Did you mean {short[close[0]]}?" if close else f"There are: {', '.join(sorted(known))}."


def make_directory(settings: Settings) -> str:
    """Make the folder of the recordings if need be. Returns its absolute path; raises RecordingError."""
    path = os.path.abspath(settings.directory)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as exc:
        raise RecordingError(
            f"cannot make the recordings folder {path}: {exc.strerror}. Choose one with MEMTRACK_DIR."
        ) from exc
    if not os.access(path, os.W_OK | os.X_OK):
        raise RecordingError(f"cannot write to the recordings folder {path}. Choose one with MEMTRACK_DIR.")
    return path
