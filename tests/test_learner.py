"""One optimizer step: the gradient is that of the formula, however the minibatch is cut and whatever is skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.run import OptimizerConfig
from mgrpo.errors import NumericsError
from mgrpo.losses.registry import find_loss
from mgrpo.model.policy import Policy
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, logprobs_of
from mgrpo.trainers.torch.schedule import learning_rate
from tests.models import tiny_policy
from tests.rows import ROWS, rows_of


def denominator_of(rows: MicroBatch, loss: GrpoLossConfig) -> float:
    return float(
        rows.weights.sum() if find_loss(loss).sequence_mean else (rows.weights * rows.loss_mask.sum(1)).sum()
    )


def gradient(rows: MicroBatch, cuts: Sequence[Sequence[int]], loss: GrpoLossConfig) -> list[torch.Tensor]:
    """The gradient that Learner.step hands to the optimizer, clipping aside."""
    policy = tiny_policy("shift")
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in policy.parameters() if p.grad is not None)
    )
    micro = [rows.rows(torch.isin(torch.arange(ROWS), torch.tensor(list(cut)))) for cut in cuts]
    Learner(policy, optimizer, loss, grad_clip=1e9).step(MiniBatch(micro, denominator_of(rows, loss)))
    return seen


def written_out(rows: MicroBatch, loss: GrpoLossConfig) -> list[torch.Tensor]:
    """The formula of docs/algorithm.md token by token, in plain torch."""
    policy = tiny_policy("shift")
    total = torch.zeros(())
    for row in range(ROWS):
        n = int(rows.lengths[row])
        ids = rows.ids[row : row + 1, :n]
        logits = policy.model(input_ids=ids).logits[0]
        logp = torch.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        ratio = (logp - rows.rollout_logprobs[row, 1:n]).exp()
        a = rows.advantages[row]
        clipped = ratio.clamp(1 - loss.clip_eps_low, 1 + loss.clip_eps_high)
        tokens = torch.minimum(ratio * a, clipped * a)[rows.loss_mask[row, 1:n]]
        total = total - rows.weights[row] * (tokens.mean() if find_loss(loss).sequence_mean else tokens.sum())
    (total / denominator_of(rows, loss)).backward()
    return [p.grad for p in policy.parameters() if p.grad is not None]


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert len(a) == len(b) > 0
    worst = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    return worst / max(float(y.abs().max()) for y in b)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_gradient_is_the_formulas(loss_type: str) -> None:
    """Rows without an advantage are skipped, masked tokens never projected: the gradient stays the formula's."""
    loss = GrpoLossConfig(type=loss_type, clip_eps_low=0.2, clip_eps_high=0.28)
    rows = rows_of(0)
    assert relative(gradient(rows, [range(ROWS)], loss), written_out(rows, loss)) < 2e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "gspo"])
def test_cuts_do_not_change_the_gradient(loss_type: str) -> None:
    """1, 2 and 5 micro-batches, equal or not, give the same gradient."""
    loss = GrpoLossConfig(type=loss_type, clip_eps_high=5.0 if loss_type == "cispo" else 0.2)
    rows = rows_of(1)
    if (
        loss_type == "gspo"
    ):  # whole sequences far off the policy have ratios near 0: nothing but rounding is left
        own = logprobs_of(tiny_policy("shift"), rows, 1.0)
        rows.rollout_logprobs[:, 1:][rows.active().mask] = (
            own + 0.1 * rows.rollout_logprobs[:, 1:][rows.active().mask]
        )
    whole = gradient(rows, [range(ROWS)], loss)
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for cuts in ([range(3), range(3, ROWS)], [[0], [1, 9], [2, 3, 4], [5, 8], [6, 7]]):
        assert relative(gradient(rows, cuts, loss), whole) < 1e-6


def test_nothing_to_learn_changes_nothing() -> None:
    """All advantages 0: no step, no momentum, no metrics."""
    policy, rows = tiny_policy("shift"), rows_of(2)
    rows.advantages.zero_()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.5)
    before = [p.detach().clone() for p in policy.parameters()]
    learner = Learner(policy, optimizer, GrpoLossConfig(), grad_clip=1.0)
    assert learner.train([MiniBatch([rows], 10.0)], recompute_old=False) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_recomputed_old_logprobs_start_at_ratio_one() -> None:
    """With the denominator taken from the policy itself, the first minibatch has ratio 1 everywhere."""
    policy, rows = tiny_policy("shift"), rows_of(3)
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.1), GrpoLossConfig(), grad_clip=1.0)
    out = learner.train([MiniBatch([rows], 10.0), MiniBatch([rows_of(4)], 10.0)], recompute_old=True)
    assert out["policy/is_ratio_max"] > 1.0 + 1e-4  # the second minibatch meets an updated policy
    policy, rows = tiny_policy("shift"), rows_of(3)
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.1), GrpoLossConfig(), grad_clip=1.0)
    gap = (logprobs_of(policy, rows, 1.0) - rows.active().rollout_logprobs).abs()
    out = learner.train([MiniBatch([rows], 10.0)], recompute_old=True)
    assert out["policy/is_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    acting = (rows.advantages != 0).repeat_interleave(rows.active().mask.sum(1))
    assert out["policy/logprob_diff_max"] == pytest.approx(
        float(gap[acting].max()), rel=1e-4
    )  # the sampler's


@pytest.mark.parametrize("off", [-300.0, 300.0])
def test_a_sampler_far_off_is_a_metric_and_no_error(off: float) -> None:
    """Ratios of 0, and ratios that overflow: the step is taken, and the mismatch is reported in nats."""
    policy, rows = tiny_policy("shift"), rows_of(3)
    rows.rollout_logprobs -= off
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.1), GrpoLossConfig(), grad_clip=1.0)
    out = learner.train([MiniBatch([rows], 10.0)], recompute_old=False)
    assert 250.0 < out["policy/logprob_diff_max"] < 350.0
    assert all(math.isfinite(value) for value in out.values())
    assert all(bool(p.isfinite().all()) for p in policy.parameters())


def test_the_rate_rises_holds_and_falls() -> None:
    """Warm-up, plateau, fall over the last part; constant by default; a cosine meets the line in its middle."""
    rise = OptimizerConfig(lr=1.0, warmup_steps=4, decay=0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert [learning_rate(rise, step, 10) for step in range(10)] == pytest.approx(expected)
    assert {learning_rate(OptimizerConfig(lr=0.3), step, 10) for step in range(10)} == {0.3}
    cosine = OptimizerConfig(lr=2.0, decay=1.0, decay_shape="cosine")
    assert [learning_rate(cosine, step, 4) for step in range(4)] == pytest.approx(
        [1 - math.cos(math.pi * part) for part in (1, 0.75, 0.5, 0.25)]
    )
    with pytest.raises(ValueError, match=r"decay\n.* less than or equal to 1 .*1\.5"):
        OptimizerConfig(decay=1.5)


def test_a_step_takes_its_rate() -> None:
    """The rate of the step replaces the optimizer's: at 0 nothing moves, at 0.1 SGD moves twice as far as at 0.05."""
    moves = []
    for lr in (0.0, 0.05, 0.1):
        policy, rows = tiny_policy("shift"), rows_of(3)
        before = [p.detach().clone() for p in policy.parameters()]
        optimizer = torch.optim.SGD(policy.parameters(), lr=7.0)
        learner = Learner(policy, optimizer, GrpoLossConfig(), grad_clip=1.0)
        out = learner.train([MiniBatch([rows], 10.0)], recompute_old=False, lr=lr)
        assert out["policy/lr"] == lr
        moves.append(
            sum(float((a - b).detach().norm() ** 2) for a, b in zip(before, policy.parameters(), strict=True))
            ** 0.5
        )
    assert moves[0] == 0 and moves[1] > 0 and moves[2] == pytest.approx(2 * moves[1], rel=1e-4)


def test_numbers_that_no_step_may_be_taken_with() -> None:
    """NaN weights end in a typed error, and the weights stay as they are."""
    policy: Policy = tiny_policy("shift")
    with torch.no_grad():
        next(policy.parameters())[5] = float("nan")
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.1), GrpoLossConfig(), grad_clip=1.0)
    rows = rows_of(5)
    rows.ids[:, 1:4] = 5
    with pytest.raises(NumericsError, match="not taken"):
        learner.step(MiniBatch([rows], 10.0))
    with pytest.raises(NumericsError, match=r"no finite log-prob .*not taken"):
        learner.train([MiniBatch([rows], 10.0)], recompute_old=True)


def test_kl_needs_its_reference() -> None:
    """A KL term without a reference policy, or a reference without a KL term, is an error."""
    policy = tiny_policy("shift")
    with pytest.raises(ValueError, match=r"kl_coef=0\.1"):
        Learner(policy, torch.optim.SGD(policy.parameters()), GrpoLossConfig(kl_coef=0.1), 1.0)
    with pytest.raises(ValueError, match=r"kl_coef=0\.0"):
        Learner(policy, torch.optim.SGD(policy.parameters()), GrpoLossConfig(), 1.0, reference=tiny_policy())
