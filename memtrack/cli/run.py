"""``memtrack run -- CMD``: run a command and monitor it from its first moment."""

from __future__ import annotations

from typing import Annotated

import typer

from memtrack.cli.options import CpuBudget, Directory, Interval, RecordingSize, Tick, settings


def run(
    command: Annotated[list[str], typer.Argument(metavar="CMD", show_default=False, help="What to run.")],
    interval: Interval = None,
    tick: Tick = None,
    recording_size: RecordingSize = None,
    directory: Directory = None,
    cpu_budget: CpuBudget = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no summary.")] = False,
    no_autolog: Annotated[
        bool, typer.Option("--no-autolog", help="Leave it to the program to feed MLflow, W&B and Comet.")
    ] = False,
) -> None:
    """Run a command, any command, and monitor it: memtrack run -- python train.py

    Signals are passed on, the exit status is that of the command. At the end the summary goes to stderr; the recording
    stays, see `memtrack report`. The runs that Python programs start in MLflow, W&B or Comet get the charts, as with
    memtrack.autolog().
    """
    from memtrack.cli import launcher

    given = {
        "interval": interval,
        "tick": tick,
        "recording_size": recording_size,
        "directory": directory,
        "cpu_budget": cpu_budget,
    }
    resolved = settings(**given)
    if resolved.disable:
        raise typer.Exit(launcher.replace(command))
    environment = launcher.child_environment(resolved, [name for name, value in given.items() if value is not None])
    environment = launcher.with_autolog(environment, wanted=not no_autolog)
    raise typer.Exit(launcher.launch(command, resolved, environment, quiet=quiet))
