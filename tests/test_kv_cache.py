"""The slot cache: rows at their own lengths, whatever slots they live in."""

from __future__ import annotations

import pytest
import torch

from mgrpo.engines.hf.kv_cache import SlotCache

HEADS, SIZE = 2, 4


def plan(cache: SlotCache, rows: list[int], starts: list[int], new: int) -> None:
    columns = torch.tensor(starts)[:, None] + torch.arange(new)
    cache.plan(torch.tensor(rows), columns, torch.full((len(rows),), new))


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 3, 4]])
def test_histories_come_back_whole_whatever_is_written_beside_them(rows):
    """Chunks of three histories, fed at different times, grown past the capacity, read back in order."""
    torch.manual_seed(0)
    cache = SlotCache(layers=1, slots=5, capacity=4)
    truth = torch.randn(3, HEADS, 20, SIZE)
    length = [0, 0, 0]
    for who, new in [((0, 1, 2), 3), ((1,), 1), ((0, 2), 2), ((0, 1, 2), 1), ((2,), 9), ((0, 1, 2), 4)]:
        chunk = torch.stack([truth[i, :, length[i] : length[i] + new] for i in who])
        plan(cache, [rows[i] for i in who], [length[i] for i in who], new)
        keys, values = cache.update(chunk, -chunk, 0)
        for i in who:
            length[i] += new
        for at, i in enumerate(who):
            assert torch.equal(keys[at, :, : length[i]], truth[i, :, : length[i]])
            assert torch.equal(values[at, :, : length[i]], -truth[i, :, : length[i]])
    assert length == [10, 9, 19]
    assert cache.capacity >= 19


def test_the_previous_state_is_each_historys_own():
    """with_previous gives [x_t ; x_{t-1}] across chunks with padding, zeros where a history starts over."""
    torch.manual_seed(0)
    cache = SlotCache(layers=1, slots=4, capacity=16)
    x = torch.randn(2, 6, 3)
    rows = torch.tensor([1, 3])
    cache.plan(rows, torch.arange(3).expand(2, 3), torch.tensor([3, 2]))  # the second row's third is padding
    first = cache.with_previous(x[:, :3], 0)
    assert torch.equal(first[..., :3], x[:, :3])
    assert torch.equal(first[..., 3:], torch.cat([torch.zeros(2, 1, 3), x[:, :2]], 1))
    cache.plan(rows, torch.tensor([[3], [2]]), torch.ones(2, dtype=torch.long))
    second = cache.with_previous(x[:, 3:4], 0)
    assert torch.equal(second[:, 0, 3:], torch.stack([x[0, 2], x[1, 1]]))
    cache.plan(rows, torch.tensor([[0], [3]]), torch.ones(2, dtype=torch.long))  # slot 1 was given to another
    third = cache.with_previous(x[:, 4:5], 0)
    assert torch.equal(third[:, 0, 3:], torch.stack([torch.zeros(3), x[1, 3]]))
