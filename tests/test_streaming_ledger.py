"""The ledger against a model of streaming rollouts, and seeded faults that this model must notice."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import asdict

from mgrpo.store import records as rec
from mgrpo.store.ledger import Ledger
from mgrpo.store.state import READY, SURPLUS, Delivery, State
from mgrpo.transport.codec import Refusal
from tests.streaming_model import StreamingRun


def test_the_ledger_keeps_its_promises_to_a_run_that_streams() -> None:
    """120 programs of 40 steps over claim windows 1 to 5, steps of 1 to 3 groups, pools of up to 2 more, and lags."""
    for seed in range(120):
        StreamingRun(seed).run()


class WindowTooWide(Ledger):
    """One more group than claim_window says passes an older one."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        taken = state.taken_beyond
        state.taken_beyond = lambda role, index: taken(role, index) - 1  # type: ignore[method-assign]


class WindowOfOne(Ledger):
    """No group passes an older one, whatever claim_window says."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        state.taken_beyond = lambda role, index: 9999  # type: ignore[method-assign]


class WindowIsFree(Ledger):
    """Admission does not count with the groups that the window lets pass."""

    def __init__(self, state: State) -> None:
        class Params(rec.RunParams):
            def admitted_lag(self) -> int:
                return self.max_lag

        state.params = Params(**asdict(state.params))
        super().__init__(state)


class StepsAreVersions(Ledger):
    """Admission goes by the published version alone: between a step and its version it counts the step's groups
    among those to come, and what the step has set aside as room."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        inner = self.intake.open_group

        def open_group(*arguments: Any) -> rec.Opened:
            steps = {role.name: role.step for role in state.roles.values()}
            try:
                for role in state.roles.values():
                    role.step = (role.version or 0) - 1
                return inner(*arguments)
            finally:
                for role in state.roles.values():
                    role.step = steps[role.name]

        self.intake.open_group = open_group  # type: ignore[method-assign]


class SurplusIsGone(Ledger):
    """A rollback behind a step does not bring back what the step has set aside."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        move = state.move

        def stay(delivery: Delivery, to: str, **changes: Any) -> None:
            if delivery.state != SURPLUS or to != READY:
                move(delivery, to, **changes)

        state.move = stay  # type: ignore[method-assign]


class SurplusIsOver(Ledger):
    """What a step has set aside counts as over before a checkpoint holds the step."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        final = state.is_final
        state.is_final = lambda d: d.state == SURPLUS or final(d)  # type: ignore[method-assign]


class OldAtTheClaim(Ledger):
    """A claim made ahead counts as trained on at the version of the claim."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.deliveries._version_at_training = lambda role: role.version or 0  # type: ignore[method-assign]


class TakesFromTheLiving(Ledger):
    """Whoever opens a group has it."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        inner, alive = self.intake.open_group, state.is_alive

        def open_group(*arguments: Any) -> rec.Opened:
            state.is_alive = lambda worker, now: False  # type: ignore[method-assign]
            try:
                return inner(*arguments)
            finally:
                state.is_alive = alive  # type: ignore[method-assign]

        self.intake.open_group = open_group  # type: ignore[method-assign]


class KeepsForTheDead(Ledger):
    """A worker that was heard of once has its groups for ever."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        state.is_alive = lambda worker, now: worker in state.workers  # type: ignore[method-assign]


class ForgetsTheLiving(Ledger):
    """After a restart of the store every worker counts as dead."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        state.workers.clear()


@pytest.mark.parametrize(
    "mutant",
    [
        WindowTooWide, WindowOfOne, WindowIsFree, StepsAreVersions, SurplusIsGone, SurplusIsOver, OldAtTheClaim,
        TakesFromTheLiving, KeepsForTheDead, ForgetsTheLiving,
    ],
)  # fmt: skip
def test_a_seeded_fault_of_streaming_is_noticed(mutant: type[Ledger]) -> None:
    """Some program among the first 120 must fail with each of these faults."""
    with pytest.raises((AssertionError, Refusal)):
        for seed in range(120):
            StreamingRun(seed, mutant).run()
