"""JAX's allocators, by ``memory_stats()`` of the devices of this process."""

from __future__ import annotations

import sys

from memtrack.allocators.figures import of_jax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEVICES = 8


class Reader:
    """Asks the backends that the program has made. ``jax.devices()`` would make one, and is not called."""

    def __init__(self) -> None:
        self._silent: set[str] = set()
        """Platforms that have no figures, as CPUs: there may be hundreds of those devices."""

    def read(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Scope and quantities of each local device that has any. A microsecond where there are CPUs only."""
        # not by backends_are_initialized(), which waits until a backend that is being made is ready
        backends = getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", None)
        for client in list(backends.values()) if backends else ():
            platform = client.platform
            if platform in self._silent:
                continue
            for number, device in enumerate(client.local_devices()[:MAX_DEVICES]):
                stats = self._ask(device)
                if stats is None:
                    self._silent.add(platform)
                    break
                found = of_jax(stats)
                if found:
                    yield f"jax_{number}", found

    def _ask(self, device: object) -> dict[str, int] | None:
        try:
            return device.memory_stats()  # type: ignore[attr-defined, no-any-return]
        except Exception:  # a backend's way to say that it cannot, as XlaRuntimeError: UNIMPLEMENTED
            return None
