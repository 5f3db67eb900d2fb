"""Rows that begin alike, policies that compute what they share once and policies that do not, and their gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.losses.registry import find_loss
from mgrpo.model.policy import Policy
from mgrpo.model.shared_rows import share
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, logprobs_of
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.types import Trajectory
from tests.families import family
from tests.models import VOCAB, tiny_tokenizer

CONTEXT = 512
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama, grouped heads": ("Llama", {"num_key_value_heads": 2}),
    "llama, one head of keys": ("Llama", {"num_key_value_heads": 1}),
    "qwen3, grouped heads": ("Qwen3", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3, one head of keys": ("Qwen3", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
}
"""name -> (family, its settings)."""


class ExactNorm(torch.nn.Module):
    """RMSNorm in the dtype of its input: transformers' goes through float32, whose rounding hides what is compared in
    float64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def exact_model(model: Any) -> Any:
    """The model in float64, with norms in float64 too."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, ExactNorm(child))
    return model


def shared_model(name: str, exact: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of SHAPES or FAMILIES, with weights large enough that a token depends on all before it."""
    kind, settings = SHAPES.get(name, (name, {}))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": CONTEXT}
    if kind == "Qwen3":
        sizes["head_dim"] = 4
    model = family(kind, seed, initializer_range=0.3, **{**sizes, **settings, **changes})
    return exact_model(model) if exact else model


def policies(
    name: str,
    exact: bool = False,
    tokens: int = VOCAB,
    changes: Mapping[str, Any] | None = None,
    **config: Any,
) -> tuple[Policy, Policy]:
    """(computes each row whole, computes shared prefixes once), with the same weights. changes: of the model."""
    made = []
    for once in (False, True):
        model = shared_model(name, exact, **(changes or {}))
        settings = PolicyConfig.model_validate({**config, "share_prefixes": once})
        made.append(Policy(model, tiny_tokenizer(tokens), name, settings))
    assert not made[0].shares
    return made[0], made[1]


def tree_of_tokens(
    g: np.random.Generator, depth: int, branching: int, longest: int, alphabet: int = VOCAB, most: int = 10
) -> list[list[int]]:
    """At least two rows: paths from the root of a random tree, some of which end on their way, some of which are there
    twice; one in four tries with rows of one and two tokens too. longest: tokens of a node; most: rows."""
    rows: list[list[int]] = []

    def grow(path: list[int], level: int) -> None:
        path = path + g.integers(0, alphabet, g.integers(1, longest + 1)).tolist()
        if g.random() < 0.2:  # ends here, where others go on
            rows.append(path)
        children = int(g.integers(0, branching + 1)) if level < depth else 0
        for _ in range(children):
            if len(rows) < most:
                grow(path, level + 1)
        if not children:
            rows.append(path)

    while len(rows) < 2 or max(map(len, rows)) < 3:
        grow([], 1)
    rows += [list(rows[i]) for i in g.integers(0, len(rows), g.integers(0, 3))]
    if g.random() < 0.25:
        rows += [rows[0][:1], rows[0][:2], [int(g.integers(alphabet))]]
    return [rows[i] for i in g.permutation(len(rows))]


def forest(seed: int, longest: int = 24) -> tuple[list[list[int]], int]:
    """Eleven rows that begin with one prefix of at least 8 tokens, and its length; some go on together for a while."""
    g = np.random.default_rng(seed)

    def draw(least: int, most: int) -> list[int]:
        return [int(token) for token in g.integers(0, VOCAB, g.integers(least, most))]

    prefix, branches = draw(8, longest), [draw(2, longest) for _ in range(3)]
    rows = [prefix + branches[int(g.integers(3))] + draw(1, 9) for _ in range(9)]
    return [*rows, rows[0], prefix + branches[0]], len(prefix)


def micro_batch(rows: Sequence[Sequence[int]], g: np.random.Generator, per_token: bool = False) -> MicroBatch:
    """The rows with random masks, advantages (some of them 0) and weights; log-probs are 0."""
    lengths = np.array([len(row) for row in rows])
    shape = (len(rows), max(2, int(lengths.max())))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, 1 : len(row)] = g.random(len(row) - 1) < g.choice([0.2, 0.7, 1.0])
    advantages = np.where(g.random(len(rows)) < 0.2, 0.0, g.normal(size=len(rows)))
    advantages[int(lengths.argmax())] = 0.7
    mask[int(lengths.argmax()), lengths.max() - 1] = lengths.max() > 1
    of_tokens = np.where(g.random(shape) < 0.3, 0.0, g.normal(size=shape)) + (advantages == 0.7)[:, None]
    return MicroBatch(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.zeros(shape),
        torch.from_numpy(lengths),
        torch.from_numpy(advantages).float(),
        torch.from_numpy(g.random(len(rows)) + 0.1).float(),
        token_advantages=torch.from_numpy(of_tokens).float() if per_token else None,
    )


def sampled_near(policy: Policy, rows: MicroBatch, g: np.random.Generator, off: float = 0.15) -> MicroBatch:
    """The rows as if sampled by a policy near this one: log-probs off by so much, so that some ratios are clipped, but
    none of the longest row, which keeps a gradient."""
    active, found = rows.active(), logprobs_of(policy, rows, 1.0)
    logprobs = rows.rollout_logprobs.to(found.dtype)
    noise = off * torch.from_numpy(g.normal(size=active.mask.shape)).float()
    noise[int(rows.lengths.argmax())] = 0.0
    logprobs[:, 1:][active.mask] = found + noise[active.mask]
    return replace(rows, rollout_logprobs=logprobs)


def random_rows(
    seed: int,
    policy: Policy,
    depth: int = 5,
    branching: int = 8,
    longest: int = 40,
    per_token: bool | None = None,
) -> MicroBatch:
    """A try: rows of a random tree, sampled near the policy."""
    g = np.random.default_rng(seed)
    depth, branching = int(g.integers(1, depth + 1)), int(g.integers(1, branching + 1))
    longest = longest if g.random() < 0.1 else min(longest, 6)
    alphabet = 3 if g.random() < 0.2 else VOCAB
    rows = tree_of_tokens(g, depth, branching, longest, alphabet)
    batch = micro_batch(rows, g, g.random() < 0.3 if per_token is None else per_token)
    return sampled_near(policy, batch, g)


def rows_of_trajectories(trajectories: Sequence[Trajectory], seed: int = 0) -> tuple[MicroBatch, int]:
    """Real tokens and masks, with random advantages and weights; and how many different tokens there are, which are
    numbered anew: a head over all of a vocabulary would take the time of the test."""
    g = np.random.default_rng(seed)
    known, ids = np.unique(np.concatenate([t.tokens for t in trajectories]), return_inverse=True)
    cuts = np.cumsum([len(t) for t in trajectories])[:-1]
    batch = micro_batch([row.tolist() for row in np.split(ids, cuts)], g)
    for i, t in enumerate(trajectories):
        batch.loss_mask[i, : len(t)] = torch.from_numpy(t.loss_mask != 0)
    return batch, len(known)


def pieces(rows: MicroBatch, parts: Sequence[Sequence[int]]) -> list[MicroBatch]:
    """The rows of each part in a micro-batch of their own."""
    return [
        rows.rows(torch.isin(torch.arange(len(rows.lengths)), torch.tensor(list(part)))) for part in parts
    ]


def minibatch(micro: Sequence[MicroBatch], loss: GrpoLossConfig) -> MiniBatch:
    weights = sum(float(m.weights.double().sum()) for m in micro)
    tokens = sum(float((m.weights.double() * m.loss_mask.sum(1)).sum()) for m in micro)
    return MiniBatch(micro, find_loss(loss).denominator(weights, tokens))


def gradients(
    policy: Policy,
    micro: Sequence[MicroBatch],
    loss: GrpoLossConfig,
    reference: Policy | None = None,
    recompute_old: bool = False,
    ranks: Ranks | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What reaches the optimizer of every weight that trains, clipping aside, and the step's metrics."""
    seen: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)

    def keep(*_: object) -> None:
        trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        seen.update(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
        )

    optimizer.register_step_pre_hook(keep)
    learner = Learner(policy, optimizer, loss, 1e12, reference, ranks)
    metrics = learner.train([minibatch([replace(m) for m in micro], loss)], recompute_old)
    assert seen and sum(float(x.abs().sum()) for x in seen.values()) > 0
    return seen, metrics


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest, over the weights, of a gradient's distance from the other relative to its size. A gradient below a
    thousandth of the largest one is measured by that: it has cancelled, and rounding is what is left of it."""
    assert found.keys() == expected.keys() and expected
    sizes = {name: float(x.double().norm()) for name, x in expected.items()}
    least = 1e-3 * max(sizes.values())
    return max(
        float((found[n].double() - x.double()).norm()) / max(sizes[n], least) for n, x in expected.items()
    )


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance of any number of the gradient, relative to the largest number."""
    largest = max(float(x.abs().max()) for x in expected.values())
    return max(float((found[name] - x).abs().max()) for name, x in expected.items()) / largest


def share_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that saves a single token is one."""
    monkeypatch.setattr("mgrpo.model.policy.share", functools.partial(share, min_saved=1))


def saved_tokens(rows: MicroBatch) -> int:
    """Entering tokens of the rows that another row has too: what is saved where everything is shared."""
    entering = [row[: max(n - 1, 1)].tolist() for row, n in zip(rows.ids, rows.lengths.tolist(), strict=True)]
    return sum(map(len, entering)) - len({tuple(row[:i]) for row in entering for i in range(1, len(row) + 1)})


@contextlib.contextmanager
def embedded(policy: Policy) -> Iterator[list[int]]:
    """Tokens that enter the model, padding included, of each forward pass within the block."""
    seen: list[int] = []
    hook = policy.model.get_input_embeddings().register_forward_hook(
        lambda _, args, out: seen.append(out.shape[:-1].numel())
    )
    try:
        yield seen
    finally:
        hook.remove()
