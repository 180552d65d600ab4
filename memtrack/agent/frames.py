"""Python stacks of another process, read from its memory without its help.

Nothing happens in that process: no signal, no handler, no lock. So it cannot be harmed, whatever is found, and it does
not matter whether it holds the GIL, sleeps, or is stopped. It goes on meanwhile, so that a stack that changes while it
is read may be a mixture of two that were there within the same 100 us; one that waits in a C function is exact.

Only thread states, frames, code objects, their names and their line tables are read. Each object's type is compared
with the interpreter's before anything is made of it: what was freed meanwhile, or is laid out otherwise than expected,
ends the stack there.
"""

from __future__ import annotations

import os

from memtrack.agent.symbols import find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_FRAMES = 60
MAX_THREADS = 64
TRIES = 3
_MAX_LINE_TABLE = 1 << 16
_MAX_NAME = 1000
_OWNED_BY_C = 3
"""Frames that the interpreter pushes for itself where C calls Python, since 3.12."""


class Shape:
    """Offsets, in bytes, of what is read in one version of CPython (64 bit, not a debug or free-threaded build)."""

    __slots__ = (
        "code", "code_start", "current", "filename", "firstlineno", "interpreter_next", "interpreters", "linetable",
        "name", "owner", "position", "previous", "text", "thread_next", "threads", "via",
    )  # fmt: skip

    def __init__(
        self, *, interpreters: int, interpreter_next: int, threads: int, thread_next: int, current: int, via: int,
        previous: int, code: int, position: int, owner: int, filename: int, name: int, linetable: int,
        firstlineno: int, code_start: int, text: int,
    ) -> None:  # fmt: skip
        self.interpreters = interpreters
        self.interpreter_next = interpreter_next
        self.threads = threads
        self.thread_next = thread_next
        self.current = current
        self.via = via
        """Offset of the frame in what ``current`` points to; -1: ``current`` points to the frame."""
        self.previous = previous
        self.code = code
        self.position = position
        """A pointer to the instruction, or, in 3.10, its index."""
        self.owner = owner
        """-1: there is none."""
        self.filename = filename
        self.name = name
        self.linetable = linetable
        self.firstlineno = firstlineno
        self.code_start = code_start
        """-1: instructions lie elsewhere (3.10)."""
        self.text = text
        """Size of the header of an ASCII string."""


SHAPES = {
    "3.10": Shape(
        interpreters=32, interpreter_next=0, threads=8, thread_next=8, current=24, via=-1, previous=24, code=32,
        position=96, owner=-1, filename=104, name=112, linetable=120, firstlineno=40, code_start=-1, text=48,
    ),
    "3.11": Shape(
        interpreters=40, interpreter_next=0, threads=16, thread_next=8, current=56, via=8, previous=48, code=32,
        position=56, owner=69, filename=112, name=128, linetable=136, firstlineno=72, code_start=184, text=48,
    ),
    "3.12": Shape(
        interpreters=40, interpreter_next=0, threads=72, thread_next=8, current=56, via=0, previous=8, code=0,
        position=56, owner=70, filename=112, name=128, linetable=136, firstlineno=68, code_start=192, text=40,
    ),
    "3.13": Shape(
        interpreters=632, interpreter_next=7264, threads=7344, thread_next=8, current=72, via=-1, previous=8, code=0,
        position=56, owner=70, filename=112, name=128, linetable=136, firstlineno=68, code_start=200, text=40,
    ),
}  # fmt: skip
"""By version; 3.13 says itself where its interpreters and threads are, see ``_from_table``."""

_TABLE_COOKIE = b"xdebugpy"
_TABLE = {"interpreters": 40, "interpreter_next": 64, "threads": 72, "thread_next": 168, "current": 184}


class StackReader:
    """Reads the stacks of process ``pid``, which runs CPython ``version``, such as ``"3.11"``.

    ``memory_fd`` is its ``/proc/PID/mem``, which this closes; -1: it is opened here, which the kernel may refuse
    (``ptrace(2)``: as for tracing, so on many systems to all but its parent).

    Raises OSError if its memory may not be read or it has gone, ValueError if it is no such Python. Not thread-safe.
    """

    def __init__(self, pid: int, version: str, memory_fd: int = -1) -> None:
        shape = SHAPES.get(version)
        if shape is None:
            raise ValueError(f"the stacks of Python {version} cannot be read")
        self._fd = memory_fd if memory_fd >= 0 else os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            symbols = find(pid, ("_PyRuntime", "PyCode_Type", "PyUnicode_Type"))
            if not symbols:
                raise ValueError(f"process {pid} runs no Python")
            self._runtime = symbols["_PyRuntime"]
            self._code_type, self._text_type = symbols["PyCode_Type"], symbols["PyUnicode_Type"]
            self._shape = shape if version != "3.13" else self._from_table(shape)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the memory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def threads(self) -> list[int]:
        """Thread states of the main interpreter, the main thread's first. Raises OSError."""
        shape = self._shape
        interpreter = self._last(self._pointer(self._runtime + shape.interpreters), shape.interpreter_next)[-1]
        # new threads are put in front
        return self._last(self._pointer(interpreter + shape.threads), shape.thread_next)[::-1]

    def stack(self, thread: int) -> list[tuple[str, int, str]]:
        """Path, line (0: unknown) and function of each frame, the innermost first. Raises OSError.

        It is read again if it has changed meanwhile, but not for ever: a thread that runs Python code never rests.
        """
        before: list[tuple[int, int]] = []
        for _ in range(TRIES):
            chain = list(self._chain(thread))
            if chain == before:
                break
            before = chain
        frames = (self._frame(code, position) for code, position in before)
        return [frame for frame in frames if frame is not None]

    # -- frames -----------------------------------------------------------------------------------------------------

    def _chain(self, thread: int) -> Iterator[tuple[int, int]]:
        """Code object and position of each frame, the innermost first."""
        shape = self._shape
        frame = self._pointer(thread + shape.current)
        if shape.via >= 0 and frame:
            frame = self._pointer(frame + shape.via)
        size = max(shape.previous, shape.code, shape.position) + 16
        for _ in range(MAX_FRAMES * 2):
            if not frame:
                return
            try:
                part = self._read(frame, size)
            except OSError:
                return
            code = _word(part, shape.code)
            if shape.owner < 0:
                yield code, int.from_bytes(part[shape.position : shape.position + 4], "little", signed=True) * 2
            elif part[shape.owner] != _OWNED_BY_C:
                yield code, _word(part, shape.position) - code - shape.code_start
            frame = _word(part, shape.previous)

    def _frame(self, code: int, position: int) -> tuple[str, int, str] | None:
        shape = self._shape
        try:
            part = self._read(code, max(shape.linetable, shape.name) + 8)
            if _word(part, 8) != self._code_type:
                return None
            path, name = self._text(_word(part, shape.filename)), self._text(_word(part, shape.name))
            table = self._bytes(_word(part, shape.linetable))
        except (OSError, ValueError):
            return None
        first = int.from_bytes(part[shape.firstlineno : shape.firstlineno + 4], "little", signed=True)
        line = old_line(table, first, position) if shape.code_start < 0 else line_of(table, first, position)
        return path, line, name

    # -- memory -----------------------------------------------------------------------------------------------------

    def _read(self, address: int, size: int) -> bytes:
        if not 4096 <= address < 1 << 56:
            raise OSError(f"no address: {address:#x}")
        part = os.pread(self._fd, size, address)
        if len(part) < size:
            raise OSError("the memory has gone")
        return part

    def _pointer(self, address: int) -> int:
        return int.from_bytes(self._read(address, 8), "little")

    def _last(self, address: int, following: int) -> list[int]:
        """The newest of a linked list, and always its last."""
        found: list[int] = []
        for _ in range(1 << 14):
            if not address:
                break
            if len(found) == MAX_THREADS:
                found.pop()
            found.append(address)
            address = self._pointer(address + following)
        if not found:
            raise OSError("no interpreter")
        return found

    def _text(self, address: int) -> str:
        shape = self._shape
        head = self._read(address, 40)
        state = int.from_bytes(head[32:36], "little")
        width, is_compact, is_ascii = state >> 2 & 7, state >> 5 & 1, state >> 6 & 1
        if _word(head, 8) != self._text_type or not is_compact or width not in (1, 2, 4):
            raise ValueError("no string")
        start = shape.text if is_ascii else shape.text + (24 if shape.text == 48 else 16)
        raw = self._read(address + start, min(_word(head, 16), _MAX_NAME) * width)
        return raw.decode({1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}[width], "replace")

    def _bytes(self, address: int) -> bytes:
        size = self._pointer(address + 16)
        if size > _MAX_LINE_TABLE:
            return b""
        return self._read(address + 32, size)

    def _from_table(self, shape: Shape) -> Shape:
        """3.13 begins with a table of offsets, which a build with other options fills otherwise."""
        table = self._read(self._runtime, 400)
        if table[:8] != _TABLE_COOKIE or _word(table, 8) >> 16 != 0x030D or _word(table, 16):
            raise ValueError("not a usual build of Python 3.13")
        offsets = {field: getattr(shape, field) for field in Shape.__slots__}
        offsets.update({field: _word(table, at) for field, at in _TABLE.items()})
        return Shape(**offsets)


def line_of(table: bytes, line: int, position: int) -> int:
    """The line of the instruction at ``position`` in ``co_linetable`` of 3.11 and later; 0 if it has none."""
    at, end = 0, 0
    while at < len(table):
        kind = table[at] >> 3 & 15
        end += ((table[at] & 7) + 1) * 2
        if kind in (13, 14):
            line += _signed(table, at + 1)
        elif 10 <= kind <= 12:
            line += kind - 10
        if position < end:
            return 0 if kind == 15 else line
        at += 1
        # only the first byte of an entry has its highest bit set
        while at < len(table) and table[at] < 128:
            at += 1
    return 0


def old_line(table: bytes, line: int, position: int) -> int:
    """The same for ``co_linetable`` of 3.10."""
    end = 0
    for at in range(0, len(table) - 1, 2):
        step = table[at + 1]
        end += table[at]
        if step != 128:  # no line
            line += step - 256 if step > 127 else step
        if position < end:
            return 0 if step == 128 else line
    return line if not table else 0


def _signed(table: bytes, at: int) -> int:
    value = shift = 0
    while at < len(table):
        value |= (table[at] & 63) << shift
        shift += 6
        if not table[at] & 64:
            break
        at += 1
    return -(value >> 1) if value & 1 else value >> 1


def _word(part: bytes, at: int) -> int:
    return int.from_bytes(part[at : at + 8], "little")
