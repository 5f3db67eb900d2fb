"""Several rollouts of each question of a set, with a journal that a later start of the same command goes on from.

    <journal> = one JSON object a line: first what is played (the header), then one line a rollout as it ends

A rollout that failed is written too, and played again by the next start: an engine, tool or judge may answer then. What
a line holds of a rollout are numbers and names, and the answer unless the set is redacted; see Line.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import msgspec

from mgrpo.benchmarks.questions import order_key
from mgrpo.benchmarks.statistics import QuestionScores
from mgrpo.config import RunConfig
from mgrpo.environments.episode import Agent, mix
from mgrpo.environments.failure import encodable
from mgrpo.environments.lifetime import close_task, preflight
from mgrpo.environments.task import Question, Task
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, all_failed, play

MAX_FAILED = (
    64  # rollouts in a row that fail for the infrastructure: an outage, which no further rollout mends
)
BLOCKED = (
    "rollout/task/blocked"  # metric of a task: results that a block list left out, and calls that it refused
)
ANSWER = 1000  # characters that are kept of an answer

Key = tuple[str, int]
"""A question's id and the number of the repeat."""


class Line(msgspec.Struct, omit_defaults=True):
    """One rollout of a journal."""

    id: str
    repeat: int
    correct: float | None = None
    """Its outcome; None: it failed."""
    failed: str = ""
    """Kind of its failure."""
    answer: str | None = None
    """Never of a redacted set."""
    tokens: dict[str, int] = msgspec.field(default_factory=dict)
    """Role -> tokens of its trajectories."""
    calls: dict[str, int] = msgspec.field(default_factory=dict)
    """Sub-agent role -> invocations."""
    tools: dict[str, int] = msgspec.field(default_factory=dict)
    """Status -> tool calls, of a task that records them (rollout.info["tools"])."""
    blocked: int = 0
    """Results that a block list left out, and calls that it refused."""
    digest: str = ""
    """Of what scored it."""
    seconds: float = 0.0


def line_of(result: RolloutResult, redact: bool) -> Line:
    """What a journal keeps of a result."""
    request, rollout = result.request, result.rollout
    if rollout is None:
        return Line(request.question.id, request.rollout, failed=str(result.kind), seconds=result.seconds)
    line = Line(request.question.id, request.rollout, float(rollout.correct), seconds=result.seconds)
    for trajectory in rollout.trajectories():
        line.tokens[trajectory.role] = line.tokens.get(trajectory.role, 0) + len(trajectory)
    line.calls = rollout.d_k()
    answer = rollout.info.get("answer")
    if not redact and answer is not None:
        line.answer = encodable(str(answer))[:ANSWER]
    for call in _tables(rollout.info.get("tools")):
        if (status := call.get("status")) in ("ok", "empty", "tool_error"):
            line.tools[str(status)] = line.tools.get(str(status), 0) + 1
    line.blocked = int(sum(rollout.metrics.get(BLOCKED, [])))
    for verdict in _tables(rollout.info.get("verdict")):
        line.digest = str(verdict.get("digest") or "")[:64]
    return line


def _tables(value: object) -> Iterator[Mapping[str, Any]]:
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, Mapping):
            yield part


class Journal:
    """The rollouts that were played so far. Use as a context manager."""

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        """Opens the file, or begins it. header: what is played; JSON. Raises ConfigError where the file was begun with
        another one, and where it cannot be read or written."""
        self.path, self._header = path, dict(header)
        self.lines: dict[Key, Line] = {}
        try:
            whole = self._read() if path.exists() else 0
            self._file: TextIO = path.open("a", encoding="utf-8")
            self._file.truncate(whole)  # a torn last line
            if not whole:
                self._write(json.dumps(self._header))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None

    def _read(self) -> int:
        """Take in the lines; the number of bytes up to the last whole one."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        first, *others = data[:whole].splitlines() or [b"null"]
        try:
            header = json.loads(first)
            lines = [msgspec.json.decode(line, type=Line) for line in others]
        except (ValueError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{self.path}: not a journal of this command ({error}); move it away") from None
        if whole:
            self._check(header)
        self.lines = {(line.id, line.repeat): line for line in lines}
        return whole

    def _check(self, header: object) -> None:
        if header == self._header:
            return
        known = header if isinstance(header, dict) else {}
        names = [n for n in sorted({*known, *self._header}) if known.get(n) != self._header.get(n)]
        changed = ", ".join(f"{n} {known.get(n)!r} -> {self._header.get(n)!r}" for n in names)
        raise ConfigError(
            f"{self.path}: was begun with other settings ({changed}); give the same ones, or delete it to begin again"
        )

    def add(self, line: Line) -> None:
        """Raises OSError."""
        self.lines[line.id, line.repeat] = line
        self._write(msgspec.json.encode(line).decode())

    def _write(self, text: str) -> None:
        self._file.write(f"{text}\n")
        self._file.flush()

    def played(self, key: Key) -> bool:
        """Whether this rollout has an outcome."""
        line = self.lines.get(key)
        return line is not None and line.correct is not None

    def scores(self, questions: Sequence[Question], repeats: int) -> list[QuestionScores]:
        """Of each question, in their order."""
        found = []
        for question in questions:
            scores = QuestionScores(question.id, question.tags)
            for repeat in range(repeats):
                line = self.lines.get((question.id, repeat))
                if line is not None and line.correct is not None:
                    scores.scores[repeat] = line.correct
                elif line is not None:
                    scores.failed[repeat] = line.failed
            found.append(scores)
        return found

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Repeats:
    """Which rollouts of which questions."""

    questions: Sequence[Question]
    repeats: int
    seed: int
    """A rollout's noise follows from it, the question's id and the repeat, whatever else is in the set."""
    redact: bool = False
    """Keep no answers."""

    def missing(self, journal: Journal) -> list[tuple[Question, int]]:
        """The rollouts without an outcome, one question after the other."""
        pairs = [(q, r) for q in self.questions for r in range(self.repeats)]
        return [(q, r) for q, r in pairs if not journal.played((q.id, r))]


class Player:
    """Plays rollouts of a task with a team of agents. Use as an async context manager: leaving it closes the engines
    and the task's services."""

    def __init__(self, config: RunConfig, task: Task, agents: Mapping[str, Agent]) -> None:
        """config: whose bounds hold: rollouts side by side and seconds of each, seconds of the preflight."""
        self._task, self._agents, self._name = task, agents, config.task.label
        self._at_once = config.rollout.concurrency or config.rollout.slots
        self._deadline, self._patience = config.rollout.deadline, config.store.idle_timeout
        self._asked = False

    async def play(self, what: Repeats, journal: Journal, done: Callable[[Line], None]) -> None:
        """Play every rollout that the journal has no outcome of; `done` is called with each as it ends. The task's
        services are asked before the first (preflight).

        Raises InfrastructureError where nothing could be scored, and where MAX_FAILED in a row failed for the
        infrastructure: the journal is kept. ConfigError as the task's preflight and services."""
        missing = what.missing(journal)
        if missing and not self._asked:
            self._asked = True
            await preflight(self._task, self._name, self._patience)
        state, todo = _State(), iter(missing)

        async def one_after_the_other() -> None:
            for question, repeat in todo:
                await self._one(what, question, repeat, journal, done, state)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._at_once, len(missing))):
                    group.create_task(one_after_the_other())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others are the same, or the cancellation it caused
        if missing and not any(line.correct is not None for line in journal.lines.values()):
            raise InfrastructureError(all_failed(len(missing), "the set", state.last))

    async def _one(
        self, what: Repeats, question: Question, repeat: int, journal: Journal, done: Callable[[Line], None],
        state: _State,
    ) -> None:  # fmt: skip
        request = RolloutRequest(f"set/{order_key(question.id):016x}", question, repeat)
        seed = mix(what.seed, order_key("noise", question.id))
        result = await play(self._task, request, self._agents, seed, deadline=self._deadline)
        line = line_of(result, what.redact or question.secret)
        journal.add(line)
        done(line)
        state.last = result.failure or state.last
        state.row = state.row + 1 if result.kind == "infrastructure" else 0
        if state.row >= MAX_FAILED:
            raise InfrastructureError(
                f"{state.row} rollouts in a row failed, the last with: {state.last}; started again, the command goes on"
            )

    async def __aenter__(self) -> Player:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await close_task(self._task)
        finally:
            for agent in self._agents.values():
                await agent.engine.close()


@dataclass(slots=True)
class _State:
    row: int = 0  # rollouts in a row that failed for the infrastructure
    last: str = ""  # failure
