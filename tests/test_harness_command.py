"""A harness as a command: what it is given, what its answer is, and that nothing of it outlives its rollout."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError, InfrastructureError, RolloutError
from mgrpo.gateway.access import Access
from mgrpo.gateway.command import ANSWER_BYTES, Command, answer_of, run_command
from mgrpo.gateway.scores import Answer
from mgrpo.pipeline.play import RolloutRequest, play
from mgrpo.services import outage
from tests import fake_clock
from tests.harness_kit import Engine, FunctionTask, KitTask, agents, ask, echo, played, program, rollout_of
from tests.research_kit import FIJI, words_of
from tests.runs import wait_for

TEAM = """
plan = ask("main", question["text"])
ask("sub", "first", os.environ["ANTHROPIC_BASE_URL"] + "/v1")
print("a word before")
print(%s)
print()
"""


def task_of(file: Path, **options: Any) -> KitTask:
    return KitTask({"command": [sys.executable, "-S", str(file)], **options}, ("main", "sub"))


def run(text: str, given: Mapping[str, object] | None = None, **options: Any) -> Answer:
    """What a Python program answers."""
    command = Command((sys.executable, "-S", "-c", text), **options)
    return asyncio.run(asyncio.wait_for(run_command(command, given or {}, command.environment({})), 60))


def is_alive(pid: int) -> bool:
    """Running, and no zombie that waits for its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_command_plays_a_rollout(tmp_path: Path) -> None:
    """It finds its agents by the variables that SDKs read; its last line is the answer, scored by a rule."""
    file = program(tmp_path, TEAM % repr(FIJI.answer))
    rollout = rollout_of(played(task_of(file)))
    assert rollout.correct == 1.0 and rollout.info["answer"] == FIJI.answer and rollout.d_k() == {"sub": 1}
    assert words_of(rollout.main, 1) == f"said {FIJI.text}<|im_end|>"
    assert rollout.info["verdict"]["rule"] == "exact"  # type: ignore[index]


def test_a_command_reports_outcome_and_scores(tmp_path: Path) -> None:
    """Where it knows best what its answer is worth."""
    said = {"answer": ["x"], "correct": 0.5, "scores": {"main": {"format": 1}, "sub": [{"format": 0.25}]}}
    options = {"score": {"rule": "reported"}, "scores": {"main": ["format"], "sub": ["format"]}}
    rollout = rollout_of(played(task_of(program(tmp_path, TEAM % f"json.dumps({said!r})"), **options)))
    assert rollout.correct == 0.5 and rollout.info["answer"] == ["x"]
    assert rollout.main.scores == {"format": 1.0} and rollout.invocations["sub"][0].scores == {"format": 0.25}
    result = played(task_of(program(tmp_path, TEAM % "'x'"), score={"rule": "reported"}))
    assert result.kind == "task" and "gave no `correct` with its answer" in result.failure


def test_an_outcome_that_nobody_reads_fails_the_rollout(tmp_path: Path) -> None:
    """A harness that says what its answer is worth would train on what the rule or score() says instead."""
    line = "json.dumps({'answer': 'x', 'correct': 0.5})"
    for options in ({}, {"score": {"rule": "f1"}}):
        result = played(task_of(program(tmp_path, TEAM % line), **options))
        assert result.kind == "task" and "`correct` = 0.5" in result.failure
        assert "task.options.score decides" in result.failure and 'rule = "reported"' in result.failure

    async def harness(question: Question, base_url: Access) -> object:
        return Answer(await ask(base_url, "main", question.text), correct=1.0)

    result = played(FunctionTask(harness, score=lambda question, answer: 1.0))
    assert result.kind == "task" and "FunctionTask.score() decides" in result.failure


def test_it_is_given_the_question_without_its_answers() -> None:
    """On stdin, as JSON."""
    given = {"text": "Größe?", "info": {"path": ["a"]}}
    assert run("import sys; print(sys.stdin.buffer.read().decode().strip())", given).value == json.dumps(
        given, ensure_ascii=False
    )


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (b"", None),
        (b"\n \n", None),
        (b"one\ntwo\n\n", "two"),
        (b"007", "007"),
        (b'"x"', '"x"'),
        (b"{", "{"),
        (b'{"city": "Suva"}', '{"city": "Suva"}'),
        (b'{"answer": {"city": "Suva"}}', {"city": "Suva"}),
        (b'x\n{"answer": null}\n', None),
        (b"\xff", "\ufffd"),
    ],
)
def test_the_last_line_is_the_answer(output: bytes, answer: object) -> None:
    """As text, unless it is an object with the key "answer"."""
    assert answer_of(output, "it").value == answer


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (b'{"answer": "x", "correct": 7}', "correct of it is 7"),
        (b'{"answer": "x", "correct": NaN}', "correct of it is nan"),
        (b'{"answer": "x", "score": 1}', "has no field 'score'"),
        (b'{"answer": "x", "scores": {"main": 1}}', "scores of 'main' of it are 1"),
    ],
)
def test_an_object_that_does_not_fit_is_no_text(output: bytes, words: str) -> None:
    """It would be scored as a wrong answer otherwise: it fails its rollout by name."""
    with pytest.raises(RolloutError, match=words):
        answer_of(output, "it")


def test_a_last_line_that_is_too_long_is_no_answer() -> None:
    """It is not cut in silence."""
    assert answer_of(b"x" * ANSWER_BYTES, "it").value == "x" * ANSWER_BYTES
    with pytest.raises(RolloutError, match="longer than"):
        answer_of(b"x" * (ANSWER_BYTES + 1), "it")
    with pytest.raises(RolloutError, match="longer than"):
        run(f"print('x' * {3 * ANSWER_BYTES})")


def test_its_environment_holds_no_key_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not named is not there; what is named and not set is refused."""
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    monkeypatch.setenv("SEARCH_KEY", "sk-2")
    text = "import os; print(sorted(v for v in os.environ.values() if v.startswith('sk-')))"
    assert run(text).value == "[]"
    assert run(text, env=("SEARCH_KEY",)).value == "['sk-2']"
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        run(text, env=("NO_SUCH_KEY",))


def test_a_question_that_nobody_reads_blocks_nobody() -> None:
    """Larger than any pipe."""
    assert run("print(1)", {"text": "x" * 5_000_000}).value == "1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; print('seven'); sys.exit('out of ideas')", "ended with status 1: out of ideas"),
        ("import os; os.abort()", "ended with SIGABRT, and wrote nothing to stderr"),
        ("import sys; sys.exit(3)", "ended with status 3"),
        ("import sys; sys.stderr.write('a' * 99999 + 'end'); sys.exit(1)", "a{997}end$"),
    ],
)
def test_a_command_that_fails_is_named_with_its_last_words(text: str, words: str) -> None:
    """Whatever it printed is no answer."""
    with pytest.raises(RolloutError, match=words):
        run(text)


def test_a_command_may_ask_for_another_try() -> None:
    """Status 75 is EX_TEMPFAIL."""
    with pytest.raises(InfrastructureError, match="ended with status 75: no network"):
        run("import sys; sys.stderr.write('no network'); sys.exit(75)")


def test_a_command_that_floods_is_ended() -> None:
    """With the bound, and long before it would have ended itself."""
    with pytest.raises(RolloutError, match=r"wrote more than 1000000 bytes; task.options.output_mb"):
        run("while True: print('x' * 1000)", output_bytes=1_000_000)


def test_a_command_that_cannot_be_started_is_the_configs_matter(tmp_path: Path) -> None:
    """It would fail every rollout alike; the preflight finds it first."""
    task = KitTask({"command": ["no-such-program"]}, ("main", "sub"))

    async def preflight(task: KitTask) -> None:
        try:
            await task.preflight()
        finally:
            await task.close()

    with pytest.raises(ConfigError, match="there is no program 'no-such-program'"):
        asyncio.run(preflight(task))
    with pytest.raises(ConfigError, match="cannot be started"):
        played(KitTask({"command": ["no-such-program"]}, ("main", "sub")))
    with pytest.raises(ConfigError, match="no such folder"):
        asyncio.run(preflight(KitTask({"command": ["true"], "folder": str(tmp_path / "x")}, ("main", "sub"))))


CHILDREN = """
import subprocess
sleeper = "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"
child = subprocess.Popen([sys.executable, "-S", "-c", sleeper])
with open({file!r} + ".new", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
os.replace({file!r} + ".new", {file!r})
ask("main", "x")
"""


def ended_by(end: str, task: KitTask, engine: Engine, pids: Path) -> str:
    """Why a rollout failed that is cancelled once its command runs, or left to end."""
    if end != "cancelled":
        return played(task, engine).failure

    async def one() -> str:
        playing = asyncio.create_task(play(task, RolloutRequest("7/3", FIJI, 1), agents(engine), 1))
        try:
            async with asyncio.timeout(60):
                while not pids.exists() and not playing.done():
                    await asyncio.sleep(0.01)
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
            await task.close()
        return "cancelled" if playing.cancelled() else playing.result().failure

    return asyncio.run(one())


@pytest.mark.parametrize("end", ["cancelled", "exit", "failure", "killed"])
def test_its_children_end_with_it(end: str, tmp_path: Path) -> None:
    """Whatever ended the rollout: its cancellation (a deadline is one), the command itself, its failure, a signal."""
    pids = tmp_path / "pids"
    last = {
        "cancelled": "child.wait()",
        "exit": "print('Nukualofa')",
        "failure": "sys.exit(1)",
        "killed": f"os.kill(os.getpid(), {int(signal.SIGKILL)})",
    }
    engine = Engine(echo)
    failure = ended_by(
        end, task_of(program(tmp_path, CHILDREN.format(file=str(pids)) + last[end])), engine, pids
    )
    words = {"cancelled": "cancelled", "exit": "", "failure": "status 1", "killed": "SIGKILL"}
    assert words[end] in failure and bool(failure) == (end != "exit") and not engine.held
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not is_alive(pid), f"the end of process {pid}", 20)  # type: ignore[misc]


def test_no_more_processes_than_there_are_places(tmp_path: Path) -> None:
    """Six rollouts at once and one place: none meets another's process."""
    lock = f"os.mkdir({str(tmp_path / 'lock')!r})\n"
    task = task_of(
        program(
            tmp_path, f"{lock}ask('main', 'x')\nos.rmdir({str(tmp_path / 'lock')!r})\nprint('Nukualofa')"
        ),
        processes=1,
    )

    async def all_of_them() -> list[float]:
        team = agents(Engine(echo))
        try:
            async with asyncio.timeout(100), asyncio.TaskGroup() as group:
                jobs = [
                    group.create_task(play(task, RolloutRequest("7/3", FIJI, k), team, 1)) for k in range(6)
                ]
        finally:
            await task.close()
        return [rollout_of(job.result()).correct for job in jobs]

    assert asyncio.run(all_of_them()) == [1.0] * 6


def test_a_rollout_that_waits_for_a_place_does_not_age() -> None:
    """Three of four seconds each, one after the other: none is late by a deadline of five."""
    task = KitTask({"command": ["true"]}, ("main", "sub"))

    async def main() -> float:
        task._places = asyncio.Semaphore(1)

        async def one() -> None:
            async with outage.timeout(5.0), task._place():
                await asyncio.sleep(4.0)

        await asyncio.gather(*(one() for _ in range(3)))
        return fake_clock.now()

    assert fake_clock.run(main()) == 12.0


def test_a_secret_question_is_not_in_its_failure(tmp_path: Path) -> None:
    """What the command wrote of it is withheld."""
    secret = replace(FIJI, secret=True)
    result = played(
        task_of(program(tmp_path, 'sys.exit("I was asked: " + question["text"])')), question=secret
    )
    assert result.kind == "task" and "withheld" in result.failure and "neighbour" not in result.failure
    told = played(task_of(program(tmp_path, 'sys.exit("I was asked: " + question["text"])')))
    assert "neighbour" in told.failure


def test_no_descriptor_is_left_open() -> None:
    """After commands that answered and commands that failed."""

    async def many() -> int:
        for text in ("print(1)", "import sys; sys.exit(1)") * 3:
            command = Command((sys.executable, "-S", "-c", text))
            with contextlib.suppress(RolloutError):
                await run_command(command, {}, command.environment({}))
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    async def before() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    assert asyncio.run(many()) == asyncio.run(before())


def test_a_command_is_reaped_although_its_end_was_cancelled(tmp_path: Path) -> None:
    """Its rollout is cancelled again while the command is still dying."""
    file = tmp_path / "pid"
    code = f"import os, signal; open({str(file)!r}, 'w').write(f'{{os.getpid()}}\\n'); signal.pause()"

    def is_child(pid: int) -> bool:
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    async def main() -> None:
        command = Command((sys.executable, "-S", "-c", code))
        running = asyncio.create_task(run_command(command, {}, dict(os.environ)))
        async with asyncio.timeout(60):
            while not (file.exists() and file.read_text().endswith("\n")):
                await asyncio.sleep(0.01)
            while not running.done():
                running.cancel()
                await asyncio.sleep(0)
            while is_child(int(file.read_text())):
                await asyncio.sleep(0.01)

    asyncio.run(main())
