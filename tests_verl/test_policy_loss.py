"""The policy loss `mgrpo`, and verl's own, on advantages that carry the votes: the weighted loss of mgrpo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import config as verl_config
from verl_kit import (
    LOSS_TYPES,
    Team,
    actor_of,
    batch_of,
    compose_config,
    make_team,
    mgrpo_config,
    padded,
    weighted_loss,
)

from mgrpo.errors import ConfigError
from mgrpo.integrations import verl as adapter

SCALE = "actor_rollout_ref.actor.loss_scale_factor=32"


def verl_loss(
    team: Team, mode: str, loss_mode: str, *overrides: str, split: int = 0, ranks: int = 1, uids: Any = None
) -> tuple[Tensor, Tensor]:
    """(loss, gradient (B, S)) of a mini-batch as verl's actor adds it up over micro-batches of `split` rows, averaged
    over ranks as its engines do; advantages from the estimator."""
    config = mgrpo_config(f"actor_rollout_ref.actor.loss_agg_mode={mode}", *overrides)
    data = compute_advantage(batch_of(team, uids), "mgrpo", config=config.algorithm)
    whole = {"dp_size": ranks, "batch_num_tokens": int(team.mask.sum()), "global_batch_size": len(team.mask)}
    actor = actor_of(config, **whole, loss_scale_factor=config.actor_rollout_ref.actor.loss_scale_factor)
    logprobs = team.logprobs.clone().requires_grad_()
    total = torch.zeros(())
    for rows in torch.arange(len(team.mask)).split(split or len(team.mask)):
        loss, metrics = get_policy_loss_fn(loss_mode)(
            old_log_prob=team.old_logprobs[rows],
            log_prob=logprobs[rows],
            advantages=data.batch["advantages"][rows],
            response_mask=team.mask[rows].bool(),
            loss_agg_mode=mode,
            config=actor,
        )
        assert all(isinstance(value, float) for value in metrics.values())
        (loss / ranks).backward()
        total = total + loss.detach() / ranks
    assert logprobs.grad is not None
    return total, logprobs.grad


@pytest.mark.parametrize("split", [0, 5])
@pytest.mark.parametrize("mode", LOSS_TYPES)
@pytest.mark.parametrize("loss_mode", ["mgrpo", "vanilla"])
def test_equals_the_weighted_loss(loss_mode: str, mode: str, split: int) -> None:
    """Loss and gradient, for every way in which verl divides, however the mini-batch is cut."""
    for seed in range(3):
        team = make_team(seed)
        loss, gradient = verl_loss(team, mode, loss_mode, SCALE, split=split)
        expected, slope = weighted_loss(team, mode)
        assert abs(loss - expected) <= 5e-7 * max(1.0, abs(expected))
        assert (gradient - slope).abs().max() <= 1e-6 * slope.abs().max()


def test_ranks_are_averaged() -> None:
    """verl scales by dp_size what its engines average over ranks."""
    team = make_team(3)
    for mode in LOSS_TYPES:
        loss, gradient = verl_loss(team, mode, "mgrpo", SCALE, split=7, ranks=4)
        expected, slope = weighted_loss(team, mode)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("mode", LOSS_TYPES)
def test_padding_changes_nothing(mode: str) -> None:
    """verl divides by its rows of padding too; the estimator makes up for them."""
    team = make_team(4)
    more, uids = padded(team, 5)
    rows = len(team.mask)
    filler = torch.zeros(5, team.mask.shape[1])
    more = replace(
        more, logprobs=torch.cat([team.logprobs, filler]), old_logprobs=torch.cat([team.old_logprobs, filler])
    )
    loss, gradient = verl_loss(more, mode, "mgrpo", SCALE, split=4, uids=uids)
    expected, slope = weighted_loss(team, mode)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:rows], slope)
    assert not gradient[rows:].any()


def test_clips_are_those_of_the_actor() -> None:
    """clip_ratio_low and _high, and the dual clip, which verl always has: clip_ratio_c is delta; 1e30 leaves it out."""
    team = make_team(5)
    names = ("clip_ratio_low=0.1", "clip_ratio_high=0.3", "clip_ratio_c=1.5")
    overrides = [f"actor_rollout_ref.actor.{name}" for name in names]
    clips = {"clip_eps_low": 0.1, "clip_eps_high": 0.3}
    for loss_mode in ("mgrpo", "vanilla"):
        loss, gradient = verl_loss(team, "token-mean", loss_mode, *overrides)
        expected, slope = weighted_loss(team, "token-mean", delta=1.5, **clips)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, slope)
    loss, _ = verl_loss(
        team, "token-mean", "mgrpo", *overrides[:2], "actor_rollout_ref.actor.clip_ratio_c=1e30"
    )
    without, _ = weighted_loss(team, "token-mean", delta=None, **clips)
    torch.testing.assert_close(loss, without)
    assert abs(without - expected) > 1e-4


def test_rollout_weights_multiply_the_policy_term() -> None:
    """verl's importance weights (rollout correction): as its vanilla loss takes them, detached."""
    team = make_team(6)
    weights = torch.rand(team.mask.shape) * 2
    actor = actor_of(mgrpo_config())
    given = {
        "old_log_prob": team.old_logprobs,
        "advantages": team.reward[:, None] * team.mask,
        "response_mask": team.mask.bool(),
        "config": actor,
        "rollout_is_weights": weights,
    }
    results = []
    for name in ("mgrpo", "vanilla"):
        logprobs = team.logprobs.clone().requires_grad_()
        loss, _ = get_policy_loss_fn(name)(log_prob=logprobs, loss_agg_mode="token-mean", **given)
        loss.backward()
        results.append((loss.detach(), logprobs.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("loss_mode", ["gspo", "gpg", "cispo", "sapo", "dppo_tv", "dppo_kl"])
def test_other_losses_of_verl_carry_votes(loss_mode: str) -> None:
    """A vote of 2 in the advantage is two copies of the row: the terms that are let through are homogeneous."""
    team = make_team(7)
    actor = actor_of(mgrpo_config(), batch_num_tokens=100, global_batch_size=50, dp_size=1)
    advantages = team.reward[:, None] * team.mask

    def loss_of(rows: Tensor, scale: Tensor) -> Tensor:
        loss, _ = get_policy_loss_fn(loss_mode)(
            old_log_prob=team.old_logprobs[rows],
            log_prob=team.logprobs[rows],
            advantages=advantages[rows] * scale[:, None],
            response_mask=team.mask[rows].bool(),
            loss_agg_mode="token-mean",
            config=actor,
        )
        return loss

    every = torch.arange(len(team.mask))
    votes = torch.from_numpy((every % 3).numpy())
    copies = every.repeat_interleave(votes)
    torch.testing.assert_close(loss_of(every, votes.float()), loss_of(copies, torch.ones(len(copies))))


def test_tokens_that_are_not_finite_count_for_nothing() -> None:
    team = make_team(8)
    team.logprobs[0, 0] = float("nan")
    loss, metrics = adapter.policy_loss(
        team.old_logprobs,
        team.logprobs,
        torch.ones(team.mask.shape),
        team.mask.bool(),
        config=actor_of(mgrpo_config()),
    )
    assert loss.isfinite() and metrics["actor/nonfinite_rows"] == 1.0


REFUSED = (
    (["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm"], "actor.loss_scale_factor: None"),
    (
        ["actor_rollout_ref.actor.clip_ratio_c=1.1"],
        "actor.clip_ratio_c: 1.1 is below 1 . clip_ratio_high, 1.2",
    ),
    (["actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov"], "'clip_cov' cannot carry votes"),
    (["actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov"], "'kl_cov' cannot carry votes"),
    (["actor_rollout_ref.actor.policy_loss.loss_mode=dro"], "'dro' cannot carry votes"),
    (["actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"], "'geo_mean' cannot carry votes"),
    (["algorithm.use_kl_in_reward=True"], "algorithm.use_kl_in_reward: True"),
    (["actor_rollout_ref.actor.use_kl_loss=True"], "actor.use_kl_loss: True"),
    (["actor_rollout_ref.actor.entropy_coeff=0.01"], "actor.entropy_coeff: 0.01"),
    (["~algorithm.mgrpo"], "algorithm.mgrpo: missing"),
)


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_settings_that_cannot_be_honoured_are_refused(overrides: list[str], message: str) -> None:
    """By verl's own validate_config, which main_ppo calls before anything starts."""
    rows = ["data.train_batch_size=256", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2"]
    rows += ["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2", "actor_rollout_ref.rollout.name=hf"]
    verl_config.validate_config(mgrpo_config(*rows), use_reference_policy=False, use_critic=False)
    with pytest.raises(ConfigError, match=message) as found:
        verl_config.validate_config(
            mgrpo_config(*rows, *overrides), use_reference_policy=False, use_critic=False
        )
    assert "\n" not in str(found.value)


def test_unweighted_terms_can_be_accepted() -> None:
    accepted = ["actor_rollout_ref.actor.use_kl_loss=True", "+algorithm.mgrpo.unweighted_terms=True"]
    adapter.check(mgrpo_config(*accepted))
    adapter.check(compose_config("actor_rollout_ref.actor.use_kl_loss=True"))
