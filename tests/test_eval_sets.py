"""Named evaluation sets: their configuration, when each is due, what is played, and what is made of it."""

from __future__ import annotations

import asyncio
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mgrpo.benchmarks
from mgrpo.benchmarks.statistics import QuestionScores
from mgrpo.config import load_config
from mgrpo.config.evaluation import EvalSetConfig
from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.pipeline.eval_sets import MAX_VALUES, EvalSet, _words, play_set, read_set, result_of
from mgrpo.pipeline.evaluations import Evaluations
from mgrpo.pipeline.play import RolloutResult
from mgrpo.run.monitor import Progress, _set_line, _Summary
from mgrpo.run.processes import load_run_task
from mgrpo.run.reports import MALFORMED, checked, values_of
from mgrpo.store.records import Reported
from mgrpo.types import Rollout
from mgrpo.view.top import RunStatus, render
from tests.play_kit import GivenTask, SlowEngine, team
from tests.runs import RELAY
from tests.staged_relay import StagedRelay

TASK = 'task = { name = "tests.staged_relay:StagedRelay" }'
REPORT = {
    "step": 6, "split": "gaia", "mode": "sampled", "n": 3, "repeats": 2, "avg": 0.5, "stderr": 0.25, "failed": 1,
    "tags": {"level-1": 0.75, "level-2": 0.0},
}  # fmt: skip


def config(**settings: Any) -> EvalSetConfig:
    return EvalSetConfig.model_validate({"name": "probe", "source": "task"} | settings)


# -- config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('{ name = "heldout", source = "task" }', "'heldout': expected letters"),
        ('{ name = "a/b", source = "task" }', "'a/b': expected letters, digits, '_', '-' and '.'"),
        ('{ name = "a", source = "gaia" }', "path of set 'a' is missing: source 'gaia' reads a file"),
        (
            '{ name = "a", source = "task", path = "x" }',
            "path has no effect on set 'a' with source = \"task\"",
        ),
        ('{ name = "a", source = "task", options = { x = 1 } }', "options has no effect on set 'a'"),
        ('{ name = "a", source = "task", greedy = true, repeats = 2 }', "repeats=2 has no effect on set 'a'"),
        ('{ name = "a", source = "task", repeats = 0 }', "eval.sets.0.repeats"),
        ('{ name = "a", source = "task" }, { name = "a", source = "task" }', "two sets are called 'a'"),
    ],
)
def test_what_cannot_be_a_set_is_refused_by_name(table: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(RELAY, [f"eval.sets=[{table}]"])
    assert words in str(error.value)


def test_the_file_of_a_set_lies_beside_the_config(tmp_path: Path) -> None:
    """In the copy that a run keeps of its config too, wherever that lies."""
    path = tmp_path / "run.toml"
    path.write_text(
        RELAY.read_text() + '[[eval.sets]]\nname = "hard"\nsource = "jsonl"\npath = "../hard.jsonl"\n'
    )
    first = load_config(path, ["eval.sets.0.n=3"])
    kept = tmp_path / "elsewhere" / "config.json"
    kept.parent.mkdir()
    kept.write_text(first.model_dump_json())
    for found in (first, load_config(kept)):
        assert (found.eval.sets[0].path, found.eval.sets[0].n) == (str(tmp_path.parent / "hard.jsonl"), 3)


def test_a_set_that_the_task_does_not_offer_is_refused() -> None:
    load_run_task(load_config(RELAY, [TASK, 'eval.sets=[{ name = "probe", source = "task" }]']))
    with pytest.raises(
        ConfigError, match=r"eval.sets.0.name 'nope': task .* has no such set \(its sets: probe\)"
    ):
        load_run_task(load_config(RELAY, [TASK, 'eval.sets=[{ name = "nope", source = "task" }]']))


# -- questions ---------------------------------------------------------------------------------------------------------


def test_questions_come_from_the_reader_or_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first n of them; the reader gets the set's own options."""
    calls = []

    def read(source: str, path: Path, **options: object) -> list[Question]:
        calls.append((source, path, options))
        return [Question(str(i), "", id=str(i)) for i in range(5)]

    monkeypatch.setattr(mgrpo.benchmarks, "read_questions", read, raising=False)
    task = StagedRelay({}, ("main",))
    given_file = config(source="jsonl", path="/x/y.jsonl", options={"limit": 9}, n=2)
    assert [q.id for q in read_set(0, given_file, task).questions] == ["0", "1"]
    assert calls == [("jsonl", Path("/x/y.jsonl"), {"limit": 9})]
    assert [q.id for q in read_set(0, config(n=3), task).questions] == ["probe/0", "probe/1", "probe/2"]
    assert len(read_set(0, config(), task).questions) == 6


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda *_: [], r"^eval.sets.2 \(probe\): /x holds no question$"),
        (
            lambda *_: (_ for _ in ()).throw(ConfigError("/x, line 3: no id")),
            r"^eval.sets.2 \(probe\): /x, line 3",
        ),
        (lambda *_: Path("/does/not/exist").read_text(), r"^eval.sets.2 \(probe\): .*No such file"),
        (lambda *_: {}["answer"], r"^eval.sets.2 \(probe\): KeyError: 'answer' \(.*test_eval_sets.py:\d+\)$"),
    ],
)
def test_a_set_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, read: Any, words: str) -> None:
    monkeypatch.setattr(mgrpo.benchmarks, "read_questions", read, raising=False)
    with pytest.raises(ConfigError, match=words):
        read_set(2, config(source="jsonl", path="/x"), StagedRelay({}, ("main",)))


# -- when --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.lists(st.integers(0, 40), unique=True), st.sets(st.integers(0, 40)))
def test_a_set_is_played_once_in_every_stretch_of_steps(
    every: int, versions: list[int], before: set[int]
) -> None:
    """Of the versions that come, of which some may be passed over, the first in each stretch of `every` steps but the
    first stretch; what an earlier worker played up to there counts."""
    played = EvalSet(config(every=every), [], set(before))
    for step in sorted(versions):
        stretch = [s for s in played.played if s <= step and s // every == step // every]
        assert played.due(step) == (step >= every and not stretch)
        if played.due(step):
            played.played.add(step)


class Stored:
    """A store with reports, two to a page."""

    def __init__(self, *reports: tuple[str, dict[str, Any]]) -> None:
        self.kept = [Reported(i, "worker", kind, payload) for i, (kind, payload) in enumerate(reports)]
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def reports(self, after: int = -1) -> list[Reported]:
        return [r for r in self.kept if r.seq > after][:2]

    def report(self, kind: str, payload: dict[str, Any]) -> None:
        self.sent.append((kind, payload))


def evaluations(store: Stored, sets: str, recorded: list[Any]) -> Evaluations:
    context: Any = SimpleNamespace(
        config=load_config(RELAY, [TASK, f"eval.sets=[{sets}]", "eval.every=4"]),
        store=store,
        task=Coin(),
        team=SimpleNamespace(agents=team(SlowEngine())),
        recorder=SimpleNamespace(evaluation=lambda *given: recorded.append(given)),
        check_rewards=lambda rollout: None,
    )
    return Evaluations(context)


class Coin(StagedRelay):
    """Whether a rollout is right follows from its question and its number: question i is right in rollouts < i. The
    third question's second rollout fails."""

    def __init__(self, fails: bool = True, all_fail: bool = False) -> None:
        super().__init__({}, ("main", "left", "right"))
        self.fails, self.all_fail = fails, all_fail

    async def play(self, question: Question, episode: Episode) -> Rollout:
        number = int(str(question.info["index"]))
        if self.all_fail or (self.fails and (number, episode.rollout) == (2, 1)):
            raise InfrastructureError("the search is down")
        main = episode.open("main")
        main.append("hi")
        await main.sample(2, stop=".")
        main.close(format=1.0)
        return episode.finish(float(episode.rollout < number))


def test_what_is_due_is_played_and_reported_once() -> None:
    """The store knows of step 4 from an earlier life: only then is the set not played again. Validation keeps its own
    steps, and of a question's repeats one is recorded."""
    store, recorded = Stored(*[("step", {})] * 3, ("eval_set", {"split": "probe", "step": 4})), []  # type: ignore[var-annotated]
    found = evaluations(store, '{ name = "probe", source = "task", every = 2, repeats = 2, n = 3 }', recorded)
    found.prepare()
    assert [found.due(step) for step in (0, 1, 2, 4, 5)] == [False, False, True, True, True]
    validated: list[int] = []

    async def run(split: str, step: int) -> None:
        validated.append(step)
        found._evaluated = step

    found.run = run  # type: ignore[method-assign, assignment]
    for step in (2, 3, 4, 5, 6, 8):
        asyncio.run(found.run_due(step))
    asyncio.run(found.run_sets(8))
    asyncio.run(found.run_sets(9))
    assert [payload["step"] for _, payload in store.sent] == [2, 6, 8, 9] and validated == [4, 8]
    wanted = {"split": "probe", "mode": "sampled", "n": 3, "repeats": 2, "avg": 0.5, "failed": 1}
    wanted |= {
        "step": 2,
        "stderr": pytest.approx(math.sqrt(0.5**2 * 2 / 2 / 3)),
        "tags": {"half-a": 0.5, "half-b": 0.5},
    }
    assert store.sent[0] == ("eval_set", wanted)
    assert [(r[0], r[1], r[2], r[3]) for r in recorded[:3]] == [(2, "probe", "sampled", i) for i in range(3)]
    assert len(recorded) == 4 * 3


# -- what comes of it --------------------------------------------------------------------------------------------------


def test_a_greedy_set_is_played_once_at_temperature_zero() -> None:
    seen: list[RolloutResult] = []
    task, temperatures = Coin(fails=False), set()
    play = task.play

    async def watched(question: Question, episode: Episode) -> Rollout:
        temperatures.update(agent.temperature for agent in episode.agents.values())
        return await play(question, episode)

    task.play = watched  # type: ignore[method-assign]
    one = read_set(0, config(greedy=True, n=3), task)
    result = asyncio.run(
        play_set(task, one, team(SlowEngine()), step=6, seed=1, seen=lambda n, r: seen.append(r))
    )
    assert [r.request.rollout for r in seen] == [0, 0, 0] and temperatures == {0.0}
    assert result.avg == pytest.approx(2 / 3) and result.failed == 0


def test_a_set_of_which_nothing_ends_is_an_outage() -> None:
    """As in every evaluation: the worker ends with the last reason."""
    task = Coin(all_fail=True)
    one = read_set(0, config(n=2, repeats=2), task)
    with pytest.raises(
        InfrastructureError, match=r"all 4 rollouts of evaluation set 'probe' failed.*search is down"
    ):
        asyncio.run(play_set(task, one, team(SlowEngine()), step=6, seed=1, seen=lambda n, r: None))


def scored(tags: dict[str, str], *outcomes: float) -> QuestionScores:
    return QuestionScores("", tags, dict(enumerate(outcomes)), {9: "task"} if not outcomes else {})


@given(st.lists(st.lists(st.floats(0, 1), max_size=4), min_size=1, max_size=8).filter(any))
def test_figures_are_numpys_over_the_means_of_the_questions(outcomes: list[list[float]]) -> None:
    """A question without a rollout left has no part in them."""
    result = result_of([scored({"all": "yes"}, *o) for o in outcomes], 4)
    means = [float(np.mean(o)) for o in outcomes if o]
    assert result.avg == pytest.approx(np.mean(means), abs=1e-12)
    assert result.tags == {"all-yes": result.avg} and result.failed == len(outcomes) - len(means)
    if len(means) < 2:
        assert result.stderr is None
    else:
        assert result.stderr == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)), abs=1e-12)


def test_tags_are_parts_of_a_metrics_name() -> None:
    """What another letter stands for is the same tag; one with a value for each question is none, nor is one whose
    rollouts all failed."""
    assert _words({"Level": "a b", "kind of": "a/b", "x": "?"}) == {
        "Level": "a_b",
        "kind_of": "a_b",
        "x": "none",
    }
    found = result_of(
        [scored({"l": "1"}, 1.0), scored({"l": "1"}, 0.0), scored({"l": "2"}, 1.0), scored({"l": "3"})], 1
    )
    assert found.tags == {"l-1": 0.5, "l-2": 1.0}
    many = [scored({"id": str(i)}, 1.0) for i in range(MAX_VALUES + 1)]
    assert result_of(many, 1).tags == {} and len(result_of(many[1:], 1).tags) == MAX_VALUES


# -- where it is shown -------------------------------------------------------------------------------------------------


def test_a_sets_figures_become_metrics() -> None:
    step, values = values_of("eval_set", REPORT)
    assert (step, values) == (
        6,
        {
            "eval/gaia/avg": 0.5, "eval/gaia/stderr": 0.25, "eval/gaia/failed": 1.0,
            "eval/gaia/level-1/avg": 0.75, "eval/gaia/level-2/avg": 0.0,
        },
    )  # fmt: skip
    assert "eval/gaia/stderr" not in values_of("eval_set", REPORT | {"stderr": None})[1]
    assert checked(Reported(1, "w", "eval_set", dict(REPORT))).kind == "eval_set"
    assert checked(Reported(1, "w", "eval_set", REPORT | {"avg": "good"})).kind == MALFORMED
    line = "gaia at step 6: avg 0.500 ± 0.250  (3 questions, 2 sampled each, 1 rollouts failed)"
    assert _set_line(6, REPORT) == line
    assert _set_line(6, REPORT | {"mode": "greedy", "stderr": None, "failed": 0}).endswith(
        "(3 questions, greedy)"
    )
    progress = Progress()
    assert progress.take("worker:0/rollout-0#1", "eval_set", REPORT)
    assert not progress.take("worker:0/rollout-0#2", "eval_set", REPORT)


def test_the_summary_knows_a_set_from_validation(tmp_path: Path) -> None:
    """From reports and, in a resumed run, from metrics.jsonl."""
    first, again = _Summary(load_config(RELAY)), _Summary(load_config(RELAY))
    first.take("eval_set", REPORT)
    _, values = values_of("eval_set", REPORT)
    line = {"step": 6, "time": 1.0, "seq": 4, **values, "eval/validation/sampled": 0.125}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    again.restore(tmp_path)
    assert first.result(1.0, True)["sets"] == {"gaia": {"6": {"avg": 0.5, "stderr": 0.25}}}
    assert again.result(1.0, True)["sets"] == first.result(1.0, True)["sets"]
    assert (first.result(1.0, True)["validation"], again.result(1.0, True)["validation"]) == (
        {},
        {"6": {"sampled": 0.125}},
    )


def test_top_shows_the_sets_beside_validation() -> None:
    from rich.console import Console

    status = RunStatus(load_config(RELAY))
    status.take(4, {"eval/validation/sampled": 0.25})
    status.take(*values_of("eval_set", REPORT))
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(render(status))
    text = console.export_text()
    assert "accuracy  validation at step 4: sampled 0.250; gaia at step 6: avg 0.500 ± 0.250" in text


def test_tasks_without_sets_say_so() -> None:
    async def script(episode: Episode) -> object:
        raise AssertionError

    with pytest.raises(ConfigError, match=r"\(probe\): NotImplementedError: GivenTask has no evaluation set"):
        read_set(0, config(), GivenTask(script))
