"""The options that several verbs share; each is a setting of the same name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memtrack import config

if TYPE_CHECKING:
    from memtrack.config import Settings

Interval = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Length of a window, one point of a chart: 1, 500ms. Default 1 s."),
]
Tick = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Time between two samples while memory moves. Default 100ms."),
]
RecordingSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Size of the recording, which never grows. Default 4MiB.")
]
CpuBudget = Annotated[
    float | None,
    typer.Option(metavar="PERCENT", help="Share of one core that the agent may take. Default 0.2."),
]
Directory = Annotated[
    str | None,
    typer.Option(
        "--directory", "-d", metavar="FOLDER", help="Folder of recordings. Default .memtrack, or MEMTRACK_DIR."
    ),
]


def settings(**options: object) -> Settings:
    """Settings from options (None: not given) and the environment. Raises SettingsError, which names the option."""
    from memtrack.errors import SettingsError

    try:
        return config.resolve(options)
    except SettingsError as exc:
        if exc.name not in options:
            raise
        fix = str(exc).partition(": ")[2]
        raise SettingsError(f"--{exc.name.replace('_', '-')}", exc.value, fix) from None


def folder(directory: str | None) -> str:
    """Absolute path of the folder of recordings, which need not be there."""
    return config.find_directory(settings(directory=directory))
