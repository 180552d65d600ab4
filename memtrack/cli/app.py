"""The command line as a whole: its verbs, and what becomes of errors."""

from __future__ import annotations

from typing import Annotated, Any

import rich  # noqa: F401 - not used here, but without it no verb gets far: better to know at once
import typer
from typer.core import TyperGroup

from memtrack.cli.attach import attach
from memtrack.cli.console import fail
from memtrack.cli.doctor import doctor
from memtrack.cli.ls import ls
from memtrack.cli.report import report
from memtrack.cli.restore import restore
from memtrack.cli.run import run
from memtrack.cli.sync import sync
from memtrack.errors import MemtrackError


class Verbs(TyperGroup):
    """Errors that memtrack raises on purpose are one line on stderr and status 2; others are bugs: a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MemtrackError as exc:
            raise typer.Exit(fail(str(exc), 2)) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from memtrack import __version__

        typer.echo(f"memtrack {__version__}")
        raise typer.Exit


@app.callback()
def memtrack(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Tells whoever trains a model where the memory went."""


# What follows the command belongs to the command, also what looks like an option.
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command()(attach)
app.command()(ls)
app.command()(report)
app.command()(sync)
app.command()(restore)
app.command()(doctor)
