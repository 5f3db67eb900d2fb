"""Rows of a head that are no token take no part: they are not sampled, not scored, and have no gradient."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.model.policy import Policy
from mgrpo.model.vocabulary import Vocabulary
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, logprobs_of
from tests.families import family

PADDED = 40  # rows of the head
TAIL = list(range(24))
HOLES = [i for i in range(2, 33) if i % 5]


pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer_of(ids: list[int]) -> Any:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in ids}, unk_token=f"w{ids[0]}"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=f"w{ids[0]}")


def padded(ids: list[int], tied: bool = False) -> Policy:
    """A policy that would rather sample the rows that are no token."""
    model = family("Qwen2", vocab_size=PADDED, tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
        spare = [i for i in range(PADDED) if i not in ids]
        model.lm_head.weight[spare] *= 5
    return Policy(model, tokenizer_of(ids), "padded")


def micro_batch(ids: list[int]) -> MicroBatch:
    g = torch.Generator().manual_seed(1)
    tokens = torch.tensor(ids)[torch.randint(len(ids), (3, 12), generator=g)]
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, :2] = False
    lengths = torch.full((3,), 12)
    return MicroBatch(
        tokens, mask, -3 * torch.ones(3, 12), lengths, torch.tensor([1.0, -1, 2]), torch.ones(3)
    )


def expected_logprobs(policy: Policy, batch: MicroBatch, ids: list[int], temperature: float) -> torch.Tensor:
    logits = policy.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    spare = torch.ones(PADDED, dtype=torch.bool)
    spare[ids] = False
    logits = logits.masked_fill(spare, float("-inf")) / temperature
    found = logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
    return found[batch.loss_mask[:, 1:]]


@pytest.mark.parametrize("ids", [TAIL, HOLES], ids=["tail", "holes"])
def test_sampler_and_trainer_share_one_distribution_over_the_tokens(ids: list[int]) -> None:
    """Every sampled id is a token, and its log-prob is the trainer's, renormalised over the tokens."""
    policy = padded(ids)

    async def ask(temperature: float) -> list[Generation]:
        engine = HfEngine(policy, slots=4, max_length=40)
        params = SamplingParams(30, temperature)
        asked = [engine.generate([ids[3], ids[5]], params, seed=s) for s in range(4)]
        return await asyncio.gather(*asked)

    for temperature in (1.0, 0.7, 0.0):
        for sampled in asyncio.run(ask(temperature)):
            assert set(sampled.token_ids.tolist()) <= set(ids)
            row = torch.tensor([[ids[3], ids[5], *sampled.token_ids.tolist()]])
            mask = torch.ones_like(row, dtype=torch.bool)
            mask[:, :2] = False
            one = torch.ones(1)
            batch = MicroBatch(row, mask, torch.zeros(row.shape), torch.tensor([row.shape[1]]), one, one)
            scored = logprobs_of(policy, batch, temperature or 1.0)
            torch.testing.assert_close(scored, torch.from_numpy(sampled.logprobs), rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                expected = expected_logprobs(policy, batch, ids, temperature or 1.0)
            torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ids", [TAIL, HOLES], ids=["tail", "holes"])
def test_rows_that_are_no_token_have_no_gradient(ids: list[int], tied: bool) -> None:
    """Loss and entropy are over the tokens, and the gradient is that of the masked distribution."""
    policy, batch = padded(ids, tied), micro_batch(ids)
    gradients: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    weight = policy.model.lm_head.weight
    optimizer.register_step_pre_hook(lambda *_: gradients.append(weight.grad.clone()))
    loss = GrpoLossConfig(entropy_coef=0.01)
    metrics = Learner(policy, optimizer, loss, 1e9).step(MiniBatch([batch], 30.0))
    spare = [i for i in range(PADDED) if i not in ids]
    assert not gradients[0][spare].any()
    assert gradients[0][ids].abs().max() > 1e-4
    with torch.no_grad():
        logits = policy.model(input_ids=batch.ids, use_cache=False).logits[:, :-1][..., ids]
    p = logits.log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)[batch.loss_mask[:, 1:]].mean()
    assert metrics["entropy"] == pytest.approx(float(entropy), rel=1e-4)


def test_ids_and_classes() -> None:
    """The unnamed rows are listed; classes and tokens are inverse; an id that is no token is an error."""
    weight = torch.arange(80.0).reshape(PADDED, 2)
    tail, holes = (Vocabulary(tokenizer_of(ids), PADDED, "p") for ids in (TAIL, HOLES))
    assert tail.unnamed() == list(range(24, PADDED))
    assert holes.unnamed() == [i for i in range(PADDED) if i not in HOLES]
    assert tail.head(weight).data_ptr() == weight.data_ptr() and tail.head(weight).shape == (24, 2)
    assert torch.equal(holes.head(weight), weight[HOLES])
    for vocabulary, ids in ((tail, TAIL), (holes, HOLES)):
        known = torch.tensor(ids)
        assert vocabulary.classes(known).tolist() == list(range(len(ids)))
        assert torch.equal(vocabulary.tokens(vocabulary.classes(known)), known)
        with pytest.raises(ValueError, match=f"token id 35 is none of the tokenizer's {len(ids)} tokens"):
            vocabulary.classes(torch.tensor([ids[0], 35]))
    whole = Vocabulary(tokenizer_of(list(range(PADDED))), PADDED, "p")
    assert whole.head(weight) is weight and whole.unnamed() == []
