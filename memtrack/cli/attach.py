"""``memtrack attach PID``: monitor a process that runs already."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from memtrack import config
from memtrack.cli.options import CpuBudget, Directory, Interval, RecordingSize, Tick, settings
from memtrack.errors import MonitorError

if TYPE_CHECKING:
    from memtrack.config import Settings
    from memtrack.recording.reader import RecordingReader

REFRESH_S = 0.25


def attach(
    pid: Annotated[int, typer.Argument(metavar="PID", help="The process.", show_default=False)],
    interval: Interval = None,
    tick: Tick = None,
    recording_size: RecordingSize = None,
    directory: Directory = None,
    cpu_budget: CpuBudget = None,
) -> None:
    """Monitor a running process until it ends or Ctrl-C.

    If it is being monitored already, as by memtrack.start() in it, that recording is followed; no other is made.
    """
    resolved = settings(
        interval=interval, tick=tick, recording_size=recording_size, directory=directory, cpu_budget=cpu_budget
    )
    if resolved.disable:
        raise MonitorError("memtrack is switched off by MEMTRACK_DISABLE")
    check(pid)
    from memtrack.analysis.summary import summarise
    from memtrack.recording.reader import RecordingReader

    path = _watch(pid, resolved)
    if path:
        with RecordingReader(path) as reader:
            typer.echo(str(summarise(reader)))
        typer.echo(f"  recording {path}")


def check(pid: int, proc: str = "/proc") -> None:
    """Raise MonitorError if process ``pid`` is not there, has no memory, or belongs to somebody else."""
    try:
        owner = os.stat(f"{proc}/{pid}").st_uid
        with open(f"{proc}/{pid}/status", "rb") as file:
            status = file.read()
    except PermissionError:
        raise MonitorError(f"not permitted to look at process {pid}: /proc is mounted with hidepid") from None
    except OSError:
        raise MonitorError(f"there is no process {pid}") from None
    if b"VmRSS:" not in status:
        raise MonitorError(f"process {pid} has no memory to measure: it has ended, or is part of the kernel")
    if os.geteuid() not in (0, owner):
        raise MonitorError(
            f"not permitted to measure process {pid}: it belongs to {_user(owner)}. Run memtrack as them."
        )


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _folders(pid: int, resolved: Settings) -> list[str]:
    """Where a recording of the process may be: the folder of the settings, seen from here and from its directory."""
    found = [config.find_directory(resolved)]
    try:
        found.append(os.path.join(os.readlink(f"/proc/{pid}/cwd"), resolved.directory))
    except OSError:
        pass
    return found


def _watch(pid: int, resolved: Settings) -> str:
    """Watch process ``pid`` until it ends, or SIGINT or SIGTERM comes. Returns the recording's path, "" if none."""
    from memtrack.monitor import Monitor
    from memtrack.recording.reader import RecordingReader
    from memtrack.report.recordings import find_live

    def leave(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monitor, path = None, ""
    before = signal.signal(signal.SIGTERM, leave)
    try:
        path = find_live(pid, _folders(pid, resolved)) or ""
        if not path:
            monitor = Monitor(resolved, pid=pid)
            path = monitor.path
        with RecordingReader(path) as reader:
            _follow(reader, f"{'watching' if monitor else 'following the recording of'} process {pid}")
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        if monitor is not None:
            monitor.stop()
    return path


def _follow(reader: RecordingReader, doing: str) -> None:
    """Show where things stand until the recording ends."""
    from memtrack.cli.console import stderr
    from memtrack.report.recordings import state_of
    from memtrack.report.terminal import live_line

    console = stderr()
    console.print(f"memtrack: {doing}; Ctrl-C ends it", markup=False)
    with console.status("") as status:
        while state_of(reader) in ("starting", "running"):
            status.update(live_line(reader))
            time.sleep(REFRESH_S)
