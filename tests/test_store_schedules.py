"""The store under networks that drop, duplicate, reorder and delay, with crashes of every process."""

from __future__ import annotations

import pytest

from mgrpo.transport.codec import Refusal
from tests.schedules import World
from tests.test_ledger import AckIsTrained, LostZero, ResumeKeepsApplied
from tests.test_streaming_ledger import KeepsForTheDead, SurplusIsGone


def test_every_group_is_trained_exactly_once_whatever_the_network_does() -> None:
    """250 schedules; tests/chaos plays 10,000."""
    for seed in range(250):
        World(seed).run()


@pytest.mark.parametrize(
    "mutant", [AckIsTrained, LostZero, ResumeKeepsApplied, KeepsForTheDead, SurplusIsGone]
)
def test_the_schedules_notice_a_seeded_fault(mutant: type) -> None:
    """Some schedule among the first 100 must fail with each of these faults."""
    with pytest.raises((AssertionError, Refusal)):
        for seed in range(100):
            World(seed, mutant).run()
