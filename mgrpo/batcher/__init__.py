"""The batcher: rollout groups -> aligned, packed, fixed-shape batches."""

from mgrpo.batcher.batcher import Batcher
from mgrpo.batcher.plan import Buffers, Plan, Rows

__all__ = ["Batcher", "Buffers", "Plan", "Rows"]
