"""Whether the process that a recording is of may still write to it, and deliver from it."""

from __future__ import annotations

import os
import sys
from time import time

from memtrack.recording import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.recording.reader import RecordingReader
    from memtrack.recording.records import Feed

LIVE, STOPPED, DEAD = "live", "stopped", "dead"

FRESH_S = 120.0
"""Where the process cannot be seen, it counts as alive for so long after the last change of the file."""


def standing(reader: RecordingReader) -> str:
    """``LIVE``: the process delivers what there is. ``STOPPED``: it has stopped to. ``DEAD``: it has gone."""
    state = reader.head().state
    if state == layout.ENDED:
        return DEAD
    # an agent that failed says stopped, too, and the process goes on
    if state == layout.STOPPED and reader.control(layout.STOP):
        return STOPPED
    there = _is_there(reader.fields)
    if there is None:
        there = _is_fresh(reader)
    return LIVE if there else DEAD


def waiting(reader: RecordingReader) -> list[Feed]:
    """The feeds that have not got everything and whose sink can be made again."""
    return [feed for feed in reader.feeds() if not feed.done and feed.sink and feed.target]


def boot_id() -> str:
    """What names this boot of the machine; "" where there is no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """What names the set of processes that can be seen from here; "" where there is no such thing."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_there(fields: dict[str, str]) -> bool | None:
    """Whether the process runs; None if that cannot be told: another machine, or a container that hides it."""
    here = pid_namespace()
    if sys.platform != "linux" or not here or fields.get("boot_id") != boot_id() or fields.get("pid_ns", here) != here:
        return None
    try:
        with open(f"/proc/{int(fields['pid'])}/stat", "rb") as file:
            text = file.read()
        words = text[text.rindex(b")") + 2 :].split()
        # what nobody has collected yet is dead all the same
        return words[0] not in (b"Z", b"X") and words[19] == fields["start_ticks"].encode()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _is_fresh(reader: RecordingReader) -> bool:
    """Whether the file was written lately, whoever did: with each window the agent does."""
    try:
        interval_s = float(reader.fields.get("interval_s", "1"))
        return time() - os.stat(reader.path).st_mtime < max(FRESH_S, 3.0 * interval_s)
    except OSError:
        return False
