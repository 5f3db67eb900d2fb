"""The one place where a backend is chosen.

`reference` is plain torch and runs anything; `cpu` is the C++ of mgrpo._C (float32 and bfloat16 on the CPU);
`triton` runs on CUDA, and on CPU tensors under the Triton interpreter. A chosen backend that fails raises:
nothing falls back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mgrpo.losses.base import PolicyLoss
    from mgrpo.ops.token_loss import Tokens

Impl = Literal["auto", "reference", "cpu", "triton"]

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs an op on this device and dtype: `impl` itself, or for "auto" the fastest that can."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl: {impl!r} is not one of {', '.join(get_args(Impl))}")
    if impl == "auto":
        if device.type == "cpu":
            return "cpu" if dtype in _CPU_DTYPES else "reference"
        if device.type == "cuda":
            return "triton" if dtype in _TRITON_DTYPES else "reference"
        return "reference"
    if impl == "cpu" and (device.type != "cpu" or dtype not in _CPU_DTYPES):
        raise TypeError(f"impl: 'cpu' takes float32 and bfloat16 on the cpu, not {dtype} on {device}")
    if impl == "triton" and dtype not in _TRITON_DTYPES:
        raise TypeError(f"impl: 'triton' takes float32, bfloat16 and float16, not {dtype}")
    return impl


def fast(backend: str) -> str:
    """`backend` where it has row kernels; ValueError for the reference, which works on whole rows only."""
    if backend == "reference":
        raise ValueError("tp_group: the reference backend has no shards; use float32 or bfloat16")
    return backend


class Rows(Protocol):
    """What a fast backend offers; native.py (C++) and device.py (Triton) have these functions."""

    def group_advantage(
        self,
        rewards: Tensor,
        group_id: Tensor,
        weight: Tensor | None,
        estimator: str,
        eps: float,
        unbiased: bool,
    ) -> Tensor: ...

    def loss_rows(
        self, logits: Tensor, tokens: Tokens, loss: PolicyLoss, grad: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tokens]: ...

    def token_loss(
        self, logp: Tensor, entropy: Tensor, tokens: Tokens, loss: PolicyLoss
    ) -> tuple[Tensor, Tensor]: ...

    def row_partials(
        self, logits: Tensor, target_ids: Tensor, active: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def row_gradients(
        self,
        logits: Tensor,
        target_ids: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        temperature: float,
        grad: Tensor,
    ) -> None: ...


def rows(backend: str) -> Rows:
    """The functions of a fast backend, imported when first needed: "cpu" or "triton"."""
    if backend == "cpu":
        from mgrpo.ops import native

        return native
    from mgrpo.ops import device

    return device


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a number on x's device, which is not looked at on a GPU."""
    if x.device.type == "cuda" and x.dtype in _TRITON_DTYPES and x.is_contiguous():
        from mgrpo.ops import device

        device.scale_(x, factor)
    elif x.device.type != "cpu" or float(factor) != 1.0:  # looking is free on the CPU
        x.mul_(factor.to(x.dtype))
