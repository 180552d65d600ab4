"""What the training process knows of itself and says to its recording, and whether it can be monitored at all."""

from __future__ import annotations

import os
import sys
import time

from memtrack.agent.job import launcher_of
from memtrack.collectors.procfs import program_name, start_ticks
from memtrack.errors import MonitorError, RecordingError
from memtrack.recording import layout
from memtrack.recording.descriptor import above_stdio
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.standing import boot_id, pid_namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.config import Settings


def header(settings: Settings, pid: int, *, is_own: bool, has_stacks: bool) -> dict[str, str]:
    """The fields of the header of a recording of process ``pid``, which is this one if it ``is_own``."""
    return {
        "size": str(settings.recording_bytes),
        "pid": str(pid),
        "own": str(int(is_own)),
        "start_ticks": str(start_ticks_of(pid)),
        "boot_id": boot_id(),
        "program": program_name(pid),
        "launcher": launcher_of() if is_own else "",
        "wall_ns": str(time.time_ns()),
        "mono_ns": str(time.monotonic_ns()),
        "interval_s": repr(settings.interval_s),
        "tick_s": repr(settings.tick_s),
        "cpu_budget_pct": repr(settings.cpu_budget_pct),
        "end_run": str(int(settings.end_run)),
        "keep": str(settings.keep),
        "keep_days": repr(settings.keep_days),
        "metrics": choice(settings.metrics),
        "selective": str(int(settings.selective)),
        "pid_ns": pid_namespace(),
        "stacks": settings.stacks if has_stacks else "off",
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }


def free_path(folder: str, pid: int) -> str:
    """A path in ``folder`` for a recording of process ``pid`` that begins now. Raises RecordingError."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{pid}"
    for attempt in range(100):
        path = os.path.join(folder, f"{name}{f'-{attempt}' if attempt else ''}.mtk")
        if not os.path.exists(path):
            return path
    raise RecordingError(f"cannot find a free name for a recording in {folder}")


def choice(chosen: str | tuple[str, ...]) -> str:
    """The choice of series as one text, for who delivers later; a list that would fill the header gives way to all."""
    text = chosen if isinstance(chosen, str) else ",".join(chosen)
    return text if len(text) <= 2000 and text.isprintable() else "all"


def farewell() -> dict[str, str]:
    """What Python knows of how it ends. No message of an exception: it may hold anything."""
    kind = getattr(sys, "last_type", None)
    if kind is None or hasattr(sys, "ps1"):
        return {"how": "exit"}
    fields = {"how": "exception", "type": kind.__qualname__, "module": kind.__module__}
    trace = getattr(sys, "last_traceback", None)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None:
        code = trace.tb_frame.f_code
        fields["where"] = f"{code.co_filename}:{trace.tb_lineno} {code.co_name}"
    return fields


def stay_interrupted() -> None:
    """Let a program that Ctrl-C has ended keep its exit status, death by SIGINT, which tells shells to stop, too.

    The interpreter forgets that it was interrupted once a text is evaluated at its exit, as the making of any named
    tuple does. It remembers when a text is evaluated that is interrupted itself.
    """
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1"):
        try:
            exec("raise KeyboardInterrupt")
        except KeyboardInterrupt:
            pass


def has_readable_stacks() -> bool:
    """Whether this is an interpreter whose stacks the agent knows how to read: CPython, 64 bit, a usual build."""
    usual = sys.implementation.name == "cpython" and not getattr(sys, "abiflags", "")
    return sys.platform == "linux" and usual and sys.maxsize > 1 << 32


def open_memory() -> int:
    """A descriptor to read this process's memory by, for an agent that is to read its stacks; -1 if there is none.

    Yama (``ptrace_scope`` 1, as Ubuntu has it) lets no process read another's but its children's, unless that one
    agrees: this is how it does. Where only an administrator may trace (2) or nobody (3), nothing is handed over.
    """
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as file:
            if int(file.read()) > 1:
                return -1
    except (OSError, ValueError):
        pass  # no Yama
    try:
        return above_stdio(os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return -1


def check_interpreter() -> None:
    """Exit handlers, forks and threads are the main interpreter's: MonitorError in any other."""
    try:
        import _interpreters as interpreters  # Python 3.13
    except ImportError:
        try:
            import _xxsubinterpreters as interpreters
        except ImportError:
            return
    if interpreters.get_current() != interpreters.get_main():
        raise MonitorError(
            "memtrack cannot be started in a subinterpreter. Start it in the main one: it measures the whole process."
        )


def start_ticks_of(pid: int) -> int:
    """Start time of a process, in clock ticks since boot; MonitorError if it cannot be seen."""
    if sys.platform != "linux":
        return 0
    try:
        return start_ticks(pid)
    except (FileNotFoundError, ProcessLookupError) as exc:
        if not os.path.exists("/proc/self"):
            raise MonitorError(
                "cannot see any process: /proc is not mounted. Mount it: mount -t proc proc /proc"
            ) from exc
        raise MonitorError(f"there is no process {pid}") from exc
    except OSError as exc:
        raise MonitorError(f"cannot look at process {pid}: {exc.strerror}") from exc


def stop_those_before(path: str, fields: dict[str, str]) -> None:
    """Stop the agents of earlier programs in this process, but for that of the recording at ``path`` with ``fields``.

    A process that replaces its program (``exec``) stays the same process, and its agent goes on. What has not been
    delivered is delivered as after a stop. That of a recording of ``memtrack run`` is left alone. Never raises.
    """
    folder, own_name = os.path.split(path)
    try:
        for name in os.listdir(folder):
            if f"-{fields['pid']}" in name and name.endswith(".mtk") and name != own_name:
                other = os.path.join(folder, name)
                if _is_live_twin(other, fields):
                    marks = MarkWriter(other)
                    marks.request_stop()
                    marks.close()
    except (OSError, ValueError):
        pass  # gone meanwhile, or not ours to read


def _is_live_twin(path: str, fields: dict[str, str]) -> bool:
    """Whether it is of the same process, made by itself, and its agent has not been told to stop."""
    with RecordingReader(path) as reader:
        is_live = reader.head().state == layout.RUNNING and not reader.control(layout.STOP)
        is_live = is_live and "adopted" not in reader.fields
        same = ("pid", "own", "start_ticks", "boot_id", "pid_ns")
        return is_live and all(reader.fields.get(key) == fields[key] for key in same)
