"""FLOPs of a step counted from the architecture equal those that torch counts in the learner's own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy
from mgrpo.profiling import flops as counting
from mgrpo.profiling.flops import Cost, ModelFlops, flops_of
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch import cost
from mgrpo.trainers.torch import learner as learners
from mgrpo.trainers.torch.cost import StepMeter, of_rows, plain
from mgrpo.trainers.torch.learner import Learner, logprobs_of
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
        learner._backward(part, 1.0)


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
