"""Monitor: starts the agent and the relay, hands out marks, stops it all. One is active in a process at a time."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from memtrack import config
from memtrack.agent.launch import AgentHandle, spawn
from memtrack.collectors.procfs import program_name, start_ticks
from memtrack.errors import MemtrackError, MonitorError, RecordingError
from memtrack.notices import warn_once
from memtrack.recording import layout
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import create

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from memtrack.analysis.summary import Summary
    from memtrack.config import Settings
    from memtrack.sinks.base import RunFigures, Sink
    from memtrack.sinks.relay import Feed, Relay

EXIT_TIMEOUT_S = 2.0
"""The most that memtrack delays the end of a run or of the process, whatever the tracker does."""

AGENT_TIMEOUT_S = 0.4
"""The part of it that is kept for the agent, which takes some 10 ms."""

SILENT_NS = 3 * 10**9
"""An agent from which there is no sign of life for so long is looked after. Five ticks of the slowest cadence."""

RESTARTS = 5
"""How often an agent is started again: one that keeps dying is not worth more."""


class Active:
    """What is monitoring in this process. The functions of ``memtrack.api`` look here at each call."""

    __slots__ = ("marks", "monitor")

    def __init__(self) -> None:
        self.marks: MarkWriter | None = None
        self.monitor: Monitor | None = None


active = Active()


def _forget_in_child() -> None:
    """After a fork the child has no relay thread, must not write into its parent's slots, and must touch no lock."""
    active.marks = None
    active.monitor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class Attached:
    """A sink that a monitor feeds. ``detach`` ends it."""

    def __init__(self, monitor: Monitor, feed: Feed) -> None:
        self._monitor = monitor
        self._feed = feed

    @property
    def done(self) -> bool:
        """Whether it was detached and its sink has everything."""
        return self._feed.done.is_set()

    def detach(self, timeout_s: float = EXIT_TIMEOUT_S) -> bool:
        """Deliver the windows up to now and the final figures. Returns whether that was done within ``timeout_s``.

        What was not is tried again as long as the process lives, and stays in the recording. Never raises. A second
        call does nothing.
        """
        return self._monitor._end(self._feed, timeout_s)


class Monitor:
    """Watches a process, this one unless ``pid`` says otherwise, from the agent beside it. Made by ``memtrack.start``.

    Usable as a context manager. Thread-safe. After a fork it belongs to the parent alone.
    """

    def __init__(self, settings: Settings, pid: int | None = None) -> None:
        """Start. Raises RecordingError, AgentError or MonitorError, and leaves nothing behind then."""
        self.settings = settings
        self._own = pid is None
        self._pid = os.getpid() if pid is None else pid
        if self._own and active.monitor is not None:
            raise MonitorError(
                "this process is being monitored already. Stop that monitor first, or use memtrack.autolog(), "
                "which may be called twice."
            )
        self.path = self._create_recording()
        """Path of the recording."""
        self._stopped = False
        self._restarting = threading.Lock()
        self._restarts_left = RESTARTS
        self._relay: Relay | None = None
        self._attached: list[Attached] = []
        self._marks, self._reader, self._agent = self._launch()
        self._marks.wake = self._on_phase
        if self._own:
            active.monitor, active.marks = self, self._marks
            atexit.register(self._at_exit)

    def __repr__(self) -> str:
        return f"<memtrack.Monitor of process {self._pid}, {'stopped' if self._stopped else 'running'}, {self.path}>"

    def attach(self, sink: Sink) -> Attached:
        """Feed a sink with the windows from now on, until it is detached or the monitor stops."""
        if self._stopped or self._foreign():
            raise MonitorError("the monitor has stopped, or is that of the parent process; start another one")
        if self._relay is None:
            self._relay = self._make_relay()
        self._request_cut()
        attached = Attached(self, self._relay.add(sink, time.monotonic_ns()))
        # a process may make thousands of runs: those that are done need not be remembered
        self._attached = [other for other in self._attached if not other.done] + [attached]
        return attached

    def flush(self, timeout_s: float = EXIT_TIMEOUT_S) -> bool:
        """Finish the current window and deliver everything. Returns whether every sink had it within ``timeout_s``."""
        if self._stopped or self._foreign():
            return all(attached.done for attached in self._attached)
        deadline = time.monotonic() + timeout_s
        self._await_cut(self._request_cut(), timeout_s)
        return self._relay is None or self._relay.flush(max(deadline - time.monotonic(), 0.0))

    def summary(self) -> Summary:
        """What the recording comes to so far. ``str()`` of it is a few lines of text."""
        from memtrack.analysis.summary import summarise

        if not self._stopped and not self._foreign():
            self._await_cut(self._request_cut(), 0.5)
        with RecordingReader(self.path) as reader:
            return summarise(reader)

    def stop(self) -> None:
        """Deliver what is left, end the agent, close the recording. Takes 2 s at the most; never raises."""
        self._end_monitoring(self._stop_agent)

    def _at_exit(self) -> None:
        """The interpreter ends. The agent stays for the little while until the process has, to see how."""
        self._end_monitoring(lambda _: self._marks.say_farewell(_farewell()))

    def _end_monitoring(self, part: Callable[[float], None]) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._foreign():
            return
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        try:
            for attached in self._attached:
                attached.detach(max(deadline - AGENT_TIMEOUT_S - time.monotonic(), 0.0))
            if self._own:
                active.monitor = active.marks = None
                atexit.unregister(self._at_exit)
            if self._relay is not None:
                # before the agent goes: what is undelivered then is its to deliver
                self._relay.close(max(deadline - AGENT_TIMEOUT_S - time.monotonic(), 0.0))
            part(deadline)
        except Exception as exc:
            warn_once("stop", f"memtrack could not stop in order ({type(exc).__name__}: {exc}).")
        self._agent.close()
        self._reader.close()

    def _stop_agent(self, deadline: float) -> None:
        self._marks.request_stop()
        self._agent.wake()
        self._await_state(min(deadline, time.monotonic() + 1.0))

    def wait_ready(self, timeout_s: float = 5.0) -> bool:
        """Wait until the agent samples; there is no need to, except in tests. Returns whether it does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._reader.pulse().mono_ns:
                return True
            time.sleep(0.002)
        return False

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- the agent's life -------------------------------------------------------------------------------------------

    def _on_phase(self, is_quiet: bool) -> None:
        """A phase has begun or ended. Called with the lock of the marks held."""
        if not is_quiet:
            self._agent.wake()
        if self._marks.silence_ns() > SILENT_NS and self._restarts_left:
            # in a thread of its own: starting a process takes 20 ms, which no phase should be longer for
            threading.Thread(target=self._look_after_agent, name="memtrack-restart", daemon=True).start()

    def _look_after_agent(self) -> None:
        """Start the agent again if it was killed. Called now and then by the relay, and by phases. Never raises."""
        if self._marks.silence_ns() <= SILENT_NS or not self._restarts_left:
            return
        if not self._restarting.acquire(blocking=False):
            return
        try:
            if self._stopped or self._foreign():
                return
            self._restarts_left -= 1
            # should the old one only stand still, the new one finds the recording locked and leaves
            self._spawn(self._agent)
            deadline = time.monotonic() + 1.0
            while self._marks.silence_ns() > SILENT_NS and time.monotonic() < deadline:
                time.sleep(0.01)
        except Exception as exc:
            self._restarts_left = 0
            warn_once("restart", f"memtrack's agent has gone and could not be started again ({exc}).")
        finally:
            self._restarting.release()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _create_recording(self) -> str:
        folder = config.make_directory(self.settings)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{self._pid}"
        fields = {
            "size": str(self.settings.recording_bytes),
            "pid": str(self._pid),
            "start_ticks": str(_start_ticks(self._pid)),
            "boot_id": boot_id(),
            "program": program_name(self._pid),
            "wall_ns": str(time.time_ns()),
            "mono_ns": str(time.monotonic_ns()),
            "interval_s": repr(self.settings.interval_s),
            "tick_s": repr(self.settings.tick_s),
            "cpu_budget_pct": repr(self.settings.cpu_budget_pct),
            "end_run": str(int(self.settings.end_run)),
            "keep": str(self.settings.keep),
            "keep_days": repr(self.settings.keep_days),
        }
        for attempt in range(100):
            path = os.path.join(folder, f"{name}{f'-{attempt}' if attempt else ''}.mtk")
            if not os.path.exists(path):
                create(path, self.settings.recording_bytes, fields)
                return path
        raise RecordingError(f"cannot find a free name for a recording in {folder}")

    def _launch(self) -> tuple[MarkWriter, RecordingReader, AgentHandle]:
        """Open the recording at both ends and start the agent, which comes last because it cannot be taken back."""
        opened: list[MarkWriter | RecordingReader] = []
        try:
            opened.append(marks := MarkWriter(self.path))
            opened.append(reader := RecordingReader(self.path))
            return marks, reader, self._spawn()
        except BaseException as exc:
            for part in opened:
                part.close()
            os.unlink(self.path)
            if isinstance(exc, OSError) and not isinstance(exc, MemtrackError):
                raise RecordingError(f"cannot open the recording {self.path}: {exc.strerror}") from exc
            raise

    def _spawn(self, before: AgentHandle | None = None) -> AgentHandle:
        return spawn(self.path, before=before)

    def _make_relay(self) -> Relay:
        # imported here: who has no sink needs no thread and no queue
        from memtrack.sinks.relay import Relay

        return Relay(
            self.path,
            flush_interval_s=self.settings.flush_interval_s,
            metrics=self.settings.metrics,
            figures=self._figures,
            on_turn=self._look_after_agent,
        )

    def _figures(self, start_ns: int, end_ns: int | None) -> RunFigures:
        from memtrack.analysis.summary import figures_of

        with RecordingReader(self.path) as reader:
            return figures_of(reader, start_ns, end_ns)

    def _end(self, feed: Feed, timeout_s: float) -> bool:
        if feed.done.is_set() or self._relay is None or self._foreign():
            return True
        if feed.end_ns is None:
            return self._relay.end(feed, time.monotonic_ns(), self._request_cut(), timeout_s)
        return self._relay.wait(feed, timeout_s)

    def _foreign(self) -> bool:
        """Whether this is a forked child: the monitor is the parent's, and its locks may be held for ever."""
        return self._own and active.monitor is not self

    def _request_cut(self) -> int:
        cut = self._marks.request_cut()
        self._agent.wake()
        return cut

    def _await_cut(self, cut: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._reader.head().cut < cut and time.monotonic() < deadline:
            time.sleep(0.001)

    def _await_state(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._reader.head().state in (layout.STOPPED, layout.ENDED):
                return
            time.sleep(0.002)


def _farewell() -> dict[str, str]:
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


def _start_ticks(pid: int) -> int:
    if sys.platform != "linux":
        return 0
    try:
        return start_ticks(pid)
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise MonitorError(f"there is no process {pid}") from exc
    except OSError as exc:
        raise MonitorError(f"cannot look at process {pid}: {exc.strerror}") from exc


def boot_id() -> str:
    """What names this boot of the machine; "" where there is no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
