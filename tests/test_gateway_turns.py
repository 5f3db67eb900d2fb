"""Turns at the same time: twins, retries, limits, failures, the end of an attempt; no order of arrival matters."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.environments.attempt import Attempt
from mgrpo.errors import InfrastructureError
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.turn import TurnReply, TurnRequest
from tests.gateway_kit import Program, Team, assistant, result, system, tool, user

FIRST = [system("You answer."), user("capital of Fiji")]
DEADLINE = 20.0


def echo(text: str, seed: int) -> str:
    """Noise of its own, and how long the history is."""
    return f"the {seed % 9973} says {len(text)}"


def same(text: str, seed: int) -> str:
    """A policy that always says the same."""
    return "so it is"


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """In a loop of its own, with a deadline."""

    async def bounded() -> Any:
        async with asyncio.timeout(DEADLINE):
            return await main()

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something holds."""
    while not condition():
        await asyncio.sleep(0)


async def error_of(turn: Awaitable[TurnReply]) -> tuple[int, str]:
    with pytest.raises(GatewayError) as caught:
        await turn
    return caught.value.status, caught.value.code


def conversations(team: Team) -> dict[tuple[str, int], str]:
    return {place: team.text(*place) for place in team.rollout.conversations()}


# -- twins --


@pytest.mark.parametrize("script", [echo, same])
def test_twins_stay_apart_also_at_the_same_time(script: Any) -> None:
    """Four sub-agents with equal first messages, all at once: four conversations, each with its own questions; of a
    policy that says the same to all, each question has one conversation that goes on with it."""
    team = Team(script)

    async def main() -> None:
        async def twin(number: int) -> None:
            program = Program(team, FIRST, "sub")
            for turn in range(3):
                await program.ask(*([user(f"twin {number} turn {turn}")] if turn else []))

        await asyncio.gather(*map(twin, range(4)))

    run(main)
    team.check()
    texts = conversations(team)
    assert len(texts) == 4
    for text in texts.values():
        seen = {number for number in range(4) if f"twin {number} turn 1" in text}
        assert len(seen) == 1
        assert f"twin {seen.pop()} turn 2" in text
    assert team.rollout.counts["repeated"] == 0


def noises(order: list[int], seed: int) -> dict[str, str]:
    """What each of six sub-agents says first, opened in this order: two each of three questions."""
    team = Team(echo, seed=seed)
    found: dict[str, list[str]] = {}

    async def main() -> None:
        for number in order:
            reply = await Program(team, [system("s"), user(f"question {number // 2}")], "sub").ask()
            found.setdefault(f"question {number // 2}", []).append(f"{reply.id} {reply.content}")

    run(main)
    return {question: sorted(said) for question, said in found.items()}  # type: ignore[misc]


def test_noise_follows_from_the_first_messages_and_not_from_the_order() -> None:
    """The same sub-agents in another order say the same under the same ids; another seed says something else, and so
    does a twin."""
    order = list(range(6))
    expected = noises(order, 1)
    assert all(len(set(said)) == 2 for said in expected.values())
    for shuffle in range(3):
        random.Random(shuffle).shuffle(order)
        assert noises(order, 1) == expected
    assert not set(map(str, noises(order, 2).values())) & set(map(str, expected.values()))


def test_ids_of_calls_tell_twins_apart_whose_histories_are_equal() -> None:
    """Both have called the same tool with the same words: each result goes to the one who asked."""
    call = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
    team = Team(lambda text, seed: "the result" if "found" in text else call)
    programs = [Program(team, FIRST, "sub", tools=[tool("search")]) for _ in range(2)]

    async def main() -> None:
        replies = [await program.ask() for program in programs]
        assert replies[0].tool_calls[0].id != replies[1].tool_calls[0].id
        for number in (1, 0):
            await programs[number].ask(result(replies[number].tool_calls[0].id, f"found {number}"))

    run(main)
    team.check()
    for number in range(2):
        assert f"found {number}" in team.text("sub", number)


# -- requests that are sent again --


def test_a_retry_after_the_turn_gets_the_recorded_reply() -> None:
    """With an SDK's word, and without it where nothing else could be meant; the policy speaks once."""
    team = Team(echo)
    main_agent, sub_agent = Program(team, FIRST), Program(team, FIRST, "sub")

    async def main() -> None:
        for program in (main_agent, sub_agent):
            first = program.request()
            reply = await program.ask()
            assert await team.rollout.turn(TurnRequest(first.role, first.messages, repeated=True)) is reply
            program.messages.append(user("on"))
            second = program.request()
            reply = await program.ask()
            assert await team.rollout.turn(second) is reply
            assert await team.rollout.turn(TurnRequest(second.role, second.messages, repeated=True)) is reply
        assert await team.rollout.turn(second) is reply

    run(main)
    team.check()
    assert team.rollout.counts["turns"] == 4
    assert team.rollout.counts["repeated"] == 7


def test_a_retry_while_the_turn_is_sampled_waits_for_it() -> None:
    """The first client hangs up; its turn goes on, and both it and the retry are answered by it."""
    team = Team(echo)
    engine = team.engines["main"]

    async def main() -> None:
        engine.gate = asyncio.Event()
        request = TurnRequest("main", FIRST)
        hung_up = asyncio.create_task(team.rollout.turn(request))
        await until(lambda: bool(engine.asked))
        hung_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hung_up
        retries = [
            asyncio.create_task(team.rollout.turn(TurnRequest("main", FIRST, repeated=flag))) for flag in (True, False)
        ]
        await until(lambda: team.rollout.counts["repeated"] == 2)
        engine.gate.set()
        one, other = await asyncio.gather(*retries)
        assert one is other

    run(main)
    team.check()
    assert len(engine.asked) == 1


def test_a_retry_of_a_twin_gets_the_reply_that_was_lost() -> None:
    """Of several equal first requests the one whose client hung up is answered."""
    team = Team(echo)
    engine = team.engines["sub"]

    async def main() -> None:
        first = await Program(team, FIRST, "sub").ask()
        engine.gate = asyncio.Event()
        hung_up = asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST)))
        await until(lambda: len(engine.asked) == 2)
        third = asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST)))
        await until(lambda: len(engine.asked) == 3)
        hung_up.cancel()
        await asyncio.wait([hung_up])
        engine.gate.set()
        retry = await team.rollout.turn(TurnRequest("sub", FIRST, repeated=True))
        assert retry.invocation == 1
        assert {first.invocation, (await third).invocation} == {0, 2}

    run(main)
    assert len(engine.asked) == 3


def test_a_retry_of_what_was_too_much_is_a_turn_of_its_own() -> None:
    """An SDK sends again what was refused with 429: it gets no twin's reply."""
    team = Team(echo, concurrent_turns=1)
    engine = team.engines["sub"]

    async def main() -> None:
        engine.gate = asyncio.Event()
        one = asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST)))
        await until(lambda: bool(engine.asked))
        assert await error_of(team.rollout.turn(TurnRequest("sub", FIRST))) == (429, "too_many_concurrent_turns")
        engine.gate.set()
        assert (await one).invocation == 0
        again = TurnRequest("sub", FIRST, repeated=True)
        assert (await team.rollout.turn(again)).invocation == 1
        assert (await team.rollout.turn(again)).invocation == 1

    run(main)
    assert team.rollout.counts["repeated"] == 1


def test_the_same_words_under_other_terms_are_no_retry() -> None:
    """A repetition has the same tools, bound and stop texts; main cannot be asked anew with others."""
    team = Team(echo)

    async def main() -> None:
        await team.rollout.turn(TurnRequest("main", FIRST, max_tokens=50))
        other = TurnRequest("main", FIRST, max_tokens=60, repeated=True)
        assert await error_of(team.rollout.turn(other)) == (409, "history_rewritten")

    run(main)


# -- one conversation, several requests --


def test_a_busy_conversation_is_not_extended() -> None:
    """Main samples; whatever else it is asked meanwhile is refused by name, under every policy."""
    for history in ("exact", "keep", "fork"):
        team = Team(echo, history=history)
        engine = team.engines["main"]

        async def main(team: Team = team, engine: Any = engine) -> None:
            engine.gate = asyncio.Event()
            turn = asyncio.create_task(team.rollout.turn(TurnRequest("main", FIRST)))
            await until(lambda: bool(engine.asked))
            other = TurnRequest("main", [system("summary"), user("x")])
            assert await error_of(team.rollout.turn(other)) == (409, "conversation_busy")
            engine.gate.set()
            await turn

        run(main)
        team.check()


def test_a_branch_is_refused_and_forks_where_that_is_allowed() -> None:
    """Two ways on from one reply: the first goes on; the second is another history of the same conversation."""
    for history, segments in (("exact", 1), ("keep", 1), ("fork", 2)):
        team = Team(echo, history=history)
        program = Program(team, FIRST, "sub")

        async def main(team: Team = team, program: Program = program, history: str = history) -> None:
            await program.ask()
            branch = TurnRequest("sub", [*program.messages, user("that way")])
            await program.ask(user("this way"))
            if history == "fork":
                await team.rollout.turn(branch)
            else:
                assert await error_of(team.rollout.turn(branch)) == (409, "history_rewritten")

        run(main)
        team.check()
        assert len(team.rollout.conversations()) == 1
        assert team.rollout.conversations()["sub", 0].segments == segments


def test_an_invocation_that_the_program_names() -> None:
    """The number says which conversation is meant, and a summary is a segment of it; the next number opens one."""
    team = Team(echo, history="fork")

    async def main() -> None:
        for number in range(2):
            reply = await team.rollout.turn(TurnRequest("sub", FIRST, invocation=number))
            assert reply.invocation == number
        summary = TurnRequest("sub", [system("summary"), user("x")], invocation=0)
        assert (await team.rollout.turn(summary)).invocation == 0
        for number in (3, -1):
            request = TurnRequest("sub", FIRST, invocation=number)
            assert await error_of(team.rollout.turn(request)) == (404, "invocation_not_found")

    run(main)
    team.check()
    assert [c.segments for c in team.rollout.conversations().values()] == [2, 1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_order_mixes_conversations(data: st.DataObject) -> None:
    """Conversations of equal and of different first messages, of both roles, whose turns begin and end in any order:
    every turn goes on with its own history, none is refused, and all is trained as it was sampled."""
    script = data.draw(st.sampled_from([echo, same]))
    team = Team(script, max_length=4000)
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=6))
    programs = [Program(team, [system("s"), user(f"question {q}")], "sub") for q, _ in shapes]
    programs.append(Program(team, FIRST))
    left = [turns for _, turns in shapes] + [3]

    async def main() -> None:
        gates: dict[int, asyncio.Event] = {}
        running: dict[int, asyncio.Task[TurnReply]] = {}
        while any(left) or running:
            may_begin = [i for i, turns in enumerate(left) if turns and i not in running]
            choice = data.draw(st.sampled_from([*may_begin, *(-1 - i for i in running)]))
            if choice >= 0:
                program, engine = programs[choice], team.engines[programs[choice].role]
                gate = engine.gate = gates[choice] = asyncio.Event()
                new = [user(f"of {choice}")] if program.replies else []
                asked = len(engine.asked)
                running[choice] = asyncio.create_task(program.ask(*new))
                await until(lambda e=engine, n=asked: len(e.asked) > n)  # type: ignore[misc]
                engine.gate = gate
                left[choice] -= 1
            else:
                number = -1 - choice
                gates.pop(number).set()
                await running.pop(number)

    run(main)
    team.check()
    assert team.rollout.counts["repeated"] == 0
    assert len(team.rollout.conversations()) == len(programs)
    for number, program in enumerate(programs):
        if script is same and program.role == "sub":
            continue  # twins that say the same may change places; below: they do not mix
        places = {reply.invocation for reply in program.replies}
        assert len(places) == 1
        text = team.text(program.role, places.pop())
        assert text.count(f"of {number}") == len(program.replies) - 1
    for text in conversations(team).values():
        assert sum(f"of {number}<" in text for number in range(len(programs))) <= 1


# -- limits and refusals --


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
        (
            {},
            [
                TurnRequest(
                    "sub",
                    [
                        user("x"),
                        assistant("", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{a"}}]),
                        user("y"),
                    ],
                )
            ],
            (400, "invalid_messages"),
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


def test_overridden_settings_are_counted_or_refused() -> None:
    """Each request that has any counts once."""
    team = Team(echo)
    team.rollout.overridden(["temperature", "top_p"])
    team.rollout.overridden([])
    assert team.rollout.counts["overridden"] == 1
    strict = Team(echo, sampling="refuse")
    with pytest.raises(GatewayError, match="temperature, top_p: turns are sampled as they are trained") as caught:
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
