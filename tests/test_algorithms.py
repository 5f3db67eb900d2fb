"""Each algorithm against its formula in plain Python; what it must give exactly; what is refused, and how."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mgrpo
from mgrpo.algorithms import open_algorithm
from mgrpo.algorithms.base import GroupRollout, RolloutGroup
from mgrpo.algorithms.registry import BUILT_IN
from mgrpo.algorithms.statistics import group_statistics
from mgrpo.config import load_config
from mgrpo.config.algorithm import ALGORITHM_TYPES
from mgrpo.errors import ConfigError
from tests.algorithm_kit import algorithm, flat, group, member, random_groups, weighted
from tests.runs import RELAY

RELATIVE = ("mgrpo", "dr_grpo", "rloo", "batch")
OPS = {"mgrpo": "grpo", "dr_grpo": "dr_grpo", "rloo": "rloo", "batch": "batch"}
EPS = 1e-6


def expected(kind: str, groups: list[RolloutGroup]) -> list[float]:
    """The formulas of the group-relative kinds, trajectory by trajectory."""
    whole = weighted([m for g in groups for m in g.members])
    out = []
    for g in groups:
        for m in g.members:
            if m.weight == 0:
                continue
            s = weighted(g.members)
            others = [o for o in g.members if o is not m and o.weight > 0]
            if s["high"] - s["low"] <= 8 * 2.0**-23 * abs(s["high"]):
                out.append(0.0)
            elif kind == "rloo":
                baseline = sum(o.weight * o.reward for o in others) / sum(o.weight for o in others)
                out.append(m.reward - baseline)
            else:
                scale = {"mgrpo": s["std"] + EPS, "dr_grpo": 1.0, "batch": whole["std"] + EPS}[kind]
                out.append((m.reward - s["mean"]) / scale)
    return out


@pytest.mark.parametrize("kind", RELATIVE)
def test_group_relative_kinds_are_their_formulas(kind: str) -> None:
    """Also with rollouts that failed or have no call, and trajectories that the draw dropped."""
    for seed in range(20):
        groups = random_groups(seed)
        got = flat(groups, algorithm(kind).advantages(groups))
        np.testing.assert_allclose(got, expected(kind, groups), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", RELATIVE)
def test_group_relative_kinds_agree_with_the_op(kind: str) -> None:
    """The op defines the same numbers; its sums are rounded otherwise."""
    groups = random_groups(3)
    rows = [(m.reward, n, m.weight) for n, g in enumerate(groups) for m in g.members if m.weight > 0]
    rewards, ids, weights = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    op = mgrpo.group_advantage(rewards, ids.int(), weights, estimator=OPS[kind], eps=EPS)
    np.testing.assert_allclose(
        flat(groups, algorithm(kind).advantages(groups)), op.numpy(), rtol=1e-12, atol=1e-14
    )


KNOWN = {
    "mgrpo": "980ec7bffaed3b3e9e87c93fd8902fbf980ec7bfaa411e3f9bcf13bf15cd13bf8fca13bf9fb3dd3f",
    "dr_grpo": "50fae4be832d583d7dd2e73e9ff449be50fae4be610b363e919b19bef29819be539619be6b65e63e",
    "rloo": "cdcc00bfb0f88a3d6666023f333363becdcc00bf8988883e6ccf4cbeedcb4cbe6ec84cbef298193f",
    "batch": "4e33cfbf279e433e3bc6d13f8abf36bf4e33cfbf13bb243fa0ff0abf41fd0abfe1fa0abfe17bd03f",
}


@pytest.mark.parametrize("kind", RELATIVE)
def test_known_advantages_keep_their_bits(kind: str) -> None:
    """They are part of what a recorded run can be replayed from, and so are mean and deviation."""
    third = 1 / 3
    groups = [
        group("a", 4, [(0, 0.1, third), (0, 0.6, 2 / 3), (1, 1.0, third), (1, 0.35, third), (1, 0.1, third),
                       (2, 0.725, 1.0)]),
        group("b", 4, [(0, 0.3, 1.0), (1, 0.30001, 1.0), (2, 0.30002, 1.0), (3, 0.9, 1.0)]),
    ]  # fmt: skip
    got = np.array(flat(groups, algorithm(kind).advantages(groups)), np.float32)
    assert got.tobytes().hex() == KNOWN[kind]
    mean, std = group_statistics(groups)
    assert [x.hex() for x in mean] == ["0x1.182d82d82d82dp-1", "0x1.cccec41dd1a22p-2"]
    assert [x.hex() for x in std] == ["0x1.267a9fdbc072ep-2", "0x1.0a09dfbabfa7fp-2"]


@pytest.mark.parametrize("kind", ["mgrpo", "dr_grpo", "batch"])
def test_a_weight_is_that_many_copies(kind: str) -> None:
    """Modes `weights` and `duplicate` of the alignment give a trajectory one advantage."""
    once = [group("q", 3, [(0, 0.2, 0.75), (0, 0.9, 0.25), (1, 0.4, 1.0)])]
    copied = [group("q", 3, [(0, 0.2, 0.25)] * 3 + [(0, 0.9, 0.25)] + [(1, 0.4, 0.25)] * 4)]
    counted, computed = (flat(g, algorithm(kind).advantages(g)) for g in (once, copied))
    np.testing.assert_allclose([counted[i] for i in (0, 0, 0, 1, 2, 2, 2, 2)], computed, rtol=1e-12)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_equal_rewards_and_lonely_trajectories_have_advantage_zero(kind: str) -> None:
    """Exactly 0, whatever rounding a mean has; the groups beside them are not disturbed."""
    ended = [GroupRollout(n, True, 0.5, 0.1 + 0.2 if n else 0.3, {"sub": 1}) for n in range(4)]
    equal = RolloutGroup("equal", 4, ended, [member(r, 0, r.reward, 1.0) for r in ended])
    alone = RolloutGroup("alone", 4, ended[:1], [member(ended[0], 0, 0.3, 1.0)])
    other = group("other", 2, [(0, 0.0, 1.0), (1, 1.0, 1.0)])
    found = algorithm(kind).advantages([equal, alone, RolloutGroup("none", 4, ended, []), other])
    for row in (*found[0], *found[1]):
        assert not np.any(row)
    assert len(found[2]) == 0
    low, high = (np.max(np.abs(row)) for row in found[3])
    assert low > 0 and high > 0


def test_a_team_reward_is_the_rollouts() -> None:
    """grpo: all trajectories of a rollout share the advantage of its main reward; rollouts without a call count in the
    statistics, failed ones do not, and the role's own rewards have no part in it."""
    seen = group("q", 5, [(0, 9.0, 1.0), (2, 8.0, 0.5), (2, 7.0, 0.5), (3, 6.0, 0.0)], failed=(4,))
    team = algorithm("grpo")
    paid = [
        member(m.rollout, m.invocation, team.reward({"expert": 1.0}, m.rollout), m.weight)
        for m in seen.members
    ]
    got = team.advantages([RolloutGroup("q", 5, seen.rollouts, paid)])[0]
    rewards = np.array([0.0, 1.0, 2.0, 3.0])  # of the rollouts that ended
    wanted = (rewards - rewards.mean()) / (rewards.std() + EPS)
    np.testing.assert_allclose(got, wanted[[0, 2, 2, 3]], rtol=1e-12)


def test_calls_are_compared_with_those_of_other_rollouts() -> None:
    """leave_one_out_call by hand: calls of rewards (1, 0 | 0.5 | 0.5, 0.5, 0.25 | none) of four rollouts, one of them
    dropped by the draw, which still counts in the baselines of others."""
    calls = [(0, 1.0, 0.5), (0, 0.0, 0.5), (1, 0.5, 1.0), (2, 0.5, 0.5), (2, 0.5, 0.5), (2, 0.25, 0.0)]
    got = algorithm("leave_one_out_call").advantages([group("q", 4, calls)])[0]
    without = [(0.5 + 0.5 + 0.5 + 0.25) / 4, (1 + 0 + 0.5 + 0.5 + 0.25) / 5, (1 + 0 + 0.5) / 3]
    assert got == pytest.approx([reward - without[k] for k, reward, _ in calls], rel=1e-15)
    alone = algorithm("leave_one_out_call").advantages([group("q", 4, [(0, 1.0, 0.5), (0, 0.0, 0.5)])])[0]
    assert alone == [0.0, 0.0]


def test_turns_with_one_observation_are_compared() -> None:
    """turn_credit by hand: two trajectories with the same prompt, of which one goes on after a tool's answer, and a
    third with another prompt."""
    ended = [GroupRollout(n, True, 0.0, 0.0, {"sub": 1}) for n in range(3)]
    members = [
        member(ended[0], 0, 1.0, 1.0, [(7, 7), (1, 2), (8,), (3,)]),
        member(ended[1], 0, 0.0, 1.0, [(7, 7), (4,)]),
        member(ended[2], 0, 0.5, 1.0, [(9,), (5, 5), (8, 8)]),
    ]
    rows = algorithm("turn_credit", eps=0.0, gamma=0.5, omega=2.0).advantages(
        [RolloutGroup("q", 3, ended, members)]
    )[0]
    base = 0.5 / np.sqrt(1 / 6)  # (R - mean) / std of the trajectories
    # The first turns of the first two share an observation: returns 0.5 and 0, normalised 1 and -1.
    wanted = [
        [0, 0, base + 2, base + 2, 0, base],
        [0, 0, -base - 2],
        [0, 0, 0, 0, 0],
    ]
    for row, want, m in zip(rows, wanted, members, strict=True):
        assert isinstance(row, np.ndarray) and row.dtype == np.float32 and len(row) == len(m.tokens)
        np.testing.assert_allclose(row, want, rtol=1e-6)


def test_turns_nobody_shares_have_the_trajectorys_credit() -> None:
    """Without a second turn of the same observation turn_credit is mgrpo on every sampled token."""
    ended = [GroupRollout(n, True, 0.0, 0.0, {"sub": 1}) for n in range(3)]
    members = [member(r, 0, float(n), 1.0, [(n,), (1, 2), (n, n), (3,)]) for n, r in enumerate(ended)]
    groups = [RolloutGroup("q", 3, ended, members)]
    want = algorithm("mgrpo").advantages(groups)[0]
    for row, number, m in zip(algorithm("turn_credit").advantages(groups)[0], want, members, strict=True):
        assert (row == np.where(m.loss_mask == 1, np.float32(number), 0)).all()


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_built_in_kind_has_a_section_and_opens_from_a_config(kind: str) -> None:
    """The registry and the config know the same names."""
    assert set(BUILT_IN) == set(ALGORITHM_TYPES)
    config = load_config(RELAY, [f"agents.left.algorithm.type={kind}"])
    assert config.agents["left"].algorithm.type == kind and config.agents["main"].algorithm.type == "mgrpo"
    assert open_algorithm(config, "left").role == "left"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('agents.left.loss.estimator="rloo"', r"agents.left: loss.estimator is unknown.*agents.<role>.algorithm"),
        ("agents.left.loss.advantage_eps=1e-4", r"loss.advantage_eps is unknown.*agents.<role>.algorithm"),
        ("agents.left.algorithm={type='rloo',eps=1e-4}", r"agents.left.algorithm.eps: unknown key"),
        ("agents.left.algorithm={type='turn_credit',gamma=1.5}", r"agents.left.algorithm.gamma: .*equal to 1, got 1.5"),
        ("agents.left.algorithm={eps=-1.0}", r"agents.left.algorithm.eps: .*got -1.0"),
        ("agents.left.algorithm={type='a:B',options={x=[nan]}}", r"algorithm.options: x.0 should be a finite number"),
    ],
)  # fmt: skip
def test_settings_that_cannot_act_are_refused_by_name(override: str, words: str) -> None:
    """Old keys with the new one, settings of another kind, values out of range."""
    with pytest.raises(ConfigError, match=words):
        load_config(RELAY, [override])


def test_a_team_reward_needs_weights_of_main_alone() -> None:
    """With grpo a sub-agent's own parts may all have weight 0, and main's may not."""
    unpaid = "reward={format=0.0,outcome=0.0,expert=0.0}"
    load_config(RELAY, [f"agents.left.{unpaid}", "agents.left.algorithm.type=grpo"])
    with pytest.raises(ConfigError, match=r"agents.left.reward has no part"):
        load_config(RELAY, [f"agents.left.{unpaid}"])
    frozen = ["agents.main.frozen=true", "agents.main.reward={gate=false,format=0.0,correct=0.0}"]
    with pytest.raises(ConfigError, match=r"agents.main.reward has no part"):
        load_config(RELAY, [*frozen, "agents.left.algorithm.type=grpo"])


class Picky(mgrpo.algorithms.Algorithm):
    """A class from outside that wants an option."""

    def __init__(self, settings: Any, role: str, weights: Any) -> None:
        super().__init__(settings, role, weights)
        if settings["scale"] <= 0:
            raise ValueError(f"scale: {settings['scale']} is not above 0")

    def advantages(self, groups: Any) -> Any:
        return [[self.settings["scale"]] for _ in groups]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{type='grppo'}", r"agents.left.algorithm.type 'grppo' is unknown, expected batch, dr_grpo, grpo, "),
        ("{type='no_such_package:A'}", r"module 'no_such_package' is not installed"),
        ("{type='tests.test_algorithms:RELAY'}", r"has no Algorithm class 'RELAY'"),
        ("{type='tests.test_algorithms:Picky'}", r"agents.left.algorithm.options: 'scale' is missing"),
        ("{type='tests.test_algorithms:Picky',options={scale=-1}}", r"algorithm.options: scale: -1 is not above 0"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_used_is_refused_before_the_run(section: str, words: str) -> None:
    """Unknown names with the known ones; missing modules; classes that are none, or do not take their options."""
    with pytest.raises(ConfigError, match=words):
        open_algorithm(load_config(RELAY, [f"agents.left.algorithm={section}"]), "left")
