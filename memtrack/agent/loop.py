"""The agent's loop: wait for the next deadline, a request, or the death of the training process."""

from __future__ import annotations

import gc
import os
import select
import sys
from time import monotonic_ns, process_time_ns, sleep, time_ns

from memtrack import collectors, metrics
from memtrack.agent import aftermath, exit_status, relief
from memtrack.agent.ranks import RankCollector
from memtrack.agent.stacks import StackWatch
from memtrack.agent.witness import Witness
from memtrack.collectors.own import GaugeCollector, OwnCollector
from memtrack.collectors.procfs import start_ticks
from memtrack.recording import layout
from memtrack.recording.layout import ENDED, RUNNING, STOPPED, Head
from memtrack.recording.writer import RecordingWriter
from memtrack.sampling.cadence import Budget
from memtrack.sampling.sampler import APART_NS, Sampler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memtrack.collectors.base import Sample
    from memtrack.recording.layout import Mark
    from memtrack.sampling.window import Row

WAKE_FD, HANDOVER_FD, MEMORY_FD = 0, 1, 3
"""Descriptors that the agent is started with, see ``launch.spawn``."""
LIMIT_NEAR_PCT = 5.0
GAP_S = 1.0
"""Nobody looked for so long: worth an event. An agent that relieves another takes some 10 ms."""
RELIEVED = -1
"""State of an agent in whose place another one goes on."""
TIDY_AFTER_NS = 2_000_000_000
"""When the folder is looked through, after the start: the training comes first."""
_NAN = float("nan")
_USAGE, _HEADROOM = metrics.CONTAINER_USAGE, metrics.CONTAINER_HEADROOM


class Agent:
    """Samples one training process into one recording until it dies or somebody says stop."""

    def __init__(self, path: str, wake_fd: int = WAKE_FD) -> None:
        with open(path, "rb") as file:
            fields = layout.unpack_header(file.read(layout.PAGE), path)
        self._path = path
        self._pid = int(fields["pid"])
        self._start_ticks = int(fields["start_ticks"])
        self._writer = RecordingWriter(path)
        self._marks = self._writer.marks
        self._wake_fd = wake_fd
        self._pid_fd = self._open_pid()
        self._dying = exit_status.Dying(self._pid, self._pid_fd)
        self._stacks = StackWatch(self._writer, self._pid, fields, _given_memory())
        now_ns = monotonic_ns()
        self._budget = Budget(float(fields["cpu_budget_pct"]) / 100.0, now_ns, 0)
        # the agent's own environment is that of the process that started it, with what the program has changed so far
        environ = os.environ if fields.get("own") == "1" else None
        choice = fields.get("metrics", "default")
        found, sight = collectors.build(self._pid, exclude=os.getpid(), environ=environ, choice=choice)
        self._limit_source = sight.limit_source
        self._witness = Witness(self._writer, self._pid, self._start_ticks, self._pid_fd, sight, now_ns)
        self._witness.ranks = ranks = RankCollector(self._writer, path, fields, now_ns)
        self._sampler = Sampler(
            [*found, GaugeCollector(self._marks.gauges), ranks, OwnCollector(process_time_ns, self._counters)],
            self._marks,
            interval_s=float(fields["interval_s"]),
            tick_s=float(fields["tick_s"]),
            budget=self._budget,
            now_ns=now_ns,
            cpu_clock_ns=process_time_ns,
            on_window=self._store,
            on_phase=self._writer.put_phase,
            on_epoch=self._writer.put_epoch,
            on_marks=self._note_marks,
        )
        self._head = Head()
        self._head.state = RUNNING
        self._head.agent_pid = os.getpid()
        self._cpu_before_ns = 0
        self._limit_near = self._quiet = False
        self._late_max_ms = 0.0
        self._tidy_ns = now_ns + TIDY_AFTER_NS
        self._stored_ns = 0
        """When the last window ended."""
        if not self._writer.fresh:
            self._go_on(path)
        self._writer.event("start", now_ns, text=f"agent {os.getpid()} watches {self._pid}")
        self._writer.publish(self._head)

    def run(self) -> bool:
        """Sample until the end, then finish the recording. Returns whether what is left of it is this agent's to do,
        and not that of one which has come to relieve it."""
        poll = select.poll() if hasattr(select, "poll") else None
        if poll is not None:
            poll.register(self._wake_fd, select.POLLIN)
            if self._pid_fd >= 0:
                poll.register(self._pid_fd, select.POLLIN)
        state = RUNNING
        while state == RUNNING:
            wait_ms = max((self._sampler.due_ns - monotonic_ns()) / 1e6, 0.0)
            ready = [fd for fd, _ in poll.poll(wait_ms)] if poll is not None else self._sleep(wait_ms)
            if self._pid_fd in ready or (self._pid_fd < 0 and self._has_ended()):
                state = ENDED
            elif self._wake_fd in ready:
                state = self._serve()
            if state == RUNNING and monotonic_ns() >= self._sampler.due_ns:
                self._tick()
                state = self._obey()
                if monotonic_ns() >= self._tidy_ns:
                    self._tidy_ns = layout.MAX_NUMBER
                    aftermath.tidy(self._path)
        if state == RELIEVED:
            self._leave()
            return False
        self._finish(state)
        is_last = not self._is_relieved()
        self._writer.close()
        return is_last

    def _go_on(self, path: str) -> None:
        """Another agent was here and is gone: take up its recording, and note how long nobody looked."""
        from memtrack.recording.reader import RecordingReader

        with RecordingReader(path) as reader:
            self._writer.go_on(reader)
            epochs = reader.epochs()
            seen = epochs[-1].last_number + 1 if epochs else 0
            self._sampler.go_on(self._writer.windows, reader.phases().values(), seen)
            before = reader.head()
            self._head.cut, self._cpu_before_ns = before.cut, before.agent_cpu_ns
            last_ns = reader.pulse().mono_ns
        gap_s = (monotonic_ns() - last_ns) / 1e9
        if gap_s > GAP_S:
            self._writer.event("gap", last_ns, value=gap_s, text=f"no agent for {gap_s:.1f} s")
        self._note_marks([mark for mark in self._marks.drain() if mark.time_ns > last_ns])

    # -- one turn ---------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._dying.give_way()
        now_ns = monotonic_ns()
        asked = self._writer.peak_asked
        if asked == self._writer.peak_begun and self._sampler.glance(now_ns):
            self._writer.beat(now_ns)
            return
        self._sampler.tick(now_ns, time_ns())
        latest = self._sampler.latest
        get = latest.get
        self._writer.pulse(now_ns, get(metrics.RSS, _NAN), get(_USAGE, _NAN), get(_HEADROOM, _NAN), asked)
        self._witness.note(now_ns, latest)
        self._stacks.look(now_ns, latest, self._marks.place())
        if self._budget.exhausted != self._quiet:
            self._quiet = self._budget.exhausted
            self._writer.set_quiet(self._quiet)

    def _serve(self) -> int:
        """The training process has something: cut the window, stop, or look now because a phase began or ended."""
        try:
            os.read(self._wake_fd, 8)
        except OSError:
            pass
        before = self._head.cut
        state = self._obey()
        if state == RUNNING and self._head.cut == before:
            self._tick()
        return state

    def _obey(self) -> int:
        """Do what is asked for; with each tick, too, because who asks may have lost the descriptor to wake with."""
        if self._marks.control(layout.STOP):
            return STOPPED
        if self._is_relieved():
            return RELIEVED
        cut = self._marks.control(layout.CUT)
        if cut != self._head.cut:
            self._keep_apart()
            self._sampler.cut_on_request(monotonic_ns(), time_ns())
            self._head.cut = cut
            self._publish()
        return RUNNING

    def _finish(self, state: int) -> None:
        if state == ENDED:
            self._witness.see_end(monotonic_ns())
        else:
            self._tick()
        self._stacks.finish()
        self._keep_apart()
        now_ns, wall_ns, place = monotonic_ns(), time_ns(), self._marks.place()
        self._sampler.finish(now_ns, wall_ns)
        if state == ENDED:
            verdict = self._witness.verdict(now_ns, wall_ns, place)
            self._writer.put_verdict(verdict)
            # whole, or nothing of it: the record has room for 88 bytes
            brief = verdict.text if len(verdict.text) <= 88 else verdict.kind.replace("_", " ")
            self._writer.event("exit", now_ns, place.step, text=brief)
        else:
            self._writer.event("stop", now_ns, place.step)
        self._head.state = state
        self._head.cut = self._marks.control(layout.CUT)
        self._publish()
        self._writer.sync()

    def _leave(self) -> None:
        """Finish the window and nothing else: the recording goes on."""
        self._tick()
        self._keep_apart()
        now_ns = monotonic_ns()
        # marks up to here are noted now, those after it by the other one
        self._writer.beat(now_ns)
        self._stacks.finish()
        self._sampler.finish(now_ns, time_ns())
        self._head.cut = self._marks.control(layout.CUT)
        self._publish()
        self._writer.close()

    def _is_relieved(self) -> bool:
        pid = self._marks.control(layout.RELIEF)
        return pid != 0 and relief.waits(pid, self._path)

    def _keep_apart(self) -> None:
        """Before a window is finished out of turn: wait if the last one ended just now."""
        wait_ns = self._stored_ns + APART_NS - monotonic_ns()
        if wait_ns > 0:
            sleep(wait_ns / 1e9)

    # -- what the sampler hands over --------------------------------------------------------------------------------

    def _store(self, row: Row) -> None:
        self._stored_ns = row.end_ns
        self._writer.append(row)
        self._publish()

    def _note_marks(self, marks: list[Mark]) -> None:
        for mark in marks:
            if mark.kind == layout.MARK:
                self._writer.event("mark", mark.time_ns, mark.place.step, mark.value, self._marks.name(mark.name))

    def _publish(self) -> None:
        head, latest = self._head, self._sampler.latest
        head.mono_ns = monotonic_ns()
        head.wall_ns = time_ns()
        head.agent_rss_mib = latest.get(metrics.SELF_AGENT_RSS, 0.0)
        head.agent_cpu_ns = self._cpu_before_ns + process_time_ns()
        head.late_max_ms = self._late_max_ms
        head.ticks = self._sampler.ticks
        head.dropped = self._dropped()
        self._watch_limit(latest, head)
        self._writer.publish(head)

    def _watch_limit(self, latest: dict[str, float], head: Head) -> None:
        limit_mib = latest.get(metrics.CONTAINER_LIMIT)
        if limit_mib is not None and limit_mib != head.limit_mib:
            source = self._limit_source()
            if head.limit_source:
                self._writer.event("limit_changed", head.mono_ns, -1, limit_mib, source)
            head.limit_mib, head.limit_source = limit_mib, source
        headroom_pct = latest.get(metrics.CONTAINER_HEADROOM, 100.0)
        near = headroom_pct < LIMIT_NEAR_PCT
        if near and not self._limit_near:
            self._writer.event("limit_near", head.mono_ns, self._marks.place().step, headroom_pct, head.limit_source)
        self._limit_near = near

    def _counters(self) -> list[Sample]:
        sampler = self._sampler
        late_ms, sampler.late_max_ms = sampler.late_max_ms, 0.0
        self._late_max_ms = max(self._late_max_ms, late_ms)
        return [
            (metrics.SELF_LATENESS, late_ms),
            (metrics.SELF_MERGED, float(self._writer.merged)),
            (metrics.SELF_DROPPED, float(self._dropped())),
        ]

    def _dropped(self) -> int:
        """Everything that found no room: marks, phases, metrics."""
        marks = self._marks.overrun + self._marks.control(layout.MARKS_REFUSED)
        return marks + self._sampler.dropped + self._writer.dropped

    # -- the life of the training process ---------------------------------------------------------------------------

    def _open_pid(self) -> int:
        """A descriptor that becomes readable when the process dies; -1 where the system has none."""
        try:
            fd = os.pidfd_open(self._pid)
        except (AttributeError, OSError):
            fd = -1
        if not self._alive():
            if fd >= 0 and not os.path.exists(f"/proc/{self._pid}"):
                raise PermissionError(f"process {self._pid} cannot be seen: /proc is mounted with hidepid")
            raise ProcessLookupError(f"process {self._pid} is gone")
        return fd

    def _alive(self) -> bool:
        """Whether the process that was meant is there, and not another one that got its pid."""
        if sys.platform != "linux":
            from memtrack.collectors.psutil_ import exists

            return exists(self._pid)
        try:
            return start_ticks(self._pid) == self._start_ticks
        except OSError:
            return False

    def _has_ended(self) -> bool:
        """Whether it is dead, collected or not, for systems without pidfd (Linux before 5.3 among them)."""
        if sys.platform != "linux":
            return not self._alive()
        is_there, status = exit_status.zombie(self._pid, self._start_ticks)
        return not is_there or status is not None

    def _sleep(self, wait_ms: float) -> list[int]:
        """Windows cannot poll a pipe: look at the control words at each turn."""
        sleep(wait_ms / 1000.0)
        stop, cut = self._marks.control(layout.STOP), self._marks.control(layout.CUT)
        return [self._wake_fd] if stop or cut != self._head.cut else []


def _given_memory() -> int:
    """The descriptor of the training process's memory, -1 if it gave none."""
    try:
        return MEMORY_FD if os.readlink(f"/proc/self/fd/{MEMORY_FD}").endswith("/mem") else -1
    except OSError:
        return -1


def main(path: str, *, relieving: bool = False) -> int:
    """Watch the process that the recording at ``path`` names, in the place of the agent that does, if ``relieving``.

    Returns the exit status.
    """
    held_fd = -1
    if sys.platform == "linux" and (held_fd := (relief.relieve if relieving else relief.claim)(path)) < 0:
        return 0
    _ignore_signals()
    # nothing here makes reference cycles, and the collector's passes would cost more than they find
    gc.disable()
    try:
        # the process may have died while the other one still watched, which leaves the delivery to the newcomer
        if (relieving and _is_over(path)) or Agent(path).run():
            aftermath.deliver(path, held_fd)
    except Exception as exc:
        try:
            _note_error(path, f"{type(exc).__name__}: {exc}")
        except OSError:
            pass
        if sys.stderr is not None:
            sys.stderr.write(f"memtrack agent: {type(exc).__name__}: {exc}\n")
        return 1
    return 0


def _is_over(path: str) -> bool:
    """Whether the recording was finished in order."""
    from memtrack.recording.reader import RecordingReader

    with RecordingReader(path) as reader:
        state = reader.head().state
        return state == ENDED or (state == STOPPED and reader.control(layout.STOP) != 0)


def _ignore_signals() -> None:
    """What ends a job or a terminal also reaches the agent; it ends by itself once the training process is dead."""
    import _signal  # the module signal would load enum, half a MiB

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(_signal, name, None)
        if number is not None:
            _signal.signal(number, _signal.SIG_IGN)


def _note_error(path: str, text: str) -> None:
    from memtrack.recording.reader import RecordingReader

    writer = RecordingWriter(path)
    with RecordingReader(path) as reader:
        head = reader.head()
        writer.go_on(reader)
    writer.event("error", monotonic_ns(), text=text)
    head.state = STOPPED
    writer.publish(head)
    writer.close()
