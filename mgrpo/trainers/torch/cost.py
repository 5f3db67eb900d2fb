"""What a step of the torch backend costs: FLOPs of the rows that it computes, and the memory at its highest.

FLOPs are those of all ranks: rank 0 has the rows of all of them. Beside forward and backward of the rows that move the
policy they are the algorithm's own forward passes: old log-probs where they are computed anew (of every row), and the
reference's. Where the policy computes shared prefixes once they count once, and one that several micro-batches hold
counts once for all of these. A device's peak is taken for those of the other ranks too, which have the same
policy.device. Memory is that of the fullest rank, as far as the gather of the metrics, which there is anyway, brings it
to rank 0: what comes behind it in a step, its update and the publishing, is seen by that of the next step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch

from mgrpo.batcher.prefix_tree import prefix_tree
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
        self._shares = policy.shares
        self._peak = peak_of(policy.device, policy.config.dtype) * ranks

    def cost(self, batches: Sequence[MiniBatch], recompute_old: bool, memory: float) -> StepCost:
        """Of a step on the rows of all ranks. memory: bytes at the highest."""
        return StepCost(self._flops(batches, recompute_old), self._peak, memory)

    def _flops(self, batches: Sequence[MiniBatch], recompute_old: bool) -> float:
        if self._known is None:
            return math.nan
        model, base = self._known
        total = 0.0
        for batch in batches:
            held: torch.Tensor | None = None  # for the rows that are trained on
            known: torch.Tensor | None = None  # for every row
            for micro in batch.micro:
                keep = None if self._every_row_acts else micro.with_advantage()
                prefix = [(0, len(micro.prefix))] if self._shares and micro.prefix is not None else []
                nodes, scored = computed(micro, keep, self._shares)
                if micro.prefix is not held and (keep is None or bool(keep.any())):
                    held, nodes = micro.prefix, prefix + nodes
                total += model.of_nodes(nodes, scored).total
                if self._has_reference:
                    total += base.of_nodes(nodes, scored).forward
                if recompute_old:
                    nodes, scored = computed(micro, shares=self._shares)
                    if micro.prefix is not known:
                        known, nodes = micro.prefix, prefix + nodes
                    total += model.of_nodes(nodes, scored).forward
        return total


def of_rows(model: ModelFlops, rows: MicroBatch, causal: bool = True, shares: bool = False) -> Cost:
    """Of one pass over rows. causal: see ModelFlops.of, where each row is computed whole. shares: see computed()."""
    nodes, scored = computed(rows, shares=shares)
    return (
        model.of_nodes(nodes, scored) if causal else model.of([end for _, end in nodes], scored, causal=False)
    )


def computed(
    rows: MicroBatch, keep: torch.Tensor | None = None, shares: bool = False
) -> tuple[list[tuple[int, int]], int]:
    """The nodes (begin, end) that one pass over rows computes, whole rows being nodes that begin at 0, and the tokens
    whose log-probs it takes. The last token of a row does not enter the model. keep: bool (R,), the rows that are
    computed; None: all. shares: what they begin with is computed once, and a prefix that is held for several
    micro-batches (rows.prefix) not here."""
    ids, lengths, mask = rows.ids, (rows.lengths - 1).clamp(min=1), rows.loss_mask
    if keep is not None:
        ids, lengths, mask = ids[keep], lengths[keep], mask[keep]
    scored = int(mask[:, 1:].sum())
    if not shares:
        return [(0, length) for length in lengths.tolist()], scored
    held = 0 if rows.prefix is None else len(rows.prefix)
    beyond = lengths > held  # the others end with the prefix
    if not bool(beyond.any()):
        return [], scored
    tree = prefix_tree(ids[beyond, held:].contiguous().numpy(), (lengths[beyond] - held).numpy())
    return list(zip((tree.begin + held).tolist(), (tree.end + held).tolist(), strict=True)), scored


def plain(config: PolicyConfig) -> PolicyConfig:
    """What of the configuration says what trains."""
    return PolicyConfig(lora=config.lora, last_layers=config.last_layers, train_router=config.train_router)
