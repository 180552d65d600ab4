"""Starting the command of ``memtrack run`` and its agent, and then stepping aside.

Once both run, this process has nothing to do but to wait, for days perhaps. So it replaces itself (``exec``: same pid,
same children) by an interpreter without site-packages that runs ``waiter.py``, which takes a third of the memory.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from memtrack import config
from memtrack.agent import adoption
from memtrack.cli import waiter
from memtrack.cli.console import fail
from memtrack.errors import MonitorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from memtrack.config import Settings

CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "child")
"""Folder of the ``sitecustomize`` that each Python of the command runs at its start."""

NOT_EXECUTABLE, NOT_FOUND = 126, 127
LOADING_TIMEOUT_S = 0.1

# Python ignores these from its start on, and an ignored signal stays ignored across exec.
_IGNORED_BY_PYTHON = [getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name)]


def child_environment(
    settings: Settings, given: Iterable[str], environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """``environ`` with the settings that were given as options, so that a command that uses memtrack has the same."""
    variables = config.environment(settings)
    child = dict(environ)
    for argument in given:
        name = f"MEMTRACK_{argument.upper()}"
        child.pop(name, None)
        if argument == "directory":
            child.pop("MEMTRACK_DIR", None)
            child["MEMTRACK_DIR"] = os.path.abspath(settings.directory)
        elif name in variables:
            child[name] = variables[name]
    return child


def with_autolog(environ: Mapping[str, str], *, wanted: bool) -> dict[str, str]:
    """``environ`` with autolog turned on for every Python that runs in it, or off, also if it is on here."""
    paths = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path != CHILD]
    if paths == [""]:
        paths = []
    if wanted:
        paths.insert(0, CHILD)
    child = {name: value for name, value in environ.items() if name != "PYTHONPATH"}
    if paths:
        child["PYTHONPATH"] = os.pathsep.join(paths)
    return child


def replace(command: Sequence[str]) -> int:
    """Become the command. Returns the exit status if there is no such command."""
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], list(command))
    except OSError as exc:
        return _cannot_run(command[0], exc)


def launch(command: Sequence[str], settings: Settings, environment: Mapping[str, str], *, quiet: bool) -> int:
    """Run ``command`` and monitor it. Does not return on success: the process waits for the command and ends as it did.

    Returns the exit status if the command cannot be run. Raises MonitorError or RecordingError before it is started.
    """
    if not hasattr(signal, "sigwaitinfo"):
        raise MonitorError("memtrack run needs Linux. Call memtrack.start() in the program instead.")
    folder = config.make_directory(settings)
    child = {**environment, adoption.VARIABLE: adoption.announcement(folder)}
    if child.get("MEMTRACK_DIR"):
        child["MEMTRACK_DIR"] = folder  # absolute: the program may be elsewhere when it asks
    # imported before the command starts, so that the agent comes soon after it
    from memtrack.monitor import Monitor

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would lose the exit status
    # From here on signals wait until the waiter takes them: none is lost on the way.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waiter.taken())
    try:
        pid = os.posix_spawnp(command[0], list(command), child, setsigmask=before, setsigdef=_IGNORED_BY_PYTHON)
    except OSError as exc:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _cannot_run(command[0], exc)
    _await_program(pid)
    try:
        recording = Monitor(settings, pid=pid).path
    except Exception as exc:  # whatever it is: the command runs by now, and somebody has to wait for it
        fail(f"the command runs, but is not monitored: {exc}", 0)
        recording = ""
    return _step_aside(pid, recording, quiet)


def _await_program(pid: int) -> None:
    """Wait, for a moment at the most, until the process has its command line, which tells what it is.

    ``posix_spawn`` returns when the kernel has taken the old program away, and is still loading the new one.
    """
    deadline = time.monotonic() + LOADING_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if file.read(1):
                    return
            with open(f"/proc/{pid}/stat", "rb") as file:
                if file.read().rpartition(b") ")[2].startswith(b"Z"):
                    return  # it has ended already
            time.sleep(0.0005)
    except OSError:
        pass


def _step_aside(pid: int, recording: str, quiet: bool) -> NoReturn:
    arguments = [str(pid), recording, "quiet" if quiet else ""]
    try:
        os.execv(sys.executable, [sys.executable, "-I", "-S", waiter.__file__, *arguments])
    except OSError:
        waiter.main(arguments)


def _cannot_run(program: str, exc: OSError) -> int:
    if not isinstance(exc, FileNotFoundError):
        return fail(f"cannot run {program}: {exc.strerror}", NOT_EXECUTABLE)
    if shutil.which(program):
        return fail(f"cannot run {program}: the interpreter in its first line does not exist", NOT_FOUND)
    return fail(f"cannot run {program}: there is no such command", NOT_FOUND)
