"""How a policy's attention is computed in training: chosen here and nowhere else.

    rows     one row a sequence, right-padded; rows of similar length share a forward (groups.py)
    sdpa     one row a sequence, right-padded, all in one forward
    varlen   all sequences in one row without padding, each seeing itself alone:
               on the CPU     scaled_dot_product_attention, sequence after sequence
               on a GPU       torch.nn.attention.varlen
    flash    the same through flash_attn_varlen_func of the package flash-attn

Packed attention is an attention function of transformers' AttentionInterface. Where a row begins and ends reaches it
under the names transformers has for that (cu_seq_lens_q, max_length_q). Called without them (generation, single rows)
it is plain causal attention.

What rows begin with may be computed once: the forward pass then brings a prefix tree (shared_rows.py) under the name
prefix_tree, whatever the kind.

varlen has run on an H100 (tests/test_gpu.py: six architectures, bfloat16, forward and backward; trees: four); flash on
no GPU yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import architecture
from mgrpo.model.shared_rows import TreeForward
from mgrpo.ops.tree_attention import Kernel
from mgrpo.ops.tree_kernels import CpuKernel, FlashKernel, VarlenKernel

Kind = Literal["rows", "sdpa", "varlen", "flash"]
PACKED: tuple[Kind, ...] = ("varlen", "flash")
NO_INTERFACE = "transformers cannot exchange its attention, which does not go through AttentionInterface"


def resolve(asked: str, device: str, dtype: str) -> Kind:
    """What `asked` ("auto" or a kind) means with this device and dtype. Raises ConfigError where it cannot work."""
    if asked == "auto":
        if device == "cpu":
            return "rows"
        if dtype == "float32":  # the packed kernels of a GPU compute in half precision only
            return "sdpa"
        return "flash" if flash_attn_varlen_func() is not None else "varlen"
    if asked == "flash" and device == "cpu":
        raise ConfigError('policy.attention "flash" needs policy.device "cuda"')
    if asked in PACKED and device != "cpu" and dtype == "float32":
        raise ConfigError(f'policy.attention "{asked}" on a GPU needs policy.dtype "bfloat16", not "float32"')
    if asked == "flash" and flash_attn_varlen_func() is None:
        raise ConfigError(
            'policy.attention "flash" needs the package flash-attn (pip install "mgrpo[flash]"), whose '
            'flash_attn_varlen_func does not import here; "varlen" needs no package'
        )
    if asked not in ("rows", "sdpa", *PACKED):
        raise ConfigError(f'policy.attention "{asked}" is not one of auto, rows, sdpa, varlen, flash')
    return asked


def choose(
    model: Any, states: Callable[..., Tensor], config: PolicyConfig, device: torch.device, name: str
) -> Kind:
    """Have `model` compute attention as `config` asks. states: backbone arguments -> hidden states. Raises ConfigError
    as resolve, and where the model does not keep packed sequences apart ("auto" then takes padded rows)."""
    kind = resolve(config.attention, device.type, config.dtype)
    if kind not in PACKED:
        return kind
    before = model.config._attn_implementation
    reason = _cannot_pack(model, kind, states, device, config.dtype == "bfloat16")
    if reason is None:
        return kind
    model.set_attn_implementation(before)
    if config.attention == "auto":
        return "sdpa"
    raise ConfigError(
        f'{name}: policy.attention "{kind}" packs sequences into one row, which {type(model).__name__} does not '
        f'keep apart ({reason}); use "rows" or "sdpa"'
    )


def _cannot_pack(
    model: Any, kind: Kind, states: Callable[..., Tensor], device: torch.device, half: bool
) -> str | None:
    """Why the model cannot compute packed rows as `kind`, which it computes as from then on; None where it can.

    Judged by the configuration first: with freshly made weights what leaks may be too little to see.
    """
    config = model.config.to_dict()
    if kept := architecture.layer_kinds(config) - architecture.ATTENTION:
        return f"it has {', '.join(sorted(kept))} layers"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token"
    windows = architecture.windows(config)
    if others := sorted(windows.keys() - {"sliding_window"}):
        return f"it attends within {others[0]}={windows[others[0]]} in a way of its own"
    if not exchangeable(model):
        return NO_INTERFACE
    try:
        use(model, kind)
        if packs(states, device, half):
            return None
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return str(error)
    return "two sequences together are not what each is alone"


def flash_attn_varlen_func() -> Callable[..., Any] | None:
    """flash-attn's function, if it imports. `import flash_attn` alone proves nothing: an empty folder satisfies it."""
    try:
        from flash_attn import flash_attn_varlen_func as function
    except ImportError:
        return None
    return function  # type: ignore[no-any-return]


def exchangeable(model: Any) -> bool:
    """Whether transformers' AttentionInterface exchanges the model's attention. Asked first, since a model that it does
    not reach logs a warning when it is told to use another."""
    known = getattr(model, "_can_set_attn_implementation", None)
    return known is None or bool(known())


def use(model: Any, kind: Kind) -> None:
    """Have `model` (a transformers model) compute its attention as `kind`; rows and sdpa leave it as it was loaded."""
    if kind not in PACKED:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    if kind == "varlen":
        _varlen_groups()
    name = f"mgrpo_packed_{kind}"
    AttentionInterface.register(name, {"varlen": _varlen, "flash": _flash}[kind])
    # None for causal attention without padding; where there is padding, the 2-D mask, which unpacked refuses.
    AttentionMaskInterface.register(name, flash_attention_mask)
    model.set_attn_implementation(name)


_groups_heads = False
"""Whether torch's varlen_attn takes fewer heads of keys than of queries (torch 2.11 does not). A global that is set
when a model is told to use it: torch.compile cannot trace the question."""


def use_trees(model: Any, kind: Kind) -> None:
    """Have `model` take prefix trees (shared_rows.py) beside the rows that it computes as `kind`. Packed attention does
    so anyway, and computes whole rows as "rows" and "sdpa" do."""
    use(model, kind if kind in PACKED else "varlen")


def _varlen_groups() -> None:
    global _groups_heads
    from torch.nn.attention.varlen import varlen_attn

    _groups_heads = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True, slots=True)
class Packed:
    """R sequences in one row of T tokens."""

    input_ids: Tensor  # i64 (1, T)
    positions: Tensor  # i64 (1, T), from 0 in each sequence
    cu_seqlens: Tensor  # i32 (R + 1,)
    longest: int
    inside: Tensor  # bool (R, S): where of the padded rows the tokens come from, row-major

    def to(self, device: torch.device) -> Packed:
        """On `device`, but for `inside`, which the host keeps."""
        ids, positions, borders = (x.to(device) for x in (self.input_ids, self.positions, self.cu_seqlens))
        return Packed(ids, positions, borders, self.longest, self.inside)

    def arguments(self) -> dict[str, Any]:
        """What a transformers backbone is called with."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.positions,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def pack(input_ids: Tensor, lengths: Tensor) -> Packed:
    """Right-padded rows input_ids (R, S) with lengths (R,), each 1..S, as one row without padding."""
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    inside = columns < lengths[:, None]
    return Packed(
        input_ids[inside][None],
        columns[inside][None],
        F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        int(lengths.max()),
        inside,
    )


@torch.no_grad()
def packs(states: Callable[..., Tensor], device: torch.device, half: bool) -> bool:
    """Whether a model computes a packed row as it computes its sequences alone: not every architecture passes the
    borders on to its attention, and a recurrent one could not use them. states: backbone arguments -> (R, S, H). half:
    it computes in half precision."""
    rows, lengths = _probe(device)
    together = states(**pack(rows, lengths).arguments())[0]
    others = rows.clone()
    others[0] = 1 - rows[0]
    first = int(lengths[0])
    # Products of the same shape: what another first sequence moves in the second is what leaks.
    leak = distance(states(**pack(others, lengths).arguments())[0][first:], together[first:])
    if not float(leak.median()) <= (1e-3 if half else 1e-5):
        return False
    off = distance(together, _alone(states, rows, lengths))
    # Half precision rounds products of other shapes otherwise, more so the deeper a model is.
    return float(off.median() if half else off.max()) <= (0.1 if half else 1e-3)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance of each token's hidden state (T, H) from the other, relative to its size."""
    off: Tensor = (a - b).float().norm(dim=-1) / b.float().norm(dim=-1).clamp(min=1e-6)
    return off


@torch.no_grad()
def check_padded(model: Any, states: Callable[..., Tensor], device: torch.device, name: str) -> None:
    """Raises ConfigError where right-padded rows without a mask are not computed as their sequences alone: the model
    looks ahead, or mixes rows."""
    rows, lengths = _probe(device)
    try:
        padded = states(input_ids=rows)
        together = torch.cat([padded[i, :n] for i, n in enumerate(lengths.tolist())])
        alone = _alone(states, rows, lengths)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{name}: {type(model).__name__} computes no hidden states from rows of token ids alone: {error}"
        ) from error
    off = distance(together, alone)
    # Half precision may send a token to another expert, so there the middle one decides.
    worst = float(off.max() if alone.dtype == torch.float32 else off.median())
    if not worst <= (1e-2 if alone.dtype == torch.float32 else 0.1):
        raise ConfigError(
            f"{name}: {type(model).__name__} does not compute a padded row as its sequence alone (hidden states differ "
            f"by {worst:.2g} of their size): it looks ahead or mixes rows; expected a causal language model"
        )


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two right-padded rows of the ids that every vocabulary has, and their lengths."""
    rows = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 1, 1, 0, 0, 0]], device=device)
    return rows, torch.tensor([8, 5], device=device)


def _alone(states: Callable[..., Tensor], rows: Tensor, lengths: Tensor) -> Tensor:
    """Hidden states (T, H) of each row by itself, without its padding."""
    return torch.cat([states(input_ids=rows[i : i + 1, :n])[0] for i, n in enumerate(lengths.tolist())])


def _varlen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """AttentionInterface function: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D)."""
    if (tree := kwargs.get("prefix_tree")) is not None:
        kernel = CpuKernel() if query.device.type == "cpu" else VarlenKernel()
        return _tree(module, query, key, value, tree, kernel, kwargs), None
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        return unpacked(module, query, key, value, attention_mask, **kwargs)
    refuse_what_is_not_computed(module, kwargs)
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    # A rotation may leave them in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu":
        parts = [
            _causal(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scale, window)
            for a, b in torch.as_tensor(borders).unfold(0, 2, 1).tolist()
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None
    from torch.nn.attention.varlen import varlen_attn

    longest = kwargs["max_length_q"]
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _groups_heads:
            grouped["enable_gqa"] = True
        else:  # torch 2.11
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    q, k, v = _flat(query, key, value)
    limits = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=limits, **grouped)
    assert isinstance(out, Tensor)
    return out[None], None


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As _varlen, through flash-attn."""
    if (tree := kwargs.get("prefix_tree")) is not None:
        return _tree(module, query, key, value, tree, FlashKernel(), kwargs), None
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        return unpacked(module, query, key, value, attention_mask, **kwargs)
    refuse_what_is_not_computed(module, kwargs)
    window, longest = kwargs.get("sliding_window"), kwargs["max_length_q"]
    function = flash_attn_varlen_func()
    assert function is not None
    out = function(
        *_flat(query.to(value.dtype), key.to(value.dtype), value),
        borders,
        borders,
        longest,
        longest,
        softmax_scale=kwargs.get("scaling"),
        causal=True,
        window_size=(-1 if window is None else window - 1, 0 if window else -1),
    )
    return out[None], None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tree(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeForward,
    kernel: Kernel,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention over a prefix tree: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D)."""
    refuse_what_is_not_computed(module, kwargs)
    if value.shape[-1] != key.shape[-1]:  # latent attention, but for its small configurations
        raise ConfigError(
            f"{type(module).__name__} has {key.shape[-1]} numbers a head in its keys and {value.shape[-1]} in its "
            "values, and attention over a prefix tree takes heads of one size"
        )
    scale = kwargs.get("scaling")
    # A rotation may leave them in float32.
    q, k, v = _flat(query.to(value.dtype), key.to(value.dtype), value)
    return tree.attend(module, q, k, v, query.shape[-1] ** -0.5 if scale is None else scale, kernel)[None]


def _flat(*states: Tensor) -> list[Tensor]:
    """(1, H, T, D) -> (T, H, D) each."""
    return [x[0].transpose(0, 1) for x in states]


def unpacked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Whole rows: causal without a mask, else as the prepared 4-D mask says."""
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f"packed attention takes no padding mask of shape {tuple(attention_mask.shape)}; pad behind the tokens "
            "and give no mask, or give a 4-D one"
        )
    window = kwargs.get("sliding_window")
    if attention_mask is None and window is not None and query.shape[2] > window:
        refuse_what_is_not_computed(module, kwargs)
        return _causal(query, key, value, kwargs.get("scaling"), window).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Causal attention of whole rows, query (R, H, T, D), key and value (R, G, T, D), within `window` tokens."""
    t = query.shape[2]
    mask = None
    if window is not None and t > window:
        ahead = torch.arange(t, device=query.device)[:, None] - torch.arange(t, device=query.device)
        mask = (ahead >= 0) & (ahead < window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def refuse_what_is_not_computed(module: Any, kwargs: dict[str, Any]) -> None:
    """A model that asks for more than causal softmax attention must not silently get less."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"{type(module).__name__} asks its attention for {name}, which packed rows do not compute"
            )
    if kwargs.get("dropout"):
        raise ConfigError(
            f"{type(module).__name__} asks for dropout {kwargs['dropout']}: a policy is trained without"
        )
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ConfigError(f"{type(module).__name__} is not causal: expected a causal language model")
