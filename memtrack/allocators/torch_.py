"""torch's caching allocators: of CUDA (and ROCm) and XPU devices, and of whatever else ``torch.accelerator`` knows.

``torch.cuda.is_available``, ``device_count`` and ``mem_get_info`` are never called before the program itself has
initialised the device: they would do it, and a process that has cannot fork workers that use the device. Afterwards
only devices that the process has a context on are asked.
"""

from __future__ import annotations

import sys

from memtrack.allocators.figures import of_torch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any

MAX_DEVICES = 8


def read() -> Iterator[tuple[str, dict[str, float]]]:
    """Scope and quantities of each device that has any. Half a microsecond where no device is in use."""
    modules = sys.modules
    for kind in ("cuda", "xpu"):
        module = modules.get(f"torch.{kind}")
        # while it is being imported by another thread it is there without its contents
        is_initialized = getattr(module, "is_initialized", None)
        if module is not None and is_initialized is not None and is_initialized():
            for device in _devices(module, kind):
                found = of_torch(module.memory_stats_as_nested_dict(device))
                if found:
                    yield f"torch_{kind}{device}", found
    accelerator = modules.get("torch.accelerator")
    current = getattr(accelerator, "current_accelerator", None)
    if accelerator is not None and current is not None:
        # of the build or of a plug-in: no device is looked for
        device = current()
        if device is not None and device.type not in ("cuda", "xpu"):
            found = _of_other(accelerator)
            if found:
                yield f"torch_{device.type}{accelerator.current_device_index()}", found


def _devices(module: ModuleType, kind: str) -> Iterator[int]:
    torch = sys.modules["torch"]
    has_context: Callable[[int], bool] | None = None
    if kind == "cuda" and torch.version.hip is None:
        has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    if has_context is None:
        yield module.current_device()
        return
    for device in range(min(module.device_count(), MAX_DEVICES)):
        if has_context(device):
            yield device


def _of_other(accelerator: ModuleType) -> dict[str, float]:
    """By the way that ``torch.accelerator.memory_stats`` goes, without sorting all of it; that is since torch 2.9."""
    internals: Any = sys.modules["torch"]._C
    is_initialized = getattr(internals, "_accelerator_isAllocatorInitialized", None)
    stats = getattr(internals, "_accelerator_getDeviceStats", None)
    if is_initialized is None or stats is None or not is_initialized():
        return {}
    return of_torch(stats(accelerator.current_device_index()))
