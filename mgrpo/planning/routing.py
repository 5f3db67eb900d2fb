"""An even routing in the place of the one that fake tensors cannot have: how many tokens a rank sends to experts on
other ranks, and receives for its own, steers the code and is read out of data.

Pair j of the T k pairs of token and expert goes to expert j mod E, on every rank: each expert gets T k / E of a rank's
pairs, but for one, so a rank receives as many as it sends. How uneven a router will be is not known before a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def even_routing() -> Iterator[None]:
    """Inside the block transformers' all-to-all of tokens and experts (policy.mesh.ep) has real numbers of tokens, and
    what arrives is what this rank, the first of its group, would send to its own experts, from each rank."""
    from transformers.distributed import expert_parallel

    dispatch = expert_parallel.AllToAllEP._dispatch_tokens

    def evenly(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Any:
        everywhere = self.num_local_experts * self.ep_mesh.size()
        even = torch.arange(experts.numel()).reshape(experts.shape) % everywhere
        return dispatch(self, hidden, even, weights)

    def all_alike(received: Tensor, sent: Tensor, group: Any) -> None:
        received.copy_(sent[0].expand_as(received))  # (ep, experts of a rank): tokens

    exchange = expert_parallel.all_to_all_single
    expert_parallel.AllToAllEP._dispatch_tokens = evenly
    expert_parallel.all_to_all_single = all_alike
    try:
        yield
    finally:
        expert_parallel.AllToAllEP._dispatch_tokens = dispatch
        expert_parallel.all_to_all_single = exchange
