"""The token-shift decoder: one function of the tokens, however they are padded, chunked or cached."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from mgrpo.tasks.atlas.decoder import ShiftDecoderConfig, ShiftDecoderForCausalLM, ShiftDecoderModel
from tests.models import VOCAB, tiny_model

IDS = torch.randint(VOCAB, (4, 20), generator=torch.Generator().manual_seed(1))
PAD = torch.zeros(4, 5, dtype=torch.long)
SHOWN, HIDDEN = torch.ones(4, 20, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)


@pytest.fixture(scope="module")
def model() -> ShiftDecoderForCausalLM:
    return tiny_model("shift").requires_grad_(False)


def reference_attention(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """q_t = C x_t + D x_{t-1}, k_t = A x_t + B x_{t-1}, one head and one position at a time."""
    width, d = x.shape[-1], layer.head_dim
    (c, big_d), (a, b) = (w.chunk(2, dim=1) for w in layer.qk_proj.weight.chunk(2))
    v = layer.v_proj.weight
    zero = torch.zeros(width)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        q = c @ x[t] + big_d @ (x[t - 1] if t else zero)
        ks = [a @ x[s] + b @ (x[s - 1] if s else zero) for s in range(t + 1)]
        for h in range(layer.heads):
            part = slice(h * d, (h + 1) * d)
            scores = torch.stack([q[part] @ k[part] for k in ks]) / d**0.5
            for s, p in enumerate(scores.softmax(0)):
                out[t, part] += p * (v @ x[s])[part]
    return out @ layer.out_proj.weight.T


def test_attention_is_the_formula_of_the_docstring(model):
    """The batched attention equals the definition written position by position."""
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    layer = model.model.layers[0].attention
    step = model.model._step(x[None], None, None, None)
    torch.testing.assert_close(
        layer.out_proj(layer(x[None], step))[0], reference_attention(layer, x), rtol=1e-5, atol=1e-5
    )


def test_padding_on_either_side_changes_nothing(model):
    """Left padding, right padding and no padding give the same logits on the real tokens."""
    plain = model(IDS).logits
    left = model(torch.cat([PAD, IDS], 1), attention_mask=torch.cat([HIDDEN, SHOWN], 1)).logits[:, 5:]
    right = model(torch.cat([IDS, PAD], 1), attention_mask=torch.cat([SHOWN, HIDDEN], 1)).logits[:, :20]
    unmasked_right = model(torch.cat([IDS, PAD], 1)).logits[:, :20]
    for padded in (left, right, unmasked_right):
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[0, 20], [0, 1, 2, 20], [0, 7, 8, 12, 20], list(range(21))])
@pytest.mark.parametrize("pad", [0, 5])
def test_a_cache_in_any_chunks_equals_one_forward(model, cuts, pad):
    """Chunk by chunk through a DynamicCache, left-padded or not, gives the logits of one forward."""
    ids, shown = torch.cat([PAD[:, :pad], IDS], 1), torch.cat([HIDDEN[:, :pad], SHOWN], 1)
    cache = DynamicCache(config=model.config)
    bounds = [0] + [c + pad for c in cuts[1:]]
    parts = [
        model(ids[:, a:b], attention_mask=shown[:, :b], past_key_values=cache, use_cache=True).logits
        for a, b in pairwise(bounds)
    ]
    torch.testing.assert_close(torch.cat(parts, 1)[:, pad:], model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_generate_agrees_with_and_without_cache_and_padding(model):
    """transformers' generate, greedy: the cache and left padding leave every token as it is."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, attention_mask=SHOWN, use_cache=False, **settings)[:, 20:]
    cached = model.generate(IDS, attention_mask=SHOWN, **settings)[:, 20:]
    padded = model.generate(
        torch.cat([PAD, IDS], 1), attention_mask=torch.cat([HIDDEN, SHOWN], 1), **settings
    )[:, 25:]
    assert torch.equal(plain, cached)
    assert torch.equal(plain, padded)


def test_gradients_match_finite_differences():
    """In float64 the gradient of a loss equals central differences in every kind of parameter."""
    model = tiny_model("shift").double()
    ids = IDS[:2, :6]

    def loss() -> torch.Tensor:
        return model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean()

    loss().backward()
    for name, parameter in model.named_parameters():
        flat, index = parameter.data.view(-1), int(parameter.grad.abs().argmax())
        kept = flat[index].item()
        flat[index] = kept + 1e-5
        above = loss().item()
        flat[index] = kept - 1e-5
        below = loss().item()
        flat[index] = kept
        assert parameter.grad.view(-1)[index].item() == pytest.approx((above - below) / 2e-5, rel=1e-5), name


def test_it_starts_as_documented_and_loads_through_the_auto_classes(tmp_path: Path):
    """Tied head, embedding std, final gain; a saved folder comes back bit for bit as this class."""
    torch.manual_seed(0)
    model = ShiftDecoderForCausalLM(ShiftDecoderConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(model.model.norm.weight.data, torch.full((64,), 2.0))
    assert torch.equal(model.model.layers[0].mlp_norm.weight.data, torch.ones(64))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ShiftDecoderForCausalLM)
    assert isinstance(AutoModel.from_pretrained(tmp_path), ShiftDecoderModel)
    assert AutoConfig.from_pretrained(tmp_path).final_norm_gain == 2.0
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_bad_sizes_and_caches_are_refused(model):
    """Errors name the value and the bound."""
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple of its 4 heads"):
        ShiftDecoderConfig(hidden_size=30)
    with pytest.raises(ValueError, match="65 tokens exceed the 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.model()
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="StaticCache does not append"):
        model(IDS[:, :4], past_key_values=cache, use_cache=True)
