"""Which layers of a mixture of experts have a router, and of how many experts it chooses: from a configuration alone.

Servers report the experts of a token for every decoder layer, layers without a router included; the trainer counts
routers. Like architecture.py this reads plain dictionaries and imports neither torch nor transformers. The answers of a
server are compared with it (mgrpo/engines/routed.py), so a layout that it does not know is found out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgrpo.errors import ConfigError
from mgrpo.model.architecture import EXPERTS, text_of

_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
)
"""How configurations call the number of experts of a token."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers")  # so many layers, the first, have no experts


@dataclass(frozen=True, slots=True)
class Routing:
    """The routers of a model: `places` are the decoder layers, of `layers`, that have one, in order; each sends a token
    to `chosen` of `experts` experts."""

    layers: int
    places: tuple[int, ...]
    experts: int
    chosen: int

    @property
    def token_bytes(self) -> int:
        """Of what all routers choose for one token: see mgrpo.types.Experts."""
        return len(self.places) * self.chosen * (1 if self.experts <= 255 else 2)


def routing_in(folder: Path, name: str) -> Routing:
    """Of the policy in a folder that has a config.json: see routing_of."""
    return routing_of(json.loads((folder / "config.json").read_text(encoding="utf-8")), name)


def routing_of(config: Mapping[str, Any], name: str) -> Routing:
    """Of a config.json. name: of the policy, for errors. Raises ConfigError for a model without experts, or one that
    does not say how many a token has."""
    text = text_of(config)
    layers, experts, chosen = (_number(text, names) for names in (_LAYERS, EXPERTS, _CHOSEN))
    if not layers or not experts or not chosen:
        raise ConfigError(
            f"{name}: policy.routing_replay = true needs a mixture of experts; config.json has {layers} layers, "
            f"{experts} experts, {chosen} of them for a token"
        )
    places = tuple(layer for layer in range(layers) if _has_router(text, layer))
    return Routing(layers, places, experts, chosen)


def _has_router(text: Mapping[str, Any], layer: int) -> bool:
    """Whether the decoder layer, counted from 0, has experts."""
    kinds, listed = text.get("mlp_layer_types"), text.get("moe_layers")
    if isinstance(kinds, list):
        return layer < len(kinds) and kinds[layer] != "dense"
    if isinstance(listed, list):
        return layer in listed
    frequency = text.get("moe_layer_freq")
    if isinstance(frequency, list) and layer < len(frequency) and not frequency[layer]:
        return False
    if any(layer < (_number(text, (name,)) or 0) for name in _DENSE_FIRST):
        return False
    end = text.get("moe_layer_end_index")
    if layer < (_number(text, ("moe_layer_start_index",)) or 0) or (
        isinstance(end, int) and -1 < end < layer
    ):
        return False
    every = _number(text, ("decoder_sparse_step", "moe_layer_interval")) or 1
    return (
        layer not in (text.get("mlp_only_layers") or ())
        and (layer + 1) % every == 0
        and layer % (_number(text, ("moe_layer_freq",)) or 1) == 0
        and layer % (period := _number(text, ("expert_layer_period",)) or 1)
        == (_number(text, ("expert_layer_offset",)) or 0) % period
    )


def _number(text: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the settings that is a count above 0."""
    found = (text.get(name) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
