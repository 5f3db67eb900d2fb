"""The losses we are compared with, and the inputs all of them get. A rival that cannot run here says why.

Our own naive and chunked baselines are written here; liger-kernel and TRL are called as they are published.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mgrpo import GrpoLossConfig

_LIBC = ctypes.CDLL(None)
EPS_LOW, EPS_HIGH = 0.2, 0.28
CONFIG = GrpoLossConfig(type="dapo", clip_eps_high=EPS_HIGH)


@dataclass
class Batch:
    """T tokens in trajectories of `length`; old log-probs a little off, so that some ratios clip."""

    ids: Tensor
    cu_seqlens: Tensor
    advantages: Tensor  # (N,)
    token_advantages: Tensor  # (T,)
    old: Tensor | None
    mask: Tensor

    def arguments(self) -> dict[str, Tensor | None]:
        return {
            "cu_seqlens": self.cu_seqlens,
            "advantages": self.advantages,
            "old_logprobs": self.old,
            "loss_mask": self.mask,
        }


def make_batch(rows: int, vocabulary: int, device: str, length: int = 64, masked: float = 0.0) -> Batch:
    """A batch with the fraction `masked` of its rows masked, every other run of 16."""
    g = torch.Generator().manual_seed(0)
    n = -(-rows // length)
    cu = torch.arange(0, n + 1).mul(length).clamp(max=rows).to(torch.int32)
    advantages = torch.randn(n, generator=g)
    seq = torch.repeat_interleave(cu.diff())
    period = torch.arange(rows) % 32
    return Batch(
        torch.randint(vocabulary, (rows,), generator=g).to(device),
        cu.to(device),
        advantages.to(device),
        advantages[seq].to(device),
        None,
        (period >= masked * 32).to(device),
    )


def clipped(logp: Tensor, b: Batch) -> Tensor:
    """Token-mean clipped loss on (T,) log-probs; on-policy when there are no old log-probs."""
    old = logp.detach() if b.old is None else b.old
    ratio = (logp - old).exp()
    bound = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    loss = -torch.minimum(ratio * b.token_advantages, bound * b.token_advantages)
    return (loss * b.mask).sum() / b.mask.sum()


def naive(logits: Tensor, b: Batch) -> Tensor:
    """log_softmax of everything, autograd for the rest; the loss and no metric."""
    return clipped(logits.float().log_softmax(-1).gather(1, b.ids[:, None]).squeeze(1), b)


def naive_same_outputs(logits: Tensor, b: Batch, entropy_coef: float = 0.0) -> Tensor:
    """`naive` that also returns what every call of ours returns and a trainer logs: the mean entropy of the rows.

    entropy_coef > 0: the entropy is a term of the loss, and autograd goes through it.
    """
    logp = logits.float().log_softmax(-1)
    loss = clipped(logp.gather(1, b.ids[:, None]).squeeze(1), b)
    with torch.set_grad_enabled(entropy_coef > 0):
        entropy = -(logp.exp() * logp).sum(-1)
        entropy = (entropy * b.mask).sum() / b.mask.sum()
    return loss - entropy_coef * entropy if entropy_coef else loss


def slope(logp: Tensor, b: Batch, rows: slice) -> Tensor:
    """d loss / d logp by hand, for the chunked baseline."""
    old = logp if b.old is None else b.old[rows]
    ratio = (logp - old).exp()
    a = b.token_advantages[rows]
    held = ((a > 0) & (ratio > 1 + EPS_HIGH)) | ((a < 0) & (ratio < 1 - EPS_LOW))
    return torch.where(held, 0.0, -a * ratio) * b.mask[rows] / b.mask.sum()


def chunked_inplace(logits: Tensor, b: Batch, chunk: int = 256) -> Tensor:
    """What careful torch does: softmax in place a chunk at a time, the gradient over the logits. Returns it."""
    for at in range(0, logits.shape[0], chunk):
        rows = slice(at, at + chunk)
        z, ids = logits[rows], b.ids[rows, None]
        lse = torch.logsumexp(z, 1, keepdim=True)
        c = slope((z.gather(1, ids) - lse).squeeze(1), b, rows)[:, None]
        z.sub_(lse).exp_().mul_(-c)
        z.scatter_add_(1, ids, c.to(z.dtype))
    return logits


def chunked_head(hidden: Tensor, weight: Tensor, b: Batch, chunk: int) -> tuple[Tensor, Tensor]:
    """The same over a head: three products a chunk. Returns (d hidden, d weight)."""
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
    for at in range(0, hidden.shape[0], chunk):
        h = hidden[at : at + chunk]
        z = torch.mm(h, weight.t(), out=buffer[: h.shape[0]])
        part = Batch(
            b.ids[at : at + chunk],
            b.cu_seqlens,
            b.advantages,
            b.token_advantages[at : at + chunk],
            None if b.old is None else b.old[at : at + chunk],
            b.mask[at : at + chunk],
        )
        chunked_inplace(z, part, chunk)
        torch.mm(z, weight, out=dh[at : at + chunk])
        dw.addmm_(z.t(), h)
    return dh, dw


def liger_logits(device: str) -> Callable[[Tensor, Batch], Tensor] | str:
    """liger-kernel's Triton GRPO loss, or why it cannot run here."""
    if device == "cpu":
        return "liger-kernel: its loss from logits is Triton on a GPU"
    try:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    except ImportError as missing:
        return f"liger-kernel: {missing}"

    def run(logits: Tensor, b: Batch) -> Tensor:
        n = b.advantages.numel()
        # Its logits carry one position more a sequence, which it leaves out: the layout of a model's output.
        return triton_grpo_loss(
            logits.view(n, -1, logits.shape[-1]),
            None,
            None,
            b.ids.view(n, -1)[:, :-1].contiguous(),
            b.advantages,
            b.mask.view(n, -1)[:, :-1].contiguous(),
            temperature=1.0,
            beta=0.0,
            eps_low=EPS_LOW,
            eps_high=EPS_HIGH,
            loss_type="dapo",
            reduce=True,
        )[0]

    return run


def liger_head(chunk: int) -> Callable[[Tensor, Tensor, Batch], Tensor] | str:
    """liger-kernel's chunked fused linear GRPO loss (plain torch inside), or why it cannot run here."""
    try:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss
    except ImportError as missing:
        return f"liger-kernel: {missing}"

    def run(hidden: Tensor, weight: Tensor, b: Batch) -> Tensor:
        n = b.advantages.numel()
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=False,
            use_ref_model=False,
            chunk_size=max(1, chunk // (hidden.shape[0] // n)),
            epsilon_low=EPS_LOW,
            epsilon_high=EPS_HIGH,
            loss_type="dapo",
        )
        shaped = hidden.view(n, -1, hidden.shape[-1])
        return loss(shaped, weight, b.ids.view(n, -1), b.mask.view(n, -1).float(), b.advantages)[0]

    return run


def trl_head(chunk: int) -> Callable[[Tensor, Tensor, Batch], Tensor] | str:
    """TRL's chunked log-prob under the clipped loss, or why it cannot run here."""
    try:
        import trl.trainer.utils  # noqa: F401 - its backward imports this
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as missing:
        return f"trl: {missing}"

    def run(hidden: Tensor, weight: Tensor, b: Batch) -> Tensor:
        logp = ChunkedLogProbFunction.apply(hidden, weight, None, b.ids, 1.0, chunk, None, 1.0, ())[0]
        return clipped(logp, b)

    return run


def that_fit(
    providers: dict[str, Callable[[], object]], before: Callable[[], object] | None = None
) -> dict[str, Callable[[], object]]:
    """The providers that this GPU's memory suffices for; the others are named."""
    fit = {}
    for name, run in providers.items():
        try:
            if before is not None:
                before()
            run()
        except torch.OutOfMemoryError:
            print(f"missing rival: {name}: the memory of this GPU does not suffice")
        else:
            fit[name] = run
        torch.cuda.empty_cache()
    return fit


def naive_head(hidden: Tensor, weight: Tensor, b: Batch) -> Tensor:
    """Logits whole, log_softmax whole."""
    return naive(F.linear(hidden, weight), b)


def naive_head_same_outputs(hidden: Tensor, weight: Tensor, b: Batch) -> Tensor:
    """The same with the entropy, for the record."""
    return naive_same_outputs(F.linear(hidden, weight), b)


class PeakMemory:
    """Highest memory above what was held at entry, in bytes: the allocator's on a GPU; on a CPU the kernel's own
    high-water mark of resident pages, which no peak escapes (NaN where it cannot be reset)."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes = 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()  # what earlier rounds left in cycles is not this provider's base
        if hasattr(_LIBC, "malloc_trim"):
            _LIBC.malloc_trim(0)  # nor is freed memory that the heap still holds
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        except OSError:
            self._base = math.nan
            return self
        self._base = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._base
            return
        self.bytes = _status("VmHWM") - self._base


def _status(field: str) -> int:
    """Bytes of a memory field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
