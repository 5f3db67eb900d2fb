"""Two ranks: collectives of the sizes a sharded step has, and the step itself, its policy divided by FSDP2.

    python -m bench.bench_ranks [--model tiny-qwen3|qwen3-0.6b] [--ranks 2] [--device cpu|cuda] [--json PATH]

NCCL on GPUs, one a rank; gloo on the CPU, whose figures say nothing. Bandwidths are of what a rank receives. Random
weights go through a policy's folder, as in a run.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bench.common import Report, parser
from bench.step_workload import LOSS, SHAPES, cut, make_model, make_rows
from mgrpo.config.policy import PolicyConfig
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.learner import Learner, adamw
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.shard import load_sharded

LIMIT = 300.0  # seconds for all ranks together


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", default="tiny-qwen3", choices=list(SHAPES))
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=16384, help="of a rank")
    arguments.add_argument("--mebibytes", type=int, default=256, help="of a collective")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the ranks that main starts
    args = arguments.parse_args()
    if args.folder is not None:
        as_rank(args)
        return 0
    if args.device == "cuda" and torch.cuda.device_count() < args.ranks:
        print(f"{torch.cuda.device_count()} GPUs, {args.ranks} are needed: nothing measured")
        return 0
    report = Report("bench_ranks")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model(args.model, "cpu")
        model.save_pretrained(folder / "model")
        size = model.config.vocab_size
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "model")
        del model
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={args.ranks}", "-m", "bench.bench_ranks", *sys.argv[1:]]
        subprocess.run([*command, "--folder", str(folder)], check=True, timeout=LIMIT)
        for name, value, unit in json.loads((folder / "found.json").read_text()):
            report.figure(name, value, unit)
    return report.finish(args)


def as_rank(args: argparse.Namespace) -> None:
    """One rank; rank 0 leaves the figures in the folder."""
    torch.set_num_threads(1)
    with Ranks(args.ranks, args.device) as ranks:
        found = collectives(args, ranks) + step(args, ranks)
        if ranks.is_main:
            (args.folder / "found.json").write_text(json.dumps(found))


def collectives(args: argparse.Namespace, ranks: Ranks) -> list[tuple[str, float, str]]:
    """Bandwidth of what FSDP2 sends: gathers in bfloat16, sums of gradients in float32."""
    out = []
    for name, dtype in (
        ("all-gather of bfloat16", torch.bfloat16),
        ("reduce-scatter of float32", torch.float32),
    ):
        n = args.mebibytes * 2**20 // dtype.itemsize // ranks.size * ranks.size
        whole = torch.zeros(n, dtype=dtype, device=args.device)
        part = torch.zeros(n // ranks.size, dtype=dtype, device=args.device)
        if name.startswith("all-gather"):
            call = functools.partial(dist.all_gather_into_tensor, whole, part)
        else:
            call = functools.partial(dist.reduce_scatter_tensor, part, whole)
        seconds = timed(args.device, call)
        received = n * dtype.itemsize * (ranks.size - 1) / ranks.size
        out.append((f"{name}, {args.mebibytes} MiB, {ranks.size} ranks", received / seconds / 1e9, "GB/s"))
    return out


def step(args: argparse.Namespace, ranks: Ranks) -> list[tuple[str, float, str]]:
    """Milliseconds of an optimizer step of the sharded policy, and the memory of a rank."""
    config: dict[str, Any] = {"device": args.device, "ranks": ranks.size, "attention": "sdpa"}
    if args.device == "cuda":
        config |= {"dtype": "bfloat16", "attention": "auto"}
        torch.cuda.reset_peak_memory_stats()
    policy = load_sharded(args.folder / "model", PolicyConfig.model_validate(config), ranks)
    optimizer = adamw(policy, 1e-6)
    learner = Learner(policy, optimizer, LOSS, 1.0, ranks=ranks)
    micro = cut(make_rows(args.tokens, policy.vocab_size), args.tokens)
    batch = MiniBatch(micro, float(micro[0].loss_mask.sum()) * ranks.size)
    seconds = timed(args.device, lambda: learner.step(batch))
    label = f"sharded step, {args.model}, {args.tokens} tokens a rank"
    out = [(label, seconds * 1e3, "ms")]
    if args.device == "cuda":
        out.append((f"{label}: memory of a rank", torch.cuda.max_memory_allocated() / 1e9, "GB"))
    return out


def timed(device: str, run: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds of a call, after one that is not counted."""
    seen = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seen.append(time.perf_counter() - start)
    return sorted(seen[1:])[rounds // 2]


if __name__ == "__main__":
    sys.exit(main())
