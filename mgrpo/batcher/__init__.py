"""The batcher: rollout groups -> aligned, packed, fixed-shape batches."""

from mgrpo.batcher.batcher import Batcher
from mgrpo.batcher.plan import Buffers, Plan, Rows
from mgrpo.batcher.prefetch import Batch, Prefetcher

__all__ = ["Batch", "Batcher", "Buffers", "Plan", "Prefetcher", "Rows"]
