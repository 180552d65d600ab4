"""W&B's stream of system metrics: how points get into it, under which names, and which ones a run's files hold."""

from __future__ import annotations

import glob
import json
import os
import struct
from importlib import import_module
from typing import TYPE_CHECKING, Any
from zlib import crc32

from memtrack import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Publish = Callable[[int, Mapping[str, float]], None]

PROCESS_MEMORY = "proc.memory.rssMB"
"""W&B's own series of the resident memory of the process, in MiB."""

LABELS = {
    metrics.RSS: "memtrack",
    metrics.peak_name(metrics.RSS): "peak",
    metrics.TREE_PSS: "tree-pss",
}
"""What stands in the chart of ``PROCESS_MEMORY``, and its label there; workers do, too."""

_WORKER = metrics.WORKER_RSS.partition("{}")

_FILE_HEAD = 7
_BLOCK_SIZE = 1 << 15
_HEAD = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4
_MAX_FILE = 1 << 31


def series_key(name: str, writer: str = "") -> str:
    """Where a series of ours stands in the stream.

    ``memory/process/rss_mib`` is ``proc.memory.rssMB/l:memtrack``, a worker's ``proc.memory.rssMB/l:worker-1``. A key
    with ``/l:`` and a label belongs in the chart of the key without: so W&B tells machines apart that write to one run,
    and its terminal UI draws no keys but those that it knows. All else has its own name. ``writer`` is the label of
    this process among several that write to the run.
    """
    label = LABELS.get(name) or _worker_label(name)
    if label:
        return f"{PROCESS_MEMORY}/l:{f'{writer}-{label}' if writer else label}"
    return f"{name}/l:{writer}" if writer else name


def _worker_label(name: str) -> str:
    before, _, after = _WORKER
    if name.startswith(before) and name.endswith(after):
        return f"worker-{name[len(before) : -len(after)]}"
    return ""


def stream_of(run: Any) -> Publish | None:
    """What puts values, by key, into the stream of a run at a time in milliseconds of Unix time.

    It is a part of W&B that is not public; None where this version of W&B has no such thing. Blocks until W&B's own
    process has been sent the values, which takes less than a millisecond. Thread-safe. Raises whatever W&B does.
    """
    if getattr(run, "disabled", False):
        return _discard
    # before 0.27 it is the backend's
    interface = getattr(run, "_interface", None) or getattr(getattr(run, "_backend", None), "interface", None)
    publish = getattr(interface, "_publish", None)
    try:
        protocol = import_module("wandb.proto.wandb_internal_pb2")
        _record(protocol, 0, {"": 0.0})
    except (AttributeError, ImportError, TypeError):
        return None
    if publish is None:
        return None
    return lambda timestamp_ms, values: publish(_record(protocol, timestamp_ms, values))


def _discard(_timestamp_ms: int, _values: Mapping[str, float]) -> None:
    """A disabled run keeps nothing."""


def _record(protocol: Any, timestamp_ms: int, values: Mapping[str, float]) -> Any:
    record = protocol.Record()
    record.stats.stats_type = protocol.StatsRecord.StatsType.SYSTEM
    record.stats.timestamp.FromMilliseconds(timestamp_ms)
    for key, value in values.items():
        record.stats.item.add(key=key, value_json=json.dumps(value))
    return record


def held(root: str, run_id: str, writer: str = "") -> dict[int, frozenset[str]]:
    """What the files of an offline run have of ours: by time, in milliseconds of Unix time, the keys.

    After a kill they lack the last quarter of a minute, which W&B had in memory, or everything.
    """
    protocol = import_module("wandb.proto.wandb_internal_pb2")
    found: dict[int, frozenset[str]] = {}
    # most records have the same keys: one set serves them all
    sets: dict[frozenset[str], frozenset[str]] = {}
    for folder in ("wandb", ".wandb"):
        # what comes before the id in the name of a run's folder is a time, and a number may come behind it
        pattern = os.path.join(glob.escape(root), folder, "offline-run-*", f"run-{glob.escape(run_id)}.wandb")
        for path in glob.glob(pattern):
            for data in log_records(path):
                record = protocol.Record.FromString(data)
                ours = record.HasField("stats") and [
                    item.key for item in record.stats.item if _is_ours(item.key, writer)
                ]
                if ours:
                    timestamp_ms = record.stats.timestamp.ToMilliseconds()
                    keys = found.get(timestamp_ms, frozenset()).union(ours)
                    found[timestamp_ms] = sets.setdefault(keys, keys)
    return found


def _is_ours(key: str, writer: str) -> bool:
    name, _, label = key.partition("/l:")
    if name == PROCESS_MEMORY:
        own = label.removeprefix(f"{writer}-") if writer else label
        return own in LABELS.values() or own.startswith("worker-")
    return name.startswith("memory/") and label == writer


def log_records(path: str) -> Iterator[bytes]:
    """The records of a ``.wandb`` file, up to its end or to where it is torn.

    It is a LevelDB log behind seven bytes: blocks of 32 KiB with pieces of records. Before each piece there are a crc
    of all that comes after the length, the length, and whether it is a whole record, the first piece, a middle one or
    the last.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_FILE:
                return
            block, at = file.read(_BLOCK_SIZE), _FILE_HEAD
            parts: list[bytes] = []
            while block:
                while at + _HEAD.size <= len(block):
                    crc, length, kind = _HEAD.unpack_from(block, at)
                    start = at + _HEAD.size
                    at = start + length
                    if at > len(block) or crc32(block[start - 1 : at]) != crc:
                        return
                    if kind in (_WHOLE, _FIRST):
                        parts = []
                    parts.append(block[start:at])
                    if kind in (_WHOLE, _LAST):
                        yield b"".join(parts)
                block, at = file.read(_BLOCK_SIZE), 0
    except OSError:
        return
