"""Signs of a run that goes wrong: they show where runs stalled, and not where runs learned."""

from __future__ import annotations

from collections.abc import Sequence

from mgrpo.run.signs import Signs


def warnings(training: Sequence[float], validation: Sequence[float], every: int, n: int = 60) -> list[int]:
    """Steps with a warning; training: accuracy between two evaluations, each on n questions."""
    signs, found = Signs(), []
    assert signs.take("eval", {"step": 0, "split": "validation", "n": n, "sampled": 0.0}) is None
    for i, (right, accuracy) in enumerate(zip(training, validation, strict=True)):
        for step in range(i * every + 1, (i + 1) * every + 1):
            metrics = {"main/reward/correct": right, "main/policy/entropy": 0.1}
            assert signs.take("step", {"role": "main", "step": step, "metrics": metrics}) is None
            assert (
                signs.take("step", {"role": "sub", "step": step, "metrics": {"sub/reward/correct": 0.0}})
                is None
            )
        at = (i + 1) * every
        assert signs.take("eval", {"step": at, "split": "heldout", "n": n, "sampled": 0.0}) is None
        line = signs.take("eval", {"step": at, "split": "validation", "n": n, "sampled": accuracy})
        if line is not None:
            assert f"{right:.2f} of the training" in line and f"{accuracy:.2f} of the validation" in line
            found.append(at)
    return found


def test_learning_by_heart_is_said_and_learning_is_not() -> None:
    """The accuracies of a run that stalled and of one that learned, 25 steps apart."""
    assert warnings([0.151, 0.401, 0.530, 0.606], [0.100, 0.183, 0.150, 0.233], 25) == [50, 75, 100]
    assert warnings([0.336, 0.913, 0.963, 0.970], [0.767, 0.933, 0.967, 0.983], 25) == []


def test_a_small_evaluation_proves_nothing() -> None:
    """Within the noise of the number of questions nothing is said; steps trained again count once."""
    assert warnings([0.6], [0.125], 10, n=8) == []
    assert warnings([0.6], [0.125], 10, n=120) == [10]
    signs = Signs()
    for right in (0.9, 0.1):
        signs.take("step", {"role": "main", "step": 1, "metrics": {"main/reward/correct": right}})
    assert signs.take("eval", {"step": 1, "split": "validation", "n": 120, "sampled": 0.0}) is None
