"""What a pickle that torch wrote tells of its storages and tensors, without following any of its instructions.

The instructions move values on a stack. Here the same is done with what stands for the values: names and numbers as
they are, a storage and a tensor as what is said of them, a dict as a dict of those, and None for anything else. Nothing
is imported, called or made, so that a pickle can do no more than be wrong about where its tensors lie.
"""

from __future__ import annotations

from sys import getsizeof
from typing import TYPE_CHECKING, NamedTuple

from memtrack.artifacts.layouts.opcodes import MAX_TEXT, operations
from memtrack.artifacts.layouts.parts import MAX_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, BinaryIO

    from memtrack.artifacts.layouts.opcodes import Operation

MAX_PICKLE = 64 << 20
MAX_KEPT = 1 << 16
"""Of the values that are used again, and of those on the stack."""
MAX_ITEMS = 1_000_000
"""Of all tuples together: some twenty for each tensor."""
MAX_TEXTS = 16 << 20
"""Bytes in memory."""
MAX_DEPTH = 500
"""Of marks."""

_DTYPES = {
    "BFloat16": "bfloat16", "Bool": "bool", "Byte": "uint8", "Char": "int8", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Double": "float64", "Float": "float32", "Half": "float16", "Int": "int32",
    "Long": "int64", "QInt32": "qint32", "QInt8": "qint8", "QUInt8": "quint8", "Short": "int16",
}  # fmt: skip


class View(NamedTuple):
    """A tensor: the key of its storage, and which of the elements there are its own."""

    storage: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Contents(NamedTuple):
    """``storages``: by key, their dtype, or "". ``views``: tensors by their path in dicts, ``model/layer.weight``."""

    storages: dict[str, str]
    views: list[tuple[str, View]]


class _Storage(NamedTuple):
    """A storage; its dtype is noted aside."""

    key: str


class _Global(NamedTuple):
    """A class or function that the pickle would have imported."""

    name: str


def contents_of(file: BinaryIO, offset: int, length: int) -> Contents:
    """What the pickle in this place of ``file`` tells.

    Raises ValueError, LookupError or TypeError if it is broken, or takes more than the bounds above.
    """
    if length > MAX_PICKLE:
        raise ValueError("too long a pickle")
    # most values are noted for use again, few of them are used: one pass to find out which
    wanted = set()
    for operation, argument in operations(file, offset, length):
        if operation.name in ("BINGET", "LONG_BINGET", "GET"):
            wanted.add(_index(operation.name, argument))
            if len(wanted) > MAX_KEPT:
                raise ValueError("too much to remember")
    machine = _Machine(wanted)
    for operation, argument in operations(file, offset, length):
        machine.follow(operation, argument)
    return Contents(machine.storages, list(_paths(machine.stack[-1])))


def _index(name: str, argument: bytes) -> int:
    return int(argument[:20]) if name in ("GET", "PUT") else int.from_bytes(argument, "little")


class _Machine:
    """What stands for the values while they are moved."""

    def __init__(self, wanted: set[int]) -> None:
        self.storages: dict[str, str] = {}
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._wanted = wanted
        self._memo: dict[int, Any] = {}
        self._noted = 0
        self._waiting = 0
        self._items = 0
        self._entries = 0
        self._text_bytes = 0

    def follow(self, operation: Operation, argument: bytes) -> None:
        """Do to the stack what the instruction would."""
        name, stack = operation.name, self.stack
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"):
            index = self._noted if name == "MEMOIZE" else _index(name, argument)
            self._noted += 1
            if index in self._wanted:
                self._memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[_index(name, argument)])
        elif name in ("BINUNICODE", "SHORT_BINUNICODE"):
            stack.append(self._text(argument))
        elif name in ("BININT", "BININT1", "BININT2", "LONG1"):
            number = int.from_bytes(argument, "little", signed=name in ("BININT", "LONG1"))
            stack.append(number if len(argument) <= 8 else None)
        elif name == "MARK":
            self._below.append(stack)
            self._waiting += len(stack)
            self.stack = []
            if len(self._below) > MAX_DEPTH:
                raise ValueError("too deep")
        elif name == "GLOBAL":
            stack.append(_Global(self._text(argument[:-1].replace(b"\n", b" "))))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name != "STOP":
            taken = self._take(operation)
            left = self._left(name, taken)
            if operation.leaves:
                self.stack += [left] * operation.leaves
        if self._waiting + len(self.stack) > MAX_KEPT:
            raise ValueError("too much on the stack")

    def _take(self, operation: Operation) -> list[Any]:
        """The operands, those below the mark first."""
        marked: list[Any] = []
        if operation.takes_marked:
            marked, self.stack = self.stack, self._below.pop()
            self._waiting -= len(self.stack)
        if operation.takes > len(self.stack):
            raise ValueError("nothing on the stack")
        first = len(self.stack) - operation.takes
        taken = self.stack[first:]
        del self.stack[first:]
        return taken + marked

    def _left(self, name: str, taken: list[Any]) -> Any:
        """What stands for the result."""
        if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
            return self._tuple(taken)
        if name == "BINPERSID":
            return self._storage(taken[0])
        if name == "REDUCE":
            return self._result(*taken)
        if name in ("SETITEM", "SETITEMS"):
            self._set(taken[0], zip(taken[1::2], taken[2::2], strict=True))
            return taken[0]
        if name == "BUILD":
            if type(taken[1]) is dict:
                self._set(taken[0], taken[1].items())
            return taken[0]
        if name in ("EMPTY_DICT", "NEWOBJ"):
            return {}
        if name == "STACK_GLOBAL":
            return _Global(self._text(f"{taken[0]} {taken[1]}"[:MAX_TEXT].encode()))
        return None

    def _text(self, argument: bytes) -> str:
        text = argument.decode("utf-8", "replace")
        self._text_bytes += getsizeof(text)
        if self._text_bytes > MAX_TEXTS:
            raise ValueError("too much text")
        return text

    def _tuple(self, items: list[Any]) -> tuple[Any, ...] | None:
        """A tuple of at most 64 items, without dicts, and tuples only of others: torch makes a tensor of no more."""
        self._items += len(items)
        if self._items > MAX_ITEMS:
            raise ValueError("too many items")
        return None if len(items) > 64 else tuple(None if _is_nested(item) else item for item in items)

    def _set(self, target: Any, entries: Any) -> None:
        """Of dicts only what may be, or hold, a tensor is kept; a name that was too long to be read is ""."""
        if type(target) is dict:
            for key, value in entries:
                if type(key) in (str, int) and key != "" and type(value) in (View, dict):
                    target[key] = value
                    self._entries += 1
            if self._entries > 2 * MAX_PARTS:
                raise ValueError("too many entries")

    def _storage(self, identity: Any) -> _Storage | None:
        if type(identity) is not tuple or len(identity) < 3 or identity[0] != "storage":
            return None
        _, kind, key = identity[:3]
        if type(kind) is not _Global or type(key) is not str:
            return None
        if key not in self.storages:
            self.storages[key] = _DTYPES.get(kind.name.rpartition(" ")[2].removesuffix("Storage"), "")
            if len(self.storages) > MAX_PARTS:
                raise ValueError("too many storages")
        return _Storage(key)

    def _result(self, function: Any, arguments: Any) -> Any:
        name = function.name if type(function) is _Global else ""
        if name == "collections OrderedDict":
            return {}
        if type(arguments) is not tuple or len(arguments) < 2:
            return None
        if name.startswith("torch._utils _rebuild_parameter"):
            return arguments[0] if type(arguments[0]) is View else None
        if name not in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"):
            return None
        storage, first, shape, strides = arguments[:4]
        if type(storage) is not _Storage:
            return None
        if name.endswith("_v3") and type(arguments[6]) is _Global and not self.storages[storage.key]:
            self.storages[storage.key] = arguments[6].name.removeprefix("torch ")
        if type(first) is not int or type(shape) is not tuple or type(strides) is not tuple:
            return None
        sides_known = len(shape) == len(strides) and all(type(side) is int for side in shape + strides)
        return View(storage.key, first, shape, strides) if sides_known else None


def _is_nested(item: Any) -> bool:
    return type(item) is dict or (type(item) is tuple and any(type(inner) is tuple for inner in item))


def _paths(top: Any) -> Iterator[tuple[str, View]]:
    """The tensors that dicts in dicts have names for. A dict may stand in many others, or in itself."""
    if type(top) is not dict:
        return
    levels = [("", iter(top.items()))]
    text_bytes = 0
    for _ in range(2 * MAX_PARTS):
        prefix, entries = levels[-1]
        key, value = next(entries, (None, None))
        if value is None:
            levels.pop()
            if not levels:
                return
            continue
        path = f"{prefix}{key}"
        text_bytes += len(path)
        if text_bytes > MAX_TEXTS:
            return
        if type(value) is View:
            yield path, value
        elif len(levels) < 16:
            levels.append((path + "/", iter(value.items())))
