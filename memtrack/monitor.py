"""Monitor: starts the agent and the relay, hands out marks, stops it all. One is active in a process at a time."""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import TYPE_CHECKING

from memtrack import config, metrics
from memtrack.agent import adoption, job, trainer
from memtrack.agent.handover import Handover
from memtrack.agent.keeper import Keeper
from memtrack.agent.launch import AgentHandle, spawn
from memtrack.errors import MemtrackError, MonitorError, RecordingError
from memtrack.notices import warn_once
from memtrack.recording import layout
from memtrack.recording.descriptor import StdioTaken
from memtrack.recording.marks import MarkWriter
from memtrack.recording.reader import RecordingReader
from memtrack.recording.writer import create

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import TypeVar

    from memtrack.analysis.summary import Summary
    from memtrack.config import Settings
    from memtrack.sinks.base import Sink
    from memtrack.sinks.figures import RunFigures
    from memtrack.sinks.relay import Feed, Relay

    Found = TypeVar("Found")

EXIT_TIMEOUT_S = 2.0
"""The most that memtrack delays the end of a run or of the process, whatever the tracker does."""

AGENT_TIMEOUT_S = 0.4
"""The part of it that is kept for the agent, which takes some 10 ms."""


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

    def __init__(self, settings: Settings, pid: int | None = None, *, is_unasked: bool = False) -> None:
        """Start. Raises RecordingError, AgentError or MonitorError, and leaves nothing behind then.

        ``is_unasked``: not the program wants it but ``memtrack run``; it gives way to one that the program starts.
        """
        self.settings = settings
        self.is_unasked = is_unasked
        self._own = pid is None
        self._pid = os.getpid() if pid is None else pid
        trainer.check_interpreter()
        self._has_stacks = self._own and settings.stacks != "off" and trainer.has_readable_stacks()
        if self._own and active.monitor is not None and active.monitor.is_unasked:
            active.monitor.stop()
        if self._own and active.monitor is not None:
            raise MonitorError(
                "this process is being monitored already. Stop that monitor first, or use memtrack.autolog(), "
                "which may be called twice."
            )
        self.path = ""
        """Path of the recording."""
        self._is_adopted = False
        self._stopped = False
        self._last_summary: Summary | None = None
        self._relay: Relay | None = None
        self._attached: list[Attached] = []
        with StdioTaken():
            self._handover = Handover()
            self._handover.put({})
            try:
                self._marks, self._reader, self._agent = self._begin()
            except MemoryError:
                self._handover.close()
                raise RecordingError("cannot make a recording: Cannot allocate memory. See: ulimit -v") from None
            except BaseException:
                self._handover.close()
                raise
        self._keeper = Keeper(
            self._marks, self._reader, lambda: self._spawn(self._agent), lambda: self._stopped or self._foreign()
        )
        self._marks.wake = self._on_phase
        if self._own:
            trainer.stop_those_before(self.path, self._reader.fields)
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
        first = self._reader.head().windows
        self._request_cut()
        attached = Attached(self, self._relay.add(sink, time.monotonic_ns(), first))
        # a process may make thousands of runs: those that are done need not be remembered
        self._attached = [other for other in self._attached if not other.done] + [attached]
        return attached

    def flush(self, timeout_s: float = EXIT_TIMEOUT_S) -> bool:
        """Finish the current window and deliver everything. Returns whether every sink had it within ``timeout_s``."""
        if self._stopped or self._foreign():
            return all(attached.done for attached in self._attached)
        deadline = time.monotonic() + timeout_s
        try:
            self._await_cut(self._request_cut(), timeout_s)
            return self._relay is None or self._relay.flush(max(deadline - time.monotonic(), 0.0))
        except Exception as exc:
            warn_once("flush", f"memtrack could not deliver what there is ({exc}).")
            return False

    def summary(self) -> Summary:
        """What the recording comes to so far. ``str()`` of it is a few lines of text.

        Never raises: if the recording has been removed or damaged, it is of what could be read last.
        """
        from memtrack.analysis.summary import Summary, summarise
        from memtrack.sinks.figures import RunFigures

        try:
            if not self._stopped and not self._foreign():
                self._await_cut(self._request_cut(), 0.5)
            return self._last_summary or self._read(summarise)
        except Exception as exc:
            warn_once("summary", f"memtrack cannot sum up ({exc}).")
            return Summary(RunFigures())

    def stop(self) -> None:
        """Deliver what is left, end the agent, close the recording. Takes 2 s at the most; never raises."""
        self._end_monitoring(self._stop_agent)

    def _at_exit(self) -> None:
        """The interpreter ends. The agent stays for the little while until the process has, to see how."""

        def leave(deadline: float) -> None:
            self._marks.say_farewell(trainer.farewell())
            if os.getpid() == 1:
                # with the first process of a container the kernel kills all others: there is nothing to stay for
                self._stop_agent(deadline)

        self._end_monitoring(leave)
        trainer.stay_interrupted()

    def _end_monitoring(self, part: Callable[[float], None]) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._foreign():
            return
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        try:
            # all of them first: one that is tried again and again must not take the time of the others
            for attached in self._attached:
                attached.detach(0.0)
            for attached in self._attached:
                attached.detach(max(deadline - AGENT_TIMEOUT_S - time.monotonic(), 0.0))
            if self._own:
                active.monitor = active.marks = None
                atexit.unregister(self._at_exit)
            if self._relay is not None:
                # before the agent goes: what is undelivered then is its to deliver
                self._relay.close(max(deadline - AGENT_TIMEOUT_S - time.monotonic(), 0.0))
            part(deadline)
            self._keeper.tell()
            self._keep_summary()
        except Exception as exc:
            warn_once("stop", f"memtrack could not stop in order ({type(exc).__name__}: {exc}).")
        # they refer to this monitor, which would keep the file open until the next collection
        self._marks.wake = None
        self._keeper.close()
        self._agent.close()
        self._handover.close()
        self._reader.close()

    def _keep_summary(self) -> None:
        """Sum up now, if the recording cannot be opened any more afterwards."""
        try:
            RecordingReader(self.path).close()
        except RecordingError:
            from memtrack.analysis.summary import summarise

            self._last_summary = summarise(self._reader)

    def _stop_agent(self, deadline: float) -> None:
        if self._is_adopted:  # the agent stays for `memtrack run`, which wants to know how the process ends
            self._await_cut(self._request_cut(), min(deadline - time.monotonic(), 1.0))
            return
        self._marks.request_stop()
        self._agent.wake()
        self._await(lambda head: head.state in (layout.STOPPED, layout.ENDED), min(deadline, time.monotonic() + 1.0))

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
        if self._keeper.is_needed:
            # in a thread of its own: starting a process takes 20 ms, which no phase should be longer for
            threading.Thread(target=self._keeper.look, name="memtrack-restart", daemon=True).start()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _begin(self) -> tuple[MarkWriter, RecordingReader, AgentHandle]:
        """Go on in the recording that ``memtrack run`` has begun of this process, or make one, and start the agent."""
        fields = trainer.header(self.settings, self._pid, is_own=self._own, has_stacks=self._has_stacks)
        adopted = adoption.adopt(self.settings, fields) if self._own else None
        if adopted is not None:
            self.path = adopted.path
            try:
                parts = self._launch(relieving=True)
            except Exception:  # whatever it is: there is another way
                adopted.give_back()
            else:
                self._is_adopted = True
                return parts
        self.path = self._create_recording(fields)
        try:
            return self._launch()
        except BaseException as exc:
            os.unlink(self.path)
            if isinstance(exc, OSError) and not isinstance(exc, MemtrackError):
                raise RecordingError(f"cannot open the recording {self.path}: {exc.strerror}") from exc
            raise

    def _create_recording(self, fields: dict[str, str]) -> str:
        path = trainer.free_path(config.make_directory(self.settings), self._pid)
        create(path, self.settings.recording_bytes, fields)
        return path

    def _launch(self, *, relieving: bool = False) -> tuple[MarkWriter, RecordingReader, AgentHandle]:
        """Open the recording at both ends and start the agent, which comes last because it cannot be taken back."""
        opened: list[MarkWriter | RecordingReader] = []
        try:
            opened.append(marks := MarkWriter(self.path))
            opened.append(reader := RecordingReader(self.path))
            if relieving:
                marks.go_on()
            if self._own:
                marks.tell_rank(job.rank_now())
            return marks, reader, self._spawn(relieving=relieving)
        except BaseException:
            for part in opened:
                part.close()
            raise

    def _spawn(self, before: AgentHandle | None = None, *, relieving: bool = False) -> AgentHandle:
        path = self.path if before is None else self._way_in()
        memory_fd = trainer.open_memory() if self._has_stacks else -1
        try:
            return spawn(path, self._handover.fd, memory_fd, before=before, relieving=relieving)
        finally:
            if memory_fd >= 0:
                os.close(memory_fd)

    def _way_in(self) -> str:
        """A path at which the recording can be opened, also when somebody has removed it."""
        fd = self._reader.fileno()
        try:
            if fd < 0 or os.path.samestat(os.stat(self.path), os.fstat(fd)):
                return self.path
        except OSError:
            pass
        return f"/proc/{os.getpid()}/fd/{fd}"

    def _make_relay(self) -> Relay:
        # imported here: who has no sink needs no thread and no queue. What is needed later comes along, because then
        # there may be no descriptor left to read a module with
        import memtrack.allocators
        import memtrack.analysis.summary  # noqa: F401
        from memtrack.sinks.relay import Relay

        with StdioTaken():
            return Relay(
                self._way_in(),
                flush_interval_s=self.settings.flush_interval_s,
                metrics=self.settings.metrics,
                selective=self.settings.selective,
                figures=self._figures,
                hand_over=self._handover.put,
                on_turn=self._on_turn,
                on_lag=lambda windows: self._marks.gauge(metrics.SELF_UNDELIVERED, windows),
            )

    def _on_turn(self) -> None:
        """The relay's: look after the agent, and note what the frameworks' allocators say where no callback does."""
        self._keeper.look()
        if self._own:
            from memtrack.allocators import shared

            shared.publish(self._marks)

    def _figures(self, start_ns: int, end_ns: int | None) -> RunFigures:
        from memtrack.analysis.summary import figures_of

        return self._read(lambda reader: figures_of(reader, start_ns, end_ns))

    def _read(self, what: Callable[[RecordingReader], Found]) -> Found:
        """What can be read from the recording, also when it has been removed or no file can be opened any more."""
        try:
            return what(self._reader)
        except RecordingError:  # it is closed: the monitor has stopped
            with RecordingReader(self.path) as reader:
                return what(reader)

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
        self._await(lambda head: head.cut >= cut, time.monotonic() + timeout_s)

    def _await(self, is_so: Callable[[layout.Head], bool], deadline: float) -> None:
        while not is_so(self._reader.head()) and time.monotonic() < deadline:
            time.sleep(0.001)
