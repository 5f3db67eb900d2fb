"""The bench of shared prefixes: shapes, the arithmetic of a tree, and one gradient for all ways."""

from __future__ import annotations

import argparse
import importlib.util

import pytest
import torch

from bench import bench_prefix as bench
from bench import prefix_workload as work
from bench.bench_train_step import OURS, Checked
from bench.common import Report
from bench.prefix_rivals import tree_mask
from bench.quick import TABLE, read_table
from bench.step_rivals import Trainee
from bench.step_workload import make_model, make_policy, settings_of
from mgrpo.profiling.flops import flops_of
from mgrpo.trainers.torch.learner import adamw

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own


def arguments(*more: str) -> argparse.Namespace:
    return bench.arguments_of(["--model", "tiny", "--rounds", "1", "--scale", "0.03", *more])


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("rollouts", 1.78),
        ("answers", 1.31),
        ("system", 1.73),
        ("long", 1.11),
        ("fork", 2.67),
        ("nothing", 1.0),
    ],
)
def test_a_shape_shares_what_the_design_says(name: str, ratio: float) -> None:
    """Tokens that enter the model, each row whole over each prefix once, at full size."""
    rows = work.make_rows(work.SHAPES[name], 512)
    tree = work.tree_of(rows)
    assert tree.lengths.sum() / tree.tokens == pytest.approx(ratio, abs=0.005)
    assert not rows.loss_mask[:, : len(work.common_prefix(rows))].any() and rows.loss_mask[:, -1].all()


def test_the_arithmetic_of_a_tree_is_its_pairs() -> None:
    """Against counting, for each token of a fork's nodes, the tokens that it sees; without shared prefixes it is that
    of rows."""
    flops = flops_of(make_model("tiny", "cpu").config)[0]
    rows = work.make_rows(work.SHAPES["fork"].scaled(0.04), 512)
    tree, scored = work.tree_of(rows), int(rows.loss_mask[:, 1:].sum())
    seen = {}  # a token is its way from the root
    for row in rows.ids[:, :-1].tolist():
        seen |= {tuple(row[: t + 1]): t + 1 for t in range(len(row))}
    assert len(seen) == tree.tokens
    wanted = (
        flops.token.times(len(seen))
        + flops.pairs[None].times(sum(seen.values()))
        + flops.scored.times(scored)
    )
    found = work.flops_of_trees(flops, [rows])
    assert (found.forward, found.backward) == pytest.approx((wanted.forward, wanted.backward))
    assert int(tree_mask(tree).sum()) == sum(seen.values())
    alone = work.make_rows(work.SHAPES["nothing"].scaled(0.02), 512)
    assert work.flops_of_trees(flops, [alone]).total == pytest.approx(
        work.flops_of_rows(flops, [alone]).total
    )


def test_pieces_keep_to_the_capacity() -> None:
    """Every row once and in order, no piece with more distinct tokens than the capacity, none that holds less than it
    could; a row that does not fit is named."""
    rows = work.make_rows(work.SHAPES["rollouts"].scaled(0.05), 512)
    one = len(rows.ids[0]) - 1
    own = one - len(work.common_prefix(rows))
    parts = work.pieces(rows, one + 2 * own)
    assert [len(part.lengths) for part in parts] == [3, 3, 2]
    assert all(work.tree_of(part).tokens <= one + 2 * own for part in parts)
    assert torch.equal(torch.cat([part.ids for part in parts]), rows.ids)
    with pytest.raises(ValueError, match=f"capacity={one - 1} is below the {one} entering tokens"):
        work.pieces(rows, one - 1)
    with pytest.raises(ValueError, match="a vocabulary of 7 tokens has no 8 first tokens"):
        work.make_rows(work.SHAPES["rollouts"], 7)


def test_all_ways_have_one_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours in both layouts, one masked attention, TRL's trainer, plain padded rows, and PrefixGrouper where it is
    installed; a cut tree with its prefix held and repeated; rows that share nothing. Each has its figures."""
    pytest.importorskip("trl", reason="TRL is not installed")
    report = Report("bench_prefix")
    bench.measure(arguments("--shape", "rollouts", "fork", "cut", "nothing"), report)
    figures = {f.item: f.value for f in report.figures}
    off = {item: value for item, value in figures.items() if "gradient" in item}
    grouper = importlib.util.find_spec("prefix_grouper") is not None
    assert len(off) == 4 + grouper + 1 + 2 + 1
    assert all(value <= bench.GRADIENT for value in off.values()), off
    assert {item for item in figures if item.endswith(" / ours")} >= {
        f"rollouts: {way} / ours"
        for way in ("masked attention over the tree", "TRL with a compacted head", "naive Hugging Face")
    }
    assert figures["rollouts: tokens, whole / shared"] == pytest.approx(1.79, abs=0.02)
    assert figures["fork: arithmetic, whole / shared"] > figures["rollouts: arithmetic, whole / shared"] > 1.3
    assert figures["cut: prefix repeated / held"] > 0 and figures["nothing: shared / whole"] > 0
    printed = capsys.readouterr().out
    assert "no comparison" not in printed
    assert ("missing rival" in printed) != grouper


def test_quick_has_the_figures_that_are_guarded() -> None:
    """What bench/quick.toml names is what a `--quick` call writes, here of the tiny shape."""
    report = Report("bench_prefix")
    bench.measure(arguments("--quick"), report)
    figures = {f.item for f in report.figures}
    checks = {check.job.name: check for check in read_table(TABLE)[1]}
    wanted = {bound.item for bound in checks["bench_prefix"].bounds}
    assert wanted <= figures, sorted(wanted - figures)


def test_another_gradient_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    """A way whose gradient is off is a miss of the report, and is not timed."""
    args, report = arguments("--shape", "rollouts"), Report("bench_prefix")
    policy = make_policy(make_model("tiny", "cpu"), settings_of(args, "auto"))
    case = bench.case_of(args, policy, "rollouts")
    checked = {
        bench.WHOLE: Checked(1.0, 1.0, 0.0),
        OURS: Checked(1.0, 1.0, 1e-7),
        "wrong": Checked(1.0, 1.0, 1e-4),
    }
    assert bench.kept_of(report, args, case, checked) == [bench.WHOLE, OURS]
    assert [f.verdict for f in report.figures] == ["pass", "miss"]
    assert "no comparison: rollouts: wrong" in capsys.readouterr().out


def test_a_policy_that_does_not_share_is_refused() -> None:
    """With the reason, before anything is timed: unshared times would pass for shared ones."""
    args = arguments("--shape", "rollouts")
    model = make_model("tiny", "cpu")
    policy = make_policy(model, settings_of(args, "auto") | {"share_prefixes": False})
    trainee = Trainee(model, adamw(policy, 1e-6))
    with pytest.raises(RuntimeError, match="prefixes are not shared"):
        bench.measure_case(
            Report("bench_prefix"), args, trainee, policy, flops_of(model.config)[0], "rollouts"
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--scale", "0"], "--scale 0.0 is not above 0"),
        (["--rounds", "0"], "--rounds 0 is not above 0"),
        (["--capacity", "-1"], "--capacity -1 is not above 0"),
        (["--shape", "bush"], "invalid choice: 'bush'"),
    ],
)
def test_bad_arguments_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built, with the value and the bound."""
    with pytest.raises(SystemExit):
        bench.arguments_of(given)
    assert message in capsys.readouterr().err
