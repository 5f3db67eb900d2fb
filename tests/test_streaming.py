"""Streaming rollouts: what starts when, under which weights, and what becomes of groups that others hold or lose."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgrpo.config import config_digest, load_config
from mgrpo.errors import InfrastructureError
from mgrpo.pipeline.streaming import Streaming, concurrency_of
from mgrpo.pipeline.worker_loop import Shutdown
from mgrpo.store.worker_client import WorkerClient
from tests.runs import RELAY
from tests.stream_kit import Run, Streamed, versions_of

SIX = [(group, rollout) for group in range(6) for rollout in range(2)]  # what max_lag 2 admits at version 0


@pytest.fixture
def made() -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        run.close()


def streaming(made: list[Run], folder: Path, *overrides: str) -> tuple[Run, Streamed]:
    run = Run(folder, *overrides)
    made.append(run)
    return run, Streamed(run)


def test_a_straggler_holds_back_no_other(made: list[Run], tmp_path: Path) -> None:
    """With the very first rollout stuck, all the others that the lag admits are played through the two places left, in
    order of their groups; the run ends when the straggler does."""
    run, worker = streaming(made, tmp_path, "rollout.concurrency=3")
    worker.begin((0, 0))
    worker.until(lambda: len(worker.gates.ended) == len(SIX) - 1, "the end of the others")
    assert worker.gates.started == SIX and worker.gates.most == 3
    worker.gates.shut.clear()
    assert [run.train() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    worker.end()
    assert worker.gates.started == SIX  # nothing beyond the run's end is begun
    reports = worker.reports["rollouts"]
    assert [r["step"] for r in reports] == sorted({r["step"] for r in reports}) and reports[-1]["step"] == 2
    figures = reports[0]["metrics"]
    assert 0 < figures["rollout/perf/busy"] <= 1 and figures["rollout/perf/queue"] == 3
    assert figures["rollout/perf/in_flight"] == pytest.approx(3 * figures["rollout/perf/busy"])


def test_the_lag_bounds_what_starts(made: list[Run], tmp_path: Path) -> None:
    """Free places alone start nothing; each published version admits the next step's groups."""
    run, worker = streaming(made, tmp_path, "rollout.concurrency=40", "trainer.steps=4")
    worker.begin()
    worker.until(lambda: len(worker.gates.ended) == len(SIX), "the end of what is admitted")
    assert worker.gates.started == SIX
    assert run.train() == [0, 1]
    worker.until(lambda: len(worker.gates.ended) == 16, "the next step's rollouts")
    assert worker.gates.started[12:] == [(6, 0), (6, 1), (7, 0), (7, 1)]


def test_lost_groups_are_replaced_to_the_end(made: list[Run], tmp_path: Path) -> None:
    """Each makes room for one beyond what was planned, the last one too, and no more than that are begun."""
    run, worker = streaming(made, tmp_path)
    worker.gates.lost = {1, 4, 5}
    worker.begin()
    assert [run.train() for _ in range(3)] == [[0, 2], [3, 6], [7, 8]]
    worker.end()
    assert worker.gates.started == [(group, rollout) for group in range(9) for rollout in range(2)]


def test_weights_arrive_while_a_rollout_runs(made: list[Run], tmp_path: Path) -> None:
    """It goes on under the new ones, and each token carries the version that sampled it."""
    run, worker = streaming(made, tmp_path)
    worker.begin((2, 1))
    run.train()
    worker.until(lambda: worker.team.engine.version == 1, "version 1 in the engine")
    worker.gates.shut.clear()
    worker.until(lambda: (2, 1) in worker.gates.ended, "the end of the held rollout")
    worker.context.shipper.drain()
    found = [versions_of(t) for t in worker.log.kept if (t.query, t.rollout) == ("1/2", 1)]
    assert found == [[0, 0, 1, 1]]


def test_a_version_whose_pull_was_broken_off_is_followed_by_the_newest(
    made: list[Run], tmp_path: Path
) -> None:
    """On a slow link the older one arrives to its end; nothing else is published that would bring the newest."""
    run, worker = streaming(made, tmp_path)
    worker.begin()
    worker.until(lambda: len(worker.gates.ended) == len(SIX), "the end of what is admitted")
    worker.team.begun = [0]
    run.train()
    worker.until(lambda: worker.team.engine.version == 1, "version 1 in the engine")


def test_a_group_waits_for_the_weights_that_it_needs(made: list[Run], tmp_path: Path) -> None:
    """The store has admitted groups of version 1, whose weights are still on their way: they start when those are
    there, and no token of theirs is older."""
    run, worker = streaming(made, tmp_path, "trainer.max_lag=1", "trainer.steps=4")
    worker.begin()
    worker.until(lambda: len(worker.gates.ended) == 8, "the end of what is admitted")
    worker.team.open.clear()
    run.train()
    run.train()  # groups 6 and 7 are admitted, and must not hold tokens of version 0 or 1
    open_groups = run.trainer.open_groups
    worker.until(lambda: {g.index for g in open_groups()} >= {4}, "groups that are open")
    assert len(worker.gates.started) == 8
    worker.team.open.set()
    worker.until(lambda: len(worker.gates.ended) == 16, "the end of the admitted groups")
    worker.context.shipper.drain()
    assert {v for t in worker.log.kept[8:] for v in versions_of(t)} == {2}


def test_evaluation_beside_the_rollouts_holds_its_weights(made: list[Run], tmp_path: Path) -> None:
    """Training rollouts go on while version 1 is evaluated; version 2 comes in when that is over."""
    run, worker = streaming(made, tmp_path, "eval.every=1", "trainer.steps=4")
    worker.begin("eval")
    run.train()
    worker.until(lambda: worker.context.number == 0 and worker.gates.in_flight >= 8, "the evaluation")
    run.train()
    worker.until(lambda: len(worker.gates.ended) >= 14, "training rollouts meanwhile")
    assert worker.team.engine.version == 1 and not worker.gates.evaluated
    worker.gates.shut.clear()
    worker.until(lambda: worker.team.engine.version == 2, "version 2 in the engine")
    assert worker.gates.evaluated[:16] == [[1, 1, 1, 1]] * 16  # 8 questions, greedy and sampled
    assert worker.reports["eval"][0]["step"] == 1 and worker.reports["eval"][0]["split"] == "validation"
    run.train()
    run.train()
    worker.end()
    assert [r["step"] for r in worker.reports["eval"]] == sorted(r["step"] for r in worker.reports["eval"])


def test_a_restarted_worker_plays_what_is_missing(made: list[Run], tmp_path: Path) -> None:
    """Ended rollouts are kept, those that were in flight are begun again, in order."""
    run, first = streaming(
        made, tmp_path, "rollout.concurrency=3", "trainer.questions=1", "trainer.minibatches=1"
    )
    first.begin((0, 0), (1, 1))
    first.until(lambda: len(first.gates.ended) == 4, "four ended rollouts")
    first.context.shipper.drain()
    first.worker.stop()
    with pytest.raises(Shutdown):
        first.end()
    second = Streamed(run).begin()
    assert [run.train() for _ in range(3)] == [[0], [1], [2]]
    second.end()
    assert second.gates.started == [(0, 0), (1, 1)]


def test_a_group_that_another_took_is_left_quietly(made: list[Run], tmp_path: Path) -> None:
    """The first refused record ends what is in flight of it and starts nothing more of it; the next group comes."""
    run, worker = streaming(made, tmp_path, "rollout.concurrency=2", "trainer.group_size=4")
    worker.begin((0, 0), (0, 1), (0, 2))
    worker.until(lambda: len(worker.gates.started) == 2, "two rollouts in flight")
    with WorkerClient(run.server.url, name="rollout-0", run=config_digest(run.config)) as other:
        question = worker.context.task.question(0, 0)
        meta: dict[str, Any] = {"question": question.text}
        taken = other.open_group(
            query="0/0", k=4, d_max={"main": 1}, index=0, meta=meta, seed=run.config.seed
        )
        assert taken.attempt == 1
        worker.gates.shut.discard((0, 0))
        worker.until(lambda: (1, 3) in worker.gates.ended, "the next group")
        assert [key for key in worker.gates.started if key[0] == 0] == [(0, 0), (0, 1), (0, 2)]
        assert [key for key in worker.gates.ended if key[0] == 0] == [(0, 0)]
        for rollout in range(4):
            other.invocation_done(taken, rollout, role="main", n_tokens=1, versions=(0, 0))
            other.rollout_final(taken, rollout, reward=1.0, correct=1.0, d_k={})
        other.flush()
        for _ in range(3):
            run.train()
        worker.end()
    assert sum(r["metrics"]["rollout/closed_groups"] for r in worker.reports["rollouts"]) == 1


def test_a_dead_workers_groups_are_taken_over(made: list[Run], tmp_path: Path) -> None:
    """Worker 1 opens its first group and dies: worker 0 plays that one and all others, each rollout once."""
    settings = ("rollout.workers=2", "store.heartbeat_timeout=1")
    run, worker = streaming(made, tmp_path, *settings)
    with WorkerClient(run.server.url, name="rollout-1", run=config_digest(run.config)) as dead:
        meta: dict[str, Any] = {"question": worker.context.task.question(1, 0).text}
        dead.open_group(query="0/1", k=2, d_max={"main": 1}, index=1, meta=meta, seed=run.config.seed)
    worker.begin()
    assert [run.train() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    worker.end()
    assert sorted(worker.gates.started) == SIX
    assert any("takes over the groups of rollout-1" in r["text"] for r in worker.reports["phase"])


def test_who_counts_as_dead(made: list[Run], tmp_path: Path) -> None:
    """Not a worker that has not begun yet, until it is late; at once one that was alive; none while the store knows of
    nobody."""
    _, worker = streaming(made, tmp_path, "rollout.workers=3", "store.heartbeat_timeout=60")
    stream: Any = Streaming(worker.context, worker.worker._evaluations)
    stream._background = lambda call, line: None

    def classes(*alive: str) -> list[int]:
        roles = [SimpleNamespace(version=0)]
        stream._world = SimpleNamespace(roles=roles, workers=list(alive))
        stream._divide_groups()
        found: list[int] = stream._share.classes()
        return found

    try:
        assert classes() == [0]
        assert classes("rollout-0", "trainer", "rollout-9") == [0]
        assert classes("rollout-0", "rollout-2") == [0]
        assert classes("rollout-0") == [0, 2]
        stream._began = time.monotonic() - 61
        assert classes("rollout-0") == [0, 1, 2]
        assert classes("rollout-0", "rollout-1") == [0, 2]  # class 1 is given back
    finally:
        stream.close()


def test_rollouts_that_all_fail_end_the_run(made: list[Run], tmp_path: Path) -> None:
    """Three steps' worth of them in a row, with the reason of the last."""
    _, worker = streaming(made, tmp_path)
    worker.gates.failing = True
    worker.begin()
    with pytest.raises(InfrastructureError, match=r"all 12 rollouts of the last 3 steps' worth .*KeyError"):
        worker.end()


def test_concurrency_follows_from_slots_and_lag() -> None:
    """The default fills the slots, as far as the lag admits groups for them."""

    def of(*overrides: str) -> int:
        return concurrency_of(load_config(RELAY, ["trainer.max_lag=2", *overrides]))

    assert of() == 3 * 4 * 4 and of("rollout.slots=40") == 40
    assert of("rollout.workers=2") == 6 * 4 and of("rollout.workers=5") == 3 * 4
    assert of("rollout.concurrency=500") == 500
    assert of("trainer.claim_window=3") == 2 * 4 * 4
    assert of("trainer.oversample=1.5") == 3 * 6 * 4
