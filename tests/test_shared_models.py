"""Which models compute shared prefixes once, by their architecture: those that do have the gradient of whole rows, the
others say why and compute whole rows as if nobody had asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.model import sharing
from mgrpo.model.policy import Policy
from tests.families import FAMILIES, family
from tests.models import tiny_model, tiny_tokenizer
from tests.shared_kit import (
    embedded,
    furthest,
    gradients,
    micro_batch,
    policies,
    sampled_near,
    saved_tokens,
    share_everything,
    shared_model,
    tree_of_tokens,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # transformers', of ids and kernels of tiny models
]
WHY_NOT = {
    "Gemma3Text": "sliding_window=128",
    "Olmo3": "sliding_window=128",
    "Gemma3": "sliding_window=128",
    "GptOss": "sliding_window=128",
    "GPTNeo": "window_size=8",
    "Llama4Text": "chunked_attention layers",
    "Qwen3_5": "linear_attention layers",
    "Qwen3Next": "linear_attention layers",
    "Lfm2": "conv layers",
    "Lfm2Moe": "conv layers",
    "Mamba": "carry a state",
    "Rwkv": "carry a state",
    "FalconH1": "carry a state",
    "Bamba": "carry a state",
    "Bloom": "AttentionInterface",  # no attention function: only the try shows it
    "Mpt": "AttentionInterface",
}
NO_POLICY = ("Gemma2", "Granite", "Cohere", "Phi", "GPTJ", "Bert")
SHARING = [name for name in FAMILIES if name not in WHY_NOT and name not in NO_POLICY]


def pair(name: str, **changes: Any) -> tuple[Policy, Policy]:
    configs = (PolicyConfig(share_prefixes=share) for share in (False, True))
    plain, shared = (Policy(family(name, **changes), tiny_tokenizer(), name, c) for c in configs)
    return plain, shared


@pytest.mark.parametrize("name", SHARING)
def test_architectures_that_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated, learned and no positions, latent keys, experts, norms of queries: gradients to 1e-5 of the largest, from
    a single forward pass over the tree."""
    share_everything(monkeypatch)
    plain, shared = pair(name)
    assert shared.shares, shared.why_not
    g = np.random.default_rng(1)
    rows = sampled_near(plain, micro_batch(tree_of_tokens(g, 3, 3, 8), g), g)
    rows.advantages[rows.advantages == 0] = 0.3
    with embedded(shared) as computed:
        found, _ = gradients(shared, [rows], GrpoLossConfig())
    assert computed == [int((rows.lengths - 1).clamp(min=1).sum()) - saved_tokens(rows)]
    assert furthest(found, gradients(plain, [rows], GrpoLossConfig())[0]) < 1e-5


@pytest.mark.parametrize("name", [*WHY_NOT, "Mistral"])
def test_architectures_that_do_not_share(name: str) -> None:
    """A reason, and hidden states that are those of share_prefixes=false bit for bit."""
    changes = {"sliding_window": 16} if name == "Mistral" else {}
    plain, policy = pair(name, **changes)
    assert not policy.shares and WHY_NOT.get(name, "sliding_window=16") in (policy.why_not or "")
    assert policy.attention == plain.attention
    ids, lengths = (
        torch.randint(100, (3, 12), generator=torch.Generator().manual_seed(0)),
        torch.tensor([12, 9, 5]),
    )
    ids[:, :4] = ids[0, :4]
    scored = torch.arange(1, 12) < lengths[:, None]
    with torch.no_grad():
        found, expected = (p.hidden_before(ids, lengths, scored) for p in (policy, plain))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dynamic", {"factor": 4.0}),
        ("longrope", {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}),
        ("yarn", {"factor": 4.0}),
        ("linear", {"factor": 2.0}),
    ],
)
def test_positions_that_are_rotated_by_a_length(kind: str, settings: dict[str, Any]) -> None:
    """A held prefix is shorter than its rows, so a rotation that goes by the length of a forward pass would be another
    for it: no shared prefix with such. With the others hidden states behind a held prefix are those of whole rows."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 32, **settings}
    plain, policy = pair("Llama", max_position_embeddings=64, rope_parameters=rope)
    if kind in ("dynamic", "longrope"):
        assert not policy.shares and f'rope_type "{kind}" rotates' in (policy.why_not or "")
        return
    ids = torch.randint(100, (3, 58), generator=torch.Generator().manual_seed(0))
    ids[:, :28] = ids[0, :28]
    scored = torch.arange(1, 58).expand(3, 57) >= 28
    with torch.no_grad():
        found = policy.hidden_before(ids, torch.full((3,), 58), scored, policy.hold(ids[0, :28]))
        assert (found - plain.hidden_before(ids, torch.full((3,), 58), scored)).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["cp", "tp"])
def test_a_mesh_that_divides_a_row_does_not_share(side: str) -> None:
    """Neither asks the model anything."""

    def states(**_: Any) -> Any:
        raise AssertionError("no forward pass is taken")

    config = PolicyConfig.model_validate({"mesh": {side: 2}})
    reason = sharing.choose(shared_model("llama"), states, config, torch.device("cpu"), "sdpa")
    assert reason is not None and f"mesh.{side}=2" in reason


def test_the_token_shift_decoder_does_not_share() -> None:
    """Atlas' own decoder mixes each token with the one before it."""
    policy = Policy(tiny_model("shift"), tiny_tokenizer(), "shift", PolicyConfig())
    assert policy.config.share_prefixes and not policy.shares and policy.why_not


def test_switched_off_by_its_setting() -> None:
    """Without share_prefixes nothing is shared, and nothing can be held."""
    plain, shared = policies("llama")
    assert not plain.shares
    assert shared.shares and not shared.why_not
    with pytest.raises(ValueError, match="share_prefixes=false"):
        plain.hold(torch.tensor([1, 2]))
