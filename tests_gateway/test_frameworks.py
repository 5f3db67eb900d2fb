"""Agent frameworks as they are: the examples of examples/gateway, whose only changes are address, key and model."""

from __future__ import annotations

import pytest

from tests_gateway.kit import (
    ANSWER,
    EXAMPLES,
    FIJI,
    QUESTION,
    TONGA,
    Played,
    call,
    capital,
    check_trained_is_sampled,
    context,
    play,
    said,
    segments,
    turn,
)
from tests_gateway.test_openai_sdk import SCRIPTS, check_team


@pytest.mark.parametrize("api", ["chat_completions", "responses"])
def test_the_agents_sdk(api: str) -> None:
    """An agent as a tool of another, two calls of it at the same time; its tool's argument is named `input`."""
    asked = f"I ask about both.\n{call('ask_researcher', input=FIJI)}\n{call('ask_researcher', input=TONGA)}"

    def main(text: str, number: int) -> str:
        return asked if turn(text) == 0 else ANSWER

    played = play(EXAMPLES / "agents_sdk.py", {**SCRIPTS, "main": main}, env={"TEAM_API": api})
    check_team(played, asked)


def test_langgraph() -> None:
    """A graph that runs inside another's tool, twice at the same time."""
    check_team(play(EXAMPLES / "langgraph_team.py", SCRIPTS))


COPIES = "'type': 'function'"
"""In smolagents' words for the calls of a turn, which it sends in the place of the turn."""


def tool_calls_main(text: str, number: int) -> str:
    """Asks its managed agent twice, one after the other, then gives the final answer."""
    turns = [
        call("researcher", task=FIJI),
        call("researcher", task=TONGA),
        call("final_answer", answer=ANSWER),
    ]
    return turns[turn(text)]


def tool_calls_researcher(text: str, number: int) -> str:
    if turn(text) == 0:
        return call("search", query="Fiji" if FIJI in text else "Tonga")
    return call("final_answer", answer=f"The capital is {capital(text)}.")


def code_main(text: str, number: int) -> str:
    """Asks its managed agent from Python; goes on behind the end of its code, which is a stop text."""
    if turn(text) == 0:
        asked = "\n".join(f"print(researcher(task={task!r}))" for task in (FIJI, TONGA))
        return f"Thought: I ask about both.\n<code>\n{asked}\n</code>never said"
    return f"Thought: I know both.\n<code>\nfinal_answer({ANSWER!r})\n</code>never said"


def code_researcher(text: str, number: int) -> str:
    if turn(text) == 0:
        name = "Fiji" if FIJI in text else "Tonga"
        return f"Thought: I search.\n<code>\nprint(search(query={name!r}))\n</code>"
    report = f"The capital is {capital(text)}."
    return f"Thought: I found it.\n<code>\nfinal_answer({report!r})\n</code>"


def check_smolagents(played: Played, counted: str) -> None:
    """Two invocations; what was sampled is trained although the framework writes its history in words of its own.
    counted: how often, in the rollout's counts."""
    assert played.answer == ANSWER
    assert played.d_k == 2 and check_trained_is_sampled(played) == 3
    (first,) = played.trajectories("main")
    assert QUESTION in context(first)
    for sub in played.trajectories("researcher"):
        assert len(said(sub)) == 2
        assert "Observation:" in context(sub) and "currency" in context(sub)
        assert (COPIES in context(sub)) == (counted == "forks") and len(segments(sub)) == 1 + (
            counted == "forks"
        )
        report = "Suva" if FIJI in context(sub) else "Nuku'alofa"
        assert f"The capital is {report}." in said(sub)[1]
        assert f"The capital is {report}." in context(first)
    turns = sum(len(engine.turns) for engine in played.engines.values())
    assert played.rollout.counts[counted] == turns - 3  # all but the first of each conversation


def test_smolagents_that_call_tools() -> None:
    """A managed agent; tool calls come back as text ("Calling tools: ..."), so the history is kept by place."""
    scripts = {"main": tool_calls_main, "researcher": tool_calls_researcher}
    played = play(EXAMPLES / "smolagents_team.py", scripts, history="keep")
    check_smolagents(played, "rewritten")
    assert played.rollout.counts["overridden"]  # tool_choice = "required"


def test_smolagents_that_write_code() -> None:
    """A managed agent called from Python; turns end at stop texts, which are trained as sampled and not shown."""
    scripts = {"main": code_main, "researcher": code_researcher}
    played = play(EXAMPLES / "smolagents_team.py", scripts, history="keep", env={"TEAM_AGENT": "code"})
    check_smolagents(played, "rewritten")
    (first,) = played.trajectories("main")
    assert all(text.rstrip().endswith("</code>") for text in said(first)), said(first)


def test_smolagents_under_exact_history_is_refused_by_name() -> None:
    """Its first rewritten history is a 409 that the framework reports, and nothing of it is trained."""
    scripts = {"main": tool_calls_main, "researcher": tool_calls_researcher}
    with pytest.raises(AssertionError, match="history"):
        play(EXAMPLES / "smolagents_team.py", scripts, history="exact")


@pytest.mark.parametrize("kind", ["", "code"])
def test_smolagents_forks(kind: str) -> None:
    """Under fork each rewritten history is a segment of its invocation, and what was sampled is still trained once."""
    scripts = {
        "": {"main": tool_calls_main, "researcher": tool_calls_researcher},
        "code": {"main": code_main, "researcher": code_researcher},
    }[kind]
    played = play(EXAMPLES / "smolagents_team.py", scripts, history="fork", env={"TEAM_AGENT": kind})
    check_smolagents(played, "forks")
