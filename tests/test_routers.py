"""Routers by a configuration alone, against those of the models themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mgrpo.errors import ConfigError
from mgrpo.model.architecture import has_experts
from mgrpo.model.moe import routers_of
from mgrpo.model.routers import Routing, routing_of
from mgrpo.run.launch import _check_reported
from mgrpo.trajectory_log.format import MAX_EXPERTS
from tests.families import FAMILIES, family

MIXTURES = [
    "MiniMaxM2", "Llama4Text", "Lfm2Moe", "Qwen3Next", "Glm4Moe", "GptOss", "Qwen3Moe", "Qwen2Moe", "Mixtral",
    "DeepseekV2", "DeepseekV3", "Olmoe",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in MIXTURES),
        ("Qwen3Moe", {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]}),
        ("Qwen2Moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2}),
        ("Qwen3Next", {"num_hidden_layers": 4, "layer_types": None, "mlp_only_layers": [2]}),
        ("Llama4Text", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "moe_layers": None}),
        ("DeepseekV3", {"num_hidden_layers": 4, "first_k_dense_replace": 3}),
    ],
)
def test_routers_are_where_the_model_has_them(name: str, changes: dict[str, Any]) -> None:
    """Layers, number of experts and of those of a token, of every kind of mixture that is built here."""
    model = family(name, **changes)
    routers = routers_of(model)
    found = routing_of(model.config.to_dict(), name)
    places = [int(re.findall(r"\.(\d+)\.", router.name)[0]) for router in routers]
    assert places and found.places == tuple(places) and found.layers == model.config.num_hidden_layers
    assert (found.experts, found.chosen) == (2, 1)


def test_every_mixture_of_the_families_is_among_them() -> None:
    """A family that is added with experts is added above."""
    assert {n for n in FAMILIES if "vision_config" not in FAMILIES[n] and has_experts(FAMILIES[n])} == set(
        MIXTURES
    )


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, (1, 2)),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, (2,)),
        ({"moe_layer_freq": [0, 1, 1, 0]}, (1, 2)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1}, (1, 2)),
        ({"moe_layer_end_index": -1}, (0, 1, 2, 3)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3)),
    ],
)
def test_settings_that_name_layers(settings: dict[str, Any], places: tuple[int, ...]) -> None:
    config = {"num_hidden_layers": 4, "num_experts": 300, "num_experts_per_tok": 8, **settings}
    assert routing_of({"text_config": config}, "x") == Routing(4, places, 300, 8)


def test_a_dense_model_has_none() -> None:
    with pytest.raises(ConfigError, match=r"main: policy\.routing_replay = true needs a mixture of experts"):
        routing_of({"num_hidden_layers": 4}, "main")


def test_experts_that_would_not_travel_are_refused_at_launch(tmp_path: Path) -> None:
    """A longest trajectory whose experts one message does not take: 58 routers x 8 of 256 experts x 2 bytes a token."""
    config = {
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert routing_of(config, "main").token_bytes == 928
    most = MAX_EXPERTS // 928
    _check_reported(tmp_path, "agents.main", most)
    with pytest.raises(
        ConfigError, match=rf"agents\.main\.policy\.routing_replay=true .*{most + 1}: .* {most}$"
    ):
        _check_reported(tmp_path, "agents.main", most + 1)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_routed_experts": 255}))
    _check_reported(tmp_path, "agents.main", most * 2)
