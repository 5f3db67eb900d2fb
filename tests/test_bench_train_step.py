"""The bench of a whole optimizer step: its workload is what it says, and a rival with another gradient has no time."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import bench_train_step as bench
from bench import step_rivals, step_verl
from bench.common import Report
from bench.quick import TABLE, read_table
from bench.step_workload import (
    D_MAX,
    LONGEST,
    SHORTEST,
    Team,
    join,
    make_model,
    make_policy,
    make_team,
    settings_of,
)
from mgrpo.model.policy import Policy
from mgrpo.trainers.torch.learner import adamw

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own


def arguments(*more: str) -> argparse.Namespace:
    """The tiny shape, trajectories an eighth as long."""
    args = bench.arguments_of(
        ["--model", "tiny", "--tokens", "750", "--micro-batch", "640", "--rounds", "1", *more]
    )
    args.scale, args.rows = 1 / 8, 8
    return args


@pytest.fixture(scope="module")
def step() -> tuple[Policy, step_rivals.Trainee, Team]:
    """A tiny policy, what trains it, and the team step."""
    torch.set_num_threads(1)
    model = make_model("tiny", "cpu")
    policy = make_policy(model, settings_of(arguments(), "auto"))
    trainee = step_rivals.Trainee(model, adamw(policy, 1e-3))
    trainee.fill_state()
    return policy, trainee, make_team(policy, 750, 640, 1 / 8)


def ours(step: tuple[Policy, step_rivals.Trainee, Team]) -> step_rivals.Step:
    policy, trainee, team = step
    return bench.our_step(trainee, policy, team, policy.attention, lambda: None)


def test_the_team_step_is_the_designs() -> None:
    """At full size: 14 trajectories and 24 copies of the same weight, lengths, masked tokens, advantages of 0."""
    policy = make_policy(make_model("tiny", "cpu"), settings_of(arguments(), "auto"))
    team = make_team(policy, bench.DEFAULT_TOKENS["cpu"], bench.MICRO_BATCH["cpu"])
    rows, copies = join(list(team.distinct.micro)), join(list(team.copies.micro))
    assert (len(rows.lengths), len(copies.lengths)) == (14, 24)
    assert (int(rows.lengths.min()), int(rows.lengths.max())) == (SHORTEST, LONGEST)
    masked = 1 - float(rows.loss_mask.sum()) / team.tokens()
    assert masked == pytest.approx(0.42, abs=0.005)
    assert int((rows.advantages == 0).sum()) == 4
    assert copies.weights.tolist() == pytest.approx([1 / D_MAX] * 24)
    assert float(rows.weights.sum()) == pytest.approx(float(copies.weights.sum()))
    assert team.distinct.denominator == pytest.approx(team.copies.denominator)


def test_a_generation_batch_holds_the_rows(step: tuple[Policy, step_rivals.Trainee, Team]) -> None:
    """TRL's padding taken away, each row is what it was, and as many tokens train."""
    rows = join(list(step[2].distinct.micro))
    batch = step_rivals.generation(rows, weighted=True)
    for row, length in enumerate(rows.lengths.tolist()):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row] == 1]
        completion = batch["completion_ids"][row][batch["completion_mask"][row] == 1]
        assert torch.equal(torch.cat([prompt, completion]), rows.ids[row, :length])
    trained = (batch["completion_mask"] * batch["tool_mask"]).sum(1)
    assert torch.equal(trained, rows.loss_mask.sum(1))


def test_all_ways_have_one_gradient(step: tuple[Policy, step_rivals.Trainee, Team]) -> None:
    """The plain loop, TRL's trainer and every rung of the ladder; and no weight moves while they are checked."""
    pytest.importorskip("trl", reason="TRL is not installed")
    policy, trainee, team = step
    before = [p.detach().clone() for p in trainee.model.parameters()]
    args = arguments("--rounds", "2")
    args.quick = False
    providers = {
        bench.OURS: ours(step),
        "naive Hugging Face": step_rivals.naive_step(trainee, team.copies, 8, "cpu", policy.full_precision),
        **step_rivals.trl_steps(trainee, team, 7),  # no divisor of the 24 copies
        **step_rivals.ladder_steps(trainee, team, 8),
    }
    checked = bench.check(args, trainee, providers)
    assert len(checked) == 7
    assert all(found.distance < bench.GRADIENT for found in checked.values())
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.model.parameters(), strict=True))
    report = Report("bench_train_step")
    kept = bench.comparable(report, args, providers, checked)
    times = bench.race(args, kept, checked, math.inf)
    bench.report_times(report, args, policy, team, times)
    bench.report_memory(report, args, trainee, checked)
    items = {f.item: f.value for f in report.figures}
    rungs = [value for item, value in items.items() if item.startswith("ladder: ")]
    assert len(rungs) == 4
    assert math.prod(rungs) == pytest.approx(items["TRL as it is / ours"], rel=0.9)
    assert 0 < items["peak memory, ours / TRL"] < 10
    assert any(not torch.equal(a, b) for a, b in zip(before, trainee.model.parameters(), strict=True))


def test_quick_has_the_figures_that_are_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    """What bench/quick.toml names is what a whole `--quick` call writes, here of the tiny shape."""
    pytest.importorskip("trl", reason="TRL is not installed")
    report = Report("bench_train_step")
    bench.measure(arguments("--quick"), report)
    figures = {f.item: f.value for f in report.figures}
    checks = {check.job.name: check for check in read_table(TABLE)[1]}
    wanted = {bound.item for bound in checks["bench_train_step"].bounds}
    assert wanted <= figures.keys(), sorted(wanted - figures.keys())
    assert figures["TFLOP/s of the rows that train: ours"] > 0 and "MFU: ours" not in figures
    assert "missing rival" not in capsys.readouterr().out


def test_a_rival_that_does_not_import_is_named(
    step: tuple[Policy, step_rivals.Trainee, Team],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """TRL itself raises RuntimeError for what it lacks."""

    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("Failed to import trl.trainer.grpo_trainer")

    monkeypatch.setitem(sys.modules, "trl", Broken("trl"))
    assert step_rivals.trl_steps(step[1], step[2], 8) == {}
    assert "missing rival: TRL: Failed to import" in capsys.readouterr().out


def test_a_rival_whose_process_ends_is_left_out(
    step: tuple[Policy, step_rivals.Trainee, Team], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """verl's process answers once and is then gone, as one that the system kills: the others keep their figures."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"answer": {"verl": "0"}}'\nread line\necho killed >&2\nexit 1\n""")
    python.chmod(0o755)
    rival = step_rivals.verl_rival(step[1], step[2].copies, 8, python)
    assert rival is not None
    with rival:
        checked = bench.check(arguments(), step[1], {bench.OURS: ours(step), "verl 0": rival})
    assert list(checked) == [bench.OURS]
    assert "missing rival: verl 0: verl's process ended: killed" in capsys.readouterr().out


def test_a_rival_that_is_tampered_with_has_no_time(
    step: tuple[Policy, step_rivals.Trainee, Team], capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is too large by a thousandth, which a clip of the gradient would hide, is a miss."""
    policy, trainee, team = step
    honest = step_rivals.naive_step(trainee, team.copies, 8, "cpu", policy.full_precision)
    team.copies.denominator /= 1.001
    try:
        providers = {bench.OURS: ours(step), "honest": honest}
        off = step_rivals.naive_step(trainee, team.copies, 8, "cpu", policy.full_precision)
        checked = bench.check(arguments(), trainee, {**providers, "naive Hugging Face": off})
    finally:
        team.copies.denominator *= 1.001
    report = Report("bench_train_step")
    kept = bench.comparable(report, arguments(), {**providers, "naive Hugging Face": off}, checked)
    assert "naive Hugging Face" not in kept
    verdicts = {f.item: f.verdict for f in report.figures}
    assert verdicts["gradient, distance from ours: naive Hugging Face"] == "miss"
    assert "no comparison: naive Hugging Face" in capsys.readouterr().out


def test_a_limit_that_is_over_measures_ours_alone(step: tuple[Policy, step_rivals.Trainee, Team]) -> None:
    """What would begin after the limit is left out, and the figures are those of what was measured."""
    _, trainee, _ = step
    providers = {bench.OURS: ours(step), "late": ours(step)}
    checked = bench.check(arguments("--limit", "1"), trainee, providers, end=0.0)
    assert list(checked) == [bench.OURS]
    kept = bench.comparable(Report("bench_train_step"), arguments(), providers, checked)
    assert len(bench.race(arguments("--rounds", "3"), kept, checked, 0.0)[bench.OURS].samples) == 1


def test_verl_without_its_environment_is_named(
    step: tuple[Policy, step_rivals.Trainee, Team], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without it goes on."""
    assert step_rivals.verl_rival(step[1], step[2].copies, 8, tmp_path / "python") is None
    assert f"missing rival: verl: {tmp_path / 'python'} does not exist" in capsys.readouterr().out


def test_a_child_that_ends_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    """An environment in which verl does not import."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no module named verl' >&2\nexit 1\n")
    python.chmod(0o755)
    model = make_model("tiny", "cpu")
    with pytest.raises(RuntimeError, match="verl's process ended: no module named verl"):
        step_verl.VerlRival(model, {"ids": torch.zeros(1, 2)}, {"rows": 1}, python)


@pytest.mark.slow
def test_verls_loss_path_has_our_gradient(step: tuple[Policy, step_rivals.Trainee, Team]) -> None:
    """In its own process; a step of it returns its CPU seconds."""
    if not step_verl.PYTHON.exists():
        pytest.skip(f"{step_verl.PYTHON} is not there (make verl)")
    model = make_model("tiny", "cpu")  # TRL has not written a pad token into its configuration
    model.load_state_dict(step[1].model.state_dict())
    rival = step_rivals.verl_rival(step_rivals.Trainee(model, step[1].optimizer), step[2].copies, 8)
    assert rival is not None
    with rival:
        checked = bench.check(arguments(), step[1], {bench.OURS: ours(step), "verl": rival})
        assert checked["verl"].distance < bench.GRADIENT
        assert rival() > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "no/such"], "'no/such' is neither a shape"),
        (["--tokens", "0"], "--tokens 0 is below 1"),
        (["--rounds", "0"], "--rounds 0 is below 1"),
    ],
)
def test_bad_arguments_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built, with the value and the bound."""
    with pytest.raises(SystemExit):
        bench.arguments_of(given)
    assert message in capsys.readouterr().err


def test_a_micro_batch_that_holds_no_trajectory_is_refused(
    step: tuple[Policy, step_rivals.Trainee, Team],
) -> None:
    """No trajectory is cut."""
    with pytest.raises(ValueError, match="micro_batch=600 is below the 643 tokens"):
        make_team(step[0], 6000, 600)
