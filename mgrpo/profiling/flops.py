"""FLOPs of a model's training step, counted from its architecture: what model FLOPs utilisation (MFU) is made of.

    forward     2 m n k of each product (m, k) x (k, n)
    backward    the same once more for each operand that has a gradient: its input where something below it trains, its
                weight where that trains. So adapters, frozen layers and frozen embeddings cost what they cost
    attention   Q K^T and P V of the pairs (query, key) that a causal mask, or a sliding window, lets through
    prefixes    that rows share once, where the policy computes them once (ModelFlops.of_nodes): the tokens of a node
                and their pairs with its ancestors' and its own
    experts     of a mixture, the k experts of a token and the router
    head        of scored tokens alone, in the rows that are tokens

The products are those that the model's own code asks for: it runs twice, over 8 and 16 tokens of a copy without
weights (torch's meta device, nothing is computed), and every product is noted with its operands. What doubles is of a
token, what quadruples of a pair of tokens. Neither ranks nor shards nor kernels change the count.

Conventions, as Megatron-LM has them (torchtitan and PaLM count attention without the causal mask, twice as much):

1. What is computed again (gradient checkpointing, the head's chunks, attention's scores in its backward pass, the count
   of a load-balancing loss) counts once; padding counts nothing. Old and reference log-probs are forward passes of the
   algorithm and do count (trainers/torch/cost.py).
2. Products alone count: norms, activations, softmax, the optimizer and the merge of experts' adapters do not.
3. What a model computes for scored positions alone (our own decoder's last layer) counts for these.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import architecture, lora, moe
from mgrpo.model.head_guard import backbone_of
from mgrpo.model.trained import choose_trained, decoder_layers

SHORT, LONG = 8, 16
"""Tokens of the two passes."""


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of a forward pass and of its backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> Cost:
        """Of `count` as much."""
        return Cost(self.forward * count, self.backward * count)


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a policy's passes cost."""

    token: Cost
    """Of a token that enters the model."""
    scored: Cost
    """Of a token whose log-prob is taken: the head's."""
    pairs: Mapping[int | None, Cost]
    """Of a pair (query, key), all layers together that attend within so many tokens; None: to all before."""

    def of_nodes(self, nodes: Iterable[tuple[int, int]], scored: int) -> Cost:
        """Of the nodes (begin, end) of prefix trees, each computed once: its tokens from `begin` to `end` of a row,
        which attend to the `begin` tokens of its ancestors too. scored: as of(), where a token that ends the prefix of
        several rows counts for each of them."""
        parts = list(nodes)
        cost = self.token.times(sum(end - begin for begin, end in parts)) + self.scored.times(scored)
        for window, pair in self.pairs.items():
            cost += pair.times(sum(_pairs(end, window) - _pairs(begin, window) for begin, end in parts))
        return cost

    def of(self, lengths: Sequence[int], scored: int, causal: bool = True) -> Cost:
        """Of rows with `lengths` tokens that enter the model and `scored` tokens whose log-probs are taken. causal
        False: all pairs of a row, as attention with a mask computes them."""
        cost = self.token.times(sum(lengths)) + self.scored.times(scored)
        for window, pair in self.pairs.items():
            cost += pair.times(sum(_pairs(n, window) if causal else n * n for n in lengths))
        return cost


def _pairs(length: int, window: int | None) -> int:
    """Pairs (query, key) of a causal row in which a query sees at most `window` keys, its own among them."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def flops_of(
    config: Any, policy: PolicyConfig | None = None, vocabulary: int | None = None
) -> tuple[ModelFlops, ModelFlops]:
    """Of a policy with this transformers configuration, and of the model below its adapters, with no backward pass: its
    reference. policy: what of it trains (default: everything). vocabulary: rows of the head that are tokens (default:
    all). Raises ConfigError for an architecture whose FLOPs this does not know."""
    name = f"FLOPs of {type(config).__name__}"
    policy = policy or PolicyConfig()
    try:
        model = _blank_model(config)
        head = model.get_output_embeddings().weight
        whole = not policy.lora.rank and not policy.last_layers
        choose_trained(model, policy, name)
        trained = _count(model, name, _head_cost(head, vocabulary, whole))
        # Without adapters there is no need of peft, which takes a while to import.
        with lora.adapters_off(model) if policy.lora.rank else nullcontext(), torch.no_grad():
            base = _count(model, name, _head_cost(head, vocabulary, whole))
    except ConfigError:
        raise
    except Exception as error:  # of the model's own code, for which anything goes
        raise ConfigError(f"{name} are not known: its code does not run without data: {error}") from error
    return trained, base


def _blank_model(config: Any) -> Any:
    """Without weights. Its attention is SDPA, whose arguments say what it computes."""
    from transformers import AutoModelForCausalLM
    from transformers import initialization as init

    copy = type(config).from_dict(config.to_dict())
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(
            copy, dtype=torch.bfloat16
        )  # grouped products take nothing else
    if moe.experts_of(model) and getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("grouped_mm")
    return model.eval()


def _head_cost(weight: Tensor, vocabulary: int | None, whole: bool) -> Callable[[bool], Cost]:
    """Of a scored token; the argument: whether its hidden state has a gradient."""
    product = 2.0 * (vocabulary or weight.shape[0]) * weight.shape[1]

    def of(gradient: bool) -> Cost:
        trained = weight.requires_grad and torch.is_grad_enabled()
        return Cost(product, product * (gradient + trained))

    return of


@dataclass(slots=True)
class _Product:
    """One product of a pass. layer: the decoder layer that asks for it; -1: none."""

    layer: int
    cost: Cost


def _count(model: Any, name: str, head: Callable[[bool], Cost]) -> ModelFlops:
    short, long = (_products(model, n, name) for n in (SHORT, LONG))
    if len(short.found) != len(long.found):
        raise ConfigError(f"{name} are not known: the number of its products depends on the number of tokens")
    windows = _windows(model.config.to_dict(), len(decoder_layers(model, name)), name)
    token, once, pairs = Cost(), Cost(), dict.fromkeys(windows, Cost())
    for a, b in zip(short.found, long.found, strict=True):
        ratio = b.cost.forward / a.cost.forward
        if ratio == LONG / SHORT:
            token += a.cost.times(1 / SHORT)
        elif ratio == (LONG / SHORT) ** 2 and a.layer >= 0:
            pairs[windows[a.layer]] += a.cost.times(1 / SHORT**2)
        elif ratio == 1:  # of the one kept position, or no matter of tokens at all
            once += a.cost
        else:
            raise ConfigError(
                f"{name} are not known: a product of layer {a.layer} grows {ratio:g}-fold with twice the tokens"
            )
    if not any(cost.forward for cost in pairs.values()):
        raise ConfigError(
            f"{name} are not known: no product of it is attention, so it mixes tokens in another way"
        )
    scored = head(short.gradient) + (once if short.keeps else Cost())
    return ModelFlops(token, scored, {window: cost for window, cost in pairs.items() if cost.forward})


def _windows(config: Mapping[str, Any], layers: int, name: str) -> list[int | None]:
    """Of each layer, within how many tokens it attends; None: no bound."""
    if kept := architecture.layer_kinds(config) - architecture.ATTENTION:
        raise ConfigError(f"{name} are not known: it has {', '.join(sorted(kept))} layers")
    found = architecture.windows(config)
    if others := sorted(found.keys() - {"sliding_window"}):
        raise ConfigError(f"{name} are not known: it attends within {others[0]}={found[others[0]]}")
    window = found.get("sliding_window")
    kinds = architecture.text_of(config).get("layer_types") or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


@dataclass(slots=True)
class _Pass:
    found: list[_Product] = field(default_factory=list)
    gradient: bool = False
    """Whether the hidden states have one."""
    keeps: bool = False
    """Whether the last layer computed one position alone."""


def _products(model: Any, tokens: int, name: str) -> _Pass:
    """Every product of a forward pass over one row."""
    backbone = backbone_of(model, name)
    watch = _Watch()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: watch.enter(number))
        for number, layer in enumerate(decoder_layers(model, name))
    ]
    arguments: dict[str, Any] = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64, device="meta")}
    keeps = "keep" in inspect.signature(backbone.forward).parameters
    if keeps:
        arguments["keep"] = torch.zeros(1, dtype=torch.int64, device="meta")
    else:  # where there is no mask, transformers looks at numbers to make one
        arguments["attention_mask"] = torch.zeros(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
        arguments["position_ids"] = torch.arange(tokens, device="meta")[None]
    try:
        with torch.device("meta"), watch:
            hidden = backbone(**arguments, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return _Pass(watch.found, bool(hidden.requires_grad), keeps)


class _Watch(TorchFunctionMode):
    """Notes the products that are asked for inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Product] = []
        self._layer = -1

    def enter(self, layer: int) -> None:
        """What follows is of this decoder layer."""
        self._layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if func is F.scaled_dot_product_attention:
            self._attention(*args[:3], **{k: v for k, v in kwargs.items() if k in ("query", "key", "value")})
        elif name in _OPERANDS:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self._product(*_OPERANDS[name](tensors))
        elif name in _REFUSED:
            raise ConfigError(f"FLOPs are not known: it asks for {name}, whose products are not counted")
        return func(*args, **kwargs)

    def _product(self, a: Tensor, b: Tensor, flops: float) -> None:
        self._add(flops, _has_gradient(a) + _has_gradient(b))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """query (R, H, T, D), key and value (R, G, T, D)."""
        pairs = 2.0 * math.prod(query.shape[:-1]) * key.shape[-2]
        scores = _has_gradient(query) or _has_gradient(key)
        self._add(pairs * query.shape[-1], _has_gradient(query) + _has_gradient(key))
        self._add(pairs * value.shape[-1], scores + _has_gradient(value))

    def _add(self, flops: float, gradients: int) -> None:
        if flops:
            self.found.append(_Product(self._layer, Cost(flops, flops * gradients)))


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _linear(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """x (..., k), weight (n, k)."""
    x, weight = tensors[:2]
    return x, weight, 2.0 * x.numel() * weight.shape[0]


def _matmul(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """a (..., m, k), b (..., k, n), broadcast."""
    a, b = tensors[-2:]
    if a.dim() < 2 or b.dim() < 2:
        return a, b, 2.0 * max(a.numel(), b.numel())
    batch = max(math.prod(a.shape[:-2]), math.prod(b.shape[:-2]))
    return a, b, 2.0 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """x (T, k), weight (E, k, n), offsets: each row meets one matrix."""
    x, weight = tensors[:2]
    return x, weight, 2.0 * x.numel() * weight.shape[-1]


_OPERANDS = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm"), _matmul),
    **dict.fromkeys(("grouped_mm", "grouped_mm_fallback"), _grouped),
}
_REFUSED = ("rmatmul", "einsum", "conv1d", "conv2d", "tensordot", "bilinear", "scaled_mm")
