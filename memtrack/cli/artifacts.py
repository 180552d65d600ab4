"""What ``memtrack sync`` does about artifacts: it stores what processes that are gone have left behind."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

    from memtrack.artifacts.pending import Left

PATIENCE_S = 60.0
"""How long a store that does not answer is tried: somebody is watching. What has begun to arrive may take as long as
it does."""


def left_behind(directory: str) -> list[Left]:
    """The artifacts that wait in the folder of the recordings; this process sees to them from now on."""
    from memtrack.artifacts.pending import leftovers

    states = sorted(glob.glob(os.path.join(glob.escape(directory), "artifacts", "*", "")))
    return [left for state in states for left in leftovers(state)]


def store(left: Left, status: Status) -> tuple[str, bool]:
    """Store an artifact. Returns what to say of it, and whether it is stored."""
    from rich.markup import escape

    from memtrack.artifacts.fetch import open_store
    from memtrack.artifacts.upload import Upload
    from memtrack.artifacts.uploader import Task, current
    from memtrack.errors import MemtrackError

    name = left.job.name
    try:
        opened, _ = open_store(left.source)
    except MemtrackError as exc:
        left.pending.leave()
        return f"{name}: {exc}", False
    upload = Upload(name, left.source)
    current().add(Task(upload, opened, left.job, left.pending))
    waited_s, seen = 0.0, -1
    while not upload.wait(0.2) and not upload.is_over and waited_s < PATIENCE_S:
        status.update(escape(f"storing {upload}"))
        waited_s = 0.0 if upload.bytes_done != seen else waited_s + 0.2
        seen = upload.bytes_done
    if not upload.is_over:
        current().give_up()
    return f"{upload}", upload.done
