"""Programs that do anything to their histories, under every policy: what is taken, what is refused, what is trained."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat_templates import QWEN3, QWEN25, Family
from tests.gateway_kit import FIRST, Program, Team, assistant, conversations, error_of, run, system, user

DEEDS = ("plain", "strip", "edit", "shorten", "summary")


def thinking(text: str, seed: int) -> str:
    return f"<think>\nthe {seed % 97}\n</think>\n\nthe {seed % 89} says so"


def done(program: Program, deed: str) -> bool:
    """Do something to a program's history; whether it has another now."""
    messages = program.messages
    if len(messages) < 3:
        return False
    if deed == "strip":
        messages[-1] = assistant(messages[-1]["content"])
    elif deed == "edit":
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}!"}
    elif deed == "shorten":
        program.messages = [system("You answer shortly."), *messages[-2:]]
    elif deed == "summary":
        program.messages = [system("You answer."), user("what went before")]
    return deed != "plain"


def outcome(deed: str, history: str, thoughts: str) -> str:
    """What becomes of a history, as GatewayOptions says it."""
    if deed == "plain":
        return "extended"
    if deed == "strip":
        return "forked" if thoughts == "fork" else "extended"
    if history == "fork":
        return "forked"
    return "extended" if history == "keep" and deed != "summary" else "refused"


@pytest.mark.parametrize("family", [QWEN3, QWEN25], ids=lambda f: f.name)
@pytest.mark.parametrize("thoughts", ["keep", "fork"])
@pytest.mark.parametrize("history", ["exact", "keep", "fork"])
@settings(max_examples=12, deadline=None)
@given(deeds=st.lists(st.sampled_from(DEEDS), min_size=1, max_size=6))
def test_whatever_a_program_does(history: str, thoughts: str, family: Family, deeds: list[str]) -> None:
    """Each turn is extended, forked or refused as the options say, and what is trained is what was sampled. A refusal
    changes nothing: the history as it was goes on."""
    team = Team(thinking, history=history, thoughts=thoughts, family=family)
    program = Program(team, FIRST)
    expected = {"forked": 0, "refused": 0, "extended": 0}

    async def main() -> None:
        await program.ask()
        for number, deed in enumerate(deeds):
            before = list(program.messages)
            done(program, deed)
            what = outcome(deed, history, thoughts)
            expected[what] += 1
            new = user(f"go on {number}")
            if what == "refused":
                seen = conversations(team)
                program.messages.append(new)
                assert await error_of(team.rollout.turn(program.request())) == (409, "history_rewritten")
                assert conversations(team) == seen
                program.messages = before
            else:
                await program.ask(new)
                asked = team.tokenizer.decode(team.engines["main"].asked[-1])
                assert f"go on {number}" in asked
                if what == "forked" and deed == "summary":
                    assert "capital of Fiji" not in asked

    run(main)
    team.check()
    assert list(team.rollout.conversations()) == [("main", 0)]
    assert team.rollout.conversations()["main", 0].segments == 1 + expected["forked"]
    assert team.rollout.counts["forks"] == expected["forked"]
    assert team.rollout.counts["turns"] == 1 + expected["forked"] + expected["extended"]
    if history == "keep":
        edits = [deed for deed in deeds if deed in ("edit", "shorten")]
        assert team.rollout.counts["rewritten"] == len(edits)
