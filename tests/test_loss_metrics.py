"""Metrics of a minibatch do not depend on how it was cut into micro-batches, and an RL step has a run's names."""

from __future__ import annotations

import pytest
import torch

import mgrpo


def test_metrics_of_micro_batches_are_those_of_the_whole() -> None:
    """Sums, extremes and means over tokens, the sampler's missing log-probs among them."""
    g = torch.Generator().manual_seed(0)
    shape, config = (6, 9), mgrpo.GrpoLossConfig(type="dapo", kl_coef=0.1)
    rows = {name: -torch.rand(shape, generator=g).double() for name in ("logprobs", "old", "ref", "rollout")}
    rows["rollout"][4, 2] = float("nan")
    advantages = torch.randn(6, generator=g).double()

    def call(part: slice) -> tuple[int, dict[str, torch.Tensor]]:
        found = mgrpo.policy_loss(
            rows["logprobs"][part], config=config, advantages=advantages[part], old_logprobs=rows["old"][part],
            ref_logprobs=rows["ref"][part], rollout_logprobs=rows["rollout"][part], denominator=54.0,
        )  # fmt: skip
        return rows["logprobs"][part].numel(), found[1]

    whole = {name: float(value) for name, value in call(slice(6))[1].items()}
    joined = mgrpo.join_metrics([call(slice(0, 4)), call(slice(4, 6))])
    assert joined.keys() == whole.keys() and whole["rollout_missing_rows"] == 1.0
    # Not additive: the effective sample size, and means over the tokens that the sampler knows.
    for name in whole.keys() - {"ess", "mismatch_kl", "entropy"}:
        assert joined[name] == pytest.approx(whole[name], rel=1e-12), name


def test_an_rl_step_of_two_optimizer_steps() -> None:
    first = dict.fromkeys(
        ("policy_loss", "clip_frac_low", "clip_frac_high", "entropy", "kl", "mismatch_kl"), 0.5
    )
    first |= {"grad_norm": 1.0, "ratio_max": 2.0, "ratio_min": 0.5, "logprob_diff_max": 0.25}
    second = first | {"grad_norm": 3.0, "ratio_max": 1.5, "ratio_min": 0.25, "logprob_diff_max": 9.0}
    found = mgrpo.step_metrics([first, second], lr=1e-3)
    assert found["policy/grad_norm"] == 2.0 and found["loss/pg"] == 0.5 and found["policy/lr"] == 1e-3
    assert (found["policy/is_ratio_max"], found["policy/is_ratio_min"]) == (2.0, 0.25)
    assert found["policy/logprob_diff_max"] == 0.25
    assert mgrpo.step_metrics([], lr=1e-3) == {}
