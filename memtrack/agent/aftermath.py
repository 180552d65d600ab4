"""What the agent does besides sampling: deliver what a dead process left behind, and keep the folder in order."""

from __future__ import annotations

import os
import sys

SUFFIX = ".mtk"
HANDOVER_FD = 1
COURIER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli", "courier.py")
NEWEST, OLDEST = 150, 50
"""How many recordings of a folder are looked at: the newest, which may wait to be delivered, and the oldest, which may
be ready to go."""
DAY_S = 86400.0


def deliver(path: str, held_fd: int) -> None:
    """Become the process that delivers what is left of the recording at ``path``; return if nothing is.

    ``held_fd`` has the lock on the recording, which is not let go in between; through it the recording is found even if
    it has been removed.
    """
    from memtrack.recording.reader import RecordingReader
    from memtrack.recording.standing import waiting

    if held_fd < 0 or not hasattr(os, "posix_spawn"):
        return
    if not _is_same(path, held_fd):
        path = f"/proc/self/fd/{held_fd}"
    with RecordingReader(path) as reader:
        if not waiting(reader):
            return
    os.dup2(HANDOVER_FD, 0)
    null_fd = os.open(os.devnull, os.O_RDWR)
    os.dup2(null_fd, 1)
    os.set_inheritable(held_fd, True)
    os.execve(sys.executable, _command(held_fd, [path]), _environment())


def tidy(own_path: str) -> None:
    """Look through the folder of a recording once: deliver what dead processes left behind, remove what is old.

    What is delivered and finished is removed beyond the ``keep`` newest, and after ``keep_days``. Nothing else is
    touched. Never raises.
    """
    if not hasattr(os, "geteuid"):
        return
    try:
        _tidy(own_path)
    except Exception:
        pass  # the folder is gone, or not ours, or a disk fails: the next start will see


def _tidy(own_path: str) -> None:
    from time import time

    from memtrack.recording.reader import RecordingReader
    from memtrack.recording.standing import LIVE, standing, waiting

    with RecordingReader(own_path) as reader:
        keep, keep_days = int(reader.fields.get("keep", "20")), float(reader.fields.get("keep_days", "30"))
    folder, own_name = os.path.split(own_path)
    names = sorted((name for name in os.listdir(folder) if name.endswith(SUFFIX) and name != own_name), reverse=True)
    if len(names) > NEWEST + OLDEST:
        names = names[:NEWEST] + names[-OLDEST:]
    undelivered, kept = [], 0
    for name in names:
        path = os.path.join(folder, name)
        try:
            status = os.lstat(path)
            if not _is_ours(status):
                continue
            with RecordingReader(path) as reader:
                stands = standing(reader)
                if stands == LIVE:
                    continue
                if waiting(reader):
                    undelivered.append(path)
                    continue
            kept += 1
            if kept > keep or time() - status.st_mtime > keep_days * DAY_S:
                _remove(path)
        except OSError:
            continue  # damaged, or gone meanwhile
    if undelivered and sys.platform == "linux":
        _start_courier(undelivered)


def _remove(path: str) -> None:
    """Unlink a recording, unless somebody writes or delivers it, or something of it still waits."""
    import fcntl

    from memtrack.recording.reader import RecordingReader
    from memtrack.recording.standing import waiting

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with RecordingReader(path) as reader:
            if not waiting(reader) and _is_same(path, fd):
                os.unlink(path)
    finally:
        os.close(fd)


def _start_courier(paths: list[str]) -> None:
    """Start a process that delivers recordings. It is a child, which nobody needs to collect."""
    import _signal

    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
    null = os.devnull
    actions: list[tuple[int, ...]] = [
        (os.POSIX_SPAWN_DUP2, HANDOVER_FD, 0),
        (os.POSIX_SPAWN_OPEN, 1, null, os.O_WRONLY, 0),  # type: ignore[list-item]
    ]
    os.posix_spawn(
        sys.executable, _command(-1, paths), _environment(), file_actions=actions, setsigdef=[_signal.SIGCHLD]
    )


def _command(held_fd: int, paths: list[str]) -> list[str]:
    return [sys.executable, COURIER, str(held_fd), *paths]


def _environment() -> dict[str, str]:
    """The courier must not monitor itself, whatever is imported at the start of every interpreter."""
    return {**os.environ, "MEMTRACK_DISABLE": "1"}


def _is_same(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def _is_ours(status: os.stat_result) -> bool:
    """A file of this user, not a link to one."""
    import stat

    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
