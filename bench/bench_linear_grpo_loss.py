"""linear_grpo_loss, forward and backward, against torch, liger-kernel, TRL and its three products alone.

    python -m bench.bench_linear_grpo_loss [--quick] [--strict] [--json PATH] [--device cpu|cuda]

CPU: fp32, T=1024, H=576, V=49152, one thread, thread-CPU time; ours with its default chunk (160 rows here), the chunked
rivals with 256 rows. GPU: bf16, T=16384, H=4096, V=151936, chunk 4096 for all, wall time. Peak memory is above the
inputs, and the two gradients every provider returns are taken off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

import torch

from bench.common import Comparison, Report, Timing, interleave, parser, ratio
from bench.rivals import (
    CONFIG,
    PeakMemory,
    chunked_head,
    liger_head,
    make_batch,
    naive_head,
    naive_head_same_outputs,
    that_fit,
    trl_head,
)
from mgrpo import linear_grpo_loss

FLOOR = "three products alone"
RIVALS = ("naive autograd", "naive autograd, same outputs", "liger-kernel", "trl")


def main() -> int:
    """All rows active, then half of them; peak memory of each."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    cpu = args.device == "cpu"
    rows, width, vocabulary, chunk = (1024, 576, 49152, 256) if cpu else (16384, 4096, 151936, 4096)
    if args.quick:
        rows //= 4
    dtype = torch.float32 if cpu else torch.bfloat16
    report = Report("bench_linear_grpo_loss")
    g = torch.Generator(args.device).manual_seed(0)
    there = {"generator": g, "device": args.device, "dtype": dtype}
    hidden = torch.randn(rows, width, **there).requires_grad_()
    weight = (torch.randn(vocabulary, width, **there) * 0.05).requires_grad_()
    full = make_batch(rows, vocabulary, args.device)
    half = make_batch(rows, vocabulary, args.device, masked=0.5)
    wait = (lambda: None) if cpu else torch.cuda.synchronize
    leaves = (hidden, weight)

    def ours(batch: object = full) -> None:
        loss, _ = linear_grpo_loss(*leaves, batch.ids, config=CONFIG, **batch.arguments())
        torch.autograd.grad(loss, leaves)
        wait()

    def by(run: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: (torch.autograd.grad(run(hidden, weight, full), leaves), wait())

    def chunked() -> None:
        with torch.no_grad():
            chunked_head(hidden, weight, full, chunk)
        wait()

    held = [torch.empty(rows, vocabulary, dtype=dtype, device=args.device)]
    held += [torch.empty_like(hidden), torch.empty_like(weight)]

    def products() -> None:
        """The floor: the three products of the whole batch, buffers at hand, nothing else."""
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=held[0])
            torch.mm(held[0], weight, out=held[1])
            torch.mm(held[0].t(), hidden, out=held[2])
        wait()

    def products_new() -> None:
        """The floor of an op that returns gradients: the same into new memory, whose pages have to be found."""
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=held[0])
            torch.mm(held[0], weight)
            torch.mm(held[0].t(), hidden)
        wait()

    providers: dict[str, Callable[[], object]] = {
        FLOOR: products,
        "three products, new gradients": products_new,
        "ours": ours,
        "ours, half the rows masked": lambda: ours(half),
        "chunked in-place torch": chunked,
        "naive autograd": by(naive_head),
        "naive autograd, same outputs": by(naive_head_same_outputs),
    }
    for name, rival in (("liger-kernel", liger_head(chunk)), ("trl", trl_head(4096))):
        if isinstance(rival, str):
            print(f"missing rival: {rival}")
        else:
            providers[name] = by(rival)
    if not cpu:
        providers = that_fit(providers)
    times = interleave(providers, rounds=3 if args.quick else args.rounds, clock="thread" if cpu else "wall")
    report_times(report, times, cpu, 6.0 * rows * width * vocabulary)
    held.clear()
    returned = hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size()
    report_memory(report, providers, args, returned)
    return report.finish(args)


def report_times(report: Report, times: Mapping[str, Timing], cpu: bool, flops: float) -> None:
    """Each time, and the ratios that have a bound. flops: of the three products."""
    for name, t in times.items():
        over = t.median / times[FLOOR].median
        note = (
            f"spread {t.spread:.0%}, {over:.3f} of the products, {flops / t.median / 1e9:.3f} TFLOP/s of 6TVH"
        )
        report.figure(name, t.median, "ms", note=note)
    bound = 1.10 if cpu else 1.15
    report.compare("ours / three products", Comparison.of(times, "ours", floor=FLOOR), at_most=bound)
    again = Comparison.of(times, "ours", floor="three products, new gradients")
    report.compare("ours / three products, new gradients", again, at_most=bound)
    report.figure("half masked / ours", ratio(times, "ours, half the rows masked", "ours"), "x", at_most=0.6)
    for name in RIVALS:
        if name in times:
            report.compare(f"{name} / ours", Comparison.of(times, "ours", name, floor=FLOOR))
    every = Comparison.of(times, "ours", *RIVALS, floor=FLOOR)
    report.compare("best rival / ours", every, at_least=None if cpu else 1.25)


def report_memory(
    report: Report, providers: Mapping[str, Callable[[], object]], args: argparse.Namespace, returned: int
) -> None:
    """Peak memory of each provider beside the gradients that it returns (`returned` bytes)."""
    peaks = {}
    for name, provider in providers.items():
        if name.startswith("three products") or name == "ours, half the rows masked":
            continue
        with PeakMemory(args.device) as peak:
            provider()
        peaks[name] = peak.bytes - returned
        report.figure(f"peak memory above base: {name}", peaks[name] / 1e6, "MB")
    # The bar is the like-for-like rival's. Quick runs have two chunks: the fraction means nothing there.
    bounds = {"naive autograd": None, "naive autograd, same outputs": None if args.quick else 0.06}
    for form in (name for name in bounds if name in peaks):
        held = Comparison(peaks["ours"] / 1e6, {form: peaks[form] / 1e6}, unit="MB")
        share = peaks["ours"] / peaks[form]
        report.compare(f"peak memory, ours / {form}", held, value=share, at_most=bounds[form])


if __name__ == "__main__":
    sys.exit(main())
