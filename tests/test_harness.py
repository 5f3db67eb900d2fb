"""HarnessTask: a program as it is plays the agents; its answer is scored, its failures are told apart."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mgrpo.config.task import TaskConfig
from mgrpo.environments import attempt
from mgrpo.environments.loader import load_task
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.gateway.harness import Access, HarnessTask, Score
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, play
from tests.harness_kit import (
    Engine,
    FunctionTask,
    KitTask,
    agents,
    ask,
    ask_blocking,
    echo,
    played,
    rollout_of,
    team,
)
from tests.question_kit import write_jsonl
from tests.research_kit import FIJI, words_of

URL = "http://127.0.0.1:8700/rollout/abc/v1"


# -- what a rollout is ---------------------------------------------------------------------------------------


def test_a_program_plays_a_whole_team() -> None:
    """What the agents sampled is what is trained on; the answer is scored and recorded, turns are counted."""
    engine = Engine(echo)
    rollout = rollout_of(played(FunctionTask(team), engine))
    assert rollout.correct == 1.0 and rollout.d_k() == {"sub": 2}
    assert words_of(rollout.main, 1) == f"said {FIJI.text}<|im_end|>said And now?<|im_end|>"
    assert [words_of(t, 1) for t in rollout.invocations["sub"]] == [
        "said first<|im_end|>", "said second<|im_end|>",
    ]  # fmt: skip
    assert "And now?" in words_of(rollout.main, 0)
    info = {"answer": "Nukualofa", "gold": ["Nukualofa"], "question_id": "fiji-2", "tags": {"hops": "2"}}
    assert info.items() <= rollout.info.items()
    assert rollout.metrics["rollout/task/gateway_turns"] == [4.0]
    assert not engine.held


@pytest.mark.parametrize("answer", ["x", 7, 0.5, None, True, ["a", {"b": 1}], {"city": "Suva"}])
def test_an_answer_is_any_json_value(answer: object) -> None:
    """It reaches score() as it is, and the record."""
    seen = []

    async def run(question: Question, base_url: Access) -> object:
        await ask(base_url, "main", "x")
        return answer

    def score(question: Question, given: object) -> float:
        seen.append(given)
        return 0.25

    rollout = rollout_of(played(FunctionTask(run, score=score)))
    assert rollout.correct == 0.25 and seen == [answer] and rollout.info["answer"] == answer


def test_an_ordinary_function_runs_in_a_thread_of_its_own() -> None:
    """So that frameworks without asyncio do not hold up the other rollouts."""
    threads = []

    class Sync(KitTask):
        def run(self, question: Question, base_url: Access) -> object:
            threads.append(threading.current_thread())
            return ask_blocking(base_url, "main", "hello").json()["choices"][0]["message"]["content"]

        async def score(self, question: Question, answer: object) -> float:  # type: ignore[override]
            await asyncio.sleep(0)
            return float(answer == "said hello")

    assert rollout_of(played(Sync())).correct == 1.0
    assert threads[0] is not threading.main_thread()


def test_an_agent_may_have_a_base_url_of_its_own() -> None:
    """For programs that cannot choose a model's name."""

    async def run(question: Question, base_url: Access) -> object:
        await ask(base_url.for_agent("sub"), "gpt-9", "first")
        return await ask(base_url.for_agent("main"), "gpt-9", "x")

    rollout = rollout_of(played(FunctionTask(run)))
    assert rollout.d_k() == {"sub": 1} and rollout.info["answer"] == "said x"


# -- failures ------------------------------------------------------------------------------------------------


def test_a_program_that_raises_fails_its_rollout() -> None:
    """Once, with the place in its own code."""

    async def run(question: Question, base_url: Access) -> object:
        await ask(base_url, "main", "x")
        raise ValueError("no such page")

    engine = Engine(echo)
    result = played(FunctionTask(run), engine)
    assert (result.rollout, result.kind, result.attempt) == (None, "task", 0)
    assert "ValueError: no such page" in result.failure and "test_harness.py:" in result.failure
    assert not engine.held


def test_a_connection_that_breaks_is_tried_again() -> None:
    """As in every task: the third attempt succeeds."""
    left = [ConnectionError("gone"), TimeoutError("late")]

    async def run(question: Question, base_url: Access) -> object:
        if left:
            raise left.pop()
        return await team(question, base_url)

    result = played(FunctionTask(run))
    assert result.attempt == 2 and rollout_of(result).correct == 1.0


@pytest.mark.parametrize("then", ["answer", "raise", "exit", "cancel", "wait"])
def test_an_engine_that_fails_decides_whatever_the_program_makes_of_it(then: str) -> None:
    """It swallows the refusal and its own end, and answers, raises, exits; or it would wait for its deadline: the
    rollout is played again in every case, and at once."""

    async def run(question: Question, base_url: Access) -> object:
        try:
            return await team(question, base_url)
        except (httpx2.HTTPStatusError, asyncio.CancelledError) as error:
            if then == "raise":
                raise ValueError("my model is broken") from error
            if then == "exit":
                raise SystemExit("no model") from error
            if then == "cancel":
                raise asyncio.CancelledError from error
            if then == "wait" and isinstance(error, asyncio.CancelledError):
                raise
            if then == "wait":
                await asyncio.Event().wait()
            return "no idea"

    result = played(FunctionTask(run), Engine(echo, [InfrastructureError("the server is gone")]))
    assert result.attempt == 1 and rollout_of(result).correct == 1.0
    failed = played(FunctionTask(run), Engine(echo, [InfrastructureError("the server is gone")] * 9))
    assert (failed.kind, failed.attempt) == ("infrastructure", 2) and "the server is gone" in failed.failure


def test_a_program_without_a_loop_is_left_where_the_engine_fails() -> None:
    """Its thread waits for something else; nobody waits for it, and its later requests are refused."""
    go_on, done, refused = threading.Event(), threading.Event(), list[int]()

    def run(question: Question, base_url: Access) -> object:
        first = ask_blocking(base_url, "main", "x")
        if first.status_code == 200:
            return question.answer
        go_on.wait(60)
        refused.append(ask_blocking(base_url, "main", "x").status_code)
        done.set()
        return None

    class Threaded(KitTask):
        def run(self, question: Question, base_url: Access) -> object:
            return run(question, base_url)

        async def score(self, question: Question, answer: object) -> float:  # type: ignore[override]
            go_on.set()
            assert await asyncio.to_thread(done.wait, 60)
            return float(answer == question.answer)

    result = played(Threaded({}), Engine(echo, [InfrastructureError("the server is gone")]))
    assert result.attempt == 1 and rollout_of(result).correct == 1.0
    assert len(refused) == 1 and set(refused) <= {401, 404, 409}


@pytest.mark.parametrize("name", ["answer", "correct", "opened_at"])
def test_info_of_a_score_replaces_nothing(name: str) -> None:
    """What the record has of itself is refused by name."""
    result = played(FunctionTask(team, score=lambda question, answer: Score(1.0, info={name: 1})))
    assert result.kind == "task" and f"the info of a Score has {name!r}" in result.failure


def test_turns_that_nobody_waits_for_are_part_of_the_rollout() -> None:
    """The program ends while a sub-agent speaks: its turn is sampled to the end, and closed like the others."""
    begun = asyncio.Event()

    class Slow(Engine):
        async def generate(self, *args: Any, session: str | None = None, **options: Any) -> Any:
            if session is not None and "/sub/" in session:
                begun.set()
                for _ in range(200):
                    await asyncio.sleep(0)
            return await super().generate(*args, session=session, **options)

    kept = []

    async def run(question: Question, base_url: Access) -> object:
        kept.append(asyncio.create_task(ask(base_url, "sub", "take your time")))
        await begun.wait()
        await ask(base_url, "main", "x")
        return question.answer

    engine = Slow(echo)
    rollout = rollout_of(played(FunctionTask(run), engine))
    assert [words_of(t, 1) for t in rollout.invocations["sub"]] == ["said take your time<|im_end|>"]
    assert not engine.held


def test_a_main_agent_that_never_spoke_is_named() -> None:
    """With those who did."""

    async def run(question: Question, base_url: Access) -> object:
        return await ask(base_url, "sub", "x")

    result = played(FunctionTask(run))
    assert result.kind == "task" and "no request had the model 'main'" in result.failure
    assert "agents that spoke: sub" in result.failure


def test_a_program_that_never_ends_is_ended_at_the_deadline() -> None:
    """With the tasks that it started; what they ask afterwards is refused, and the engine holds nothing."""
    ended, refused = [], []

    async def forever(base_url: Access) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)
            late = await asyncio.to_thread(ask_blocking, base_url, "main", "still there?")
            refused.append(late.status_code)

    async def run(question: Question, base_url: Access) -> object:
        await ask(base_url, "main", "x")
        started = [asyncio.create_task(forever(base_url)) for _ in range(3)]
        await asyncio.Event().wait()
        return started

    engine = Engine(echo)
    result = played(FunctionTask(run), engine, deadline=0.5)
    assert result.kind == "deadline" and "rollout.deadline" in result.failure
    assert ended == [1] * 3 and len(refused) == 3 and set(refused) <= {401, 404, 409} and not engine.held


@pytest.mark.parametrize("answers", [True, False])
def test_a_program_that_ignores_its_end_is_late(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It swallows its cancellation and answers, or goes on for ever: its rollout has failed by the deadline, and the
    worker goes on without it."""
    monkeypatch.setattr(attempt, "PATIENCE", 0.1)

    async def main() -> RolloutResult:
        stop = asyncio.Event()

        async def run(question: Question, base_url: Access) -> object:
            await ask(base_url, "main", "x")
            while not stop.is_set():
                try:
                    await stop.wait()
                except asyncio.CancelledError:
                    if answers:
                        return question.answer
            return None

        task = FunctionTask(run)
        try:
            async with asyncio.timeout(60):
                return await play(task, RolloutRequest("7/3", FIJI, 1), agents(Engine(echo)), 1, None, 0.3)
        finally:
            stop.set()
            await task.close()

    result = asyncio.run(main())
    assert result.kind == "deadline" and "rollout.deadline" in result.failure


def test_a_program_that_exits_fails_its_rollout() -> None:
    """Not its worker."""

    async def run(question: Question, base_url: Access) -> object:
        raise SystemExit("no model")

    result = played(FunctionTask(run))
    assert (result.kind, result.attempt) == ("task", 0) and "no model" in result.failure


# -- the server ----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_tasks_of_one_process_share_a_server() -> None:
    """Stages and evaluations have one port; rollouts of both play at once; the last task to close frees it, and it
    can be had again."""
    port = free_port()
    options = {"gateway": {"port": port}}

    async def both() -> None:
        tasks = [FunctionTask(team, options), FunctionTask(team, options)]
        team_of = agents(Engine(echo))
        async with asyncio.TaskGroup() as group:
            jobs = [
                group.create_task(play(tasks[i % 2], RolloutRequest(f"q/{i}", FIJI, 0), team_of, i))
                for i in range(6)
            ]
        assert [rollout_of(job.result()).correct for job in jobs] == [1.0] * 6
        await tasks[0].close()
        await tasks[0].close()
        assert rollout_of(await play(tasks[1], RolloutRequest("q/9", FIJI, 0), team_of, 1)).correct == 1.0
        await tasks[1].close()

    asyncio.run(both())
    asyncio.run(both())


def test_the_server_does_not_belong_to_the_rollout_that_came_first() -> None:
    """Which is cancelled while it starts; the next one finds it."""

    async def main() -> None:
        task, team_of = FunctionTask(team), agents(Engine(echo))
        first, second = (
            asyncio.create_task(play(task, RolloutRequest(f"q/{i}", FIJI, 0), team_of, i)) for i in range(2)
        )
        try:
            while task._held is None:
                await asyncio.sleep(0)
            first.cancel()
            assert rollout_of(await second).correct == 1.0 and first.cancelled()
        finally:
            await task.close()

    asyncio.run(main())


def test_an_address_that_is_taken_ends_the_worker() -> None:
    """In the preflight, and in a worker without one at its first rollout."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = FunctionTask(team, {"gateway": {"port": listener.getsockname()[1]}})

        async def preflight() -> None:
            try:
                await task.preflight()
            finally:
                await task.close()

        with pytest.raises(ConfigError, match="port"):
            asyncio.run(preflight())
        with pytest.raises(ConfigError, match="port"):
            played(task)


# -- options -------------------------------------------------------------------------------------------------


class Scored(KitTask):
    def run(self, question: Question, base_url: Access) -> object:
        return ""

    def score(self, question: Question, answer: object) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (HarnessTask, {}, r"need command = \[...\] or remote = true, or the class a run\(\)"),
        (KitTask, {"command": ["x"], "remote": True}, "command and remote exclude each other"),
        (Scored, {"command": ["x"]}, r"options.command: Scored has a run\(\) of its own"),
        (Scored, {"score": {"rule": "f1"}}, r"options.score: Scored has a score\(\) of its own"),
        (Scored, {"questions": {"path": "x"}}, "options.questions: Scored has questions of its own"),
        (KitTask, {"command": [""]}, "begins with an empty text"),
        (KitTask, {"command": "python x.py"}, "options.command"),
        (KitTask, {"remote": True, "folder": "x"}, "folder has no effect without command"),
        (KitTask, {"command": ["x"], "key_env": "X"}, "key_env has no effect without remote"),
        (
            KitTask,
            {"remote": True, "key_env": "sk-123"},
            "expected the name of an environment variable, not a key",
        ),
        (
            KitTask,
            {"remote": True, "gateway": {"host": "0.0.0.0"}},
            "not loopback: options.key_env must name",
        ),
        (
            KitTask,
            {"command": ["x"], "scores": {"other": ["format"]}},
            "options.scores: unknown role 'other'",
        ),
        (KitTask, {"command": ["x"], "score": {"rule": "nonsense"}}, "nonsense"),
        (KitTask, {"command": ["x"], "score": {"rule": "reported", "judge": {}}}, "judge has no effect"),
        (KitTask, {"command": ["x"], "gateway": {"history": "guess"}}, "options.gateway.history"),
        (KitTask, {"commands": ["x"]}, "options.commands"),
    ],
)
def test_options_that_do_not_fit_are_named(
    make: Callable[..., Any], options: Mapping[str, object], words: str
) -> None:
    """Before anything starts."""
    with pytest.raises((ValueError, ConfigError), match=words):
        make(options, ("main", "sub"))


def test_the_built_in_task_needs_no_python(tmp_path: Path) -> None:
    """Questions from a file, a rule, a command."""
    file = write_jsonl(
        tmp_path / "q.jsonl", [{"id": f"q{i}", "question": f"{i}?", "answer": "x"} for i in range(20)]
    )
    options: dict[str, Any] = {"questions": {"path": str(file)}, "command": ["true"], "score": {"rule": "f1"}}
    config = TaskConfig(name="harness", options=options)
    task = load_task(config, ["main", "left", "right"])
    assert task.roles == ("main", "left", "right") and task.chat
    assert task.scores == {"main": frozenset(), "left": frozenset(), "right": frozenset()}
    assert task.question(3, 1) == task.question(3, 1) and task.questions("heldout", 1)
    assert set(task.digests()) == {"scorer"}


# -- access --------------------------------------------------------------------------------------------------


def test_access_is_a_text_that_knows_its_key() -> None:
    """Also in another process; its repr does not tell it."""
    access = Access(URL, "secret")
    for one in (access, pickle.loads(pickle.dumps(access))):
        assert one == URL and one.api_key == "secret" and "secret" not in repr(one)
        assert one.anthropic_url == one.root == "http://127.0.0.1:8700/rollout/abc"
        assert one.headers == {"Authorization": "Bearer secret"}
    sub = access.for_agent("a b")
    assert sub == "http://127.0.0.1:8700/rollout/abc/agent/a%20b/v1" and sub.api_key == "secret"
    with pytest.raises(ValueError, match="ends with /v1"):
        Access("http://127.0.0.1:8700", "secret")
