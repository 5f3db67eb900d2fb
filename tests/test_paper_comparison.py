"""The comparison of the paper: one start for all variants, a single agent, no alignment, repeats, costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mgrpo.cli.comparison import jobs, verdict
from mgrpo.cli.comparison.command import Request, compare
from mgrpo.cli.comparison.scores import means_of
from mgrpo.cli.comparison.spent import (
    cost_table,
    costs,
    evaluation_table,
    evaluations,
    held_equal,
    heldout,
    spent,
)
from mgrpo.cli.comparison.variants import chosen, single_agent
from mgrpo.config import RunConfig, dump_config, load_config
from mgrpo.environments.comparison import BEFORE_RL, COTRAIN, MODES
from mgrpo.environments.stages import StagedTask
from mgrpo.errors import ConfigError
from mgrpo.run.folder import RunFolder
from tests.research_kit import KitTask
from tests.runs import RELAY, ROOT

PAPER = ROOT / "examples" / "deep_research" / "paper.toml"
FACTBOOK = ROOT / "examples" / "deep_research" / "factbook.toml"
ATLAS = ROOT / "examples" / "atlas" / "atlas.toml"


def test_the_single_agent_is_main_with_all_tools() -> None:
    """The config of the variant has no trace of another role, in no stage; main may write as much as any of them."""
    sets = ["agents.sub.max_length=20000", "agents.main.max_length=9000", 'task.options.agents.sub.about="reads"',
            'task.options.agents.main.prompt="lead"', "task.stages.1.reward.sub.expert=0.25",
            "task.stages.1.reward.main.format=0.2", 'task.stages.1.options.agents.sub.prompt="hard"']  # fmt: skip
    config = load_config(PAPER, sets)
    task = StagedTask([KitTask(), KitTask()], lambda index: 0)
    alone = single_agent(config, task)
    assert alone.roles == ("main",) and alone.agents["main"].max_length == 20000
    assert "agents" not in alone.task.options and "agents" not in alone.task.stages[1].options
    assert alone.task.stages[1].reward == {"main": {"format": 0.2}}
    assert alone.task.stages[1].options["questions"] == config.task.stages[1].options["questions"]
    same = {"max_length": 20000}
    assert alone.agents["main"] == config.agents["main"].model_copy(update=same)
    assert (alone.trainer, alone.eval, alone.seed) == (config.trainer, config.eval, config.seed)


def test_the_prompt_of_the_single_agent_is_its_own() -> None:
    """options.single counts where main is alone, which has every tool, and is nothing to a team."""
    options = {"single": {"prompt": "you alone"}, "agents": {"main": {"prompt": "you lead"}}}
    assert KitTask(options).team["main"].prompt == "you lead"
    alone = KitTask(KitTask(options).single_agent(options), roles=("main",)).team["main"]
    assert alone.prompt == "you alone" and alone.tools.names == ("search", "visit") and not alone.delegates
    other = KitTask(KitTask().single_agent({"agents": {"sub": {"about": "x"}}}), roles=("main",))
    assert other.team["main"].prompt == KitTask({}, roles=("main",)).team["main"].prompt


def test_a_task_without_a_single_agent_refuses_it_by_name(tmp_path: Path) -> None:
    """Nothing is written; a variant that the config is already is refused as well, one that nobody named left out."""
    with pytest.raises(ConfigError, match=r"--variant 'single': the task atlas offers no single agent"):
        compare(Request(ATLAS, tmp_path / "a", [], names=["single"], dry_run=True))
    with pytest.raises(ConfigError, match=r"--variant 'no alignment': the config is that variant already"):
        plain = ['agents.sub.alignment.mode="none"']
        compare(Request(ATLAS, tmp_path / "a", plain, names=["no-alignment"], dry_run=True))
    assert not (tmp_path / "a").exists()


def stage_one(folder: Path, roles: tuple[str, ...] = ("main", "sub")) -> Path:
    """The folder of a finished run of the factbook example, whose policies are empty."""
    folder.mkdir(parents=True)
    dump_config(load_config(FACTBOOK), RunFolder(folder).config)
    for role in roles:
        (RunFolder(folder).agent(role) / "final").mkdir(parents=True)
    return folder


def test_the_papers_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run of every variant begins with the policies of one run before; the dry run shows all commands, which a
    shell can run, and starts nothing."""
    run, out = stage_one(tmp_path / "stage1"), tmp_path / "out"
    names = ["cotrain,main-only,single,no-alignment"]
    compare(Request(FACTBOOK, out, ["trainer.steps=2"], 3, repeats=3, names=names, origin=run, dry_run=True))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        "Held equal: rollouts, 2 steps x 2 questions x 4 rollouts = 16 a run. Tokens are not held equal."
    )
    assert [line.split(":")[0] for line in shown[1::2]] == [
        f"seed {seed}, {name}"
        for name in (COTRAIN, "frozen sub", "single", "no alignment")
        for seed in (1, 2, 3)
    ]
    assert all(line.startswith("  mgrpo train ") for line in shown[2::2])
    assert [path.name for path in out.iterdir()] == ["single.json"]
    basis = jobs.Basis(
        FACTBOOK, load_config(FACTBOOK), [], out, jobs.final_policies(run, load_config(FACTBOOK)), 3
    )
    for job in jobs.plan(basis, [1, 2], chosen(basis.config, names)):
        config = load_config(job.config, job.sets)
        assert (
            config.roles == (("main",) if job.variant.alone else ("main", "sub")) and config.seed == job.seed
        )
        for role, agent in config.agents.items():
            assert agent.model == str(run / "agents" / role / "final") and agent.sft.steps == 0
            assert agent.frozen == (job.variant.name == "frozen sub" and role == "sub")
        if job.variant.name == "no alignment":
            assert config.agents["sub"].alignment.mode == "none"
        validated = load_config(FACTBOOK).eval.start_validation if job.variant.name == COTRAIN else 0
        assert config.eval.start_validation == validated


def test_a_missing_start_is_named(tmp_path: Path) -> None:
    """A role without a policy after RL is an error before anything starts; so is a folder that is no run's."""
    run = stage_one(tmp_path / "stage1", ("main",))
    with pytest.raises(
        ConfigError, match=r"no policy of 'sub' after RL \(.*agents/sub/final does not exist\)"
    ):
        jobs.final_policies(run, load_config(FACTBOOK))
    with pytest.raises(ConfigError, match="no policy of 'left' after RL"):
        jobs.final_policies(run, load_config(RELAY))
    with pytest.raises(ConfigError, match="not a run's folder"):
        jobs.final_policies(tmp_path, load_config(FACTBOOK))


def test_given_models_are_starts(tmp_path: Path) -> None:
    """Runs whose config names the policies wait for the co-training run's validation and for no file of it."""
    basis = jobs.Basis(FACTBOOK, load_config(FACTBOOK), [], tmp_path)
    first, other = jobs.plan(basis, [1], chosen(basis.config, ["main-only"]))
    assert other.start == first.folder and not [s for s in other.sets if ".model=" in s]
    first.folder.mkdir(parents=True)
    metrics = first.folder / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 0, "time": 1.0, "start_validation/valid": 1.0}) + "\n")
    assert not jobs._has_start(basis, first.folder)
    metrics.write_text(json.dumps({"step": 1, "time": 2.0, "main/reward/mean": 0.5}) + "\n")
    assert jobs._has_start(basis, first.folder)
    made = jobs.Basis(RELAY, load_config(RELAY), [], tmp_path)
    assert not jobs._has_start(made, first.folder)


def test_repeats_reach_the_named_sets(tmp_path: Path) -> None:
    """Every sampled set of every run is played so often; a folder that was begun with other repeats is refused."""
    sets = ["eval.sets.2.repeats=1", "eval.sets.2.greedy=true"]
    config = load_config(PAPER, sets)
    basis = jobs.Basis(PAPER, config, sets, tmp_path, repeats=5)
    (job,) = jobs.plan(basis, [1], chosen(config, ["cotrain"]))
    assert [s.repeats for s in load_config(job.config, job.sets).eval.sets] == [5, 5, 1]
    (usual,) = jobs.plan(jobs.Basis(PAPER, config, sets, tmp_path), [1], chosen(config, ["cotrain"]))
    wanted = load_config(usual.config, usual.sets)
    assert [s.repeats for s in wanted.eval.sets] == [3, 3, 1]
    job.folder.mkdir(parents=True)
    dump_config(wanted, RunFolder(job.folder).config)
    jobs.check([usual])
    with pytest.raises(ConfigError, match="other repeats of its evaluation sets"):
        jobs.check([job])


def test_a_question_counts_by_its_rollouts() -> None:
    """Means over the rollouts of each question; one of which all failed is in no mean, and in no difference."""
    assert means_of([[1.0, 0.0, 0.0, 1.0], [], [1.0]]) == [0.5, None, 1.0]
    results: Mapping[int, Mapping[str, Any]] = {
        1: {
            COTRAIN: {mode: [1.0, None, 0.5, 1.0] for mode in MODES},
            "single": {mode: [0.5, 1.0, None, 0.0] for mode in MODES},
        }
    }
    line = verdict.row(results, "single")["sampled"]
    assert line["mean"] == 0.5 and line["by_seed"] == [0.5] and line["cotrain_minus"] == 0.75
    assert 0.5 <= line["low"] <= 0.75 <= line["high"] <= 1.0
    assert line["stderr"] == pytest.approx((0.25 / 3) ** 0.5)  # variance 0.25 of 0.5, 1, 0
    assert verdict.root_mean_square([0.3, 0.4, float("nan"), None]) == pytest.approx(0.125**0.5)
    (row,) = heldout([verdict.row(results, "single")], 3)
    assert evaluation_table([row])[1] == ["heldout", "single", "avg@3 0.500", "± 0.000", "0.289"]


def finished(folder: Path, config: RunConfig, records: list[dict[str, float]], sets: object = None) -> Path:
    folder.mkdir(parents=True)
    dump_config(config, RunFolder(folder).config)
    lines = [json.dumps({"time": 1.0, **record}) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps({"outcome": "finished", "sets": sets or {}}))
    return folder


def test_what_runs_cost(tmp_path: Path) -> None:
    """Failed rollouts are not trained on, a step that was trained again counts once, all that was sampled counts."""
    sets = ["trainer.steps=2", "trainer.questions=2", "trainer.group_size=4"]
    config = load_config(RELAY, sets)
    team: list[dict[str, float]] = [
        {"step": 0, "rollout/tokens/main": 100, "rollout/tokens/left": 30},
        {"step": 1, "main/rollouts/failed": 2.0},
        {"step": 1, "main/rollouts/failed": 1.0},
        {"step": 1, "rollout/tokens/main": 60, "rollout/tokens/right": 10},
        {"step": 2, "main/rollouts/failed": 0.0},
    ]
    run = finished(tmp_path / "team", config, team)
    assert spent(run) == {"rollouts": 7 + 8, "tokens": {"main": 160, "left": 30, "right": 10}}
    frozen = load_config(RELAY, [*sets, "agents.main.frozen=true"])
    lone: list[dict[str, float]] = [
        {"step": s, "left/rollouts/failed": 0.0, "rollout/tokens/main": 25} for s in (1, 2)
    ]
    rows = costs(
        {COTRAIN: {1: run}, "frozen main": {1: finished(tmp_path / "frozen", frozen, lone)}, "lr 0": {}}
    )
    assert [(row["name"], row["rollouts"], row["total"], row["of_cotrain"]) for row in rows] == [
        (COTRAIN, 15.0, 200.0, 1.0),
        ("frozen main", 16.0, 50.0, 0.25),
    ]
    assert cost_table(rows) == [
        ["variant", "rollouts trained on", "sampled tokens", "main", "left", "right", "of co-training's"],
        [COTRAIN, "15", "200", "160", "30", "10", "1.00"],
        ["frozen main", "16", "50", "50", "-", "-", "0.25"],
    ]
    assert "2 steps x 2 questions x 4 rollouts = 16 a run" in held_equal(config)
    shutil.rmtree(run)
    assert cost_table(costs({COTRAIN: {1: finished(run, config, [])}}))[1] == [COTRAIN, "0", "-", "-"]


def test_named_sets_are_those_of_the_runs_ends(tmp_path: Path) -> None:
    """avg@n of the last step, and before RL of co-training's first, over the seeds."""
    config = load_config(PAPER)

    def run(name: str, *averages: float) -> Path:
        steps = {
            str(25 * i): {"avg": value, "stderr": 0.1 * (1 + i)}
            for i, value in reversed([*enumerate(averages)])
        }
        return finished(tmp_path / name, config, [], {"gaia": steps})

    runs = {
        COTRAIN: {1: run("a", 0.1, 0.3, 0.5), 2: run("b", 0.2, 0.3, 0.7)},
        "single": {1: run("c", 0.1, 0.4)},
    }
    rows = {row["name"]: row for row in evaluations(runs)}
    assert list(rows) == [BEFORE_RL, COTRAIN, "single"]
    assert rows[BEFORE_RL]["by_seed"] == [0.1, 0.2] and rows[COTRAIN]["by_seed"] == [0.5, 0.7]
    assert rows[COTRAIN]["mean"] == pytest.approx(0.6) and rows[COTRAIN]["stderr"] == pytest.approx(0.3)
    assert rows[COTRAIN]["std_over_seeds"] == pytest.approx(0.2 / 2**0.5)
    assert evaluation_table([rows["single"]])[1] == ["gaia", "single", "avg@3 0.400", "± 0.000", "0.200"]
