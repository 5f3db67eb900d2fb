"""The ledger against a model of its promises, and seeded faults that this model must notice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from mgrpo.store import records as rec
from mgrpo.store.ledger import Ledger
from mgrpo.store.state import COMMITTED, LEASED, READY, Delivery, State
from mgrpo.transport.codec import Refusal
from tests.ledger_machine import LedgerMachine

SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_the_ledger_keeps_its_promises() -> None:
    """150 programs of 40 steps: two roles, zombies, a slow worker, store crashes."""
    run_state_machine_as_test(LedgerMachine, settings=SETTINGS)


class InOrder(LedgerMachine):
    """A run that trains its groups in the order of their numbers."""

    in_order = True


def test_the_ledger_keeps_its_promises_in_order() -> None:
    """Half as many programs for the runs that `mgrpo train` makes: no group is claimed before an older one."""
    run_state_machine_as_test(InOrder, settings=settings(SETTINGS, max_examples=75))


class Timed(LedgerMachine):
    """A run in which groups run out of time."""

    group_timeout = 60.0


def test_a_group_is_dropped_when_nothing_of_it_arrives_and_never_while_something_does() -> None:
    """A third of the programs have groups that run out of time: late records are refused, what was acknowledged stays
    acknowledged, and everything else is trained exactly once."""
    run_state_machine_as_test(Timed, settings=settings(SETTINGS, max_examples=50))


class NoFencing(Ledger):
    """Any epoch is as good as the current one."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.deliveries._check_epoch = lambda role, epoch, first=False: role  # type: ignore[method-assign]


class NoDedupe(Ledger):
    """A record under a known key replaces what is there."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        done = self.intake.invocation_done

        def forgetful(record: rec.InvocationDone, now: float) -> None:
            group = state.groups[record.query]
            group.invocations.pop((record.rollout, record.attempt, record.role, record.invocation), None)
            if record.rollout not in group.rollouts:
                done(record, now)

        self.intake.invocation_done = forgetful  # type: ignore[method-assign]


class AckIsTrained(Ledger):
    """A group counts as trained for good once it has been handed out."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        resume = self.deliveries.resume

        def keeping(request: rec.Resume) -> rec.Resumed:
            for query in list(state.roles[request.role].leased):
                state.move(state.groups[query].deliveries[request.role], COMMITTED)
            return resume(request)

        self.deliveries.resume = keeping  # type: ignore[method-assign]


class LeaseUnchecked(Ledger):
    """Whoever names a group that is leased holds it."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        # type: ignore[method-assign]
        self.deliveries._holds = lambda role, delivery, lease: delivery.state == LEASED


class LostZero(Ledger):
    """The end of a rollout without sub-agent invocations is acknowledged and dropped."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        final = self.intake.rollout_final

        def lossy(record: rec.RolloutFinal, now: float) -> None:
            if any(record.d_k.values()):
                final(record, now)

        self.intake.rollout_final = lossy  # type: ignore[method-assign]


class DoubleSeal(Ledger):
    """The last record of a group, sent again, seals it again."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        repeat = self.intake._is_repeat

        def sealing(group: Any, record: Any) -> bool:
            known = repeat(group, record)
            if known and len(group.rollouts) == group.opened.k:
                state.open[group.opened.query] = group
                self.intake._close(group, "")
            return known

        self.intake._is_repeat = sealing  # type: ignore[method-assign]


class ResumeKeepsApplied(Ledger):
    """What was applied after the checkpoint is not handed out again."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        move = state.move

        def stay(delivery: Delivery, to: str, **changes: Any) -> None:
            if delivery.state == "applied" and to == READY:
                move(delivery, COMMITTED)
            else:
                move(delivery, to, **changes)

        state.move = stay  # type: ignore[method-assign]


class AckBeforeWrite(Ledger):
    """A step is acknowledged before its row is written."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        apply = self.deliveries.apply

        def forgetful(request: rec.Groups) -> None:
            before = dict(state.dirty)
            apply(request)
            state.dirty = before

        self.deliveries.apply = forgetful  # type: ignore[method-assign]


class YoungerFirst(Ledger):
    """Whatever is sealed is handed out, though an older group is still to come."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.deliveries._waits_for_older = lambda role, chosen: False  # type: ignore[method-assign]


class AgeIsTimeout(Ledger):
    """A group is closed so long after its opening, also while its rollouts keep arriving."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        done, final = self.intake.invocation_done, self.intake.rollout_final

        def without_progress(method: Any) -> Any:
            def call(record: Any, now: float) -> None:
                before = state.groups[record.query].progress_at if record.query in state.groups else now
                method(record, now)
                state.groups[record.query].progress_at = before

            return call

        self.intake.invocation_done = without_progress(done)  # type: ignore[method-assign]
        self.intake.rollout_final = without_progress(final)  # type: ignore[method-assign]


class TakesLateRecords(Ledger):
    """A dropped group goes on."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.intake._check_rollout = lambda group, rollout: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "mutant",
    [
        NoFencing, NoDedupe, AckIsTrained, LeaseUnchecked, LostZero, DoubleSeal, ResumeKeepsApplied,
        AckBeforeWrite, YoungerFirst,
    ],
)  # fmt: skip
def test_a_seeded_fault_is_noticed(mutant: type[Ledger]) -> None:
    """The same programs against a ledger with one fault must fail: a test that cannot fail does not count."""
    machine = type("Mutant", (LedgerMachine,), {"make_ledger": mutant, "in_order": mutant is YoungerFirst})
    with pytest.raises((AssertionError, Refusal)):
        run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.parametrize("mutant", [AgeIsTimeout, TakesLateRecords])
def test_a_seeded_fault_of_the_time_out_is_noticed(mutant: type[Ledger]) -> None:
    """The same for programs in which time passes."""
    machine = type("Mutant", (Timed,), {"make_ledger": mutant})
    with pytest.raises((AssertionError, Refusal)):
        run_state_machine_as_test(machine, settings=SETTINGS)
