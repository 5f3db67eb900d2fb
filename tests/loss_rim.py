"""Log-ratios that overflow and underflow, times the sign of the advantage, under every setting of the config."""

from __future__ import annotations

from typing import Any, get_args

import torch

from mgrpo import GrpoLossConfig
from mgrpo.config.loss import Correction, KlEstimator
from mgrpo.ops.token_loss import METRICS
from tests.loss_grid import CLIPPED, LOSS_TYPES, TOLERANCE, error, grid_batch, run_head, run_logits, settings

LOG_RATIOS = (400.0, 95.0, 24.0, 12.0, 0.02, -12.0, -95.0, -400.0)
"""exp overflows in float32 at 89, and is 0 below -104; nothing sits on a bound."""
KL_GAPS = (0.1, 400.0, 30.0, 5.0, -400.0)
MISMATCHES = (0.05, 400.0, 30.0, -0.4, -60.0, 1.0)  # in float64 e^-400 is a weight, and in float32 none


def rim_configs() -> list[GrpoLossConfig]:
    """Every loss type x correction, the KL estimators and the other terms in turn; for each shape of ratio every KL
    estimator x delta too."""
    out: list[GrpoLossConfig] = []
    estimators = (None, *get_args(KlEstimator))
    for i, loss_type in enumerate(LOSS_TYPES):
        for j, correction in enumerate(get_args(Correction)):
            out.append(_config(loss_type, correction, estimators[(i + j) % 4], 4.0 if j % 2 else None, j))
        if loss_type in ("grpo", "cispo", "gspo"):
            out += [_config(loss_type, "none", kl, delta, 0) for kl in estimators for delta in (None, 4.0)]
    return out


def _config(
    loss_type: str, correction: str, kl: str | None, delta: float | None, number: int
) -> GrpoLossConfig:
    more: dict[str, Any] = {"correction": correction}
    if kl is not None:
        more |= {"kl_coef": 0.1, "kl_estimator": kl}
    if delta is not None and loss_type in CLIPPED:
        more["delta"] = delta
    if correction != "none" and number % 2:
        more["veto"] = 1e-4
    if number % 3 == 2:
        more["entropy_coef"] = 0.02
    return settings(loss_type, **more)


def rim_batch(vocabulary: int = 7) -> dict[str, torch.Tensor]:
    """Three trajectories (A = 1, -1, 0) of every log-ratio, then one of a single token for each log-ratio and sign.

    Log-probs are about -420 where the log-ratio is -400, so that all that is given is a log-prob (at most 0). Half of
    the rows have -inf logits, as a masked vocabulary has them.
    """
    g = torch.Generator().manual_seed(3)
    signs = [*(a for a in (1.0, -1.0, 0.0)), *(a for a in (1.0, -1.0) for _ in LOG_RATIOS)]
    lengths = [len(LOG_RATIOS)] * 3 + [1] * (2 * len(LOG_RATIOS))
    gaps = torch.tensor(LOG_RATIOS, dtype=torch.float64).repeat(5)
    rows = sum(lengths)
    logits = (torch.randn(rows, vocabulary, generator=g, dtype=torch.float64) * 2).to(torch.bfloat16).double()
    ids = torch.randint(0, vocabulary - 2, (rows,), generator=g)
    logits[gaps < -20] = 0.0
    logits[torch.arange(rows)[gaps < -20], ids[gaps < -20]] = -816.0
    logits[::2, -1] = -float("inf")
    logp = logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)
    cycle = torch.arange(rows)
    kl = torch.tensor(KL_GAPS, dtype=torch.float64)[cycle % len(KL_GAPS)]
    mismatch = torch.tensor(MISMATCHES, dtype=torch.float64)[cycle % len(MISMATCHES)]
    return {
        "logits": logits,
        "target_ids": ids,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "advantages": torch.tensor(signs),
        "old_logprobs": (logp - gaps).float(),
        "ref_logprobs": (logp + kl).float(),
        "rollout_logprobs": (logp - gaps - mismatch).float(),
    }


def check_rim(impls: tuple[str, ...], configs: list[GrpoLossConfig]) -> None:
    """Loss, metrics and gradient of every config, with old log-probs and without, from logits and through the head:
    finite, row by row the float64 reference's, and exactly 0 where that is."""
    data = rim_batch()
    without = {k: v for k, v in data.items() if k != "old_logprobs"}
    # As a head: the rows of hidden are the logits, and the weight is the identity. It has no -inf.
    head = {k: v for k, v in data.items() if k != "logits"}
    head |= {"hidden": data["logits"].clamp(min=-900.0), "weight": torch.eye(7, dtype=torch.float64)}
    for number, config in enumerate(configs):
        dtype = torch.bfloat16 if number % 4 == 1 else torch.float32
        for batch in (data, without):
            exact = run_logits(batch, config, torch.float64, "reference")
            for impl in impls:
                case = (impl, config, dtype, batch is data)
                _compare(run_logits(batch, config, dtype, impl), exact, dtype, case)
        if number % 2:
            exact = run_head(head, config, torch.float64, "reference")[:3]
            for impl in impls:
                got = run_head(head, config, torch.float32, impl, chunk=16)
                _compare(got[:3], exact, torch.float32, (impl, config, "head"))


def _compare(
    got: tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor],
    exact: tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    case: object,
) -> None:
    gradient, right = got[2].double(), exact[2]
    assert bool(got[0].isfinite()) and bool(gradient.isfinite().all()), case
    assert all(bool(got[1][name].isfinite()) for name in METRICS), (case, got[1])
    scale = right.abs().amax(1)
    assert not gradient[scale == 0].any(), case
    # log-probs of 800 nats are rounded to 6e-5 of a nat in float32, and ratios are exponentials of their differences
    tolerance = 2e-3 if dtype == torch.float32 else 1e-2
    assert bool(((gradient - right).abs().amax(1) <= tolerance * scale + 1e-10).all()), case
    torch.testing.assert_close(got[0].double(), exact[0].double(), rtol=1e-3, atol=1e-3)
    for name in METRICS:
        torch.testing.assert_close(got[1][name].double(), exact[1][name].double(), rtol=1e-3, atol=1e-3)


FAR = tuple(sign * gap for gap in (50.0, 88.0, 89.0, 95.0, 200.0, 1e3, 1e4) for sign in (1.0, -1.0))
"""Log-ratios around and beyond 88.7, where exp overflows in float32."""


def far_configs() -> list[GrpoLossConfig]:
    """Every loss type at both ends of log_ratio_clip, each correction and KL estimator with some."""
    out: list[GrpoLossConfig] = []
    corrections, estimators = get_args(Correction), (None, *get_args(KlEstimator))
    for i, (loss_type, bound) in enumerate((t, b) for t in LOSS_TYPES for b in (20.0, 60.0)):
        more = {"log_ratio_clip": bound, "correction": corrections[i % 5]}
        if estimator := estimators[i % 4]:
            more |= {"kl_coef": 0.1, "kl_estimator": estimator}
        if loss_type in CLIPPED and i % 3 == 0:
            more["delta"] = 4.0
        out += [settings(loss_type, **more), settings(loss_type, log_ratio_clip=bound)]
    return out


def check_far(impls: tuple[str, ...], configs: list[GrpoLossConfig]) -> None:
    """Log-ratios of 50 to 1e4 nats of both signs, under advantages of both: loss, metrics and every gradient (d weight
    too, which one row that is not finite would spoil) are finite, no row counts as one that is not, and where the clip
    holds a token its gradient is 0."""
    n = 2 * len(FAR)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 5, generator=g)
    weight = torch.randn(9, 5, generator=g)
    ids = torch.randint(0, 9, (n,), generator=g)
    logp = (hidden @ weight.t()).double().log_softmax(1).gather(1, ids[:, None]).squeeze(1)
    gap = torch.tensor(FAR * 2, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0]).repeat_interleave(len(FAR))
    held = (gap > 0) == (advantages > 0)
    for number, config in enumerate(configs):
        data = {
            "hidden": hidden,
            "weight": weight,
            "target_ids": ids,
            "cu_seqlens": torch.arange(n + 1, dtype=torch.int32),
            "advantages": advantages,
            "ref_logprobs": (logp + gap.flip(0)).float(),
            "rollout_logprobs": (logp - gap - gap.roll(1)).float(),
        }
        if number % 4 != 3:
            data["old_logprobs"] = (logp - gap).float()
        for impl in impls:
            loss, metrics, *grads = run_head(data, config, torch.float32, impl)
            case = (impl, config, "old_logprobs" in data)
            assert bool(loss.isfinite()) and all(bool(x.isfinite().all()) for x in grads), case
            assert all(bool(metrics[name].isfinite()) for name in METRICS), (case, metrics)
            assert int(metrics["nonfinite_rows"]) == 0, case
            plain = config.kl_coef == 0 and config.type in CLIPPED
            if plain and "old_logprobs" in data:
                assert not grads[0][held].any(), case


MISSING = {1: float("nan"), 7: float("nan"), 9: -float("inf"), 13: float("nan"), 17: float("inf")}
"""Rows of the grid's batch whose sampler's log-prob is not known; 13 is a whole trajectory."""


def check_missing(impls: tuple[str, ...]) -> None:
    """A row without the sampler's log-prob is one whose log-prob is the trainer's, for every correction: loss and
    gradient are those with the trainer's in its place. It has no part in the geometric mean and in the metrics that
    compare the two, and is counted."""
    data = grid_batch(33, torch.float32)
    logp = data["logits"].log_softmax(1).gather(1, data["target_ids"][:, None]).squeeze(1)
    without = {k: v for k, v in data.items() if k != "old_logprobs"}
    for correction in get_args(Correction):
        more: dict[str, Any] = {} if correction == "none" else {"correction": correction, "veto": 0.5}
        if correction in ("sequence_mask", "geometric"):
            more |= {"correction_low": 0.2, "correction_high": 5.0}
        config = settings("grpo", **more)
        for batch in (data, without):
            base = batch.get("old_logprobs", logp)
            dirty, twin = batch["rollout_logprobs"].clone(), batch["rollout_logprobs"].double()
            for row, value in MISSING.items():
                dirty[row], twin[row] = value, base[row]
            exact = run_logits(batch | {"rollout_logprobs": dirty}, config, torch.float64, "reference")
            assert int(exact[1]["rollout_missing_rows"]) == len(MISSING)
            if correction == "geometric":  # a row with the known rows' mean does not move it either
                for rows in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [16, 17, 18]):
                    known = [t for t in rows if t not in MISSING]
                    mean = (base[known].double() - twin[known]).mean()
                    for row in sorted(set(rows) - set(known)):
                        twin[row] = base[row] - mean
            same = run_logits(batch | {"rollout_logprobs": twin}, config, torch.float64, "reference")
            assert error(exact[2], same[2]) < 1e-12 and abs(float(exact[0] - same[0])) < 1e-12
            assert int(same[1]["rollout_missing_rows"]) == 0
            for impl in impls:
                got = run_logits(batch | {"rollout_logprobs": dirty}, config, torch.float32, impl)
                case = (impl, config, batch is data)
                assert error(got[2], exact[2]) <= TOLERANCE[torch.float32], case
                for name in METRICS:
                    torch.testing.assert_close(
                        got[1][name].double(), exact[1][name].double(), rtol=3e-5, atol=3e-6
                    )
