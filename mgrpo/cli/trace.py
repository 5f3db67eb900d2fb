"""The command line of `mgrpo trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def trace(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    more: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[MORE]...", help="Its folders on other servers, copied here.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; default: RUN/trace.pftrace.", show_default=False)
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Only these RL steps, both included, from 1 on."),
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="N", help="Only the last N RL steps.", show_default=False)
    ] = None,
) -> None:
    """One timeline of all processes for Perfetto: rollouts, turns, tool calls, waits, claims, steps, weight updates."""
    from rich.console import Console
    from rich.progress import Progress

    from mgrpo.trace.export import Steps, export

    wanted = Steps.parse(steps, last)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("spans", total=None)
        written = export(
            [run, *(more or [])],
            out,
            wanted,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    for line in written.lines():
        print(line)
