"""Token-shift decoder: a small Hugging Face causal language model that learns to copy within two layers.

A pre-norm transformer with learned positions, a tied head and one change: queries and keys also see the token
before,

    q_t = C x_t + D x_{t-1},    k_t = A x_t + B x_{t-1},    v_t = V x_t,    x_{-1} = 0,

so that "find what followed this token" (an induction head) takes one attention layer instead of two. Small
embeddings (std 0.1) and a final norm that starts with gain 2 keep the tied head usable from the first step.

Incremental decoding with any transformers cache that appends: the cached keys are [A x ; B x] and the cached
values [V x ; D x], twice the head size each; the shift is taken over the whole cached length after
`cache.update`, hence a chunk needs nothing of the chunk before it but the cache. Positions an attention mask
hides contribute no B x and no D x, which makes left padding, right padding and no padding agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class ShiftDecoderConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and initial scales of a token-shift decoder; the defaults are the embedded demonstration's."""

    model_type = "mgrpo_shift_decoder"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 976
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    embedding_std: float = 0.1
    final_norm_gain: float = 2.0
    norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of its {self.num_attention_heads} heads"
            )


class ShiftCache(Protocol):
    """A cache that keeps the last x_t of every row itself; then keys and values are cached ready for use."""

    def with_previous(self, x: Tensor, layer_idx: int) -> Tensor:
        """[x_t ; x_{t-1}] (R, S, 2W) of new x (R, S, W), with zeros at the start of a history."""
        ...


@dataclass(slots=True)
class _Step:
    """What the layers of one forward share. S: new tokens of each row, T: cached length including them."""

    mask: Tensor | None  # bool or float, broadcastable to (R, 1, S, T); None: causal
    padding: Tensor | None  # (R, S, 1) bool: new positions that are padding
    cache: Cache | None
    offset: int  # cached columns before the new tokens


class WithPrevious(torch.autograd.Function):
    """x (R, S, W) -> [x_t ; x_{t-1}] (R, S, 2W), zeros before the first; without pad's and cat's copies."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        width = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], 2 * width)
        out[..., :width] = x
        out[:, 1:, width:] = x[:, :-1]
        out[:, 0, width:] = 0.0
        return out

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        width = grad.shape[-1] // 2
        out = grad[..., :width].clone()
        out[:, :-1] += grad[:, 1:, width:]
        return out


def _with_previous(x: Tensor) -> Tensor:
    out: Tensor = WithPrevious.apply(x)  # type: ignore[no-untyped-call]
    return out


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one new token a row, q (R, H, 1, D): two batched products take half the time of the fused
    kernel, which is built for long queries."""
    rows, heads, _, d = q.shape
    scores = torch.bmm((q * d**-0.5).view(-1, 1, d), k.flatten(0, 1).transpose(1, 2)).view(rows, heads, 1, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.bmm(scores.softmax(-1).view(rows * heads, 1, -1), v.flatten(0, 1))


class ShiftAttention(nn.Module):
    """Multi-head attention whose queries and keys mix in the previous token."""

    def __init__(self, config: ShiftDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = config.hidden_size
        self.qk_proj = nn.Linear(2 * width, 2 * width, bias=False)  # [[C, D], [A, B]] of [x_t ; x_{t-1}]
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, step: _Step) -> Tensor:
        """What the heads see, (R, S, H*D), before out_proj."""
        value = self.v_proj(x)
        if step.padding is not None:
            x = x.masked_fill(step.padding, 0.0)
        if step.cache is not None and not hasattr(step.cache, "with_previous"):
            q, k, v = self._through_cache(x, value, step, step.cache)
        else:
            pairs = _with_previous(x) if step.cache is None else step.cache.with_previous(x, self.layer_idx)
            q, k = self.qk_proj(pairs).chunk(2, dim=-1)
            q, k, v = self._heads(q), self._heads(k), self._heads(value)
            if step.cache is not None:
                k, v = step.cache.update(k, v, self.layer_idx)
        if x.shape[1] == 1 and x.device.type == "cpu" and not torch.is_grad_enabled():
            return _attend_one(q, k, v, step.mask).reshape(x.shape)
        causal = step.mask is None and x.shape[1] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, is_causal=causal)
        return out.transpose(1, 2).reshape(x.shape)

    def _heads(self, x: Tensor) -> Tensor:
        """(R, S, H*D) -> (R, H, S, D)."""
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)

    def _through_cache(
        self, x: Tensor, value: Tensor, step: _Step, cache: Cache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (R, H, S, D) of the new tokens, keys and values (R, H, T, D) of all."""
        d, new = self.head_dim, x.shape[1]
        now, later = self.qk_proj.weight.chunk(2, dim=1)
        q, k = F.linear(x, now).chunk(2, dim=-1)
        q_next, k_next = F.linear(x, later).chunk(2, dim=-1)
        keys, values = cache.update(
            torch.cat([self._heads(k), self._heads(k_next)], dim=-1),
            torch.cat([self._heads(value), self._heads(q_next)], dim=-1),
            self.layer_idx,
        )
        keys, k_next = keys[..., :d], keys[..., d:]
        values, q_next = values[..., :d], values[..., d:]
        before = F.pad(q_next, (0, 0, 1, -1))[:, :, step.offset : step.offset + new]
        return self._heads(q) + before, keys + F.pad(k_next, (0, 0, 1, -1)), values


class ShiftDecoderLayer(nn.Module):
    """Pre-norm attention and a feed-forward block of ReLU units, which cost a CPU the least."""

    def __init__(self, config: ShiftDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.attention = ShiftAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: _Step, keep: Tensor | None = None) -> Tensor:
        """(R, S, W), or (T, W) of the flat positions `keep` alone, where all but attention is computed."""
        mixed = self.attention(self.attention_norm(x), step)
        if keep is not None:
            x, mixed = (t.flatten(0, 1).index_select(0, keep) for t in (x, mixed))
        x = x + self.attention.out_proj(mixed)
        units: Tensor = self.up_proj(self.mlp_norm(x))
        return x + self.down_proj(units.relu_())  # type: ignore[no-any-return]


class FinalNorm(nn.LayerNorm):
    """The norm before the head, a class of its own since it starts with another gain."""


class ShiftDecoderPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Initialisation and capabilities shared by the backbone and the language model."""

    config: ShiftDecoderConfig
    config_class = ShiftDecoderConfig
    base_model_prefix = "model"
    _no_split_modules = ("ShiftDecoderLayer",)
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, nn.LayerNorm):
            final = isinstance(module, FinalNorm)
            init.constant_(module.weight, self.config.final_norm_gain if final else 1.0)


class ShiftDecoderModel(ShiftDecoderPreTrainedModel):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: ShiftDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(ShiftDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = FinalNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        keep: Tensor | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """Final hidden states (R, S, H) of S new tokens a row, and the cache that now holds them.

        keep: i64 (T,) positions in the flattened (R, S); only their final states are computed, (T, H).

        attention_mask: (R, T) with 0 for padding, or a prepared (R, 1, S, T) mask, which says nothing about
        padding: with it no row may have padding before its tokens. A cache with a `columns` attribute (R, S)
        is written to at each row's own columns; any other must append.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        step = self._step(x, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            position_ids = self._positions(x.shape[1], attention_mask, step.offset)
        x = x + self.embed_positions(position_ids)
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, step, keep if i == len(self.layers) else None)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _step(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> _Step:
        if hasattr(cache, "with_previous"):
            return _Step(attention_mask, None, cache, 0)
        offset, padding = 0, None
        if cache is not None:
            length = cache.get_seq_length()
            if not isinstance(length, int) or cache.is_compileable:
                raise ValueError(f"{type(cache).__name__} does not append; use DynamicCache with this model")
            offset = length
        if attention_mask is None and offset == 0:
            return _Step(None, None, cache, offset)
        if attention_mask is not None and attention_mask.dim() == 2:
            padding = (attention_mask[:, -x.shape[1] :] == 0)[..., None]
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        return _Step(mask, padding, cache, offset)

    def _positions(self, new: int, attention_mask: Tensor | None, offset: int) -> Tensor:
        """(R or 1, S) positions that count only what the mask shows."""
        limit = self.config.max_position_embeddings
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -new:]
        if offset + new > limit:
            raise ValueError(f"{offset + new} tokens exceed the {limit} positions of this model")
        return torch.arange(offset, offset + new, device=self.embed_positions.weight.device)[None]


class ShiftDecoderForCausalLM(ShiftDecoderPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The token-shift decoder with its tied head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ShiftDecoderConfig) -> None:
        super().__init__(config)
        self.model = ShiftDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits (R, S, V), of the last `logits_to_keep` positions only when that is not 0; with `labels` (R, S), -100
        ignored, also transformers' next-token loss."""
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=kwargs.pop("inputs_embeds", None),
            use_cache=kwargs.pop("use_cache", None),
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoConfig.register(ShiftDecoderConfig.model_type, ShiftDecoderConfig, exist_ok=True)
AutoModel.register(ShiftDecoderConfig, ShiftDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(ShiftDecoderConfig, ShiftDecoderForCausalLM, exist_ok=True)
