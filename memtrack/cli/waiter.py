"""What is left of ``memtrack run`` while the command runs: it passes signals on, and ends as the command does.

Runs under ``-I -S`` and imports no more than it must until the command has ended. Signals are not handled but waited
for (``sigwaitinfo``), which leaves no gap and tells who sent them.
"""

import _signal  # the module signal would load enum, half a MiB
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGWINCH")
SI_KERNEL = 0x80
"""``si_code`` of a signal that the terminal made, for the whole foreground process group."""

AGENT_TIMEOUT_S = 2.0


def taken() -> "list[int]":
    """The signals to wait for. What was ignored from the start, as by nohup, stays ignored here and in the command."""
    numbers = (getattr(_signal, name) for name in PASSED_ON)
    return [_signal.SIGCHLD, *(number for number in numbers if _signal.getsignal(number) != _signal.SIG_IGN)]


def main(arguments: "list[str]") -> "NoReturn":
    """Wait for process ``arguments[0]``, say what the recording ``arguments[1]`` (may be "") came to, and end alike."""
    pid, recording, quiet = int(arguments[0]), arguments[1], bool(arguments[2])
    signals = taken()
    _signal.pthread_sigmask(_signal.SIG_BLOCK, signals)
    while not _has_ended(pid):
        received = _signal.sigwaitinfo(signals)
        if received.si_signo != _signal.SIGCHLD:
            _pass_on(received, pid)
    # Not collected until the agent is done: a zombie keeps its pid, and the agent can still tell who it was.
    if recording:
        _await_agent(recording)
    _, status, usage = os.wait4(pid, 0)
    if recording and not quiet:
        try:
            try:
                words = _last_words(recording, usage.ru_maxrss / 1024.0)
            except Exception as exc:  # the exit status counts, whatever is wrong
                words = f"memtrack: cannot sum up {recording} ({type(exc).__name__}: {exc})\n"
            sys.stderr.write(words)
            sys.stderr.flush()
        except OSError:
            pass  # nobody listens any more
    _end_like(status)


def _has_ended(pid: int) -> bool:
    """Whether the command has ended. As the init of a container, collects orphans that fell to this process."""
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return False
        if ended.si_pid == pid:
            return True
        os.waitpid(ended.si_pid, 0)


def _pass_on(received: "Any", pid: int) -> None:
    try:
        if received.si_code == SI_KERNEL and os.getpgid(pid) == os.getpgrp():
            return  # Ctrl-C and the like: the terminal has signalled the command as well
        os.kill(pid, received.si_signo)
    except OSError:
        pass  # it has changed its user, as sudo does


def _await_agent(recording: str) -> None:
    from time import monotonic, sleep

    from memtrack.errors import RecordingError
    from memtrack.recording.layout import ENDED, STOPPED
    from memtrack.recording.reader import RecordingReader

    deadline = monotonic() + AGENT_TIMEOUT_S
    try:
        with RecordingReader(recording) as reader:
            while reader.head().state not in (STOPPED, ENDED) and monotonic() < deadline:
                sleep(0.005)
    except RecordingError:
        pass  # somebody has removed it; the summary will say so


def _last_words(recording: str, kernel_mib: float) -> str:
    """The summary. ``kernel_mib`` is the largest RSS of any process of the command, as the kernel counted it."""
    import resource

    from memtrack.analysis.summary import size, summarise
    from memtrack.analysis.verdict import describe
    from memtrack.errors import RecordingError
    from memtrack.recording.reader import RecordingReader

    try:
        with RecordingReader(recording) as reader:
            summary = summarise(reader)
            errors = [event.text for event in reader.events() if event.kind == "error"]
    except RecordingError as exc:
        return f"memtrack: {exc}\n"
    # A new process counts the memory of the one that started it until its exec: below that, nothing is known.
    floor_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    known = kernel_mib > floor_mib
    peak_mib = summary.figures.peak_rss_mib
    if peak_mib is None:
        reason = errors[-1] if errors else "the command was too short to be sampled"
        largest = f"{size(kernel_mib)} resident" if known else f"less than {size(floor_mib)} resident"
        verdict = [] if summary.verdict is None else describe(summary.verdict)
        first = f"memtrack: {reason}; its largest process had {largest}, by the kernel's count"
        return "\n".join([first, *verdict]) + "\n"
    lines = [str(summary)]
    if known and kernel_mib > 1.01 * peak_mib + 1.0:
        lines.append(
            f"  kernel    counted {size(kernel_mib)} resident for the largest single process, children included"
        )
    shown = os.path.relpath(recording)
    lines.append(f"  recording {recording if shown.startswith('..') else shown}")
    return "\n".join(lines) + "\n"


def _end_like(status: int) -> "NoReturn":
    """Exit as the command did; if a signal killed it, by the same signal, without a second core dump."""
    if os.WIFSIGNALED(status):
        import resource

        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            _signal.signal(number, _signal.SIG_DFL)
        except OSError:
            pass  # SIGKILL
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        # still here: the init of a container is immune to its own signals
        os._exit(128 + number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    main(sys.argv[1:])
