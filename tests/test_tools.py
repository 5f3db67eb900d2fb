"""Episode.tool: what is tried again and what is not, how it is measured, and that nothing else of a rollout changes."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import socket
import threading
import urllib.error
from collections.abc import Callable
from typing import Any

import pytest

from mgrpo.environments.episode import Episode
from mgrpo.environments.tools import passes
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.pipeline.play import ATTEMPTS, RolloutResult
from mgrpo.pipeline.rollout_metrics import RolloutMetrics
from mgrpo.types import Rollout
from tests.play_kit import SlowEngine, one_turn, played, team

FAST: dict[str, Any] = {"backoff": 0.001}


class Flaky:
    """Fails with `error` the first `times` times; counts its calls."""

    def __init__(self, times: int, error: BaseException | None = None) -> None:
        self.left, self.calls = times, 0
        self.error = error or InfrastructureError("the search is down")

    async def search(self, word: str) -> str:
        return self.look_up(word)

    def look_up(self, word: str) -> str:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return f"found {word}"


def rollout_of(use: Callable[[Episode], Any]) -> RolloutResult:
    """The rollout whose main agent speaks around `use(episode)`."""

    async def script(episode: Episode) -> Rollout:
        await use(episode)
        await one_turn(episode, "main")
        return episode.finish(1.0)

    return played(script)


def alone(use: Callable[[Episode], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(use(Episode("q", 0, team(SlowEngine()), seed=1)), 60))


@pytest.mark.parametrize("kind", ["async", "thread", "partial", "lambda"])
def test_a_call_is_repeated_and_not_the_rollout(kind: str) -> None:
    """Two failures of three attempts cost two more calls, and are counted; the rollout is its first attempt."""
    tool = Flaky(2)
    call = {
        "async": tool.search,
        "thread": tool.look_up,
        "partial": functools.partial(tool.search),
        "lambda": lambda word: tool.search(word),  # a coroutine that was made in a thread
    }[kind]
    found: list[str] = []

    async def use(episode: Episode) -> None:
        found.append(await episode.tool("search", call, "Suva", **FAST))
        found.append(await episode.tool("search", call, "Apia", **FAST))

    result = rollout_of(use)
    assert found == ["found Suva", "found Apia"] and tool.calls == 4
    assert result.attempt == 0 and result.rollout is not None
    metrics = dict(result.rollout.metrics)
    seconds = metrics.pop("rollout/tool/search/seconds")
    assert len(seconds) == 2 and all(s >= 0 for s in seconds)
    assert metrics == {
        "rollout/tool/search/calls": [2.0],
        "rollout/tool/search/retries": [2.0],
        "rollout/tool/search/failures": [0.0],
    }


def test_a_call_that_fails_to_its_end_has_the_rollout_played_again() -> None:
    """The last resort: three attempts at the call in each of three attempts at the rollout, named by the tool and the
    line that called it; what was measured is in the worker's report although there is no rollout."""
    tool = Flaky(99)
    result = rollout_of(lambda episode: episode.tool("search", tool.look_up, "Suva", **FAST))
    assert tool.calls == 3 * ATTEMPTS and result.attempt == ATTEMPTS - 1
    assert result.rollout is None and result.kind == "infrastructure"
    assert result.failure.startswith(
        "tool 'search' failed in 3 attempts, the last with: the search is down ("
    )
    metrics = RolloutMetrics()
    metrics.take(result)
    report = metrics.report(1.0)
    assert report["rollout/tool/search/calls"] == report["rollout/tool/search/failures"] == ATTEMPTS
    assert report["rollout/tool/search/retries"] == 2 * ATTEMPTS
    assert report["rollout/failed_by_infrastructure"] == 1


def test_counts_go_on_over_the_attempts_at_a_rollout() -> None:
    """A search that fails one attempt and works in the next: both are this rollout's calls."""
    tool = Flaky(1)
    result = rollout_of(lambda episode: episode.tool("search", tool.search, "Suva", attempts=1))
    assert result.attempt == 1 and result.rollout is not None
    assert result.metrics()["rollout/tool/search/calls"] == [2.0]
    assert result.metrics()["rollout/tool/search/failures"] == [1.0]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (InfrastructureError("down"), True),
        (ConnectionResetError("gone"), True),
        (TimeoutError("slow"), True),
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (urllib.error.URLError(ConnectionRefusedError("refused")), True),
        (ExceptionGroup("two", [KeyError("x"), ConnectionError("gone")]), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (urllib.error.URLError("unknown url type"), False),
        (ValueError("no number"), False),
        (ConfigError("no key"), False),
        (ExceptionGroup("two", [ConfigError("no key"), ConnectionError("gone")]), False),
    ],
    ids=repr,
)
def test_only_the_way_to_a_tool_is_tried_again(error: Exception, again: bool) -> None:
    """What was asked is not: the same question has the same answer, and its error keeps its type."""
    tool = Flaky(1, error)
    assert passes(error) is again
    if again:
        assert alone(lambda e: e.tool("search", tool.search, "Suva", **FAST)) == "found Suva"
        return
    with pytest.raises(type(error)) as raised:
        alone(lambda e: e.tool("search", tool.search, "Suva", **FAST))
    assert raised.value is error and tool.calls == 1


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_a_tool_that_hangs_is_left_behind(kind: str) -> None:
    """Each attempt has its own bound; the error says which tool and how long. A thread that comes to its end later
    changes nothing."""
    began, over = 0, threading.Event()

    async def waits() -> str:
        nonlocal began
        began += 1
        await asyncio.sleep(3600)
        return "late"

    def blocks() -> str:
        nonlocal began
        began += 1
        over.wait(60)
        return "late"

    async def use(episode: Episode) -> None:
        call = waits if kind == "async" else blocks
        with pytest.raises(
            InfrastructureError, match=r"tool 'search' failed in 2 attempts.*no answer within 0.05"
        ):
            await episode.tool("search", call, timeout=0.05, attempts=2, **FAST)
        over.set()

    alone(use)
    assert began == 2


def test_an_ended_rollout_ends_its_calls() -> None:
    """A sibling's failure cancels a call and its pause between attempts, and is no failure of the tool."""
    cancelled: list[str] = []
    tool = Flaky(99)

    async def waits() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.append("call")

    async def fails() -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        raise ValueError("another tool's answer is none")

    async def use(episode: Episode) -> None:
        await asyncio.gather(
            episode.tool("search", waits), episode.tool("read", tool.search, "x", backoff=3600.0), fails()
        )

    result = rollout_of(use)
    assert result.kind == "task" and cancelled == ["call"] and tool.calls == 1
    assert result.metrics()["rollout/tool/search/failures"] == [0.0]
    assert result.metrics()["rollout/tool/read/failures"] == [0.0]


def test_calls_run_beside_each_other_and_see_the_rollouts_context() -> None:
    """As many threads as calls, which asyncio's own pool does not have: all of them are in the tool at once. Each sees
    the context variables of the code that called."""
    names = contextvars.ContextVar("names", default="nobody")
    calls = 80
    barrier = threading.Barrier(calls)

    def meets() -> str:
        barrier.wait(60)
        return names.get()

    async def use(episode: Episode) -> list[str]:
        names.set("the rollout")
        return await asyncio.gather(*(episode.tool("meet", meets) for _ in range(calls)))

    assert alone(use) == ["the rollout"] * calls


def test_pauses_follow_from_the_seed_and_change_no_token() -> None:
    """The pause before an attempt doubles, within half of itself, is another for each call, and the same in another
    run. What agents sample does not depend on how often a tool failed."""

    def pauses(seed: int, monkey: pytest.MonkeyPatch) -> list[float]:
        asked: list[float] = []
        sleep = asyncio.sleep

        async def recorded(seconds: float) -> None:
            asked.append(seconds)
            await sleep(0)

        async def use() -> None:
            episode = Episode("q", 0, team(SlowEngine()), seed=seed)
            monkey.setattr("mgrpo.environments.tools.asyncio.sleep", recorded)
            try:
                for _ in range(2):
                    await episode.tool("search", Flaky(2).search, "x")
            finally:
                monkey.undo()

        asyncio.run(use())
        return asked

    with pytest.MonkeyPatch.context() as monkey:
        first, again, other = (pauses(seed, monkey) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 4
    assert all(0.25 <= pause <= 0.75 for pause in first[::2]) and all(0.5 <= p <= 1.5 for p in first[1::2])

    smooth, rough = (
        rollout_of(lambda episode, tool=tool: episode.tool("search", tool.search, "x", **FAST))
        for tool in (Flaky(0), Flaky(2))
    )
    assert smooth.rollout is not None and rough.rollout is not None
    assert smooth.rollout.main.tokens.tolist() == rough.rollout.main.tokens.tolist()
    assert smooth.attempt == rough.attempt == 0


def test_no_agent_speaks_within_a_tool() -> None:
    """What was sampled could not be taken back for the next attempt."""
    for what in ("opens", "samples"):

        async def use(episode: Episode, what: str = what) -> None:
            outside = episode.open("sub")
            outside.append("hi")

            async def speaks() -> None:
                if what == "opens":
                    episode.open("main")
                await outside.sample(2, stop=".")

            await episode.tool("ask", speaks, **FAST)

        result = rollout_of(use)
        assert result.kind == "task" and "within tool 'ask', which may be tried again" in result.failure


def test_what_cannot_be_called_is_refused() -> None:
    """Names that are no metric's, bounds that are none, and an episode that has ended."""
    for options, message in (
        ({"attempts": 0}, "attempts 0 must be >= 1"),
        ({"timeout": 0.0}, "timeout 0.0 > 0"),
        ({"backoff": -1.0}, "backoff -1.0 >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            alone(lambda e, options=options: e.tool("search", Flaky(0).search, "x", **options))
    with pytest.raises(ValueError, match="tool 'a/b': expected a name"):
        alone(lambda e: e.tool("a/b", Flaky(0).search, "x"))
    episode = Episode("q", 0, team(SlowEngine()), seed=1)
    episode.end()
    with pytest.raises(asyncio.CancelledError, match="calls no tool: its attempt has ended"):
        asyncio.run(episode.tool("search", Flaky(0).search, "x"))
