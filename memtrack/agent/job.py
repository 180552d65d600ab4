"""Which rank of a distributed training this process is, and which process has launched the ranks."""

from __future__ import annotations

import os
import sys

from memtrack.collectors.procfs import start_ticks
from memtrack.recording.rank import Rank

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate launch, and whoever does as they do
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
"""Rank, how many there are, rank on the node; the first of which a process has all but the last counts."""

_MOST_WRAPPERS = 8


def rank_now(environ: Mapping[str, str] = os.environ) -> Rank | None:
    """The rank of this process, as torch knows it, else as its launcher says in the environment.

    None if it is the only one, or nobody has said. Imports nothing and initialises nothing. Never raises.
    """
    found = rank_in(environ)
    try:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            number, world = distributed.get_rank(), distributed.get_world_size()
            local = _number(environ, "LOCAL_RANK") if found is None else found.local
            return _possible(Rank(number, world, local))
    except Exception:  # half imported, or another version's
        pass
    return found


def rank_in(environ: Mapping[str, str]) -> Rank | None:
    """What the variables of a launcher say; None if they say nothing, or what cannot be."""
    for names in _VARIABLES:
        number, world, local = (_number(environ, name) for name in names)
        if number is not None and world is not None:
            return _possible(Rank(number, world, local))
    number, world = _number(environ, "LOCAL_RANK"), _number(environ, "WORLD_SIZE")
    # Lightning's launcher gives no rank; on the first node it is that on the node, on others torch knows it later
    if number is not None and world is not None and _number(environ, "NODE_RANK") == 0:
        return _possible(Rank(number, world, number))
    return None


def launcher_of(environ: Mapping[str, str] = os.environ, proc: str = "/proc") -> str:
    """``pid:start ticks`` of the process that has launched this rank and the others of its node; "" if unknown.

    The parent, unless that is a shell or another wrapper around this one rank, which has the same rank in its own
    environment: then whoever is above it. A process that is no rank yet gets its parent.
    """
    names = (*(names[0] for names in _VARIABLES), "LOCAL_RANK")
    variable = next((name for name in names if name in environ), "")
    sign = os.fsencode(f"{variable}={environ[variable]}") if variable and rank_in(environ) else b""
    try:
        pid = os.getppid()
        for _ in range(_MOST_WRAPPERS if sign else 0):
            if not _is_started_with(pid, sign, proc):
                break
            pid = _parent(pid, proc)
        return f"{pid}:{start_ticks(pid, proc)}"
    except (OSError, ValueError, IndexError):
        return ""  # a pid namespace ends here, or it is no Linux


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if len(text) < 9 and text.isascii() and text.isdigit() else None


def _possible(rank: Rank) -> Rank | None:
    return rank if rank.pack() else None


def _is_started_with(pid: int, sign: bytes, proc: str) -> bool:
    """Whether a process had this variable when it was started; another user's, such as Slurm's daemon, has not."""
    try:
        with open(f"{proc}/{pid}/environ", "rb") as file:
            return sign in file.read(1 << 20).split(b"\0")
    except OSError:
        return False


def _parent(pid: int, proc: str) -> int:
    with open(f"{proc}/{pid}/stat", "rb") as file:
        text = file.read()
    return int(text[text.rindex(b")") + 2 :].split(None, 2)[1])
