"""What ``memtrack doctor`` looks at. Each check says what it found; only what prevents monitoring is BAD."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple

from memtrack import __version__, config, registry
from memtrack.analysis.summary import size
from memtrack.errors import MemtrackError, SettingsError
from memtrack.metrics import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memtrack.config import Settings

OK, NOTE, BAD = "ok", "note", "FAIL"

EXTRAS = {
    "comet": ("comet-ml",),
    "mlflow": ("mlflow-skinny",),
    "wandb": ("wandb",),
    "report": ("matplotlib", "numpy"),
    "cli": ("typer", "rich"),
    "data": ("numpy", "pandas", "pyarrow"),
}
"""What each extra brings, by name of the distribution."""

GPU_PATIENCE_S = 5.0
"""A driver that nobody uses takes a second or two for each device to wake up."""

_PIDFD_GET_INFO = 0xC040FF0B
"""``_IOWR(0xFF, 11, struct pidfd_info)`` with the 64 bytes that the struct had when it came, in Linux 6.13."""
_PIDFD_INFO_EXIT = 1 << 3


class Check(NamedTuple):
    """What was looked at, how it stands (OK, NOTE, BAD), and what was found, in words."""

    name: str
    state: str
    text: str


def all_checks(directory: str | None = None) -> Iterator[Check]:
    """Every check, one at a time; none raises."""
    yield Check("memtrack", OK, f"{__version__}, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}")
    yield Check("Python", OK, f"{platform.python_version()} {platform.python_implementation()}, {sys.executable}")
    if sys.platform == "linux":
        yield Check("kernel", OK, f"Linux {platform.release()} {platform.machine()}")
        for look in (proc, pss, pressure, cgroup, limit, ptrace, pidfd, gpu):
            yield _safely(look)
    else:
        yield Check("system", NOTE, f"{platform.system()}: read through psutil, without containers, PSS and pressure")
    try:
        settings = config.resolve({"directory": directory})
        variables = ", ".join(
            sorted(f"{name}={text}" for name, text in os.environ.items() if name.startswith("MEMTRACK_"))
        )
        yield Check("settings", NOTE if settings.disable else OK, variables or "no MEMTRACK_* variable is set")
    except SettingsError as exc:
        yield Check("settings", BAD, str(exc))
        settings = config.Settings()
    yield _safely(recordings, settings)
    yield _safely(agent)
    yield _safely(trackers)
    yield _safely(extras)


def _safely(look: Callable[..., Check], *arguments: object) -> Check:
    try:
        return look(*arguments)
    except Exception as exc:
        return Check(look.__name__, NOTE, f"cannot tell: {type(exc).__name__}: {exc}")


def proc() -> Check:
    """Whether ``/proc`` shows this process, and others."""
    try:
        with open("/proc/self/status", "rb") as file:
            if b"VmRSS:" not in file.read():
                return Check("/proc", BAD, "shows no memory of processes")
    except OSError as exc:
        return Check("/proc", BAD, f"cannot be read: {exc.strerror}")
    options = [line.split(" - ")[-1] for line in _lines("/proc/self/mountinfo") if line.split(" ")[4] == "/proc"]
    hidden = [word for line in options for word in line.replace(",", " ").split() if word.startswith("hidepid=")]
    if hidden and hidden[-1] not in ("hidepid=0", "hidepid=off"):
        return Check("/proc", NOTE, f"readable; {hidden[-1]}: processes of other users are hidden")
    return Check("/proc", OK, "readable, processes of other users too")


def pss() -> Check:
    """Whether shared pages can be counted once."""
    try:
        with open("/proc/self/smaps_rollup", "rb") as file:
            file.read()
    except OSError as exc:
        return Check("PSS", NOTE, f"/proc/PID/smaps_rollup: {exc.strerror}; trees of processes get upper bounds only")
    return Check("PSS", OK, "/proc/PID/smaps_rollup is readable: shared pages of a tree are counted once")


def pressure() -> Check:
    """Pressure stall information."""
    try:
        with open("/proc/pressure/memory", encoding="ascii") as file:
            return Check("pressure", OK, f"PSI: {file.readline().strip()}")
    except OSError as exc:
        return Check("pressure", NOTE, f"/proc/pressure/memory: {exc.strerror}; no memory/host/pressure_some_pct")


def cgroup() -> Check:
    """The memory cgroup of this process."""
    from memtrack.collectors.limits import cgroup_levels

    levels = cgroup_levels(os.getpid())
    if not levels:
        return Check(
            "cgroup", NOTE, "no memory cgroup is visible: no memory/container metrics, physical memory is the limit"
        )
    own = levels[0]
    used = own.read_bytes(own.usage_file)
    usage = "" if used is None else f", {size(used / MIB)} in use"
    return Check("cgroup", OK, f"v{own.version} {own.name} ({own.directory}){usage}")


def limit() -> Check:
    """Which limit stops a process first that is started here."""
    from memtrack.collectors.limits import resolve

    limits = resolve(os.getpid())
    if limits.binding is None:
        return Check("limit", NOTE, "not even physical memory is known: no headroom")
    room = limits.headroom()
    left = "" if room is None else f"; {size(room.bytes / MIB)} left ({room.limit.source})"
    return Check("limit", OK, f"{size(limits.binding.mib)} ({limits.binding.source}) binds{left}")


def ptrace() -> Check:
    """Whose memory may be looked into: smaps_rollup asks for the right to trace."""
    scope = "".join(_lines("/proc/sys/kernel/yama/ptrace_scope")).strip()
    if os.geteuid() == 0:
        return Check("permission", OK, "root: every process can be measured")
    notes = "" if scope in ("", "0") else f" (yama ptrace_scope={scope} does not matter for reading)"
    if os.stat("/proc/self").st_uid != os.geteuid():
        return Check("permission", NOTE, f"this process is not dumpable: its PSS cannot be read{notes}")
    return Check("permission", OK, f"dumpable: your own processes can be measured{notes}")


def pidfd() -> Check:
    """How the end of a process is noticed, and whether its exit status can be learned by one who is not its parent."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"], os.environ)
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError) as exc:
        return Check("exit watch", NOTE, f"no pidfd ({exc}): the end of a process is noticed at the next tick")
    finally:
        os.waitpid(pid, 0)
    try:
        import fcntl

        info = bytearray(_PIDFD_INFO_EXIT.to_bytes(8, "little").ljust(64, b"\0"))
        fcntl.ioctl(fd, _PIDFD_GET_INFO, info)
        has_status = bool(info[0] & _PIDFD_INFO_EXIT)
    except OSError:
        has_status = False
    finally:
        os.close(fd)
    if has_status:
        return Check("exit watch", OK, "pidfd, and exit statuses by PIDFD_GET_INFO")
    return Check("exit watch", OK, "pidfd; no exit statuses by PIDFD_GET_INFO (Linux 6.15): only memtrack run has them")


def gpu() -> Check:
    """NVIDIA's driver, and its devices as a process counts them that is started here."""
    from memtrack.collectors import has_nvidia

    if not has_nvidia():
        return Check("GPU", NOTE, "no NVIDIA driver (/dev/nvidiactl, /proc/driver/nvidia): no memory/gpuN metrics")
    from memtrack.collectors.nvml import Caller

    found: list[Check] = []
    if not Caller().do(lambda: found.append(_safely(_gpus)), GPU_PATIENCE_S):
        return Check(
            "GPU", NOTE, f"NVIDIA's driver has not answered for {GPU_PATIENCE_S:.0f} s: no memory/gpuN metrics"
        )
    return found[0]


def _gpus() -> Check:
    from memtrack.collectors.cuda_devices import all_devices, visible
    from memtrack.collectors.nvml_library import NvmlError, NvmlLibrary

    try:
        nvml = NvmlLibrary()
        devices = all_devices(nvml)
        models = {nvml.name(device.handle) for device in devices if device.handle is not None}
        words = []
        for number, device in enumerate(visible(devices, os.environ)):
            try:
                total = size(nvml.memory(device.handle)[1] / MIB) if device.handle is not None else "cannot be opened"
            except NvmlError as exc:
                total = f"without figures ({exc})"
            model = nvml.name(device.handle) if device.handle is not None else "of unknown model"
            words.append(f"gpu{number} {model} {total} {device.uuid[:12]}".rstrip())
        text = f"NVIDIA driver {nvml.driver_version()}: {', '.join(words) or 'no device is visible'}"
        nvml.close()
    except NvmlError as exc:
        return Check("GPU", NOTE, f"NVIDIA driver, but no NVML ({exc}): no memory/gpuN metrics")
    if len(models) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        text += ". CUDA may number different models otherwise: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        return Check("GPU", NOTE, text)
    return Check("GPU", OK, text)


def recordings(settings: Settings) -> Check:
    """The folder of the recordings."""
    path = config.find_directory(settings)
    try:
        if os.path.isdir(path):
            config.check_directory(path)
    except MemtrackError as exc:
        return Check("recordings", BAD, str(exc))
    existing = path
    while not os.path.isdir(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    if not os.access(existing, os.W_OK | os.X_OK):
        if settings.directory == config.Settings().directory:
            where = config.fallback_directory()
            return Check("recordings", NOTE, f"{path}: no right to write in {existing}; {where} takes its place")
        return Check("recordings", BAD, f"{path}: no right to write in {existing}. Choose a folder with MEMTRACK_DIR.")
    free = shutil.disk_usage(existing).free
    text = f"{path}, on {_file_system(existing)}, {size(free / MIB)} free, {size(settings.recording_bytes / MIB)} a run"
    if free < settings.recording_bytes:
        return Check("recordings", BAD, f"{text}: too little for one recording")
    return Check("recordings", OK, text if os.path.isdir(path) else f"{text}; made when needed")


def agent() -> Check:
    """Start an agent for a moment."""
    from memtrack.collectors.procfs import field_kib
    from memtrack.monitor import Monitor
    from memtrack.recording.reader import RecordingReader

    with tempfile.TemporaryDirectory(prefix="memtrack-") as folder:
        start = time.monotonic()
        try:
            # by pid: a program that calls this, such as a test, may be monitoring itself already
            monitor = Monitor(config.Settings(directory=folder), pid=os.getpid())
        except MemtrackError as exc:
            return Check("agent", BAD, str(exc))
        with monitor:
            is_ready = monitor.wait_ready()
            took_ms = (time.monotonic() - start) * 1e3
            monitor.flush(1.0)
            with RecordingReader(monitor.path) as reader:
                agent_pid = reader.head().agent_pid
                errors = [event.text for event in reader.events() if event.kind == "error"]
            rss = _rss_mib(agent_pid, field_kib) if sys.platform == "linux" else None
    if not is_ready:
        return Check(
            "agent", BAD, f"started, but takes no samples: {errors[-1] if errors else 'MEMTRACK_DEBUG=1 shows why'}"
        )
    return Check("agent", OK, f"samples {took_ms:.0f} ms after start{'' if rss is None else f', {size(rss)} resident'}")


def trackers() -> Check:
    """The trackers that memtrack can feed, by their metadata alone."""
    found = []
    for tracker in sorted(registry.AUTOLOG):
        version = _version(EXTRAS[tracker][0]) or _version(tracker)
        found.append(f"{tracker} {version or 'not installed'}")
    others = [name for name in registry.sink_names() if name not in registry.AUTOLOG]
    is_any = any(not text.endswith("not installed") for text in found)
    return Check("trackers", OK if is_any else NOTE, f"{', '.join(found)}; other sinks: {', '.join(others) or 'none'}")


def extras() -> Check:
    """The extras, and what each of them lacks."""
    words = []
    for extra, distributions in EXTRAS.items():
        lacking = [name for name in distributions if _version(name) is None]
        if extra == "mlflow" and "mlflow-skinny" in lacking and _version("mlflow"):
            lacking.remove("mlflow-skinny")
        words.append(f"{extra} (lacks {', '.join(lacking)})" if lacking else extra)
    complete = not any("lacks" in word for word in words)
    hint = "" if complete else ": pip install 'memtrack[all]'"
    return Check("extras", OK if complete else NOTE, ", ".join(words) + hint)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _rss_mib(pid: int, field_kib: Callable[[bytes, bytes], float | None]) -> float | None:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return field_kib(file.read(), b"VmRSS:")
    except OSError:
        return None


def _file_system(path: str) -> str:
    """Type of the file system that holds ``path``: that of the longest mount point above it."""
    real = os.path.realpath(path)
    best, kind = "", "an unknown file system"
    for line in _lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4]
        if len(point) >= len(best) and (real + "/").startswith(point.rstrip("/") + "/"):
            best, kind = point, right.split(" ")[0]
    return kind


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []
