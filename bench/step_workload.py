"""What a training step is measured on: model shapes with random weights, and the trajectories of a team's sub-agent.

The team step: questions of 2 rollouts each, whose sub-agents were called 2 and 3, 1 and 3, 2 and 3 times: 14 distinct
trajectories for 3 questions, 24 with the copies that d_max = 4 makes of them. The rollouts of every third question have
one reward, so 29 % of the trajectories have advantage 0. Lengths lie between 221 and 643 tokens, more short ones than
long ones; 42 % of each is masked: a prompt of 80 to 120 tokens, and results of tools between the turns.

Advantages, draw and rows are the project's own (`mgrpo.assign`, `mgrpo.Batcher`): mode "weights" gives each trajectory
once with its weight, "duplicate" gives the copies. Both are the same batch, and have the same gradient.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mgrpo import Batcher, GrpoLossConfig, assign
from mgrpo.alignment import Mode
from mgrpo.config.policy import PolicyConfig
from mgrpo.model.policy import Policy
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import logprobs_of

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "quick": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 8192},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny-qwen3": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip
UNTIED = ("qwen3-8b",)
"""Whose head is no embedding."""
LOSS = GrpoLossConfig(type="dapo", clip_eps_high=0.28)
NOISE = 0.02
"""Standard deviation of what a sampler's log-probs are off by, in nats: a tenth of the way to a bound of the clip."""
K, D_MAX = 2, 4
CALLS = ((2, 3), (1, 3), (2, 3))
"""Sub-agent calls of the two rollouts of a question, question after question; those of the second teach nothing."""
SHORTEST, LONGEST, MASKED = 221, 643, 0.42
QUESTION_TOKENS = (LONGEST - SHORTEST) / math.log(LONGEST / SHORTEST) * 14 / 3
"""Distinct tokens of a question, in the mean."""


def make_model(name: str, device: str) -> Any:
    """Random weights of the shape, or the weights in the folder `name`; float32."""
    torch.manual_seed(0)
    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    more = {"max_position_embeddings": 2048, "tie_word_embeddings": name not in UNTIED}
    with torch.device(device):
        if "qwen3" in name:
            return Qwen3ForCausalLM(Qwen3Config(**SHAPES[name], **more))
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name], **more))


def model_name(text: str) -> str:
    """A shape's name or a folder with a model. Raises argparse.ArgumentTypeError for anything else."""
    if text in SHAPES or (Path(text) / "config.json").is_file():
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a shape ({', '.join(SHAPES)}) nor a folder with config.json"
    )


def settings_of(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The agent's `policy` settings. kind: of attention."""
    out: dict[str, Any] = {"device": args.device, "attention": kind}
    out["dtype"] = "float32" if args.device == "cpu" else "bfloat16"
    if args.lora:
        out["lora"] = {"rank": args.lora, "alpha": 2.0 * args.lora}
    if args.checkpointing:
        out["gradient_checkpointing"] = True
    if args.compile:
        out["compile"] = True
    return out


def make_tokenizer(vocabulary: int) -> Any:
    """A token of its own for each id."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def make_policy(model: Any, settings: dict[str, Any]) -> Policy:
    tokenizer = make_tokenizer(model.config.vocab_size)
    return Policy(model, tokenizer, "bench", PolicyConfig.model_validate(settings))


def make_rows(tokens: int, vocabulary: int) -> MicroBatch:
    """About `tokens` tokens of distinct trajectories, sampled by a uniform policy (`sample` puts in a model's own
    log-probs)."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(221, 644, (max(2, tokens // 432),), generator=g)
    shape = (len(lengths), int(lengths.max()))
    inside = torch.arange(shape[1])[None] < lengths[:, None]
    mask = inside & (torch.arange(shape[1])[None] % 100 >= 42)
    advantages = torch.randn(shape[0], generator=g)
    advantages[torch.arange(shape[0]) % 7 < 2] = 0.0  # 29 %
    near = -torch.full(shape, float(torch.tensor(vocabulary).log()))
    ids = torch.randint(vocabulary, shape, generator=g)
    return MicroBatch(ids, mask, near, lengths, advantages, torch.ones(shape[0]))


def cut(rows: MicroBatch, size: int) -> list[MicroBatch]:
    """Micro-batches of at most `size` padded tokens, longest rows first, as the batcher cuts them."""
    order = rows.lengths.argsort(descending=True)
    parts, at = [], 0
    while at < len(order):
        n = max(1, size // int(rows.lengths[order[at]]))
        parts.append(rows.rows(torch.isin(torch.arange(len(order)), order[at : at + n])))
        at += n
    return parts


@dataclass(frozen=True, slots=True)
class Team:
    """The step's trajectories in both forms."""

    distinct: MiniBatch  # mode "weights"
    copies: MiniBatch  # mode "duplicate": the same batch

    def tokens(self) -> int:
        """Of the distinct trajectories."""
        return int(sum(m.lengths.sum() for m in self.distinct.micro))


def make_team(policy: Policy, tokens: int, micro_batch: int, scale: float = 1.0) -> Team:
    """About `tokens` tokens of distinct trajectories whose lengths are scaled by `scale`, in micro-batches of at most
    `micro_batch` padded tokens. Their log-probs are the policy's own, NOISE off.

    Raises ValueError where a micro-batch cannot hold the longest trajectory.
    """
    longest = round(LONGEST * scale)
    if micro_batch < longest:
        raise ValueError(f"micro_batch={micro_batch} is below the {longest} tokens of the longest trajectory")
    questions = max(1, round(tokens / (QUESTION_TOKENS * scale)))
    place = [(q, k, i) for q in range(questions) for k in range(K) for i in range(CALLS[q % 3][k])]
    rows = _trajectories(len(place), scale, policy.vocab_size)
    each = max(1, micro_batch // longest)
    for at in range(0, len(place), each):
        part = rows.rows((torch.arange(len(place)) >= at) & (torch.arange(len(place)) < at + each))
        sample(policy, [part])
        rows.rollout_logprobs[at : at + each, : part.ids.shape[1]] = part.rollout_logprobs
    reward = [0.5 if q % 3 == 1 else float((q + k + i) % 2) + 0.1 * i for q, k, i in place]
    query, rollout, invocation = zip(*place, strict=True)
    found = assign(query, "sub", rollout, invocation, reward, d_max=D_MAX, seed=0, step=0, group_size=K)
    return Team(
        *(_minibatch(mode, place, rows, found.advantage, micro_batch) for mode in ("weights", "duplicate"))
    )


def _trajectories(n: int, scale: float, vocabulary: int) -> MicroBatch:
    """n distinct trajectories, without advantages."""
    g = torch.Generator().manual_seed(1)
    spread = torch.linspace(math.log(SHORTEST), math.log(LONGEST), n, dtype=torch.float64).exp() * scale
    lengths = spread.round().long()[torch.randperm(n, generator=g)]
    mask = torch.zeros(n, int(lengths.max()), dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        masked = round(MASKED * length)
        prompt = min(masked, round(float(torch.randint(80, 121, (1,), generator=g)) * scale))
        mask[row, prompt:length] = True
        tool, free = masked - prompt, length - prompt
        for at in (prompt + free // 4, prompt + free * 5 // 8):  # two results of tools
            mask[row, at : at + tool // 2] = False
    ids = torch.randint(vocabulary, mask.shape, generator=g)
    return MicroBatch(ids, mask, torch.zeros(mask.shape), lengths, torch.zeros(n), torch.ones(n))


def _minibatch(
    mode: Mode, place: list[tuple[int, int, int]], rows: MicroBatch, advantages: Any, micro_batch: int
) -> MiniBatch:
    """What the batcher makes of the trajectories."""
    batcher = Batcher(K, D_MAX, micro_batch, role="sub", mode=mode)
    calls: dict[tuple[int, int], int] = {}
    for row, (query, rollout, invocation) in enumerate(place):
        length = int(rows.lengths[row])
        batcher.add(
            query, rollout, invocation, row, rows.ids[row, :length].int().numpy(),
            rows.loss_mask[row, :length].to(torch.uint8).numpy(), rows.rollout_logprobs[row, :length].numpy(),
            float(advantages[row]), 0,
        )  # fmt: skip
        calls[query, rollout] = calls.get((query, rollout), 0) + 1
    for (query, rollout), count in calls.items():
        batcher.seal(query, rollout, count)
    plan = batcher.plan(0)
    micro = []
    for number in range(plan.n_padded):
        buffers = plan.padded_buffers(0, number)
        batcher.write_padded(plan, 0, number, buffers)
        kept = buffers["lengths"] > 0
        found = {name: torch.from_numpy(np.ascontiguousarray(x[kept])) for name, x in buffers.items()}
        micro.append(
            MicroBatch(
                found["ids"].long(), found["loss_mask"] != 0, found["logprobs"], found["lengths"].long(),
                found["seg_advantage"], found["seg_weight"],
            )
        )  # fmt: skip
    return MiniBatch(micro, plan.weighted_tokens)


def sample(policy: Policy, micro: list[MicroBatch]) -> None:
    """Write the policy's own log-probs into the rollout's, NOISE off."""
    g = torch.Generator().manual_seed(2)
    for rows in micro:
        found = logprobs_of(policy, rows, LOSS.temperature).cpu()
        noise = NOISE * torch.randn(found.shape, generator=g)
        rows.rollout_logprobs[:, 1:][rows.active().mask] = found + noise


def join(parts: list[MicroBatch]) -> MicroBatch:
    """All rows of the micro-batches, padded to the widest."""
    width = max(part.ids.shape[1] for part in parts)

    def grown(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]))

    return MicroBatch(
        *(
            torch.cat([grown(getattr(p, name)) for p in parts])
            for name in ("ids", "loss_mask", "rollout_logprobs")
        ),
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("lengths", "advantages", "weights")),
    )


def computed_tokens(micro: list[MicroBatch], packed: bool) -> int:
    """Tokens of the largest micro-batch that go through the model: trajectories without an advantage stay out. Padded
    ones unless they are packed."""
    kept = [rows.rows(rows.with_advantage()).lengths for rows in micro]
    return max(int(x.sum()) if packed else int(x.max()) * len(x) for x in kept if len(x))
