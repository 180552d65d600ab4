"""The process that delivers what dead processes left behind: the agent becomes it when the training process has died.

Started as ``python .../memtrack/cli/courier.py HELD RECORDING...``; HELD is the number of a descriptor that has the
lock on the first recording, or -1. Its standard input is the handover, see ``memtrack.agent.handover``. Nobody waits
for it and nobody reads what it says: what it cannot deliver stays in the recordings, for the next.
"""

from __future__ import annotations

import os
import signal
import sys

PATIENCE_S = 60.0
"""How long a tracker that does not answer is tried, since the last batch that got through."""
HANG_S = 180
"""Beyond its patience, a process that hangs in a tracker's client ends itself, so that the next can deliver."""
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


def main(arguments: list[str]) -> int:
    """Deliver the recordings. Returns the exit status: 0 if nothing is left."""
    _step_back()
    held_fd, paths = int(arguments[0]), arguments[1:]
    from memtrack.agent.handover import Handed

    handed = Handed(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    _settle(handed.path, handed.folder)
    # a recording that is not the training process's own has its sinks under keys of its own
    for environment in handed.environments.values():
        os.environ.update(environment)
    from time import monotonic

    from memtrack.analysis.summary import figures_of
    from memtrack.sinks.deliver import deliver

    patience_s = float(os.environ.get("MEMTRACK_TEST_PATIENCE", PATIENCE_S))
    complete, progress_at = True, monotonic()

    def on_progress(*_: object) -> None:
        nonlocal progress_at
        progress_at = monotonic()
        _watch_over(patience_s)

    _watch_over(patience_s)
    for path in paths:
        try:
            outcome = deliver(
                path,
                figures_of,
                environments=handed.environments,
                patience_s=max(progress_at + patience_s - monotonic(), 0.0),
                held_fd=held_fd if path == paths[0] else -1,
                on_progress=on_progress,
            )
            complete = complete and outcome.complete
            if os.environ.get("MEMTRACK_DEBUG"):
                sys.stderr.write(f"memtrack courier: {outcome}\n")
        except Exception as exc:  # one recording that cannot be read keeps no other from being delivered
            complete = False
            if os.environ.get("MEMTRACK_DEBUG"):
                sys.stderr.write(f"memtrack courier: {path}: {type(exc).__name__}: {exc}\n")
    return 0 if complete else 1


def _step_back() -> None:
    """Be in nobody's way: whatever else runs here comes first, for processors and for memory."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the agent may have ignored it
    try:
        os.setsid()
    except OSError:
        pass  # the agent was at the head of a session already
    try:
        os.nice(10)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        pass


def _settle(path: list[str], folder: str) -> None:
    """Find modules where the training process did, and stand where it stood."""
    known = [entry for entry in sys.path if entry and os.path.abspath(entry) != HERE]
    sys.path[:] = dict.fromkeys([*path, *known, ROOT])
    try:
        os.chdir(folder or "/")
    except OSError:
        os.chdir("/")


def _watch_over(patience_s: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(patience_s) + HANG_S)


if __name__ == "__main__":
    # the folder of this script is no place to look for modules; memtrack is the one that the agent was
    sys.path[:] = [ROOT, *(entry for entry in sys.path if os.path.abspath(entry) != HERE)]
    status = main(sys.argv[1:])
    # what a tracker's client has left for the end of the interpreter is not worth waiting for
    os._exit(status)
