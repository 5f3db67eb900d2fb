"""What a rollout leaves in the record of spans: all its attempts, turns and tool calls, and no word of its question."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgrpo.config.run import RecordConfig
from mgrpo.environments.episode import Episode
from mgrpo.environments.failure import Failure
from mgrpo.environments.task import Question
from mgrpo.errors import InfrastructureError
from mgrpo.pipeline.play import RolloutRequest, Unasked, play
from mgrpo.record import spans
from mgrpo.record.span_reader import SpanReader
from mgrpo.record.spans import Span, SpanLog
from mgrpo.types import Rollout
from tests.play_kit import GivenTask, SlowEngine, one_turn, played, team


class Kept:
    """A log of spans and what is in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.log = SpanLog(RecordConfig(), folder / "rollouts" / "0", "rollout-0", print)

    def read(self) -> list[Span]:
        self.log.close()
        return SpanReader([self._folder]).spans()["rollout-0"]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    found = Kept(tmp_path)
    spans.record_to(found.log)
    yield found
    spans.record_to(None)


def of(found: list[Span], kind: str, *names: str) -> list[tuple[object, ...]]:
    """Name and args of the spans of a kind, by start."""
    return [(s.name, *(s.args[name] for name in names)) for s in found if s.kind == kind]


def test_every_attempt_is_there(kept: Kept) -> None:
    """A turn that was cut short has sampled nothing; the rollout's span holds both attempts, each invocation its
    turns."""

    async def script(episode: Episode) -> Rollout:
        sub = asyncio.create_task(one_turn(episode, "sub"))
        if episode.attempt == 0:
            await asyncio.sleep(0)
            raise InfrastructureError("the search is down")
        await sub
        await one_turn(episode, "main")
        return episode.finish(0.5)

    assert played(script, SlowEngine(turns=20)).rollout is not None
    found = kept.read()
    (rollout,) = (s for s in found if s.kind == "rollout")
    assert rollout.lane == rollout.name == "q/0" and {s.lane for s in found} == {"q/0"}
    assert rollout.args == {"split": "train", "status": "ok", "failed_by": "", "correct": 0.5, "attempts": 2}
    assert of(found, "turn", "invocation", "attempt", "turn", "sampled") == [
        ("sub", 0, 0, 0, 0), ("sub", 0, 1, 0, 2), ("main", 0, 1, 0, 2)
    ]  # fmt: skip
    assert of(found, "invocation", "attempt") == [("sub", 0), ("sub", 1), ("main", 1)]
    for turn, invocation in zip(
        (s for s in found if s.kind == "turn"), (s for s in found if s.kind == "invocation"), strict=True
    ):
        assert rollout.start <= invocation.start <= turn.start <= turn.end <= invocation.end <= rollout.end


def test_tools_are_there_once_a_call(kept: Kept) -> None:
    """With what was tried again and what failed, also those that do not come through the episode."""
    lost = iter([ConnectionError(), ConnectionError()])

    async def search() -> str:
        if (error := next(lost, None)) is not None:
            raise error
        return "page"

    async def broken() -> str:
        raise KeyError("no such page")

    async def script(episode: Episode) -> Rollout:
        await episode.tool("search", search, backoff=0.0)
        with pytest.raises(KeyError):
            await episode.tool("visit", broken)
        main = episode.open("main")
        main.append("q")
        with main.tool_span("index"):
            pass
        with pytest.raises(LookupError), main.tool_span("index"):
            raise LookupError
        await main.sample(1, ".")
        main.close()
        return episode.finish(1.0)

    assert played(script).rollout is not None
    assert of(kept.read(), "tool", "attempt", "retries", "failed") == [
        ("search", 0, 2, 0), ("visit", 0, 0, 1), ("index", 0, 0, 0), ("index", 0, 0, 1)
    ]  # fmt: skip


def test_invocations_have_the_numbers_of_the_record(kept: Kept) -> None:
    """What the gateway numbers anew at the end is found under these numbers, its turns too."""

    async def script(episode: Episode) -> Rollout:
        for words in ("one", "three"):
            sub = episode.open("sub")
            sub.append(words)
            await sub.sample(1, ".")
            sub.close()
        await one_turn(episode, "main")
        episode.renumber("sub", [1, 0])
        return episode.finish(1.0)

    result = played(script)
    assert result.rollout is not None
    lengths = {t.invocation: len(t) - 1 for t in result.rollout.invocations["sub"]}
    found = [s for s in kept.read() if s.name == "sub"]
    assert of(found, "turn", "invocation", "context") == [("sub", 1, 3), ("sub", 0, 5)]
    assert lengths == {0: 5, 1: 3} and of(found, "invocation", "invocation") == [("sub", 1), ("sub", 0)]


def test_rollouts_that_come_to_nothing_are_there(kept: Kept) -> None:
    """One that failed says by what, one that was cancelled that it was, and so does one without a question."""

    async def fails(episode: Episode) -> Rollout:
        raise KeyError("a bug")

    async def hangs(episode: Episode) -> Rollout:
        await asyncio.Event().wait()
        raise AssertionError

    async def cancelled() -> None:
        request = RolloutRequest("eval/x", Question("q", "a"), 1)
        playing = asyncio.create_task(play(GivenTask(hangs), request, {}, 1))
        for _ in range(5):
            await asyncio.sleep(0)
        playing.cancel()
        await playing

    played(fails)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    unasked = RolloutRequest("q", Unasked("", "", failure=Failure("task", "no question")), 2)
    asyncio.run(play(GivenTask(fails), unasked, {}, 1))
    rollouts = [s for s in kept.read() if s.kind == "rollout"]
    assert [(s.lane, s.args["split"], s.args["status"], s.args["failed_by"]) for s in rollouts] == [
        ("q/0", "train", "failed", "task"),
        ("eval/x/1", "eval", "cancelled", ""),
        ("q/2", "train", "failed", "task"),
    ]


def test_no_word_of_a_rollout_is_kept(kept: Kept, tmp_path: Path) -> None:
    """Neither its question nor its answer, nor what an agent was shown: a secret question may have spans."""

    async def script(episode: Episode) -> Rollout:
        main = episode.open("main")
        main.append("SECRET QUESTION")
        with main.tool_span("index"):
            await main.sample(3, ".")
        main.close()
        return episode.finish(1.0, answer="SECRET ANSWER")

    request = RolloutRequest("q", Question("SECRET QUESTION", "SECRET ANSWER", secret=True), 0)
    asyncio.run(play(GivenTask(script), request, team(SlowEngine()), 1))
    assert len(kept.read()) == 4
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or (b"SECRET" not in (data := path.read_bytes()) and b"xxx" not in data)


def test_nothing_is_kept_where_nobody_records() -> None:
    """A rollout of a bench or a test holds no spans in memory either."""
    held: list[Episode] = []

    async def script(episode: Episode) -> Rollout:
        held.append(episode)
        await one_turn(episode, "main")
        return episode.finish(1.0)

    assert played(script).rollout is not None
    assert all(not conversation._spans._ended for conversation in held[0]._conversations())
