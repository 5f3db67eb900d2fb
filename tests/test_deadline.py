"""rollout.deadline: what takes too long is a failed rollout, whatever its code makes of it."""

from __future__ import annotations

import asyncio

import pytest

from mgrpo.environments.episode import Episode
from mgrpo.errors import InfrastructureError
from mgrpo.types import Rollout
from tests.play_kit import SlowEngine, one_turn, played

LONG = 3600.0


async def _solo(episode: Episode) -> Rollout:
    await one_turn(episode, "main")
    return episode.finish(1.0)


async def _stuck(episode: Episode) -> Rollout:
    await one_turn(episode, "sub")
    await one_turn(episode, "sub")
    await asyncio.Event().wait()
    return await _solo(episode)


def test_a_rollout_that_takes_too_long_has_failed() -> None:
    """By kind, with the bound and what it had done; the engine holds nothing of it."""
    engine = SlowEngine()
    result = played(_stuck, engine, deadline=0.05)
    assert result.rollout is None and result.kind == "deadline" and result.calls == 2
    assert "q/0 had not ended after 0.05 s (rollout.deadline), in attempt 0 with 2 calls" in result.failure
    assert result.seconds >= 0.05 and not engine.talking and not engine.held


def test_the_deadline_is_of_all_attempts_together() -> None:
    """An attempt that failed before is no new beginning."""

    async def script(episode: Episode) -> Rollout:
        return await _stuck(episode) if episode.attempt else await _raise()

    async def _raise() -> Rollout:
        raise InfrastructureError("the search is down")

    result = played(script, deadline=0.05)
    assert (result.kind, result.attempt) == ("deadline", 1)


@pytest.mark.parametrize("error", [InfrastructureError, KeyError])
def test_code_that_makes_an_error_of_its_cancellation_is_late_all_the_same(error: type[Exception]) -> None:
    """It is neither tried again nor counted as the task's failure."""
    attempts = 0

    async def script(episode: Episode) -> Rollout:
        nonlocal attempts
        attempts += 1
        try:
            return await _stuck(episode)
        except asyncio.CancelledError:
            raise error("the tool was interrupted") from None

    assert played(script, deadline=0.05).kind == "deadline" and attempts == 1


def test_what_ends_in_time_is_not_touched() -> None:
    """A time-out of the task's own stays an infrastructure failure."""
    assert played(_solo, deadline=LONG).rollout is not None

    async def script(episode: Episode) -> Rollout:
        await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        return await _solo(episode)

    assert played(script, deadline=LONG).kind == "infrastructure"
