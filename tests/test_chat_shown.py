"""`mgrpo chat` shows what happens, and leaves nothing behind of a question that failed."""

from __future__ import annotations

import asyncio
import io

from rich.console import Console

from mgrpo.cli.chat import ask
from mgrpo.environments.task import Question
from mgrpo.errors import RolloutError
from mgrpo.gateway.harness import Access
from tests.harness_kit import Engine, FunctionTask, agents, echo
from tests.harness_kit import ask as turn
from tests.research_kit import FIJI


def shown(task: FunctionTask, engine: Engine) -> str:
    """What is printed of one question."""
    out = io.StringIO()

    async def main() -> None:
        try:
            await ask(task, FIJI, agents(engine), 1, Console(file=out, width=500))
        finally:
            await task.close()

    asyncio.run(main())
    return out.getvalue()


def test_a_new_segment_is_shown() -> None:
    """What the policy sees from there on, whole."""

    async def run(question: Question, base_url: Access) -> object:
        await turn(base_url, "main", "the first")
        await turn(base_url, "main", "in short", "it went well", "the second")
        return "done"

    text = shown(FunctionTask(run, {"gateway": {"history": "fork"}}), Engine(echo))
    lines = text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if "[anew]" in line]
    assert "in short" not in "".join(lines[:at]) and "in short" in "".join(lines[at:])
    assert "said the second" in text and "answer: done" in text


def test_a_question_that_failed_leaves_nothing() -> None:
    """Its error is shown; the engine holds no session of it, and its turns have ended."""

    async def run(question: Question, base_url: Access) -> object:
        await turn(base_url, "main", "x")
        raise RolloutError("the team is at odds")

    engine = Engine(echo)
    assert "no answer: the team is at odds" in shown(FunctionTask(run), engine)
    assert not engine.held
