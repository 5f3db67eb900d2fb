"""A real server whose versions are adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from mgrpo.engines.base import SamplingParams
from tests_vllm.kit import logprobs, prompts, reference, served

pytestmark = pytest.mark.timeout(900)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
RANK, ALPHA = 4, 8.0


def adapter(version: int, scale: float) -> dict[str, torch.Tensor]:
    """B = 0 at scale 0: an adapter that changes nothing."""
    noise = torch.Generator().manual_seed(version)
    tensors = {}
    for layer in range(30):
        name = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.default.weight"] = torch.randn(RANK, 576, generator=noise) * 0.05
        tensors[f"{name}.lora_B.default.weight"] = torch.randn(576, RANK, generator=noise) * scale
    return tensors


def test_adapters_are_served_by_version(tmp_path: Path) -> None:
    """Each version is its own adapter: tokens change, log-probs are those of W + scale B A in our own forward, and an
    adapter of zeros is the base model again."""
    policy = reference()
    asked = prompts(policy)[:4]
    lora = f'policy = {{ lora = {{ rank = {RANK}, alpha = {ALPHA}, targets = ["q_proj"] }} }}'
    with served(tmp_path, "lora", "bfloat16", lora) as live:
        outs = []
        for version, scale in enumerate((0.0, 0.15, 0.0)):
            assert live.load(safetensors.torch.save(adapter(version, scale))) == version
            outs.append(live.one_by_one(asked, GREEDY))
            assert {int(v) for o in outs[-1] for v in o.versions} == {version}
    first, changed, again = outs
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    merged = reference()
    tensors = adapter(1, 0.15)
    with torch.no_grad():
        for layer, block in enumerate(merged.model.model.layers):
            name = f"model.layers.{layer}.self_attn.q_proj"
            a, b = tensors[f"{name}.lora_A.default.weight"], tensors[f"{name}.lora_B.default.weight"]
            block.self_attn.q_proj.weight.add_(ALPHA / RANK * (b @ a))
    to_merged, to_base = (
        torch.cat(
            [
                (torch.from_numpy(o.logprobs) - logprobs(model, p, o, 1.0)[0]).abs()
                for p, o in zip(asked, changed, strict=True)
            ]
        ).mean()
        for model in (merged, policy)
    )
    print(f"|difference| in bfloat16 to the merged model {to_merged:.4f}, to the base model {to_base:.4f}")
    assert to_merged < 0.1 and to_base > 3 * to_merged  # bfloat16 alone moves log-probs by 0.04 on average
