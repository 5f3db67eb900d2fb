"""`mgrpo questions`: look into a question file, and write one of a task's own questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgrpo.errors import ConfigError

if TYPE_CHECKING:
    from mgrpo.benchmarks.check import Check

app = typer.Typer(help="Question files.", no_args_is_help=True, pretty_exceptions_enable=False)
MOST = 8  # problems of a kind that are shown
MOST_VALUES = 20  # of a tag


@app.command()
def check(
    file: Annotated[
        str, typer.Argument(metavar="[SOURCE:]FILE", help="E.g. questions.jsonl, or gaia:metadata.parquet.")
    ],
) -> None:
    """Duplicates, empty and unreadable rows, answers that stand in their question, lengths, tags. Ends with status 1
    where the file cannot be used. No question is shown."""
    from rich.console import Console

    from mgrpo.benchmarks.check import check_questions
    from mgrpo.cli.question_sets import source_and_path

    source, path = source_and_path(file)
    found = check_questions(source, Path(path))
    console = Console(soft_wrap=True, highlight=False)
    _show(found, console.print)
    if found.errors:
        raise typer.Exit(1)


@app.command()
def make(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="A .jsonl file to write.", show_default=False)],
    split: Annotated[str, typer.Option(help="train, validation or heldout.")] = "train",
    n: Annotated[int | None, typer.Option("--n", help="So many; default: all that the task offers.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Write a task's questions to a file that any task over question files reads."""
    from mgrpo.benchmarks.questions import write_questions
    from mgrpo.cli.question_sets import task_questions
    from mgrpo.config import load_config
    from mgrpo.run.processes import load_run_task

    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: expected a .jsonl file in a folder that is there")
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; delete it, or choose another")
    if n is not None and n < 1:
        raise ConfigError(f"--n {n}: expected at least 1")
    questions = task_questions(load_run_task(load_config(config, overrides or [])), split, n)
    write_questions(out, questions)
    print(f"{out}: {len(questions)} questions")


def _show(found: Check, say: Callable[[object], None]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mgrpo.run.text import clean

    say(Text(f"{len(found.questions)} questions, {len(found.errors)} errors"))
    for error in found.errors[:MOST]:
        say(Text(clean(f"error: {error}"), style="red"))
    if len(found.errors) > MOST:
        say(Text(f"and {len(found.errors) - MOST} more errors", style="red"))
    for kind, names in found.warnings.items():
        more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
        say(Text(clean(f"warning: {kind}: {len(names)} ({', '.join(names[:MOST])}{more})"), style="yellow"))
    table = Table("characters", "shortest", "median", "longest")
    for name, (low, middle, high) in found.lengths().items():
        table.add_row(name, str(low), f"{middle:g}", str(high))
    say(table)
    for tag, counts in found.tags().items():
        values = [f"{value or '(without)'} {n}" for value, n in sorted(counts.items())]
        more = f", {len(values) - MOST_VALUES} more values" if len(values) > MOST_VALUES else ""
        say(Text(clean(f"tag {tag}: {', '.join(values[:MOST_VALUES])}{more}")))
    if rated := found.rated():
        say(Text(f"{rated} have a pass rate"))
