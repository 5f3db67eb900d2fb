"""The draw is unbiased, reproducible and known; the four modes compute what docs/alignment.md says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo._C import multiplicities, philox4x32_10
from mgrpo.alignment import align
from mgrpo.batcher import Batcher, Plan
from tests import batcher_twin
from tests.batcher_kit import make, replay, workload

DRAWS = 100_000


def test_philox_known_answers() -> None:
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert philox4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32_10([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox4x32_10(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def p_value(observed: Counter[Any], expected: dict[Any, float]) -> float:
    """Of Pearson's chi-square; the cells are all outcomes there are."""
    assert set(observed) <= set(expected)
    x = sum((observed[cell] - n) ** 2 / n for cell, n in expected.items())
    df = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(df, torch.tensor(x / 2, dtype=torch.float64)))


def draws(d: int, d_max: int, mode: str) -> Counter[tuple[int, ...]]:
    """Multiplicities of 1e5 rollouts with d invocations each."""
    return Counter(map(tuple, multiplicities([d] * DRAWS, 3, 11, "7/1", "sub", d_max, mode)))


@pytest.mark.parametrize(("d", "d_max"), [(5, 2), (7, 1), (6, 5), (12, 3)])
@pytest.mark.parametrize("mode", ["weights", "expected"])
def test_dropped_invocations_are_a_uniform_subset(d: int, d_max: int, mode: str) -> None:
    """d_k > D_max: every subset of D_max invocations comes with the same frequency (chi-square, 1e5 draws)."""
    subsets = [tuple(int(i in s) for i in range(d)) for s in combinations(range(d), d_max)]
    assert p_value(draws(d, d_max, mode), dict.fromkeys(subsets, DRAWS / len(subsets))) > 1e-4


@pytest.mark.parametrize(("d", "d_max"), [(3, 5), (2, 7), (5, 8), (7, 9)])
def test_duplicates_are_a_uniform_subset(d: int, d_max: int) -> None:
    """d_k < D_max: everybody has floor(D_max / d_k) copies, and any subset may hold the remainder."""
    base, extra = divmod(d_max, d)
    cells = [tuple(base + (i in s) for i in range(d)) for s in combinations(range(d), extra)]
    assert p_value(draws(d, d_max, "weights"), dict.fromkeys(cells, DRAWS / len(cells))) > 1e-4


class EveryStream:
    """Stands in for the generator and takes one path through the tree of its possible answers."""

    def __init__(self, path: list[int]) -> None:
        self.path, self.taken, self.probability = path, 0, Fraction(1)
        self.widths: list[int] = []

    def bounded(self, n: int) -> int:
        answer = self.path[self.taken] if self.taken < len(self.path) else 0
        self.taken += 1
        self.widths.append(n)
        self.probability /= n
        return answer

    subset = batcher_twin.Stream.subset


def every_draw(d: int, d_max: int, mode: str) -> Iterator[tuple[Fraction, list[int]]]:
    """All outcomes of the draw with their exact probabilities."""
    path: list[int] = []
    while True:
        stream = EveryStream(path)
        copies = batcher_twin.multiplicities(stream, d, d_max, mode)  # type: ignore[arg-type]
        yield stream.probability, copies
        path = path + [0] * (len(stream.widths) - len(path))
        while path and path[-1] + 1 == stream.widths[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


def expected_weights(d: int, d_max: int, mode: str) -> list[Fraction]:
    """Exact expectation of w(k,i) over the draw, for each invocation."""
    total, unit = [Fraction(0)] * d, Fraction(1, d_max if mode == "weights" else min(d, d_max))
    for probability, copies in every_draw(d, d_max, mode):
        total = [t + probability * m * unit for t, m in zip(total, copies, strict=True)]
    return total


@pytest.mark.parametrize("d_max", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6])
def test_expected_is_the_expectation_of_the_draw(d: int, d_max: int) -> None:
    """By enumeration, in exact fractions: weights and expected give every invocation 1/d_k on average."""
    weights = expected_weights(d, d_max, "weights")
    assert weights == expected_weights(d, d_max, "expected") == [Fraction(1, d)] * d


@pytest.mark.parametrize("mode", ["weights", "duplicate", "expected", "none"])
def test_align_is_the_plan_of_one_group(mode: Any) -> None:
    """mgrpo.align and Batcher.plan draw the same from the same (seed, step, query, role)."""
    batcher = make(k=6, mode=mode, seed=5, d_max={"sub": 3})
    replay(workload(batcher, 3, queries=2, mean=3, failures=0), batcher)
    plan = batcher.plan(9)
    for g, (query, role) in enumerate(plan.groups):
        counts = [0] * 6
        for place in batcher.state_dict()["places"].reshape(-1, 4):
            if batcher.state_dict()["queries"][place[0]] == query:
                counts[place[2]] += 1
        alone = align(counts, d_max=3, seed=5, step=9, query=query, role=role, mode=mode)
        mine = plan.rows.group == g
        first = int(np.argmax(mine))
        for name in ("rollout", "invocation", "multiplicity", "weight"):
            assert (getattr(alone, name) == getattr(plan.rows, name)[mine]).all()
        depth = alone.slots.shape[1]
        assert (plan.slots[g][:, :depth] == np.where(alone.slots < 0, -1, alone.slots + first)).all()
        assert alone.n_rollouts == plan.group_rollouts[g]


def test_every_argument_of_the_draw_matters_and_nothing_else() -> None:
    """Seed, step, query, rollout and role change the draw; an int names the same query as its decimal text."""
    base: dict[str, Any] = {"d_max": 3, "seed": 1, "step": 2, "query": "12/3", "role": "sub"}
    counts = [9] * 24

    def drawn(**change: Any) -> list[int]:
        kept: list[int] = align(counts, **{**base, **change}).invocation.tolist()
        return kept

    assert drawn() == drawn() == align([*counts, 4], **base).invocation.tolist()[:72]
    others = [drawn(seed=2), drawn(seed=2**40), drawn(step=3), drawn(step=2**33), drawn(query="12/4")]
    others += [drawn(role="coder"), drawn(query="1/23")]
    assert len({tuple(x) for x in [drawn(), *others]}) == 8
    assert len(set(map(tuple, np.array(drawn()).reshape(24, 3).tolist()))) > 10  # rollouts differ
    assert drawn(query=12) == drawn(query="12")


def test_a_known_draw_stays_known() -> None:
    """The draw is part of the file format of a run: a change here breaks the replay of recorded runs."""
    a = align([0, 1, 2, 5, 3], d_max=3, seed=1, step=2, query="12/3")
    assert a.slots.tolist() == KNOWN_SLOTS
    assert a.invocation.tolist() == KNOWN_INVOCATIONS


KNOWN_SLOTS = [[-1, -1, -1], [0, 0, 0], [1, 2, 2], [3, 4, 5], [6, 7, 8]]
KNOWN_INVOCATIONS = [0, 0, 1, 0, 1, 3, 0, 1, 2]


def test_align_refuses_bad_input() -> None:
    """Each error names the value."""
    good: dict[str, Any] = {"d_max": 2, "seed": 0, "step": 0, "query": "q"}
    for counts, change, error, words in [
        ([1], {"d_max": 0}, ValueError, "d_max=0"),
        ([-1], {}, ValueError, "negative"),
        ([1], {"mode": "best"}, ValueError, "'best'"),
        ([1], {"sequence_weight": "all"}, ValueError, "'all'"),
        ([1], {"sequence_weight": "per_invocation"}, ValueError, "per_invocation"),
        ([1], {"query": 1.5}, TypeError, "1.5"),
        ([1], {"query": True}, TypeError, "True"),
    ]:
        with pytest.raises(error, match=words):
            align(counts, **{**good, **change})


# -- one gradient, whether copies are computed or counted
# ------------------------------------------------------


class Policy(torch.nn.Module):
    """A small causal network: gated running mean of embeddings, two layers, float64."""

    def __init__(self, vocab: int = 50, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(vocab, width)
        self.mix = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, vocab)
        self.double()

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Of token t given the tokens before it, (L,); the first is given nothing."""
        x = self.embed(ids)
        context = torch.cumsum(x, 0) / torch.arange(1, len(ids) + 1, dtype=x.dtype)[:, None]
        hidden = torch.tanh(self.mix(torch.cat([torch.zeros_like(x[:1]), context[:-1]])))
        return torch.log_softmax(self.head(hidden), -1).gather(1, ids[:, None])[:, 0]


def gradient(batcher: Batcher, plan: Plan, mean: str) -> torch.Tensor:
    """Of the clipped objective over everything that stands in the packed buffers of all ranks."""
    policy = Policy()
    weight = plan.rows.weight / (plan.rows.multiplicity if batcher.options["mode"] == "duplicate" else 1)
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0.0
    for rank in range(batcher.options["dp"]):
        b = plan.buffers()
        batcher.write(plan, rank, b)
        for mb in range(plan.n_mb):
            for seg in range(b["n_seg"][mb]):
                here = slice(*b["cu_seqlens"][mb, seg : seg + 2])
                mask = torch.from_numpy(b["loss_mask"][mb, here].astype(np.float64))
                old = torch.from_numpy(b["logprobs"][mb, here].astype(np.float64))
                ids = torch.from_numpy(b["ids"][mb, here] % 50).long()
                w, a = float(weight[b["seg_row"][mb, seg]]), float(b["seg_advantage"][mb, seg])
                ratio = torch.exp(policy.logprobs(ids) - old)
                objective = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask
                total = total + w * objective.sum() / (mask.sum() if mean == "seq" else 1)
                tokens += w * float(mask.sum())
    loss = -total / (plan.denominator if mean == "seq" else tokens)
    assert mean == "seq" or tokens == pytest.approx(plan.weighted_tokens, rel=1e-12)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("mean", ["seq", "token"])
@pytest.mark.parametrize("d_max", [3, 5, 8])
def test_weights_and_duplicate_give_one_gradient(mean: str, d_max: int) -> None:
    """Counting copies is computing them: relative difference <= 1e-12 in float64."""
    gradients = []
    for mode in ("weights", "duplicate"):
        batcher = make(mode=mode, d_max={"sub": d_max}, seed=4)  # type: ignore[arg-type]
        replay(workload(batcher, 8, queries=3, mean=3.0, longest=40), batcher)
        plan = batcher.plan(2)
        assert (plan.multiplicity > 1).any() and (plan.multiplicity < d_max).any()
        gradients.append(gradient(batcher, plan, mean))
    counted, computed = gradients
    assert computed.norm() > 1e-4
    assert float((counted - computed).norm() / computed.norm()) <= 1e-12
