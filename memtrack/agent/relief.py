"""One agent relieves another in the same recording, so that at no moment nobody watches.

The one that comes says in a control word that it waits. The one that is there sees that at its next tick, finishes its
window, lets go of the recording's lock and leaves. Should it not, or should the one that waits be killed, it stays.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from memtrack.recording import layout

PATIENCE_S = 5.0
PAUSE_S = 0.002
_WORD = layout.CONTROL + 8 * layout.RELIEF


def claim(path: str) -> int:
    """Lock the recording until this process ends. Returns the descriptor that has the lock; -1 if somebody else has it:
    another agent, which stood still for a while, or who delivers it. No kill leaves it behind: it is the kernel's."""
    from fcntl import LOCK_EX, LOCK_NB, flock

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flock(fd, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return -1
    except OSError:
        pass  # a file system without locks
    return fd


def relieve(path: str) -> int:
    """Wait until the agent of the recording at ``path`` has left. Returns the descriptor that has its lock; -1 if it
    stays: it hangs, is delivering, or the file system has no locks."""
    from fcntl import LOCK_EX, LOCK_NB, flock

    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    fields = layout.unpack_header(os.pread(fd, layout.PAGE, 0), path)
    # an agent that watches a process that stands still looks up this often
    deadline = monotonic() + PATIENCE_S + 2.0 * float(fields["tick_s"])
    has_asked = False
    try:
        while monotonic() < deadline:
            try:
                flock(fd, LOCK_EX | LOCK_NB)
                return fd
            except BlockingIOError:
                pass
            except OSError:
                break
            if not has_asked:
                has_asked = True
                os.pwrite(fd, os.getpid().to_bytes(8, "little"), _WORD)
            sleep(PAUSE_S)
    finally:
        if has_asked:
            os.pwrite(fd, bytes(8), _WORD)
    os.close(fd)
    return -1


def waits(pid: int, path: str) -> bool:
    """Whether process ``pid`` is there and an agent for the recording at ``path``."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsencode(os.path.basename(path)) in file.read()
    except OSError:
        return False
