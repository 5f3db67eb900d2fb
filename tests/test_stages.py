"""The curriculum: which stage a group is of follows from its number alone, in the config, the task, the rewards, and a
whole run that is killed in mid-stage, resumed and replayed."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.cli.comparison.variants import variants
from mgrpo.cli.replay import replay_run
from mgrpo.config import RunConfig, config_digest, load_config
from mgrpo.config.load import check_same_run
from mgrpo.config.task import TaskConfig, merged
from mgrpo.credit import StageRewards
from mgrpo.environments.episode import Episode
from mgrpo.environments.lifetime import close_task, preflight
from mgrpo.environments.stages import StagedQuestion, StagedTask, load_staged
from mgrpo.environments.task import Question, Task
from mgrpo.errors import ConfigError
from mgrpo.pipeline.batch import BatchBuilder
from mgrpo.pipeline.play import Unasked, question_of
from mgrpo.pipeline.worker_context import index_of, main_reward, query_of
from mgrpo.record.reader import Recording
from mgrpo.run.processes import load_run_task
from mgrpo.types import Rollout
from mgrpo.view.data import RunView
from tests.play_kit import SlowEngine, team
from tests.runs import (
    RELAY,
    command,
    leftovers,
    processes_of,
    records,
    resume,
    started,
    steps_of,
    summary,
    wait_for,
)
from tests.staged_relay import StagedRelay
from tests.test_batch import Tokens, claimed
from tests.worker_kit import ROLES, Worker

STAGES = """[
    { name = "form", until = 2, options = { questions = { level = 1 } }, reward = { main = { format = 0.9 } } },
    { until = 5, options = { questions = { level = 2 } }, reward = { left = { expert = 0.0 } } },
    { name = "hard", options = { questions = { level = 3 }, fail_every = 4 } },
]""".replace("\n", " ")
TASK = 'task = { name = "tests.staged_relay:StagedRelay", options = { questions = { level = 0, more = 1 } } }'


def config(*overrides: str) -> RunConfig:
    return load_config(RELAY, [TASK, f"task.stages={STAGES}", *overrides])


# -- config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            "[{ until = 4 }, { until = 4 }, {}]",
            "until=4 of stage 2 must be higher than until=4 of the stage before",
        ),
        ("[{ until = 4 }, { until = 3 }, {}]", "until=3 of stage 2 must be higher than until=4"),
        ("[{}, {}]", "until of stage 1 is missing: only the last stage has none"),
        ("[{ until = 4 }]", "until=4 of the last stage: it lasts to the end of the run"),
        ("[{ until = 0 }, {}]", "task.stages.0.until"),
        ('[{ name = "a", until = 4 }, { name = "a" }]', "two stages are called 'a'"),
        ("[{ until = 4, steps = 3 }, {}]", "task.stages.0.steps: unknown key"),
        (
            "[{ until = 4, reward = { top = { format = 1.0 } } }, {}]",
            "task.stages.0.reward.top: no such role",
        ),
        (
            "[{ until = 4 }, { reward = { main = { format = -1.0 } } }]",
            "stages.1.reward.main.format: Input should",
        ),
        (
            "[{ until = 4 }, { reward = { main = { gate = 2 } } }]",
            "task.stages.1.reward.main.gate: Input should",
        ),
        (
            "[{ until = 4 }, { reward = { left = { correct = 1.0 } } }]",
            "stages.1.reward.left.correct has no meaning",
        ),
        (
            "[{ until = 4 }, { reward = { main = { format = 0.0, correct = 0.0 } } }]",
            "task.stages.1.reward.main has no part with a weight above 0",
        ),
    ],
)
def test_what_cannot_be_a_curriculum_is_refused_by_name(stages: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(RELAY, [f"task.stages={stages}"])
    assert words in str(error.value)


@given(st.lists(st.integers(1, 60), unique=True, max_size=5), st.integers(0, 100))
def test_the_stage_of_a_step_is_the_first_that_has_not_ended(ends: list[int], step: int) -> None:
    """Beside a search from the front."""
    stages = [*({"until": end} for end in sorted(ends)), {}]
    task = TaskConfig.model_validate({"name": "x", "stages": stages})
    wanted = next((n for n, end in enumerate(sorted(ends)) if step < end), len(ends))
    assert task.stage_at(step) == wanted and task.stage_at(10**9) == task.last_stage == len(ends)


def test_a_group_belongs_to_the_stage_of_the_step_that_claims_it() -> None:
    """With trainer.oversample a step claims more groups than it trains on: 6 of 4 questions here."""
    staged = config("trainer.oversample=1.5")
    assert staged.trainer.pool == 6
    assert [staged.stage_of(index) for index in (0, 11, 12, 29, 30, 10**6)] == [0, 0, 1, 1, 2, 2]


def test_options_are_laid_over_key_by_key() -> None:
    below = {"a": 1, "t": {"x": 1, "y": {"p": 1}}, "list": [1, 2], "kind": {"z": 1}}
    above = {"t": {"y": {"q": 2}, "w": 3}, "list": [3], "kind": 5, "new": {"n": 0}}
    assert merged(below, above) == {
        "a": 1, "t": {"x": 1, "y": {"p": 1, "q": 2}, "w": 3}, "list": [3], "kind": 5, "new": {"n": 0},
    }  # fmt: skip
    assert below["t"] == {"x": 1, "y": {"p": 1}}, "what lies below was changed"
    assert config().task.stage_options(1) == {"questions": {"level": 2, "more": 1}}
    assert config().task.with_options({"questions": 7}).stage_options(2) == {"questions": 7, "fail_every": 4}


def test_a_run_without_stages_is_the_run_it_was() -> None:
    """The digest, by which stores know runs that were begun before there were stages, does not change; a curriculum
    belongs to it, and cannot change in a run that has begun."""
    plain = load_config(RELAY)
    tree = plain.model_dump(mode="json")
    assert tree["task"].pop("stages") == []
    assert config_digest(plain) == config_digest(RunConfig.model_validate(tree))
    assert plain.stage_of(10**6) == 0 and plain.stage_reward("main", 0) is plain.agents["main"].reward
    moved = config("task.stages.1.until=6")
    assert config_digest(config()) != config_digest(moved)
    with pytest.raises(ConfigError, match=r"task\.stages"):
        check_same_run(config(), moved)


def test_an_override_names_a_stage_by_its_number() -> None:
    changed = config("task.stages.0.until=1", "task.stages.2.options.questions.level=4")
    assert [stage.until for stage in changed.task.stages] == [1, 5, None]
    assert changed.task.stage_options(2)["questions"] == {"level": 4, "more": 1}
    for bad, words in (("task.stages.3.until=9", "not a section"), ("task.stages.x=9", "has 3 entries")):
        with pytest.raises(ConfigError, match=words):
            config(bad)


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_are_laid_over_part_by_part() -> None:
    """Only what a stage names changes, and evaluations are of the last stage."""
    staged = config()
    rewards = StageRewards(staged)
    assert staged.trainer.pool == 4
    parts = [rewards.of_group("main", index).parts for index in (0, 8, 20)]
    assert parts == [{"format": 0.9, "correct": 0.8}, *[{"format": 0.2, "correct": 0.8}] * 2]
    assert [rewards.of_group("main", i).gate for i in (0, 8)] == [False, False]
    left = {"format": 0.1, "outcome": 0.5, "expert": 0.4}
    assert rewards.of_group("left", 8).parts == left | {"expert": 0.0}
    assert rewards.of_evaluation("left").parts == rewards.of_group("left", 0).parts == left


def test_a_step_with_groups_of_two_stages_pays_each_by_its_own() -> None:
    """Groups 1 and 2 of pools of two: 0.1 format + 0.5 outcome + 0.4 expert before the border, expert 0 after it."""
    staged = load_config(
        RELAY,
        [
            "trainer.questions=2",
            "task.stages=[{ until = 1 }, { reward = { left = { expert = 0.0, format = 0.3 } } }]",
        ],
    )
    groups = [claimed(f"{i // 2}/{i}", i, {0: [0.5], 1: [1.0], 2: [0.0]}, failed=3) for i in (1, 2)]
    batch = BatchBuilder(staged, "left", Tokens(), ranks=1).build(0, groups)
    rewards = {(m.group, m.invocation.rollout): m.reward for m in batch.members}
    wanted = {(0, 0): 0.3, (0, 1): 1.0, (0, 2): 0.1, (1, 0): 0.3, (1, 1): 0.8, (1, 2): 0.3}
    assert rewards == pytest.approx(wanted, abs=1e-15)
    assert batch.mean[1] == pytest.approx((0.3 + 0.8 + 0.3) / 3)


def test_the_worker_pays_the_main_agent_by_the_group() -> None:
    """Of an outcome of 1 and a format of 0.5."""

    async def run() -> Rollout:
        episode = Episode("0/0", 0, team(SlowEngine()), 1)
        main = episode.open("main")
        main.append("hi")
        await main.sample(2, stop=".")
        main.close(format=0.5)
        return episode.finish(1.0)

    pay, rollout = main_reward(config()), asyncio.run(run())
    assert [pay(index, rollout) for index in (7, 8, 20)] == pytest.approx([1.25, 0.9, 0.9])


@given(st.integers(0, 10**7), st.integers(1, 400))
def test_a_group_is_known_by_its_query(index: int, pool: int) -> None:
    assert index_of(query_of(index, pool)) == index
    assert index_of(f"eval/sampled/{index}") is None and index_of(f"eval/{index}/{index}") is None


def test_a_part_that_the_task_does_not_score_in_a_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run, naming the stage."""
    every = {role: frozenset({"format", "expert"}) for role in ("left", "right")} | {
        "main": frozenset({"format"})
    }
    monkeypatch.setattr(StagedRelay, "scores", every)
    known = "agents.right.reward.format=0.0"
    load_run_task(config(known))
    with pytest.raises(
        ConfigError, match=r"^task.stages.1: agents.main.reward.style = 0.5: the task does not score"
    ):
        load_run_task(config(known, "task.stages.1.reward.main.style=0.5"))


def test_the_comparison_takes_the_expert_out_of_every_stage() -> None:
    """The control "expert off" would train on it again in a stage that sets it."""
    staged = config()
    off = next(v for v in variants(staged) if v.name == "expert off").overrides
    assert "task.stages.1.reward.left.expert=0.0" in off
    changed = config("task.stages.1.reward.left.expert=0.7", *off)
    for stage in range(3):
        assert changed.stage_reward("left", stage).parts["expert"] == 0.0


# -- the task ----------------------------------------------------------------------------------------------------------


def staged_task() -> StagedTask:
    task = load_staged(config())
    assert isinstance(task, StagedTask)
    return task


def test_questions_are_of_their_stage_and_evaluations_of_the_last() -> None:
    """A pure function of the number: asked in any order, and again."""
    task = staged_task()
    assert [task.question(i, 1).id for i in (30, 0, 7, 8, 19, 20, 0)] == [
        "level-3/30", "level-1/0", "level-1/7", "level-2/8", "level-2/19", "level-3/20", "level-1/0",
    ]  # fmt: skip
    question = task.question(8, 1)
    assert isinstance(question, StagedQuestion) and question.stage == 1
    assert (question.text, question.answer, question.info) == ("w22 w2", "even", {"index": 8})
    assert [q.id for split in ("validation", "heldout") for q in task.questions(split, 1)] == [
        "level-3/0"
    ] * 2  # type: ignore[arg-type]
    assert task.evaluation_sets == ("probe",) and task.evaluation_set("probe", 2)[1].id == "probe/1"


def test_a_question_is_played_by_the_task_of_its_stage() -> None:
    """StagedRelay refuses questions of another level."""
    task, played = staged_task(), []

    class Seen:
        def __init__(self, level: int) -> None:
            self.level = level

        async def play(self, question: Question, episode: Any) -> Any:
            played.append((self.level, type(question) is Question, question.id))

    task.stages = tuple(Seen(i) for i in range(3))  # type: ignore[assignment]
    asked = [staged_task().question(i, 1) for i in (0, 8, 20)]
    for question in (*asked, Question("typed", "")):
        asyncio.run(task.play(question, None))  # type: ignore[arg-type]
    assert played == [(0, True, "level-1/0"), (1, True, "level-2/8"), (2, True, "level-3/20"), (2, True, "")]


def test_what_is_no_question_is_named_as_without_stages() -> None:
    task = staged_task()
    task.stages[1].question = lambda index, seed: "w1"  # type: ignore[method-assign, assignment, return-value]
    unasked = question_of(task, 8, 1)
    assert (
        isinstance(unasked, Unasked) and "question(8) returned an object of type str" in unasked.failure.text
    )


def test_stages_with_the_same_options_are_one_task() -> None:
    same = load_config(RELAY, [TASK, "task.stages=[{ until = 2, reward = { main = { format = 0.9 } } }, {}]"])
    assert isinstance(load_staged(same), StagedRelay)
    thrice = load_config(
        RELAY, [TASK, "task.stages=[{ until = 2 }, { until = 4, options = { fail_every = 2 } }, {}]"]
    )
    task = load_staged(thrice)
    assert isinstance(task, StagedTask) and task.stages[0] is task.stages[2] is not task.stages[1]


def test_stages_that_the_task_refuses_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"task.stages.1: task 'tests.staged_relay:StagedRelay': invalid literal"
    ):
        load_staged(config('task.stages.1.options.questions.level="two"'))
    one, other = staged_task().stages[:2]
    other.chat = True
    with pytest.raises(ValueError, match="chat of stage 2 is not that of stage 1"):
        StagedTask([one, other], lambda index: 0)


def test_every_stage_has_its_preflight_and_is_closed(tmp_path: Path) -> None:
    """Once each, whatever another one raises."""
    notes = tmp_path / "notes"
    task = load_staged(config(f'task.options.notes="{notes}"'))

    async def broken() -> None:
        raise OSError("the socket is gone")

    async def both() -> None:
        await preflight(task, "relay", 10.0)
        task.stages[0].close = broken  # type: ignore[attr-defined]
        await close_task(task)

    asyncio.run(both())
    words = [line.rsplit(" ", 1)[0] for line in notes.read_text().splitlines()]
    assert words == ["preflight 1", "preflight 2", "preflight 3", "close 2", "close 3"]


class Refusing(StagedRelay):
    """preflight() raises, or never ends."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__({}, ("main",))
        self.error = error

    async def preflight(self) -> None:
        if self.error is None:
            await asyncio.Event().wait()
        else:
            raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError("judge: model 'x' is unknown"), "^judge: model 'x' is unknown$"),
        (KeyError("url"), r"^preflight of task 'relay': KeyError: 'url' \(.*test_stages.py:\d+\)$"),
        (TimeoutError("of its own"), "^preflight of task 'relay': TimeoutError: of its own"),
        (None, r"^preflight of task 'relay' had not ended after 0.01 s \(store.idle_timeout\)$"),
    ],
)
def test_a_preflight_ends_in_plain_words(error: BaseException | None, words: str) -> None:
    task: Task = Refusing(error)
    with pytest.raises(ConfigError, match=words):
        asyncio.run(preflight(task, "relay", 0.01 if error is None else 10.0))


def test_a_worker_ends_where_its_preflight_fails(tmp_path: Path) -> None:
    """With the ConfigError by which its process ends with status 2, and the run with it; the task is closed."""
    notes = tmp_path / "notes"
    task = StagedRelay({"refuse": "the judge at :9 is silent", "notes": str(notes)}, ROLES)
    worker = Worker(tmp_path, task)
    with pytest.raises(
        ConfigError, match=r"^preflight of task 'tests.relay:RelayTask': the judge at :9 is silent$"
    ):
        worker.worker.run()
    worker.close()
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["preflight", "close"]
    assert worker.store.records == []


# -- a whole run -------------------------------------------------------------------------------------------------------

STEPS = 8
CHOSEN = {"0/3/0": 0.9, "1/7/0": 0.9, "2/8/0": 0.2, "5/23/2": 0.2, "6/24/0": 0.2, "7/31/1": 0.2}
"""Rollouts on both sides of each border -> the weight of their format score."""


def test_killed_in_mid_stage_and_resumed_a_run_goes_through_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers; the launcher is killed within the second stage, and all processes with it; the resumed run has one.
    Every group has the question of its number, no evaluation set is played twice, and replay finds the training of
    every stage bit-equal, what the resumed trainer did included."""
    out, notes = tmp_path / "run", tmp_path / "notes"
    border = STAGES.replace("until = 5", "until = 6").replace(
        "reward = { left = { expert = 0.0 } }", "reward = {}"
    )
    sets = [
        TASK, f"task.stages={border}", f'task.options.notes="{notes}"', f"trainer.steps={STEPS}",
        'eval.sets=[{ name = "probe", source = "task", every = 3, repeats = 2, n = 4 }]',
        "rollout.workers=2", "trainer.checkpoint_every=2", "eval.heldout=2", "eval.validation=2",
    ]  # fmt: skip
    alone = RELAY.with_name("alone.toml")
    with started(command("train", str(alone), "--out", str(out), *(f"--set={s}" for s in sets))) as process:
        wait_for(lambda: steps_of(out) >= 3 or process.poll() is not None, "step 3")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=100)
    wait_for(lambda: not processes_of(out), "the end of its processes")
    assert steps_of(out) < STEPS
    output = resume(out, "rollout.workers=1")
    assert leftovers(out) == []
    heads = [r.head for r in Recording([out]).rollouts.values()]
    questions = {head.query: head.question for head in heads if head.split == "train"}
    task = load_staged(load_config(alone, sets))
    assert questions == {query_of(i, 4): task.question(i, 3).text for i in range(4 * STEPS)}
    assert "stage hard from step 6 on" in output
    words = [line.rsplit(" ", 1)[0] for line in notes.read_text().splitlines()]
    assert [words.count(f"preflight {n}") for n in (1, 2, 3)] == [
        2,
        2,
        2,
    ]  # of worker 0, in both lives of the run
    assert [words.count(f"close {n}") for n in (1, 2, 3)] == [3, 3, 3]  # of every worker
    failed = {r["step"]: r["rollout/failed"] for r in records(out) if "rollout/failed" in r}
    assert (failed[5], failed[6], failed[7]) == (0.0, 4.0, 4.0)  # fail_every is an option of the last stage
    for name in ("avg", "stderr", "half-a/avg", "failed"):
        assert [r["step"] for r in records(out) if f"eval/probe/{name}" in r] == [0, 3, 6, 8]
    assert list(summary(out)["sets"]["probe"]) == ["0", "3", "6", "8"]
    replay_run(out, list(CHOSEN), sample=0, seed=0)
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(CHOSEN)} rollouts: every stage bit-equal"
    check_page(out)


def check_page(out: Path) -> None:
    """The page shows what was paid by the weights of each rollout's stage."""
    view = RunView(out)
    for name, weight in CHOSEN.items():
        (main,) = view.rollout(name)["trajectories"]
        parts = {p["name"]: p for p in main["parts"]}
        assert parts["format"]["weight"] == weight
        assert main["credit"]["reward"] == sum(p["weight"] * p["score"] for p in parts.values())
    assert [step for step, *_ in view.overview()["series"]["eval/probe/avg"]] == [0, 3, 6, 8]
