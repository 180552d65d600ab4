"""Descriptors in the training process, which is not ours: it may close any number, as programs do that become daemons,
and open a file of its own behind it. What is written to such a number would be written into that file.
"""

from __future__ import annotations

import mmap
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class Descriptor:
    """A descriptor that is used and closed only while its number still means the file that it was made for.

    Asking takes 1 µs. Not seen is a change between asking and writing, nor that another eventfd has taken the place of
    an eventfd: these share their identity, and one that is written to in error wakes its reader for nothing.
    """

    __slots__ = ("_identity", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._identity = _identity(fd) if fd >= 0 else None

    @property
    def is_ours(self) -> bool:
        """Whether it is open, and the file behind it the one that was there in the beginning."""
        try:
            return self.fd >= 0 and _identity(self.fd) == self._identity
        except OSError:
            return False

    def is_as(self, other: Descriptor) -> bool:
        """Whether both were made for the same file."""
        return self._identity is not None and self._identity == other._identity

    def close(self) -> None:
        """Close it, unless it is somebody else's by now. A second call does nothing."""
        if self.is_ours:
            os.close(self.fd)
        self.fd = -1


class StdioTaken:
    """While it lasts, something stands behind descriptors 0 to 2, so that what is opened gets a higher number.

    In a process that was started without them, a recording opened as 2 would get what libraries print there.
    """

    def __init__(self) -> None:
        self._fillers: list[Descriptor] = []

    def __enter__(self) -> StdioTaken:
        while True:
            fd = os.open(os.devnull, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            if fd > 2:
                os.close(fd)
                return self
            self._fillers.append(Descriptor(fd))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for filler in self._fillers:
            filler.close()


class FileMap:
    """The first ``size`` bytes of a file, mapped to be written; ``view`` are they. The descriptor may be closed.

    ``mmap`` keeps a duplicate of the descriptor (before Python 3.13, where it can be told not to), which it closes in
    the end, whatever is behind that number by then. A map of which that is somebody else's is never closed.
    """

    _never_closed: list[mmap.mmap] = []  # noqa: RUF012

    def __init__(self, fd: int, size: int) -> None:
        self._copy: Descriptor | None = None
        if sys.version_info >= (3, 13):
            self._map = mmap.mmap(fd, size, trackfd=False)
        else:
            number = os.dup(fd)
            os.close(number)
            self._map = mmap.mmap(fd, size)
            # it has got the same number, if no other thread was faster
            try:
                if _identity(number) == _identity(fd):
                    self._copy = Descriptor(number)
            except OSError:
                pass
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Unmap. Views that were made of ``view`` must have been released."""
        self.view.release()
        if self._copy is None or self._copy.is_ours:
            self._map.close()
        else:
            self._never_closed.append(self._map)

    def __del__(self, _never_closed: list[mmap.mmap] = _never_closed) -> None:
        if getattr(self, "_copy", None) is not None and not self._copy.is_ours:  # type: ignore[union-attr]
            _never_closed.append(self._map)


def above_stdio(fd: int) -> int:
    """The same file behind a descriptor above those which a new process finds its first files at (0 to 3)."""
    low = []
    try:
        while fd <= 3:
            low.append(fd)
            fd = os.dup(fd)
        return fd
    finally:
        for number in low:
            os.close(number)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
