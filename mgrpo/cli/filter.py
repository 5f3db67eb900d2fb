"""`mgrpo filter`: how often a team answers each question, as the second stage of a curriculum and hard sets need it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter as Counted
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgrpo.cli.bench import Where
from mgrpo.errors import ConfigError

if TYPE_CHECKING:
    from mgrpo.benchmarks.statistics import QuestionScores
    from mgrpo.config import RunConfig
    from mgrpo.environments.task import Question


def filter_questions(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run, or a TOML file that names its models.", show_default=False),
    ],
    questions: Annotated[
        str, typer.Option("--questions", metavar="[SOURCE:]FILE", help="The questions.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="A .jsonl file to write.", show_default=False)],
    n: Annotated[int, typer.Option("--n", help="Rollouts of each question.")] = 4,
    where: Where = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions.")] = None,
    closed_book: Annotated[
        bool,
        typer.Option(
            "--closed-book", help="Without tools (task.options.tools = {}): what is known by heart."
        ),
    ] = False,
    before: Annotated[bool, typer.Option("--before", help="The policies from before RL.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the rollouts.")] = 0,
) -> None:
    """The pass rate of each question: the mean outcome of n rollouts with a run's policies, failed ones left out.

    Writes the questions with their pass rates; of a set that must not be published the ids and rates alone. Started
    again after an interruption, it goes on."""
    from mgrpo.cli.question_sets import header_of, parse_where, policies_of, questions_of, source_and_path
    from mgrpo.run.processes import load_run_task

    if n < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"--n {n}, --limit {limit}: expected at least 1")
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: expected a .jsonl file in a folder that is there")
    if out.exists() and not journal_of(out).exists():
        raise ConfigError(f"--out {out}: is there already; delete it, or choose another")
    config, paths = policies_of(run, before)
    if closed_book:
        config = without_tools(config)
    try:
        task = load_run_task(config)
    except ConfigError as error:
        if closed_book:
            raise ConfigError(f"--closed-book sets task.options.tools = {{}}: {error}") from None
        raise
    source, path = source_and_path(questions)
    asked = questions_of(source, path, task, where=parse_where(where or []), limit=limit)
    header = header_of(config, paths, f"{source}:{path}", asked, n=n, seed=seed, digests=dict(task.digests()))
    _measure(config, paths, task, asked, out, header, n, seed)


def journal_of(out: Path) -> Path:
    """Where the rollouts lie until all of them are there."""
    return out.with_name(f".{out.stem}.journal.jsonl")


def without_tools(config: RunConfig) -> RunConfig:
    """The same run with task.options.tools = {}."""
    return config.model_copy(update={"task": config.task.with_options({"tools": {}})})


def _measure(
    config: RunConfig, paths: dict[str, Path], task: Any, asked: Sequence[Question], out: Path,
    header: dict[str, object], n: int, seed: int,
) -> None:  # fmt: skip
    import torch

    from mgrpo.cli.evaluate import load_agents
    from mgrpo.cli.question_sets import Counter
    from mgrpo.cli.repeats import Journal, Player, Repeats
    from mgrpo.run.progress import Display

    torch.set_num_threads(config.rollout.threads)
    what, total = Repeats(asked, n, seed, redact=True), n * len(asked)
    with Display() as display, Journal(journal_of(out), header) as journal:
        agents = load_agents(config.agents, config.rollout.slots, paths)
        count = Counter(display, "filter", total - len(what.missing(journal)), total)

        async def measure() -> None:
            async with Player(config, task, agents) as player:
                await player.play(what, journal, count)

        asyncio.run(measure())
        scores = journal.scores(asked, n)
        write_rates(out, asked, scores)
        whole = not what.missing(journal)
    if whole:
        journal_of(out).unlink()
    _show(scores, out, whole)


def write_rates(out: Path, asked: Sequence[Question], scores: Sequence[QuestionScores]) -> None:
    """The questions with `pass_rate`, and in info how many rollouts were played and failed; of secret ones the id and
    these numbers alone. A question of which no rollout was played has no pass rate."""
    from mgrpo.benchmarks.questions import write_questions
    from mgrpo.files import write_atomic

    if any(q.secret for q in asked):
        lines = [
            {"id": s.id, "played": len(s.scores), "failed": len(s.failed)}
            | ({"pass_rate": s.mean} if s.scores else {})
            for s in scores
        ]
        write_atomic(out, "".join(f"{json.dumps(line)}\n" for line in lines))
        return
    rated = []
    for question, s in zip(asked, scores, strict=True):
        info = {k: v for k, v in question.info.items() if k != "pass_rate"}
        info["rollouts"] = {"played": len(s.scores), "failed": len(s.failed)}
        rated.append(replace(question, info=info | ({"pass_rate": s.mean} if s.scores else {})))
    write_questions(out, rated)


def _show(scores: Sequence[QuestionScores], out: Path, whole: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("pass rate", "questions", title=f"{len(scores)} questions", title_justify="left")
    for rate, count in sorted(Counted(round(s.mean, 4) for s in scores if s.scores).items()):
        table.add_row(f"{rate:.2f}", str(count))
    if none := sum(not s.scores for s in scores):
        table.add_row("none played", str(none))
    failed = Counted(kind for s in scores for kind in s.failed.values())
    console = Console(soft_wrap=True)
    console.print(table)
    words = ", ".join(f"{count} {kind}" for kind, count in sorted(failed.items())) or "0"
    console.print(f"failed rollouts, in no rate: {words}", highlight=False)
    console.print(
        f"{out}" + ("" if whole else "; started again, it plays what failed once more"), highlight=False
    )
