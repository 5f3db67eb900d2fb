"""The estimator `mgrpo` inside verl 0.9.1's own compute_advantage: votes folded into advantages, groups by role."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict.tensorclass import NonTensorStack
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1 import trainer_base
from verl_kit import Team, batch_of, compose_config, make_team, mgrpo_config, padded

from mgrpo.errors import ConfigError
from mgrpo.integrations import verl as adapter

FOLDS = {
    "token-mean": "token-mean",
    "seq-mean-token-mean": "sequence-mean",
    "seq-mean-token-sum": "sequence-mean",
}


def estimate(team: Team, config: Any, uids: np.ndarray | None = None) -> torch.Tensor:
    """(B, S) through verl's function for trainers that name rows themselves."""
    data = compute_advantage(batch_of(team, uids), "mgrpo", config=config)
    assert data.batch["returns"] is data.batch["advantages"]
    return data.batch["advantages"]


@pytest.mark.parametrize("mode", FOLDS)
def test_advantages_are_those_of_assign(mode: str) -> None:
    """verl's dispatch hands the rows to mgrpo.assign, folded by what verl divides by."""
    for seed in range(5):
        team = make_team(seed)
        config = mgrpo_config(f"actor_rollout_ref.actor.loss_agg_mode={mode}").algorithm
        expected = torch.from_numpy(team.assign(fold=FOLDS[mode]).advantage).float()
        assert (expected == 0).any() and (expected != 0).any()
        torch.testing.assert_close(estimate(team, config), expected[:, None] * team.mask, rtol=1e-6, atol=0)


def test_token_sum_has_no_denominator() -> None:
    team = make_team(1)
    config = mgrpo_config("actor_rollout_ref.actor.loss_agg_mode=token-sum").algorithm
    assigned = team.assign()
    expected = torch.from_numpy(assigned.advantage * assigned.weight).float()
    torch.testing.assert_close(estimate(team, config), expected[:, None] * team.mask)


def test_settings_reach_assign() -> None:
    """Estimator, draw, deviation and eps of algorithm.mgrpo; verl's own switch for the deviation."""
    team = make_team(2)
    for overrides, arguments in (
        (["+algorithm.mgrpo.estimator=rloo"], {"estimator": "rloo"}),
        (["algorithm.norm_adv_by_std_in_grpo=False"], {"estimator": "dr_grpo"}),
        (["+algorithm.mgrpo.unbiased=True", "+algorithm.mgrpo.eps=0.5"], {"unbiased": True, "eps": 0.5}),
        (["+algorithm.mgrpo.mode=none"], {"mode": "none"}),
    ):
        expected = torch.from_numpy(team.assign(fold="token-mean", **arguments).advantage).float()
        got = estimate(team, mgrpo_config(*overrides).algorithm)
        torch.testing.assert_close(got, expected[:, None] * team.mask)
        assert not torch.allclose(got, estimate(team, mgrpo_config().algorithm))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_padding_is_no_trajectory(mode: str) -> None:
    """Rows that fill the step up to a multiple of the mini-batch are in no group; verl divides by their number too."""
    team = make_team(3)
    config = mgrpo_config(f"actor_rollout_ref.actor.loss_agg_mode={mode}").algorithm
    alone = estimate(team, config)
    more, uids = padded(team, 5)
    rows = len(team.mask)
    scale = (rows + 5) / rows if mode == "seq-mean-token-mean" else 1.0
    got = estimate(more, config, uids)
    assert not got[rows:].any()
    torch.testing.assert_close(got[:rows], alone * scale)


def test_a_group_of_one_has_advantage_zero() -> None:
    """verl's own grpo leaves its raw reward there."""
    data = DataProto.from_dict(
        {"token_level_rewards": torch.ones(1, 3), "response_mask": torch.ones(1, 3, dtype=torch.int64)},
        non_tensors={"uid": np.array([adapter.row_name("q", "main", 0, 0)], dtype=object)},
    )
    assert not compute_advantage(data, "mgrpo", config=mgrpo_config().algorithm).batch["advantages"].any()
    assert compute_advantage(data, "grpo", config=mgrpo_config().algorithm).batch["advantages"].any()


def test_uids_without_a_role_are_refused() -> None:
    """The message says what to write; a uid that happens to have slashes is none of ours."""
    team = make_team(4)
    for wrong in ("0b0c6f0e-1f5c-4f43-95a4-7b5d0a6a6a6a", "a/b/0/1", "mgrpo/q/main/0/x", "mgrpo/q/main/0"):
        uids = team.uids
        uids[2] = wrong
        with pytest.raises(ConfigError, match="row_name"):
            estimate(team, mgrpo_config().algorithm, uids)
    with pytest.raises(ConfigError, match="uid: missing"):
        adapter.advantages(team.token_rewards, team.mask, config=mgrpo_config().algorithm)


def test_row_names_come_back() -> None:
    """A query may be anything, also with slashes; a role may not have one."""
    assert adapter._parts(adapter.row_name("a/b/c", "sub", 3, 14)) == ("a/b/c", "sub", 3, 14)
    assert adapter._parts(adapter.row_name("", "main", 0, 0)) == ("", "main", 0, 0)
    for wrong in ({"role": "a/b"}, {"role": ""}, {"rollout": -1}, {"invocation": -2}):
        with pytest.raises(ValueError, match=repr(next(iter(wrong.values())))):
            adapter.row_name(**{"query": "q", "role": "main", "rollout": 0, "invocation": 0} | wrong)


def test_wrong_groups_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Duplicated rows, missing invocations, counts that differ; without group_size the last is logged."""
    team = make_team(5)
    config = mgrpo_config().algorithm
    twice = replace(team, rollout=[0] * len(team.rollout))
    with pytest.raises(ValueError, match="stands in row"):
        estimate(twice, config)
    at = next(i for i, role in enumerate(team.role) if role == "main")
    moved = replace(team, query=[*team.query[:at], "alone", *team.query[at + 1 :]])
    with pytest.raises(ValueError, match="expected group_size, 4"):
        estimate(moved, mgrpo_config("+algorithm.mgrpo.group_size=4").algorithm)
    estimate(moved, config)
    assert "of 4 queries have fewer than 4 rollouts" in caplog.text


def test_settings_are_refused_by_name() -> None:
    for overrides, message in (
        (["~algorithm.mgrpo"], r"\+algorithm.mgrpo.d_max=4"),
        (["+algorithm.mgrpo.dmax=3"], "algorithm.mgrpo.dmax: unknown"),
        (["+algorithm.mgrpo.estimator=gae"], "'gae' is not one of"),
        (["+algorithm.mgrpo.mode=all"], "'all'"),
        (["algorithm.norm_adv_by_std_in_grpo=False", "+algorithm.mgrpo.estimator=grpo"], "contradicts"),
    ):
        with pytest.raises(ConfigError, match=message):
            estimate(make_team(6), mgrpo_config(*overrides).algorithm)
    with pytest.raises(ConfigError, match=r"algorithm\.mgrpo: missing"):
        estimate(make_team(6), AlgoConfig(adv_estimator="mgrpo"))


def test_a_config_that_stands_alone_says_its_mode() -> None:
    """A trainer of one's own may hand over the algorithm's settings without the actor's."""
    team = make_team(7)
    whole = mgrpo_config("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean").algorithm
    alone = OmegaConf.create({"mgrpo": {"d_max": 2, "seed": 7, "loss_agg_mode": "seq-mean-token-mean"}})
    assert torch.equal(estimate(team, alone), estimate(team, whole))


# verl's v1 trainers: keys {uid}_{session}_{output}, and what the agent loop wrote into extra_fields


def keys_of(team: Team) -> list[str]:
    """Keys of the rows, with outputs numbered over all roles of a session as an agent loop returns them."""
    seen: dict[tuple[str, int], int] = {}
    keys = []
    for query, rollout in zip(team.query, team.rollout, strict=True):
        output = seen.get((query, rollout), 0)
        seen[query, rollout] = output + 1
        keys.append(f"{query}_{rollout}_{output}")
    return keys


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A transfer queue that holds extra_fields by key."""
    held: dict[str, Any] = {}

    def kv_batch_get(keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
        assert partition_id == "train" and select_fields == ["extra_fields"]
        return {"extra_fields": NonTensorStack(*[held[key] for key in keys])}

    monkeypatch.setattr(transfer_queue, "kv_batch_get", kv_batch_get)
    return held


def v1(team: Team, estimator: str = "mgrpo", uids: np.ndarray | None = None) -> torch.Tensor:
    """(B, S) through the function that verl's v1 trainer calls, under the name it calls it by."""
    keys = keys_of(team)
    data = batch_of(team, np.array([key.rsplit("_", 2)[0] for key in keys], dtype=object))
    done = trainer_base.compute_advantage_for_multi_trajectories(
        data, batch_keys=keys, adv_estimator=estimator, num_repeat=4, config=mgrpo_config().algorithm
    )
    return done.batch["advantages"]


def test_v1_takes_roles_from_the_agent_loop(stored: dict[str, Any]) -> None:
    """Role and invocation from extra_fields, query and rollout from the key: as the rows named one by one."""
    team = make_team(8)
    for at, key in enumerate(keys_of(team)):
        stored[key] = {"mgrpo": adapter.row(team.role[at], team.invocation[at]), "reward_extra_info": {}}
    assert torch.equal(v1(team), estimate(team, mgrpo_config().algorithm))


def test_v1_takes_rewards_of_the_rows(stored: dict[str, Any]) -> None:
    """verl writes the session's reward over all its outputs; a row's own stands in extra_fields."""
    team = make_team(9)
    for at, key in enumerate(keys_of(team)):
        stored[key] = {
            "mgrpo": adapter.row(team.role[at], team.invocation[at], reward=float(team.reward[at]))
        }
    session = {place: float(n) for n, place in enumerate(zip(team.query, team.rollout, strict=True))}
    shared = [session[place] for place in zip(team.query, team.rollout, strict=True)]
    got = v1(replace(team, reward=torch.tensor(shared)))
    torch.testing.assert_close(got, estimate(team, mgrpo_config().algorithm))


def test_v1_refuses_outputs_without_a_role(stored: dict[str, Any]) -> None:
    team = make_team(10)
    stored |= {key: {} for key in keys_of(team)}
    with pytest.raises(ConfigError, match=r"output 0 of session \d of uid 'q\d/x' names no role.*row\(role"):
        v1(team)


def test_v1_leaves_other_estimators_alone(stored: dict[str, Any]) -> None:
    """verl's own grpo asks the transfer queue for nothing and sees its own uids."""
    team = make_team(11)
    assert v1(team, "grpo").any()


def test_configs_without_mgrpo_pass() -> None:
    adapter.check(compose_config())
