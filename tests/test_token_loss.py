"""The definition itself: the reference backend against formulas written out by hand, in float64."""

from __future__ import annotations

import pytest
import torch

from mgrpo import GrpoLossConfig, grpo_loss, linear_grpo_loss, loss_denominator, selective_logprob
from mgrpo.losses.builtin import KINDS
from mgrpo.ops.token_loss import METRICS

LOSS_TYPES = tuple(KINDS)


def settings(loss_type: str, **more: object) -> GrpoLossConfig:
    if loss_type == "dr_grpo":
        more["max_completion_length"] = 16
    return GrpoLossConfig.model_validate({"type": loss_type, **more})


def batch(seed: int, lengths: list[int], vocabulary: int = 23, width: int = 8) -> dict[str, torch.Tensor]:
    """Random float64 inputs of one call; about a third of the tokens are masked."""
    g = torch.Generator().manual_seed(seed)
    rows, n = sum(lengths), len(lengths)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) * 0.5
    ids = torch.randint(vocabulary, (rows,), generator=g)
    logp, _ = selective_logprob(hidden, weight, ids, impl="reference")
    noise = torch.randn(3, rows, generator=g, dtype=torch.float64) * 0.3
    return {
        "hidden": hidden,
        "weight": weight,
        "target_ids": ids,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "loss_mask": (torch.rand(rows, generator=g) > 0.33).to(torch.uint8),
        "advantages": torch.randn(n, generator=g, dtype=torch.float64),
        "seq_weight": torch.rand(n, generator=g, dtype=torch.float64) + 0.25,
        "old_logprobs": logp + noise[0],
        "ref_logprobs": logp + noise[1],
        "rollout_logprobs": logp + noise[0] + 0.2 * noise[2],
    }


def gradients(data: dict[str, torch.Tensor], config: GrpoLossConfig, **more: object) -> list[torch.Tensor]:
    """[loss, d loss / d hidden, d loss / d weight]."""
    leaves = [data[k].clone().requires_grad_() for k in ("hidden", "weight")]
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")} | more
    loss, _ = linear_grpo_loss(*leaves, data["target_ids"], config=config, impl="reference", **rest)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def subset(data: dict[str, torch.Tensor], keep: list[int]) -> dict[str, torch.Tensor]:
    """The trajectories `keep` (with repetitions) as a batch of their own."""
    cu = data["cu_seqlens"].tolist()
    rows = torch.cat([torch.arange(cu[j], cu[j + 1]) for j in keep])
    out = {k: v[rows] for k, v in data.items() if v.shape[0] == cu[-1]}
    out |= {k: data[k][keep] for k in ("advantages", "seq_weight")}
    lengths = torch.tensor([0] + [cu[j + 1] - cu[j] for j in keep])
    return out | {"weight": data["weight"], "cu_seqlens": lengths.cumsum(0).to(torch.int32)}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_loss_is_the_formula_written_token_by_token(loss_type: str) -> None:
    """Scalar Python arithmetic, one token at a time, gives the same loss."""
    data = batch(1, [3, 5, 1, 6])
    config = settings(loss_type, kl_coef=0.05, kl_estimator="k3", entropy_coef=0.02)
    loss, metrics = linear_grpo_loss(config=config, impl="reference", **data)
    logits = data["hidden"] @ data["weight"].t()
    expected = tokens = weights = 0.0
    for j in range(4):
        rows = range(int(data["cu_seqlens"][j]), int(data["cu_seqlens"][j + 1]))
        rows = [t for t in rows if data["loss_mask"][t]]
        logp = {t: logits[t].log_softmax(0) for t in rows}
        picked = {t: float(logp[t][data["target_ids"][t]]) for t in rows}
        w, a = float(data["seq_weight"][j]), float(data["advantages"][j])
        tokens += w * len(rows)
        weights += w
        for t in rows:
            log_ratio = picked[t] - float(data["old_logprobs"][t])
            if loss_type == "gspo":
                log_ratio = sum(picked[u] - float(data["old_logprobs"][u]) for u in rows) / len(rows)
            r = float(torch.tensor(log_ratio, dtype=torch.float64).exp())
            if loss_type == "cispo":
                term = -min(r, 0.2) * a * picked[t]
            elif loss_type == "sapo":
                tau = 1.0 if a > 0 else 1.05
                term = -a * 4 / tau / (1 + float(torch.tensor(-tau * (r - 1), dtype=torch.float64).exp()))
            else:
                term = -min(r * a, min(max(r, 0.8), 1.2) * a)
            d = float(data["ref_logprobs"][t]) - picked[t]
            term += 0.05 * (float(torch.tensor(d, dtype=torch.float64).exp()) - d - 1)
            term -= 0.02 * float(-(logp[t].exp() * logp[t]).sum())
            expected += w * term / (len(rows) if loss_type in ("grpo", "sapo", "gspo") else 1)
    scale = {"grpo": weights, "sapo": weights, "gspo": weights, "dr_grpo": weights * 16}.get(
        loss_type, tokens
    )
    assert abs(float(loss) - expected / scale) < 1e-12
    assert set(metrics) == set(METRICS)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_however_they_are_cut(loss_type: str) -> None:
    """With the minibatch's denominator, losses and gradients of any cut sum to those of the whole."""
    data = batch(2, [4, 2, 7, 3, 5])
    config = settings(loss_type, kl_coef=0.1, correction="token_tis")
    whole = gradients(data, config)
    norm = loss_denominator(
        config,
        cu_seqlens=data["cu_seqlens"],
        loss_mask=data["loss_mask"],
        seq_weight=data["seq_weight"],
    )
    for cut in ([[0, 1], [2, 3, 4]], [[4, 0, 2], [1], [3]]):
        parts = [gradients(subset(data, keep), config, denominator=norm) for keep in cut]
        assert abs(sum(p[0] for p in parts) - whole[0]) < 1e-13
        assert torch.allclose(sum(p[2] for p in parts), whole[2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_multiplicity_is_that_many_copies(loss_type: str) -> None:
    """weights and duplicate modes of the alignment: w = m/D against m copies of 1/D, rewards included."""
    data = batch(3, [4, 2, 7])
    config = settings(loss_type)
    rewards = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    group = torch.zeros(3, dtype=torch.int32)
    data.pop("advantages")
    once = data | {"seq_weight": torch.tensor([1, 2, 5]) / 8.0, "rewards": rewards, "group_id": group}
    keep = [0, 1, 1, 2, 2, 2, 2, 2]
    copies = subset(data | {"advantages": rewards}, keep)
    copies |= {"rewards": copies.pop("advantages"), "group_id": torch.zeros(8, dtype=torch.int32)}
    copies["seq_weight"] = torch.full((8,), 0.125)
    for a, b in zip(gradients(once, config)[::2], gradients(copies, config)[::2], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_sequence_corrections_and_veto_drop_whole_trajectories() -> None:
    """A trajectory outside the band, or with one vetoed token, changes neither loss nor gradient."""
    data = batch(4, [3, 4])
    data["loss_mask"] = torch.ones(7, dtype=torch.uint8)
    data["rollout_logprobs"] = data["old_logprobs"].clone()
    data["rollout_logprobs"][5] += 12.0  # rho = e^-12 in the second trajectory
    for config in (
        settings("grpo", correction="token_tis", veto=1e-4),
        settings("grpo", correction="sequence_mask", correction_low=1e-3),
        settings("grpo", correction="geometric"),
    ):
        grad = gradients(data, config)[1]
        assert grad[:3].abs().min() > 0 and grad[3:].abs().max() == 0


def test_a_nan_row_is_counted_and_moves_nothing() -> None:
    """NaN, +inf and an all -inf row are metrics; the gradients of the others are what they are without them."""
    data = batch(5, [3, 4])
    data["loss_mask"] = torch.ones(7, dtype=torch.uint8)
    hidden, weight = data.pop("hidden"), data.pop("weight")
    clean = (hidden @ weight.t()).requires_grad_()
    dirty = clean.detach().clone()
    dirty[1, 2], dirty[3, 0], dirty[6] = float("nan"), float("inf"), -float("inf")
    dirty.requires_grad_()
    out = [grpo_loss(x, config=settings("dapo"), impl="reference", **data) for x in (clean, dirty)]
    for loss, _ in out:
        loss.backward()
    keep = [0, 2, 4, 5]
    assert int(out[1][1]["nonfinite_rows"]) == 3
    assert torch.equal(dirty.grad[keep], clean.grad[keep]) and not dirty.grad[[1, 3, 6]].any()
