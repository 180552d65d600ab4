"""``memtrack report``: what a recording tells, on the terminal, as JSON, as a picture."""

from __future__ import annotations

from typing import Annotated

import typer

from memtrack.cli.options import Directory, folder


def report(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", show_default=False, help="Path or name. Default the newest in the folder."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All metrics, not only the default ones.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    png: Annotated[str | None, typer.Option("--png", metavar="FILE", help="Draw the run's memory over time.")] = None,
    directory: Directory = None,
) -> None:
    """Report on a recording, also while it is being made."""
    from memtrack.cli.console import stderr, stdout
    from memtrack.report.data import collect
    from memtrack.report.recordings import find

    data = collect(find(run, folder(directory)), "all" if everything else "default")
    if png is not None:
        from memtrack.report.png import draw

        draw(data, png)
        stderr().print(f"memtrack: wrote {png}", markup=False)
    if as_json:
        from memtrack.report.json_ import encode

        typer.echo(encode(data))
    elif png is None:
        from memtrack.report.terminal import show

        show(data, stdout())
