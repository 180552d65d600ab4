"""The end of a process that is not our child: that it is about to come, and the wait status.

While it is a zombie, ``/proc/PID/stat`` has it. Some 0.1 to 1 ms after its parent has collected it, the kernel tells
whoever holds a pidfd (``PIDFD_GET_INFO``, Linux 6.15). An older kernel tells nobody then.
"""

from __future__ import annotations

import os
import select
from time import monotonic, sleep

from memtrack.collectors.procfs import open_held

TIMEOUT_S = 0.25
GIVE_WAY_MS = 10

_PIDFD_GET_INFO = 0xC040FF0B
"""``_IOWR(0xFF, 11, struct pidfd_info)`` with the 64 bytes that the struct had when it came."""
_PIDFD_INFO_EXIT = 1 << 3
_EXIT_CODE = slice(60, 64)
_CAP_SYS_PTRACE = 1 << 19


class Dying:
    """Sees when a process lets go of its memory, which it does before anybody is told of its death."""

    def __init__(self, pid: int, pid_fd: int, proc: str = "/proc") -> None:
        self._statm = open_held(f"{proc}/{pid}/statm", 128)
        self._poll = select.poll() if pid_fd >= 0 else None
        if self._poll is not None:
            self._poll.register(pid_fd, select.POLLIN)

    def give_way(self) -> None:
        """If it does so right now, wait for its death, ``GIVE_WAY_MS`` at the most.

        While the victim of an out-of-memory kill returns its memory, the kernel does not see it as one any more. Who
        needs a page then, as for a write to a file, may be the next: their cgroup is still full.
        """
        try:
            if self._poll is not None and self._statm is not None and self._statm.read().startswith(b"0 "):
                self._poll.poll(GIVE_WAY_MS)
        except OSError:
            pass  # it has been collected


def wait_status(
    pid: int, start_ticks: int, pid_fd: int, timeout_s: float = TIMEOUT_S, proc: str = "/proc"
) -> int | None:
    """How process ``pid`` ended, as ``waitpid`` would say; None if nobody tells within ``timeout_s``.

    ``start_ticks`` says which process is meant, should the pid have been given to another one. ``pid_fd`` may be -1.
    """
    deadline = monotonic() + timeout_s
    while True:
        is_there, status = zombie(pid, start_ticks, proc)
        if status is not None:
            return status
        can_tell, status = _told(pid_fd)
        if status is not None:
            return status
        # either it has not been collected yet by a parent that takes its time, or the kernel is about to know
        if not can_tell or (is_there and pid_fd < 0) or monotonic() >= deadline:
            return None
        sleep(0.0005)


def zombie(pid: int, start_ticks: int | None, proc: str = "/proc") -> tuple[bool, int | None]:
    """Whether the process is there, alive or dead, and its wait status if it is dead and we may know.

    ``start_ticks`` is None where it does not matter whether the pid is another process's by now.
    """
    try:
        with open(f"{proc}/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
        fields = text[text.rindex(b")") + 2 :].split()
        if start_ticks is not None and int(fields[19]) != start_ticks:
            return False, None
        if fields[0] not in (b"Z", b"X"):
            return True, None
        status = int(fields[49])
    except (OSError, ValueError, IndexError):
        return False, None
    # who may not look is shown 0
    return True, status if status or _may_look(pid, proc) else None


def _may_look(pid: int, proc: str) -> bool:
    try:
        if os.stat(f"{proc}/{pid}").st_uid == os.geteuid():
            return True
        with open(f"{proc}/self/status", "rb") as file:
            capabilities = file.read().partition(b"\nCapEff:")[2].split(None, 1)[0]
        return bool(int(capabilities, 16) & _CAP_SYS_PTRACE)
    except (OSError, ValueError, IndexError):
        return False


def _told(pid_fd: int) -> tuple[bool, int | None]:
    """Whether the kernel can tell the end of a process by its pidfd, and what it tells."""
    if pid_fd < 0:
        return False, None
    from fcntl import ioctl

    info = bytearray(_PIDFD_INFO_EXIT.to_bytes(8, "little").ljust(64, b"\0"))
    try:
        ioctl(pid_fd, _PIDFD_GET_INFO, info)
    except ProcessLookupError:
        return True, None
    except OSError:
        return False, None
    if not info[0] & _PIDFD_INFO_EXIT:
        return True, None
    return True, int.from_bytes(info[_EXIT_CODE], "little", signed=True)
