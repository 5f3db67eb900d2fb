"""What one of four ranks does in tests/test_divided_head.py: `python -m tests.divided_head_ranks FOLDER`, started once.

Rank 0 leaves what a step found in FOLDER/found.pt, each rank its calls in FOLDER/calls-RANK.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.model.policy import Policy
from mgrpo.ops import head
from mgrpo.ops.divided_head import TokenShare, divided_grpo_loss, own_rows
from mgrpo.ops.selective_logprob import selective_logprob
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.base import Demos
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, logprobs_of
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.sft import demo_loss
from tests.fsdp_ranks import cut
from tests.loss_grid import configs, head_batch, settings
from tests.mesh_ranks import model_of
from tests.models import tiny_tokenizer
from tests.rows import rows_of

RANKS = 4
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SIZES = (2, 3, 4)
LENGTHS = (0, 1, 3, 37, 150)
"""T of the random batches."""
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tp": ("llama", {"mesh": {"dp": 2, "tp": 2}}),
    "tp, whole head": ("llama", {"mesh": {"dp": 2, "tp": 2}}),
    "tp, tied": ("qwen3", {"mesh": {"replicate": 2, "tp": 2}}),
    "cp": ("llama", {"mesh": {"dp": 2, "cp": 2}}),
    "cp, tied": ("qwen3", {"mesh": {"cp": 4}}),
}


def losses() -> list[GrpoLossConfig]:
    """The grid's, and one of a user's."""
    own = GrpoLossConfig(type="tests.own_losses:Pull", options={"spring": 0.3, "entropy": 0.05})
    return [*configs(), settings("gspo", kl_coef=0.1, entropy_coef=0.02), own]


def random_batch(total: int, seed: int) -> dict[str, Tensor]:
    """Trajectories of random lengths, none and one among them, with `total` tokens."""
    g = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, total + 1, (4,), generator=g).sort().values
    edges = torch.cat([torch.tensor([0]), inner, torch.tensor([total])])
    logprobs = -4 - torch.rand(3, total, generator=g, dtype=torch.float64)
    rollout = logprobs[2].float()
    rollout[:: max(1, total // 3)] = float("nan")  # the sampler reported none
    return {
        "hidden": torch.randn(total, 16, generator=g, dtype=torch.float64),
        "weight": torch.randn(61, 16, generator=g, dtype=torch.float64) * 0.3,
        "target_ids": torch.randint(0, 61, (total,), generator=g),
        "cu_seqlens": edges.to(torch.int32),
        "token_advantages": torch.randn(total, generator=g),
        "seq_weight": torch.rand(len(edges) - 1, generator=g),
        "old_logprobs": logprobs[0].float(),
        "ref_logprobs": logprobs[1].float(),
        "rollout_logprobs": rollout,
    }


def batches() -> Iterator[tuple[str, dict[str, Tensor], GrpoLossConfig, tuple[torch.dtype, ...]]]:
    """(name, data, loss, dtypes) of every call. weight is float32 beside hidden states in bfloat16."""
    some = (torch.float32, torch.bfloat16)
    for number, loss in enumerate(losses()):
        data = head_batch(66, 16, torch.float64)
        dtypes = some[:1] if number % 4 else DTYPES
        if number % 2 == 0 or loss.veto is not None:
            yield f"grid {number}", data, loss, dtypes
        if (
            number % 2 == 1 or loss.veto is not None
        ):  # its correction then needs log-probs of whole trajectories
            yield (
                f"grid {number}, no old",
                {k: v for k, v in data.items() if k != "old_logprobs"},
                loss,
                dtypes,
            )
    for total in LENGTHS:
        data = random_batch(total, total)
        own = data.pop("token_advantages")
        whole = torch.randn(len(data["cu_seqlens"]) - 1, generator=torch.Generator().manual_seed(1))
        dapo = settings("dapo", correction="token_tis", kl_coef=0.1)
        dtypes = DTYPES if total == 37 else some[:1]
        yield f"{total} tokens", data | {"token_advantages": own}, dapo, dtypes
        yield f"{total} tokens, gspo", data | {"advantages": whole}, settings("gspo"), dtypes
    data = random_batch(37, 3)
    data["hidden"][5, 0] = float("nan")  # a row that is not finite, on one rank, counts on all
    yield "not finite", data, settings("dapo"), some
    whole = torch.ones(len(data["cu_seqlens"]) - 1)
    del data["token_advantages"]
    yield "not finite, gspo", data | {"advantages": whole}, settings("gspo"), some


def sizes_of(number: int, name: str) -> tuple[int, ...]:
    """The groups that take a batch: one for each of the grid's, which are many, and all for the others."""
    return (SIZES[number % len(SIZES)],) if name.startswith("grid") else SIZES


def operands(data: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(hidden, weight, the other arguments), the first two leaves; beside bfloat16 the weight is float32, as a
    trainer's."""
    hidden, weight = data["hidden"].to(dtype), data["weight"].to(dtype)
    weight = weight.float() if dtype == torch.bfloat16 else weight.clone()
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")}
    return hidden.clone().requires_grad_(), weight.requires_grad_(), rest


@contextmanager
def counted() -> Iterator[list[int]]:
    """The rows of each call that reached the head, as they come."""
    rows: list[int] = []
    chunks = head._chunks

    def count(hidden: Tensor, weight: Tensor, acting: Any, chunk: int) -> Any:
        rows.append(acting.index.numel())
        return chunks(hidden, weight, acting, chunk)

    head._chunks = count
    try:
        yield rows
    finally:
        head._chunks = chunks


def divided(
    data: dict[str, Tensor],
    loss: GrpoLossConfig,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    places: Sequence[Tensor] | None,
) -> tuple[Any, ...]:
    """As tests.loss_grid.run_head over the ranks of `group`, then the log-probs (T,). places: whose tokens are whose,
    as with cp; None: hidden states are the same on all, as with tp."""
    hidden, weight, rest = operands(data, dtype)
    if places is None:
        parts = torch.arange(len(hidden)).tensor_split(dist.get_world_size(group))
        share = TokenShare.of(group, parts, hidden.device)
        states = own_rows(hidden, group)
    else:
        share = TokenShare.of(group, places, hidden.device)
        states = hidden[share.own]
    value, metrics = divided_grpo_loss(states, weight, data["target_ids"], share, config=loss, **rest)
    grads = torch.autograd.grad(value * 0.5, (hidden, weight))
    with torch.no_grad():
        logprobs = share.gather(selective_logprob(states, weight, data["target_ids"][share.own])[0])
    for grad in grads[1:] if places is None else grads:  # with cp other ranks have the others' rows
        dist.all_reduce(grad, group=group)
    return value.detach(), metrics, *grads, logprobs


def calls(rank: int) -> dict[str, Any]:
    """Every batch on groups of 2, 3 and 4 ranks, of which the others are none."""
    found: dict[str, Any] = {}
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    for number, (name, data, loss, dtypes) in enumerate(batches()):
        for size in sizes_of(number, name):
            if rank >= size:
                continue
            total, g = len(data["target_ids"]), torch.Generator().manual_seed(number)
            cuts = torch.randint(0, total + 1, (size - 1,), generator=g).sort().values
            places = torch.randperm(total, generator=g).tensor_split(cuts.tolist())
            for dtype in dtypes:
                for way, those in (("tp", None), ("cp", places)):
                    with counted() as rows:
                        out = divided(data, loss, dtype, groups[size], those)
                    found[f"{size}/{way}/{dtype}/{name}"] = (*out, rows)
    return found


def policy_of(name: str, folder: Path, ranks: Ranks) -> Policy:
    """A collective."""
    from transformers import LlamaForCausalLM

    from tests.sharded import sharded

    kind, more = POLICIES[name]
    plan = LlamaForCausalLM._tp_plan
    if name == "tp, whole head":  # a plan that does not cut it
        LlamaForCausalLM._tp_plan = {}
    try:
        config = PolicyConfig(ranks=RANKS, **more)
        return sharded(
            Policy(model_of(kind), tiny_tokenizer(), kind, config), folder / "policies" / name, ranks
        )
    finally:
        LlamaForCausalLM._tp_plan = plan


def demos_of(rows: MicroBatch) -> Demos:
    return [
        (ids[:length].numpy().astype(np.int32), mask[:length].numpy().astype(np.uint8))
        for ids, mask, length in zip(rows.ids, rows.loss_mask, rows.lengths.tolist(), strict=True)
    ]


def work_of(
    policy: Policy, batch: MiniBatch, ranks: Ranks, whole: Callable[[Tensor], Tensor], loss: GrpoLossConfig
) -> dict[str, Any]:
    """A step's gradient and metrics, the log-probs of the first rows, and the gradient of demonstrations; the rows that
    each of them multiplied by the head, on this rank."""
    found: dict[str, Any] = {}
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(whole(p.grad).clone() for p in policy.parameters() if p.grad is not None)
    )
    with counted() as rows:
        found["logprobs"] = logprobs_of(policy, batch.micro[0], 1.0)
    found["rows of log-probs"] = sum(rows)
    with counted() as rows:
        found["metrics"] = Learner(policy, optimizer, loss, 1e9, ranks=ranks).step(batch)
    found["rows"], found["gradient"] = sum(rows), seen
    optimizer.zero_grad()
    value = demo_loss(policy, demos_of(rows_of(3)))
    value.backward()  # type: ignore[no-untyped-call]
    found["demos"] = float(value.detach())
    found["demos gradient"] = [whole(p.grad).clone() for p in policy.parameters() if p.grad is not None]
    return found


def batch_of(rank: int, same_rows: int) -> MiniBatch:
    """The micro-batches of a rank, of which `same_rows` side by side have the same; two each."""
    parts = [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9]]
    every = cut(rows_of(1, near=True), parts, RANKS)
    return every.shard(rank // same_rows, RANKS // same_rows)


def main(folder: Path) -> None:
    from mgrpo.trainers.torch.shard import whole_tensor

    with Ranks(RANKS) as ranks:
        torch.save(calls(ranks.rank), folder / f"calls-{ranks.rank}.pt")
        found: dict[str, Any] = {}
        for name in POLICIES:
            policy = policy_of(name, folder, ranks)
            for loss in (settings("grpo"), settings("gspo")):
                mine = work_of(
                    policy, batch_of(ranks.rank, policy.config.mesh.same_rows), ranks, whole_tensor, loss
                )
                found[f"{name}/{loss.type}"] = ranks.gather(mine)
        if ranks.is_main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
