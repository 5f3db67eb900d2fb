"""Shared prefixes computed once: the gradient of every weight is that of rows computed whole, whatever the rows have in
common, and what cannot be shared is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.model.policy import Policy
from mgrpo.trainers.batch import MicroBatch
from mgrpo.trainers.torch.sft import demo_loss
from tests.loss_grid import LOSS_TYPES, settings
from tests.models import VOCAB, move_adapters, tiny_tokenizer
from tests.shared_kit import (
    SHAPES,
    distance,
    embedded,
    forest,
    furthest,
    gradients,
    micro_batch,
    pieces,
    policies,
    random_rows,
    sampled_near,
    saved_tokens,
    share_everything,
    shared_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TRIES = 500
GRPO = GrpoLossConfig()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    share_everything(monkeypatch)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", SHAPES)
def test_random_trees_in_float64(name: str) -> None:
    """500 tries over five shapes: trees of depth up to 5 that branch up to eightfold, rows that end within others,
    identical rows, rows of one token; every loss, masks, advantages and weights at random. Every weight's gradient is
    that of whole rows to 1e-10 of its size, and each shared token is computed once."""
    plain, shared = policies(name, exact=True)
    assert shared.shares, shared.why_not
    first, saved = list(SHAPES).index(name) * TRIES, 0
    for number in range(TRIES // len(SHAPES)):
        loss = settings(LOSS_TYPES[number % len(LOSS_TYPES)])
        rows = random_rows(first + number, plain, per_token=False if loss.type == "gspo" else None)
        expected, _ = gradients(plain, [rows], loss)
        found, _ = gradients(shared, [rows], loss)
        assert distance(found, expected) < 1e-10, (first + number, loss.type)
        saved += saved_tokens(rows)
    assert saved > 1000


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", SHAPES)
def test_random_trees_in_float32(name: str) -> None:
    """To 1e-5 of the largest gradient, through transformers' own norms."""
    plain, shared = policies(name)
    for seed in range(12):
        rows = random_rows(seed, plain)
        expected, _ = gradients(plain, [rows], GRPO)
        found, _ = gradients(shared, [rows], GRPO)
        assert furthest(found, expected) < 1e-5, seed


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("attention", ["rows", "sdpa", "varlen"])
def test_each_shared_token_enters_the_model_once(attention: str) -> None:
    """The tokens that are embedded are those of the tree, without padding; hidden states come in the order of rows."""
    plain, shared = policies("qwen3, grouped heads", exact=True, attention=attention)
    for seed in range(20):
        rows = random_rows(seed, plain)
        entering = int((rows.lengths - 1).clamp(min=1).sum())
        arguments = rows.ids, rows.lengths, rows.active().mask
        with torch.no_grad(), embedded(shared) as computed:
            found, expected = (p.hidden_before(*arguments) for p in (shared, plain))
        if saved_tokens(rows):
            assert computed == [entering - saved_tokens(rows)]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}),
    "last layers": ({"last_layers": 1}, {}),
    "adapters, KL to their base": ({"lora": {"rank": 2}}, {"kl_coef": 0.1}),
    "KL to a reference": ({}, {"kl_coef": 0.1, "kl_estimator": "k2"}),
    "sequence ratios, KL, recomputed": ({}, {"type": "gspo", "kl_coef": 0.1}),
    "entropy and corrections": ({}, {"entropy_coef": 0.02, "correction": "mis", "temperature": 0.7}),
    "padded rows": ({"attention": "sdpa"}, {}),
    "packed rows": ({"attention": "varlen"}, {}),
}


def reference_of(policy: Policy, share: bool) -> Policy:
    """A frozen policy of other weights, or the policy without its adapters."""
    if policy.config.lora.rank:
        return policy.base()
    model = shared_model("llama, grouped heads", exact=True, seed=3)
    reference = Policy(model, tiny_tokenizer(), "reference", PolicyConfig(share_prefixes=share))
    reference.freeze()
    return reference


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("recompute_old", [False, True])
def test_options_of_a_policy_and_its_loss(case: str, recompute_old: bool) -> None:
    """What else acts on hidden states, or takes some more of them, sees the ones of whole rows."""
    options, terms = OPTIONS[case]
    pair = policies("llama, grouped heads", exact=True, **options)
    loss = settings(terms.get("type", "dapo"), **{k: v for k, v in terms.items() if k != "type"})
    found = []
    for policy in pair:
        if policy.config.lora.rank:
            policy.model.double()
            move_adapters(policy)
    for seed in range(5):
        rows = random_rows(seed, pair[0], per_token=loss.type != "gspo")
        found = [
            gradients(p, [rows], loss, reference_of(p, p.shares) if loss.kl_coef else None, recompute_old)
            for p in pair
        ]
        assert distance(found[1][0], found[0][0]) < 1e-10
        assert found[1][1] == pytest.approx(found[0][1], rel=1e-9, abs=1e-9)
    assert pair[1].shares


@pytest.mark.usefixtures("everything")
def test_backbones_in_bfloat16() -> None:
    """Attention over several parts is summed in float32: the gradient is as far from float32's as that of whole rows
    is, and a quarter more at most."""
    exact, _ = policies("llama, grouped heads")
    pair = policies("llama, grouped heads", dtype="bfloat16")
    assert pair[1].shares
    off = np.zeros((2, 10))
    for seed in range(10):
        rows = random_rows(seed, exact, per_token=False)
        expected, _ = gradients(exact, [rows], GRPO)
        whole = torch.cat([x.flatten() for x in expected.values()])
        for i, policy in enumerate(pair):
            found, _ = gradients(policy, [rows], GRPO)
            got = torch.cat([x.flatten() for x in found.values()])
            off[i, seed] = float((got - whole).norm() / whole.norm())
    assert np.median(off[1]) < 1.25 * np.median(off[0]) + 0.005 and np.median(off[0]) < 0.2


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2}}, {"last_layers": 1}], ids=str
)
@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_micro_batches_cut_at_branches(options: dict[str, Any], loss_type: str) -> None:
    """Pieces of one tree, the prefix of all of them computed once and held, in two passes: the gradient is that of one
    micro-batch, and of whole rows."""
    plain, shared = policies("llama, grouped heads", exact=True, **options)
    for policy in (plain, shared):
        if options.get("lora"):
            policy.model.double()
            move_adapters(policy)
    for seed in range(3):
        tokens, width = forest(seed)
        tokens += [tokens[0][:width], tokens[0][: width - 1], tokens[0][:4]]  # a piece within the prefix
        g = np.random.default_rng(seed)
        rows = sampled_near(plain, micro_batch(tokens, g), g)
        parts = [range(4), range(4, 5), range(5, 11), range(11, 14)]
        prefix = torch.tensor(tokens[0][:width])
        cut = [replace(piece, prefix=prefix) for piece in pieces(rows, parts)]
        other, _ = forest(100 + seed)
        apart = sampled_near(plain, micro_batch(other, g), g)  # another tree behind, which holds nothing
        loss = settings(loss_type, kl_coef=0.1)  # the reference holds the prefix too

        def run(
            policy: Policy, micro: list[MicroBatch], loss: GrpoLossConfig = loss, odd: int = seed % 2
        ) -> Any:
            return gradients(policy, micro, loss, reference_of(policy, policy.shares), bool(odd))

        (expected, metrics), (one, _) = run(plain, [rows, apart]), run(shared, [rows, apart])
        with embedded(shared) as computed:
            two, of_two = run(shared, [*cut, apart])
        assert not rows.advantages.all() or width in computed
        assert distance(one, expected) < 1e-10 and distance(two, expected) < 1e-10
        assert of_two == pytest.approx(metrics, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("attention", ["rows", "varlen"])
def test_nothing_shared_is_bit_equal(name: str, attention: str) -> None:
    """Rows that differ from their first token, or save less than a node is worth, take the way of unshared rows."""
    plain, shared = policies(name, attention=attention)
    g = np.random.default_rng(0)
    for common in (0, 2):
        tokens = [[7] * common + [i, *g.integers(0, VOCAB, 5 + i).tolist()] for i in range(8)]
        rows = sampled_near(plain, micro_batch(tokens, g), g)
        expected, metrics = gradients(plain, [rows], GRPO)
        found, of_found = gradients(shared, [rows], GRPO)
        assert metrics == of_found and all(torch.equal(found[n], x) for n, x in expected.items())


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_mixtures_of_experts_share(experts: str) -> None:
    """Routers see each token once; without a balancing loss the gradient is that of whole rows, but for the softmax of
    the routers, which is float32 in transformers. A balancing loss, which counts tokens, computes whole rows."""
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    plain, shared = policies("Qwen3Moe", experts == "eager", changes=changes, experts=experts)
    assert shared.shares, shared.why_not
    for seed in range(10):
        rows = random_rows(seed, plain)
        expected, found = (gradients(policy, [rows], GRPO)[0] for policy in (plain, shared))
        assert furthest(found, expected) < 1e-5
    model = shared_model("Qwen3Moe", **changes)
    off = Policy(model, tiny_tokenizer(), "moe", PolicyConfig(aux_loss_coef=0.1))
    assert not off.shares and "aux_loss_coef=0.1" in (off.why_not or "")


@pytest.mark.usefixtures("everything")
def test_demonstrations_share() -> None:
    """SFT on demonstrations that begin alike: loss and gradient of whole ones."""
    g = np.random.default_rng(0)
    rows = forest(0)[0]
    demos = [(np.array(r, np.int32), (g.random(len(r)) < 0.5).astype(np.uint8)) for r in rows]
    found = []
    for policy in policies("qwen3, grouped heads", exact=True):
        loss = demo_loss(policy, demos)
        trained = dict(policy.model.named_parameters())
        gradient = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        found.append((loss.item(), gradient))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert distance(found[1][1], found[0][1]) < 1e-10
