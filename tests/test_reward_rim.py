"""Rewards at the rim: equal but for rounding, huge, tiny, not finite; the op's backends and the algorithms alike."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from mgrpo import group_advantage
from mgrpo.config.loss import Estimator
from tests.algorithm_kit import algorithm, flat, group

ESTIMATORS: tuple[str, ...] = get_args(Estimator)
BACKENDS = ("reference", "cpu", "float64", "algorithm")


def advantages(rewards: list[float], where: str, estimator: str = "grpo", eps: float = 1e-6) -> list[float]:
    """Advantages of one group, from an op's backend, from the reference in float64, or from a run's algorithm."""
    if where == "algorithm":
        kind = {"grpo": "mgrpo"}.get(estimator, estimator)
        settings = {"eps": eps} if kind in ("mgrpo", "batch") else {}
        groups = [group("q", len(rewards), [(k, reward, 1.0) for k, reward in enumerate(rewards)])]
        return flat(groups, algorithm(kind, **settings).advantages(groups))
    dtype = torch.float64 if where == "float64" else torch.float32
    ids = torch.zeros(len(rewards), dtype=torch.int32)
    out = group_advantage(
        torch.tensor(rewards, dtype=dtype),
        ids,
        estimator=estimator,
        eps=eps,
        impl="reference" if where == "float64" else where,
    )
    return [float(a) for a in out]


def sums(parts: list[float], dtype: type[np.floating]) -> list[float]:
    """The same parts added up in every order, in one precision."""
    out = []
    for order in itertools.permutations([dtype(p) for p in parts]):
        total = dtype(0)
        for part in order:
            total = dtype(total + part)
        out.append(float(total))
    return out


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_but_for_rounding_is_equal(estimator: str, where: str) -> None:
    """The parts of a reward added up in another order, in float32 or float64: advantage exactly 0."""
    assert len(set(sums([0.1, 0.1, 9.1], np.float32))) > 1 and len(set(sums([0.1, 0.2, 0.3], np.float64))) > 1
    for parts in ([0.1, 0.1, 9.1], [0.1, 0.2, 0.3], [1e3, 0.1, 0.7], [-0.1, -0.2, -0.3], [1e-5, 3e-5, 7e-6]):
        for dtype in (np.float32, np.float64):
            rewards = sums(parts, dtype)
            assert advantages(rewards, where, estimator) == [0.0] * len(rewards), (parts, dtype)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_small_differences_train(estimator: str, where: str) -> None:
    """A thousandth of 1, a tenth of 1000, a hundred-thousandth, a sum of 0: an advantage for each, of its sign."""
    for rewards in (
        [1.0, 1.001],
        [1000.1, 1000.2],
        [0.5, 0.50001],
        [0.0, 1e-4],
        [-1e-3, 1e-3],
        [-0.5002, -0.5],
    ):
        low, high = advantages(rewards, where, estimator)
        assert low < 0 < high and high == pytest.approx(-low, rel=1e-6), rewards
        if estimator in ("grpo", "batch") and rewards[1] - rewards[0] > 1e-4:
            assert high > 0.9


@pytest.mark.parametrize("where", BACKENDS)
def test_advantages_do_not_depend_on_the_scale(where: str) -> None:
    """Rewards times a power of two, eps 0: the same bits, to the ends of the range, subnormal numbers among them."""
    rewards = [0.75, 0.25, 0.0, 0.875, -0.5]
    want = advantages(rewards, where, eps=0.0)
    assert max(map(abs, want)) > 1.0
    wide = where == "float64"
    powers = [1, -1, 40, -40, 100, -100, 126, -126] + ([500, -500, 700, -700, 1022, -1060] if wide else [])
    if where == "algorithm":
        powers += [-500, -700, -1060]
    for power in powers:
        scaled = [float(np.ldexp(r, power)) for r in rewards]
        assert advantages(scaled, where, eps=0.0) == want, power
    assert advantages([2.0**-1060, 0.0], where) == pytest.approx([0.0, 0.0], abs=1e-30)  # far below eps


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_huge_rewards_are_right_or_refused(estimator: str, where: str) -> None:
    """Finite advantages for what the dtype can hold the differences of, and an error that names the reward beyond."""
    largest = 8e307 if where == "float64" else 1.6e38
    for rewards in ([largest, 0.0], [largest, -largest], [largest, -largest, -largest, -largest]):
        got = advantages(rewards, where, estimator)
        assert all(np.isfinite(got)) and got[0] > 0 > got[1]
        if estimator in ("grpo", "batch") and len(rewards) == 2:
            assert got == pytest.approx([1.0, -1.0])
    for beyond in ((1e308,) if where == "float64" else (3e38, 1e39, 1e160)) + (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"rewards?:? .*(is beyond|is not finite)"):
            advantages([0.0, beyond], where, estimator)


def test_groups_of_every_scale_side_by_side() -> None:
    """Each group has a unit of its own, weights too; the batch's deviation is the largest group's."""
    rewards = torch.tensor([1e160, 0.0, 1e-310, 0.0, 3.0, 1.0], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    for weight in (None, torch.tensor([1e300, 1e300, 1e-300, 1e-300, 2.0, 2.0], dtype=torch.float64)):
        got = group_advantage(rewards, ids, weight, eps=0.0)
        torch.testing.assert_close(got, torch.tensor([1.0, -1.0] * 3, dtype=torch.float64))
    whole = group_advantage(rewards, ids, estimator="batch", eps=0.0)
    assert bool(whole.isfinite().all()) and whole[0] > 0 > whole[1]
    assert float(whole[4]) == pytest.approx(0.0, abs=1e-150)
