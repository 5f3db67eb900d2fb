"""The loss from log-probs: the same as from logits, and what other trainers' formulas give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mgrpo import GrpoLossConfig, grpo_loss, policy_loss
from mgrpo.losses.builtin import Grpo
from mgrpo.ops import check
from mgrpo.ops.selective_logprob import row_logprob
from mgrpo.ops.token_loss import METRICS
from tests import host_losses
from tests.host_losses import host_batch
from tests.loss_grid import configs, grid_batch, settings
from tests.loss_rim import rim_batch, rim_configs
from tests.own_losses import HERE

Data = dict[str, torch.Tensor]


def given(data: Data, *without: str) -> Data:
    """What a loss is given about tokens beside logits and ids."""
    return {k: v for k, v in data.items() if k not in ("logits", "target_ids", *without)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_bit_for_bit_the_loss_from_logits(dtype: torch.dtype) -> None:
    """Loss, metrics and gradients of `grpo_loss(impl="reference")` whose log-probs it is given, over the grid, ratios
    that overflow and losses of one's own, with old log-probs and without."""
    own = [GrpoLossConfig(type=f"{HERE}:Pull", options={"spring": 0.3}, kl_coef=0.1)]
    step = 1 if dtype == torch.float32 else 3
    cases = [(grid_batch(33, dtype), config) for config in [*configs()[::step], *own]]
    cases += [(rim_batch(), config) for config in rim_configs()[:: 4 * step]]
    for data, config in cases:
        for rest in (given(data), given(data, "old_logprobs")):
            z = data["logits"].to(dtype).clone().requires_grad_()
            loss, metrics = grpo_loss(z, data["target_ids"], config=config, impl="reference", **rest)
            (grad,) = torch.autograd.grad(loss, z)
            logp, entropy = row_logprob(z, data["target_ids"], config.temperature)
            mine, numbers = policy_loss(logp, entropy=entropy, config=config, **rest)
            (own_grad,) = torch.autograd.grad(mine, z)
            assert mine.dtype == dtype and torch.equal(mine, loss) and torch.equal(own_grad, grad), config
            assert list(numbers) == list(METRICS)
            assert all(torch.equal(numbers[name], metrics[name]) for name in METRICS), config


def test_padded_rows_are_packed_ones() -> None:
    """Loss, metrics, gradient and values of (B, S) are those of its rows one behind the other, whatever stands where
    the mask is 0; values have the input's shape."""
    x, config = host_batch(0, (2.0,)), settings("grpo", kl_coef=0.1, entropy_coef=0.1, correction="mis")
    x["logp"][x["mask"] == 0] = float("nan")
    flat = torch.nonzero(x["mask"].reshape(-1)).squeeze(1)
    names = {"loss_mask": "mask", "old_logprobs": "old", "ref_logprobs": "ref", "rollout_logprobs": "rollout"}
    padded = {k: x[v] for k, v in names.items()} | {"entropy": x["logp"].abs()}
    packed = {k: v.reshape(-1)[flat] for k, v in padded.items()}
    packed["cu_seqlens"] = torch.nn.functional.pad(x["mask"].sum(1).long().cumsum(0), (1, 0))
    out = []
    for logp, inputs in ((x["logp"], padded), (x["logp"].reshape(-1)[flat], packed)):
        logp = logp.clone().requires_grad_()
        loss, metrics, values = policy_loss(
            logp, config=config, tokens=True, advantages=x["advantages"][:, 0], **inputs
        )
        (grad,) = torch.autograd.grad(loss, logp)
        assert all(value.shape == logp.shape for value in values)
        rows = flat if logp.dim() == 2 else torch.arange(len(flat))
        metrics.pop("active_row_frac")  # of all rows, masked ones too
        numbers = [loss.detach(), *metrics.values(), *(v.reshape(-1)[rows] for v in (grad, *values))]
        out.append((numbers, metrics, values))
        assert not grad.reshape(-1)[torch.ones(grad.numel()).index_fill(0, rows, 0.0) != 0].any()
    for a, b in zip(out[0][0], out[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
    values, metrics = out[0][2], out[0][1]
    mask = x["mask"] != 0
    assert torch.equal(values.logprobs[mask], x["logp"][mask]) and not values.logprobs[~mask].any()
    assert bool((values.ratio[mask] - (x["logp"] - x["old"])[mask].exp()).abs().max() < 1e-12)
    assert (
        bool((values.ratio[~mask] == 1).all())
        and bool(values.clipped.any())
        and not values.clipped[~mask].any()
    )
    assert abs(float(metrics["entropy_all"] - x["logp"][mask].abs().mean())) < 1e-12


def test_values_of_tokens_without_entropy() -> None:
    """NaN where a token is, 0 where none is, and the metrics NaN; the rest is there."""
    x = host_batch(0, ())
    _, metrics, values = policy_loss(
        x["logp"], config=settings("grpo"), tokens=True, loss_mask=x["mask"], advantages=x["advantages"][:, 0]
    )
    mask = x["mask"] != 0
    assert bool(values.entropy[mask].isnan().all()) and not values.entropy[~mask].any()
    assert metrics["entropy"].isnan() and metrics["entropy_all"].isnan()
    assert torch.equal(values.logprobs[mask], x["logp"][mask]) and bool((values.ratio == 1).all())


def test_without_entropy() -> None:
    """The same loss where nothing reads it, and NaN among the metrics; refused by name where something does."""
    data = given(grid_batch(33, torch.float64))
    logp = data["old_logprobs"].double() + 0.1
    config = settings("dapo", kl_coef=0.1)
    got, want = (policy_loss(logp, config=config, entropy=h, **data) for h in (None, torch.ones_like(logp)))
    assert torch.equal(got[0], want[0]) and got[1]["entropy"].isnan()
    assert all(torch.equal(got[1][name], want[1][name]) for name in METRICS if name != "entropy")
    with pytest.raises(ValueError, match=r"^entropy: missing, with entropy_coef 0\.1$"):
        policy_loss(logp, config=settings("dapo", entropy_coef=0.1), **data)
    with pytest.raises(ValueError, match=r"^entropy: missing, with type 'tests.own_losses:Doubled'"):
        policy_loss(logp, config=GrpoLossConfig(type=f"{HERE}:Doubled"), **data)
    value, _ = policy_loss(logp, config=GrpoLossConfig(type=f"{HERE}:OwnGrpo"), **data)
    assert torch.equal(value, policy_loss(logp, config=settings("grpo", clip_eps_high=0.2), **data)[0])
    with pytest.raises(ValueError, match=r"^entropy: shape \(3,\) where \(19\) is needed"):
        policy_loss(logp, config=config, entropy=torch.zeros(3), **data)
    with pytest.raises(TypeError, match=r"^logprobs: dtype torch.int64"):
        policy_loss(torch.zeros(19, dtype=torch.int64), config=config, **data)
    with pytest.raises(ValueError, match=r"^ref_logprobs: missing, with kl_coef 0\.1"):
        policy_loss(logp, config=config, **given(data, "ref_logprobs"))


def test_a_class_says_again_whether_its_own_term_reads_the_entropy() -> None:
    """A subclass that changes the term loses what was known of it, and keeps what it says itself."""

    class Other(Grpo):
        def term(self, tokens: Any) -> torch.Tensor:
            return super().term(tokens) * 2

    class Same(Grpo):
        sequence_mean = False

    assert Other.uses_entropy and not Other.zero_without_advantage
    assert not Same.uses_entropy and Same.zero_without_advantage


def test_in_a_compiled_graph() -> None:
    """One graph without a break, and the same numbers: ratios of sequences, corrections that sum over rows."""
    data = given(grid_batch(33, torch.float32))
    config = settings(
        "grpo", ratio_level="sequence", kl_coef=0.1, kl_bias_correction=True, correction="geometric"
    )

    def run(logp: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return policy_loss(logp, config=config, entropy=torch.ones_like(logp), **data)

    out = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        logp = (data["old_logprobs"] + 0.1).requires_grad_()
        loss, metrics = function(logp)
        out.append([loss.detach(), *torch.autograd.grad(loss, logp), *metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True)) and bool(out[0][1].any())


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs"])
def test_given_log_probs_that_are_not_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by name on the CPU; where a look is not free the token is idle and counted."""
    data, config = given(grid_batch(33, torch.float64)), settings("dapo", kl_coef=0.1)
    logp = (data["old_logprobs"].double() + 0.1).requires_grad_()
    data[name] = data[name].clone()
    data[name][2] = float("nan")
    with pytest.raises(ValueError, match=rf"^{name}: nan at \[2\] is not finite"):
        policy_loss(logp, config=config, **data)
    monkeypatch.setattr(check, "values_visible", lambda x: False)
    loss, metrics = policy_loss(logp, config=config, **data)
    (grad,) = torch.autograd.grad(loss, logp)
    assert int(metrics["nonfinite_rows"]) == 1 and not grad[2].any() and bool(grad.isfinite().all())


def test_rows_that_are_not_finite_are_idle_and_counted() -> None:
    """A NaN or infinite log-prob or entropy moves nothing, and the others are as without it."""
    data, config = given(grid_batch(33, torch.float64)), settings("dapo", entropy_coef=0.1)
    logp = (data["old_logprobs"].double() + 0.1).requires_grad_()
    entropy = torch.ones(19, dtype=torch.float64, requires_grad=True)
    clean = torch.autograd.grad(policy_loss(logp, entropy=entropy, config=config, **data)[0], (logp, entropy))
    dirty, bad = logp.detach().clone(), entropy.detach().clone()
    dirty[0], dirty[2], bad[4] = float("nan"), -float("inf"), float("nan")
    dirty.requires_grad_()
    bad.requires_grad_()
    loss, metrics = policy_loss(dirty, entropy=bad, config=config, **data)
    grads = torch.autograd.grad(loss, (dirty, bad))
    assert int(metrics["nonfinite_rows"]) == 3 and bool(loss.isfinite())
    others = [t for t in range(19) if t not in (0, 2, 4)]
    for got, want in zip(grads, clean, strict=True):
        assert not got[[0, 2, 4]].any() and torch.equal(got[others], want[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Loss, metrics and gradient inside torch.autocast are those outside."""
    data, config = given(grid_batch(33, torch.float64)), settings("grpo", ratio_level="sequence", kl_coef=0.1)
    out = []
    for enabled in (False, True):
        logp = (data["old_logprobs"].to(dtype) + 0.1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, metrics = policy_loss(logp, config=config, entropy=torch.ones(19, dtype=dtype), **data)
            loss.backward()
        out.append([loss.detach(), logp.grad, *metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True)) and out[0][0].dtype == dtype


def ours(x: Data, config: GrpoLossConfig, weight: torch.Tensor | None = None) -> list[torch.Tensor]:
    """[loss, gradient (B, S)] of policy_loss on a host's padded batch."""
    logp = x["logp"].clone().requires_grad_()
    loss, _ = policy_loss(
        logp,
        config=config,
        loss_mask=x["mask"],
        advantages=x["advantages"][:, 0],
        seq_weight=weight,
        old_logprobs=x["old"],
        ref_logprobs=x["ref"],
        rollout_logprobs=x["rollout"],
    )
    return [loss.detach(), *torch.autograd.grad(loss, logp)]


def theirs(x: Data, formula: Any, **how: Any) -> list[torch.Tensor]:
    logp = x["logp"].clone().requires_grad_()
    loss = formula(logp, x, **how)
    return [loss.detach(), *torch.autograd.grad(loss, logp)]


def same(got: list[torch.Tensor], want: list[torch.Tensor], bound: float = 1e-12) -> None:
    """The loss, and every entry of the gradient against the largest of its own row."""
    assert abs(float(got[0] - want[0])) <= bound * max(1.0, abs(float(want[0])))
    scale = want[1].abs().amax(1, keepdim=True).clamp(min=1e-3)
    assert bool(((got[1] - want[1]).abs() <= bound * scale).all())


TRL = [
    *[{"kind": kind, "level": level} for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo")
      for level in ("token", "sequence")],
    *[{"kind": "dapo", "level": level, "beta": 0.1, "bias": bias, "delta": 2.0}
      for level in ("token", "sequence") for bias in (False, True)],
    {"kind": "cispo", "level": "token", "cap": 5.0, "beta": 0.1, "bias": True},
    {"kind": "grpo", "level": "token", "sampler": "token_truncate"},
    {"kind": "grpo", "level": "token", "sampler": "token_mask"},
    {"kind": "bnpo", "level": "sequence", "sampler": "sequence_mask"},
]  # fmt: skip
CORRECTION = {
    "token_truncate": {"correction": "token_tis", "correction_high": 2.0},
    "token_mask": {"correction": "mis", "correction_low": 0.5, "correction_high": 2.0},
    "sequence_mask": {"correction": "sequence_mask", "correction_low": 0.5, "correction_high": 2.0},
}


def trl_config(how: dict[str, Any], bound: float = 30.0) -> GrpoLossConfig:
    more: dict[str, Any] = {"log_ratio_clip": bound} | CORRECTION.get(how.get("sampler", ""), {})
    if how["kind"] == "cispo":
        more["clip_eps_high"] = how["cap"]
    if "beta" in how:
        more |= {"kl_coef": how["beta"], "kl_bias_correction": how["bias"]}
    if "delta" in how:
        more["delta"] = how["delta"]
    return settings(how["kind"], ratio_level=how["level"], **more)


@pytest.mark.parametrize("how", TRL, ids=str)
def test_trls_formulas(how: dict[str, Any]) -> None:
    """Every loss type, both levels of the ratio, delta, the KL with its correction and without, the sampler's ratio;
    log-ratios up to the bound of `log_ratio_clip`, beyond which TRL's ratio goes on to grow."""
    for seed, far in ((0, ()), (1, (0.0, 1e-6)), (2, (12.0, -30.0, 24.0)), (3, (-45.0, 29.0))):
        x = host_batch(seed, far)
        same(ours(x, trl_config(how)), theirs(x, host_losses.trl, **how))
    if not how.get("bias"):
        x = host_batch(4, (59.0, -59.0, 31.0))
        same(ours(x, trl_config(how, 60.0)), theirs(x, host_losses.trl, **how))


@pytest.mark.parametrize("sampler", sorted(CORRECTION))
def test_a_log_prob_that_the_sampler_did_not_report_is_trls_ratio_of_1(sampler: str) -> None:
    """NaN among the sampler's log-probs, of some tokens and of a whole row."""
    x, how = host_batch(5, ()), {"kind": "grpo", "level": "token", "sampler": sampler}
    x["rollout"][1, 2:4] = float("nan")
    x["rollout"][3] = float("nan")
    got = ours(x, trl_config(how))
    same(got, theirs(x, host_losses.trl, **how))
    assert bool(got[1][3, :8].any())


@pytest.mark.parametrize(("kind", "mode"), [
    ("vanilla", "token-mean"), ("vanilla", "seq-mean-token-mean"), ("gspo", "token-mean"),
    ("gspo", "seq-mean-token-mean"), ("sapo", "seq-mean-token-mean"),
])  # fmt: skip
def test_verls_formulas(kind: str, mode: str) -> None:
    """To rounding for log-ratios between its bounds and above them. Below -20 verl holds the ratio at e^-20 and gives
    it no gradient; here it goes on to 0: 2.1e-9 of the advantage is all that lies between. (verl's mean over a
    sequence divides by its length + 1e-8.)"""
    type_ = {"token-mean": "bnpo", "seq-mean-token-mean": "grpo"}[mode]
    more: dict[str, Any] = {"vanilla": {"delta": 3.0}, "gspo": {"log_ratio_clip": 10.0}, "sapo": {}}[kind]
    if kind == "gspo":
        more["ratio_level"] = "sequence"
    if kind == "sapo":
        type_ = "sapo"
    config = settings(type_, **more)
    for far in ((), (19.0, -19.0, 25.0), (21.0, 85.0), (200.0, 0.1)):
        x = host_batch(6, far)
        same(ours(x, config), theirs(x, host_losses.verl, kind=kind, mode=mode))
    x = host_batch(7, (-21.0, -40.0, -100.0))
    same(ours(x, config), theirs(x, host_losses.verl, kind=kind, mode=mode), 5e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_slimes_formulas(level: str, cap: float | None) -> None:
    """Its policy loss, dual clip, GSPO and the KL with the importance ratio (at token level, where the ratio is)."""
    more: dict[str, Any] = {"delta": cap, "ratio_level": level, "log_ratio_clip": 30.0}
    beta = 0.1 if level == "token" else 0.0
    if beta:
        more |= {"kl_coef": beta, "kl_bias_correction": True}
    for far in ((), (12.0, -30.0, 24.0)):
        x = host_batch(8, far)
        same(ours(x, settings("grpo", **more)), theirs(x, host_losses.slime, level=level, cap=cap, beta=beta))


def test_prime_rls_formula() -> None:
    """A ratio that nothing clips, a squared log-ratio as the k2 estimate to the sampler, weights of rows, and a divisor
    that counts tokens."""
    for far in ((), (12.0, -18.0)):
        x = host_batch(9, far)
        weight, own = x["weight"][:, 0], x["mask"].sum(1)
        x["ref"] = x["old"]
        scale = float((weight * own).sum() / own.sum())  # the divisor here is the weighted count
        config = settings("dapo", clip_eps_low=1.0, clip_eps_high=1e30, kl_coef=2e-3, kl_estimator="k2")
        got = [part * scale for part in ours(x, config, weight)]
        same(got, theirs(x, host_losses.prime, tau=1e-3))
