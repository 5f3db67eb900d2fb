"""What the batcher refuses: bad trajectories, contradictions, options; each by name, and nothing changes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from mgrpo.errors import ConflictError, TrajectoryError
from tests.batcher_kit import GOOD, assert_unchanged, make, snapshot, tokens_of

BAD: list[tuple[dict[str, Any], str, type[Exception]]] = [
    (dict(zip(("tokens", "loss_mask", "logprobs"), tokens_of(97, 1), strict=True)), "too_long", ValueError),
    ({"tokens": np.zeros(0, np.int32), "loss_mask": np.zeros(0, np.uint8),
      "logprobs": np.zeros(0, np.float32)}, "empty", ValueError),
    ({"loss_mask": np.zeros(3, np.uint8)}, "no_trainable", ValueError),
    ({"loss_mask": np.array([0, 1, 2], np.uint8)}, "loss_mask", ValueError),
    ({"loss_mask": np.array([1, 1, 255] * 9, np.uint8), "tokens": np.zeros(27, np.int32),
      "logprobs": np.zeros(27, np.float32)}, "loss_mask", ValueError),
    ({"advantage": float("nan")}, "advantage", ValueError),
    ({"advantage": float("inf")}, "advantage", ValueError),
    ({"advantage": 1e39}, "advantage", ValueError),
    ({"advantage": "much"}, "dtype", TypeError),
    ({"advantage": np.zeros(3, np.float32)}, "dtype", TypeError),
    ({"logprobs": np.array([0, np.nan, 0], np.float32)}, "logprobs", ValueError),
    ({"logprobs": np.array([0, 0, -np.inf], np.float32)}, "logprobs", ValueError),
    ({"loss_mask": np.ones(2, np.uint8)}, "length", ValueError),
    ({"logprobs": np.zeros(4, np.float32)}, "length", ValueError),
    ({"tokens": np.array([5, -1, 7], np.int32)}, "token_id", ValueError),
    ({"tokens": np.array([5, 1000, 7], np.int32)}, "token_id", ValueError),
    ({"rollout": 4}, "rollout", ValueError),
    ({"rollout": -1}, "rollout", ValueError),
    ({"invocation": -1}, "invocation", ValueError),
    ({"traj_id": -1}, "id", ValueError),
    ({"rollout": 2, "invocation": 2}, "sealed", ConflictError),  # more invocations than sealed
    ({"rollout": 3, "traj_id": 77}, "duplicate", ConflictError),  # another trajectory at a taken place
    ({"rollout": 3, "advantage": 0.0, "traj_id": 9}, "duplicate", ConflictError),  # same id, other content
    ({"traj_id": 9}, "duplicate", ConflictError),  # same id, other place
    ({"tokens": np.zeros(3, np.int64)}, "dtype", TypeError),
    ({"tokens": [1, 2, 3]}, "dtype", TypeError),
    ({"tokens": np.zeros((3, 1), np.int32)}, "dtype", TypeError),
    ({"tokens": np.zeros(6, np.int32)[::2]}, "dtype", TypeError),
    ({"loss_mask": np.ones(3, bool)}, "dtype", TypeError),
    ({"logprobs": np.zeros(3, np.float64)}, "dtype", TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "error"), BAD)
def test_a_bad_trajectory_is_named_and_changes_nothing(
    change: dict[str, Any], kind: str, error: type[Exception]
) -> None:
    """Each rejection is typed, names query, rollout and trajectory, and leaves the batcher as it was."""
    b = make(vocab_size=1000)
    b.seal("7/2", 2, 2)
    b.add(**{**GOOD, "rollout": 3, "traj_id": 9})
    before = snapshot(b)
    args = {**GOOD, **change}
    with pytest.raises(TrajectoryError) as caught:
        b.add(**args)
    e = caught.value
    assert isinstance(e, error) and isinstance(e, ValueError | TypeError | ConflictError)
    assert (e.kind, e.query, e.rollout, e.trajectory) == (kind, "7/2", args["rollout"], args["traj_id"])
    assert all(str(part) in str(e) for part in ("7/2", args["rollout"], args["traj_id"]))
    assert_unchanged(b, before)
    assert pickle.loads(pickle.dumps(e)).kind == kind
    b.add(**GOOD)


def test_add_many_names_the_bad_one_and_keeps_those_before_it() -> None:
    """Of three trajectories in columns the second is refused: the error names it, the first stays, the third is not
    taken; columns that do not fit each other are refused as a whole."""
    data = [tokens_of(5, i) for i in range(3)]
    columns: dict[str, Any] = {
        "rollouts": np.array([0, 1, 2], np.int32),
        "invocations": np.zeros(3, np.int32),
        "traj_ids": np.array([7, 8, 9]),
        "offsets": np.array([0, 5, 10, 15]),
        "tokens": np.concatenate([d[0] for d in data]),
        "loss_mask": np.concatenate([d[1] for d in data]),
        "logprobs": np.concatenate([d[2] for d in data]),
        "advantages": np.array([0.0, np.nan, 1.0], np.float32),
        "policy_versions": np.zeros(3, np.int32),
    }
    b = make()
    with pytest.raises(TrajectoryError) as caught:
        b.add_many(["q", "q", "q"], **columns)
    assert (caught.value.kind, caught.value.query, caught.value.rollout, caught.value.trajectory) == (
        "advantage",
        "q",
        1,
        8,
    )
    assert b.counters["accepted"] == 1 and snapshot(b)["traj_ids"].tolist() == [7]
    before = snapshot(b)
    good = {**columns, "advantages": np.zeros(3, np.float32)}
    for change in (
        {"offsets": np.array([0, 5, 10])},
        {"offsets": np.array([0, 5, 10, 16])},
        {"offsets": np.array([0, 10, 5, 15])},
        {"traj_ids": np.array([8, 9])},
        {"tokens": columns["tokens"][:-1]},
        {"advantages": np.zeros(3)},
    ):
        with pytest.raises((ValueError, TypeError)):
            b.add_many(["q", "q", "q"], **{**good, **change})
        assert_unchanged(b, before)
    assert b.add_many(["q", "q", "q"], **good) == 2


def test_seal_and_fail_refuse_contradictions() -> None:
    """Sealed twice with another d, below what is here, out of range; a failure of what arrived."""
    b = make()
    b.add(**GOOD)
    b.add(**{**GOOD, "invocation": 2, "traj_id": 42})
    b.seal("7/2", 0, 2)
    b.seal("7/2", 0, 2)
    before = snapshot(b)
    for call, args, kind in [
        (b.seal, ("7/2", 0, 3), "sealed"),
        (b.seal, ("7/2", 1, 2), "sealed"),
        (b.seal, ("7/2", 4, 1), "rollout"),
        (b.seal, ("7/2", 1, -1), "sealed"),
        (b.fail, ("7/2", 1, 2), "duplicate"),
        (b.fail, ("7/2", 0, 2), "sealed"),
        (b.fail, ("7/2", 9, 0), "rollout"),
    ]:
        with pytest.raises(TrajectoryError) as caught:
            call(*args)
        assert caught.value.kind == kind
        assert_unchanged(b, before)
    with pytest.raises(ValueError, match="unknown role 'x'"):
        b.seal("7/2", 0, 2, role="x")


def test_redelivery_is_ignored_and_counted() -> None:
    """The same trajectory again is no error, also after the seal; another read of the same bytes counts as the same."""
    b = make()
    assert b.add(**GOOD)
    before = b.used_bytes
    assert not b.add(**{**GOOD, "tokens": GOOD["tokens"].copy()})
    b.seal("7/2", 1, 1)
    assert not b.add(**GOOD)
    assert b.counters["redelivered"] == 2 and b.counters["accepted"] == 1 and b.used_bytes == before
    b.fail("7/2", 0, 0)
    b.fail("7/2", 0, 0)
    assert b.counters["failed"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k=0"),
        ({"d_max": {"sub": 0}}, "'sub' is 0"),
        ({"d_max": {}}, "no role"),
        ({"capacity": 0}, "capacity=0"),
        ({"dp": 0}, "dp=0"),
        ({"mode": "some"}, "'some'"),
        ({"sequence_weight": "some"}, "'some'"),
        ({"empty": "some"}, "'some'"),
        ({"overlong": "some"}, "'some'"),
        ({"sequence_weight": "per_invocation"}, "per_invocation"),
        ({"cost": (0.0, 0.0)}, "cost="),
        ({"max_segments": 0}, "max_segments=0"),
        ({"threads": 0}, "threads=0"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"arena_bytes": 10}, "arena_bytes=10"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    """ValueError with the option and its value."""
    with pytest.raises(ValueError, match=words):
        make(**options)
