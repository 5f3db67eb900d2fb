"""The seam of the losses: a loss by its import path beside the built-in ones, and advantages of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mgrpo import GrpoLossConfig, grpo_loss, linear_grpo_loss, loss_denominator
from mgrpo.errors import ConfigError
from mgrpo.losses.registry import find_loss
from mgrpo.run import launch
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner
from tests.loss_grid import (
    TOLERANCE,
    configs,
    error,
    grid_batch,
    head_batch,
    run_head,
    run_logits,
    settings,
)
from tests.models import tiny_policy
from tests.own_losses import HERE, pull
from tests.rows import ROWS, rows_of
from tests.runs import RELAY

PULL = {"spring": 0.3, "entropy": 0.05}


def own(name: str, options: dict[str, Any] | None = None, **more: Any) -> GrpoLossConfig:
    return GrpoLossConfig(type=f"{HERE}:{name}", options=options or {}, **more)


def naive(data: dict[str, torch.Tensor], config: GrpoLossConfig) -> list[torch.Tensor]:
    """[loss, d hidden, d weight] of Pull by autograd over the whole logits, float64, nothing of mgrpo."""
    h, w = (data[k].clone().requires_grad_() for k in ("hidden", "weight"))
    logp_all = (h @ w.t() / config.temperature).log_softmax(1)
    logp = logp_all.gather(1, data["target_ids"][:, None]).squeeze(1)
    entropy = -(logp_all.exp() * logp_all).sum(1)
    lengths = data["cu_seqlens"].diff().long()
    seq_id = torch.arange(len(lengths)).repeat_interleave(lengths)
    a = data["advantages"].double()[seq_id]
    terms = pull(logp, data["old_logprobs"].double(), a, entropy, seq_id, **_names(PULL))
    if config.correction == "mis":
        rho = (data["old_logprobs"].double() - data["rollout_logprobs"].double()).exp()
        terms = terms * torch.where((rho >= 0.5) & (rho <= 5.0), rho, 0.0)
    if config.kl_coef:
        d = data["ref_logprobs"].double() - logp
        terms = terms + config.kl_coef * (d.exp() - d - 1)
    terms = terms - config.entropy_coef * entropy
    weight = data["seq_weight"].double()[seq_id] * data["loss_mask"]
    loss = (weight * terms).sum() / weight.sum()
    return [loss.detach(), *torch.autograd.grad(loss * 0.5, [h, w])]


def _names(options: dict[str, float]) -> dict[str, float]:
    return {"spring": options["spring"], "weight": options["entropy"]}


@pytest.mark.parametrize(
    "more",
    [{}, {"temperature": 0.7}, {"kl_coef": 0.1, "entropy_coef": 0.02}, {"correction": "mis"}],
    ids=str,
)
def test_an_own_terms_gradient_is_naive_autograds(more: dict[str, Any]) -> None:
    """Through the two-phase head in float32 within 5e-6 of autograd over float64 logits; in float64 to rounding. The
    term acts without an advantage, on the entropy, and differently in each trajectory."""
    data, config = head_batch(517, 24, torch.float32), own("Pull", PULL, **more)
    exact = naive(data, config)
    for dtype, impl, bound in (
        (torch.float64, "reference", 1e-12),
        (torch.float32, "reference", TOLERANCE[torch.float32]),
        (torch.float32, "cpu", TOLERANCE[torch.float32]),
    ):
        loss, metrics, dh, dw = run_head(data, config, dtype, impl, chunk=5)
        assert abs(float(loss) - float(exact[0])) <= bound * max(1.0, abs(float(exact[0])))
        assert error(dh, exact[1]) <= bound and error(dw, exact[2]) <= bound
        assert bool(dh[17].any()), "the trajectory of advantage 0 has a gradient"
        assert int(metrics["nonfinite_rows"]) == 0


def test_grpo_written_again_is_the_fused_grpo() -> None:
    """Loss, metrics and gradients agree to float32 rounding, from logits and through the head, bfloat16 logits too."""
    fused, mine = settings("grpo", delta=None), own("OwnGrpo", {"low": 0.2, "high": 0.28})
    data = head_batch(517, 24, torch.float32)
    a, b = (run_head(data, config, torch.float32, "cpu", chunk=5) for config in (fused, mine))
    torch.testing.assert_close(b[0], a[0], rtol=1e-6, atol=1e-7)
    assert error(b[2], a[2]) <= 2e-6 and error(b[3], a[3]) <= 2e-6
    for name in ("ratio_mean", "ratio_max", "entropy", "active_row_frac", "mismatch_kl", "ess"):
        torch.testing.assert_close(b[1][name], a[1][name])
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        logits = grid_batch(129, dtype)
        exact = run_logits(logits, fused, dtype, "cpu")[2]
        for inplace in (False, True):
            assert error(run_logits(logits, mine, dtype, "cpu", inplace=inplace)[2], exact) <= bound


def test_an_own_loss_gets_the_ratio_of_its_level() -> None:
    """With ratio_level sequence the ratio it is given is the trajectory's: gspo again."""
    data = head_batch(517, 24, torch.float32)
    mine = own("OwnGspo", {"high": 0.28}, ratio_level="sequence")
    a, b = (run_head(data, config, torch.float32, "cpu") for config in (settings("gspo"), mine))
    assert error(b[2], a[2]) <= 2e-6 and error(b[3], a[3]) <= 2e-6


def test_a_built_in_with_another_term_is_not_taken_for_the_built_in() -> None:
    """A subclass of grpo has its fused_id, and yet its own gradient: twice grpo's."""
    data = head_batch(129, 24, torch.float32)
    config = own("Doubled")
    loss = find_loss(config)
    assert loss.fused_id == 0 and not loss.fused and loss.every_token_acts
    data["old_logprobs"] += 0.01  # no ratio of the grid on the default bound
    once, twice = (run_head(data, c, torch.float32, "cpu") for c in (GrpoLossConfig(), config))
    assert error(twice[2], 2 * once[2]) <= 2e-6 and error(twice[3], 2 * once[3]) <= 2e-6


def test_rows_that_cannot_be_counted_are_not_seen_by_the_term() -> None:
    """Masked rows, rows of a policy weight 0 and rows that are not finite do not reach an own term."""
    data = head_batch(129, 24, torch.float32)
    data["hidden"] = data["hidden"].clone()
    data["hidden"][3, 0] = float("nan")
    _, metrics, dh, dw = run_head(data, own("Pull", PULL), torch.float32, "cpu")
    assert int(metrics["nonfinite_rows"]) == 1 and not dh[[3, 10, 11, 12]].any()
    assert bool(dh.isfinite().all()) and bool(dw.isfinite().all())
    none = data | {"loss_mask": torch.zeros(19, dtype=torch.bool)}
    loss, _, dh, _ = run_head(none, own("Pull", PULL), torch.float32, "cpu")
    assert float(loss) == 0 and not dh.any()


def test_a_reference_without_a_kl_term() -> None:
    """A loss that reads ref_logprobs says so, and a call and a learner without them are refused."""
    data = head_batch(129, 24, torch.float32)
    config = own("ToReference")
    assert run_head(data, config, torch.float32, "cpu")[2].any()
    data.pop("ref_logprobs")
    with pytest.raises(ValueError, match=r"^ref_logprobs: missing, with type "):
        run_head(data, config, torch.float32, "cpu")
    policy = tiny_policy("shift")
    with pytest.raises(ValueError, match=r"reference policy given: False"):
        Learner(policy, torch.optim.SGD(policy.parameters()), config, 1.0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Pull", {}, r"loss\.options\.spring: Field required; Pull takes: spring, entropy"),
        ("Pull", {"spring": "far"}, r"loss\.options\.spring: Input should be a valid number"),
        ("Pull", {"spring": 1.0, "sprint": 2}, r"loss\.options\.sprint: .*Pull takes: spring, entropy"),
        ("OwnGrpo", {"low": 1.5}, r"loss\.options: low: 1\.5 is outside \[0, 1\]"),
        ("ToReference", {"x": 1}, r"ToReference takes: none"),
        ("NoLoss", {}, r"has no PolicyLoss class 'NoLoss'"),
        ("Missing", {}, r"has no PolicyLoss class 'Missing'"),
    ],
)
def test_a_loss_that_cannot_be_made_names_what_is_wrong(
    name: str, options: dict[str, Any], words: str
) -> None:
    """The class, or the option with its expected type, its name or its bound."""
    with pytest.raises(ConfigError, match=words):
        find_loss(own(name, options))


def test_a_run_with_a_loss_that_is_not_there_does_not_start(tmp_path: Path) -> None:
    """Refused with the field's name before a folder or a process exists."""
    for value, words in (
        ("no_such_package:Loss", r"agents\.main\.loss\.type .*'no_such_package' is not installed"),
        ("ppo", r"agents\.main\.loss: type: 'ppo' is unknown, expected .*dapo.* or 'package\.module:Class'"),
    ):
        with pytest.raises(ConfigError, match=words):
            launch.start(RELAY, tmp_path / "run", [f"agents.main.loss={{type='{value}'}}"], fresh=False)
    assert not (tmp_path / "run").exists()


def test_an_installed_packages_loss_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point in the group mgrpo.losses makes a name of a class, in the config and in the op."""
    folder = tmp_path / "own_losses-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: own-losses\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[mgrpo.losses]\npulling = {HERE}:Pull\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = head_batch(33, 8, torch.float32)
    named = GrpoLossConfig(type="pulling", options=PULL)
    a, b = (run_head(data, config, torch.float32, "cpu") for config in (named, own("Pull", PULL)))
    assert torch.equal(a[2], b[2])


def test_a_term_of_another_shape_is_refused() -> None:
    """One number instead of one a token is an error that names the loss."""
    with pytest.raises(
        ValueError, match=r"^term of tests\.own_losses:Mean: torch\.float32 \(\) .*one value a"
    ):
        run_head(head_batch(33, 8, torch.float32), own("Mean"), torch.float32, "cpu")


def repeated(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The advantages written out for each token."""
    out = {k: v for k, v in data.items() if k != "advantages"}
    per_token = data["advantages"].repeat_interleave(data["cu_seqlens"].diff().long())
    return out | {"token_advantages": per_token}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_token_advantages_that_repeat_the_rows_change_no_bit(impl: str) -> None:
    """For every config of the grid with a token-level ratio, from logits and through the head."""
    logits, head = grid_batch(69, torch.float32), head_batch(69, 16, torch.float32)
    for config in configs():
        if find_loss(config).has_sequence_ratio:
            with pytest.raises(ValueError, match=r"^token_advantages: given with the sequence-level ratio"):
                run_logits(repeated(logits), config, torch.float32, impl)
            continue
        for run, data in ((run_logits, logits), (run_head, head)):
            a, b = (run(x, config, torch.float32, impl) for x in (data, repeated(data)))
            for x, y in zip(a, b, strict=True):
                assert x == y if isinstance(x, dict) else torch.equal(x, y), config


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_advantages_may_have_one_value_a_token(impl: str) -> None:
    """(T,) values that repeat those of the trajectories change no bit, in any config; another length is refused."""
    data = grid_batch(69, torch.float32)
    per_token = repeated(data)["token_advantages"]
    for config in configs():
        a, b = (run_logits(x, config, torch.float32, impl) for x in (data, data | {"advantages": per_token}))
        for x, y in zip(a, b, strict=True):
            assert x == y if isinstance(x, dict) else torch.equal(x, y), config
    with pytest.raises(ValueError, match=r"^advantages: 5 values for 6 trajectories of 19 tokens"):
        run_logits(data | {"advantages": torch.ones(5)}, configs()[0], torch.float32, impl)


def test_token_advantages_against_the_float64_reference() -> None:
    """An advantage of its own for each token, of both signs and 0, in every backend's rows and metrics."""
    g = torch.Generator().manual_seed(4)
    advantages = torch.randn(19, generator=g).round(decimals=2)
    advantages[[1, 6]] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        data = {k: v for k, v in grid_batch(69, dtype).items() if k != "advantages"}
        data["token_advantages"] = advantages
        for config in configs():
            if find_loss(config).has_sequence_ratio:
                continue
            exact = run_logits(data, config, torch.float64, "reference")
            got = run_logits(data, config, dtype, "cpu")
            assert error(got[2], exact[2]) <= TOLERANCE[dtype], config
            torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-6)
            if not (config.kl_coef or config.entropy_coef):
                assert not got[2][[1, 6]].any()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo"])
def test_the_reference_gives_each_token_its_own_advantage(loss_type: str) -> None:
    """The same as a batch in which every token is a trajectory with that advantage and its share of the weight."""
    data = {k: v for k, v in grid_batch(69, torch.float64).items() if k != "advantages"}
    advantages = torch.randn(19, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    config = settings(loss_type)
    names = ("cu_seqlens", "loss_mask", "seq_weight")
    whole = loss_denominator(config, **{name: data[name] for name in names})
    lengths = data["cu_seqlens"].diff().long()
    share = data["seq_weight"].double() / (lengths if find_loss(config).sequence_mean else 1)
    single = data | {"cu_seqlens": torch.arange(20, dtype=torch.int32)}
    single["seq_weight"] = share.repeat_interleave(lengths)
    a = run_logits(data, config, torch.float64, "reference", token_advantages=advantages)
    b = run_logits(single, config, torch.float64, "reference", advantages=advantages, denominator=whole)
    assert abs(float(a[0]) - float(b[0])) < 1e-14 and torch.allclose(a[2], b[2], rtol=1e-12, atol=1e-15)


def gradient(rows: MicroBatch, loss: GrpoLossConfig, denominator: float = 10.0) -> list[torch.Tensor]:
    """The gradient of Learner.step, clipping aside."""
    policy = tiny_policy("shift")
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in policy.parameters() if p.grad is not None)
    )
    Learner(policy, optimizer, loss, grad_clip=1e9).step(MiniBatch([rows], denominator))
    return seen


def worst(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert len(a) == len(b) > 0
    return max(error(x, y) for x, y in zip(a, b, strict=True) if y.any())


def test_the_learner_takes_an_own_loss() -> None:
    """grpo written again gives the fused grpo's step; a term that acts without an advantage keeps every trajectory."""
    rows = rows_of(0, near=True)
    assert worst(gradient(rows, own("OwnGrpo")), gradient(rows, GrpoLossConfig())) < 5e-6
    moved = rows_of(0, near=True)
    moved.rollout_logprobs[::4] -= 0.5  # of the trajectories without an advantage
    assert worst(gradient(moved, own("OwnGrpo")), gradient(rows, own("OwnGrpo"))) == 0.0
    assert worst(gradient(moved, own("Pull", PULL)), gradient(rows, own("Pull", PULL))) > 1e-3


def test_the_learner_takes_advantages_of_tokens() -> None:
    """Written out for each token they give the rows' gradient bit for bit; a trajectory is kept for one token with an
    advantage, and values at tokens that were not sampled are not looked at."""
    rows, loss = rows_of(1, near=True), GrpoLossConfig(type="dapo")
    each = rows_of(1, near=True)
    each.token_advantages = torch.where(each.loss_mask, each.advantages[:, None], 7.0)
    for a, b in zip(gradient(rows, loss), gradient(each, loss), strict=True):
        assert torch.equal(a, b)
    one = rows_of(1, near=True)
    one.advantages = torch.ones(ROWS)  # not what counts
    one.token_advantages = torch.full(one.ids.shape, 5.0).masked_fill(one.loss_mask, 0.0)
    one.token_advantages[3, 2] = 1.0
    assert one.with_advantage().nonzero().flatten().tolist() == [3]
    keep = torch.tensor([False] * 3 + [True] + [False] * 6)
    alone = one.rows(keep)
    assert alone.token_advantages is not None and int((alone.active().token_advantages != 0).sum()) == 1
    for a, b in zip(gradient(one, loss), gradient(alone, loss), strict=True):
        assert torch.equal(a, b) and (a.any() or not b.any())
    with pytest.raises(ValueError, match=r"^token_advantages: given with the sequence-level ratio"):
        gradient(each, GrpoLossConfig(type="gspo"))


def test_exactly_one_source_of_advantages() -> None:
    """None, and two, are errors of both ops that name the argument."""
    data = head_batch(33, 8, torch.float32)
    h, w, ids = data["hidden"].float(), data["weight"].float(), data["target_ids"]
    rest = {"cu_seqlens": data["cu_seqlens"], "config": settings("dapo")}
    both = {"advantages": torch.ones(6), "token_advantages": torch.ones(19)}
    for more, words in (
        (both, "^token_advantages: given together with advantages"),
        ({}, "^advantages: miss"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_grpo_loss(h, w, ids, **rest, **more)
        with pytest.raises(ValueError, match=words):
            grpo_loss(h @ w.t(), ids, **rest, **more)
