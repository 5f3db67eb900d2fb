"""Double buffering: the next batch is assembled while the current one is used."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mgrpo.batcher import Prefetcher
from mgrpo.errors import DeadlineError
from tests.batcher_kit import make, replay, workload


def test_batches_are_prefetched_in_order_and_dropped_when_done() -> None:
    """Each batch equals a direct plan, buffers alternate, and a batch's queries leave when the next is asked
    for."""
    b = make()
    replay(workload(b, 3, queries=7), b)
    names = b.ready()
    wanted = [(0, 2), (0, 2), (1, names[4:6])]
    expected = []
    for step, queries in ((0, names[:2]), (0, names[2:4]), (1, names[4:6])):
        plan = b.plan(step, queries=queries)
        out = plan.buffers(position_ids=True)
        b.write(plan, 0, out)
        expected.append(out)
    seen: list[Any] = []
    with Prefetcher(b, wanted, timeout=20, position_ids=True) as batches:
        for i, batch in enumerate(batches):
            assert len(b) == 7 - 2 * i
            for key in ("ids", "logprobs", "position_ids", "loss_mask"):
                assert (batch.buffers[key] == expected[i][key]).all()
            seen.append(batch.buffers["ids"])
    assert b.ready() == names[6:] and len(seen) == 3
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_prefetch_waits_for_groups_and_gives_up_at_its_deadline() -> None:
    """Groups sealed later from another thread are picked up; without them DeadlineError says what was waited
    for."""
    b = make(k=1)
    late = threading.Timer(0.2, lambda: (b.seal("a", 0, 0), b.seal("b", 0, 0)))
    late.start()
    with Prefetcher(b, [(0, 2), (1, 1)], timeout=0.5) as batches:
        assert next(batches).plan.queries == ["a", "b"]
        with pytest.raises(DeadlineError, match=r"step 1: 1 groups were not ready within 0\.5 s"):
            next(batches)
    late.join()
    with pytest.raises(ValueError, match="timeout=0"):
        Prefetcher(b, [], timeout=0)
    assert not b.wait_ready(["nope"], 0.01)
