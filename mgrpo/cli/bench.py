"""`mgrpo bench`: a run's policies on question sets, each question several times."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgrpo.errors import ConfigError

if TYPE_CHECKING:
    from mgrpo.cli.question_sets import NamedSet
    from mgrpo.cli.repeats import Player
    from mgrpo.config import RunConfig
    from mgrpo.environments.task import Question
    from mgrpo.run.progress import Display

Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="TAG=VALUE,...", help="Only questions with this tag; repeatable."),
]


def bench(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    sets: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="NAME=SOURCE:PATH", help="A question set; repeatable.", show_default=False
        ),
    ],
    repeats: Annotated[
        int | None, typer.Option(help="Rollouts of each question; default 3, or 1 with --greedy.")
    ] = None,
    where: Where = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each set.")] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The likeliest tokens, one rollout a question.")
    ] = False,
    before: Annotated[bool, typer.Option("--before", help="The policies from before RL.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the rollouts.")] = 0,
    redact: Annotated[
        bool | None,
        typer.Option(
            "--redact/--no-redact", help="Keep no question, gold or answer; always so for secret sets."
        ),
    ] = None,
) -> None:
    """Benchmarks: avg@n with its standard error and pass@n of a run's policies, by tag, failed rollouts counted beside.

    Writes bench-NAME.json into the run's folder. Started again after an interruption, it goes on."""
    from mgrpo.cli.question_sets import TASK, named_set, parse_where

    n = repeats if repeats is not None else 1 if greedy else 3
    if n < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"--repeats {n}, --limit {limit}: expected at least 1")
    if greedy and n != 1:
        raise ConfigError(f"--greedy with --repeats {n}: every repeat would be the same")
    if not run.is_dir():
        raise ConfigError(f"{run}: not a run's folder")
    named = [named_set(text) for text in sets]
    if twice := {s.name for s in named if [t.name for t in named].count(s.name) > 1}:
        raise ConfigError(f"--set: {min(twice)!r} names two sets")
    plan = _Plan(run, n, greedy, before, seed, redact)
    tags = parse_where(where or [])
    if any(s.source == TASK for s in named) and tags:
        raise ConfigError("--where chooses among the questions of files, not of the task's own")
    run_bench(plan, named, tags, limit)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the sets are played."""

    run: Path
    repeats: int
    greedy: bool
    before: bool
    seed: int
    redact: bool | None

    def report(self, name: str) -> Path:
        return (
            self.run
            / f"bench-{name}{'-before' if self.before else ''}{'-greedy' if self.greedy else ''}.json"
        )


def run_bench(
    plan: _Plan, named: Sequence[NamedSet], where: Mapping[str, Sequence[str]] | None, limit: int | None
) -> None:
    """Play the sets one after the other; a report and a table each."""
    import torch

    from mgrpo.cli.evaluate import load_agents
    from mgrpo.cli.question_sets import policies_of, questions_of
    from mgrpo.cli.repeats import Player
    from mgrpo.run.processes import load_run_task
    from mgrpo.run.progress import Display

    config, paths = policies_of(plan.run, plan.before)
    task = load_run_task(config)
    read = [(s, questions_of(s.source, s.path, task, where=where, limit=limit)) for s in named]
    for chosen, questions in read:
        if plan.redact is False and any(q.secret for q in questions):
            raise ConfigError(
                f"--no-redact: {chosen.label} must not be published, and nothing of it may lie on a disk"
            )
    torch.set_num_threads(config.rollout.threads)
    agents = load_agents(config.agents, config.rollout.slots, paths, greedy=plan.greedy)

    async def all_sets(display: Display) -> None:
        async with Player(config, task, agents) as player:
            for chosen, questions in read:
                await _one_set(plan, config, paths, chosen, questions, player, display, task.digests())

    with Display() as display:
        asyncio.run(all_sets(display))


async def _one_set(
    plan: _Plan, config: RunConfig, paths: Mapping[str, Path], chosen: NamedSet, questions: Sequence[Question],
    player: Player, display: Display, digests: Mapping[str, str],
) -> None:  # fmt: skip
    from mgrpo.cli.bench_report import bench_report, table_of
    from mgrpo.cli.question_sets import Counter, header_of
    from mgrpo.cli.repeats import Journal, Repeats
    from mgrpo.files import write_atomic

    out = plan.report(chosen.name)
    journal_path = out.with_name(f".{out.stem}.journal.jsonl")
    redact = bool(plan.redact) or any(q.secret for q in questions)
    what = Repeats(questions, plan.repeats, plan.seed, redact)
    settings = {"repeats": plan.repeats, "seed": plan.seed, "greedy": plan.greedy, "redacted": redact}
    header = header_of(config, paths, chosen.label, questions, digests=dict(digests), **settings)
    with Journal(journal_path, header) as journal:
        total = len(questions) * plan.repeats
        await player.play(
            what, journal, Counter(display, chosen.name, total - len(what.missing(journal)), total)
        )
        report = bench_report(chosen.name, header | {"folder": str(plan.run)}, what, journal)
        write_atomic(out, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        whole = not what.missing(journal)
    if whole:
        journal_path.unlink()
    display.console.print(table_of(report))
    display.line(
        f"{chosen.name}: {out}" + ("" if whole else "; started again, it plays what failed once more")
    )
