"""FLOPs of a step counted from the architecture equal those that torch counts in the learner's own step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy
from mgrpo.ops.tree_attention import Level
from mgrpo.ops.tree_kernels import CpuKernel
from mgrpo.profiling import flops as counting
from mgrpo.profiling.flops import Cost, ModelFlops, flops_of
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch import cost
from mgrpo.trainers.torch import learner as learners
from mgrpo.trainers.torch.cost import StepMeter, of_rows, plain
from mgrpo.trainers.torch.learner import Learner, Prefixes, logprobs_of
from tests.families import family
from tests.models import VOCAB, tiny_model, tiny_tokenizer

WIDTH = 33  # tokens of a row; the last one does not enter the model
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BUILDERS: dict[str, tuple[Callable[[], Any], PolicyConfig]] = {
    "llama": (lambda: tiny_model("llama"), PolicyConfig()),
    "qwen3": (lambda: family("Qwen3"), PolicyConfig()),
    "qwen3, checkpointing": (lambda: family("Qwen3"), PolicyConfig(gradient_checkpointing=True)),
    "qwen3-moe": (lambda: family("Qwen3Moe", **EXPERTS), PolicyConfig(experts="eager")),
    "qwen3-moe, frozen router": (
        lambda: family("Qwen3Moe", **EXPERTS),
        PolicyConfig(experts="eager", train_router=False),
    ),
    "lora": (lambda: tiny_model("llama"), PolicyConfig(lora=LoraConfig(rank=4))),
    "lora of queries": (
        lambda: tiny_model("llama"),
        PolicyConfig(lora=LoraConfig(rank=4, targets=("q_proj",))),
    ),
    "lora of experts": (
        lambda: family("Qwen3Moe", **EXPERTS),
        PolicyConfig(experts="eager", lora=LoraConfig(rank=4, targets=ATTENTION)),
    ),
    "last layer": (lambda: family("Qwen3", num_hidden_layers=3), PolicyConfig(last_layers=1)),
    "own decoder": (lambda: tiny_model("shift"), PolicyConfig()),
}


def rows_of(count: int, dead: int) -> MicroBatch:
    """Rows of one length, the first `dead` of them without an advantage; about half of their tokens are sampled."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(count, WIDTH, generator=g) < 0.5
    mask[:, 0], mask[:, 1] = False, True
    advantages = torch.ones(count)
    advantages[:dead] = 0.0
    return MicroBatch(
        ids=torch.randint(0, VOCAB, (count, WIDTH), generator=g),
        loss_mask=mask,
        rollout_logprobs=torch.full((count, WIDTH), -4.0),
        lengths=torch.full((count,), WIDTH),
        advantages=advantages,
        weights=torch.ones(count),
    )


def plain_head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **_: Any) -> Any:
    """In the place of the fused loss, which torch's counter does not see into: its products in plain torch."""
    logp = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None])[:, 0]
    return -logp.sum(), {"nonfinite_rows": torch.zeros(()), "tokens": torch.tensor(float(len(targets)))}


def plain_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **_: Any) -> Any:
    return torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None]).T


def counted(run: Callable[[], object]) -> int:
    """By torch, of everything that `run` computes; attention as plain products."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


def backward_of(learner: Learner, rows: MicroBatch) -> None:
    for part in learner._parts(MiniBatch([rows], 1.0)):
        learner._backward(part, 1.0, Prefixes(learner.ranks))


@pytest.fixture
def seen_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "linear_grpo_loss", plain_head)
    monkeypatch.setattr(learners, "selective_logprob", plain_logprobs)


def learner_of(policy: Policy, reference: Policy | None = None, kl: float = 0.0) -> Learner:
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    return Learner(policy, optimizer, GrpoLossConfig(kl_coef=kl), 1.0, reference)


def known(policy: Policy) -> tuple[ModelFlops, ModelFlops]:
    return flops_of(policy.model.config, plain(policy.config), policy.vocabulary.size)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_costs_what_torch_counts(name: str, seen_head: None) -> None:
    """Forward and backward of the rows that the learner computes, of whatever trains. A layer that is
    recomputed is counted once by us, and twice by torch."""
    build, config = BUILDERS[name]
    policy = Policy(build(), tiny_tokenizer(), name, config)
    rows = rows_of(6, dead=2)
    ours = of_rows(known(policy)[0], rows.rows(rows.with_advantage()), causal=False)
    theirs = counted(lambda: backward_of(learner_of(policy), rows))
    if config.gradient_checkpointing:
        assert ours.total < 0.9 * theirs
        policy = Policy(build(), tiny_tokenizer(), name)
        theirs = counted(lambda: backward_of(learner_of(policy), rows))
    assert ours.total == pytest.approx(theirs, rel=0.001)
    assert ours.backward > 0.5 * ours.forward


@pytest.mark.parametrize("rank", [0, 4])
def test_old_and_reference_log_probs_are_forward_passes(
    rank: int, seen_head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a KL term every row is computed, by policy and reference, which with adapters is the model below them; old
    log-probs are one more forward pass of every row, whatever its advantage."""
    policy = Policy(tiny_model("llama"), tiny_tokenizer(), "p", PolicyConfig(lora=LoraConfig(rank=rank)))
    reference = policy.base() if rank else Policy(tiny_model("llama"), tiny_tokenizer(), "r")
    learner, rows = learner_of(policy, reference, kl=0.1), rows_of(6, dead=2)
    model, base = known(policy)
    theirs = counted(lambda: backward_of(learner, rows))
    ours = of_rows(model, rows, causal=False).total + of_rows(base, rows, causal=False).forward
    assert ours == pytest.approx(theirs, rel=0.001)
    assert of_rows(model, rows, causal=False).forward == counted(lambda: logprobs_of(policy, rows, 1.0))

    asked: list[Any] = []

    def once(*of: Any) -> Any:
        asked.append(of)
        return flops_of(*of) if len(asked) == 1 else (model, base)

    monkeypatch.setattr(cost, "flops_of", once)

    def flops(every: bool, reference: bool, recompute: bool) -> float:
        return StepMeter(policy, every, reference, 1).cost([MiniBatch([rows], 1.0)], recompute, 0.0).flops

    acting = of_rows(model, rows.rows(rows.with_advantage())).total
    assert flops(False, False, False) == acting
    assert flops(False, False, True) == acting + of_rows(model, rows).forward
    assert flops(True, True, False) == of_rows(model, rows).total + of_rows(base, rows).forward


def test_a_pair_counts_where_the_mask_lets_it_through() -> None:
    """Causal rows and sliding windows of every length, counted mask entry by mask entry."""
    for window in (None, 1, 5, 64):
        flops = ModelFlops(Cost(), Cost(), {window: Cost(1.0, 2.0)})
        for n in (1, 2, 5, 6, 40):
            ahead = torch.arange(n)[:, None] - torch.arange(n)
            seen = int(((ahead >= 0) & (ahead < (window or n))).sum())
            assert flops.of([n], 0) == Cost(seen, 2 * seen)
    assert flops.of([3, 4], 0, causal=False).forward == 25


def tree_rows(*, cut: bool = False) -> list[MicroBatch]:
    """Seven rows, all with an advantage: two prompts of 36 tokens and one of them with a history of 18 more that three
    rows share, so that a tree is two nodes deep. cut: the rows below the first prompt as two micro-batches that hold
    it, and the rest as a third."""
    g = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, VOCAB, (n,), generator=g)  # noqa: E731
    first, other, history = draw(36), draw(36), draw(18)
    first[0], other[0] = 1, 2
    rows = [torch.cat([first, history, torch.tensor([n]), draw(8)]) for n in range(3)]
    rows += [torch.cat([first, torch.tensor([VOCAB - 1 - n]), draw(12)]) for n in range(2)]
    rows += [torch.cat([other, torch.tensor([n]), draw(9)]) for n in range(2)]

    def micro(parts: list[torch.Tensor], prefix: torch.Tensor | None = None) -> MicroBatch:
        lengths = torch.tensor([len(row) for row in parts])
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        mask = (torch.arange(ids.shape[1]) >= 36) & (torch.arange(ids.shape[1]) < lengths[:, None])
        logprobs, ones = torch.full(ids.shape, -4.0), torch.ones(len(parts))
        return MicroBatch(ids, mask, logprobs, lengths, ones, ones, prefix=prefix)

    return [micro(rows[:3], first), micro(rows[3:5], first), micro(rows[5:])] if cut else [micro(rows)]


NODES = [(0, 36), (36, 54), *[(54, 62)] * 3, *[(36, 48)] * 2, (0, 36), *[(36, 45)] * 2]
"""(begin, end) of tree_rows, by hand: of each row the last token does not enter."""


def test_a_prefix_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree's nodes by hand; a step of a policy that shares costs them, with the reference's and the old log-probs'
    passes; and cut into micro-batches that hold the prefix it costs the same."""
    policy = Policy(tiny_model("llama"), tiny_tokenizer(), "p", PolicyConfig(share_prefixes=True))
    assert policy.shares
    model, base = known(policy)
    (rows,) = tree_rows()
    scored = int(rows.loss_mask.sum())
    tokens = sum(end - begin for begin, end in NODES)
    pairs = sum(n * d + n * (n + 1) // 2 for d, n in ((begin, end - begin) for begin, end in NODES))
    by_hand = model.token.times(tokens) + model.scored.times(scored) + model.pairs[None].times(pairs)
    assert of_rows(model, rows, shares=True) == by_hand
    assert model.of_nodes(NODES, scored) == by_hand
    plain_cost = of_rows(model, rows)
    assert plain_cost == model.of_nodes([(0, int(n) - 1) for n in rows.lengths], scored)
    assert by_hand.total < 0.8 * plain_cost.total

    monkeypatch.setattr(cost, "flops_of", lambda *_: (model, base))
    meter = StepMeter(policy, every_row_acts=False, has_reference=True, ranks=1)
    whole = meter.cost([MiniBatch([rows], 1.0)], True, 0.0).flops
    assert whole == by_hand.total + by_hand.forward + base.of_nodes(NODES, scored).forward
    pieces = meter.cost([MiniBatch(tree_rows(cut=True), 1.0)], True, 0.0).flops
    assert pieces == pytest.approx(whole, rel=1e-12)
    for idle in (1, 2):  # pieces that no row is trained of: with both of them nobody computes the prefix
        cut = tree_rows(cut=True)
        for piece in cut[:idle]:
            piece.advantages = torch.zeros_like(piece.advantages)
        found = meter.cost([MiniBatch(cut, 1.0)], False, 0.0).flops
        assert found == meter.cost([MiniBatch(cut[idle:], 1.0)], False, 0.0).flops


def test_nodes_see_what_a_window_lets_through() -> None:
    """Of nodes behind a history of any length, counted mask entry by mask entry."""
    for window in (None, 1, 5, 64):
        flops = ModelFlops(Cost(), Cost(), {window: Cost(1.0, 2.0)})
        for begin, end in ((0, 1), (3, 9), (7, 40)):
            ahead = torch.arange(end)[:, None] - torch.arange(end)
            seen = int(((ahead >= 0) & (ahead < (window or end)))[begin:].sum())
            assert flops.of_nodes([(begin, end)], 0) == Cost(seen, 2 * seen)


@pytest.mark.parametrize("name", ["llama", "qwen3", "lora"])
def test_a_shared_step_costs_what_torch_counts(
    name: str, seen_head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of the nodes' tokens and the head's are torch's count, forward and backward. Attention over a tree asks
    for operations that torch does not count: their pairs are counted where they are asked for."""
    build, config = BUILDERS[name]
    policy = Policy(build(), tiny_tokenizer(), name, config.model_copy(update={"share_prefixes": True}))
    model = known(policy)[0]
    (rows,) = tree_rows()
    asked: list[float] = []
    forward = CpuKernel.forward

    def seen(
        self: CpuKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Level, scale: float
    ) -> Any:
        for n, m in zip(at.cu_q.diff().tolist(), at.cu_k.diff().tolist(), strict=True):
            pairs = n * (n + 1) // 2 if at.causal else n * m
            asked.append(4.0 * pairs * q.shape[1] * q.shape[2])
        return forward(self, q, k, v, at, scale)

    monkeypatch.setattr(CpuKernel, "forward", seen)
    theirs = counted(lambda: backward_of(learner_of(policy), rows))
    ours = of_rows(replace(model, pairs={}), rows, shares=True)
    assert ours.total == pytest.approx(theirs, rel=0.001)
    attention = of_rows(ModelFlops(Cost(), Cost(), model.pairs), rows, shares=True)
    assert attention.forward == sum(asked)


def test_layers_with_a_window_are_told_from_those_without() -> None:
    """Half of the layers attend to all tokens, half within 128."""
    found = flops_of(family("Olmo3").config)[0]
    assert found.pairs.keys() == {None, 128}
    assert found.pairs[None] == found.pairs[128]


@pytest.mark.parametrize("name", ["Mamba", "Rwkv", "Lfm2", "Llama4Text", "GPTNeo"])
def test_what_is_no_plain_attention_is_not_counted(name: str) -> None:
    """A wrong count would give a wrong utilisation: another way to mix tokens is refused, with its reason."""
    with pytest.raises(ConfigError, match=r"FLOPs .* not known"):
        flops_of(family(name).config)


def test_spare_rows_of_the_head_do_not_count() -> None:
    """A head with more rows than the tokenizer has tokens is multiplied in those of tokens alone."""
    model = tiny_model("llama")
    whole, cut = (flops_of(model.config, vocabulary=n)[0] for n in (None, 80))
    assert cut.scored.forward == 2 * 80 * 32
    assert whole.scored.forward == 2 * VOCAB * 32


def test_a_model_whose_code_fails_has_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: a measurement never ends a trainer's start."""

    def refused(config: Any) -> Any:
        raise KeyError("rope")

    monkeypatch.setattr(counting, "_blank_model", refused)
    with pytest.raises(ConfigError, match=r"FLOPs of LlamaConfig are not known: .*rope"):
        flops_of(tiny_model("llama").config)
