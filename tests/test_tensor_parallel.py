"""The vocabulary split over ranks: the merge by splitting V in one process, the op over two gloo ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mgrpo import GrpoLossConfig, linear_grpo_loss, selective_logprob
from mgrpo.ops import head, native
from mgrpo.ops.tensor_parallel import merge_partials
from tests.loss_grid import error, grid_batch, head_batch, run_head, settings

CONFIGS = (
    settings("dapo", kl_coef=0.1, entropy_coef=0.02, temperature=0.6),
    settings("gspo"),
    settings("grpo", correction="sequence_mask"),
    GrpoLossConfig(type="tests.own_losses:Pull", options={"spring": 0.3, "entropy": 0.05}),
)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_merging_shards_is_the_whole_row(shards: int) -> None:
    """Statistics of a split vocabulary, an all -inf shard among them, merge to those of the whole."""
    data = grid_batch(66, torch.float32)
    logits, ids = data["logits"].float(), data["target_ids"]
    width = 66 // shards
    parts = []
    for s in range(shards):
        local = torch.where((ids >= s * width) & (ids < (s + 1) * width), ids - s * width, -1)
        piece = logits[:, s * width : (s + 1) * width].contiguous()
        parts.append(torch.stack(native.row_partials(piece, local, None, 0.7)))
    merged = head.finish(*merge_partials(torch.stack(parts), 0.7).unbind(0), 0.7)
    z = (logits.double() / 0.7).log_softmax(1)
    exact = z.gather(1, ids[:, None]).squeeze(1)
    entropy = -(z.exp() * torch.where(z == -float("inf"), 0.0, z)).sum(1)
    assert error(merged[0], exact) < 1e-6 and error(merged[1], entropy) < 1e-6


def work(rank: int, folder: str) -> None:
    """One of two ranks: its half of the vocabulary, the same everything else."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        data = head_batch(66, 16, torch.float32)
        data["weight"] = data["weight"][rank * 33 : (rank + 1) * 33]
        out = [
            run_head(data, config, torch.float32, "cpu", chunk=6, tp_group=dist.group.WORLD)
            for config in CONFIGS
        ]
        h, w = data["hidden"].float(), data["weight"].float()
        logprobs = selective_logprob(h, w, data["target_ids"], chunk=7, tp_group=dist.group.WORLD)
        rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")}
        values = []
        for config in (settings("dapo"), settings("gspo")):
            _, metrics, found = linear_grpo_loss(
                h, w, data["target_ids"], config=config, tp_group=dist.group.WORLD, tokens=True, **rest
            )
            values.append((metrics["entropy_all"], found.logprobs, found.entropy))
        torch.save((out, logprobs, values), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Loss, metrics, d hidden (summed over ranks) and d weight (each rank's half) are the whole vocabulary's."""
    previous = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        context = mp.start_processes(work, args=(str(tmp_path),), nprocs=2, join=False, start_method="spawn")
        assert context is not None
        assert context.join(timeout=600) or context.join(timeout=1), "the ranks are still at work after 600 s"
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME")
        if previous is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = previous
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    data = head_batch(66, 16, torch.float32)
    for i, config in enumerate(CONFIGS):
        exact = run_head(data, config, torch.float64, "reference")
        for results, *_ in ranks:
            assert abs(float(results[i][0]) - float(exact[0])) < 1e-5
            assert error(results[i][2], exact[2]) < 5e-6
        assert error(torch.cat([results[i][3] for results, *_ in ranks]), exact[3]) < 5e-6
    z = (data["hidden"] @ data["weight"].t()).log_softmax(1)
    exact_logp = z.gather(1, data["target_ids"][:, None]).squeeze(1)
    for _, (logp, entropy), _ in ranks:
        assert error(logp, exact_logp) < 1e-6 and error(entropy, -(z.exp() * z).sum(1)) < 1e-6
    mask = data["loss_mask"] != 0
    for *_, values in ranks:
        for mean, *found in values:
            for got, exact_all in zip(found, (exact_logp, -(z.exp() * z).sum(1)), strict=True):
                assert error(got, torch.where(mask, exact_all, 0.0)) < 1e-6
            torch.testing.assert_close(mean, found[1][mask].mean())


def test_the_reference_backend_has_no_shards() -> None:
    """tp_group with float64 is an error that names it."""
    data = head_batch(33, 8, torch.float64)
    call = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")}
    group: dist.ProcessGroup = object()  # never used: the backend is refused first
    with pytest.raises(ValueError, match=r"^tp_group: "):
        linear_grpo_loss(
            data["hidden"],
            data["weight"],
            data["target_ids"],
            config=GrpoLossConfig(),
            tp_group=group,
            **call,
        )
