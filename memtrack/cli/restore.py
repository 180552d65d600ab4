"""``memtrack restore``: an artifact back from a tracker or a folder, byte for byte."""

from __future__ import annotations

from typing import Annotated

import typer


def restore(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="mlflow:RUN_ID/NAME, wandb:…/NAME, comet:…/NAME, or FOLDER/NAME. "
            "The name of a series of checkpoints is its newest.",
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="Where to. Default here.")] = ".",
    file: Annotated[
        str | None, typer.Option("--file", metavar="PATH", help="Only this file of a folder.", show_default=False)
    ] = None,
    tensor: Annotated[
        str | None,
        typer.Option("--tensor", metavar="NAME", help="Only this tensor, as NAME.safetensors.", show_default=False),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="Refuse more. Default what the disk has free."),
    ] = None,
) -> None:
    """Restore what memtrack.log_artifact or log_checkpoint has stored."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    import memtrack
    from memtrack import config
    from memtrack.cli.console import stderr, stdout

    columns = (TextColumn("restoring"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as progress:
        bar = progress.add_task("")
        path = memtrack.restore(
            artifact,
            to,
            file=file,
            tensor=tensor,
            max_bytes=None if max_size is None else config.size_bytes("--max-size", max_size),
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    stdout().print(path, markup=False, soft_wrap=True)
