"""What the verbs say: to whom, and in which colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def stdout() -> Console:
    """The console for results. Where output is no terminal, tables are not cut to 80 columns."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 160))
    return console


def stderr() -> Console:
    """The console for what is said beside the results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str, status: int) -> int:
    """Say in one red line on stderr what is wrong. Returns ``status``."""
    from memtrack.recording.layout import printable

    stderr().print(f"memtrack: {printable(message)}", style="red", markup=False)
    return status
