"""Python stacks of the training process, taken at new peaks and when the limit is near.

They are read from its memory, see ``frames.py``: nothing happens in the training process. One takes the agent about a
millisecond. Each new peak must stand well above the last one, which bounds their number: some 150 up to a terabyte.
"""

from __future__ import annotations

import os

from memtrack import metrics
from memtrack.recording.layout import STACK_COUNT
from memtrack.recording.records import Stack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from memtrack.recording.writer import RecordingWriter
    from memtrack.sampling.window import Place

    class Reader(Protocol):
        """What gives stacks: :class:`memtrack.agent.frames.StackReader`."""

        def threads(self) -> list[int]:
            """Threads, the main one first."""

        def stack(self, thread: int) -> list[tuple[str, int, str]]:
            """Path, line and function of each frame, the innermost first."""

        def close(self) -> None:
            """Done."""


RISE = 1.05
RISE_MIB = 32.0
"""A new peak is worth a stack from 5 % and 32 MiB above the last that has one."""

LEVELS_PCT = (20.0, 10.0, 5.0, 2.0)
REARM = 1.5
"""A level counts again once the headroom was half as much again."""

LOW_GAP_NS = 10**8
MINUTE_NS = 60 * 10**9
LOW_PER_MINUTE = 50
MOST = 2000

OTHER_THREAD = "-- another thread"
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_LIBRARY = f"{os.sep}lib{os.sep}python3."
_NONE = float("inf")


class StackWatch:
    """Decides at each sample whether a stack is worth having, takes and stores it.

    ``fields`` is the header of the recording: ``stacks`` says whose stack (``main``, ``all``, ``off``), ``python`` the
    version; ``memory_fd`` is the process's memory, opened by itself, or -1. Without them, or where the kernel does not
    let the memory be read, there are no stacks. Never raises.
    """

    def __init__(
        self,
        writer: RecordingWriter,
        pid: int,
        fields: dict[str, str],
        memory_fd: int = -1,
        reader: Reader | None = None,
    ) -> None:
        self._writer = writer
        self._pid = pid
        self._version = fields.get("python", "")
        self._mode = fields.get("stacks", "off")
        self._memory_fd = memory_fd
        self._reader = reader
        self._slots = {} if writer.fresh else writer.stacks()
        self._number = max((stack.number + 1 for stack in self._slots.values()), default=0)
        self._taken = 0
        highest = max((stack.rss_mib for stack in self._slots.values()), default=-1.0)
        self._rise_mib = highest * RISE + RISE_MIB if highest >= 0.0 else -1.0
        """The RSS from which the next stack is worth having; -1: not known before the first sample."""
        self._headroom_pct = 100.0
        self._last_ns = 0
        self._level = 0
        self._low_ns = -LOW_GAP_NS
        self._minute_ns = -MINUTE_NS
        self._in_minute = 0
        if self._mode not in ("main", "all"):
            self._give_up()

    def look(self, now_ns: int, latest: dict[str, float], place: Place) -> None:
        """Called after each sample."""
        if self._rise_mib == _NONE:
            return
        rss_mib = latest.get(metrics.RSS, 0.0)
        headroom_pct = latest.get(metrics.CONTAINER_HEADROOM, 100.0)
        if self._rise_mib < 0.0:
            self._rise_mib = rss_mib * RISE + RISE_MIB
        is_peak = rss_mib > self._rise_mib
        is_low = headroom_pct != self._headroom_pct and self._is_low(now_ns, headroom_pct)
        self._headroom_pct, self._last_ns = headroom_pct, now_ns
        if is_peak or is_low:
            self._take(now_ns, latest, place, is_peak=is_peak)

    def finish(self) -> None:
        """The process has ended, or nobody wants to know more."""
        self._give_up()

    def _is_low(self, now_ns: int, headroom_pct: float) -> bool:
        """Whether the headroom has fallen through a level, or will be gone within a second at the present rate."""
        level = self._level
        while level < len(LEVELS_PCT) and headroom_pct < LEVELS_PCT[level]:
            level += 1
        is_low = level > self._level
        while level and headroom_pct > LEVELS_PCT[level - 1] * REARM:
            level -= 1
        self._level = level
        if not is_low and self._last_ns:
            is_low = (self._headroom_pct - headroom_pct) * 1e9 > headroom_pct * (now_ns - self._last_ns)
        if not is_low or now_ns < self._low_ns + LOW_GAP_NS:
            return False
        if now_ns >= self._minute_ns + MINUTE_NS:
            self._minute_ns, self._in_minute = now_ns, 0
        if self._in_minute >= LOW_PER_MINUTE:
            return False
        self._in_minute += 1
        self._low_ns = now_ns
        return True

    def _take(self, now_ns: int, latest: dict[str, float], place: Place, *, is_peak: bool) -> None:
        rss_mib = latest.get(metrics.RSS, 0.0)
        try:
            text = self._text()
        except (OSError, ValueError, ImportError):
            # It may not be read, is no Python of a known kind, or has become another program; or memtrack's own files
            # cannot be opened any more.
            self._give_up()
            return
        if not text:
            return
        nan = float("nan")
        usage_mib = latest.get(metrics.CONTAINER_USAGE, nan)
        headroom_pct = latest.get(metrics.CONTAINER_HEADROOM, nan)
        stack = Stack(self._number, now_ns, place, rss_mib, usage_mib, headroom_pct, text)
        slot = self._slot()
        self._slots[slot] = stack
        self._number += 1
        self._taken += 1
        self._rise_mib = max(self._rise_mib, rss_mib * RISE + RISE_MIB)
        self._writer.put_stack(stack, slot)
        if is_peak:
            self._writer.event("new_peak", now_ns, place.step, rss_mib, text.partition("\n")[0])
        if self._taken >= MOST:
            self._give_up()

    def _slot(self) -> int:
        """One that is free, else that of the oldest stack; never that of the highest."""
        for slot in range(STACK_COUNT):
            if slot not in self._slots:
                return slot
        highest = max(self._slots, key=lambda slot: self._slots[slot].rss_mib)
        return min((slot for slot in self._slots if slot != highest), key=lambda slot: self._slots[slot].number)

    def _text(self) -> str:
        reader = self._reader
        if reader is None:
            from memtrack.agent.frames import StackReader

            self._reader = reader = StackReader(self._pid, self._version, self._memory_fd)
        threads = reader.threads()
        lines: list[str] = []
        try:
            here = os.readlink(f"/proc/{self._pid}/cwd") + os.sep
        except OSError:
            here = os.sep
        for number, thread in enumerate(threads if self._mode == "all" else threads[:1]):
            frames = [_line(*frame, here) for frame in reader.stack(thread) if not frame[0].startswith(_OWN)]
            if number and frames:
                lines.append(OTHER_THREAD)
            lines += frames[:60]
        return "\n".join(lines)

    def _give_up(self) -> None:
        self._rise_mib = _NONE
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _line(path: str, line: int, function: str, here: str) -> str:
    """``path:line function``, on one line whatever the names hold."""
    text = f"{shorten(path, here)}:{line} {function}"
    return "".join(char if char.isprintable() else "?" for char in text)


def shorten(path: str, here: str) -> str:
    """Packages from ``site-packages/`` on, the standard library from ``lib/python3.`` on, the rest from ``here``."""
    for part in _PACKAGES:
        _, found, rest = path.rpartition(part)
        if found:
            return "site-packages/" + rest
    _, found, rest = path.rpartition(_LIBRARY)
    if found:
        return "lib/python3." + rest
    return path[len(here) :] if len(here) > 1 and path.startswith(here) else path
