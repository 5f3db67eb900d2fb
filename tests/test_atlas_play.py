"""The protocol of the two agents, played by scripts: what is right, what ends a trajectory, who scores."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.config.task import TaskConfig
from mgrpo.environments.episode import Agent, Conversation, Episode
from mgrpo.environments.loader import load_task
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError
from mgrpo.tasks.atlas.facts import entities
from mgrpo.tasks.atlas.language import language
from mgrpo.tasks.atlas.task import AtlasTask
from mgrpo.tasks.words.play import Finding, play_sub
from mgrpo.tasks.words.protocol import Call
from mgrpo.tasks.words.questions import plan_of
from mgrpo.types import Rollout
from tests.atlas_scripts import Script, gold_main, gold_sub, lines, scripted

TASK = AtlasTask({})
SUVA = Question("country of Suva", "Fiji")


def roll(
    question: Question, main: Script = gold_main, sub: Script = gold_sub, task: AtlasTask = TASK
) -> Rollout:
    agents = {"main": scripted("main", main), "sub": scripted("sub", sub)}
    return asyncio.run(task.play(question, Episode("q", 0, agents, 1)))


def ask(call: Call, *turns: str, max_length: int = 64) -> tuple[Finding, Conversation]:
    """One invocation of a sub-agent that says `turns` (the gold script without any)."""
    script = lines(*turns) if turns else gold_sub
    conversation = Conversation(scripted("sub", script, max_length), "q", 0, 0, 0)
    return asyncio.run(play_sub(conversation, call, TASK.library)), conversation


@pytest.mark.parametrize("options", [{}, {"facts": "permuted"}])
def test_the_gold_plan_is_always_right(options: dict[str, object]) -> None:
    """Following the plan solves every question of all splits, in the real and in the permuted world."""
    task = AtlasTask(options)
    for split in ("train", "validation", "heldout"):
        for question in task.questions(split, 120, seed=2):  # type: ignore[arg-type]
            rollout = roll(question, task=task)
            assert rollout.correct == 1.0 and rollout.info["answer"] == question.answer
            assert rollout.d_k() == {"sub": len(plan_of(question))}
            assert rollout.main.scores == {"format": 1.0}
            assert all(t.scores == {"format": 1.0, "expert": 1.0} for t in rollout.invocations["sub"])


def test_masks_mark_what_each_agent_said() -> None:
    """loss_mask is 1 on an agent's own turns only; tool output and the other agent's words are context."""
    words, rollout = language().vocabulary, roll(SUVA)

    def said(tokens: object, mask: object, wanted: int) -> str:
        return " ".join(words[t] for t, m in zip(tokens, mask, strict=True) if m == wanted)  # type: ignore[call-overload]

    assert said(rollout.main.tokens, rollout.main.loss_mask, 1) == "<call> country Suva . <ans> Fiji ."
    assert said(rollout.main.tokens, rollout.main.loss_mask, 0) == "<q> country of Suva <go> <res> Fiji"
    (sub,) = rollout.invocations["sub"]
    assert said(sub.tokens, sub.loss_mask, 1) == "<search> Suva . <open> Suva . <ans> country Fiji ."
    found = " ".join(TASK.library.index.search("Suva"))
    assert said(sub.tokens, sub.loss_mask, 0) == (
        f"<task> country of Suva <go> <res> {found} <doc> Suva country Fiji"
    )


@pytest.mark.parametrize(
    "turn",
    [
        "<call> country Suva Fiji",  # no stop word in time
        "<call> country .",
        "<call> Suva country .",
        "<call> country none .",
        "<call> of Suva .",
        "<ans> Fiji Fiji .",
        "<ans> .",
        "<ans> country .",
        "<search> Suva .",
        "Fiji .",
        ". . . .",
        "<pad> <ans> Fiji .",
    ],
)
def test_a_deviation_of_the_main_agent_ends_its_trajectory(turn: str) -> None:
    """Format 0, correct 0, nothing follows, and the sub-agent is not asked."""
    rollout = roll(SUVA, main=lines(turn))
    assert rollout.main.scores == {"format": 0.0} and rollout.correct == 0.0
    assert rollout.d_k() == {"sub": 0} and rollout.info["answer"] is None
    assert rollout.main.loss_mask[-1] == 1


@pytest.mark.parametrize(
    "turns",
    [
        ["<open> Suva ."],
        ["<ans> country Fiji ."],
        ["<search> Suva Fiji ."],
        ["<search> country ."],
        ["<search> Suva .", "<search> Suva ."],
        ["<search> Suva .", "<ans> country Fiji ."],
        ["<search> Suva .", "<open> Oslo ."],
        ["<search> Suva .", "<open> none ."],
        ["<search> Suva .", "<open> Suva .", "<search> Suva ."],
        ["<search> Suva .", "<open> Suva .", "<open> Suva .", "<open> Suva ."],
        ["<search> Suva .", "<open> Suva .", "<ans> Fiji ."],
        ["<search> Suva .", "<open> Suva .", "<ans> Fiji country ."],
        ["<search> Suva .", "<open> Suva .", "<ans> country Fiji Fiji"],
        ["<search> Suva .", "<open> Suva .", "<ans> country <doc> ."],
    ],
)
def test_a_deviation_of_the_sub_agent_ends_its_trajectory(turns: list[str]) -> None:
    """Format and expert 0, the main agent gets `none`, and the deviating turn is the trajectory's last."""
    finding, conversation = ask(Call("country", "Suva"), *turns)
    assert finding.value == "none" and not finding.well_formed and not finding.copied
    trajectory = conversation.trajectory()
    assert trajectory.scores == {"format": 0.0, "expert": 0.0} and trajectory.loss_mask[-1] == 1


def test_two_documents_may_be_opened() -> None:
    """The last one counts for the copy, the corpus for the expert."""
    wrong = next(t for t in TASK.library.index.search("Suva") if t not in ("Suva", "Fiji"))
    finding, _ = ask(
        Call("country", "Suva"),
        "<search> Suva .",
        f"<open> {wrong} .",
        "<open> Suva .",
        "<ans> country Fiji .",
    )
    assert finding.opened == (wrong, "Suva") and finding.value == "Fiji" and finding.copied


@pytest.mark.parametrize(
    ("call", "turns", "expert"),
    [
        (Call("country", "Suva"), [], 1.0),
        (Call("capital", "Suva"), [], 1.0),  # ill-posed: none is right
        (Call("capital", "FJD"), ["<search> FJD .", "<open> Fiji .", "<ans> capital Suva ."], 0.0),
        (Call("capital", "Fiji"), ["<search> Fiji .", "<open> Fiji .", "<ans> capital none ."], 0.0),
        (Call("capital", "Fiji"), ["<search> Fiji .", "<open> Fiji .", "<ans> phone +679 ."], 0.0),
        (
            Call("capital", "Fiji"),
            ["<search> Fiji .", "<open> Suva .", "<ans> capital Suva ."],
            1.0,
        ),  # by luck
        (Call("neighbour", "Fiji"), ["<search> Fiji .", "<open> Suva .", "<ans> phone none ."], 1.0),
    ],
)
def test_the_expert_compares_with_the_corpus(call: Call, turns: list[str], expert: float) -> None:
    """Its own answer against the fact of the task it was given; `none` is right where there is no fact."""
    _, conversation = ask(call, *turns)
    assert conversation.scores == {"format": 1.0, "expert": expert}


def test_copies_are_judged_by_the_opened_document() -> None:
    """`copied` asks whether the answer stands in the last document under its field, right or wrong."""
    right, _ = ask(Call("capital", "Fiji"), "<search> Fiji .", "<open> Fiji .", "<ans> phone +679 .")
    wrong, _ = ask(Call("capital", "Fiji"), "<search> Fiji .", "<open> Suva .", "<ans> capital Suva .")
    assert right.copied and not wrong.copied


def test_at_most_four_calls() -> None:
    """The fifth call is a deviation; four calls and an answer are not."""
    call = "<call> country Suva ."
    assert roll(SUVA, main=lines(*[call] * 5)).main.scores == {"format": 0.0}
    rollout = roll(SUVA, main=lines(*[call] * 4, "<ans> Fiji ."))
    assert rollout.correct == 1.0 and rollout.d_k() == {"sub": 4}


def test_an_answer_without_calls() -> None:
    """d_k = 0 is a rollout like any other."""
    rollout = roll(SUVA, main=lines("<ans> Oslo ."))
    assert rollout.correct == 0.0 and rollout.main.scores == {"format": 1.0}
    assert rollout.d_k() == {"sub": 0} and rollout.info["answer"] == "Oslo"
    assert roll(SUVA, main=lines("<ans> none .")).main.scores == {"format": 1.0}


def test_a_trajectory_never_outgrows_its_bound() -> None:
    """An agent without room for the next observation and a turn ends with format 0 instead of overflowing."""
    for bound in range(9, 40):
        finding, conversation = ask(Call("capital", "Fiji"), max_length=bound)
        assert len(conversation) <= bound
        assert finding.well_formed == (bound >= 5 + 3 + 4 + 3 + 14 + 4)


def test_every_conversation_is_released() -> None:
    """Engines are told that a session is over, whatever its end."""
    for main in (gold_main, lines("<call> country Suva .", "no .")):
        agents: dict[str, Agent] = {"main": scripted("main", main), "sub": scripted("sub", gold_sub)}
        asyncio.run(TASK.play(SUVA, Episode("q", 3, agents, 1)))
        engines = [a.engine for a in agents.values()]
        released = [s for e in engines if isinstance(e, ScriptedEngine) for s in e.released]
        assert sorted(released) == ["q/3/0/main/0", "q/3/0/sub/0"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*language().vocabulary[:21], "Fiji", "Suva"]), max_size=5))
def test_parsers_accept_exactly_the_grammar(words: list[str]) -> None:
    """Whatever is accepted prints back to the same words."""
    text = " ".join(words)
    match language().parse_main(text):
        case Call(relation, entity):
            assert words == ["<call>", relation, entity, "."]
        case None:
            pass
        case answer:
            assert words == ["<ans>", answer.value, "."]
    for state in ("search", "open", "read", "last"):
        if language().parse_sub(text, state) is not None:  # type: ignore[arg-type]
            assert words[-1] == "." and words[0] in ("<search>", "<open>", "<ans>") and 3 <= len(words) <= 4


def test_random_documents_cannot_be_answered_from() -> None:
    """With search = "random" even a perfect team is helpless."""
    task = AtlasTask({"search": "random"})
    outcomes = [roll(q, sub=_opens_anything, task=task).correct for q in task.questions("heldout", 200)]
    assert sum(outcomes) / len(outcomes) <= 0.05


def _opens_anything(said: list[str]) -> str:
    if "<res>" in said and "<doc>" not in said:
        return f"<open> {said[said.index('<res>') + 1]} ."
    return gold_sub(said)


@pytest.mark.parametrize(
    ("options", "roles", "message"),
    [
        ({"serach": "bm25"}, ["main", "sub"], "serach"),
        ({"search": "google"}, ["main", "sub"], "search"),
        ({"facts": 3}, ["main", "sub"], "facts"),
        ({"turn_tokens": 1}, ["main", "sub"], "turn_tokens"),
        ({"width": 100}, ["main", "sub"], "options.width: Input should be a multiple of 8, got 100"),
        ({}, ["sub"], "roles"),
        ({}, ["main", "sub", "coder"], "coder"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], roles: list[str], message: str) -> None:
    """One line that names the field and what was expected."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_task(TaskConfig(name="atlas", options=options), roles)
    assert "\n" not in str(caught.value)


def test_entities_are_names() -> None:
    """Every entity can be said in every place for a name: none collides with a word of the protocol."""
    assert all(language().parse_main(f"<call> capital {e} .") == Call("capital", e) for e in entities())
