"""The recordings in a folder: which there are, how each of them stands, and which one is meant."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from memtrack.analysis.summary import summarise
from memtrack.collectors.procfs import start_ticks
from memtrack.errors import RecordingError
from memtrack.recording import layout
from memtrack.recording.rank import are_siblings, rank_of
from memtrack.recording.reader import RecordingReader
from memtrack.recording.standing import boot_id, waiting
from memtrack.sinks.feeds import undelivered as windows_left

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memtrack.recording.records import Verdict

SUFFIX = ".mtk"
LOST = "lost its agent"
FRESH_NS = 3_000_000_000


class Listed(NamedTuple):
    """One file of the folder. ``problem`` says why it cannot be read; then only path, name, start and size are known.

    ``state`` is starting, running, stopped, how the process ended in a word or two, or "lost its agent": nobody writes
    it any more, though nobody has closed it. ``delivery`` is what waits for which tracker, "delivered", or "" if none
    is fed. Times are Unix seconds.
    """

    path: str
    name: str
    started_s: float
    size_bytes: int
    seconds: float = 0.0
    state: str = ""
    peak_rss_mib: float | None = None
    program: str = ""
    pid: int = 0
    delivery: str = ""
    problem: str = ""


def list_recordings(folder: str) -> list[Listed]:
    """Every recording in ``folder``, newest first; damaged ones too. Empty if there is no such folder."""
    return sorted((_look(path) for path in _paths(folder)), key=lambda one: (one.started_s, one.name), reverse=True)


def list_ranks(reader: RecordingReader) -> dict[int, Listed]:
    """The ranks of a distributed training by number, if a recording is of the first rank of a node, itself included.

    As far as the recordings of the others are still there, beside it; of a rank that was started again, the last.
    """
    own = rank_of(reader)
    if own is None or own.local:
        return {}
    found = {own.number: (0, _look(reader.path))}
    for path in _paths(os.path.dirname(os.path.abspath(reader.path))):
        try:
            with RecordingReader(path) as other:
                rank, fields = rank_of(other), other.fields
                if rank is None or rank.world != own.world or not are_siblings(reader.fields, fields):
                    continue
                began_ns, ended_ns = int(fields["mono_ns"]), other.head().mono_ns
                is_newer = began_ns > found.get(rank.number, (-1, None))[0]
                if rank.number != own.number and is_newer and ended_ns >= int(reader.fields["mono_ns"]):
                    found[rank.number] = began_ns, _look(path)
        except (OSError, KeyError, ValueError):
            continue
    return {number: found[number][1] for number in sorted(found)} if len(found) > 1 else {}


def find(run: str | None, folder: str) -> str:
    """Path of the recording that ``run`` means: a path, a name in ``folder``, or None for the newest there.

    Raises RecordingError if there is none.
    """
    if run is not None:
        for path in (run, os.path.join(folder, run), os.path.join(folder, run + SUFFIX)):
            if os.path.isfile(path):
                return path
        raise RecordingError(f"there is no recording {run}, nor one of that name in {folder}. See: memtrack ls")
    for listed in list_recordings(folder):
        if not listed.problem:
            return listed.path
    raise RecordingError(f"there is no recording in {folder}. Make one with: memtrack run -- CMD")


def find_live(pid: int, folders: Iterable[str]) -> str | None:
    """Path of the recording that is being made of process ``pid`` right now, if there is one in these folders."""
    for folder in folders:
        for listed in list_recordings(folder):
            if listed.pid == pid and listed.state == "running":
                with RecordingReader(listed.path) as reader:
                    if _process_is_there(reader.fields):
                        return listed.path
    return None


def length_s(reader: RecordingReader) -> float:
    """From the start of the recording to the last that is known of it, in seconds."""
    end_ns = max(reader.head().mono_ns, reader.pulse().mono_ns)
    return max((end_ns - int(reader.fields.get("mono_ns", "0"))) / 1e9, 0.0) if end_ns else 0.0


def state_of(reader: RecordingReader) -> str:
    """How the recording stands, in words: see :class:`Listed`."""
    state = reader.head().state
    if state == layout.STARTING:
        age_s = time.time() - int(reader.fields.get("wall_ns", "0")) / 1e9
        return layout.STATES[state] if age_s < FRESH_NS / 1e9 else LOST
    if state == layout.RUNNING and not _agent_is_there(reader):
        return LOST
    return layout.STATES[state] if state < len(layout.STATES) else "unknown"


def delivery_of(reader: RecordingReader) -> str:
    """What of the recording waits for which tracker, in words: see :class:`Listed`."""
    feeds = reader.feeds()
    parts = []
    for feed in feeds:
        if not feed.done:
            left = windows_left(reader, feed)
            what = f"{left} window{'s' if left > 1 else ''}" if left else "final figures"
            if feed.target:
                parts.append(f"{what} wait{'s' if left == 1 else ''} for {feed.sink}")
            else:  # nobody but its process knows how to
                parts.append(f"{what} not delivered to {feed.key}")
    return ", ".join(parts) or ("delivered" if feeds else "")


def undelivered(folder: str) -> list[str]:
    """Paths of the recordings in ``folder`` of which something can still be delivered, oldest first."""
    found = []
    for listed in reversed(list_recordings(folder)):
        if not listed.problem:
            with RecordingReader(listed.path) as reader:
                if waiting(reader):
                    found.append(listed.path)
    return found


def _paths(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.name.endswith(SUFFIX)]
    except OSError:
        return []


def _end_of(verdict: Verdict | None) -> str:
    """How the process ended, in a word or two; "" if nobody has told."""
    if verdict is None or verdict.kind == "unknown":
        return ""
    if verdict.kind == "clean":
        return "ended"
    if verdict.kind == "failed" and verdict.exit_code is not None:
        return f"failed ({verdict.exit_code})"
    if verdict.kind == "memory_error":
        return "MemoryError"
    if verdict.kind in ("killed", "unknown_sigkill") and verdict.signal is not None:
        return f"killed by {_signal_name(verdict.signal)}"
    return verdict.kind.replace("_", " ")


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _look(path: str) -> Listed:
    name = os.path.basename(path).removesuffix(SUFFIX)
    started_s, size = 0.0, 0
    try:
        status = os.stat(path)
        started_s, size = status.st_mtime, status.st_size
        with RecordingReader(path) as reader:
            fields, summary = reader.fields, summarise(reader)
            return Listed(
                path,
                name,
                started_s=int(fields["wall_ns"]) / 1e9,
                size_bytes=size,
                seconds=length_s(reader),
                state=_end_of(summary.verdict) or state_of(reader),
                peak_rss_mib=summary.figures.peak_rss_mib,
                program=fields.get("program", ""),
                pid=int(fields["pid"]),
                delivery=delivery_of(reader),
            )
    except (OSError, KeyError, ValueError) as exc:
        # RecordingError is an OSError; the others are a header that is whole and yet makes no sense
        problem = str(exc).removeprefix(f"{path}: ") if isinstance(exc, OSError) else f"header without {exc}"
        return Listed(path, name, started_s, size, problem=problem)


def _agent_is_there(reader: RecordingReader) -> bool:
    """Whether the agent still writes. Its pid may belong to another process by now, or to another pid namespace."""
    agent_pid = reader.head().agent_pid
    if sys.platform != "linux":
        import psutil

        return bool(psutil.pid_exists(agent_pid))
    if reader.fields.get("boot_id") != boot_id():
        return False
    try:
        with open(f"/proc/{agent_pid}/cmdline", "rb") as file:
            if os.path.basename(reader.path).encode() in file.read():
                return True
    except OSError:
        pass
    if _process_is_there(reader.fields):
        return False  # its process can be seen from here, so the agent would be seen too
    age_ns: int = time.monotonic_ns() - reader.pulse().mono_ns
    return age_ns < FRESH_NS


def _process_is_there(fields: dict[str, str]) -> bool:
    try:
        return start_ticks(int(fields["pid"])) == int(fields["start_ticks"])
    except (OSError, KeyError, ValueError):
        return False
