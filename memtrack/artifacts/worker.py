"""The process that packs: beside the training, so that it may take its time.

Started as ``python .../memtrack/artifacts/worker.py``. The first line of its standard input is the job, see ``Job``.
It answers with a JSON object a line:

    {"progress": [done, total, stored]}            bytes
    {"pack": id, "path": …, "size": …, "md5": …}    to be stored; at most two are on their way
    {"manifest": path, "md5": …, "packs": {id: [size, md5, path]}, "plain": …, "changed": […]}     to be stored last
    {"overview": path}                             a text on all artifacts, which is not waited for
    {"error": text, "again": whether trying again may help}

and is answered ``stored ID`` and, in the end, ``committed``. When nobody listens any more it stops; what it has packed
by then is used by the next one for the same store.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


class Job(NamedTuple):
    """What is to be packed, and where."""

    name: str
    """Of the artifact, as ``model/step-00000040``."""
    family: str
    """What the names of its earlier versions have in common with it."""
    step: int | None
    compress: str
    use_base: bool
    with_md5: bool
    folder: str
    """Where packs are made."""
    keeps_packs: bool
    """Whether they stay there, because the store reads them there."""
    cache_bytes: int
    """How much stays there otherwise once it is stored: what has been overwritten meanwhile is decoded from that."""
    state: str
    """The folder of the ledger."""
    held: str
    """The folder with links to the files, "" if there is none."""
    sources: list[list[Any]]
    """Path in the artifact, where to read it, mode, where it was, its size, and when it was written to last."""
    stored: dict[str, int] | None
    """The packs that the store has, with their sizes; None if it was not asked."""
    source: str
    """What it is restored by."""
    note: str
    """The text at the head of the manifest."""
    path: list[str]
    """Where to look for modules."""


class _Left(Exception):
    """Nobody listens any more."""


class _Line:
    """The line to the process that has started this one."""

    def __init__(self, come: IO[str], go: IO[str]) -> None:
        self._come = come
        self._go = go

    def say(self, **what: Any) -> None:
        try:
            self._go.write(json.dumps(what) + "\n")
            self._go.flush()
        except OSError as exc:
            raise _Left from exc

    def hear(self) -> str:
        line = self._come.readline()
        if not line.endswith("\n"):
            raise _Left
        return line.strip()


def main() -> int:
    """Do the job. Returns the exit status."""
    _step_back()
    line = _Line(sys.stdin, sys.stdout)
    try:
        job = Job(**json.loads(line.hear()))
        sys.path[:] = dict.fromkeys([ROOT, *job.path, *sys.path])
        from memtrack.artifacts.work import work

        work(job, line)
    except _Left:
        return 1
    except Exception as exc:
        if os.environ.get("MEMTRACK_DEBUG"):
            raise
        # an OSError may pass: a disk that is full, a file system that does not answer
        again = isinstance(exc, OSError) and not isinstance(exc, FileNotFoundError)
        try:
            line.say(error=_told(exc), again=again)
        except _Left:
            pass
        return 1
    return 0


def _told(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.strerror}: {exc.filename}" if exc.filename else exc.strerror
    return str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"


def _step_back() -> None:
    """Whatever else runs here comes first, for processors and for memory; the keyboard's signals are not for this."""
    try:
        os.setsid()
        os.nice(10)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except (OSError, AttributeError):
        pass


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]
    status = main()
    os._exit(status)
