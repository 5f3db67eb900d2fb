"""mgrpo.assign: a run's own numbers, votes folded into advantages, and every wrong group refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

import mgrpo
from mgrpo.alignment import align
from mgrpo.config import load_config
from mgrpo.config.loss import TERM_SETTINGS
from mgrpo.losses.base import TermInputs
from mgrpo.losses.registry import find_loss
from mgrpo.pipeline.batch import BatchBuilder
from tests.algorithm_kit import algorithm, group
from tests.runs import RELAY
from tests.test_batch import Tokens, claimed

KINDS = {"grpo": "mgrpo", "dr_grpo": "dr_grpo", "rloo": "rloo", "batch": "batch"}
MODES = ("weights", "duplicate", "expected", "none")
REWARDS = (0.0, 0.1, 0.35, 0.6, 1.0)


def team(seed: int, queries: int = 5, k: int = 6) -> dict[str, Any]:
    """Columns of role "sub": Poisson d_k, so some rollouts have none; coarse rewards; one group without variation."""
    r = np.random.default_rng(seed)
    rows = [
        (f"{q}/0", rollout, i, float(r.choice(REWARDS)) if q else 0.1)
        for q in range(queries)
        for rollout in range(k)
        for i in range(int(r.poisson(2)))
    ]
    query, rollout, invocation, reward = (list(x) for x in zip(*rows, strict=True))
    tokens = r.integers(1, 9, len(rows)).tolist()
    return {"query": query, "role": "sub", "rollout": rollout, "invocation": invocation, "reward": reward,
            "tokens": tokens}  # fmt: skip


def assign(columns: dict[str, Any], **settings: Any) -> mgrpo.Assigned:
    return mgrpo.assign(**{"d_max": 3, "seed": 7, "step": 11, **columns, **settings})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", KINDS)
def test_the_numbers_are_the_algorithms_bit_for_bit(estimator: str, mode: Any) -> None:
    """On random teams: the weights of align(), and what a run's algorithm gives groups with these weights."""
    for seed in range(10):
        rows = team(seed)
        got = assign(rows, estimator=estimator, mode=mode)
        groups, weights = [], []
        for query in dict.fromkeys(rows["query"]):
            here = [n for n, q in enumerate(rows["query"]) if q == query]
            counts = np.bincount([rows["rollout"][n] for n in here], minlength=6).tolist()
            a = align(counts, d_max=3, seed=7, step=11, query=query, mode=mode)
            places = zip(a.rollout.tolist(), a.invocation.tolist(), strict=True)
            weight = dict(zip(places, a.weight.tolist(), strict=True))
            weights += [weight.get((rows["rollout"][n], rows["invocation"][n]), 0.0) for n in here]
            calls = [(rows["rollout"][n], rows["reward"][n], weights[n]) for n in here]
            groups.append(group(query, 6, calls))
        wanted = [a for row in algorithm(KINDS[estimator]).advantages(groups) for a in row]
        assert got.weight.tolist() == weights
        assert got.advantage.tolist() == wanted
        assert got.kept.tolist() == [w > 0 for w in weights]
        assert got.denominator == pytest.approx(sum(weights), rel=1e-15)


def test_the_numbers_are_those_of_a_runs_batches() -> None:
    """What the batcher trains on, of the same trajectories under the same seed, step and names."""
    config = load_config(
        RELAY,
        [
            "trainer.questions=3",
            "trainer.minibatches=1",
            "agents.left.d_max=2",
            "agents.left.loss.kl_coef=0.1",
            "trainer.max_lag=7",
        ],
    )
    groups = [
        claimed("0/0", 0, {0: [0.0, 1.0, 0.5], 1: [1.0], 2: []}, failed=3),
        claimed("0/1", 1, {0: [0.5], 2: [0.5, 0.25, 0.0, 1.0], 3: [0.5, 0.75]}, failed=1),
        claimed("0/2", 2, {0: [], 1: [], 2: []}, failed=3),
    ]
    for step in range(8):
        batch = BatchBuilder(config, "left", Tokens(), ranks=1).build(step, groups)
        members = batch.members
        got = mgrpo.assign(
            [groups[m.group].query for m in members],
            "left",
            [m.invocation.rollout for m in members],
            [m.invocation.invocation for m in members],
            [m.reward for m in members],
            tokens=[int(m.trajectory.loss_mask.sum()) for m in members],
            d_max={"left": 2},
            seed=config.seed,
            step=step,
        )
        (plan,) = batch.plans
        trained = plan.rows.traj_id
        assert sorted(trained.tolist()) == np.flatnonzero(got.kept).tolist()
        assert (got.weight[trained] == plan.rows.weight).all()
        assert (got.advantage[trained].astype(np.float32) == plan.rows.advantage).all()
        assert (got.denominator, got.weighted_tokens) == (plan.denominator, plan.weighted_tokens)


def test_order_and_roles() -> None:
    """Rows may come in any order, and roles together: each has its own groups, draw and deviation. Numbers name a
    query as their text does, and columns may be arrays."""
    sub, other = team(1), team(2)
    main = {"query": [q for q in dict.fromkeys(sub["query"]) for _ in range(6)], "rollout": [*range(6)] * 5,
            "invocation": [0] * 30, "tokens": [3] * 30, "reward": [n % 3 / 2 for n in range(30)]}  # fmt: skip
    parts = {"sub": sub, "other": other, "main": main}
    alone = {
        role: assign({**part, "role": role}, d_max={"sub": 3, "other": 2}, estimator="batch", group_size=None)
        for role, part in parts.items()
    }
    both = {
        name: [x for p in parts.values() for x in p[name]]
        for name in ("query", "rollout", "invocation", "reward", "tokens")
    }
    both["role"] = [role for role, part in parts.items() for _ in part["query"]]
    got = assign(both, d_max={"sub": 3, "other": 2}, estimator="batch")
    assert got.advantage.tolist() == [x for a in alone.values() for x in a.advantage]
    assert got.weight[-30:].tolist() == [1.0] * 30
    order = np.random.default_rng(0).permutation(len(both["query"]))
    mixed = {name: np.array(column)[order] for name, column in both.items()}
    again = assign(mixed, d_max={"sub": 3, "other": 2})
    plain = assign(both, d_max={"sub": 3, "other": 2})
    assert (again.advantage == plain.advantage[order]).all() and (again.weight == plain.weight[order]).all()
    numbers = {**sub, "query": [int(q[0]) for q in sub["query"]]}
    text = {**sub, "query": [q[0] for q in sub["query"]]}
    for column in (numbers, {**numbers, "query": np.array(numbers["query"])}):
        assert (assign(column).advantage == assign(text).advantage).all()


def test_a_step_without_rows_and_rollouts_without_calls() -> None:
    """Nothing to train on is no error: the denominator is 0; K' counts the rollouts that have a row."""
    empty: list[Any] = []
    for fold in (None, "sequence-mean", "token-mean"):
        got = mgrpo.assign(
            empty, "sub", empty, empty, empty, tokens=empty, d_max=4, seed=0, step=0, fold=fold
        )
        assert (len(got.advantage), len(got.weight), len(got.kept)) == (0, 0, 0)
        assert (got.denominator, got.weighted_tokens) == (0.0, 0.0)
    got = mgrpo.assign(
        ["q"] * 3, "sub", [1, 5, 5], [0, 0, 1], [1.0, 0.0, 0.5], d_max=4, seed=0, step=0, group_size=8
    )
    assert got.denominator == 2.0 and np.isnan(got.weighted_tokens)


@pytest.mark.parametrize("estimator", ["grpo", "batch"])
def test_unbiased_divides_by_the_sample_deviation(estimator: str) -> None:
    """With one row a rollout it is torch.std, what TRL, verl and slime divide by; a group of one has 0."""
    r = np.random.default_rng(5)
    reward = r.choice(REWARDS, 16)
    columns = {"query": ["a"] * 8 + ["b"] * 8 + ["c"], "role": "main", "rollout": [*range(8), *range(8), 0],
               "invocation": [0] * 17, "reward": [*reward, 4.0]}  # fmt: skip
    got = assign(columns, unbiased=True, eps=1e-4, estimator=estimator).advantage
    rewards = torch.tensor(reward).view(2, 8)
    whole = torch.tensor([*reward, 4.0]).std()
    std = rewards.std(1, keepdim=True) if estimator == "grpo" else whole
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)
    np.testing.assert_allclose(got[:16], wanted.flatten().numpy(), rtol=1e-12, atol=1e-13)
    assert got[16] == 0.0


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "batch"])
def test_the_op_gives_the_same(estimator: str) -> None:
    """mgrpo.group_advantage of the kept rows in float64, up to its sums' rounding, with either deviation."""
    for seed, unbiased in ((3, False), (4, True), (5, True)):
        if unbiased and estimator in ("dr_grpo", "rloo"):
            continue
        rows = team(seed)
        got = assign(rows, estimator=estimator, unbiased=unbiased)
        ids = torch.tensor([int(q[0]) for q in rows["query"]])
        kept, weight = got.kept, torch.from_numpy(got.weight)
        rewards = torch.tensor(rows["reward"], dtype=torch.float64)
        op = mgrpo.group_advantage(rewards, ids, weight, estimator=estimator, unbiased=unbiased)
        np.testing.assert_allclose(got.advantage, op.numpy(), rtol=1e-12, atol=1e-14)
        assert not got.advantage[~kept].any()


def test_the_page_of_the_alignment_runs() -> None:
    """docs/alignment.md's example, as it stands."""
    page = Path(__file__).parent.parent / "docs" / "alignment.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)
    assert names["assigned"].kept.all()


@limits(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(TERM_SETTINGS)), st.sampled_from(MODES), st.booleans())
def test_folded_advantages_carry_the_votes_exactly(seed: int, kind: str, mode: Any, delta: bool) -> None:
    """The host's mean over all rows (of sequences, or of tokens) of the term on folded advantages is mgrpo's weighted
    loss, for every built-in type."""
    rows = team(seed, queries=3)
    config: dict[str, Any] = {"type": kind}
    if kind == "dr_grpo":
        config["max_completion_length"] = 16
    if delta and "delta" in TERM_SETTINGS[kind]:
        config["delta"] = 1.5
    loss = find_loss(mgrpo.GrpoLossConfig(**config))
    plain = assign(rows, mode=mode)
    n, tokens = len(rows["tokens"]), np.array(rows["tokens"])
    seq = torch.from_numpy(np.repeat(np.arange(n), tokens))
    g = torch.Generator().manual_seed(seed)
    logp, old = (-torch.rand(int(tokens.sum()), generator=g, dtype=torch.float64) for _ in range(2))
    drift = logp - old
    if loss.has_sequence_ratio:
        drift = (torch.zeros(n).double().index_add(0, seq, drift) / torch.from_numpy(tokens))[seq]

    def sums(advantage: Any) -> np.ndarray[Any, Any]:
        """(n,) sums of each row's terms."""
        a = torch.from_numpy(advantage)[seq]
        inputs = TermInputs(logp, old, drift.exp(), a, None, torch.zeros_like(logp), seq, n)
        return torch.zeros(n).double().index_add(0, seq, loss.term(inputs)).numpy()

    if loss.sequence_mean:
        wanted = (plain.weight * sums(plain.advantage) / tokens).sum() / plain.denominator
        folded = assign(rows, mode=mode, fold="sequence-mean")
        host = (sums(folded.advantage) / tokens).mean()
    elif kind == "dr_grpo":
        wanted = (plain.weight * sums(plain.advantage)).sum() / (plain.denominator * 16)
        folded = assign(rows, mode=mode, fold="sequence-mean")
        host = sums(folded.advantage).sum() / (n * 16)
    else:
        wanted = (plain.weight * sums(plain.advantage)).sum() / plain.weighted_tokens
        folded = assign(rows, mode=mode, fold="token-mean")
        host = sums(folded.advantage).sum() / tokens.sum()
    scale = np.abs(plain.weight * sums(np.abs(plain.advantage))).sum() / plain.denominator + 1e-300
    assert abs(host - wanted) <= 1e-12 * scale
    assert (folded.weight == plain.weight).all() and folded.denominator == plain.denominator


GOOD: dict[str, Any] = {
    "query": ["q", "q", "q", "r"], "role": ["main", "main", "sub", "main"], "rollout": [0, 1, 1, 0],
    "invocation": [0, 0, 0, 0], "reward": [1.0, 0.0, 0.5, 1.0], "tokens": [3, 4, 5, 6], "d_max": {"sub": 2},
}  # fmt: skip
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reward": [1.0]}, r"^reward: 1 rows, where query has 4"),
    ({"rollout": [0, 1]}, r"^rollout: 2 rows, where query has 4"),
    ({"tokens": [1, 2, 3]}, r"^tokens: 3 rows, where query has 4"),
    ({"role": ["main", "main", "", "main"]}, r"^row 2: query 'q', role '', rollout 1: the role is empty"),
    ({"role": ""}, r"^row 0: .*the role is empty"),
    ({"reward": [1.0, 0.0, float("nan"), 1.0]}, r"^row 2: query 'q', role 'sub', rollout 1: reward nan is not finite"),
    ({"reward": [1.0, 0.0, 2e38, 1.0]}, r"^row 2: .*reward 2e\+38 is not within"),
    ({"tokens": [3, -4, 5, 6]}, r"^row 1: query 'q', role 'main', rollout 1: -4 trained tokens"),
    ({"tokens": [3, 4, 0, 6], "fold": "token-mean"}, r"^row 2: .*no trained token, and fold='token-mean'"),
    ({"tokens": [3, 4, 0, 6], "fold": "sequence-mean"}, r"^row 2: .*no trained token"),
    ({"tokens": None, "fold": "token-mean"}, r"^tokens: missing"),
    ({"rollout": [0, 0, 1, 0]}, r"^row 1: query 'q', role 'main', rollout 0: invocation 0 stands in row 0 already"),
    ({"invocation": [0, 0, 1, 0]}, r"^row 2: query 'q', role 'sub', .*invocation 1 without an invocation 0"),
    ({"invocation": [0, 1, 0, 0], "rollout": [0, 0, 1, 0]}, r"^row 1: .*'main'.*invocation 1, and this role has one"),
    ({"invocation": [0, 0, -1, 0]}, r"^row 2: .*invocation -1 is below 0"),
    ({"rollout": [0, 1, -1, 0]}, r"^row 2: .*rollout -1: the rollout is below 0"),
    ({"rollout": [0, 1, 70000, 0]}, r"^row 2: .*rollout 70000: .*count from 0 in each group"),
    ({"rollout": [0, 1, 2, 0], "group_size": 2}, r"^row 2: .*rollout 2: the rollout is beyond group_size, 2"),
    ({"group_size": 2}, r"^row 3: query 'r', .*: 1 rollouts have a row of role 'main', expected group_size, 2"),
    ({"role": ["main", "main", "sub", "sub"], "group_size": 2}, r"^row 3: query 'r', role 'sub', .*: 0 rollouts have"),
    ({"d_max": {"judge": 2}}, r"^d_max: no number for role 'sub', only for 'judge'"),
    ({"d_max": {"sub": 2, "main": 3}}, r"^d_max: 3 for role 'main', which has one"),
    ({"d_max": 0}, r"d_max=0"),
    ({"mode": "best"}, r"'best'"),
    ({"estimator": "ppo"}, r"^estimator: 'ppo' is not one of grpo, "),
    ({"estimator": "rloo", "unbiased": True}, r"^unbiased: True has no effect with estimator 'rloo'"),
    ({"eps": -1.0}, r"^eps: -1.0"),
    ({"group_size": 0}, r"^group_size: 0"),
    ({"fold": "mean"}, r"^fold: 'mean' is not one of sequence-mean, token-mean"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_wrong_groups_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    """ValueError naming row, query, role, rollout and what is wrong."""
    assign(GOOD)
    with pytest.raises(ValueError, match=words):
        assign({**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollout": [0.0, 1.0, 1.0, 0.0]}, "^rollout: float64"),
        ({"invocation": [True, True, True, True]}, "^invocation: bool"),
        ({"query": [1.5, 1, 1, 1]}, "1.5"),
        ({"query": "qqqr"}, "^query: 'qqqr' is one name"),
        ({"role": ["main", "main", None, "main"]}, "^role: None in row 2 is a NoneType"),
        ({"tokens": [1.0, 2.0, 3.0, 4.0]}, "^tokens: float64"),
        ({"d_max": {"sub": 2.5}}, "float"),
    ],
)
def test_columns_of_another_type_are_refused(change: dict[str, Any], words: str) -> None:
    """TypeError, rather than rollouts that were rounded."""
    with pytest.raises(TypeError, match=words):
        assign({**GOOD, **change})
