"""The layout of a recording, version 1, and how its parts are packed.

A recording is one file of a fixed size, allocated up front. All numbers are little-endian; times are nanoseconds.

    ===========  ==========================  =====================================================================
    offset       written by                  holds
    ===========  ==========================  =====================================================================
    0            whoever creates the file    header: magic, version, length, crc32, then ``key=value`` lines
    4 Ki         the agent                   head: two alternating slots of 512 bytes, written with each window, see
                                             :class:`Head`; behind them two lines with the last sample, written at
                                             each tick, see :class:`Pulse`; and a word that is not 0 while the agent
                                             does not want to be woken for phases
    6 Ki         the trainer                 its farewell: what Python knows of the end of the process, 1 Ki
    8 Ki         the trainer                 control words, where it stands, 62 gauges: lines of 64 bytes
    12 Ki        the trainer                 ring of 512 marks, 64 bytes each: phases, epochs, named marks
    44 Ki        the trainer                 256 names of 64 bytes: phases, marks, gauges
    60 Ki        the agent                   256 names of 64 bytes: metrics
    76 Ki        the agent                   ring of 512 events, 128 bytes each
    140 Ki       whoever delivers            32 feeds: which sink gets which part, and how far it has got; two
                                             alternating records of 512 bytes each
    172 Ki       the agent, or who delivers  the verdict: two alternating pages
    180 Ki       the agent                   stacks of the training process at peaks: 8 pages
    212 Ki       the agent                   rows of 32 phases (the first: of everything), two alternating pages each
    468 Ki       the agent                   64 epochs, 128 bytes each; of more, several in one
    476 Ki       the agent                   windows: one page each. The first half is a ring of the newest windows,
                                             addressed by number; the second half holds merged history
    ===========  ==========================  =====================================================================

Who writes what never overlaps, so nothing is locked. Three rules keep every part readable after ``kill -9`` at any
instruction, and while it is written:

- *Slots* (head, feeds, verdict, phase rows) come in pairs that are written in turn, so that the last complete one
  stands while the next is written. The newest valid one counts.
- A slot or line in mapped memory is ``sequence word | body``. The writer sets the word to 0, copies the body
  with one slice assignment, and sets the word to the slot's number. ``struct.pack_into`` is never used on a map: it
  clears the target first.
- Whatever is written with ``pwrite`` carries a crc32 and lies within one page. A page of windows is only overwritten
  once its content stands merged on another page; where two pages tell of the same window, the merged one counts.

What stands in a recording may come from anybody. Unpacking it gives texts that can be printed, times and numbers within
what they may be, or nothing; a value may still be NaN or infinite, as gauges may.

``records.py`` has what is not written for every window: events, feeds, stacks, the verdict.
"""

from __future__ import annotations

import struct
from binascii import crc32

from memtrack.errors import RecordingFormatError
from memtrack.sampling.window import Cell, Place, Row

MAGIC = b"MEMTRACK"
VERSION = 1
PAGE = 4096
LINE = 64

HEAD = 4096
HEAD_SLOT = 512
PULSE = HEAD + 2 * HEAD_SLOT
QUIET = PULSE + 2 * LINE
FAREWELL = 6 * 1024
FAREWELL_SIZE = 1024
CONTROL = 8192
NOW = CONTROL + LINE
GAUGES = CONTROL + 2 * LINE
GAUGE_COUNT = 62
MARKS = 12 * 1024
MARK_COUNT = 512
NAMES = 44 * 1024
METRICS = 60 * 1024
NAME_COUNT = 256
EVENTS = 76 * 1024
EVENT_SIZE = 128
EVENT_COUNT = 512
FEEDS = 140 * 1024
FEED_SIZE = 512
FEED_COUNT = 32
VERDICT = 172 * 1024
STACKS = 180 * 1024
STACK_COUNT = 8
PHASES = 212 * 1024
PHASE_COUNT = 32
EPOCHS = 468 * 1024
EPOCH_SIZE = 128
EPOCH_COUNT = 64
WINDOWS = 476 * 1024

MIN_SIZE = 1 << 20
DEFAULT_SIZE = 4 << 20
MAX_SIZE = 1 << 30
"""Three days of windows of a second at full resolution; a reader looks through it in seconds."""

MAX_NUMBER = 1 << 62
"""What times in nanoseconds, numbers of windows and the like stay below: 146 years. Their differences fit 64 bits."""

MAX_CELLS = (PAGE - LINE) // LINE
MAX_DEPTH = 8

# control words, counted in 8 bytes from CONTROL
CUT, STOP, MARKS_WRITTEN, MARKS_REFUSED, EXITING, RELIEF, PEAK, RANK = range(8)
"""RELIEF is the pid of an agent that waits to take the place of the one that is there, and written by it. PEAK counts
how often the trainer has asked for a new highest sample to be begun, see ``Pulse``. RANK: see ``rank.Rank``."""

# states of the agent
STARTING, RUNNING, STOPPED, ENDED = range(4)
STATES = ("starting", "running", "stopped", "ended")

# kinds of mark
PHASE_BEGIN, PHASE_END, EPOCH, MARK = range(1, 5)


class Layout:
    """Where the windows lie in a recording of ``size`` bytes."""

    __slots__ = ("bins", "bins_start", "ring", "size")

    def __init__(self, size: int) -> None:
        pages = (size - WINDOWS) // PAGE
        self.size = size
        self.ring = pages // 2
        """Pages for the newest windows."""
        self.bins = pages - self.ring
        """Pages for merged history."""
        self.bins_start = WINDOWS + self.ring * PAGE

    def ring_offset(self, number: int) -> int:
        """Where window ``number`` lies while it is among the newest."""
        return WINDOWS + (number % self.ring) * PAGE

    def bin_offset(self, index: int) -> int:
        """Where page ``index`` of the history lies."""
        return self.bins_start + index * PAGE

    @staticmethod
    def phase_offset(phase: int, turn: int) -> int:
        """Where the row of a phase lies; ``turn`` alternates."""
        return PHASES + (2 * phase + (turn & 1)) * PAGE


def printable(text: str) -> str:
    """``text`` with ``?`` for each character that a terminal might obey, or that no encoding knows."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


# -- header ---------------------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<8sIII")

_INTEGERS = ("size", "pid", "start_ticks", "wall_ns", "mono_ns", "end_run", "keep")
_REALS = ("interval_s", "tick_s", "cpu_budget_pct", "keep_days")


def pack_header(fields: dict[str, str]) -> bytes:
    """The header page. Values must not hold line breaks; keys neither these nor ``=``."""
    text = "".join(f"{key}={value}\n" for key, value in fields.items()).encode()
    if _HEADER.size + len(text) > PAGE:
        raise ValueError(f"header of {len(text)} bytes does not fit a page")
    return _HEADER.pack(MAGIC, VERSION, len(text), crc32(text)) + text


def unpack_header(page: bytes, path: str) -> dict[str, str]:
    """The fields of a header page; RecordingFormatError if ``path`` is no recording, damaged, or too new."""
    if len(page) < _HEADER.size:
        raise RecordingFormatError(f"{path}: not a memtrack recording (shorter than its header)")
    magic, version, length, crc = _HEADER.unpack_from(page)
    if magic != MAGIC:
        raise RecordingFormatError(f"{path}: not a memtrack recording (it does not begin with {MAGIC.decode()})")
    if version != VERSION:
        raise RecordingFormatError(
            f"{path}: recording of layout {version}, this memtrack reads {VERSION}. "
            "Upgrade with: pip install --upgrade memtrack"
        )
    text = page[_HEADER.size : _HEADER.size + length]
    if len(text) != length or crc32(text) != crc:
        raise RecordingFormatError(f"{path}: the header is damaged (checksum)")
    try:
        fields = dict(line.split("=", 1) for line in text.decode().splitlines())
    except ValueError:
        raise RecordingFormatError(f"{path}: the header is damaged (it is not a list of key=value)") from None
    for key, value in fields.items():
        if (key in _INTEGERS and not _is_number(value, digits_only=True)) or (key in _REALS and not _is_number(value)):
            raise RecordingFormatError(f"{path}: the header is damaged ({key}={printable(value[:40])})")
    return {printable(key): printable(value) for key, value in fields.items()}


def _is_number(text: str, *, digits_only: bool = False) -> bool:
    """Whether it is a number from 0 to MAX_NUMBER; longer ones are not even looked at."""
    if len(text) > 40 or not text.isascii() or (digits_only and not text.isdigit()):
        return False
    try:
        number = float(text)
    except ValueError:
        return False
    return 0 <= number < MAX_NUMBER


# -- names ----------------------------------------------------------------------------------------------------------


def pack_name(name: str) -> bytes:
    """A line of 64 bytes: length, then UTF-8. A longer name keeps its end, which tells more."""
    text = name.encode()
    if len(text) > LINE - 1:
        text = text[-(LINE - 1) :].decode(errors="ignore").encode()
    return (bytes((len(text),)) + text).ljust(LINE, b"\0")


def unpack_names(table: bytes) -> list[str]:
    """The names in use, by id: a table is filled from its beginning."""
    names = []
    for offset in range(0, len(table), LINE):
        length = table[offset]
        if not 0 < length < LINE:
            break
        names.append(printable(table[offset + 1 : offset + 1 + length].decode(errors="replace")))
    return names


# -- head -----------------------------------------------------------------------------------------------------------

_HEAD = struct.Struct("<BxxxIqqQQQIIQQddd96s")


class Head:
    """What the agent publishes with each window, so that a reader knows where things stand without reading windows."""

    __slots__ = (
        "agent_cpu_ns", "agent_pid", "agent_rss_mib", "bin_width", "cut", "dropped", "late_max_ms", "limit_mib",
        "limit_source", "merged", "mono_ns", "state", "ticks", "wall_ns", "windows",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = STARTING
        self.agent_pid = 0
        self.mono_ns = 0
        """Monotonic time when this was published, and beside it the wall clock."""
        self.wall_ns = 0
        self.windows = 0
        """Number of windows finished; the newest has the number ``windows - 1``."""
        self.cut = 0
        """The last request to cut the current window that was served."""
        self.bin_width = 1
        """How many windows a page of the history holds."""
        self.merged = 0
        self.dropped = 0
        self.ticks = 0
        self.agent_cpu_ns = 0
        self.agent_rss_mib = 0.0
        self.late_max_ms = 0.0
        self.limit_mib = float("nan")
        self.limit_source = ""

    def pack(self) -> bytes:
        """The body of a slot."""
        return _HEAD.pack(
            self.state, self.agent_pid, self.mono_ns, self.wall_ns, self.windows, self.cut, self.merged, self.bin_width,
            self.dropped, self.ticks, self.agent_cpu_ns, self.agent_rss_mib, self.late_max_ms, self.limit_mib,
            self.limit_source.encode(errors="replace")[:96],
        )  # fmt: skip

    @classmethod
    def unpack(cls, body: bytes) -> Head:
        """The head from the body of a slot."""
        head = cls()
        (
            head.state, head.agent_pid, head.mono_ns, head.wall_ns, head.windows, head.cut, head.merged, head.bin_width,
            head.dropped, head.ticks, head.agent_cpu_ns, head.agent_rss_mib, head.late_max_ms, head.limit_mib, source,
        ) = _HEAD.unpack_from(body)  # fmt: skip
        head.limit_source = printable(source.rstrip(b"\0").decode(errors="replace"))
        return head


HEAD_BODY = _HEAD.size

PULSE_BODY = struct.Struct("<qdddqd")


class Pulse:
    """The last sample: its monotonic time, RSS and container usage in MiB, headroom in percent; NaN where unknown.

    ``peak_mib`` is the highest RSS that was sampled since the agent saw the trainer's request ``peak`` (word PEAK).
    """

    __slots__ = ("headroom_pct", "mono_ns", "peak", "peak_mib", "rss_mib", "usage_mib")

    def __init__(self, body: bytes | None = None) -> None:
        nan = float("nan")
        fields = (0, nan, nan, nan, 0, nan) if body is None else PULSE_BODY.unpack_from(body)
        self.mono_ns, self.rss_mib, self.usage_mib, self.headroom_pct, self.peak, self.peak_mib = fields


# -- windows --------------------------------------------------------------------------------------------------------

_ROW = struct.Struct("<IHHQQqqqq")
_CELL = struct.Struct("<ddddfIqqiHBB")
_METRIC = _CELL.size - 2


def pack_row(row: Row, ids: dict[str, int], turn: int = 0) -> bytes:
    """One page or less: the row's line, then a line a cell. Cells whose metric has no id are left out.

    ``turn`` counts how often a row that has two pages was written, modulo 2**16.
    """
    cells = [
        _CELL.pack(
            cell.min, cell.max, cell.mean, cell.last, cell.seconds, cell.count, cell.max_ns, cell.step, cell.epoch,
            cell.phase, ids[metric], cell.label,
        )
        for metric, cell in row.cells.items()
        if metric in ids
    ]  # fmt: skip
    del cells[MAX_CELLS:]
    times = row.start_ns, row.end_ns, row.end_wall_ns
    body = _ROW.pack(0, len(cells), turn & 0xFFFF, row.first, row.last, *times, row.step)
    body = body.ljust(LINE, b"\0") + b"".join(cells)
    return crc32(body[4:]).to_bytes(4, "little") + body[4:]


def row_span(page: bytes) -> tuple[int, int] | None:
    """The numbers of the first and last window of a page; None if the page is empty, torn or damaged."""
    if len(page) < LINE:
        return None
    crc, count, _, first, last, *_ = _ROW.unpack_from(page)
    end = LINE * (1 + count)
    if crc == 0 or end > len(page) or crc32(page[4:end]) != crc:
        return None
    return first, last


def row_turn(page: bytes) -> int:
    """The ``turn`` of a page that ``row_span`` finds whole."""
    return int.from_bytes(page[6:8], "little")


def row_cells(page: bytes) -> int:
    """How many cells such a page holds, those of unknown metrics too."""
    return int.from_bytes(page[4:6], "little")


def unpack_row(page: bytes, metrics: list[str]) -> Row | None:
    """The row of a page; None if the page is empty, torn or damaged, or of a time that cannot be."""
    if row_span(page) is None:
        return None
    _, count, _, first, last, start_ns, end_ns, wall_ns, step = _ROW.unpack_from(page)
    if not (
        first < MAX_NUMBER and last < MAX_NUMBER and 0 <= start_ns <= end_ns < MAX_NUMBER and 0 <= wall_ns < MAX_NUMBER
    ):
        return None
    end = LINE * (1 + count)
    row = Row(first, start_ns)
    row.last, row.end_ns, row.end_wall_ns, row.step = last, end_ns, wall_ns, step
    for fields in _CELL.iter_unpack(page[LINE:end]):
        metric = fields[10]
        if metric < len(metrics) and 0 <= fields[6] < MAX_NUMBER:
            row.cells[metrics[metric]] = _cell(fields)
    return row


def unpack_cell(page: bytes, metric: int) -> Cell | None:
    """The cell of one metric, by its id, of a page that ``row_span`` finds whole; None if it has none."""
    for at in range(LINE, LINE * (1 + row_cells(page)), LINE):
        if page[at + _METRIC] == metric:
            return _cell(_CELL.unpack_from(page, at))
    return None


def _cell(fields: tuple[float, ...]) -> Cell:
    cell = Cell.__new__(Cell)
    (
        cell.min, cell.max, cell.mean, cell.last, cell.seconds, cell.count, cell.max_ns, cell.step, cell.epoch,
        cell.phase, _, cell.label,
    ) = fields  # type: ignore[assignment]  # fmt: skip
    return cell


# -- marks ----------------------------------------------------------------------------------------------------------

MARK_BODY = struct.Struct("<BBHiqqd")
MARK_PATH = struct.Struct(f"<{MAX_DEPTH}H")
NOW_BODY = struct.Struct("<qq")
"""Step and epoch, each set by one store; -1 if there is none, as a new recording has it."""
GAUGE_BODY = struct.Struct("<dqq")


class Mark:
    """One entry of the ring of marks, with the state after it: step, epoch and the open phases."""

    __slots__ = ("kind", "name", "place", "time_ns", "value")

    def __init__(self, body: bytes) -> None:
        kind, depth, name, epoch, step, time_ns, value = MARK_BODY.unpack_from(body)
        self.kind: int = kind
        self.name: int = name
        self.time_ns: int = time_ns
        self.value: float = value
        self.place = Place(step, epoch, MARK_PATH.unpack_from(body, MARK_BODY.size)[: min(depth, MAX_DEPTH)])
