"""group_advantage: formulas, exact zeros, order independence to the bit, duplicates as weights."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from mgrpo import group_advantage
from mgrpo.config.loss import Estimator

ESTIMATORS: tuple[str, ...] = get_args(Estimator)
BACKENDS = ("reference", "cpu")


def draw(seed: int, n: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, scattered group ids (negative ones among them) and weights, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-3, groups - 3, (n,), generator=g, dtype=torch.int32)
    return torch.randn(n, generator=g), ids, torch.randint(0, 4, (n,), generator=g) / 4.0


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_formula_group_by_group(estimator: str, impl: str) -> None:
    """Plain loops over groups in float64 give the same numbers, with and without weights."""
    rewards, ids, weights = draw(0, 300, 40)
    for w in (None, weights):
        weight = torch.ones(300) if w is None else w
        expected = torch.zeros(300, dtype=torch.float64)
        r, v = rewards.double(), weight.double()
        whole = (v * (r - (v * r).sum() / v.sum()).square()).sum() / v.sum()
        for g in ids.unique():
            rows = ((ids == g) & (weight > 0)).nonzero().squeeze(1)
            if rows.numel() < 2:
                continue
            mean = (v[rows] * r[rows]).sum() / v[rows].sum()
            var = (v[rows] * (r[rows] - mean).square()).sum() / v[rows].sum()
            for i in rows.tolist():
                others = [j for j in rows.tolist() if j != i]
                baseline = (v[others] * r[others]).sum() / v[others].sum()
                expected[i] = {
                    "grpo": (r[i] - mean) / (var.sqrt() + 1e-6),
                    "dr_grpo": r[i] - mean,
                    "rloo": r[i] - baseline,
                    "batch": (r[i] - mean) / (whole.sqrt() + 1e-6),
                }[estimator]
        got = group_advantage(rewards, ids, w, estimator=estimator, impl=impl)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@limits(max_examples=60, deadline=None)
@given(st.data())
def test_permuting_rows_permutes_the_result_bit_for_bit(data: st.DataObject) -> None:
    """For any rewards (huge spreads too), groups and weights, on the C++ backend; advantages of a group sum to 0."""
    n = data.draw(st.integers(1, 40))
    number = st.floats(-1e6, 1e6, width=32)
    rewards = torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n)))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=torch.int32)
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.125, 0.5, 1.0]), min_size=n, max_size=n)))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    for estimator in ESTIMATORS:
        for w in (None, weights):
            here = group_advantage(rewards, ids, w, estimator=estimator, impl="cpu")
            there = group_advantage(
                rewards[order], ids[order], None if w is None else w[order], estimator=estimator, impl="cpu"
            )
            assert torch.equal(here[order], there)
    centred = group_advantage(rewards, ids, weights, impl="cpu").double() * weights
    assert centred.new_zeros(6).index_add(0, ids.long(), centred).abs().max() < 1e-4


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_without_a_signal_are_exactly_zero(estimator: str, impl: str) -> None:
    """A group of one, a group of equal rewards (0.1 has no exact mean), a group with one weight above 0; none disturbs
    others."""
    rewards = torch.tensor([0.3, *[0.1] * 7, 1.0, 0.0, 5.0, 9.0])
    ids = torch.tensor([5, *[1] * 7, 2, 2, 8, 8], dtype=torch.int32)
    weights = torch.tensor([1.0] * 10 + [1.0, 0.0])
    a = group_advantage(rewards, ids, weights, estimator=estimator, impl=impl)
    assert torch.equal(a[:8], torch.zeros(8)) and torch.equal(a[10:], torch.zeros(2))
    assert a[8] > 0 > a[9]


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_weight_of_m_is_m_copies(impl: str) -> None:
    """Statistics count multiplicities (not rloo, which leaves the whole trajectory out)."""
    rewards, ids = torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3, dtype=torch.int32)
    copies = torch.tensor([1, 2, 5])
    for estimator in ("grpo", "dr_grpo", "batch"):
        once = group_advantage(rewards, ids, copies / 8.0, estimator=estimator, impl=impl)
        many = group_advantage(
            rewards.repeat_interleave(copies),
            torch.zeros(8, dtype=torch.int32),
            estimator=estimator,
            impl=impl,
        )
        torch.testing.assert_close(once, many[[0, 1, 3]], rtol=1e-6, atol=0)


def test_the_cpp_result_is_the_references_for_close_rewards_and_far_ids() -> None:
    """A spread of some ulps on a large offset, ids at both ends of int32, an outlier in a large group."""
    offset = 8 * (torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0)) - 1000.0)
    rewards = torch.cat([1000.0 + offset * torch.arange(6), torch.zeros(5000), torch.ones(1)])
    ids = torch.tensor([2**31 - 1] * 6 + [-(2**31)] * 5001, dtype=torch.int32)
    for order in (torch.arange(5007), torch.randperm(5007, generator=torch.Generator().manual_seed(1))):
        got = group_advantage(rewards[order], ids[order], impl="cpu")
        want = group_advantage(rewards[order], ids[order], impl="reference")
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("estimator", ["grpo", "batch"])
def test_unbiased_is_the_sample_deviation(estimator: str, impl: str) -> None:
    """Plain loops in float64: sum w - sum w^2 / sum w in place of sum w, groups in runs and scattered, rewards that
    cancel in the raw moments among them; without weights torch.std."""
    rewards, ids, weights = draw(4, 300, 40)
    rewards[ids == 3] = 1000.0 + torch.arange(int((ids == 3).sum())) / 128
    for order in (torch.arange(300), torch.argsort(ids, stable=True)):
        r, i = rewards[order], ids[order]
        for w in (None, weights[order]):
            weight = torch.ones(300, dtype=torch.float64) if w is None else w.double()

            def deviation(rows: torch.Tensor, r: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                r, v = r.double()[rows], v[rows]
                mean = (v * r).sum() / v.sum()
                return ((v * (r - mean).square()).sum() / (v.sum() - v.square().sum() / v.sum())).sqrt()

            expected = torch.zeros(300, dtype=torch.float64)
            every = weight > 0
            for g in i.unique():
                rows = (i == g) & every
                if int(rows.sum()) < 2:
                    continue
                std = deviation(rows if estimator == "grpo" else every, r, weight)
                if w is None:
                    torch.testing.assert_close(std, r.double()[rows if estimator == "grpo" else every].std())
                mean = (weight * r.double())[rows].sum() / weight[rows].sum()
                expected[rows] = (r.double()[rows] - mean) / (std + 1e-6)
            got = group_advantage(r, i, w, estimator=estimator, unbiased=True, impl=impl)
            torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("estimator", ["grpo", "batch"])
def test_unbiased_at_the_rim(estimator: str, impl: str) -> None:
    """A group of one and one of equal rewards have 0; a weight beside which the others vanish makes a group of one; the
    unit of the weights does not matter; the order of rows changes no bit."""
    rewards = torch.tensor([0.3, 0.1, 0.1, 1.0, 0.0, 0.5, 5.0, 9.0])
    ids = torch.tensor([5, 1, 1, 2, 2, 2, 8, 8], dtype=torch.int32)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.25, 0.25, 1.0, 1e-20])

    def made(w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return group_advantage(
            rewards[rows], ids[rows], w[rows], estimator=estimator, unbiased=True, impl=impl
        )

    here = torch.arange(8)
    a = made(weights, here)
    assert torch.equal(a[:3], torch.zeros(3)) and a[3] > 0 > a[4] and bool(a.isfinite().all())
    assert float(a[6]) == 0.0 and (estimator == "batch" or float(a[7]) == 0.0)
    torch.testing.assert_close(made(weights * 3.0, here), a, rtol=1e-6, atol=1e-7)
    order = torch.tensor([7, 3, 0, 5, 2, 6, 1, 4])
    assert torch.equal(made(weights, order), a[order])


@pytest.mark.parametrize("impl", BACKENDS)
def test_group_ids_may_be_int64(impl: str) -> None:
    """The same bits as int32, also with numbers that no int32 holds and that agree in their lower halves."""
    rewards, ids, weights = draw(7, 60, 8)
    want = group_advantage(rewards, ids, weights, impl=impl)
    for wide in (ids.long(), ids.long() * 2**32, ids.long() * 2**40 + 5):
        assert torch.equal(group_advantage(rewards, wide, weights, impl=impl), want)
    empty = torch.zeros(0, dtype=torch.int64)
    assert group_advantage(rewards[:0], empty, impl=impl).shape == (0,)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("rewards", {"rewards": torch.tensor([1.0, float("nan")])}),
        ("rewards", {"rewards": torch.tensor([1, 2])}),
        ("group_id", {"group_id": torch.zeros(3, dtype=torch.int32)}),
        ("group_id", {"group_id": torch.zeros(2)}),
        ("weight", {"weight": torch.tensor([1.0, -1.0])}),
        ("weight", {"weight": torch.ones(3)}),
        ("estimator", {"estimator": "ppo"}),
        ("eps", {"eps": -1.0}),
        ("unbiased", {"unbiased": True, "estimator": "rloo"}),
        ("unbiased", {"unbiased": True, "estimator": "dr_grpo"}),
    ],
)
def test_bad_input_names_the_argument(argument: str, call: dict[str, object]) -> None:
    """ValueError or TypeError whose message begins with the argument's name."""
    whole = {"rewards": torch.tensor([1.0, 2.0]), "group_id": torch.zeros(2, dtype=torch.int32)} | call
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        group_advantage(**whole)
