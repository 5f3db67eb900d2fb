"""Attention of a policy: packed rows are separate sequences, whatever the architecture's heads and windows."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import attention
from mgrpo.model.policy import Policy
from tests.families import family
from tests.models import VOCAB, tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)),
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "llama-mqa": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
    "mistral-window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7)
    ),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def policy(name: str, kind: str, **settings: Any) -> Policy:
    torch.manual_seed(0)
    return Policy(MODELS[name](), tiny_tokenizer(), name, PolicyConfig(attention=kind, **settings))


def batch(rows: int = 12, width: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of many lengths, the shortest of one token, with some of their tokens scored."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[3] = 1
    lengths[5] = width
    ids = torch.randint(VOCAB, (rows, width), generator=g)
    inside = torch.arange(1, width) < lengths[:, None]
    return ids, lengths, inside & (torch.rand(rows, width - 1, generator=g) < 0.4)


def states_and_gradients(policy: Policy) -> tuple[Tensor, list[Tensor]]:
    hidden = policy.hidden_before(*batch())
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    trained = [p for p in policy.model.base_model.parameters() if p.requires_grad]
    return hidden.detach(), list(torch.autograd.grad((hidden * target).mean(), trained))


@pytest.mark.parametrize("name", MODELS)
def test_packed_and_padded_rows_agree(name: str) -> None:
    """rows, sdpa and varlen give the same hidden states to 1e-5 and the same gradients, in the same order."""
    expected, gradients = states_and_gradients(policy(name, "rows"))
    assert len(expected) == int(batch()[2].sum()) > 50
    for kind in ("sdpa", "varlen"):
        other = policy(name, kind)
        assert other.attention == kind
        hidden, found = states_and_gradients(other)
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_each_sequence_of_a_packed_row_is_attended_as_if_alone(window: int | None) -> None:
    """The attention function itself equals separate calls bit for bit, with grouped heads and windows."""
    g = torch.Generator().manual_seed(0)
    lengths, t = [3, 1, 9, 4], 17
    q, k, v = (torch.randn(1, heads, t, 8, generator=g) for heads in (4, 2, 2))
    module = torch.nn.Module()
    borders = torch.tensor([0, 3, 4, 13, 17], dtype=torch.int32)
    settings = {"scaling": 0.3, "sliding_window": window}
    out, _ = attention._varlen(module, q, k, v, None, cu_seq_lens_q=borders, max_length_q=9, **settings)
    assert out.shape == (1, t, 4, 8)
    for start, n in zip(borders.tolist(), lengths, strict=False):
        part = [x[:, :, start : start + n] for x in (q, k, v)]
        borders_alone = torch.tensor([0, n], dtype=torch.int32)
        alone, _ = attention._varlen(
            module, *part, None, cu_seq_lens_q=borders_alone, max_length_q=n, **settings
        )
        assert torch.equal(out[:, start : start + n], alone)
        scores = torch.einsum("hid,hjd->hij", part[0][0], part[1][0].repeat_interleave(2, 0)) * 0.3
        ahead = torch.arange(n)[:, None] - torch.arange(n)
        seen = (ahead >= 0) & (ahead < (window or n))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        plain = torch.einsum("hij,hjd->ihd", weights, part[2][0].repeat_interleave(2, 0))
        torch.testing.assert_close(alone[0], plain, rtol=1e-5, atol=1e-6)


def test_whole_rows_still_work_where_packing_was_chosen() -> None:
    """hidden(), logits and generation of a packed policy are those of any other; a padding mask is refused."""
    packed, rows = policy("mistral-window", "varlen"), policy("mistral-window", "rows")
    ids = batch()[0]
    torch.testing.assert_close(packed.hidden(ids), rows.hidden(ids), rtol=1e-5, atol=1e-5)
    ask = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found, expected = (
        p.model.generate(ids[:2], attention_mask=torch.ones_like(ids[:2]), **ask) for p in (packed, rows)
    )
    assert torch.equal(found, expected)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with pytest.raises(ValueError, match=r"takes no padding mask of shape \(12, 40\)"):
        packed.model(input_ids=ids, attention_mask=padding)


def test_auto_takes_what_the_place_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """rows on a CPU; on a GPU flash where the package's function imports, else varlen; padded rows in float32."""
    assert attention.resolve("auto", "cpu", "float32") == "rows"
    assert attention.resolve("auto", "cpu", "bfloat16") == "rows"
    assert attention.resolve("auto", "cuda", "float32") == "sdpa"
    hollow = types.ModuleType("flash_attn")  # what an empty folder of that name imports as
    hollow.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", hollow)
    assert attention.resolve("auto", "cuda", "bfloat16") == "varlen"
    with pytest.raises(ConfigError, match=r"flash_attn_varlen_func does not import here"):
        attention.resolve("flash", "cuda", "bfloat16")
    hollow.flash_attn_varlen_func = lambda *_: None
    assert attention.resolve("auto", "cuda", "bfloat16") == "flash"
    with pytest.raises(ConfigError, match=r'"flash" needs policy.device "cuda"'):
        attention.resolve("flash", "cpu", "bfloat16")
    with pytest.raises(ConfigError, match=r'"varlen" on a GPU needs policy.dtype "bfloat16"'):
        attention.resolve("varlen", "cuda", "float32")
    with pytest.raises(ConfigError, match=r'"ring" is not one of auto, rows, sdpa, varlen, flash'):
        attention.resolve("ring", "cpu", "float32")


def test_flash_gets_what_varlen_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash function is called in flash-attn's layout: a stand-in that computes from it gives varlen's numbers."""

    def stand_in(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        borders_q: Tensor,
        borders_k: Tensor,
        longest_q: int,
        longest_k: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert causal and borders_q is borders_k and longest_q == longest_k == 6
        parts = []
        for a, b in borders_q.unfold(0, 2, 1).tolist():
            ahead = torch.arange(b - a)[:, None] - torch.arange(b - a)
            seen = (ahead >= 0) & (ahead <= (window_size[0] if window_size[0] >= 0 else b))
            keys, values = (x[a:b].repeat_interleave(2, 1) for x in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q[a:b], keys) * softmax_scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hij,jhd->ihd", weights, values))
        return torch.cat(parts)

    monkeypatch.setattr(attention, "flash_attn_varlen_func", lambda: stand_in)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 10, 8, generator=g) for heads in (4, 2, 2))
    borders = torch.tensor([0, 6, 10], dtype=torch.int32)
    for window in (None, 3):
        settings = {
            "cu_seq_lens_q": borders,
            "max_length_q": 6,
            "scaling": 0.4,
            "sliding_window": window,
        }
        ours, _ = attention._flash(torch.nn.Module(), q, k, v, None, **settings)
        loop, _ = attention._varlen(torch.nn.Module(), q, k, v, None, **settings)
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-6)


def test_architectures_that_cannot_pack_are_refused() -> None:
    """Our own decoder computes its attention itself; a model that wants more than softmax attention says so."""
    with pytest.raises(ConfigError, match=r"shift: policy.attention \"varlen\" packs .* does not keep apart"):
        Policy(tiny_model("shift"), tiny_tokenizer(), "shift", PolicyConfig(attention="varlen"))
    q = torch.zeros(1, 1, 2, 4)
    borders = torch.tensor([0, 2], dtype=torch.int32)
    for extra, message in (
        ({"softcap": 30.0}, "asks its attention for softcap"),
        ({"dropout": 0.1}, "asks for dropout 0.1"),
        ({"is_causal": False}, "is not causal"),
    ):
        with pytest.raises(ConfigError, match=message):
            attention._varlen(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=borders, **extra)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Mamba", "carry a state from token to token"),
        ("Rwkv", "carry a state from token to token"),
        ("Bamba", "it has linear_attention layers|carry a state"),
        ("FalconH1", "it has hybrid layers|carry a state"),
        ("Lfm2", "it has conv layers"),
        ("Llama4Text", "it has chunked_attention layers"),
        ("GPTNeo", "it attends within window_size=8 in a way of its own"),
        ("Bloom", "AttentionInterface"),
        ("GptOss", "asks its attention for s_aux"),
    ],
)
def test_models_whose_sequences_would_run_into_each_other_are_not_packed(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the name of what would leak, however small the weights; "auto" pads them, and padded rows are what
    each sequence is alone."""
    with pytest.raises(ConfigError, match=rf'"varlen" packs sequences into one row, which .*({words})'):
        Policy(family(name), tiny_tokenizer(), name, PolicyConfig(attention="varlen"))
    monkeypatch.setattr(attention, "resolve", lambda *_: "varlen")  # as on a GPU
    padded = Policy(family(name), tiny_tokenizer(), name, PolicyConfig(attention="auto"))
    assert padded.attention == "sdpa"
    ids, lengths, scored = batch(rows=6, width=20)
    found = padded.hidden_before(ids, lengths, scored)
    alone = [
        padded.hidden(ids[i : i + 1, :n])[0, : n - 1][scored[i, : n - 1]]
        for i, n in enumerate(lengths.tolist())
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3", "GPT2", "OPT", "Gemma3Text"])
def test_packed_sequences_are_what_each_is_alone(name: str) -> None:
    """Experts, latent attention, learned positions and windows: the hidden states of padded rows."""
    policies = [
        Policy(family(name), tiny_tokenizer(), name, PolicyConfig(attention=kind))
        for kind in ("varlen", "sdpa")
    ]
    ids, lengths, scored = batch(rows=6, width=20)
    found, padded = (p.hidden_before(ids, lengths, scored) for p in policies)
    torch.testing.assert_close(found, padded, rtol=1e-4, atol=1e-5)
