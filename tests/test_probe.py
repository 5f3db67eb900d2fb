"""The log-probs of a fixed prompt tell a version's weights from others, and are the policy's own in float32."""

from __future__ import annotations

import pytest
import torch

from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import NumericsError
from mgrpo.model.policy import Policy, state_of
from mgrpo.model.probe import PROBE_TOKENS, probe, probe_ids
from mgrpo.types import Probe
from tests.models import VOCAB, load_state, tiny_model, tiny_tokenizer

LORA = LoraConfig(rank=3, alpha=12.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(config: PolicyConfig | None = None, tokens: int = VOCAB) -> Policy:
    """A tiny Llama whose trained weights have moved."""
    policy = Policy(tiny_model("llama"), tiny_tokenizer(tokens), "tiny", config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.25).add_(0.01)
    return policy


def ask(policy: Policy) -> Probe:
    return probe(policy, probe_ids(policy, 64))


def expected(policy: Policy, ids: tuple[int, ...]) -> list[float]:
    """By transformers' own logits, of a plain model in float32 with the policy's published weights."""
    model = tiny_model("llama")
    load_state(model, {n: t.float() for n, t in state_of(policy.model).items()})
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(),
        PolicyConfig(dtype="bfloat16"),
        PolicyConfig(attention="varlen"),
        PolicyConfig(gradient_checkpointing=True),
        PolicyConfig(lora=LORA),
        PolicyConfig(dtype="bfloat16", lora=LORA),
        PolicyConfig(dtype="bfloat16", last_layers=1),
    ],
    ids=str,
)
def test_probes_are_the_published_weights_in_float32(config: PolicyConfig) -> None:
    """Whatever the policy trains in, a plain model with what is published says the same to 1e-4 nats; afterwards the
    policy computes as it did."""
    policy = policy_of(config)
    ids = torch.arange(12).reshape(2, 6)
    before = policy.hidden(ids)
    found = ask(policy)
    assert len(found.token_ids) == PROBE_TOKENS == len(found.logprobs) + 1
    assert list(found.logprobs) == pytest.approx(expected(policy, found.token_ids), abs=1e-4)
    assert torch.equal(policy.hidden(ids), before)
    assert ask(policy) == found


def test_other_weights_are_seen() -> None:
    """The head before an update, one layer, one row of the embedding that the prompt meets: each moves some log-prob
    by more than bfloat16 does."""
    found = ask(policy_of())
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        policy = policy_of()
        with torch.no_grad():
            policy.model.get_parameter(name).copy_(tiny_model("llama").get_parameter(name))
        others = ask(policy).logprobs
        assert max(abs(a - b) for a, b in zip(others, found.logprobs, strict=True)) > 0.05, name


def test_the_prompt_is_of_the_tokenizers_tokens() -> None:
    """Neither a padded head's spare rows nor added tokens stand in the prompt, which is the same in every process and
    spread over the vocabulary; the distribution is the whole head's, as a server has it."""
    policy = policy_of(tokens=80)
    policy.tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = policy.tokenizer.convert_tokens_to_ids("<image>")
    policy = Policy(policy.model, policy.tokenizer, "padded")
    found = ask(policy)
    assert image == 80 and image not in found.token_ids and max(found.token_ids) > 70
    assert len(set(found.token_ids)) > 25
    assert list(found.logprobs) == pytest.approx(expected(policy, found.token_ids), abs=1e-4)
    assert probe_ids(policy_of(), 64) == probe_ids(policy_of(), 99)


def test_the_prompt_fits_the_engine() -> None:
    """One token is left for the engine to sample, and the model's positions are kept."""
    assert len(probe_ids(policy_of(), 16)) == 15
    assert len(probe_ids(policy_of(), 2)) == 2
    policy = policy_of()
    policy.context_length = 9
    assert len(probe_ids(policy, 64)) == 9


def test_damaged_weights_are_not_published() -> None:
    """A weight that is no number is named before an engine gets it."""
    policy = policy_of()
    with torch.no_grad():
        policy.model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"tiny: .* log-probs of a fixed prompt are not finite"):
        ask(policy)
