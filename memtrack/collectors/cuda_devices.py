"""Which GPUs a process counts as ``cuda:0``, ``cuda:1``, … without asking CUDA, which would initialise it.

NVML has the GPUs in the order of the PCI bus. CUDA has them in that order with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``;
without it (``FASTEST_FIRST``) the fastest comes first, by a rule that is not documented, and the others in no order
that is promised. Where all GPUs are of one model, that is the order of the bus. Where they are not, the order of the
bus is taken all the same: numbers then may be those of other devices than CUDA's unless the variable is set, or
``CUDA_VISIBLE_DEVICES`` has UUIDs. ``memtrack doctor`` says so on such a machine.
"""

from __future__ import annotations

from memtrack.collectors.nvml_library import NO_PERMISSION, NvmlError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from memtrack.collectors.nvml_library import Handle, NvmlLibrary


class Device:
    """A GPU, or a part of one in MIG mode. Without a handle it takes up a number, and nothing can be read of it."""

    __slots__ = ("handle", "old_uuid", "parts", "uuid")

    def __init__(self, handle: Handle | None, uuid: str = "", parts: Sequence[Device] | None = None) -> None:
        self.handle = handle
        self.uuid = uuid
        self.old_uuid = ""
        """Of a part, as drivers before 470 named it: ``MIG-GPU-…/1/0``, which later ones still understand."""
        self.parts = parts
        """None unless in MIG mode."""


def all_devices(nvml: NvmlLibrary) -> list[Device]:
    """Every GPU that may be used, in the order of the PCI bus. CUDA counts none that it may not open."""
    found = []
    for index in range(nvml.count()):
        try:
            handle = nvml.device(index)
            found.append(Device(handle, nvml.uuid(handle), _parts(nvml, handle)))
        except NvmlError as exc:
            if exc.code != NO_PERMISSION:
                found.append(Device(None))
    return found


def _parts(nvml: NvmlLibrary, handle: Handle) -> list[Device] | None:
    parts = nvml.parts(handle)
    if parts is None:
        return None
    found = [Device(part, nvml.uuid(part)) for part in parts]
    for device in found:
        try:
            gpu, compute = nvml.instance(device.handle)  # type: ignore[arg-type]
            device.old_uuid = f"MIG-{nvml.uuid(handle)}/{gpu}/{compute}"
        except NvmlError:
            continue  # a driver that has those names only
    return found


def visible(devices: Sequence[Device], environ: Mapping[str, str]) -> list[Device]:
    """Those that a process with this environment sees, in its order.

    Of GPUs in MIG mode CUDA shows a process one part, and no other device besides: the first of those that are left.
    """
    text = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = list(devices) if text is None else _chosen(text, devices)
    found: list[Device] = []
    for device in chosen:
        found += [device] if device.parts is None else device.parts[:1]
    parts = {id(part) for device in devices for part in device.parts or ()}
    first = next((device for device in found if id(device) in parts), None)
    return found if first is None else [first]


def _chosen(text: str, devices: Sequence[Device]) -> list[Device]:
    """CUDA stops at the first word that names no device, such as -1, and shows none if one is named twice."""
    chosen: list[Device] = []
    for word in text.split(","):
        device = _named(word.strip(), devices)
        if device is None:
            break
        if device in chosen:
            return []
        chosen.append(device)
    return chosen


def _named(word: str, devices: Sequence[Device]) -> Device | None:
    """By number, by UUID, or by as much of a UUID as fits one device only."""
    if word.startswith("GPU-"):
        found = [device for device in devices if device.uuid.startswith(word)]
    elif word.startswith("MIG-"):
        parts = [part for device in devices for part in device.parts or ()]
        found = [part for part in parts if part.uuid.startswith(word) or part.old_uuid == word]
    else:
        # like strtol: what follows the digits is ignored
        digits = word[: len(word) - len(word.lstrip("0123456789"))]
        found = list(devices[int(digits) :][:1]) if digits else []
    return found[0] if len(found) == 1 else None


def environment_of(pid: int, proc: str = "/proc") -> dict[str, str] | None:
    """The environment that a process was started with; None if it may not be read.

    What the program itself has changed since then is not in it.
    """
    try:
        with open(f"{proc}/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return None
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries)
    return {name: value for name, _, value in pairs}
