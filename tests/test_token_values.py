"""tokens=True: values of every token under the mask, from every backend, and a loss that does not know of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mgrpo import GrpoLossConfig, TokenValues, grpo_loss, linear_grpo_loss
from mgrpo.ops.token_loss import METRICS
from tests.loss_grid import configs, head_batch, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in data.items() if k not in ("hidden", "weight", "logits", "target_ids")}


def calls(data: dict[str, torch.Tensor], config: GrpoLossConfig, impl: str, dtype: torch.dtype) -> Any:
    """From hidden states, from logits and from logits in place: (loss, metrics, values, gradients)."""
    rest, ids = inputs_of(data), data["target_ids"]
    for way in ("head", "logits", "inplace"):
        leaves = [data[k].to(dtype).clone().requires_grad_() for k in ("hidden", "weight")]
        for tokens in (False, True):
            more: Any = {"config": config, "impl": impl, "tokens": tokens, **rest}
            if way == "head":
                out = linear_grpo_loss(*leaves, ids, chunk=5, **more)
            else:
                z = leaves[0] @ leaves[1].t()
                out = grpo_loss(z, ids, inplace=way == "inplace", **more)
            yield way, tokens, out, torch.autograd.grad(out[0] * 0.5, leaves)


def check_values(impl: str, some: list[GrpoLossConfig]) -> None:
    """Against values written out in float64 from the logits, and the plain call's loss, metrics and gradients."""
    for number, config in enumerate(some):
        data = head_batch(37, 8, torch.float32)
        if number % 2:  # the grid's advantage of 0 makes two rows that the loss leaves out
            data = {k: v for k, v in data.items() if k != "old_logprobs"}
        mask, ids = data["loss_mask"] != 0, data["target_ids"]
        z = (data["hidden"] @ data["weight"].t() / config.temperature).log_softmax(1)
        logp, entropy = z.gather(1, ids[:, None])[:, 0], -(z.exp() * z).sum(1)
        plain: Any = None
        for way, tokens, out, grads in calls(data, config, impl, torch.float32):
            if not tokens:
                plain = out, grads
                continue
            loss, metrics, values = out
            assert isinstance(values, TokenValues) and not values.logprobs.requires_grad
            assert torch.equal(loss, plain[0][0]), (way, config)
            assert all(torch.equal(a, b) for a, b in zip(grads, plain[1], strict=True)), (way, config)
            assert all(torch.equal(metrics[k], plain[0][1][k]) for k in METRICS)
            torch.testing.assert_close(values.logprobs.double()[mask], logp[mask], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(values.entropy.double()[mask], entropy[mask], rtol=1e-5, atol=1e-5)
            mean = entropy[mask].mean()
            torch.testing.assert_close(metrics["entropy_all"].double(), mean, rtol=1e-5, atol=1e-5)
            for x, masked in zip(values, (0.0, 0.0, 1.0, False), strict=True):
                assert bool((x[~mask] == masked).all())
            check_ratios(values, metrics, data, config)


def check_ratios(
    values: TokenValues, metrics: dict[str, torch.Tensor], data: dict[str, torch.Tensor], config: Any
) -> None:
    """Ratios from the values' own log-probs; the clipped tokens are those that the metrics count."""
    mask = data["loss_mask"] != 0
    if "old_logprobs" not in data:
        assert bool((values.ratio == 1).all())
        return
    log_ratio = torch.where(mask, values.logprobs - data["old_logprobs"], 0.0)
    lengths = data["cu_seqlens"].diff().tolist()
    parts = list(zip(log_ratio.split(lengths), mask.split(lengths), strict=True))
    if config.type == "gspo" or config.ratio_level == "sequence":
        parts = [(torch.where(m, x.sum() / m.sum().clamp(min=1), 0.0), m) for x, m in parts]
    torch.testing.assert_close(values.ratio, torch.cat([x for x, _ in parts]).exp(), rtol=1e-5, atol=1e-6)
    if metrics["active_row_frac"] == mask.float().mean():  # the metrics are over the same rows
        share = metrics["clip_frac_low"] + metrics["clip_frac_high"]
        torch.testing.assert_close(values.clipped.float().sum() / mask.sum(), share)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_values_are_the_float64_ones_and_the_loss_keeps_its_bits(impl: str) -> None:
    """Over the grid of losses, with and without old log-probs."""
    check_values(impl, configs())


def test_clipped_tokens_are_named() -> None:
    """The grid's ratios: with A > 0 those above 1 + eps, with A < 0 those below 1 - eps."""
    data = head_batch(37, 8, torch.float32)
    rest, ids = inputs_of(data), data["target_ids"]
    h, w = data["hidden"].float(), data["weight"].float()
    _, _, values = linear_grpo_loss(h, w, ids, config=settings("dapo"), tokens=True, **rest)
    assert values.clipped.nonzero()[:, 0].tolist() == [3, 4, 5]
    _, _, values = linear_grpo_loss(h, w, ids, config=settings("sapo"), tokens=True, **rest)
    assert not values.clipped.any()


def test_both_entropies() -> None:
    """entropy is over active rows, entropy_all over all rows under the mask, whose advantage may be 0."""
    data = head_batch(37, 8, torch.float32)
    rest, ids = inputs_of(data), data["target_ids"]
    h, w = data["hidden"].float(), data["weight"].float()
    _, metrics, values = linear_grpo_loss(h, w, ids, config=settings("dapo"), tokens=True, **rest)
    mask = data["loss_mask"] != 0
    live = mask & (data["advantages"].repeat_interleave(data["cu_seqlens"].diff()) != 0)
    torch.testing.assert_close(metrics["entropy"], values.entropy[live].mean())
    torch.testing.assert_close(metrics["entropy_all"], values.entropy[mask].mean())
    assert abs(float(metrics["entropy"] - metrics["entropy_all"])) > 1e-3


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_row_that_is_not_finite_says_so(impl: str) -> None:
    """NaN log-prob and entropy, ratio 1, not clipped; the means leave it out; whether its advantage is 0 or not."""
    data = head_batch(37, 8, torch.float32)
    data["hidden"][4, 0] = data["hidden"][14, 0] = float("nan")  # row 14 has advantage 0
    rest, ids = inputs_of(data), data["target_ids"]
    h, w = data["hidden"].float(), data["weight"].float()
    _, metrics, values = linear_grpo_loss(h, w, ids, config=settings("dapo"), impl=impl, tokens=True, **rest)
    assert int(metrics["nonfinite_rows"]) == 1 and bool(metrics["entropy_all"].isfinite())
    assert values.logprobs.isnan().nonzero()[:, 0].tolist() == [4, 14]
    assert values.entropy.isnan().nonzero()[:, 0].tolist() == [4, 14]
    assert values.ratio[[4, 14]].tolist() == [1.0, 1.0] and not values.clipped[[4, 14]].any()


def test_values_of_float64_input_are_float64() -> None:
    """As the loss is."""
    data = head_batch(37, 8, torch.float64)
    rest, ids = inputs_of(data), data["target_ids"]
    _, _, values = linear_grpo_loss(
        data["hidden"], data["weight"], ids, config=settings("gspo"), tokens=True, **rest
    )
    assert values.logprobs.dtype == values.entropy.dtype == values.ratio.dtype == torch.float64
    assert values.clipped.dtype == torch.bool and values.clipped.shape == ids.shape
