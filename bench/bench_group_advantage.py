"""group_advantage on 1e6 rewards in groups of 1 to 64, against torch index_add.

python -m bench.bench_group_advantage [--quick] [--strict] [--json PATH] [--device cpu|cuda]
"""

from __future__ import annotations

import sys

import torch

from bench.common import Comparison, Report, interleave, parser
from mgrpo import group_advantage


def by_index_add(rewards: torch.Tensor, group_id: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The usual scatter formulation: counts, sums, squares, and gathers back."""
    ids = group_id.long()
    groups = int(ids.max()) + 1
    zeros = rewards.new_zeros(groups)
    count = zeros.index_add(0, ids, torch.ones_like(rewards))
    mean = zeros.index_add(0, ids, rewards) / count
    centred = rewards - mean[ids]
    std = (zeros.index_add(0, ids, centred.square()) / count).sqrt()
    return centred / (std[ids] + eps)


def main() -> int:
    """Contiguous groups (as a trainer has them) and scattered ones, one thread."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = arguments.parse_args()
    torch.set_num_threads(1)
    report = Report("bench_group_advantage")
    n = 100_000 if args.quick else 1_000_000
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 65, (n // 30,), generator=g)
    ids = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)[:n].int()
    rewards = torch.rand(ids.numel(), generator=g).round(decimals=2)
    order = torch.randperm(ids.numel(), generator=g)
    weights = torch.rand(ids.numel(), generator=g).to(args.device)
    clock = "thread" if args.device == "cpu" else "wall"
    wait = torch.cuda.synchronize if args.device == "cuda" else (lambda: None)
    for name, r, i in (("contiguous", rewards, ids), ("scattered", rewards[order], ids[order])):
        r, i = r.to(args.device), i.to(args.device)
        times = interleave(
            {
                "ours": lambda r=r, i=i: (group_advantage(r, i), wait()),
                "ours, weighted": lambda r=r, i=i: (group_advantage(r, i, weights), wait()),
                "index_add": lambda r=r, i=i: (by_index_add(r, i), wait()),
            },
            rounds=7 if args.quick else 21,
            clock=clock,
        )
        for provider, t in times.items():
            note = f"spread {t.spread:.0%}, {t.throughput(12 * ids.numel()):.2f} GB/s of 12 B a reward"
            report.figure(f"{name}: {provider}", t.median, "ms", note=note)
        bound = 3.0 if name == "contiguous" and args.device == "cpu" else None
        against = Comparison.of(times, "ours", "index_add")
        report.compare(f"{name}: index_add / ours", against, at_least=bound)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
