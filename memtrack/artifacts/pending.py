"""Artifacts that are not stored yet, as files that outlive the process: what it leaves, the next one can go on with."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from typing import TYPE_CHECKING, NamedTuple

from memtrack.artifacts.store import remove
from memtrack.artifacts.worker import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

JOBS = "jobs"
MAX_NAME = 120


def state_folder(directory: str, key: str) -> str:
    """Where, in the folder of the recordings, it is kept what is known of the store with this key.

    No other store goes by the same name, and any file system takes it.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", lambda found: f"%{ord(found[0]):02X}", key)
    if len(name) > MAX_NAME:
        from hashlib import sha256  # it brings OpenSSL, 4 MiB

        name = f"{name[:40]}-{sha256(key.encode()).hexdigest()[:24]}"
    return os.path.join(directory, "artifacts", name)


class Pending:
    """An artifact on its way, noted in the folder of its store; locked as long as a process sees to it."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    def leave(self) -> None:
        """Somebody else may see to it."""
        os.close(self._fd)

    def done(self, *, held: str) -> None:
        """Nobody need go on with it: forget it, and the links to its files."""
        remove(self._path)
        shutil.rmtree(held, ignore_errors=True)
        self.leave()


class Left(NamedTuple):
    """An artifact that a process has left behind."""

    pending: Pending
    job: Job
    source: str
    """What it is restored by, see ``Store.source``."""


def note(job: Job, source: str) -> Pending:
    """Note an artifact; what was left of the same name before is superseded. Raises OSError."""
    for left in leftovers(job.state):
        if left.job.name == job.name:
            left.pending.done(held=left.job.held)
        else:
            left.pending.leave()
    folder = os.path.join(job.state, JOBS)
    os.makedirs(folder, 0o700, exist_ok=True)
    path = os.path.join(folder, f"{os.path.basename(job.held)}.json")
    fd = os.open(f"{path}.part", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    _lock(fd)
    text = json.dumps({"source": source, "job": job._asdict()}).encode()
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]
    os.replace(f"{path}.part", path)
    return Pending(path, fd)


def leftovers(state: str) -> Iterator[Left]:
    """What processes that are gone have left in the folder of a store; from now on this one sees to it."""
    for path in sorted(glob.glob(os.path.join(glob.escape(state), JOBS, "*.json"))):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if not _lock(fd) or not os.path.exists(path):
                raise BlockingIOError
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            job = Job(**found["job"])
        except (OSError, TypeError, KeyError, ValueError):
            os.close(fd)
            continue
        yield Left(Pending(path, fd), job._replace(sources=list(map(_at_hand, job.sources))), found["source"])


def _at_hand(source: list[object]) -> list[object]:
    """A file that was held open by the process that is gone is read where it was."""
    path, opened, mode, original, *state = source
    return [path, opened if os.path.exists(str(opened)) else original, mode, original, *state]


def _lock(fd: int) -> bool:
    """Whether this process has it to itself now."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: who starts another process for the same run waits for the first
        pass
    except OSError:
        return False
    return True
