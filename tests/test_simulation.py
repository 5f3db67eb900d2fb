"""The pipeline simulator of the benches: it obeys the store's bound, and no scheduler beats the least time there is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import bench_rollouts
from bench.simulation import Setup, Simulation, StepCosts, busy_share, steady_part
from bench.store_rules import AnyOrder, RealStore
from bench.waits import least_seconds, one_wait, waits

K, SLOTS, STEPS = 4, 16, 30


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("max_lag", [1, 3])
def test_no_token_is_too_old_and_nothing_is_faster_than_the_bound(max_lag: int, workers: int) -> None:
    """Few rollouts a step: the longest of each decides. Streaming is near what any scheduler needs, waves are not."""
    work = one_wait(K, 1.0)
    least = least_seconds(4, K, SLOTS, max_lag, STEPS, 1.0)
    stream = Simulation(Setup(4, K, SLOTS, workers), work, RealStore(K, 4, max_lag)).run(steps=STEPS)
    waves = Simulation(Setup(4, K, SLOTS, 1, "waves"), work, RealStore(K, 4, max_lag)).run(steps=STEPS)
    assert max(stream.staleness) <= max_lag and sum(stream.oldest.values()) == STEPS * 4 * K
    assert least <= stream.seconds < waves.seconds
    assert stream.seconds < 1.3 * least
    assert stream.busy(*stream.steady()) > waves.busy(*waves.steady())


def test_waves_take_the_longest_rollout_of_each_step() -> None:
    """As many slots as rollouts: strict waves last exactly as long as the longest rollouts, one after the other."""
    setup = Setup(4, K, 4 * K, 1, "waves", step_s=0.25)
    outcome = Simulation(setup, one_wait(K, 1.0), RealStore(K, 4, 0)).run(steps=8)
    longest = [max(s for i in range(4) for s in waits(step * 4 + i, K, 1.0)) for step in range(8)]
    assert outcome.seconds == pytest.approx(sum(longest) + 8 * 0.25)
    assert outcome.idle(0.0, outcome.seconds) == pytest.approx(sum(longest) / outcome.seconds)


def test_a_claim_window_costs_what_it_buys() -> None:
    """The window's steps come off max_lag: no token is older than max_lag with it either."""
    rules = RealStore(K, 4, 3, claim_window=5)
    outcome = Simulation(Setup(4, K, SLOTS), one_wait(K, 1.0), rules).run(steps=STEPS)
    assert 2 <= max(outcome.staleness) <= 3


def test_rivals_are_played_by_their_rules() -> None:
    """Without a bound every slot is always busy; late groups are trained too old, or dropped; the cut ones are lost."""
    work, setup = one_wait(K, 1.5), Setup(4, K, SLOTS)
    ideal = Simulation(setup, work, AnyOrder(K, 4, math.inf)).run(steps=STEPS)
    assert ideal.busy(0.0, ideal.seconds) > 0.99
    late = Simulation(setup, work, AnyOrder(K, 4, 1)).run(steps=STEPS)
    assert max(late.staleness) > 1 and late.lost == 0
    dropped = Simulation(setup, work, AnyOrder(K, 4, 1, drop_late=True)).run(steps=STEPS)
    assert max(dropped.staleness) <= 1 and dropped.lost > 0
    cut = Simulation(Setup(4, K, 20, 1, "cut"), work, AnyOrder(K, 4, math.inf)).run(steps=STEPS)
    assert set(cut.staleness) == {0} and cut.failed > 0
    assert (
        cut.seconds
        < Simulation(Setup(4, K, 20, 1, "waves"), work, RealStore(K, 4, 0)).run(steps=STEPS).seconds
    )


def test_engines_slow_down_with_their_load_and_deadlines_fail_rollouts() -> None:
    """One engine at a + b n seconds a token; a rollout over its deadline is a failed one, and its group goes on."""

    def work(index: int) -> list[list[tuple[float, float]]]:
        return [[(100.0, 0.0)] for _ in range(K)]

    setup = Setup(2, K, 2 * K, engines=1, decode=(0.01, 0.001), train_rate=1000.0, ranks=2)
    outcome = Simulation(setup, work, RealStore(K, 2, 0)).run(steps=1)
    claimed, trained, waited = outcome.steps[0]
    assert claimed == pytest.approx(100 * (0.01 + 0.001 * 2 * K)) and waited == claimed
    assert trained - claimed == pytest.approx(0.8)  # 800 tokens, evenly divided

    def one_slow(index: int) -> list[list[tuple[float, float]]]:
        return [[(0.0, 9.0 if rollout == 0 else 1.0)] for rollout in range(K)]

    outcome = Simulation(Setup(2, K, 2 * K, deadline_s=2.0), one_slow, RealStore(K, 2, 0)).run(steps=3)
    assert outcome.failed == 6 and outcome.seconds == pytest.approx(6.0)


def test_busy_shares_are_cut_at_their_borders() -> None:
    """Spans count within the window alone; the window begins with the first rollout of a step."""
    assert busy_share([(0.0, 2.0), (1.0, 5.0), (9.0, 10.0)], 2, 1.0, 3.0) == pytest.approx(0.75)
    starts = [(0, 0.0), (1, 4.0), (1, 3.0), (2, 5.0), (3, 9.0), (3, 8.0)]
    assert steady_part(starts, 1) == (3.0, 8.0)


def test_the_batchers_plan_tells_of_a_rank_that_waits() -> None:
    """One long sequence among short ones keeps one of two ranks alone."""
    costs = StepCosts(2, 2)
    assert costs.lockstep(0, [[6400.0, 6400.0], [6400.0, 6400.0]]) == pytest.approx(1.0)
    assert costs.lockstep(1, [[32000.0, 640.0], [640.0]]) > 1.5


def test_the_bench_of_whole_runs_runs(tmp_path: Path) -> None:
    """Its task and its engine of no cost still fit the product, and no trained token is older than max_lag."""
    measured = bench_rollouts.run(bench_rollouts.Case(2, 0.5, 1, 1, 5), tmp_path)
    assert 0 < measured.busy <= 1 and measured.age_max <= 1 and measured.wall >= measured.ideal


def test_the_turnaround_leaves_out_steps_whose_rollouts_waited_for_a_place() -> None:
    """Steps of one group, max_lag 0: step 1 begins 0.2 s after step 0 with nothing in between; step 2 begins 0.9 s
    after step 1, but a rollout that was still to be started took a place first, and says nothing."""
    case = bench_rollouts.Case(1, 1.0, 0, 1, 3)
    steps = [(0, 0.0, 1.0), (1, 1.2, 1.0), (2, 3.1, 1.0)]
    assert bench_rollouts.turnaround(case, steps) == pytest.approx((0.2 + 0.9) / 2)
    late = (3, 2.5, 1.0)  # of no step that is looked at
    assert bench_rollouts.turnaround(case, [*steps, late]) == pytest.approx(0.2)
    assert bench_rollouts.turnaround(case, [*steps, late, (3, 1.1, 1.0)]) == 0.0
