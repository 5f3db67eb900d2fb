"""Which models the in-process engine serves, up to their last position, and which it refuses in words."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
import torch

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.errors import ConfigError
from mgrpo.model import architecture
from mgrpo.model.policy import Policy
from tests.families import CONTEXT, family
from tests.models import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(name: str, **changes: Any) -> Policy:
    return Policy(family(name, **changes), tiny_tokenizer(), "tiny")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Mamba", {}, "its layers carry a state from token to token"),
        ("Rwkv", {}, "its layers carry a state from token to token"),
        ("Bamba", {}, "its layers carry a state from token to token|linear_attention"),
        ("FalconH1", {}, "it has hybrid layers|carry a state"),
        ("Lfm2", {}, "it has conv layers"),
        ("Bloom", {}, "it takes no cache with a mask and positions"),
        ("Llama4Text", {}, "it has chunked_attention layers"),
    ],
)
def test_models_that_keep_more_than_keys_and_values_are_refused(
    name: str, changes: dict[str, Any], words: str
) -> None:
    """By the name of what they have, with the engine that serves them; they can be trained."""
    policy = policy_of(name, **changes)
    with pytest.raises(
        ConfigError, match=rf"^tiny: the in-process engine cannot serve \w+: .*({words})"
    ) as told:
        HfEngine(policy, slots=2, max_length=32)
    assert 'engine.type "vllm"' in str(told.value)


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Mpt", "Qwen2", "GptOss"])
def test_histories_reach_the_last_position(name: str) -> None:
    """Learned, learned with an offset, linear-bias and rotary positions, and sinks: a history as long as the context
    is sampled from what the whole history gives, in prompts of several lengths at once."""
    policy = policy_of(name)
    bound = CONTEXT if policy.context_length == CONTEXT else 48

    async def ask() -> list[Generation]:
        engine = HfEngine(policy, slots=4, max_length=bound, prefill_chunk=7)
        prompts = [list(range(2, 2 + n)) for n in (1, 20, bound - 3)]
        return list(
            await asyncio.gather(
                *(
                    engine.generate(p, SamplingParams(bound - len(p), 1.0), seed=len(p), session=str(len(p)))
                    for p in prompts
                )
            )
        )

    assert policy.context_length == architecture.positions(policy.model.config.to_dict())
    for n, sampled in zip((1, 20, bound - 3), asyncio.run(ask()), strict=True):
        row = torch.tensor([[*range(2, 2 + n), *sampled.token_ids.tolist()]])
        assert row.shape[1] == bound
        with torch.no_grad():
            logits = policy.hidden(row)[0] @ policy.head_weight.T
        expected = logits[n - 1 : -1].log_softmax(-1).gather(1, row[0, n:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(sampled.logprobs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("GPTNeo", {}, "8 tokens (window_size)"),
        ("Gemma3Text", {"sliding_window": 16}, "16 tokens (sliding_window)"),
        ("GptOss", {"sliding_window": 16}, "16 tokens (sliding_window)"),
    ],
)
def test_windows_bound_the_length(name: str, changes: dict[str, Any], window: str) -> None:
    """Whatever the setting is called, and where only some layers have it: histories up to the window are served."""
    policy = policy_of(name, **changes)
    limit = int(window.split()[0])
    with pytest.raises(
        ValueError, match=re.escape(f"tiny attends within {window}; max_length {limit + 1} must")
    ):
        HfEngine(policy, slots=2, max_length=limit + 1)
    assert HfEngine(policy, slots=2, max_length=limit).max_length == limit


def test_a_model_without_positions_needs_a_length() -> None:
    """Nothing bounds a history then; a model with positions is bounded by them."""
    policy = policy_of("Qwen2")
    policy.context_length = None
    with pytest.raises(ValueError, match="tiny names no context length; give max_length"):
        HfEngine(policy, slots=2)
    assert HfEngine(policy, slots=2, max_length=4 * CONTEXT).max_length == 4 * CONTEXT
    with pytest.raises(ValueError, match=rf"max_length 65 of tiny is outside 2..{CONTEXT}"):
        HfEngine(policy_of("GPT2"), slots=2, max_length=CONTEXT + 1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 8, "n_ctx": 9}, 8),
        ({"n_positions": 8}, 8),
        ({"max_seq_len": 8}, 8),
        ({"seq_length": 8}, 8),
        ({"max_sequence_length": 8}, 8),
        ({"max_position_embeddings": None, "n_positions": 8}, 8),
        ({"text_config": {"max_position_embeddings": 8}, "max_position_embeddings": 2}, 8),
        ({"hidden_size": 8}, None),
        ({"max_position_embeddings": True}, None),
    ],
)
def test_positions_have_many_names(config: dict[str, Any], expected: int | None) -> None:
    """The first that holds a number; none is no bound."""
    assert architecture.positions(config) == expected
