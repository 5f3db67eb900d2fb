"""What a step of the torch backend costs: FLOPs of the rows that it computes, and the memory at its highest.

FLOPs are those of all ranks: rank 0 has the rows of all of them. Beside forward and backward of the rows that move the
policy they are the algorithm's own forward passes: old log-probs where they are computed anew (of every row), and the
reference's. A device's peak is taken for those of the other ranks too, which have the same policy.device. Memory is
that of the fullest rank, as far as the gather of the metrics, which there is anyway, brings it to rank 0: what comes
behind it in a step, its update and the publishing, is seen by that of the next step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy
from mgrpo.profiling.devices import peak_of
from mgrpo.profiling.flops import Cost, ModelFlops, flops_of
from mgrpo.trainers.base import StepCost
from mgrpo.trainers.batch import MicroBatch, MiniBatch


class StepMeter:
    """Counts what the steps of a policy cost."""

    def __init__(self, policy: Policy, every_row_acts: bool, has_reference: bool, ranks: int) -> None:
        """every_row_acts: rows without an advantage are computed too. ranks: the devices that share the work."""
        self._every_row_acts, self._has_reference = every_row_acts, has_reference
        self._known: tuple[ModelFlops, ModelFlops] | None = None
        with contextlib.suppress(ConfigError):  # an architecture that is not counted has no MFU
            self._known = flops_of(policy.model.config, plain(policy.config), policy.vocabulary.size)
        self._peak = peak_of(policy.device, policy.config.dtype) * ranks

    def cost(self, batches: Sequence[MiniBatch], recompute_old: bool, memory: float) -> StepCost:
        """Of a step on the rows of all ranks. memory: bytes at the highest."""
        return StepCost(self._flops(batches, recompute_old), self._peak, memory)

    def _flops(self, batches: Sequence[MiniBatch], recompute_old: bool) -> float:
        if self._known is None:
            return math.nan
        model, base = self._known
        total = 0.0
        for micro in (micro for batch in batches for micro in batch.micro):
            keep = None if self._every_row_acts else micro.with_advantage()
            total += of_rows(model, micro, keep).total
            if self._has_reference:
                total += of_rows(base, micro, keep).forward
            if recompute_old:
                total += of_rows(model, micro).forward
        return total


def of_rows(
    model: ModelFlops, rows: MicroBatch, keep: torch.Tensor | None = None, causal: bool = True
) -> Cost:
    """Of one pass over rows, of which the last token does not enter the model. keep: bool (R,), those that are
    computed; None: all. causal: see ModelFlops.of."""
    lengths, mask = rows.lengths, rows.loss_mask
    if keep is not None:
        lengths, mask = lengths[keep], mask[keep]
    return model.of((lengths - 1).clamp(min=1).tolist(), int(mask[:, 1:].sum()), causal)


def plain(config: PolicyConfig) -> PolicyConfig:
    """What of the configuration says what trains."""
    return PolicyConfig(lora=config.lora, last_layers=config.last_layers, train_router=config.train_router)
