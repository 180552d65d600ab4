"""Starting the agent from the training process."""

from __future__ import annotations

import os
import sys
from time import monotonic, sleep

from memtrack.errors import AgentError
from memtrack.recording.descriptor import Descriptor, above_stdio

_ENTRY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
_START_TIMEOUT_S = 5.0


class AgentHandle:
    """The caller's end of a running agent: wakes it. Not shared with forked children: they drop it."""

    def __init__(self, wake_fd: int) -> None:
        self._wake = Descriptor(wake_fd)

    @property
    def wake_fd(self) -> int:
        """The descriptor; -1 if it is closed, by whomever."""
        return self._wake.fd if self._wake.is_ours else -1

    @wake_fd.setter
    def wake_fd(self, fd: int) -> None:
        self._wake = Descriptor(fd)

    def wake(self) -> None:
        """Let the agent look at the control words now. Never blocks, never raises."""
        try:
            # an eventfd, because writing to a pipe without reader may kill the process with SIGPIPE
            if self._wake.is_ours:
                os.write(self._wake.fd, (1).to_bytes(8, "little"))
        except OSError:
            pass

    def close(self) -> None:
        """Close the descriptor."""
        self._wake.close()


def spawn(
    recording: str,
    handover_fd: int = -1,
    memory_fd: int = -1,
    *,
    before: AgentHandle | None = None,
    relieving: bool = False,
) -> AgentHandle:
    """Start the agent that fills ``recording``; returns in some 20 ms, when it is on its way, not when it is ready.

    It gets an eventfd to be woken by as descriptor 0, ``handover_fd`` as 1 and ``memory_fd`` as 3; -1: the null device.
    The successor of an agent that has gone gets the eventfd of the one ``before``, whose handle stays good for it; or a
    new one, if somebody has closed that. ``relieving``: there is one that somebody else has started, which is to leave.

    The process is started with ``posix_spawn``, which does not copy the caller's page tables as ``fork`` does (0.36 s
    for 8 GB, and its pages stay pinned), and detaches itself, so that it is no child of the caller afterwards. Raises
    AgentError if it cannot be started.
    """
    command = [interpreter(), "-I", "-S", _ENTRY, recording, *(["relieve"] if relieving else [])]
    if not hasattr(os, "posix_spawn"):
        return _spawn_elsewhere(command)
    if before is not None and not hasattr(os, "eventfd"):
        raise AgentError("cannot start the agent again: this system has no eventfd")
    read_fd = wake_fd = -1 if before is None else before.wake_fd
    if wake_fd < 0:
        try:
            read_fd, wake_fd = _wake_pair()
        except (OSError, ImportError, MemoryError) as exc:  # no descriptor, no memory left
            raise AgentError(f"cannot start the agent: {getattr(exc, 'strerror', '') or exc}") from exc
    handle = before or AgentHandle(wake_fd)
    handle.wake_fd = wake_fd
    null = os.devnull
    actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, read_fd, 0)]
    for fd, number in ((handover_fd, 1), (memory_fd, 3)):
        given = (os.POSIX_SPAWN_DUP2, fd, number)
        actions.append(given if fd >= 0 else (os.POSIX_SPAWN_OPEN, number, null, os.O_RDWR, 0))  # type: ignore[arg-type]
    if not os.environ.get("MEMTRACK_DEBUG"):
        actions.append((os.POSIX_SPAWN_OPEN, 2, null, os.O_WRONLY, 0))  # type: ignore[arg-type]
    try:
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        _reap(pid)
    except Exception as exc:
        if before is None:
            handle.close()
        if isinstance(exc, OSError):
            raise AgentError(f"cannot start the agent with {command[0]}: {exc.strerror}") from exc
        raise
    finally:
        if read_fd != wake_fd:
            os.close(read_fd)
    return handle


def _wake_pair() -> tuple[int, int]:
    """Descriptors to read from and to write to; one eventfd serves as both where there is such a thing (Linux)."""
    if hasattr(os, "eventfd"):
        fd = above_stdio(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return fd, fd
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    return read_fd, write_fd


def _reap(pid: int) -> None:
    """Collect the process that was started; it exits as soon as it has forked the agent proper."""
    deadline = monotonic() + _START_TIMEOUT_S
    while monotonic() < deadline:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return  # SIGCHLD is ignored, or somebody else has collected it
        if done:
            if status:
                raise AgentError(f"the agent did not start: wait status {status}. MEMTRACK_DEBUG=1 shows its output.")
            return
        sleep(0.001)
    raise AgentError(f"the agent did not start within {_START_TIMEOUT_S:g} s")


def _spawn_elsewhere(command: list[str]) -> AgentHandle:
    """Windows: no inherited descriptor wakes the agent there, it looks at the control words at each tick."""
    import subprocess

    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, creationflags=flags)
    except OSError as exc:
        raise AgentError(f"cannot start the agent with {command[0]}: {exc}") from exc
    process.returncode = 0  # it is left to itself; without this, Popen would warn that it still runs
    return AgentHandle(-1)


def interpreter() -> str:
    """The interpreter; embedded ones (uwsgi, notebooks in an application) do not know theirs."""
    found: str | None = sys.executable
    if not found or "python" not in os.path.basename(found).lower():
        import shutil

        found = shutil.which("python3")
    if not found:
        raise AgentError("no Python interpreter found for the agent: sys.executable is empty and python3 not on PATH")
    return found
