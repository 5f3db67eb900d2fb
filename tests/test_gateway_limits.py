"""What the gateway refuses, and how turns and rollouts end: nothing is changed by what is refused, nothing is left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mgrpo.environments.attempt import Attempt
from mgrpo.errors import InfrastructureError
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.turn import TurnRequest
from tests.gateway_kit import (
    FIRST,
    Program,
    Team,
    assistant,
    conversations,
    echo,
    error_of,
    result,
    run,
    tool,
    until,
    user,
)

# -- limits and refusals --


def called(arguments: str) -> TurnRequest:
    """A first request of sub whose history has a call with these arguments."""
    calls = [{"id": "1", "function": {"name": "f", "arguments": arguments}}]
    return TurnRequest("sub", [user("x"), assistant("", tool_calls=calls), user("y")])


@pytest.mark.parametrize(
    ("limits", "requests", "expected"),
    [
        ({"turns": 1}, [TurnRequest("sub", FIRST)], (409, "too_many_turns")),
        ({"invocations": 1}, [TurnRequest("sub", FIRST)], (409, "too_many_invocations")),
        ({}, [TurnRequest("writer", FIRST)], (404, "model_not_found")),
        ({}, [TurnRequest("sub", [])], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", [*FIRST, assistant("Suva is")])], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", [{"role": "user", "content": 3}])], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", [user("\ud800")])], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", [user("x"), result("\ud800", "x")])], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", FIRST, [tool("\ud800")])], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", [{"role": "assistant ", "content": "x"}])], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", FIRST, max_tokens=0)], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", FIRST, stop=("",))], (400, "invalid_messages")),
        ({}, [TurnRequest("sub", [user("x" * 5000)])], (400, "context_length_exceeded")),
        ({}, [TurnRequest("sub", [user("")] * 2001)], (400, "context_length_exceeded")),
        *(
            ({}, [called(arguments)], (400, "invalid_messages"))
            for arguments in (
                "{a",
                "[1]",
                '{"a": NaN}',
                '{"a": -Infinity}',
                '{"a": 1e999}',
                '{"a": "\\ud800"}',
                '{"\\ud800": 1}',
                '{"a": ' + "9" * 5000 + "}",
                *('{"a":' * depth + "1" + "}" * depth for depth in (65, 700, 10_000)),
            )
        ),
    ],
)
def test_what_is_refused_changes_nothing(
    limits: dict[str, Any], requests: list[TurnRequest], expected: tuple[int, str]
) -> None:
    """Status and code; no conversation is opened, nothing is counted, and main goes on."""
    team = Team(echo, **limits)
    program = Program(team, FIRST)

    async def main() -> None:
        await program.ask()
        before, counts = conversations(team), dict(team.rollout.counts)
        for request in requests:
            assert await error_of(team.rollout.turn(request)) == expected
        assert conversations(team) == before
        assert team.rollout.counts == counts
        if "turns" not in limits:
            await program.ask(user("on"))

    run(main)
    team.check()
    assert team.episode.calls() == 0


@pytest.mark.parametrize("history", ["fork", "keep"])
def test_what_is_far_too_long_reaches_no_tokenizer(monkeypatch: pytest.MonkeyPatch, history: str) -> None:
    """A worker's other rollouts would wait for it: its characters are counted first, as a first request, as what
    follows a reply, as a history anew, and as tools."""
    team = Team(echo, history=history)
    program = Program(team, FIRST)

    async def main() -> None:
        await program.ask()
        for role in team.engines:
            chat = team.forms.of(team.episode.agents[role]).chat
            monkeypatch.setattr(chat, "_render", lambda *_, **__: pytest.fail("rendered"))
        long = user("x" * (64 * 2000 + 1))
        asks = [
            TurnRequest("sub", [long]),
            TurnRequest("sub", FIRST, [tool("f" * (64 * 2000))]),
            TurnRequest("main", [*program.messages, long]),
            TurnRequest("main", [*FIRST, assistant("another"), long]),
        ]
        for request in asks:
            assert await error_of(team.rollout.turn(request)) == (400, "context_length_exceeded")

    run(main)


def test_overridden_settings_are_counted_or_refused() -> None:
    """Each request that has any counts once."""
    team = Team(echo)
    team.rollout.overridden(["temperature", "top_p"])
    team.rollout.overridden([])
    assert team.rollout.counts["overridden"] == 1
    strict = Team(echo, sampling="refuse")
    with pytest.raises(
        GatewayError, match="temperature, top_p: turns are sampled as they are trained"
    ) as caught:
        strict.rollout.overridden(["temperature", "top_p"])
    assert (caught.value.status, caught.value.code) == (400, "unsupported_setting")


def test_rewards_are_of_conversations_that_are_there() -> None:
    """A later value replaces an earlier one; what is no score is refused by name."""
    team = Team(echo)
    run(Program(team, FIRST).ask)
    rollout = team.rollout
    rollout.reward("main", 0, "format", 0.5)
    rollout.reward("main", 0, "format", 1)
    assert rollout.rewards() == {("main", 0): {"format": 1.0}}
    for place, name, value, expected in (
        (("main", 1), "format", 1.0, (404, "invocation_not_found")),
        (("main", -1), "format", 1.0, (404, "invocation_not_found")),
        (("nobody", 0), "format", 1.0, (404, "invocation_not_found")),
        (("main", 0), "no name", 1.0, (400, "invalid_reward")),
        (("main", 0), "format", float("nan"), (400, "invalid_reward")),
        (("main", 0), "format", 1.5, (400, "invalid_reward")),
    ):
        with pytest.raises(GatewayError) as caught:
            rollout.reward(*place, name, value)
        assert (caught.value.status, caught.value.code) == expected
    rollout.end()
    with pytest.raises(GatewayError, match="is over"):
        rollout.reward("main", 0, "format", 1.0)
    assert rollout.rewards() == {("main", 0): {"format": 1.0}}


def test_ids_and_tokens_are_of_one_rollout_alone() -> None:
    """They fit into a URL and are never the same, also of the same rollout played again."""
    teams = [Team(echo) for _ in range(3)]
    texts = {text for team in teams for text in (team.rollout.id, team.rollout.token)}
    assert len(texts) == 6
    assert all(text.replace("-", "").replace("_", "").isalnum() and len(text) > 20 for text in texts)


# -- failures and the end --


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InfrastructureError("the server of main went away"), (503, "engine_unavailable")),
        (ConnectionResetError("reset"), (503, "engine_unavailable")),
        (RuntimeError("a bug"), (500, "internal_error")),
    ],
)
def test_a_failure_of_the_engine_fails_the_attempt(error: Exception, expected: tuple[int, str]) -> None:
    """Whatever the program makes of it: the first one is kept, and no later turn of any agent is sampled."""

    def fails(text: str, seed: int) -> str:
        raise error

    team = Team(fails, sub=echo)

    async def main() -> None:
        assert await error_of(team.rollout.turn(TurnRequest("main", FIRST))) == expected
        assert await error_of(team.rollout.turn(TurnRequest("main", FIRST, repeated=True))) == expected
        assert await error_of(team.rollout.turn(TurnRequest("sub", FIRST))) == expected

    run(main)
    assert team.rollout.failure is error
    assert not team.engines["sub"].asked


def test_a_failure_that_nobody_waits_for_is_kept() -> None:
    """The client has hung up when the engine fails."""
    team = Team(echo)
    engine = team.engines["main"]
    error = InfrastructureError("gone")

    def fails(text: str, seed: int) -> str:
        raise error

    engine.script = fails

    async def main() -> None:
        engine.gate = asyncio.Event()
        turn = asyncio.create_task(team.rollout.turn(TurnRequest("main", FIRST)))
        await until(lambda: bool(engine.asked))
        turn.cancel()
        await asyncio.wait([turn])
        engine.gate.set()
        await until(lambda: team.rollout.failure is not None)

    run(main)
    assert team.rollout.failure is error


def test_turns_end_with_their_attempt() -> None:
    """Turns that were asked for from outside end when the attempt does, and their programs are told that it is over."""
    team: Team | None = None

    async def main() -> None:
        nonlocal team
        attempt = Attempt()
        with attempt:
            team = Team(echo)
        engine = team.engines["main"]
        engine.gate = asyncio.Event()
        turn = asyncio.create_task(team.rollout.turn(TurnRequest("main", FIRST)))
        await until(lambda: bool(engine.asked))
        await attempt.end()
        assert await error_of(turn) == (409, "rollout_over")

    run(main)


@pytest.mark.parametrize("who", ["rollout", "episode"])
def test_a_rollout_that_is_over_says_so(who: str) -> None:
    """Turns under way end, later ones are refused, of the rollout or of the episode behind it."""
    team = Team(echo)
    engine = team.engines["main"]

    async def main() -> None:
        await Program(team, FIRST, "sub").ask()
        engine.gate = asyncio.Event()
        turn = asyncio.create_task(team.rollout.turn(TurnRequest("main", FIRST)))
        await until(lambda: bool(engine.asked))
        if who == "rollout":
            team.rollout.end()
            team.rollout.end()
            assert await error_of(turn) == (409, "rollout_over")
        else:
            team.episode.end()
            engine.gate.set()
            await turn
        later = TurnRequest("sub", [*FIRST, user("another")])
        assert await error_of(team.rollout.turn(later)) == (409, "rollout_over")

    run(main)
    assert team.rollout.failure is None


def test_a_turn_that_nobody_waits_for_is_awaited_at_the_end() -> None:
    """The program gave up on a sub-agent and answered: its turn is whole, or the trajectory could not be trained."""
    team = Team(echo)
    engine = team.engines["sub"]

    async def main() -> None:
        engine.gate = asyncio.Event()
        given_up = asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST)))
        await until(lambda: bool(engine.asked))
        given_up.cancel()
        settled = asyncio.create_task(team.rollout.settle())
        await until(given_up.done)
        assert await error_of(team.rollout.turn(TurnRequest("main", FIRST))) == (409, "rollout_over")
        assert not settled.done()
        engine.gate.set()
        await settled
        await team.rollout.settle()

    run(main)
    team.check()
    assert team.trajectory("sub").loss_mask.any()


def played(order: list[int]) -> list[tuple[list[int], float]]:
    """(tokens, score) of six sub-agents' trajectories as the rollout has them, opened in this order in two stages, of
    which main's second turn is the border."""
    team = Team(echo)
    program = Program(team, FIRST)

    async def main() -> None:
        for stage in (0, 1):
            await program.ask(*([user("on")] if stage else []))
            for number in order:
                if number // 3 == stage:
                    asked = [user(f"question {number // 2}")]  # of 2 and 3 the same, at another time
                    reply = await Program(team, asked, "sub").ask()
                    team.rollout.reward("sub", reply.invocation, "length", len(reply.content) / 100)

    run(main)
    for place, conversation in team.rollout.conversations().items():
        conversation.close(**team.rollout.rewards().get(place, {}))
    team.rollout.arrange()
    rollout = team.episode.finish(1.0)
    assert [t.invocation for t in rollout.invocations["sub"]] == list(range(6))
    opened: Any = rollout.info["opened_at"]
    opened = opened["sub"]
    assert opened == sorted(opened)
    assert len(set(opened)) == 2
    for t in rollout.invocations["sub"]:
        said = team.tokenizer.decode(t.tokens[t.loss_mask == 1]).removesuffix("<|im_end|>")
        assert t.scores["length"] == len(said) / 100
    return [(t.tokens.tolist(), t.scores["length"]) for t in rollout.invocations["sub"]]


def test_numbers_of_invocations_follow_from_what_they_were_asked() -> None:
    """In whatever order requests arrive, the rollout is the same: tokens, scores and numbers."""
    expected = played(list(range(6)))
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 1, 4, 3, 5], [1, 5, 0, 4, 2, 3]):
        assert played(order) == expected


def test_an_episode_is_renumbered_whole() -> None:
    """Numbers that are not all of its conversations' are refused."""
    team = Team(echo)
    for _ in range(2):
        team.episode.open("sub")
    for order in ([0], [0, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="which has 2 conversations"):
            team.episode.renumber("sub", order)


def test_the_first_failure_is_the_one_that_is_kept() -> None:
    """Two turns under way fail one after the other."""
    errors = [InfrastructureError("first"), RuntimeError("second")]
    left = list(errors)

    def fails(text: str, seed: int) -> str:
        raise left.pop(0)

    team = Team(fails)

    async def main() -> None:
        engine = team.engines["sub"]
        engine.gate = asyncio.Event()
        turns = [asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST))) for _ in errors]
        await until(lambda: len(engine.asked) == 2)
        engine.gate.set()
        assert [await error_of(turn) for turn in turns] == [
            (503, "engine_unavailable"),
            (500, "internal_error"),
        ]

    run(main)
    assert team.rollout.failure is errors[0]
