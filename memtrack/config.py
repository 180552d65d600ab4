"""Settings, validated once, before anything starts: arguments over ``MEMTRACK_*`` variables over defaults."""

from __future__ import annotations

import errno
import math
import os
import stat
import sys
from typing import TYPE_CHECKING, NamedTuple

from memtrack.errors import RecordingError, SettingsError
from memtrack.notices import warn_once

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Duration = float | int | str
    Size = int | str

MIN_RECORDING_BYTES = 1 << 20
MAX_RECORDING_BYTES = 1 << 30
MAX_SECONDS = 86400.0
MAX_KEEP = 1_000_000

MAX_LINKS = 40
"""As many symbolic links as the kernel follows in one path."""

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
    selective: bool = True
    """Whether the trackers get only those points that the charts need, see ``memtrack.sinks.selection``; else every
    window. The recording always holds every window."""
    cpu_budget_pct: float = 0.2
    """Share of one core that the agent may take, in percent."""
    tick_s: float = 0.1
    """Time between two samples while memory moves, in seconds; the agent looks up to five times as often when it moves
    fast or the limit is near, and less often when nothing moves."""
    stacks: str = "main"
    """Whose Python stack is taken at a new peak and when the limit is near: that of the ``"main"`` thread, of ``"all"``
    threads, or ``"off"``. The agent reads it from the memory of the process, where the kernel lets it."""
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
    "selective": "selective",
    "cpu_budget": "cpu_budget_pct",
    "tick": "tick_s",
    "stacks": "stacks",
    "end_run": "end_run",
    "keep": "keep",
    "keep_days": "keep_days",
    "disable": "disable",
}
_VARIABLES = {f"MEMTRACK_{argument.upper()}": argument for argument in _ARGUMENTS} | {"MEMTRACK_DIR": "directory"}
_OTHER_VARIABLES = {f"MEMTRACK_{name}" for name in ("ARTIFACT_CACHE", "ARTIFACT_WAIT", "DEBUG", "RUN", "SINKS")}


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
            raise SettingsError(name, value, "a recording needs at least 1MiB, and 1GiB at the most")
        return size - size % 4096
    if argument == "cpu_budget":
        share = _number(name, value, "a share of one core in percent, such as 0.2")
        if share > 100:
            raise SettingsError(name, value, "a share of one core in percent cannot be above 100")
        return share
    if argument == "metrics":
        return _metrics(name, value)
    if argument in ("disable", "end_run", "selective"):
        return value if isinstance(value, bool) else str(value).lower() not in ("0", "false", "no", "off")
    if argument == "stacks":
        known = {"True": "main", "False": "off"}.get(str(value), value)
        if known not in ("main", "all", "off"):
            raise SettingsError(name, value, "give 'main', 'all' or 'off'")
        return known
    if argument == "keep":
        number = _number(name, value, "a number of recordings, at least 1")
        if not 1 <= number <= MAX_KEEP:
            raise SettingsError(name, value, f"give a number of recordings from 1 to {MAX_KEEP}")
        return int(number)
    if argument == "keep_days":
        days = _number(name, value, "a number of days such as 30")
        if days > MAX_KEEP:
            raise SettingsError(name, value, f"give {MAX_KEEP} days at the most")
        return days
    try:
        path = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise SettingsError(name, value, "give the path of a folder") from None
    if not path or "\0" in path:
        raise SettingsError(name, value, "give the path of a folder")
    return path


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


class _Unusable(Exception):
    """A folder cannot be made or written to. The message says which and why."""


def find_directory(settings: Settings) -> str:
    """Path of the folder where recordings are, which need not be there: see ``make_directory``."""
    if settings.directory == Settings().directory and not os.path.isdir(settings.directory):
        fallback = fallback_directory()
        if _is_private(fallback):
            return fallback
    try:
        return os.path.abspath(settings.directory)
    except OSError:  # the working directory has been removed
        return settings.directory


def make_directory(settings: Settings) -> str:
    """Make the folder of the recordings if need be, with mode 0700. Returns its absolute path.

    Where the default cannot be made, as in a working directory that is read-only, ``memtrack-UID`` in the folder for
    temporary files takes its place, with a warning. Raises RecordingError if there is no folder to write to, or if it
    is one that somebody else could tamper with, see ``check_directory``.
    """
    is_default = settings.directory == Settings().directory
    try:
        return _make(settings.directory, is_ours=is_default)
    except _Unusable as exc:
        if not is_default:
            raise RecordingError(f"{exc}. Choose one with MEMTRACK_DIR.") from exc.__cause__
        problem = str(exc)
    try:
        path = _make(fallback_directory(), is_ours=True)
    except _Unusable as exc:
        raise RecordingError(f"{problem}; nor is there another: {exc}. Choose one with MEMTRACK_DIR.") from exc
    if hasattr(os, "geteuid") and not _is_private(path):
        raise RecordingError(f"{problem}; {path}, which would do, is not yours alone. Choose one with MEMTRACK_DIR.")
    warn_once("directory", f"memtrack {problem}. Recordings go to {path}, or where MEMTRACK_DIR says.", "")
    return path


def fallback_directory() -> str:
    """Path of the folder that takes the place of the default one where that cannot be made."""
    from tempfile import gettempdir

    return os.path.join(gettempdir(), f"memtrack-{os.geteuid() if hasattr(os, 'geteuid') else os.getlogin()}")


def check_directory(path: str) -> None:
    """Raise RecordingError if somebody else could exchange the recordings in a folder for something else.

    That is if it belongs to another user but root, if everybody may write to it and it has no sticky bit, or if the
    way there leads over a symbolic link that another user has put into a folder which everybody may write to.
    """
    if not hasattr(os, "geteuid"):
        return
    status = os.stat(path)
    if status.st_uid not in (os.geteuid(), 0) and not _owners_are_made_up(path, status.st_uid):
        raise RecordingError(
            f"the recordings folder {path} belongs to {_user(status.st_uid)}, and this runs as {_user(os.geteuid())}. "
            "Choose another one with MEMTRACK_DIR."
        )
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise RecordingError(
            f"everybody may write to the recordings folder {path} of {_user(status.st_uid)}. "
            f"Run: chmod o-w {path} or choose another one with MEMTRACK_DIR."
        )
    _refuse_foreign_links(path)


def _make(directory: str, *, is_ours: bool) -> str:
    """Make a folder with mode 0700; one that is there is left as it is, unless it ``is_ours``: named by memtrack."""
    path = directory
    try:
        path = os.path.abspath(directory)
        if hasattr(os, "geteuid"):
            _refuse_foreign_links(path)
        if not os.path.isdir(path):
            # what leads there may be read as the umask has it, but others do not write to it
            if not os.path.isdir(os.path.dirname(path)):
                os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            try:
                os.mkdir(path)
                os.chmod(path, 0o700)
            except FileExistsError:  # the ranks of a training start at the same moment
                if not os.path.isdir(path):
                    raise
        elif is_ours and hasattr(os, "geteuid") and os.stat(path).st_uid == os.geteuid():
            os.chmod(path, 0o700)
        check_directory(path)
    except RecordingError:
        raise
    except OSError as exc:
        raise _Unusable(f"cannot make the recordings folder {path}: {exc.strerror}") from exc
    if not os.access(path, os.W_OK | os.X_OK):
        raise _Unusable(f"cannot write to the recordings folder {path}")
    return path


def _refuse_foreign_links(path: str) -> None:
    """RecordingError at a link that the kernel itself would not follow, were fs.protected_symlinks on everywhere."""
    parts = path.split(os.sep)[::-1]
    at, links = os.sep, 0
    while parts:
        part = parts.pop()
        if part in ("", os.curdir, os.pardir):
            at = os.path.dirname(at) if part == os.pardir else at
            continue
        here = os.path.join(at, part)
        try:
            status = os.lstat(here)
        except FileNotFoundError:
            return
        if not stat.S_ISLNK(status.st_mode):
            at = here
            continue
        parent = os.stat(at)
        if parent.st_mode & stat.S_IWOTH and status.st_uid not in (os.geteuid(), parent.st_uid):
            raise RecordingError(
                f"the recordings folder {path} is reached over {here}, which is a link of {_user(status.st_uid)} in a "
                "folder that everybody may write to. Choose another one with MEMTRACK_DIR."
            )
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink(here)
        at = os.sep if target.startswith(os.sep) else at
        parts += target.split(os.sep)[::-1]


def _is_private(path: str) -> bool:
    """Whether it is a folder of this user's, no link to one, which nobody else may write to."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == getattr(os, "geteuid", lambda: 0)()
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _owners_are_made_up(path: str, owner: int) -> bool:
    """Whether ``owner`` also gets what this user makes there, as on some network shares and disks without owners."""
    from tempfile import TemporaryFile

    try:
        with TemporaryFile(dir=path) as file:
            return os.fstat(file.fileno()).st_uid == owner
    except OSError:
        return False


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
