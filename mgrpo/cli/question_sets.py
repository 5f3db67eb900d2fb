"""What `mgrpo bench` and `mgrpo filter` share: naming a question set on the command line, and a run's policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from mgrpo.benchmarks import read_questions
from mgrpo.benchmarks.questions import Where, digest_of
from mgrpo.benchmarks.readers import SOURCES, content_id
from mgrpo.cli.evaluate import policy_paths
from mgrpo.config import RunConfig, config_digest, load_config
from mgrpo.environments.stages import tasks_of_stages
from mgrpo.environments.task import Question, Split, Task
from mgrpo.errors import ConfigError
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.progress import Display

TASK = "task"  # the source of the task's own questions; its path is a split


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A set as it was named: NAME=SOURCE:PATH."""

    name: str
    source: str
    path: str

    @property
    def label(self) -> str:
        return f"{self.source}:{self.path}"


def named_set(text: str) -> NamedSet:
    """NAME=SOURCE:PATH, e.g. gaia=gaia:2023/validation/metadata.parquet. Raises ConfigError."""
    name, equals, place = text.partition("=")
    if not equals or not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise ConfigError(
            f"--set {text!r}: expected NAME=SOURCE:PATH, the name of letters, digits, '.', '_' and '-'"
        )
    return NamedSet(name, *source_and_path(place))


def source_and_path(text: str) -> tuple[str, str]:
    """SOURCE:PATH; without a source: a jsonl file of one's own. Raises ConfigError."""
    source, colon, path = text.partition(":")
    if colon and source in (*SOURCES, TASK) and path:
        return source, path
    if text.endswith(".jsonl") and (not colon or Path(text).exists()):
        return "jsonl", text
    raise ConfigError(
        f"{text!r}: expected SOURCE:PATH with a source of {', '.join(SOURCES)}, {TASK}; or a .jsonl file"
    )


def questions_of(
    source: str, path: str, task: Task, *, where: Where | None = None, limit: int | None = None
) -> list[Question]:
    """The questions of a set; "task": those of a split of the task itself. Each has an id. Raises ConfigError."""
    if source != TASK:
        return read_questions(source, Path(path), where=where or {}, limit=limit)
    if where:
        raise ConfigError(f"{TASK}:{path}: --where chooses among the questions of a file")
    return task_questions(task, path, limit)


def task_questions(task: Task, split: str, n: int | None) -> list[Question]:
    """The questions of a task's split: all that its question_set() gives, or n that its questions() does. Each has an
    id, by its text where the task gives none. Raises ConfigError."""
    if split not in get_args(Split):
        raise ConfigError(f"split {split!r}: expected one of {', '.join(get_args(Split))}")
    task = tasks_of_stages(task, 1)[-1]
    whole = getattr(task, "question_set", None)
    if whole is None and n is None:
        raise ConfigError(
            f"{type(task).__name__} has no question_set(): say how many of its questions are wanted"
        )
    found = list(whole(split)) if whole is not None else list(task.questions(split, n))  # type: ignore[arg-type]
    named = {q.id: q for q in (q if q.id else replace(q, id=content_id(q.text, *q.gold)) for q in found)}
    return list(named.values())[:n]


def parse_where(texts: Sequence[str]) -> Where | None:
    """TAG=VALUE,VALUE ...; None for none. Raises ConfigError."""
    where = {}
    for text in texts:
        tag, equals, values = text.partition("=")
        if not (equals and tag and values):
            raise ConfigError(f"--where {text!r}: expected TAG=VALUE or TAG=VALUE,VALUE")
        where[tag] = values.split(",")
    return where or None


def policies_of(run: Path, before: bool = False) -> tuple[RunConfig, dict[str, Path]]:
    """A run's config and the policy folder of each role: of a run's folder those after RL, or before it; of a TOML file
    the models that it names. Raises ConfigError naming what is missing."""
    if run.suffix in (".toml", ".json") and run.is_file():
        config = load_config(run)
        folders = {role: config.agents[config.policy_of(role)].model for role in config.roles}
        for role, folder in folders.items():
            if folder is None:
                raise ConfigError(
                    f"{run}: agents.{config.policy_of(role)}.model is unset; give the folder of a run"
                )
        return config, {role: Path(str(folder)) for role, folder in folders.items()}
    config = recorded_run(run)
    paths = policy_paths(config, RunFolder(run), "start" if before else "final")
    if paths is None:
        hint = "" if before else "; --before takes the policies that it starts from"
        raise ConfigError(f"{run}: not trained to the end yet{hint}")
    return config, paths


def header_of(
    config: RunConfig, paths: Mapping[str, Path], label: str, questions: Sequence[Question], **more: object
) -> dict[str, object]:
    """What a journal was begun with, so that another set or run does not go on with it."""
    return {
        "run": config_digest(config),
        "policies": {role: str(path) for role, path in sorted(paths.items())},
        "set": label,
        "questions": digest_of(questions),
        **more,
    }


class Counter:
    """Shows how far a set is: a bar in a terminal, else a line every tenth of the way."""

    def __init__(self, display: Display, label: str, done: int, total: int) -> None:
        self._display, self._label, self._done, self._total = display, label, done, total
        self._shown = 10 * done // max(1, total)
        if done:
            display.line(f"{label}: {done} of {total} rollouts are there from an earlier start")

    def __call__(self, _: object) -> None:
        self._done += 1
        left = self._display.advance(self._label, self._done, self._total)
        tenth = 10 * self._done // max(1, self._total)
        if tenth > self._shown and not self._display.console.is_terminal:
            self._shown = tenth
            self._display.line(
                f"{self._label}: {self._done}/{self._total} rollouts" + (f" ({left})" if left else "")
            )
