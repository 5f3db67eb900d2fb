"""What crosses the border between Python and the batcher's C++ core: memory of any alignment, and plans of other
batchers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mgrpo.batcher import Batcher, Plan
from tests.batcher_kit import assert_same, everything, make, replay, tokens_of, workload


def shifted(array: npt.NDArray[Any], by: int = 1) -> npt.NDArray[Any]:
    """The same values in memory that begins `by` bytes after a multiple of 64."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    at = -raw.ctypes.data % 64 + by
    out = raw[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    assert out.ctypes.data % 64 == by
    return out


def filled(queries: int = 3, seed: int = 0, **options: Any) -> Batcher:
    batcher = make(**options)
    replay(workload(batcher, seed, queries), batcher)
    return batcher


@pytest.mark.parametrize("by", [1, 2, 3])
def test_trajectories_may_lie_at_any_address(by: int) -> None:
    """Slices of a message or of a file begin at any byte; the plan is that of aligned arrays, to the last bit."""
    here, there = make(k=2), make(k=2)
    for batcher, move in ((here, lambda a: a), (there, lambda a: shifted(a, by))):
        for rollout in range(2):
            columns = [move(column) for column in tokens_of(40 + rollout, rollout)]
            batcher.add("q", rollout, 0, rollout, *columns, float(rollout), 0)
            batcher.seal("q", rollout, 1)
    assert_same(everything(here, 1), everything(there, 1))


def test_columns_of_many_trajectories_may_lie_at_any_address() -> None:
    """add_many and load_state_dict as add."""
    ids, mask, logprobs = tokens_of(30, 1)
    columns: dict[str, npt.NDArray[Any]] = {
        "rollouts": np.array([0, 1], np.int32),
        "invocations": np.zeros(2, np.int32),
        "traj_ids": np.array([5, 6]),
        "offsets": np.array([0, 10, 30]),
        "tokens": ids,
        "loss_mask": np.ones_like(mask),
        "logprobs": logprobs,
        "advantages": np.array([0.0, 1.0], np.float32),
        "policy_versions": np.zeros(2, np.int32),
    }
    here, there, again = make(k=2), make(k=2), make(k=2)
    here.add_many(["q", "q"], **columns)
    there.add_many(["q", "q"], **{name: shifted(column) for name, column in columns.items()})
    for batcher in (here, there):
        batcher.seal("q", 0, 1)
        batcher.seal("q", 1, 1)
    state = there.state_dict()
    again.load_state_dict({name: shifted(v) if isinstance(v, np.ndarray) else v for name, v in state.items()})
    assert_same(everything(here, 1), everything(there, 1))
    assert_same(everything(here, 1), everything(again, 1))


def test_an_output_buffer_at_an_odd_address_is_refused_by_name() -> None:
    """Streaming stores need aligned addresses; nothing is written to any of the buffers."""
    batcher = filled()
    plan = batcher.plan(1)
    for name in ("ids", "logprobs", "seg_weight", "seg_traj", "cu_seqlens", "position_ids", "advantages"):
        buffers = plan.buffers(advantages=True, position_ids=True)
        for buffer in buffers.values():
            buffer.fill(7)
        buffers[name] = shifted(buffers[name], 2)
        with pytest.raises(ValueError, match=f"'{name}' begins at an address that is not a multiple of"):
            batcher.write(plan, 0, buffers)
        assert all((buffer == 7).all() for buffer in buffers.values())
    padded = plan.padded_buffers(0, 0)
    padded["logprobs"] = shifted(padded["logprobs"], 1)
    with pytest.raises(ValueError, match="'logprobs' begins at an address"):
        batcher.write_padded(plan, 0, 0, padded)


def test_an_output_buffer_need_only_be_aligned_to_its_own_type() -> None:
    """Views that begin at the fourth byte of a line are written as any other."""
    batcher = filled()
    plan = batcher.plan(1)
    expected, moved = plan.buffers(), plan.buffers()
    moved = {name: shifted(buffer, max(4, buffer.itemsize)) for name, buffer in moved.items()}
    batcher.write(plan, 0, expected)
    batcher.write(plan, 0, moved)
    assert_same(expected, moved)


def written(batcher: Batcher, plan: Plan, padded: bool) -> None:
    if padded:
        batcher.write_padded(plan, 0, 0, plan.padded_buffers(0, 0))
    else:
        batcher.write(plan, 0, plan.buffers())


@pytest.mark.parametrize("padded", [False, True])
def test_the_plan_of_another_batcher_is_refused(padded: bool) -> None:
    """Its handles point into another arena: a larger one, an equal one, an empty one, and one that came later at the
    same address. The batcher that made the plan still takes it."""
    batcher = filled(queries=6)
    plan = batcher.plan(1)
    for other in (filled(queries=1, seed=3), filled(queries=6), make()):
        with pytest.raises(ValueError, match=r"made by batcher \d+, this is batcher \d+"):
            written(other, plan, padded)
    written(batcher, plan, padded)
    del batcher
    with pytest.raises(ValueError, match="made by batcher"):
        written(filled(queries=6), plan, padded)


def test_a_restored_batcher_refuses_the_plans_of_the_one_it_was_saved_from() -> None:
    """The tokens lie elsewhere in its arena; its own plan of the same step is the same batch."""
    batcher = filled()
    plan = batcher.plan(1)
    restored = make()
    restored.load_state_dict(batcher.state_dict())
    with pytest.raises(ValueError, match="made by batcher"):
        written(restored, plan, False)
    assert_same(everything(batcher, 1), everything(restored, 1))
