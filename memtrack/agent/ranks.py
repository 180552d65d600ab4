"""The ranks of a distributed training on this node, brought together by the agent of the first of them.

Each rank has an agent and a recording of its own, all in one folder. The first agent reads from the others what is new
every two seconds and makes the same few series of it, however many they are. A rank that dies leaves a verdict in its
recording; who reads the first rank's finds it named there. The others find out that they are not the first, and rest.
"""

from __future__ import annotations

import os
from time import monotonic, sleep, time_ns

from memtrack import metrics
from memtrack.agent.exit_status import zombie
from memtrack.collectors.base import Collector
from memtrack.recording import layout
from memtrack.recording.rank import Rank, are_siblings, is_of, rank_of
from memtrack.recording.reader import RecordingReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from memtrack.collectors.base import Sample
    from memtrack.recording.writer import RecordingWriter

SUFFIX = ".mtk"
PERIOD_S = 2.0
MAX_FILES = 1024
"""How many recordings of a folder are looked at, the newest: those of the ranks that run are among them."""
MAX_PEERS = 256
PATIENCE_S = 0.25
"""How long is waited, when the first rank has died, for the verdict on another one that has died before it."""
PAUSE_S = 0.005
LARGEST_MIB = float(1 << 40)

_ORDERED = (1, 2, 15)
"""SIGHUP, SIGINT, SIGTERM: what a launcher or a terminal ends all ranks with is no reason why they ended."""


class Death:
    """A rank that has ended badly: when, in monotonic nanoseconds, how, in words behind "rank N (pid P)"."""

    __slots__ = ("how", "number", "peak_mib", "pid", "recording", "time_ns")

    def __init__(self, number: int, pid: int, time_ns: int, how: str, peak_mib: float, recording: str) -> None:
        self.number = number
        self.pid = pid
        self.time_ns = time_ns
        self.how = how
        self.peak_mib = peak_mib
        """Its highest RSS; 0 if none was sampled."""
        self.recording = recording

    def who(self) -> str:
        """Which rank, in words."""
        return f"rank {self.number} (pid {self.pid})"


class Peer:
    """A rank as its recording has it: what is new there since the last look, and whether it lives."""

    def __init__(self, reader: RecordingReader, number: int, since_ns: int, proc: str = "/proc") -> None:
        self.number = number
        self._proc = proc
        self.reader = reader
        self.pid, self.start_ticks = int(reader.fields["pid"]), int(reader.fields["start_ticks"])
        self.is_alive = True
        self.is_over = False
        """Whether all is read, and told."""
        self.mean_mib = -1.0
        """RSS in the windows since the last look; below 0 before there was one."""
        self.peak_mib = -1.0
        self._next = self._first_after(since_ns)

    def look(self) -> None:
        """Read what is new. Raises OSError if the disk fails."""
        head, reader = self.reader.head(), self.reader
        seconds, total, peak = 0.0, 0.0, -1.0
        first = max(self._next, head.windows - reader.layout.ring)
        for number in range(first, head.windows):
            cell = reader.cell(number, metrics.RSS)
            if cell is None or not (0.0 <= cell.mean <= cell.max <= LARGEST_MIB):
                continue
            weight = max(cell.seconds, 1e-6) if cell.seconds < 1e9 else 1e-6
            seconds, total, peak = seconds + weight, total + weight * cell.mean, max(peak, cell.max)
        if seconds > 0.0:
            self.mean_mib, self.peak_mib = total / seconds, peak
        else:
            self.peak_mib = self.mean_mib  # nothing new: it stands where it stood
        is_done = _is_finished(reader, head.state)
        # asked only of one that is silent, because it takes as long as all else
        if is_done or (head.windows <= self._next and self.has_gone()):
            self.is_alive = False
        self._next = max(self._next, head.windows)
        self.is_over = is_done

    def has_gone(self) -> bool:
        """Whether the process is dead, collected or not."""
        is_there, status = zombie(self.pid, self.start_ticks, self._proc)
        return not is_there or status is not None

    def death(self) -> Death | None:
        """How it ended, if its own agent has found that it ended badly."""
        reader = self.reader
        verdict, head = reader.verdict(), reader.head()
        if verdict is None or verdict.kind == "clean" or verdict.signal in _ORDERED:
            return None
        whole = reader.phases().get("")
        cell = None if whole is None else whole.cells.get(metrics.RSS)
        peak_mib = cell.max if cell is not None and 0.0 <= cell.max <= LARGEST_MIB else 0.0
        # what led to it may stand behind a semicolon
        how = verdict.text.removeprefix("the process ").partition(";")[0][:300]
        time_ns = head.mono_ns - max(head.wall_ns - verdict.wall_ns, 0)
        if not 0 <= time_ns < layout.MAX_NUMBER:
            return None
        return Death(self.number, self.pid, time_ns, how, peak_mib, os.path.basename(reader.path))

    def _first_after(self, since_ns: int) -> int:
        """Number of the first window that has ended since then."""
        number = self.reader.newest_number() + 1
        while number > 0:
            row = self.reader.window(number - 1)
            if row is None or row.end_ns <= since_ns:
                break
            number -= 1
        return number


class RankCollector(Collector):
    """Smallest, mean and largest RSS over the ranks of this node, and which of them is the worst.

    Says nothing in a process that is no rank, or not the first of its node, and before there is another one.
    """

    period_s = PERIOD_S
    asked_at_end = True

    def __init__(
        self, writer: RecordingWriter, path: str, fields: Mapping[str, str], now_ns: int, proc: str = "/proc"
    ) -> None:
        self._proc = proc
        self.period_s = max(PERIOD_S, float(fields["interval_s"]))
        self._writer = writer
        self._fields = fields
        self._folder, self._name = os.path.split(path)
        self._owner = os.stat(path).st_uid
        self._since_ns = now_ns
        self._word = writer.marks.control(layout.RANK)
        self._own = Rank.unpack(self._word)
        self._peers: dict[int, Peer] = {}
        """By number, this rank among them."""
        self._names: set[str] = set()
        """The files that have been looked at."""
        self._pending: list[str] = []
        """Those that are no ranks yet."""
        self._folder_ns = 0
        self._deaths: dict[int, Death] = {}
        self._worst, self._worst_mib = -1, -1.0

    def collect(self, now_ns: int) -> Iterable[Sample]:
        if not self._is_first(now_ns):
            return ()
        self._find()
        for peer in list(self._peers.values()):
            if not peer.is_over:
                self._look(peer)
        known = [peer for peer in self._peers.values() if peer.mean_mib >= 0.0]
        if self._own is None or len(self._peers) < 2 or not known:
            return ()
        if self._own.local is None and min(self._peers) < self._own.number:
            return ()  # nobody has told the ranks on the node, and another one is the first
        living = [peer.mean_mib for peer in known if peer.is_alive]
        highest = max(known, key=lambda peer: peer.peak_mib)
        if highest.peak_mib > self._worst_mib:
            self._worst, self._worst_mib = highest.number, highest.peak_mib
        found = [
            (metrics.RANKS_MAX, highest.peak_mib),
            (metrics.RANKS_WORST, float(self._worst)),
            (metrics.RANKS_ALIVE, float(len(living))),
        ]
        if living:
            found += [(metrics.RANKS_MIN, min(living)), (metrics.RANKS_MEAN, sum(living) / len(living))]
        for peer in known:
            if not peer.is_alive:
                peer.mean_mib = -1.0
        return found

    def deaths(self, before_ns: int) -> list[Death]:
        """The ranks that had ended badly by then, the first of them first. Waits for verdicts that are on their way."""
        if not self._is_first(before_ns):
            return []
        self._find()
        deadline = monotonic() + PATIENCE_S
        waiting = [peer for peer in self._peers.values() if not peer.is_over and peer.number != self._number()]
        while True:
            for peer in waiting:
                self._look(peer)
            waiting = [peer for peer in waiting if not peer.is_over and peer.has_gone()]
            if not waiting or monotonic() > deadline:
                break
            sleep(PAUSE_S)
        found = [death for death in self._deaths.values() if death.time_ns <= before_ns]
        return sorted(found, key=lambda death: death.time_ns)

    # -- who belongs to it ------------------------------------------------------------------------------------------

    def _is_first(self, now_ns: int) -> bool:
        """Whether this is the first rank of its node, or may be. Which rank it is may be told late."""
        word = self._writer.marks.control(layout.RANK)
        if word != self._word:
            self._word, self._own, self._since_ns = word, Rank.unpack(word), now_ns
            self._forget()
        return self._own is not None and not self._own.local

    def _number(self) -> int:
        return -1 if self._own is None else self._own.number

    def _find(self) -> None:
        """Look for ranks that have come since the last look: one call of the system, if no file has."""
        try:
            changed_ns = os.stat(self._folder).st_mtime_ns
            if changed_ns != self._folder_ns:
                # a file that comes within the same tick of the file system's clock does not move it on
                self._folder_ns = changed_ns if time_ns() - changed_ns > 10**9 else 0
                names = sorted(name for name in os.listdir(self._folder) if name.endswith(SUFFIX))[-MAX_FILES:]
                self._pending += [name for name in names if name not in self._names]
                self._names = set(names)
        except OSError:
            return  # the folder has gone
        self._pending = [name for name in self._pending if self._is_undecided(name)]

    def _is_undecided(self, name: str) -> bool:
        """Make a peer of a recording if it is one; whether that cannot be told yet."""
        path = os.path.join(self._folder, name)
        try:
            reader = RecordingReader(path)
        except OSError:
            return self._is_young(path)  # its header is being written
        is_kept = False
        try:
            if name == self._name:
                self._go_on(reader)
                is_kept = self._add(Peer(reader, self._number(), self._since_ns, self._proc))
                return False
            if not is_of(reader, self._owner) or not are_siblings(self._fields, reader.fields):
                return False
            rank, head = rank_of(reader), reader.head()
            peer = Peer(reader, -1 if rank is None else rank.number, self._since_ns, self._proc)
            is_over = _is_finished(reader, head.state) or peer.has_gone()
            if is_over and head.mono_ns < int(self._fields["mono_ns"]):
                return False  # of an earlier start of the same job
            if rank is None:
                return not is_over  # it may be told late
            if self._own is not None and rank.world == self._own.world and rank.number != self._own.number:
                is_kept = self._add(peer)
            return False
        except (OSError, KeyError, ValueError):
            return False
        finally:
            if not is_kept:
                reader.close()

    def _go_on(self, reader: RecordingReader) -> None:
        """Take up what an earlier agent of this recording has found."""
        whole = reader.phases().get("")
        cells = {} if whole is None else whole.cells
        worst, highest = cells.get(metrics.RANKS_WORST), cells.get(metrics.RANKS_MAX)
        if worst is not None and highest is not None and highest.max > self._worst_mib:
            self._worst, self._worst_mib = int(worst.last), highest.max

    def _forget(self) -> None:
        for peer in self._peers.values():
            peer.reader.close()
        self._peers, self._names, self._pending, self._folder_ns = {}, set(), [], 0

    def _is_young(self, path: str) -> bool:
        try:
            return abs(os.stat(path).st_mtime - os.stat(self._folder).st_mtime) < PERIOD_S
        except OSError:
            return False

    def _add(self, peer: Peer) -> bool:
        """Whether it is the one of its number: of a worker that was started again, the one that lives."""
        before = self._peers.get(peer.number)
        if before is None:
            if len(self._peers) >= MAX_PEERS:
                return False
        elif not before.has_gone():
            return False  # the newer one is a program that the rank has started, with its own environment
        else:
            before.reader.close()
            self._deaths.pop(peer.number, None)
        self._peers[peer.number] = peer
        return True

    def _look(self, peer: Peer) -> None:
        try:
            peer.look()
            death = peer.death() if peer.is_over and peer.number != self._number() else None
        except OSError:
            peer.is_alive, peer.is_over, death = False, True, None
        if death is None:
            return
        self._deaths[peer.number] = death
        if death.time_ns >= self._since_ns:  # else an earlier agent of this recording has noted it
            step = self._writer.marks.place().step
            self._writer.event("rank", death.time_ns, step, death.peak_mib, f"{death.who()} {death.how}")


def _is_finished(reader: RecordingReader, state: int) -> bool:
    """Whether nothing more will come; an agent that has failed says stopped, too, and another one goes on."""
    return state == layout.ENDED or (state == layout.STOPPED and reader.control(layout.STOP) != 0)
