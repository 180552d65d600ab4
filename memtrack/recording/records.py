"""Records of a recording that are not written for every window: events, feeds, stacks, the verdict, the farewell.

Each is written whole with ``pwrite``, within one page, and carries a crc32: what a kill leaves torn does not count.
"""

from __future__ import annotations

import struct
from binascii import crc32

from memtrack.recording.layout import FAREWELL_SIZE, FEED_SIZE, MAX_NUMBER, PAGE, printable
from memtrack.sampling.window import Place

# -- events ---------------------------------------------------------------------------------------------------------

_EVENT = struct.Struct("<IHHQqqd88s")


class Event:
    """Something that happened, with the number it has among all events of the recording."""

    __slots__ = ("kind", "number", "step", "text", "time_ns", "value")

    def __init__(self, number: int, kind: str, time_ns: int, step: int, value: float, text: str) -> None:
        self.number = number
        self.kind = kind
        self.time_ns = time_ns
        self.step = step
        self.value = value
        self.text = text

    def __repr__(self) -> str:
        return f"Event({self.number}, {self.kind!r}, step={self.step}, value={self.value:g}, {self.text!r})"


EVENT_KINDS = (
    "",
    "start",
    "stop",
    "exit",
    "new_peak",
    "limit_near",
    "mark",
    "gap",
    "error",
    "limit_changed",
    "oom_kill",
    "gpu",
    "rank",
)


def pack_event(event: Event) -> bytes:
    """A record of 128 bytes with its crc."""
    text = event.text.encode(errors="replace")[:88]
    body = _EVENT.pack(
        0, EVENT_KINDS.index(event.kind), len(text), event.number, event.time_ns, event.step, event.value, text
    )[4:]
    return crc32(body).to_bytes(4, "little") + body


def unpack_event(record: bytes) -> Event | None:
    """The event of a record; None if it is empty, torn or damaged."""
    crc, kind, length, number, time_ns, step, value, text = _EVENT.unpack(record)
    if crc == 0 or crc32(record[4:]) != crc or kind >= len(EVENT_KINDS):
        return None
    return Event(number, EVENT_KINDS[kind], time_ns, step, value, printable(text[:length].decode(errors="replace")))


# -- text -----------------------------------------------------------------------------------------------------------

_TEXT = struct.Struct("<IIH")
"""crc, turn, length of the text."""


def pack_text(fields: dict[str, str], turn: int, size: int) -> bytes:
    """``key=value`` lines in a record of ``size`` bytes; what does not fit is left out, whole lines at a time."""
    lines, room = [], size - _TEXT.size
    for key, value in fields.items():
        line = f"{key}={' '.join(value.splitlines())}\n".encode(errors="replace")
        if len(line) <= room:
            lines.append(line)
            room -= len(line)
    text = b"".join(lines)
    body = _TEXT.pack(0, turn, len(text))[4:] + text
    return crc32(body).to_bytes(4, "little") + body


def unpack_text(record: bytes) -> tuple[int, dict[str, str]] | None:
    """Turn and fields of a text record; None if it is empty, torn or damaged."""
    if len(record) < _TEXT.size:
        return None
    crc, turn, length = _TEXT.unpack_from(record)
    end = _TEXT.size + length
    if crc == 0 or end > len(record) or crc32(record[4:end]) != crc:
        return None
    lines = map(printable, record[_TEXT.size : end].decode(errors="replace").splitlines())
    return turn, dict(line.split("=", 1) for line in lines if "=" in line)


def newest_text(records: list[bytes]) -> tuple[int, dict[str, str]] | None:
    """Of records that are written in turn, the newest that is whole."""
    whole = [found for found in map(unpack_text, records) if found is not None]
    return max(whole, key=lambda found: found[0], default=None)


def _number(text: str) -> int:
    """The number that ``text`` spells; ValueError if it is none that belongs here."""
    number = int(text) if len(text) < 20 else MAX_NUMBER
    if not -MAX_NUMBER < number < MAX_NUMBER:
        raise ValueError
    return number


# -- feeds ----------------------------------------------------------------------------------------------------------


class Feed:
    """Which part of the recording one run of a tracker gets, and how far that has come.

    ``sink`` and ``target`` are what a process needs that delivers later: the sink's name and what it says of its run,
    such as its id and where the server is, without secrets. A sink that cannot be made again has no ``target``.
    """

    __slots__ = ("done", "dropped", "end_ns", "key", "next", "sink", "start_ns", "target")

    def __init__(self, key: str, sink: str = "", target: dict[str, str] | None = None) -> None:
        self.key = key
        self.sink = sink
        self.target = target or {}
        self.start_ns = 0
        """The windows whose middle lies between two monotonic times are this feed's; None: up to the end."""
        self.end_ns: int | None = None
        self.next = 0
        """Number of the first window that was not delivered."""
        self.dropped = 0
        """Windows that the tracker refused for good."""
        self.done = False
        """Whether it has everything, the final figures too."""

    def __repr__(self) -> str:
        return f"Feed({self.key!r}, next={self.next}, done={self.done})"

    def pack(self, turn: int) -> bytes:
        """A record of ``FEED_SIZE`` bytes."""
        numbers = {
            "key": self.key,
            "next": str(self.next),
            "start_ns": str(self.start_ns),
            "end_ns": "" if self.end_ns is None else str(self.end_ns),
            "dropped": str(self.dropped),
            "done": str(int(self.done)),
        }
        target = {f"target.{key}": value for key, value in self.target.items()}
        record = pack_text({**numbers, "sink": self.sink, **target}, turn, FEED_SIZE)
        return record.ljust(FEED_SIZE, b"\0")

    @classmethod
    def unpack(cls, record: bytes) -> tuple[int, Feed] | None:
        """Turn and feed; None if the record is empty, torn or damaged."""
        found = unpack_text(record)
        if found is None:
            return None
        turn, fields = found
        target = {key[7:]: value for key, value in fields.items() if key.startswith("target.")}
        feed = cls(fields.get("key", ""), fields.get("sink", ""), target)
        try:
            feed.next, feed.start_ns = _number(fields["next"]), _number(fields["start_ns"])
            feed.end_ns = _number(fields["end_ns"]) if fields["end_ns"] else None
            feed.dropped, feed.done = _number(fields["dropped"]), fields["done"] == "1"
        except (KeyError, ValueError):
            return None
        return turn, feed


# -- stacks ---------------------------------------------------------------------------------------------------------

_STACK = struct.Struct("<IIqdddqiHH")


class Stack:
    """The Python stack of the training process at one moment, and what memory stood at then. NaN where unknown."""

    __slots__ = ("headroom_pct", "number", "place", "rss_mib", "text", "time_ns", "usage_mib")

    def __init__(
        self, number: int, time_ns: int, place: Place, rss_mib: float, usage_mib: float, headroom_pct: float, text: str
    ) -> None:
        self.number = number
        self.time_ns = time_ns
        self.place = place
        """Step, epoch and the innermost phase."""
        self.rss_mib = rss_mib
        self.usage_mib = usage_mib
        self.headroom_pct = headroom_pct
        self.text = text
        """A line a frame, innermost first: ``path:line function``."""

    def __repr__(self) -> str:
        return f"Stack({self.number}, rss_mib={self.rss_mib:g}, {self.text.partition(chr(10))[0]!r})"

    def pack(self) -> bytes:
        """A record of at most one page: the outermost frames of a deep stack are left out."""
        text = self.text.encode(errors="replace")[: PAGE - _STACK.size].decode(errors="ignore").encode()
        place = self.place
        body = _STACK.pack(
            0, self.number, self.time_ns, self.rss_mib, self.usage_mib, self.headroom_pct, place.step, place.epoch,
            place.phase, len(text),
        )[4:] + text  # fmt: skip
        return crc32(body).to_bytes(4, "little") + body

    @classmethod
    def unpack(cls, record: bytes) -> Stack | None:
        """The stack of a page; None if it is empty, torn or damaged."""
        if len(record) < _STACK.size:
            return None
        crc, number, time_ns, rss, usage, headroom, step, epoch, phase, length = _STACK.unpack_from(record)
        end = _STACK.size + length
        if crc == 0 or end > len(record) or crc32(record[4:end]) != crc:
            return None
        text = "\n".join(map(printable, record[_STACK.size : end].decode(errors="replace").split("\n")))
        return cls(number, time_ns, Place(step, epoch, (phase,) if phase else ()), rss, usage, headroom, text)


# -- the end --------------------------------------------------------------------------------------------------------

KINDS = (
    "clean", "failed", "memory_error", "device_out_of_memory", "killed", "out_of_memory", "unknown_sigkill",
    "userspace_killer", "unknown",
)  # fmt: skip
"""Kinds of verdict. ``unknown``: the process has gone and nothing tells how."""

CONFIDENCES = ("certain", "confirmed", "likely", "none")


class Verdict:
    """How the process ended and why, in words with numbers.

    ``kind`` is one of ``KINDS``. ``confidence`` is ``certain`` where the kernel or Python said so, ``confirmed`` where
    an out-of-memory kill is proved, ``likely`` where several signs point to it, ``none`` where there are none.
    """

    __slots__ = ("confidence", "evidence", "exit_code", "kind", "signal", "text", "wall_ns")

    def __init__(self, kind: str, confidence: str, text: str) -> None:
        self.kind = kind
        self.confidence = confidence
        self.text = text
        """One sentence."""
        self.evidence: list[str] = []
        """Sentences, the most telling first."""
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.wall_ns = 0
        """When the process ended, Unix time."""

    def __repr__(self) -> str:
        return f"Verdict({self.kind!r}, {self.confidence!r}, {self.text!r})"

    def pack(self, turn: int) -> bytes:
        """A page or less."""
        fields = {"kind": self.kind, "confidence": self.confidence, "wall_ns": str(self.wall_ns)}
        for name in ("exit_code", "signal"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = str(value)
        fields["text"] = self.text
        fields.update({f"evidence.{number}": line for number, line in enumerate(self.evidence)})
        return pack_text(fields, turn, PAGE)

    @classmethod
    def from_fields(cls, fields: dict[str, str]) -> Verdict | None:
        """The verdict of a text record; None if it makes no sense."""
        kind, confidence = fields.get("kind", ""), fields.get("confidence", "")
        if kind not in KINDS or confidence not in CONFIDENCES:
            return None
        verdict = cls(kind, confidence, fields.get("text", ""))
        verdict.evidence = [value for key, value in fields.items() if key.startswith("evidence.")]
        try:
            verdict.wall_ns = _number(fields.get("wall_ns", "0"))
            verdict.exit_code = _number(fields["exit_code"]) if "exit_code" in fields else None
            verdict.signal = _number(fields["signal"]) if "signal" in fields else None
        except ValueError:
            return None
        return verdict


def pack_farewell(fields: dict[str, str]) -> bytes:
    """What the trainer says at its end: ``how`` (``exit`` or ``exception``), ``type``, ``where``, ``module``."""
    return pack_text(fields, 1, FAREWELL_SIZE)
