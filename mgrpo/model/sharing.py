"""Whether a policy can compute once what rows begin with (shared_rows.py): judged here and nowhere else.

By its configuration first, then by a try: three rows together must be what each is alone. The refusal is a sentence for
people; the policy then computes each row whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import architecture, attention
from mgrpo.model.attention import Kind
from mgrpo.model.shared_rows import HeldPrefix, IgnoredTreeError, share


def choose(
    model: Any, states: Callable[..., Tensor], config: PolicyConfig, device: torch.device, kind: Kind
) -> str | None:
    """Have `model`'s attention take prefix trees where config.share_prefixes asks for it. Why it cannot; None where it
    can or is not asked. states: backbone arguments -> hidden states (1, T, H). kind: how its rows are computed."""
    if not config.share_prefixes:
        return None
    if reason := _by_name(model, config, device):
        return reason
    if not attention.exchangeable(model):
        return attention.NO_INTERFACE
    before = model.config._attn_implementation
    try:
        attention.use_trees(model, kind)
        if _shares(states, device, config.dtype == "bfloat16"):
            return None
        reason = "rows that share a prefix are not what each is alone"
    except IgnoredTreeError:
        reason = attention.NO_INTERFACE
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    model.set_attn_implementation(before)
    return reason


def _by_name(model: Any, config: PolicyConfig, device: torch.device) -> str | None:
    described = model.config.to_dict()
    for side in ("cp", "tp"):
        if getattr(config.mesh, side) > 1:
            return f"mesh.{side}={getattr(config.mesh, side)} divides what a layer attends to"
    if config.aux_loss_coef:
        return f"aux_loss_coef={config.aux_loss_coef:g} balances the experts over every token of every row"
    if config.routing_replay:
        return "routing_replay sends a token where its own rollout was sent, and rollouts may differ in it"
    if kept := architecture.layer_kinds(described) - architecture.ATTENTION:
        return f"it has {', '.join(sorted(kept))} layers"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token"
    if windows := architecture.windows(described):
        name = min(windows)
        return f"it attends within {name}={windows[name]}"
    if kind := architecture.rotation_by_length(described):
        return f'its rope_type "{kind}" rotates a token by the length of what is computed together'
    if device.type != "cpu" and config.dtype == "float32":
        return 'attention over a prefix on a GPU computes in half precision, and policy.dtype is "float32"'
    return None


@torch.no_grad()
def _shares(states: Callable[..., Tensor], device: torch.device, half: bool) -> bool:
    """Whether a model computes a tree as it computes its rows: some architecture hands no such thing on to its
    attention, calls it twice in a layer, or mixes neighbours elsewhere. half: it computes in half precision."""
    rows = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]])
    lengths = torch.tensor([8, 6, 5])
    for prefix in (None, HeldPrefix.of(rows[0, :3], states, device)):
        held = 0 if prefix is None else len(prefix.ids)
        shared = share(rows, lengths, held, min_saved=1)
        assert shared is not None
        found, off = shared.forward(states, device, prefix), []
        for row, n, place in zip(rows, lengths.tolist(), shared.place, strict=True):
            alone = states(input_ids=row[None, :n].to(device))[0]
            off.append(attention.distance(found[place[held:n].to(device) - held], alone[held:]))
        far = torch.cat(off)
        # Half precision rounds products of other shapes otherwise, and may send a token to another expert.
        if not float(far.median() if half else far.max()) <= (0.1 if half else 1e-3):
            return False
    return True
