"""The few functions of NVIDIA's management library (NVML) that memtrack needs, bound with ctypes.

Names, layouts and numbers are those of ``nvml.h`` and of the NVML API reference. A function that an old driver does not
have is looked for under its older names. ctypes is imported when the library is opened, not before.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes

    Handle = ctypes.c_void_p
    """A device or a MIG part of one, good until the process ends or the device is lost."""

LIBRARY = "libnvidia-ml.so.1"

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE = 3, 4, 6, 7
LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED = 12, 13, 15, 16
ARGUMENT_VERSION_MISMATCH = 25
FOR_GOOD = (NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED)
"""What no later call will change."""

_MEMORY_V2 = struct.Struct("@IQQQQ")
"""Version, total, reserved, free, used."""
_MEMORY_V2_VERSION = _MEMORY_V2.size | 2 << 24
_MEMORY_V1 = struct.Struct("@QQQ")
"""Total, free, used."""

_PROCESS = struct.Struct("@IQ")
"""Pid and bytes, which every version of an entry begins with."""
_PROCESS_SIZES = {"_v2": 24, "_v3": 24, "": 16}
"""Bytes an entry, by version of the function. The second comes first: the third's entries had 32 bytes in drivers 530
to 535.86, under the same name."""
_PROCESS_ROOM = 32
_PROCESSES, _MAX_PROCESSES = 64, 65536
_UNKNOWN = (1 << 64) - 1
"""``NVML_VALUE_NOT_AVAILABLE``, as an amount of memory."""


class NvmlError(Exception):
    """NVML said no. ``code`` is its ``nvmlReturn_t``; the text is NVML's own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class NvmlLibrary:
    """NVML, loaded and initialised. Every method may block for as long as the driver likes, and raises NvmlError."""

    def __init__(self, path: str = LIBRARY) -> None:
        import ctypes

        self._ctypes = ctypes
        try:
            self._library = ctypes.CDLL(path)
        except OSError as exc:
            raise NvmlError(LIBRARY_NOT_FOUND, str(exc)) from exc
        self._has_memory_v2 = True
        self._call(("nvmlInit_v2", "nvmlInit"))

    def close(self) -> None:
        """Shut NVML down. Not needed where the process ends anyway."""
        self._call(("nvmlShutdown",))

    def driver_version(self) -> str:
        """Such as ``550.54.15``."""
        return self._text("nvmlSystemGetDriverVersion")

    def count(self) -> int:
        """How many GPUs there are, with those that this process may not use."""
        return self._number(("nvmlDeviceGetCount_v2", "nvmlDeviceGetCount"))

    def device(self, index: int) -> Handle:
        """The GPU at ``index``, in the order of the PCI bus."""
        return self._handle(("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex"), index)

    def uuid(self, handle: Handle) -> str:
        """``GPU-…``; of a MIG part ``MIG-…``, before driver 470 ``MIG-GPU-…/1/0``."""
        return self._text("nvmlDeviceGetUUID", handle)

    def name(self, handle: Handle) -> str:
        """The model."""
        return self._text("nvmlDeviceGetName", handle)

    def parts(self, handle: Handle) -> list[Handle] | None:
        """The MIG parts of a GPU, in NVML's order; None if it is not in MIG mode."""
        current, pending = self._ctypes.c_uint(), self._ctypes.c_uint()
        try:
            self._call(("nvmlDeviceGetMigMode",), handle, self._byref(current), self._byref(pending))
        except NvmlError as exc:
            if exc.code in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
                return None
            raise
        if not current.value:
            return None
        found = []
        for index in range(self._number(("nvmlDeviceGetMaxMigDeviceCount",), handle)):
            try:
                found.append(self._handle(("nvmlDeviceGetMigDeviceHandleByIndex",), handle, index))
            except NvmlError as exc:
                if exc.code != NOT_FOUND:
                    raise
        return found

    def instance(self, part: Handle) -> tuple[int, int]:
        """The numbers of the GPU instance and of the compute instance of a MIG part."""
        gpu = self._number(("nvmlDeviceGetGpuInstanceId",), part)
        return gpu, self._number(("nvmlDeviceGetComputeInstanceId",), part)

    def memory(self, handle: Handle) -> tuple[int, int, int | None]:
        """Bytes in use, bytes in all, and bytes that driver and firmware have set aside.

        Drivers before 510 do not tell the last, which is None then, and count it as used.
        """
        if self._has_memory_v2:
            buffer = self._ctypes.create_string_buffer(_MEMORY_V2_VERSION.to_bytes(4, "little"), _MEMORY_V2.size)
            try:
                self._call(("nvmlDeviceGetMemoryInfo_v2",), handle, buffer)
                _, total, reserved, _, used = _MEMORY_V2.unpack(buffer.raw)
                return used, total, reserved
            except NvmlError as exc:
                if exc.code not in (FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH):
                    raise
                self._has_memory_v2 = False
        buffer = self._ctypes.create_string_buffer(_MEMORY_V1.size)
        self._call(("nvmlDeviceGetMemoryInfo",), handle, buffer)
        total, _, used = _MEMORY_V1.unpack(buffer.raw)
        return used, total, None

    def processes(self, handle: Handle) -> dict[int, int | None]:
        """Bytes that each process with a compute or a graphics context has, by pid; None where NVML does not know.

        A process with both is in both lists, with the same figure.
        """
        found = self._list("Compute", handle)
        try:
            return {**self._list("Graphics", handle), **found}
        except NvmlError as exc:
            if exc.code not in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
                raise
            return found

    def _list(self, kind: str, handle: Handle) -> dict[int, int | None]:
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        version = next((end for end in _PROCESS_SIZES if hasattr(self._library, name + end)), "")
        room = _PROCESSES
        while True:
            count = self._ctypes.c_uint(room)
            # with room for the longest entries that a driver has ever written
            buffer = self._ctypes.create_string_buffer(room * _PROCESS_ROOM)
            try:
                self._call((name + version,), handle, self._byref(count), buffer)
                break
            except NvmlError as exc:
                if exc.code != INSUFFICIENT_SIZE or room >= _MAX_PROCESSES:
                    raise
                # more may come until the next call
                room = min(max(count.value, room) * 2, _MAX_PROCESSES)
        size = _PROCESS_SIZES[version]
        entries = (_PROCESS.unpack_from(buffer, number * size) for number in range(count.value))
        return {pid: None if used == _UNKNOWN else used for pid, used in entries}

    def _number(self, names: tuple[str, ...], *arguments: object) -> int:
        number = self._ctypes.c_uint()
        self._call(names, *arguments, self._byref(number))
        return number.value

    def _handle(self, names: tuple[str, ...], *arguments: object) -> Handle:
        handle = self._ctypes.c_void_p()
        self._call(names, *arguments, self._byref(handle))
        return handle

    def _text(self, name: str, *arguments: object) -> str:
        buffer = self._ctypes.create_string_buffer(96)
        self._call((name,), *arguments, buffer, 96)
        return buffer.value.decode(errors="replace")

    def _byref(self, value: object) -> object:
        return self._ctypes.byref(value)  # type: ignore[arg-type]

    def _call(self, names: tuple[str, ...], *arguments: object) -> None:
        """Call the first function that the library has. ctypes lets other threads run meanwhile."""
        function = next((found for name in names if (found := getattr(self._library, name, None)) is not None), None)
        if function is None:
            raise NvmlError(FUNCTION_NOT_FOUND, f"this driver has no {names[0]}")
        code: int = function(*arguments)
        if code:
            raise NvmlError(code, self._error_text(code))

    def _error_text(self, code: int) -> str:
        try:
            describe = self._library.nvmlErrorString
        except AttributeError:
            return f"NVML error {code}"
        describe.restype = self._ctypes.c_char_p
        text: bytes | None = describe(code)
        return (text or b"").decode(errors="replace") or f"NVML error {code}"
