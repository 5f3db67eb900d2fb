"""Whose matter a failure is, and that nothing of a failed attempt lives on."""

from __future__ import annotations

import asyncio
import contextvars
import sys

import pytest

from mgrpo.environments.episode import Episode
from mgrpo.environments.failure import shortened
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.pipeline.play import ATTEMPTS, RolloutResult, evaluate, play_all
from mgrpo.types import Rollout
from tests.play_kit import REQUEST, GivenTask, SlowEngine, one_turn, played, team


async def _solo(episode: Episode) -> Rollout:
    await one_turn(episode, "main")
    return episode.finish(1.0)


def test_sub_agents_side_by_side_survive_a_tool_failure() -> None:
    """One of three sub-agents fails while the others speak: they end before the retry, which uses sessions of its own,
    and the rollout is played."""
    engine, attempts = SlowEngine(turns=20), 0

    async def script(episode: Episode) -> Rollout:
        nonlocal attempts
        attempts += 1

        async def fails() -> None:
            await asyncio.sleep(0)
            if attempts == 1:
                raise InfrastructureError("the search is down")

        await asyncio.gather(one_turn(episode, "sub"), fails(), one_turn(episode, "sub"))
        return await _solo(episode)

    result = played(script, engine)
    assert result.rollout is not None and result.attempt == 1 and attempts == 2
    assert result.rollout.d_k() == {"sub": 2}
    assert engine.begun[:2] == ["q/0/0/sub/0", "q/0/0/sub/1"]  # cut short
    assert sorted(engine.begun[2:]) == ["q/0/1/main/0", "q/0/1/sub/0", "q/0/1/sub/1"]
    assert not engine.talking and not engine.held


@pytest.mark.parametrize("how", ["task", "tool", "deep", "group"])
def test_what_an_attempt_started_ends_with_it(how: str) -> None:
    """Tasks that wait, tasks of tasks and whole task groups are cancelled and awaited before the next attempt."""
    running: list[str] = []

    async def script(episode: Episode) -> Rollout:
        assert not running, f"attempt {episode.attempt} begins while {running} still runs"
        if episode.attempt == ATTEMPTS - 1:
            return await _solo(episode)

        async def waits() -> None:
            running.append(how)
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)  # tidying up may take a while
                running.remove(how)

        async def starts_more() -> None:
            await asyncio.gather(waits(), waits())

        async def group() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(waits())
                tasks.create_task(waits())

        work = {"task": waits, "tool": waits, "deep": starts_more, "group": group}[how]
        kept = asyncio.create_task(work())
        while not running:
            await asyncio.sleep(0)
        assert not kept.done()
        raise InfrastructureError("down")

    assert played(script).rollout is not None and not running


def test_a_task_that_swallows_its_cancellation_does_not_go_on_talking() -> None:
    """It may live a little longer, but the ended attempt gives it no token, and `except Exception` does not help it."""
    engine = SlowEngine()

    async def script(episode: Episode) -> Rollout:
        if episode.attempt:
            return await _solo(episode)

        async def stubborn() -> None:
            for _ in range(3):
                try:
                    await one_turn(episode, "sub")
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    pass
                except Exception:
                    raise AssertionError("the end of an attempt is no Exception") from None

        asyncio.create_task(stubborn())  # noqa: RUF006 - the attempt owns it
        for _ in range(10):
            await asyncio.sleep(0)
        raise InfrastructureError("down")

    assert played(script, engine).attempt == 1
    assert engine.begun == ["q/0/0/sub/0", "q/0/1/main/0"] and not engine.held


def test_what_play_leaves_behind_ends_with_the_rollout() -> None:
    """Also after a success; a task with a context of its own outlives it."""

    async def run() -> tuple[bool, bool]:
        kept: list[asyncio.Task[bool]] = []

        async def script(episode: Episode) -> Rollout:
            wait = asyncio.Event().wait
            kept.append(asyncio.create_task(wait()))
            kept.append(asyncio.create_task(wait(), context=contextvars.Context()))
            return await _solo(episode)

        results: list[RolloutResult] = []

        async def done(result: RolloutResult) -> None:
            results.append(result)

        await play_all(GivenTask(script), [REQUEST], team(SlowEngine()), lambda request: 1, done)
        assert results[0].rollout is not None
        states = kept[0].cancelled(), kept[1].done()
        kept[1].cancel()
        return states

    assert asyncio.run(run()) == (True, False)


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyError("city"), "task", "KeyError: 'city'"),
        (AssertionError("the tool promised"), "task", "the tool promised"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "task", "surrogates"),
        (ValueError("\ud800 \u4f60"), "task", "\\ud800 \u4f60"),
        (RecursionError("too deep"), "task", "too deep"),
        (SystemExit(2), "task", "SystemExit: 2"),
        (asyncio.CancelledError(), "task", "cancelled by something it awaited"),
        (InfrastructureError("the search is down"), "infrastructure", "the search is down"),
        (ConnectionResetError("peer"), "infrastructure", "peer"),
        (TimeoutError("no page"), "infrastructure", "no page"),
        (
            ExceptionGroup("of a TaskGroup", [KeyError("x"), InfrastructureError("down")]),
            "infrastructure",
            "down",
        ),
        (ExceptionGroup("of a TaskGroup", [KeyError("x")]), "task", "KeyError: 'x'"),
    ],
)
def test_one_rollouts_trouble_is_its_own(error: BaseException, kind: str, words: str) -> None:
    """What a task, tool or judge raises fails this rollout, by name and place; only infrastructure is tried again."""
    attempts = 0

    async def script(episode: Episode) -> None:
        nonlocal attempts
        attempts += 1
        _raise(error)

    result = played(script)
    assert result.rollout is None and result.kind == kind and words in result.failure
    assert attempts == (ATTEMPTS if kind == "infrastructure" else 1)
    result.failure.encode()
    if not isinstance(error, ExceptionGroup | asyncio.CancelledError):
        line = _raise.__code__.co_firstlineno + 1
        assert f"{__file__}:{line}, in _raise" in result.failure


def test_the_place_is_in_the_tasks_code() -> None:
    """An error from deep inside a library points at the line of the task that called it."""

    async def script(episode: Episode) -> None:
        await asyncio.gather(one_turn(episode, "main"), one_turn(episode, "nobody"))

    result = played(script)
    assert "unknown role 'nobody'" in result.failure and "play_kit.py:" in result.failure
    assert "in one_turn)" in result.failure


def _broken_assertion() -> None:
    scope = {"__name__": "mgrpo.environments.episode"}
    exec("def check():\n    assert False, 'our own'", scope)
    scope["check"]()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("raises", "error"),
    [
        (lambda: _raise(ConfigError("no chat template")), ConfigError),
        (lambda: _raise(MemoryError()), MemoryError),
        (lambda: _raise(ExceptionGroup("g", [KeyError("x"), ConfigError("no")])), ConfigError),
        (_broken_assertion, AssertionError),
    ],
)
def test_what_would_fail_every_rollout_is_the_programs(raises: object, error: type[Exception]) -> None:
    """A mistake in the config, no memory and our own bugs end the worker."""

    async def script(episode: Episode) -> None:
        raises()  # type: ignore[operator]

    with pytest.raises(error):
        played(script)


def test_cancelling_a_rollout_from_outside_cancels_it() -> None:
    """A worker that leaves is not told of a failed rollout; what the rollout started ends, the engine is free."""
    engine = SlowEngine(turns=sys.maxsize)

    async def script(episode: Episode) -> None:
        await asyncio.gather(one_turn(episode, "main"), one_turn(episode, "sub"))

    async def run() -> None:
        async def done(result: RolloutResult) -> None:
            raise AssertionError(f"a cancelled rollout is none: {result}")

        work = asyncio.create_task(
            play_all(GivenTask(script), [REQUEST], team(engine), lambda request: 1, done)
        )
        while len(engine.talking) < 2:
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert work.cancelled() and not engine.talking and not engine.held

    asyncio.run(run())


@pytest.mark.parametrize(
    ("returned", "words"),
    [(None, "returned None"), ("done", "type str"), ("foreign", r"another Rollout \(other/9\)")],
)
def test_play_returns_its_episodes_rollout(returned: object, words: str) -> None:
    """None, another type, or a rollout that this episode did not finish: a failed rollout, by name."""

    async def script(episode: Episode) -> object:
        await _solo(episode)
        if returned != "foreign":
            return returned
        return await _solo(Episode("other", 9, episode.agents, 1))

    result = played(script)
    assert result.rollout is None and result.kind == "task"
    assert "expected what episode.finish() returned" in result.failure and "play_kit.py:" in result.failure
    with pytest.raises(Exception, match=words):
        raise ValueError(result.failure)


def test_a_rollout_that_is_not_accepted_has_failed() -> None:
    """What the caller cannot use is a failed rollout with the caller's reason."""
    result = played(_solo, accept=lambda rollout: _raise(ValueError("no score 'expert'")))
    assert result.rollout is None and "no score 'expert'" in result.failure


def test_an_evaluation_counts_failures_beside_the_mean() -> None:
    """One question whose play() raises takes no part in the accuracy; where all do, the reason is named."""

    async def script(episode: Episode) -> Rollout:
        if episode.query.endswith("/1"):
            raise KeyError("city")
        return await _solo(episode)

    async def run(n: int) -> tuple[int, int, float]:
        questions = [REQUEST.question] * n
        result = await evaluate(GivenTask(script), questions, team(SlowEngine()), greedy=False, seed=1)
        return result.n, result.failed, result.mean

    assert asyncio.run(run(3)) == (2, 1, 1.0)

    async def always(episode: Episode) -> None:
        raise KeyError("city")

    with pytest.raises(
        InfrastructureError, match=r"all 2 rollouts of an evaluation .*'city' \(.*test_play\.py:\d+"
    ):
        asyncio.run(
            evaluate(GivenTask(always), [REQUEST.question] * 2, team(SlowEngine()), greedy=True, seed=1)
        )


def test_reasons_are_cut_to_bytes_and_keep_their_place() -> None:
    """The store takes 256 bytes: no character is torn, and the end, where the place stands, is kept."""
    place = " (task.py:7, in play)"
    for text in ("x" * 900 + place, "\u4f60" * 300 + place, "\ud800" * 90 + place):
        short = shortened(text, tail=120)
        assert len(short.encode()) <= 256 and short.endswith(place)
    assert shortened("\u4f60" * 200) == "\u4f60" * 85 and shortened("short") == "short"
