"""What scales a token's terms: values of the mask, which count, and token_weight, which does not; and denominators of
any kind."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from mgrpo import GrpoLossConfig, grpo_loss, loss_denominator
from mgrpo.ops.token_loss import METRICS
from tests.loss_grid import LOSS_TYPES, TOLERANCE, error, grid_batch, run_logits, settings

pytestmark = pytest.mark.usefixtures("one_thread")

IMPLS = ("reference", "cpu")
MASKS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT_MASK = torch.tensor(
    [0.5, 1.0, 0.25, 1.0, 2.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0, 0, 0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0]
)


def named(config: GrpoLossConfig) -> str:
    return " ".join(f"{k}={v}" for k, v in config.model_dump(exclude_defaults=True).items())


def by_hand(data: dict[str, torch.Tensor], config: GrpoLossConfig, mask: torch.Tensor, factor: Any) -> Any:
    """(loss, d loss / d logits) in float64 as TRL writes it: sums over x * mask, divided by sums of the mask."""
    z = data["logits"].clone().requires_grad_()
    logp = z.log_softmax(1).gather(1, data["target_ids"][:, None])[:, 0]
    lengths = data["cu_seqlens"].diff().tolist()
    old, ref, rollout = (data[f"{name}_logprobs"].double() for name in ("old", "ref", "rollout"))
    log_ratio = logp - old

    def of_sequence(x: torch.Tensor) -> torch.Tensor:
        means = [
            (a * m).sum() / m.sum().clamp(min=1)
            for a, m in zip(x.split(lengths), mask.split(lengths), strict=True)
        ]
        return torch.stack(means).repeat_interleave(torch.tensor(lengths))

    sequence = config.type == "gspo" or config.ratio_level == "sequence"
    ratio = (of_sequence(log_ratio) if sequence else log_ratio).exp()
    a = data["advantages"].double().repeat_interleave(torch.tensor(lengths))
    clipped = ratio.clamp(1 - config.clip_eps_low, 1 + config.clip_eps_high)
    term = -torch.minimum(ratio * a, clipped * a)
    if config.correction == "geometric":
        low, high = config.correction_bounds
        rho = of_sequence(old - rollout).exp()
        term = term * torch.where((rho >= low) & (rho <= high), rho, 0.0)
    if config.kl_coef:
        term = term + config.kl_coef * ((ref - logp).exp() - (ref - logp) - 1)
    weight = data["seq_weight"].double()
    parts = (term * mask * factor).split(lengths)
    counts = torch.stack([m.sum() for m in mask.split(lengths)])
    sums = torch.stack([p.sum() for p in parts])
    if config.type in ("grpo", "gspo"):
        loss = (weight * sums / counts.clamp(min=1)).sum() / weight.sum()
    else:
        loss = (weight * sums).sum() / (weight * counts).sum()
    (grad,) = torch.autograd.grad(loss * 0.5, z)
    return loss.detach(), grad


HAND = (
    settings("grpo"),
    settings("dapo", kl_coef=0.1),
    settings("gspo"),
    settings("grpo", ratio_level="sequence"),
    settings("dapo", correction="geometric", correction_low=0.5, correction_high=2.0),
)


def finite_grid() -> dict[str, torch.Tensor]:
    """The grid without its -inf rows, which the formula by hand does not know."""
    data = grid_batch(37, torch.float64)
    return {**data, "logits": data["logits"].clamp(min=-30)}


def check_factors(config: GrpoLossConfig, impls: tuple[str, ...]) -> None:
    """Float masks without and with token weights against the formula by hand."""
    data = finite_grid()
    g = torch.Generator().manual_seed(1)
    factor = torch.rand(19, generator=g, dtype=torch.float64) * 2
    factor[1] = 0.0  # such a token still moves the ratio of its trajectory
    for weighted in (False, True):
        exact, grad = by_hand(data, config, FLOAT_MASK.double(), factor if weighted else 1.0)
        more: dict[str, Any] = {"loss_mask": FLOAT_MASK} | ({"token_weight": factor} if weighted else {})
        loss, _, found = run_logits(data, config, torch.float64, "reference", **more)
        assert abs(float(loss - exact)) < 1e-6 and error(found, grad) < 1e-6  # old log-probs are float32
        narrow = {**data, "logits": data["logits"].float().double()}
        for impl in impls:
            loss, _, found = run_logits(narrow, config, torch.float32, impl, **more)
            assert abs(float(loss - exact)) < 1e-5 * max(1.0, abs(float(exact)))
            assert error(found, grad) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("config", HAND, ids=named)
def test_mask_values_and_token_weights_are_the_formulas(config: GrpoLossConfig) -> None:
    """Values of a float mask scale terms and count in lengths, denominators, sequence ratios and corrections; a
    token_weight scales the terms alone."""
    check_factors(config, IMPLS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_mask_of_0_and_1_is_one_mask_in_every_dtype(loss_type: str, impl: str) -> None:
    """Bits do not depend on the dtype of such a mask, nor do 0.5 and its half-precision forms differ."""
    data = grid_batch(37, torch.float32)
    results = []
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64, *MASKS):
        mask = data["loss_mask"].to(dtype)
        results.append(run_logits(data, settings(loss_type), torch.float32, impl, loss_mask=mask))
    halves = [
        run_logits(data, settings(loss_type), torch.float32, impl, loss_mask=FLOAT_MASK.to(dtype))
        for dtype in MASKS
    ]
    for group in (results, halves):
        for other in group[1:]:
            assert torch.equal(other[0], group[0][0]) and torch.equal(other[2], group[0][2])
            assert all(torch.equal(other[1][k], group[0][1][k]) for k in METRICS)
    assert not torch.equal(results[0][2], halves[0][2])


def test_the_denominator_counts_the_masks_values() -> None:
    """As TRL's mask.sum() does, weighted by trajectory."""
    data = grid_batch(37, torch.float32)
    mask, cu = FLOAT_MASK.double(), data["cu_seqlens"].tolist()
    found = loss_denominator(
        settings("dapo"),
        cu_seqlens=data["cu_seqlens"],
        loss_mask=FLOAT_MASK,
        seq_weight=data["seq_weight"],
    )
    sums = torch.stack([mask[a:b].sum() for a, b in itertools.pairwise(cu)])
    assert float(found) == float((sums * data["seq_weight"].double()).sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_denominator_may_be_a_count(impl: str) -> None:
    """Python int, and int tensors of 32 and 64 bits: the float's result; 0: a loss and a gradient of 0."""
    data = grid_batch(37, torch.float32)
    for config in (settings("dapo", kl_coef=0.1), settings("gspo")):
        want = run_logits(data, config, torch.float32, impl, denominator=7.0)
        for seven in (7, torch.tensor(7), torch.tensor(7, dtype=torch.int32), torch.tensor(7.0)):
            got = run_logits(data, config, torch.float32, impl, denominator=seven)
            assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
        for zero in (0, 0.0, torch.tensor(0), torch.tensor(0.0)):
            loss, metrics, grad = run_logits(data, config, torch.float32, impl, denominator=zero)
            assert float(loss) == 0 and not grad.any()
            assert all(bool(metrics[k].isfinite()) for k in METRICS)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_token_weight_holds_under_the_mask_is_not_read(impl: str) -> None:
    """NaN where the mask is 0 changes no bit; the weight has no gradient."""
    data = grid_batch(37, torch.float32)
    factor = torch.linspace(0.1, 2.0, 19)
    want = run_logits(data, settings("dapo"), torch.float32, impl, token_weight=factor)
    dirty = torch.where(data["loss_mask"] != 0, factor, torch.nan).requires_grad_()
    got = run_logits(data, settings("dapo"), torch.float32, impl, token_weight=dirty)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]) and dirty.grad is None


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"loss_mask: -0\.5 at \[2\] is below 0", {"loss_mask": torch.ones(19).index_fill(0, torch.tensor(2), -0.5)}),
        (r"loss_mask: nan at \[2\]", {"loss_mask": torch.ones(19).index_fill(0, torch.tensor(2), math.nan)}),
        (r"loss_mask: -1 at \[0\] is below 0", {"loss_mask": -torch.ones(19, dtype=torch.int64)}),
        (r"token_weight: -1\.0 at \[0\] is below 0", {"token_weight": -torch.ones(19)}),
        (r"token_weight: inf at \[0\]", {"token_weight": torch.full((19,), math.inf)}),
        (r"token_weight: shape \(18,\)", {"token_weight": torch.ones(18)}),
        (r"token_weight: dtype torch\.int64", {"token_weight": torch.ones(19, dtype=torch.int64)}),
        (r"denominator: -1 is below 0", {"denominator": -1}),
        (r"denominator: nan is below 0 or no number", {"denominator": math.nan}),
        (r"denominator: -2 is below 0", {"denominator": torch.tensor(-2)}),
        (r"denominator: shape \(1,\)", {"denominator": torch.ones(1)}),
    ],
)  # fmt: skip
def test_bad_factors_name_value_and_place(message: str, change: dict[str, Any]) -> None:
    """On the CPU; on a GPU nothing looks at values, and such a token is idle or its loss is NaN."""
    data = grid_batch(33, torch.float32) | change
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        grpo_loss(data.pop("logits").float(), data.pop("target_ids"), config=settings("grpo"), **data)
