"""One rank of a training with rows of sub-agents, for tests/test_trl_votes.py: python -m tests.trl_ranks MODEL OUT ROWS

Rank, size and the meeting place are in the environment, as torchrun sets them. Every other question's rollouts have the
same reward, so that a rank whose questions they are has nothing to learn from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests import trl_cases as cases

DEAD = 1
"""The question whose rollouts all have one reward."""


def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Two rollouts a prompt, made of the prompt and the rollout's number alone. The sub-agent is called 0 to 3 times.
    Where all rollouts have the same reward, the sub-agent's have it too."""
    seen: dict[str, int] = {}
    rows: list[list[dict[str, Any]]] = []
    prompt_ids, completion_ids, logprobs = [], [], []
    for prompt in prompts:
        at = seen[prompt] = seen.get(prompt, -1) + 1
        ids = [int(word[1:]) for word in prompt.split()]
        seed = 13 * ids[0] + 5 * at
        prompt_ids.append(ids)
        completion_ids.append([2 + (seed * k) % 40 for k in range(2, 4 + seed % 5)])
        logprobs.append([-1.0] * len(completion_ids[-1]))
        rows.append([sub_row(seed + 3 * call, call) for call in range(seed % 4)])
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": logprobs,
        "sub_rows": rows,
    }


def rollouts_alone(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The same without the sub-agent."""
    found = rollouts(prompts, trainer)
    found.pop("sub_rows")
    return found


def sub_row(seed: int, call: int) -> dict[str, Any]:
    length = 2 + seed % 4
    return {
        "prompt_ids": [2 + seed % 40, 3],
        "completion_ids": [2 + (seed * k) % 40 for k in range(1, 1 + length)],
        "logprobs": [-1.0] * length,
        "reward": lambda outcome: outcome if outcome == 0.5 else 0.5 * outcome + 0.1 * call,
    }


def score(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    dead = f"w{3 + DEAD} w{9 + DEAD}"
    return [
        0.5 if prompt == dead else (sum(ids) % 11) / 11
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def train(model: str, out: Path, rows: int, **more: Any) -> Any:
    from mgrpo.integrations.trl import MGRPOTrainer

    d_max = more.pop("d_max", 2)
    # A gradient that is 0 but for rounding is no step: with AdamW's own 1e-8 it would be a part of one.
    more = {"adam_epsilon": 1e-6, "max_steps": 3, **more}
    args = cases.arguments(
        out, per_device_train_batch_size=rows, num_generations=2, shuffle_dataset=False, **more
    )
    trainer = MGRPOTrainer(
        model, score, args, cases.prompts(6), rollout_func=rollouts, d_max=d_max, alignment="weights"
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, place, per_rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    done = train(folder, place, per_rank)
    if done.accelerator.is_main_process:
        weights = done.accelerator.unwrap_model(done.model).state_dict()
        torch.save({"weights": weights, "log": done.state.log_history}, place / "result.pt")
    torch.distributed.destroy_process_group()
