"""Batcher: planning and assembly against Python batchers and against memcpy, and the quality of the plans.

Workload: log-normal lengths, median 1500, sigma 1, at most 32768; capacity 32768; 8 ranks; seed 0; 9 bytes a token.
Cost of a sequence: L + L^2 / (12 H) with H = 5120 (arithmetic of a transformer layer of hidden size H). Everything runs
on one thread; figures are CPU time of the process.

    python -m bench.bench_batcher [--quick] [--json PATH] [--picture docs/img/batcher_time.png]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import batcher_rivals as rivals
from bench.common import Comparison, Report, Timing, interleave, parser, ratio
from mgrpo import Batcher
from mgrpo._C import pack
from mgrpo.batcher.prefix_tree import prefix_tree

CAPACITY, DP, K, LONGEST = 32768, 8, 8, 32768
COST = (1.0, 1 / (12 * 5120))
DEAR = (1.0, 2.0**-15)
Planner = Callable[..., list[rivals.Bins]]


def lengths_of(n: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(np.log(1500), 1, n), 1, LONGEST).astype(np.int32)


@dataclass
class Workload:
    """n trajectories in a Batcher and as lists of tensors, with the batcher's buffers of every rank."""

    n: int
    tokens: int
    batcher: Batcher
    names: list[str]
    lists: rivals.Lists  # our dtypes
    long_lists: rivals.Lists  # int64 ids and positions, as tokenizers and Python trainers have them
    columns: dict[str, np.ndarray]

    @classmethod
    def make(cls, n: int, *, rivals_too: bool = True) -> Workload:
        lengths, r = lengths_of(n), np.random.default_rng(1)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        total = int(offsets[-1])
        columns = {
            "tokens": r.integers(0, 50_000, total).astype(np.int32),
            "loss_mask": (r.random(total) < 0.5).astype(np.uint8),
            "logprobs": -r.random(total).astype(np.float32),
        }
        columns["loss_mask"][offsets[1:] - 1] = 1
        batcher = Batcher(
            K, 1, CAPACITY, DP, cost=COST, threads=1, arena_bytes=9 * (total + 16 * n) + (1 << 20)
        )
        queries = [f"0/{i // K}" for i in range(n)]
        place = {"rollouts": np.arange(n, dtype=np.int32) % K, "invocations": np.zeros(n, np.int32)}
        ids = {"traj_ids": np.arange(n), "policy_versions": np.zeros(n, np.int32)}
        batcher.add_many(
            queries, offsets=offsets, advantages=r.random(n, np.float32), **columns, **place, **ids
        )
        for i in range(n):
            batcher.seal(queries[i], i % K, 1)
        lists = long_lists = rivals.Lists([], [], [], [])
        if rivals_too:
            split = [list(torch.split(torch.from_numpy(c), lengths.tolist())) for c in columns.values()]
            lists = rivals.Lists(*split, advantages=r.random(n).tolist(), lengths=lengths.tolist())
            long_lists = replace(lists, ids=[ids.long() for ids in lists.ids])
        return cls(n, total, batcher, batcher.ready(), lists, long_lists, columns)

    def ours(self, *, minimal: bool) -> Callable[[], None]:
        """Plan and assemble all ranks into pooled buffers."""
        extra = not minimal
        plan = self.batcher.plan(0, queries=self.names)
        pool = [plan.buffers(advantages=extra, position_ids=extra) for _ in range(DP)]

        def run() -> None:
            plan = self.batcher.plan(0, queries=self.names)
            for rank in range(DP):
                self.batcher.write(plan, rank, pool[rank])

        return run

    def rival(self, planner: Planner, lists: rivals.Lists, *, minimal: bool = False) -> Callable[[], None]:
        def run() -> None:
            rivals.assemble_cat(lists, planner(lists.lengths, CAPACITY, DP), minimal=minimal)

        return run


def plan_rows(report: Report, quick: bool) -> None:
    """Packing alone, and the whole plan: draw, slots, packing."""
    bounds = {256: None, 1000: 0.12, 10_000: 1.2, 100_000: 12.0}
    for n, bound in bounds.items():
        rounds, calls = (7, 20 if n <= 1000 else 2) if quick else (25, 20 if n <= 1000 else 3)
        lengths = lengths_of(n)
        providers: dict[str, Callable[[], object]] = {"pack": partial(pack, lengths, CAPACITY, DP, *COST)}
        if n <= 1000 or not quick:
            small = tiny_batcher(n)
            names = small.ready()
            providers["plan"] = partial(small.plan, 0, queries=names)
        times = interleave(providers, rounds, calls=calls)
        report.figure(f"pack {label(n)}", times["pack"].median, "ms", at_most=bound)
        if "plan" in times:
            report.figure(
                f"whole plan {label(n)}", times["plan"].median, "ms", at_most=bound, note="draw to packing"
            )


def tiny_batcher(n: int) -> Batcher:
    """The workload with lengths and capacity divided by 16: the same plan problem with a sixteenth of the
    tokens."""
    lengths = np.maximum(lengths_of(n) // 16, 1)
    total = int(lengths.sum())
    batcher = Batcher(
        K, 1, CAPACITY // 16, DP, cost=(1.0, 16 * COST[1]), threads=1, arena_bytes=9 * (total + 16 * n)
    )
    queries = [f"0/{i // K}" for i in range(n)]
    batcher.add_many(
        queries,
        rollouts=np.arange(n, dtype=np.int32) % K,
        invocations=np.zeros(n, np.int32),
        traj_ids=np.arange(n),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.zeros(total, np.int32),
        loss_mask=np.ones(total, np.uint8),
        logprobs=np.zeros(total, np.float32),
        advantages=np.random.default_rng(1).random(n, np.float32),
        policy_versions=np.zeros(n, np.int32),
    )
    for i in range(n):
        batcher.seal(queries[i], i % K, 1)
    return batcher


def assembly_rows(report: Report, n: int, quick: bool) -> dict[str, Timing]:
    """Plan + assembly of one workload against its rivals, and assembly alone against memcpy."""
    w = Workload.make(n)
    plan = w.batcher.plan(0, queries=w.names)
    pool = [plan.buffers() for _ in range(DP)]
    copies = {name: np.empty_like(column) for name, column in w.columns.items()}

    def assemble() -> None:
        for rank in range(DP):
            w.batcher.write(plan, rank, pool[rank])

    def memcpy() -> None:
        for name, column in w.columns.items():
            np.copyto(copies[name], column)

    providers: dict[str, Callable[[], object]] = {
        "assembly": assemble,
        "memcpy": memcpy,
        "ours": w.ours(minimal=False),
        "ours minimal": w.ours(minimal=True),
        "list-and-cat": w.rival(rivals.plan_first_fit_kk, w.long_lists),
        "list-and-cat int32": w.rival(rivals.plan_first_fit_kk, w.lists),
        "list-and-cat minimal": w.rival(rivals.plan_first_fit_kk, w.lists, minimal=True),
    }
    if n <= 1000 or not quick:
        providers["bfd-and-cat"] = w.rival(rivals.plan_best_fit_decreasing, w.long_lists)
    if n <= 1000:
        providers["padded rows"] = partial(rivals.assemble_padded, w.lists, 8, DP)
    rounds = {256: 15, 1000: 9, 10_000: 5}[n] if not quick else 3
    times = interleave(providers, rounds, clock="process")
    at = label(n)
    full, minimal = {1000: (4, 8), 10_000: (6, 8)}.get(n, (None, None))
    report.figure(f"plan + assembly {at}", times["ours"].median, "ms", note="17 B a token")
    report.figure(f"plan + assembly {at} minimal", times["ours minimal"].median, "ms", note="9 B a token")
    for name, ours, bound, note in (
        ("list-and-cat", "ours", full, "int64 ids and positions, as Python trainers have"),
        ("list-and-cat", "ours minimal", minimal, "the same rival against our 9 B a token"),
        ("list-and-cat int32", "ours", None, "same five columns and dtypes"),
        ("list-and-cat minimal", "ours minimal", None, "same three columns and dtypes"),
    ):
        against = Comparison.of(times, ours, name, floor="memcpy")
        report.compare(f"{name} / {ours} {at}", against, at_least=bound, note=note)
    for name in ("bfd-and-cat", "padded rows"):
        if name in times:
            report.compare(f"{name} / ours {at}", Comparison.of(times, "ours", name, floor="memcpy"))
    report.figure(f"assembly {at}", times["assembly"].throughput(9 * w.tokens), "GB/s")
    copied = Comparison.of(times, "assembly", floor="memcpy")
    report.compare(
        f"assembly as a fraction of memcpy {at}",
        copied,
        value=ratio(times, "memcpy", "assembly"),
        at_least=0.65 if n >= 1000 else None,
        note="stretch 0.8",
    )
    return times


def large_rows(report: Report, n: int) -> None:
    """Plan + assembly of a workload that Python batchers need minutes for: ours against memcpy only."""
    needed = 45 * int(
        lengths_of(n).sum()
    )  # arena, columns, their copy, the buffers, and as much again to be safe
    if available_bytes() < needed:
        print(
            f"{label(n)} not assembled: needs {needed / 1e9:.0f} GB of memory, {available_bytes() / 1e9:.0f} are free"
        )
        return
    w = Workload.make(n, rivals_too=False)
    copies = {name: np.empty_like(column) for name, column in w.columns.items()}

    def memcpy() -> None:
        for name, column in w.columns.items():
            np.copyto(copies[name], column)

    times = interleave({"ours minimal": w.ours(minimal=True), "memcpy": memcpy}, 3, clock="process")
    at = label(n)
    report.figure(f"plan + assembly {at} minimal", times["ours minimal"].median, "ms", note="9 B a token")
    copied = Comparison.of(times, "ours minimal", floor="memcpy")
    share = ratio(times, "memcpy", "ours minimal")
    report.compare(f"memcpy / ours minimal {at}", copied, value=share, note="plan included")


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def quality_rows(report: Report, quick: bool) -> None:
    """What the plans are worth, whatever they cost."""
    reached = corpus_at_lower_bound(100 if quick else 1000)
    report.figure("plans at the lower bound of micro-batches", 100 * reached, "%", at_least=99)
    lockstep = {256: 1.12, 1000: 1.055, 10_000: 1.004, 100_000: None}
    for n, bound in lockstep.items():
        lengths = lengths_of(n)
        p = pack(lengths, CAPACITY, DP, *COST)
        report.figure(
            f"lockstep {label(n)}",
            p["lockstep"],
            at_most=bound,
            note=f"no plan is below {floor(lengths, COST):.4f}",
        )
        if n == 10_000:
            report.figure("packing efficiency 10k", p["efficiency"], at_least=0.998)
        if n >= 1000:
            report.figure(f"rank token imbalance {label(n)}", imbalance(lengths, p), at_most=1.001)
    for n, bound in ((256, None), (1000, 1.055), (10_000, 1.004)):
        p = pack(lengths_of(n), CAPACITY, DP, *DEAR)
        note = f"L + L^2/32768; no plan is below {floor(lengths_of(n), DEAR):.4f}"
        report.figure(f"lockstep {label(n)}, dear attention", p["lockstep"], at_most=bound, note=note)


def corpus_at_lower_bound(size: int) -> float:
    """Fraction of seeded workloads whose micro-batch count is ceil(tokens / capacity), rounded up to dp."""
    r, reached = np.random.default_rng(0), 0
    for _ in range(size):
        lengths, dp = (
            lengths_of(int(r.integers(40, 1500)), int(r.integers(2**32))),
            int(r.choice([1, 2, 4, 8])),
        )
        bound = -(-int(lengths.sum()) // CAPACITY)
        reached += pack(lengths, CAPACITY, dp, *COST)["n_mb"] * dp == -(-bound // dp) * dp
    return reached / size


def floor(lengths: np.ndarray, cost: tuple[float, float]) -> float:
    """A lower bound of lockstep for any plan: the longest sequence sets the pace of its micro-step, whose other ranks
    can hold at most capacity tokens each of the longest others (cut freely), and all other micro-steps are even."""
    sizes = np.sort(lengths.astype(np.float64))[::-1]
    costs = cost[0] * sizes + cost[1] * sizes**2
    filled = np.minimum(np.cumsum(sizes), DP * CAPACITY)
    taken = np.diff(filled, prepend=0.0) / sizes
    heaviest = min(float((taken * costs).sum()), DP * float(costs[0]))
    total = float(costs.sum())
    return max(1.0, (costs[0] + max(0.0, total - heaviest) / DP) / (total / DP))


def imbalance(lengths: np.ndarray, p: dict[str, Any]) -> float:
    """Tokens of the fullest rank over the mean."""
    bounds = p["offsets"][:: p["n_mb"]]
    tokens = [lengths[p["items"][a:b]].sum() for a, b in itertools.pairwise(bounds)]
    return float(max(tokens) / np.mean(tokens))


def exactness_rows(report: Report) -> None:
    """Gradients of counted and computed copies, bits under threads and order, and the tokens alignment saves."""
    from tests import batcher_kit as kit
    from tests.test_alignment import gradient

    worst = 0.0
    for mean in ("seq", "token"):
        found = []
        for mode in ("weights", "duplicate"):
            b = kit.make(mode=mode, d_max={"sub": 5}, seed=4)
            kit.replay(kit.workload(b, 8, queries=3, mean=3.0, longest=40), b)
            found.append(gradient(b, b.plan(2), mean))
        worst = max(worst, float((found[0] - found[1]).norm() / found[1].norm()))
    report.figure("gradient, weights against duplicate", worst, at_most=1e-12, note="relative, float64")
    report.figure("bits that depend on threads, order or state", float(differences()), at_most=0)
    report.figure(
        "sub-agent tokens saved by weights", 100 * saving(), "%", note="d_k = 1 + Poisson(3), D_max = 8"
    )


def differences() -> int:
    """Number of array entries that differ over 1-8 threads x 3 arrival orders x a state round trip."""
    from tests import batcher_kit as kit

    reference = kit.make(threads=1)
    calls = kit.workload(reference, 1, queries=12)
    kit.replay(calls, reference)
    expected, count = kit.everything(reference, 5), 0
    for threads in range(1, 9):
        for order in range(3):
            b, loaded = kit.make(threads=threads), kit.make(threads=threads)
            kit.replay([calls[i] for i in np.random.default_rng(order).permutation(len(calls))], b)
            loaded.load_state_dict(b.state_dict())
            for found in (kit.everything(b, 5), kit.everything(loaded, 5)):
                count += sum(int((found[key] != expected[key]).sum()) for key in expected)
    return count


def saving(queries: int = 2000) -> float:
    """1 - tokens(weights) / tokens(duplicate) with the lengths of the workload."""
    r, tokens = np.random.default_rng(0), {}
    counts = 1 + r.poisson(3, (queries, K))
    for mode in ("weights", "duplicate"):
        lengths = iter(np.maximum(lengths_of(int(counts.sum())) // 16, 1))
        b = Batcher(K, 8, 2048, mode=mode)
        traj_id = 0
        for q in range(queries):
            for k in range(K):
                for i in range(int(counts[q, k])):
                    n = int(next(lengths))
                    mask = np.ones(n, np.uint8)
                    b.add(q, k, i, traj_id, np.zeros(n, np.int32), mask, np.zeros(n, np.float32), 0.0, 0)
                    traj_id += 1
                b.seal(q, k, int(counts[q, k]))
        tokens[mode] = b.plan(0).tokens
    return 1 - tokens["weights"] / tokens["duplicate"]


def tree_rows(report: Report, quick: bool) -> None:
    """The prefix tree of 10k rows of 2048 tokens against a sum over them, which reads each once."""
    r, n, width = np.random.default_rng(0), 10_000 // (4 if quick else 1), 2048
    lengths, ids = np.full(n, width), r.integers(0, 50_000, (n, width))
    alone = ids.copy()
    ids[:, : width // 2] = np.repeat(ids[::K, : width // 2], K, 0)[:n]
    shapes = {
        "nothing shared": alone,
        "8 rows a prompt, half of it": ids,
        "all the same": ids[:1].repeat(n, 0),
    }
    for name, rows in shapes.items():
        providers: dict[str, Callable[[], object]] = {
            "tree": partial(prefix_tree, rows, lengths),
            "read": rows.sum,
        }
        times = interleave(providers, 5 if quick else 15, clock="process")
        against = Comparison.of(times, "tree", floor="read")
        report.compare(
            f"prefix tree / reading its tokens, {name}",
            against,
            value=ratio(times, "tree", "read"),
            at_most=1.5,
            note=f"{n} rows of {width}",
        )


def label(n: int) -> str:
    return f"{n // 1000}k" if n >= 1000 else str(n)


def draw_picture(path: str, series: dict[int, dict[str, Timing]]) -> None:
    """CPU time of plan + assembly against the number of trajectories, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names = [
        "padded rows",
        "bfd-and-cat",
        "list-and-cat",
        "list-and-cat minimal",
        "ours",
        "ours minimal",
        "memcpy",
    ]
    for name in names:
        points = [(n, times[name].median) for n, times in series.items() if name in times]
        style = {"ours": "k-o", "ours minimal": "k--o", "memcpy": "k:"}.get(name, "-s")
        ax.loglog(*zip(*points, strict=True), style, label=name, markersize=4)
    ax.set_xlabel("trajectories")
    ax.set_ylabel("CPU ms, plan + assembly")
    ax.set_title("Log-normal lengths, median 1500; capacity 32768; 8 ranks; one thread")
    ax.grid(True, which="both", alpha=0.2)
    ax.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


def main() -> int:
    p: argparse.ArgumentParser = parser("Plan and assembly of the batcher")
    p.add_argument("--picture", metavar="PATH", help="draw time against the number of trajectories")
    args = p.parse_args()
    torch.set_num_threads(1)
    report = Report("bench_batcher")
    plan_rows(report, args.quick)
    sizes = (256, 1000) if args.quick else (256, 1000, 10_000)
    series = {n: assembly_rows(report, n, args.quick) for n in sizes}
    if not args.quick:
        large_rows(report, 100_000)
    tree_rows(report, args.quick)
    quality_rows(report, args.quick)
    exactness_rows(report)
    if args.picture:
        draw_picture(args.picture, series)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
