"""Weights straight from two FSDP ranks into a real server's workers, over gloo."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mgrpo.engines.base import SamplingParams
from mgrpo.engines.client import ServerDown
from mgrpo.types import Probe
from mgrpo.weights.layout import Layout
from mgrpo.weights.version import Weights
from tests.direct_trainer import Trainer
from tests_vllm.kit import MODEL, START_SECONDS, Served, served

pytestmark = pytest.mark.timeout(900)
CLOSE = 1e-5  # nats, at most: float32 in two orders of summation, of a model of two layers
BUCKET = 4 << 20  # bytes: embedding and head are longer
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(5)
    if kind == "tied":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False))


async def healthy(live: Served) -> None:
    """The server has started."""
    while True:
        with contextlib.suppress(ServerDown):
            return await live.server.healthy()
        await asyncio.sleep(0.5)


def gap(live: Served, probe: Probe) -> float:
    """The largest difference to the trainer's log-probs, nats."""
    name = live.do(live.server.info()).model
    theirs = live.do(live.server.prompt_logprobs(name, probe.token_ids))
    return float(np.abs(np.asarray(theirs) - np.asarray(probe.logprobs)).max())


@pytest.mark.parametrize(("kind", "workers"), [("tied", 2), ("experts", 1)])
def test_the_server_samples_from_the_trainers_weights(tmp_path: Path, kind: str, workers: int) -> None:
    """Two FSDP ranks, one server of one or two tensor-parallel workers, three versions of a policy that moves: the
    log-probs are the trainer's, each token carries the version, and a server that was started again gets it."""
    start = tmp_path / "model"
    model_of(kind).save_pretrained(start)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(start)
    parallel = ["--tensor-parallel-size", str(workers)]
    parallel += ["--distributed-executor-backend", "mp"] if workers > 1 else []
    trainer = Trainer(tmp_path, BUCKET)
    try:
        with served(tmp_path, "gloo", "float32", arguments=parallel, model=start) as live:
            live.do(healthy(live))
            opened = trainer.do(
                "open",
                variant="untied",
                urls=[live.url],
                timeout=START_SECONDS,
                dtype="float32",
                start=str(start),
            )
            assert "error" not in opened, opened
            logprobs: list[float] = []
            for version in range(3):
                label = f"main.e1.v{version}"
                trainer.publish(label)
                probe = Probe(*(tuple(part) for part in trainer.do("probe")["found"]))
                moved = max((abs(a - b) for a, b in zip(logprobs, probe.logprobs, strict=False)), default=1.0)
                live.take(Weights(label, version, Layout(b"", ()), (), probe))
                found = gap(live, probe)
                print(
                    f"{kind}, {workers} workers, {label}: largest difference {found:.1e} nats, moved {moved:.1e}"
                )
                assert found < CLOSE < moved / 100, trainer.said + live.said
                (out,) = live.generate([list(probe.token_ids)], SamplingParams(max_tokens=4, temperature=0.0))
                assert out.versions.tolist() == [version] * 4
                logprobs = list(probe.logprobs)
                if version < 2:
                    trainer.do("train", step=version)
            assert not trainer.said and not live.said
    finally:
        trainer.close()
