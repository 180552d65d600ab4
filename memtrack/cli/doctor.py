"""``memtrack doctor``: what can be measured here, and what cannot and why."""

from __future__ import annotations

from typing import Annotated

import typer

from memtrack.cli.options import Directory


def doctor(
    directory: Directory = None,
    legend: Annotated[bool, typer.Option("--metrics/--no-metrics", help="List every metric and its meaning.")] = True,
) -> None:
    """Say what memtrack can measure on this machine. Exit status 1 if monitoring would not work."""
    from rich.markup import escape
    from rich.table import Table

    from memtrack.cli import checks
    from memtrack.cli.console import stdout
    from memtrack.metrics import PATTERNS, TABLE, peak_name

    console = stdout()
    styles = {checks.OK: "green", checks.NOTE: "yellow", checks.BAD: "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    found = list(checks.all_checks(directory))
    for check in found:
        table.add_row(f"[{styles[check.state]}]{check.state}[/]", check.name, escape(check.text))
    console.print(table)
    if legend:
        metrics = Table(box=None, pad_edge=False, title="\nWhat is recorded", title_justify="left")
        for header in ("metric", "unit", "charted", "meaning"):
            metrics.add_column(header, no_wrap=header == "metric")
        for metric in (*TABLE, *PATTERNS):
            name = metric.name.format("N")
            metrics.add_row(name, metric.unit, "default" if metric.default else "on request", metric.meaning)
            if metric.peak:
                metrics.add_row(peak_name(name), metric.unit, "default", "its highest value in each window")
        console.print(metrics)
    if any(check.state == checks.BAD for check in found):
        console.print("\n[red]memtrack cannot monitor here.[/]")
        raise typer.Exit(1)
