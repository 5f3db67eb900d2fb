"""grpo_loss from logits, forward and backward, against torch, liger-kernel and a memcpy of the logits.

    python -m bench.bench_grpo_loss [--quick] [--strict] [--json PATH] [--device cpu|cuda]

CPU: fp32, T=2048, V=49152, one thread, thread-CPU time. GPU: bf16, T=16384, V=151936, wall time. The bar against naive
autograd is held by both of its forms: the loss alone, and with the entropy metric that ours returns in every call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import torch

from bench.common import Comparison, Report, Timing, interleave, parser
from bench.rivals import (
    CONFIG,
    Batch,
    PeakMemory,
    chunked_inplace,
    liger_logits,
    make_batch,
    naive,
    naive_same_outputs,
    that_fit,
)
from mgrpo import grpo_loss

OURS = "ours, in place"
FLOOR = "memcpy of the logits"


def main() -> int:
    """Every provider turns the same logits into their gradient; the copy that restores them is not timed."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--rounds", type=int, default=9)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    cpu = args.device == "cpu"
    rows, vocabulary = (2048, 49152) if cpu else (16384, 151936)
    if args.quick:
        rows //= 8
    dtype = torch.float32 if cpu else torch.bfloat16
    report = Report("bench_grpo_loss")
    g = torch.Generator(args.device).manual_seed(0)
    source = torch.randn(rows, vocabulary, generator=g, device=args.device, dtype=dtype) * 3
    batch = make_batch(rows, vocabulary, args.device)
    work, copy = source.clone(), torch.empty_like(source)
    wait = (lambda: None) if cpu else torch.cuda.synchronize

    def ours(config: object = CONFIG, inplace: bool = True, mask: torch.Tensor | None = None) -> None:
        z = work.detach().requires_grad_()
        more = batch.arguments() | ({} if mask is None else {"loss_mask": mask})
        loss, _ = grpo_loss(z, batch.ids, config=config, inplace=inplace, **more)
        torch.autograd.grad(loss, z)
        wait()

    def by(run: Callable[[torch.Tensor, Batch], torch.Tensor]) -> Callable[[], object]:
        def timed() -> None:
            z = work.detach().requires_grad_()
            torch.autograd.grad(run(z, batch), z)
            wait()

        return timed

    half = torch.arange(rows, device=args.device) % 2 == 0
    entropy = CONFIG.model_copy(update={"entropy_coef": 0.01})
    providers: dict[str, Callable[[], object]] = {
        FLOOR: lambda: (copy.copy_(source), wait()),
        "ours, in place": ours,
        "ours, new gradient": lambda: ours(inplace=False),
        "ours, in place, entropy in the loss": lambda: ours(entropy),
        "ours, in place, half the rows masked": lambda: ours(mask=half),
        "chunked in-place torch": lambda: (chunked_inplace(work, batch), wait()),
        "naive autograd": by(naive),
        "naive autograd, same outputs": by(naive_same_outputs),
        "naive autograd, entropy in the loss": by(lambda z, b: naive_same_outputs(z, b, entropy_coef=0.01)),
    }
    liger = liger_logits(args.device)
    if isinstance(liger, str):
        print(f"missing rival: {liger}")
    else:
        providers["liger-kernel"] = by(liger)

    def restore() -> None:
        work.copy_(source)
        wait()

    if not cpu:
        providers = that_fit(providers, restore)
    rounds = 3 if args.quick else args.rounds
    times = interleave(providers, rounds=rounds, clock="thread" if cpu else "wall", before=restore)
    report_times(report, times, cpu, source.numel() * source.element_size())
    for name in (OURS, "chunked in-place torch", "naive autograd"):
        if name not in providers:
            continue
        work.copy_(source)
        with PeakMemory(args.device) as peak:
            providers[name]()
        report.figure(f"peak memory above base: {name}", peak.bytes / 1e6, "MB")
    return report.finish(args)


def report_times(report: Report, times: Mapping[str, Timing], cpu: bool, size: int) -> None:
    """Each time, and the ratios that have a bound. size: bytes of the logits."""
    for name, t in times.items():
        over = t.median / times[FLOOR].median
        note = f"spread {t.spread:.0%}, {over:.2f} memcpys, {t.throughput(2 * size):.1f} GB/s of read + write"
        report.figure(name, t.median, "ms", note=note)
    chunked, autograd = (5.0, 18.0) if cpu else (None, None)

    def against(item: str, rival: str, bound: float | None = None, ours: str = OURS) -> None:
        if rival in times:
            report.compare(item, Comparison.of(times, ours, rival, floor=FLOOR), at_least=bound)

    against("chunked / ours", "chunked in-place torch", chunked)
    for form in ("naive autograd", "naive autograd, same outputs"):
        against(f"{form} / ours", form, autograd)
    ours = "ours, in place, entropy in the loss"
    against("entropy in the loss, naive / ours", "naive autograd, entropy in the loss", ours=ours)
    # On a GPU a memcpy moves 2X bytes; two sweeps move 3X.
    report.compare(
        "ours / memcpy", Comparison.of(times, OURS, floor=FLOOR), at_most=2.2 if cpu else 1.25 * 1.5
    )
    against("liger / ours", "liger-kernel")


if __name__ == "__main__":
    sys.exit(main())
