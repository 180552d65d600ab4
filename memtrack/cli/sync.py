"""``memtrack sync``: deliver what dead processes left behind, now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memtrack.cli import artifacts
from memtrack.cli.options import Directory, folder

if TYPE_CHECKING:
    from rich.status import Status

    from memtrack.sinks.deliver import Delivered, Outcome

PATIENCE_S = 5.0
"""How long a tracker that does not answer is tried: somebody is watching."""
LOCKED_S = 75.0
"""How long to wait for another process that delivers: longer than it has patience."""


def sync(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", show_default=False, help="Paths or names. Default all in the folder."),
    ] = None,
    directory: Directory = None,
) -> None:
    """Deliver to the trackers what dead or stopped processes left behind, recordings and artifacts.

    The agent does so by itself, and so does the next start in the same folder; this tells how it went. Exits with 1 if
    something remains.
    """
    from memtrack.cli.console import stderr, stdout
    from memtrack.report.recordings import find, undelivered

    path = folder(directory)
    wanted = [find(run, path) for run in runs] if runs else undelivered(path)
    waiting = [] if runs else artifacts.left_behind(path)
    console = stdout()
    if not wanted and not waiting:
        console.print(f"nothing in {path} waits to be delivered", markup=False, soft_wrap=True)
        return
    complete = True
    for recording in wanted:
        with stderr().status(f"delivering {_name(recording)}") as status:
            lines, done = _deliver(recording, status)
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)
        complete = complete and done
    for left in waiting:
        with stderr().status(f"storing {left.job.name}") as status:
            line, done = artifacts.store(left, status)
        console.print(line, markup=False, soft_wrap=True)
        complete = complete and done
    if not complete:
        raise typer.Exit(1)


def _deliver(recording: str, status: Status) -> tuple[list[str], bool]:
    """What to say of a recording, and whether nothing of it remains that could have been delivered."""
    from rich.markup import escape

    from memtrack.analysis.summary import figures_of
    from memtrack.errors import MemtrackError
    from memtrack.sinks.deliver import STILL_LIVE, deliver

    name = _name(recording)

    def on_progress(key: str, windows: int) -> None:
        status.update(escape(f"delivering {name} to {key}: {windows} windows"))

    try:
        outcome: Outcome = deliver(
            recording, figures_of, patience_s=PATIENCE_S, wait_s=LOCKED_S, on_progress=on_progress
        )
    except MemtrackError as exc:
        return [f"{name}: {exc}"], False
    if outcome.skipped:
        return [f"{name}: skipped, {outcome.skipped}"], outcome.skipped == STILL_LIVE
    if not outcome.feeds:
        return [f"{name}: nothing waits to be delivered"], True
    return [f"{name}: {describe(feed)}" for feed in outcome.feeds], outcome.complete


def describe(feed: Delivered) -> str:
    """A line on what came of a feed."""
    parts = [f"{feed.windows} windows delivered" + (f" ({feed.merged} of them merged)" if feed.merged else "")]
    if feed.dropped:
        parts.append(f"{feed.dropped} refused")
    if not feed.done:
        parts.append(f"{feed.left} wait")
    return f"{feed.key}: {', '.join(parts)}" + (f": {feed.reason}" if feed.reason else "")


def _name(recording: str) -> str:
    import os

    return os.path.basename(recording).removesuffix(".mtk")
