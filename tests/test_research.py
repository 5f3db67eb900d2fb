"""tasks/research, played by scripts: who is called when, what is refused, what format costs, what the record holds."""

from __future__ import annotations

from typing import Any

import pytest

from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError, ContextOverflowError, InfrastructureError
from mgrpo.tools.calls import render
from tests.research_kit import (
    FIJI,
    PAGES,
    KitTask,
    Search,
    Visit,
    by_task,
    lines,
    roll,
    said,
    words_of,
)

NEIGHBOUR, CAPITAL = "Which country is the neighbour of Fiji?", "What is the capital of Tonga?"
SUB = {
    NEIGHBOUR: [said(search="fiji"), said(visit="w/fiji"), said(report="It is Tonga.")],
    CAPITAL: [said(visit="w/tonga"), said(report="The capital is Nukualofa.")],
}


def gold_main() -> Any:
    return lines(said(ask=NEIGHBOUR), said(ask=CAPITAL), said(answer="Nukualofa"))


def test_a_straight_rollout() -> None:
    """Main asks twice and answers; every score, the record and what each agent read are as they should be."""
    task = KitTask()
    rollout = roll(task, main=gold_main(), sub=by_task(SUB))
    assert rollout.correct == 1.0 and rollout.main.scores == {"format": 1.0}
    assert [t.scores for t in rollout.invocations["sub"]] == [{"format": 1.0, "expert": 1.0}] * 2
    info = rollout.info
    assert info["answer"] == "Nukualofa" and info["gold"] == ["Nukualofa"]
    assert (info["question_id"], info["tags"]) == ("fiji-2", {"hops": "2"})
    assert [(c["task"], c["result"]) for c in info["calls"]] == [
        (NEIGHBOUR, "It is Tonga."), (CAPITAL, "The capital is Nukualofa."),
    ]  # fmt: skip
    assert [(t["role"], t["invocation"], t["turn"], t["tool"], t["status"]) for t in info["tools"]] == [
        ("main", 0, 0, "ask", "ok"),
        ("main", 0, 1, "ask", "ok"),
        ("sub", 0, 0, "search", "ok"),
        ("sub", 0, 1, "visit", "ok"),
        ("sub", 1, 0, "visit", "ok"),
    ]
    visit = info["tools"][3]
    assert visit["arguments"] == '{"url": "w/fiji"}' and visit["chars"] == len(PAGES["w/fiji"])
    assert visit["source"] == "live" and len(visit["digest"]) == 16 and visit["seconds"] >= 0
    verdict = info["verdict"]
    assert verdict == {
        "rule": "gaia",
        "rule_score": 1.0,
        "judge": "",
        "source": "",
        "digest": verdict["digest"],
    }
    read = words_of(rollout.main, 0)
    assert "Result of ask:\nIt is Tonga." in read and FIJI.text in read and "Population" not in read
    assert PAGES["w/fiji"] in words_of(rollout.invocations["sub"][0], 0)
    assert words_of(rollout.main, 1).count("<tool_call>") == 3
    assert rollout.metrics["sub/task/turns"] == [3.0, 2.0] and rollout.metrics["main/task/forced"] == [0.0]
    assert len(rollout.metrics["rollout/tool/visit/seconds"]) == 2


def test_tasks_of_one_turn_run_together() -> None:
    """Two tasks in a turn are two invocations in the order of the calls, played at the same time; their reports come
    back in that order whoever ends first."""
    search = Search()
    task = KitTask(tools=[search, Visit()])
    both = render("hermes", ("ask", {"task": "slow"}), ("ask", {"task": "quick"}))
    subs = {
        "slow": [said(search="fiji"), said(search="suva"), said(report="slow is done")],
        "quick": [said(search="tonga"), said(report="quick is done")],
    }
    rollout = roll(task, main=lines(both, said(answer="x")), sub=by_task(subs))
    assert search.most == 2 and rollout.main.scores == {"format": 1.0}
    assert [c["task"] for c in rollout.info["calls"]] == ["slow", "quick"]
    assert [c["invocation"] for c in rollout.info["calls"]] == [0, 1]
    first, second = rollout.invocations["sub"]
    assert "slow is done" in words_of(first, 1) and "quick is done" in words_of(second, 1)
    read = words_of(rollout.main, 0)
    assert 0 < read.index("slow is done") < read.index("quick is done")
    opened = rollout.info["opened_at"]["sub"]
    assert opened[0] == opened[1]


def test_calls_of_one_turn_run_together() -> None:
    """A sub-agent's calls too; each result says whose it is."""
    search = Search()
    calls = render("hermes", ("search", {"query": "fiji"}), ("search", {"query": "tonga"}))
    task = KitTask(tools=[search, Visit()])
    rollout = roll(task, main=lines(said(ask="go"), said(answer="x")), sub=lines(calls, said(report="y")))
    assert search.most == 2
    assert words_of(rollout.invocations["sub"][0], 0).count("Result of search:\n") == 2


def test_the_single_agent_has_all_tools() -> None:
    """Main alone searches and visits by itself, and has no tool `ask`."""
    task = KitTask({"score": {}}, roles=("main",))
    assert task.scores == {"main": frozenset({"format"})}
    assert '"ask"' not in task.team["main"].prompt and '"search"' in task.team["main"].prompt
    rollout = roll(task, main=lines(said(search="fiji"), said(visit="w/tonga"), said(answer="Nukualofa")))
    assert rollout.correct == 1.0 and rollout.invocations == {} and len(rollout.info["tools"]) == 2


def test_several_kinds_of_sub_agents() -> None:
    """Each role is called by its name and has its own tools."""
    options = {
        "score": {},
        "agents": {"reader": {"tools": ["visit"], "about": "Opens pages."}, "finder": {"tools": ["search"]}},
    }
    task = KitTask(options, roles=("main", "finder", "reader"))
    assert "Opens pages." in task.team["main"].prompt and task.team["reader"].tools.names == ("visit",)
    main = lines(
        render("hermes", ("finder", {"task": "find"}), ("reader", {"task": "read"})), said(answer="x")
    )
    rollout = roll(
        task,
        main=main,
        finder=lines(said(search="fiji"), said(report="found")),
        reader=lines(said(search="fiji"), said(report="none")),
    )
    assert rollout.d_k() == {"finder": 1, "reader": 1}
    status = {(t["role"], t["tool"]): t["status"] for t in rollout.info["tools"]}
    assert status["finder", "search"] == "ok" and status["reader", "search"] == "tool_error"
    assert rollout.invocations["finder"][0].scores == {"format": 1.0}
    assert rollout.invocations["reader"][0].scores == {"format": 0.5}


@pytest.mark.parametrize(
    ("turn", "words", "status"),
    [
        ("I think it is Tonga.", "Error: No tool call was found in your turn", "none"),
        ("<tool_call>{oh}</tool_call>", "Error: A tool call could not be read: {oh}", "none"),
        (said(guess="Tonga"), "There is no tool 'guess'. Tools: search, visit, report.", "guess"),
        (render("hermes", ("visit", {"link": "w/fiji"})), "Error of visit:\n", "visit"),
        (render("hermes", ("visit", {"url": 7})), "Error of visit:\n", "visit"),
        (
            said(report=" "),
            "Error of report:\nIts argument 'report' must be a text, and not empty.",
            "report",
        ),
    ],
)
def test_what_costs_format(turn: str, words: str, status: str) -> None:
    """A turn that is not a call of the tools as they are described is answered by an error and costs format, and the
    agent goes on."""
    rollout = roll(
        KitTask(), main=lines(said(ask="go"), said(answer="x")), sub=lines(turn, said(report="done"))
    )
    (sub,) = rollout.invocations["sub"]
    assert words in words_of(sub, 0) and sub.scores["format"] == 0.5
    (noted,) = [t for t in rollout.info["tools"] if t["role"] == "sub"]
    assert (noted["tool"], noted["status"]) == (status, "tool_error")
    assert rollout.metrics["sub/task/tool_errors"] == [1.0]


def test_what_does_not_cost_format() -> None:
    """A page that is not there is an error to learn from, of a turn that was well-formed."""
    rollout = roll(
        KitTask(),
        main=lines(said(ask="go"), said(answer="x")),
        sub=lines(said(visit="w/atlantis"), said(report="none")),
    )
    (sub,) = rollout.invocations["sub"]
    assert "Error of visit:\nThere is no page w/atlantis." in words_of(sub, 0)
    assert sub.scores["format"] == 1.0 and rollout.info["tools"][-1]["status"] == "tool_error"


def test_format_is_valid_or_not() -> None:
    """score.format = "strict": one turn that is not well-formed makes the whole trajectory invalid."""
    options = {"score": {"format": "strict", "expert": "path"}}
    loose = lines("Hm.", said(ask="go"), said(answer="Nukualofa"))
    rollout = roll(KitTask(options), main=loose, sub=lines(said(report="x")))
    assert rollout.main.scores == {"format": 0.0} and rollout.correct == 1.0
    assert rollout.invocations["sub"][0].scores["format"] == 1.0
    rollout = roll(KitTask(), main=lines("Hm.", said(answer="Nukualofa")), sub=lines())
    assert rollout.main.scores == {"format": 0.5}


@pytest.mark.parametrize(
    ("turn", "answer", "score"),
    [
        (said(answer="  Nukualofa "), "Nukualofa", 1.0),
        (render("hermes", ("answer", {"answer": 7})), "7", 0.0),
        (render("hermes", ("answer", {"value": "Nukualofa"})), "Nukualofa", 0.0),
        (render("hermes", ("answer", {"answer": ["a", "b"]})), "a, b", 0.0),
        (render("hermes", ("search", {"query": "x"}), ("answer", {"answer": "x"})), "x", 0.0),
        ('{"name": "answer", "arguments": {"answer": "x"}}', "x", 0.0),
    ],
)
def test_what_an_answer_is(turn: str, answer: str, score: float) -> None:
    """The answer is understood generously; only the one that was asked for is well-formed."""
    rollout = roll(KitTask({"score": {}}, roles=("main",)), main=lines(turn))
    assert rollout.info["answer"] == answer and rollout.main.scores["format"] == score


def test_bounds_of_calls() -> None:
    """Calls beyond those of a turn and tasks beyond those of a rollout are refused, and no conversation is opened for
    them; nor for a task that would leave its sub-agent no room."""
    limits = {"calls": 2, "asks": 3, "turn_tokens": 300, "answer_tokens": 150, "report_chars": 20000}
    task = KitTask({"limits": limits})
    many = render("hermes", *[("ask", {"task": f"t{i}"}) for i in range(3)])
    long = render("hermes", ("ask", {"task": "x " * 4000}), ("ask", {"task": ""}))
    main = lines(many, said(ask="t3"), said(ask="t4"), said(answer="x"))
    rollout = roll(task, main=main, sub=lambda chat: said(report="r"))
    read = words_of(rollout.main, 0)
    assert [c["task"] for c in rollout.info["calls"]] == ["t0", "t1", "t3"]
    assert "Not called: at most 2 calls in one turn." in read
    assert "Not called: at most 3 tasks can be given." in read
    wide = KitTask({"limits": limits | {"turn_tokens": 9000}})
    rollout = roll(
        wide, main=lines(long, said(answer="x")), sub=lines(), max_length={"main": 30000, "sub": 11000}
    )
    assert rollout.d_k() == {"sub": 0}
    read = words_of(rollout.main, 0)
    assert (
        "the task is too long for the sub-agent" in read
        and "Its argument 'task' must be a text, and not empty." in read
    )


def test_the_last_turn_is_the_answer() -> None:
    """Before its last turn an agent is asked for its answer; what else it then does is not done."""
    options = {"limits": {"turns": 3, "turn_tokens": 300, "answer_tokens": 150}, "score": {}}
    task = KitTask(options, roles=("main",))
    rollout = roll(task, main=lines(said(search="fiji"), said(search="tonga"), said(answer="Nukualofa")))
    read = words_of(rollout.main, 0)
    assert read.count("Give your answer now: call answer.") == 1 and rollout.correct == 1.0
    assert rollout.main.scores == {"format": 1.0} and rollout.metrics["main/task/forced"] == [1.0]
    search = Search()
    task = KitTask(options, roles=("main",), tools=[search, Visit()])
    rollout = roll(task, main=lambda chat: said(search="fiji"))
    assert len(search.queries) == 2 and rollout.info["answer"] is None
    assert rollout.main.scores == {"format": 0.0} and rollout.correct == 0.0
    assert rollout.metrics["main/task/turns"] == [3.0]


@pytest.mark.parametrize("length", [2200, 2400, 2801, 3203, 3607])
@pytest.mark.parametrize("chars", [100, 600, 3000])
def test_there_is_always_room_for_the_answer(length: int, chars: int) -> None:
    """However long pages and turns are, an agent that never stops is asked for its answer in time, what it reads before
    it is cut with a mark, and no trajectory outgrows its length."""
    pages = {f"p{i}": f"page {i} " + "x" * chars for i in range(50)}
    limits = {"turn_tokens": 200, "answer_tokens": 150, "observation_chars": 2000, "observation_tokens": 1500}
    task = KitTask({"score": {}, "limits": limits}, roles=("main",), tools=[Visit(pages)])

    def script(chat: str) -> str:
        if "Give your answer now" in chat:
            return said(answer="late")
        return render("hermes", *[("visit", {"url": f"p{i}"}) for i in range(2)])

    rollout = roll(task, main=script, max_length=length)
    assert rollout.info["answer"] == "late" and len(rollout.main.tokens) <= length
    assert rollout.main.scores == {"format": 1.0} and rollout.metrics["main/task/forced"] == [1.0]
    if chars == 3000:
        assert "more characters]" in words_of(rollout.main, 0)


def test_results_are_cut_visibly() -> None:
    """One result by its characters, all of a turn by their tokens."""
    pages = {"long": "abcdefghij" * 500}
    limits = {"turn_tokens": 300, "answer_tokens": 150, "observation_chars": 1000, "observation_tokens": 4000}
    task = KitTask({"score": {}, "limits": limits}, roles=("main",), tools=[Visit(pages)])
    rollout = roll(task, main=lines(said(visit="long"), said(answer="x")))
    assert "abcdefghij\n[cut: 4000 more characters]" in words_of(rollout.main, 0)
    task = KitTask(
        {"score": {}, "limits": limits | {"observation_tokens": 400}}, roles=("main",), tools=[Visit(pages)]
    )
    both = render("hermes", ("visit", {"url": "long"}), ("visit", {"url": "long"}))
    first = roll(task, main=lines(said(visit="long"), said(answer="x")))
    rollout = roll(task, main=lines(both, said(answer="x")))
    read = words_of(rollout.main, 0)
    assert read.count("more characters]") == 2 and rollout.metrics["main/task/cut_results"] == [2.0]
    assert first.metrics["main/task/cut_results"] == [1.0]


def test_a_question_that_leaves_no_room() -> None:
    """A question too long for main is a failure of its rollout by length; a length that is too short for any question
    is a mistake in the config."""
    task = KitTask()
    with pytest.raises(ContextOverflowError, match="first messages of role 'main'"):
        roll(task, Question("why " * 3000, "x"), main=lines(), sub=lines())
    with pytest.raises(ConfigError, match=r"agents.main.max_length=300 leaves no room"):
        roll(task, main=lines(), sub=lines(), max_length=300)


def test_a_sub_agent_without_a_report() -> None:
    """Main reads that there is none; the sub-agent's format and expert scores are 0."""
    options = {"limits": {"turns": 2, "turn_tokens": 300, "answer_tokens": 150}}
    rollout = roll(KitTask(options), main=lines(said(ask="go"), said(answer="x")), sub=lambda chat: "Hm.")
    assert rollout.invocations["sub"][0].scores == {"format": 0.0, "expert": 0.0}
    assert "(The sub-agent gave no report.)" in words_of(rollout.main, 0)
    assert rollout.info["calls"][0]["result"] == ""


@pytest.mark.parametrize(
    ("task", "turns", "expert"),
    [
        (NEIGHBOUR, [said(visit="w/fiji"), said(report="It is Tonga.")], 1.0),
        (NEIGHBOUR, [said(report="It is Tonga.")], 0.0),  # a guess
        (NEIGHBOUR, [said(search="tonga"), said(report="It is Tonga.")], 0.0),  # seen in a search alone
        (NEIGHBOUR, [said(visit="w/suva"), said(report="It is Tonga.")], 0.0),  # on no page that was opened
        (CAPITAL, [said(visit="w/tonga"), said(report="Tonga's capital.")], 0.0),  # what the task says
        (CAPITAL, [said(visit="w/tonga"), said(report="Nuku'alofa")], 1.0),  # another spelling
    ],
)
def test_the_expert_rule(task: str, turns: list[str], expert: float) -> None:
    """A report is worth a value of the gold path that the task did not name and that stands on an opened page."""
    rollout = roll(KitTask(), main=lines(said(ask=task), said(answer="x")), sub=lines(*turns))
    assert rollout.invocations["sub"][0].scores["expert"] == expert


def test_the_json_format() -> None:
    """The same rollout in bare JSON; the prompt says how."""
    task = KitTask({"format": "json"})
    assert '{"name": "NAME", "arguments": {"ARGUMENT": "..."}}' in task.team["main"].prompt
    subs = {
        k: [v.replace("<tool_call>\n", "").replace("\n</tool_call>", "") for v in t] for k, t in SUB.items()
    }
    turns = said("json", ask=NEIGHBOUR), said("json", ask=CAPITAL), said("json", answer="Nukualofa")
    rollout = roll(task, main=lines(*turns), sub=by_task(subs))
    assert rollout.correct == 1.0 and rollout.main.scores == {"format": 1.0}
    assert [t.scores["format"] for t in rollout.invocations["sub"]] == [1.0, 1.0]


class Failing:
    """In place of scores: a judge that does not answer."""

    has_expert = True

    async def of_rollout(self, *_: object) -> Any:
        raise InfrastructureError("judge: 503 after 5 attempts")

    async def close(self) -> None: ...


def test_failures_leave_the_rollout() -> None:
    """A tool or judge that fails raises out of play(): the rollout is neither scored 0 nor does any agent read of it,
    also where the others of its turn work."""
    task = KitTask(tools=[Search(InfrastructureError("search: 503 secretwords")), Visit()])
    both = render("hermes", ("visit", {"url": "w/fiji"}), ("search", {"query": "x"}))
    chats: list[str] = []

    def sub(chat: str) -> str:
        chats.append(chat)
        return both

    with pytest.raises(ExceptionGroup) as caught:
        roll(task, main=lines(said(ask="go"), said(answer="x")), sub=sub)
    leaf: BaseException = caught.value
    while isinstance(leaf, ExceptionGroup):
        leaf = leaf.exceptions[0]
    assert isinstance(leaf, InfrastructureError) and len(chats) == 1 and "secretwords" not in chats[0]
    task = KitTask()
    task.judged = Failing()  # type: ignore[assignment]
    with pytest.raises(InfrastructureError, match="judge: 503"):
        roll(task, main=gold_main(), sub=by_task(SUB))


def test_same_seed_same_rollout() -> None:
    """Two plays of a rollout give the same trajectories, token by token."""
    one, two = (roll(KitTask(), main=gold_main(), sub=by_task(SUB)) for _ in range(2))
    for a, b in zip(one.trajectories(), two.trajectories(), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.scores == b.scores
