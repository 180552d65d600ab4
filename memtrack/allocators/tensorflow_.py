"""TensorFlow's allocators, by ``tf.config.experimental.get_memory_info``."""

from __future__ import annotations

import sys

from memtrack.allocators.figures import of_tensorflow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEVICES = 8


def read() -> Iterator[tuple[str, dict[str, float]]]:
    """Scope and quantities of each GPU or TPU that has any. Half a microsecond where there is none.

    Only a context that the program has initialised is asked: TensorFlow takes whole devices when it initialises one.
    Host memory is not counted by TensorFlow, it says 0.
    """
    context = getattr(sys.modules.get("tensorflow.python.eager.context"), "_context", None)
    if context is None or not getattr(context, "_initialized", False):
        return
    for device in (getattr(context, "_logical_devices", None) or ())[:MAX_DEVICES]:
        if device.device_type not in ("CPU", "COMPOSITE"):
            number = device.name.rpartition(":")[2]
            info = sys.modules["tensorflow"].config.experimental.get_memory_info(f"{device.device_type}:{number}")
            found = of_tensorflow(info)
            if found:
                yield f"tf_{number}", found
