"""A KV cache of slots: rows of a batch that live at their own lengths, for any transformers decoder.

Every layer stores keys and values as (slots, heads, capacity, head_dim). One forward works on some of the
slots: `plan` chooses them, and the columns to which their new tokens go. `update` writes there and returns the
first `width` columns of the planned slots; the caller's 4-D mask hides what lies behind each row's own
length. Nothing is ever cleared: a column is written before the mask shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self._cache.slots, key_states.shape[1], self._cache.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        index = cache.flat_index(key_states.shape[1])
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored.view(-1, new.shape[-1]).index_copy_(0, index, new.reshape(-1, new.shape[-1]))
        if cache.dense:
            rows = len(cache.rows)
            return self.keys[:rows, :, : cache.width], self.values[:rows, :, : cache.width]
        keys, values = self.keys[:, :, : cache.width], self.values[:, :, : cache.width]
        return keys.index_select(0, cache.rows), values.index_select(0, cache.rows)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` columns, keeping what is stored."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            stored = getattr(self, name)
            wider = stored.new_zeros(*stored.shape[:2], capacity, stored.shape[-1])
            wider[:, :, : stored.shape[2]] = stored
            setattr(self, name, wider)

    def get_seq_length(self) -> int:
        return self._cache.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.width, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):  # type: ignore[misc]
    """KV cache of `slots` independent histories for a model of `layers` full-attention layers."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.rows = torch.zeros(0, dtype=torch.long)
        self.columns = torch.zeros(0, 0, dtype=torch.long)  # (R, W): where the new tokens go
        self.width, self.dense = 0, True
        self._last = torch.zeros(0, dtype=torch.long)  # (R,): which of the new tokens is a row's last
        self._fresh: Tensor | None = None  # (R, 1) bool: rows whose history starts in this forward
        self._carry: dict[int, Tensor] = {}  # layer -> (slots, W): the last x of each history
        self._index: dict[int, Tensor] = {}
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def plan(self, rows: Tensor, columns: Tensor, counts: Tensor, device: torch.device | None = None) -> None:
        """The next forward: slots rows (R,), increasing; write columns (R, W); real new tokens (R,). All lie in main
        memory, where a look at them waits for nothing; device: the model's (None: main memory)."""
        width = int(columns[:, -1].max()) + 1
        if width > self.capacity:
            self.capacity = max(width, 2 * self.capacity)
            for layer in self.layers:
                layer.grow(self.capacity)
        self.dense, self.width = int(rows[-1]) == len(rows) - 1, width
        starts = bool((columns[:, 0] == 0).any())
        self.rows, self.columns = rows.to(device), columns.to(device)
        if columns.shape[1] > 1:
            self._last = (counts - 1).to(device)
        self._fresh = self.columns[:, :1] == 0 if starts else None
        self._index = {}

    def with_previous(self, x: Tensor, layer_idx: int) -> Tensor:
        """See mgrpo.tasks.atlas.decoder.ShiftCache."""
        rows, new, width = x.shape
        if layer_idx not in self._carry:
            self._carry[layer_idx] = x.new_zeros(self.slots, width)
        carry = self._carry[layer_idx]
        before = carry[:rows] if self.dense else carry.index_select(0, self.rows)
        out = x.new_empty(rows, new, 2 * width)
        out[..., :width] = x
        out[:, 1:, width:] = x[:, :-1]
        out[:, 0, width:] = before if self._fresh is None else before.masked_fill(self._fresh, 0.0)
        last = x[:, 0] if new == 1 else x[torch.arange(rows, device=x.device), self._last]
        carry.index_copy_(0, self.rows, last)
        return out

    def flat_index(self, heads: int) -> Tensor:
        """(R * heads * W,) rows of the storage seen as (slots * heads * capacity, head_dim)."""
        if heads not in self._index:
            head = torch.arange(heads, device=self.rows.device)
            start = (self.rows[:, None] * heads + head) * self.capacity
            self._index[heads] = (start[..., None] + self.columns[:, None]).reshape(-1)
        return self._index[heads]
