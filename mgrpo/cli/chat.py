"""`mgrpo chat`: ask a run's agents a question and watch them work: what each was given, and what each said."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from mgrpo.cli.evaluate import load_agents, policy_paths
from mgrpo.engines.base import SamplingParams
from mgrpo.environments.episode import Agent, Conversation, Episode
from mgrpo.environments.failure import failure_of
from mgrpo.environments.lifetime import close_task
from mgrpo.environments.task import Question, Task
from mgrpo.errors import ConfigError
from mgrpo.pipeline.play import play_attempt
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.processes import load_run_task
from mgrpo.run.text import clean
from mgrpo.types import MAIN, Rollout

Show = Callable[[Conversation, bool, str], None]  # (who, did they say it themselves, what)


class ShownConversation(Conversation):
    """A conversation that is printed as it happens."""

    show: Show

    def append_ids(self, ids: Sequence[int]) -> None:
        super().append_ids(ids)
        self.show(self, False, self.agent.tokenizer.decode(list(ids)))

    def fork(self, ids: Sequence[int]) -> None:
        super().fork(ids)
        self.show(self, False, f"[anew] {self.agent.tokenizer.decode(list(ids))}")

    async def sample_ids(self, params: SamplingParams) -> list[int]:
        ids = await super().sample_ids(params)
        self.show(self, True, self.agent.tokenizer.decode(ids))
        return ids


class ShownEpisode(Episode):
    """An episode whose conversations are printed as they happen."""

    def __init__(self, agents: Mapping[str, Agent], seed: int, show: Show) -> None:
        super().__init__("chat", 0, agents, seed)
        self._show = show

    def conversation(self, agent: Agent, invocation: int, seed: int) -> Conversation:
        made = ShownConversation(agent, self.query, self.rollout, invocation, seed)
        made.show = self._show
        return made


def converse(run: Path, before: bool, sampled: bool, questions: Sequence[str]) -> None:
    """Answer the given questions, or those typed in until the end of the input."""
    folder, config = RunFolder(run), recorded_run(run)
    paths = policy_paths(config, folder, "start" if before else "final")
    if paths is None:
        raise ConfigError(f"{run}: not trained to the end yet; --before asks the policies it starts from")
    torch.set_num_threads(config.rollout.threads)
    task = load_run_task(config)
    agents = load_agents(config.agents, config.rollout.slots, paths, greedy=not sampled)
    console = Console(highlight=False, soft_wrap=True)
    if not questions:
        example = task.questions("heldout", 1)[0]
        console.print(f"A question in the task's own words, e.g. {clean(example.text)!r}; Ctrl-D ends.")
    asked = iter(questions) if questions else iter(lambda: _typed(console), None)
    with asyncio.Runner() as loop:  # one for all questions: what the task opens for one serves the next
        try:
            for seed, text in zip(itertools.count(), asked, strict=False):
                if text.strip():
                    loop.run(ask(task, Question(text.strip(), answer=""), agents, seed, console))
        finally:
            loop.run(close_task(task))


async def ask(
    task: Task, question: Question, agents: Mapping[str, Agent], seed: int, console: Console
) -> Rollout | None:
    """One rollout, shown turn by turn; None when it failed."""

    def show(who: Conversation, own: bool, text: str) -> None:
        is_main = who.agent.role == MAIN
        name = who.agent.role if is_main else f"{who.agent.role} {who.invocation + 1}"
        line = Text("" if is_main else "    ")
        line.append(f"{name:<8}" if own else f"{'':<8}", style="bold cyan" if is_main else "bold magenta")
        line.append(" > " if own else " < ", style="dim")
        line.append(clean(text), style="" if own else "dim")
        console.print(line)

    try:
        rollout = await play_attempt(task, question, ShownEpisode(agents, seed, show))
    except Exception as error:  # of the task's code, a tool or the question as it was typed
        console.print(Text(f"no answer: {clean(failure_of(error, task).text)}", style="red"))
        return None
    answer = rollout.info.get("answer")
    invocations = sum(rollout.d_k().values())
    shown = clean(str(answer)) if answer is not None else "none in the agreed form"
    console.print(Text(f"answer: {shown}   ({invocations} invocations)", style="bold"))
    return rollout


def _typed(console: Console) -> str | None:
    try:
        return console.input("[bold]?[/bold] ")
    except EOFError:
        return None
