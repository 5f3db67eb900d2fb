"""Turns at the same time: twins, retries, busy conversations, branches; no order of arrival matters."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.gateway.turn import TurnReply, TurnRequest
from tests.gateway_kit import (
    FIRST,
    Program,
    Team,
    conversations,
    echo,
    error_of,
    result,
    run,
    same,
    system,
    tool,
    until,
    user,
)

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
            asyncio.create_task(team.rollout.turn(TurnRequest("main", FIRST, repeated=flag)))
            for flag in (True, False)
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


def test_a_program_that_gave_up_gets_its_turn_when_it_asks_again() -> None:
    """Without an SDK's word: the first turn of a sub-agent whose caller has gone is its own; the next is a twin's."""
    team = Team(echo)
    engine = team.engines["sub"]

    async def main() -> None:
        engine.gate = asyncio.Event()
        hung_up = asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST)))
        await until(lambda: len(engine.asked) == 1)
        hung_up.cancel()
        await asyncio.wait([hung_up])
        again = asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST)))
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await again).invocation == 0
        assert (await team.rollout.turn(TurnRequest("sub", FIRST))).invocation == 1

    run(main)
    assert len(engine.asked) == 2 and team.rollout.counts["repeated"] == 1


def test_a_retry_of_what_was_too_much_is_a_turn_of_its_own() -> None:
    """An SDK sends again what was refused with 429: it gets no twin's reply."""
    team = Team(echo, concurrent_turns=1)
    engine = team.engines["sub"]

    async def main() -> None:
        engine.gate = asyncio.Event()
        one = asyncio.create_task(team.rollout.turn(TurnRequest("sub", FIRST)))
        await until(lambda: bool(engine.asked))
        assert await error_of(team.rollout.turn(TurnRequest("sub", FIRST))) == (
            429,
            "too_many_concurrent_turns",
        )
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
