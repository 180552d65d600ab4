"""Names for the workers of a DataLoader, by which the kernel knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Named:
    """A ``worker_init_fn`` that names the process ``DataLoader 2``, as in ``top`` or the kernel's log, then does what
    another does. It can be pickled, for workers that are spawned."""

    def __init__(self, then: Callable[[int], object] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        try:
            with open("/proc/self/comm", "w", encoding="ascii") as file:
                file.write(f"DataLoader {worker}")
        except OSError:
            pass  # no Linux, or no /proc
        if self._then is not None:
            self._then(worker)
