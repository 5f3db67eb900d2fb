"""The comparison: which runs wait for which, what is paired with what, and which claims a table supports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrpo.algorithms.mgrpo import MGrpo
from mgrpo.algorithms.registry import open_algorithm
from mgrpo.cli.comparison import jobs, verdict
from mgrpo.cli.comparison.shuffled import ShuffledRewards
from mgrpo.cli.comparison.variants import Variant, chosen, scores, variants
from mgrpo.config import load_config
from mgrpo.config.algorithm import MGrpoAlgorithm
from mgrpo.config.reward import RewardConfig
from mgrpo.environments.comparison import BEFORE_RL, COTRAIN, MODES, Figures
from mgrpo.errors import ConfigError
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.processes import load_run_task
from mgrpo.tasks.atlas.claims import claims
from tests.algorithm_kit import random_groups
from tests.runs import RELAY, ROOT, command, finish

ATLAS = ROOT / "examples" / "atlas" / "atlas.toml"


def test_every_variant_is_a_config_that_can_run() -> None:
    """Names are distinct, overrides are accepted, and each changes what is computed."""
    config = load_config(ATLAS)
    every = variants(config)
    assert every[0].name == COTRAIN and len({v.name for v in every}) == len(every)
    for variant in every[1:]:
        assert variant.alone or load_config(ATLAS, variant.overrides) != config
    assert [v.name for v in chosen(config, ["lr 0"])] == [COTRAIN, "lr 0"]
    assert [v.name for v in chosen(config, [])] == [v.name for v in every if not v.on_request]
    paper = chosen(config, ["cotrain,main-only", "single, no-alignment"])
    assert [v.name for v in paper] == [COTRAIN, "frozen sub", "single", "no alignment"]
    with pytest.raises(ConfigError, match=r"'lr 1': expected one of .*lr-0, no-alignment, .*single"):
        chosen(config, ["lr 1"])
    asked = scores(config.roles, every, load_run_task(config).controls)
    names = [s.name for s in asked]
    assert [set(s.policies) for s in asked if s.name in ("single", "no alignment")] == [
        {"main"},
        {"main", "sub"},
    ]
    assert names[0] == BEFORE_RL and len(set(names)) == len(names)
    assert names[-2:] == ["random search results", "permuted facts"]


def basis_of(path: Path, out: Path, *overrides: str, **more: Any) -> jobs.Basis:
    return jobs.Basis(path, load_config(path, overrides), overrides, out, **more)


class FakeRuns:
    """Stands in for `mgrpo train`: a process that leaves what a run leaves, without training anything."""

    def __init__(self, fails: set[tuple[int, str]]) -> None:
        self.fails, self.started = fails, list[tuple[int, str]]()

    def __call__(self, job: jobs.Job) -> Any:
        self.started.append((job.seed, job.variant.name))
        outcome = "invalid" if (job.seed, job.variant.name) in self.fails else "finished"
        script = (
            "import sys, json, pathlib\n"
            "root = pathlib.Path(sys.argv[1])\n"
            "for role in ('main', 'sub'):\n"
            "    (root / 'agents' / role / 'start').mkdir(parents=True, exist_ok=True)\n"
            "    (root / 'agents' / role / 'start' / 'config.json').write_text('{}')\n"
            "(root / 'summary.json').write_text(json.dumps({'outcome': sys.argv[2], 'reason': 'the start'}))\n"
        )
        job.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", script, str(job.folder), outcome])


def test_runs_wait_for_their_seed_and_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variants start after their seed's co-training; a failed start takes its seed along and no other; what is finished
    is never started again."""
    basis = basis_of(ATLAS, tmp_path)
    planned = jobs.plan(basis, [1, 2], chosen(basis.config, ["frozen sub", "lr 0"]))
    fake = FakeRuns({(2, COTRAIN)})
    monkeypatch.setattr(jobs, "_start", fake)
    lines: list[str] = []
    failed = jobs.run_all(basis, planned, 2, lines.append)
    assert set(fake.started) == {(1, COTRAIN), (2, COTRAIN), (1, "frozen sub"), (1, "lr 0")}
    assert fake.started.index((1, COTRAIN)) < fake.started.index((1, "lr 0"))
    assert failed["seed 2, co-training"] == "the start"
    assert failed["seed 2, lr 0"] == "its seed's co-training run failed"
    again = FakeRuns(set())
    monkeypatch.setattr(jobs, "_start", again)
    assert jobs.run_all(basis, planned, 2, lines.append) == {}
    assert set(again.started) == {(2, COTRAIN), (2, "frozen sub"), (2, "lr 0")}


def test_variants_begin_with_the_start_policies_of_their_seed(tmp_path: Path) -> None:
    """Their configs name the co-training run's start policies and train none of their own."""
    basis = basis_of(ATLAS, tmp_path, "trainer.steps=5")
    config, slow = basis.config, Variant("lr 0", "", ("agents.sub.optimizer.lr=0.0",))
    _, job = jobs.plan(basis, [3], [Variant(COTRAIN, ""), slow])
    made = load_config(job.config, job.sets)
    assert (made.seed, made.trainer.steps, made.agents["sub"].optimizer.lr) == (3, 5, 0.0)
    for role in config.roles:
        assert made.agents[role].model == str(
            tmp_path / "runs" / "seed-3" / COTRAIN / "agents" / role / "start"
        )
        assert made.agents[role].sft.steps == 0


def result(n: int, rate: float, rng: np.random.Generator, easy: np.ndarray | None = None) -> dict[str, Any]:
    chance = np.full(n, rate) if easy is None else np.clip(easy + rate - 0.5, 0, 1)
    return {"n": n, **{m: (rng.random(n) < chance).astype(float).tolist() for m in MODES}}


def test_intervals_cover_the_truth_and_pairing_narrows_them() -> None:
    """Of many experiments with a known difference about 95 % of the intervals hold it; shared difficulty cancels."""
    rng = np.random.default_rng(0)
    covered, n = 0, 60
    for trial in range(40):
        difference = rng.normal(0.2, 1.0, (1, n))
        low, high = verdict.interval(difference, trial)
        covered += low <= 0.2 <= high
    assert 34 <= covered <= 40
    shared = rng.normal(0, 1, (3, 200))
    noise = rng.normal(0, 0.1, (3, 200))
    paired = np.diff(verdict.interval(noise))[0]
    unpaired = np.diff(verdict.interval(shared - np.roll(shared, 7, axis=1) + noise))[0]
    assert paired < unpaired / 3


def test_a_row_says_mean_spread_and_difference() -> None:
    """The numbers of the table are those of the outcomes; an equal variant differs by exactly 0."""
    results: Mapping[int, Mapping[str, Any]] = {
        s: {COTRAIN: {m: [1.0, 1.0, 1.0, 0.0] for m in MODES},
            "lr 0": {m: [1.0, 0.0, 0.0, float(s == 2)] for m in MODES}}
        for s in (1, 2)
    }  # fmt: skip
    line = verdict.row(results, "lr 0")["sampled"]
    assert line["by_seed"] == [0.25, 0.5] and line["mean"] == 0.375
    assert line["std_over_seeds"] == pytest.approx(np.std([0.25, 0.5], ddof=1))
    assert line["cotrain_minus"] == 0.375 and line["low"] <= 0.375 <= line["high"]
    assert "cotrain_minus" not in verdict.row(results, COTRAIN)["greedy"]


def test_claims_follow_the_numbers() -> None:
    """Good numbers hold every claim that was measured; each bad one breaks its own; what is missing is not measured."""
    rng = np.random.default_rng(1)
    rates = {COTRAIN: 0.97, BEFORE_RL: 0.15, "frozen sub": 0.2, "frozen main": 0.2, "shuffled rewards": 0.15,
             "random search results": 0.0, "permuted facts": 0.95, "only sub trained (cross pair)": 0.3}  # fmt: skip
    results = {s: {name: result(400, rate, rng) for name, rate in rates.items()} for s in (1, 2, 3)}
    for r in results.values():
        r["lr 0"] = r[BEFORE_RL]
        r["permuted facts"] |= {f"real_{m}": [0.0] * 400 for m in MODES}
        r[COTRAIN]["d_k"] = {"sub": {"1": 100, "2": 205, "3": 95}}
    table = {name: verdict.row(results, name) for name in results[1]}
    found = {c.text: c for c in claims(Figures(table, results, 2e-6))}
    unknown = {text for text, claim in found.items() if claim.holds is None}
    assert unknown == {f"expert off behind co-training, {mode}" for mode in MODES}
    assert all(c.holds in (True, None) for c in found.values()), [
        c for c in found.values() if c.holds is False
    ]
    assert found["d_k against the hop mix, total variation"].value == pytest.approx(0.0125)
    for r in results.values():
        r["lr 0"] = result(400, 0.5, rng)
    table = {name: verdict.row(results, name) for name in results[1]}
    broken = {c.text for c in claims(Figures(table, results, 2e-3)) if c.holds is False}
    assert broken == {
        "gain with lr 0, sampled", "gain with lr 0, greedy", "log-probs of sampler and trainer, largest difference",
    }  # fmt: skip


def test_equal_seconds_reads_both_curves_at_the_shorter_run(tmp_path: Path) -> None:
    """The slower run is read where the faster one ended, at its last evaluation before that."""

    def run(name: str, points: list[tuple[int, float, float]]) -> Path:
        (tmp_path / name).mkdir()
        lines = [{"step": s, "time": t, "eval/validation/sampled": v} for s, t, v in points]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    runs = {
        COTRAIN: {1: run("co", [(0, 100, 0.1), (10, 120, 0.5), (20, 141, 0.9)])},
        "frozen sub": {1: run("fs", [(0, 50, 0.1), (10, 65, 0.2), (20, 80, 0.3)])},
    }
    found = verdict.at_equal_seconds(runs, "sampled")
    assert found["frozen sub"] == {"seconds": 30.0, "accuracy": 0.3, "cotrain": 0.5}
    assert found[COTRAIN] == {"seconds": 41.0, "accuracy": 0.9, "cotrain": 0.9}


def test_shuffled_rewards_are_the_same_rewards_elsewhere() -> None:
    """The control changes who gets which reward of a group, the same way every time, and nothing else."""
    weights = RewardConfig(gate=False)
    control, other = (ShuffledRewards({"seed": seed}, "sub", weights) for seed in (1, 2))
    groups = [group for seed in range(8) for group in random_groups(seed)]
    moved = 0
    for group in groups:
        permuted = control.permuted(group)
        before, after = ([m.reward for m in g.members] for g in (group, permuted))
        assert sorted(before) == sorted(after)
        moved += before != after
        for a, b in zip(group.members, permuted.members, strict=True):
            assert (a.rollout, a.invocation, a.weight) == (b.rollout, b.invocation, b.weight)
            assert a.tokens is b.tokens and a.loss_mask is b.loss_mask
    assert moved > 8
    assert control.advantages(groups) == control.advantages(groups) != other.advantages(groups)
    plain = MGrpo(MGrpoAlgorithm(), "sub", weights)
    assert control.advantages(groups) == plain.advantages([control.permuted(g) for g in groups])


def test_the_control_of_shuffled_rewards_is_a_config(recorded: Path) -> None:
    """What the comparison overrides is a config that finds the class, for every role."""
    config = recorded_run(recorded)
    (variant,) = [v for v in variants(config) if v.name == "shuffled rewards"]
    changed = load_config(RunFolder(recorded).config, variant.overrides)
    assert all(isinstance(open_algorithm(changed, role), ShuffledRewards) for role in changed.roles)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_comparison_from_runs_to_report(tmp_path: Path) -> None:
    """The command trains, scores and reports; without an update a team is the team before RL, question by question;
    started again, it repeats no run and no score and says the same. Main alone stands beside the team, and the rollouts
    and tokens of each are shown."""
    out = tmp_path / "compare"
    short = ["trainer.steps=2", "trainer.questions=2", "eval.every=2", "eval.validation=2", "eval.heldout=2"]
    arguments = command(
        "compare", str(RELAY), "--out", str(out), "--seeds", "1", "--jobs", "1", "--n", "6", "--repeats", "2",
        "--variants", "lr-0,single",
        *(f"--set={s}" for s in short),
    )  # fmt: skip
    shown = finish(arguments, 1200)
    assert "lr 0" in shown and "only main trained (cross pair)" in shown
    report = json.loads((out / "compare.json").read_text())
    table = {row["name"]: row for row in report["table"]}
    scores = {p.stem: json.loads(p.read_text()) for p in (out / "scores" / "seed-1").glob("*.json")}
    for mode in MODES:
        assert scores["lr-0"][mode] == scores["before-RL"][mode] and len(scores["lr-0"][mode]) == 6
        assert table["lr 0"][mode]["mean"] == table["before RL"][mode]["mean"]
    page = (out / "compare.md").read_text()
    assert (
        "Overrides: `trainer.steps=2`, `trainer.questions=2`, " in page and "--variants lr-0,single" in page
    )
    assert "Tokens are not held equal" in page and "| rollouts trained on | sampled tokens |" in page
    assert (report["failed"], report["seeds"], report["n"], report["repeats"]) == ({}, [1], 6, 2)
    costs = {row["name"]: row for row in report["costs"]}
    assert {row["rollouts"] for row in costs.values()} == {
        2 * 2 * 4
    } and "2 questions x 4 rollouts = 16" in shown
    assert set(costs["lr 0"]["tokens"]) == {"main", "left", "right"} and set(costs["single"]["tokens"]) == {
        "main"
    }
    assert costs["single"]["total"] == costs["single"]["tokens"]["main"] > 0
    assert [row["repeats"] for row in report["evaluations"] if row["name"] == "single"] == [2]
    alone = recorded_run(out / "runs" / "seed-1" / "single")
    start = (out / "runs" / "seed-1" / COTRAIN / "agents" / "main" / "start").resolve()
    assert alone.roles == ("main",) and alone.agents["main"].model == str(start)
    assert (out / "compare.png").stat().st_size > 10_000
    written = {
        p: p.stat().st_mtime_ns for p in [*out.glob("scores/*/*.json"), *out.glob("runs/*/*/metrics.jsonl")]
    }
    assert "3 of 3 runs are finished already" in finish(arguments, 500)
    assert all(p.stat().st_mtime_ns == before for p, before in written.items())
    assert json.loads((out / "compare.json").read_text())["table"] == report["table"]


def results_page() -> Any:
    """docs/make_results.py, which is a script."""
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rate", "words"), [(1.0, "does better"), (0.97, "does as well"), (0.6, "falls behind")]
)
def test_the_results_page_says_what_the_numbers_say(rate: float, words: str) -> None:
    """Claims that do not hold are named with their bound, and the shared policy is judged by its interval."""
    page, rng = results_page(), np.random.default_rng(2)
    rates = {COTRAIN: 0.97, BEFORE_RL: 0.15, "shared": rate, "frozen sub": 0.8}
    results = {s: {name: result(400, r, rng) for name, r in rates.items()} for s in (1, 2, 3)}
    del results[2]["shared"]
    table = [verdict.row(results, name) for name in rates]
    found = claims(Figures({row["name"]: row for row in table}, results, None))
    report = {"seeds": [1, 2, 3], "table": table, "claims": [c.as_json() for c in found],
              "runs": {"shared": {"1": "", "3": ""}}}  # fmt: skip
    said = page.reading(report)
    assert any(
        line.startswith("Does not hold: co-training minus frozen sub, sampled, measured 0.1") for line in said
    )
    assert said[-1].startswith(f"One policy shared by all roles {words}")
    row = next(line for line in page.by_seed(report) if line.startswith("| shared"))
    assert row.split("|")[3].strip() == "-" and row.count("/") == 2  # seed 2 failed
    filled = page.put("a <!-- x: begin -->old<!-- x: end --> z", "x", "new")
    assert filled == "a <!-- x: begin -->\nnew\n<!-- x: end --> z"
    with pytest.raises(ValueError, match="expected"):
        page.put("no markers", "x", "new")
