"""The rollout worker's own decisions: which groups it plays, what it counts, and what ends the run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgrpo.addresses import Addresses
from mgrpo.config import load_config
from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question
from mgrpo.errors import GroupClosedError, InfrastructureError, RetryAfterError
from mgrpo.pipeline import rollout_worker as worker_module
from mgrpo.pipeline.rollout_worker import run_worker
from mgrpo.pipeline.worker_context import MAX_FAILED_BATCHES
from mgrpo.pipeline.worker_loop import Shutdown
from mgrpo.types import Rollout
from tests.play_kit import GivenTask
from tests.runs import RELAY, started
from tests.ship_kit import FakeStore, group
from tests.worker_kit import ROLES, FakeTeam, Worker


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path, GivenTask(_script))
    try:
        yield made
    finally:
        made.close()


async def _script(episode: Episode) -> Rollout:
    """Rollout 0 of every question is well; what the other does follows from the question's number."""
    trouble = ["", "length", "task", "infrastructure", "score", "all"][int(episode.query.split("/")[-1])]
    main = episode.open("main")
    main.append("hi")
    await main.sample(2, stop=".")
    if episode.rollout or trouble == "all":
        if trouble == "length":
            main.append("w" * 100)
        if trouble in ("task", "all"):
            raise KeyError(trouble)
        if trouble == "infrastructure":
            raise InfrastructureError("the search is down")
    main.close(**({} if trouble == "score" and episode.rollout else {"format": 1.0}))
    return episode.finish(1.0)


def test_failures_are_counted_by_kind_and_the_rest_arrives(worker: Worker) -> None:
    """Each question loses its second rollout in another way: the store hears of every one, no other is lost."""
    worker.open(*["open"] * 4)
    metrics = worker.play()
    assert metrics["rollout/failed"] == 3
    by = {name: metrics[f"rollout/failed_by_{name}"] for name in ("length", "task", "infrastructure")}
    assert by == {"length": 1, "task": 1, "infrastructure": 1}
    ends = [(method, query) for method, query, _ in worker.store.records if method != "invocation_done"]
    assert sorted(q for m, q in ends if m == "rollout_fail") == ["0/1", "0/2", "0/3"]
    assert sorted(q for m, q in ends if m == "rollout_final") == ["0/0", "0/0", "0/1", "0/2", "0/3"]
    reasons = "\n".join(worker.store.reasons)
    for words in (
        "agents.main.max_length",
        "KeyError: 'task'",
        "the search is down",
        "test_rollout_worker.py:",
    ):
        assert words in reasons


def test_the_numbers_of_a_task_are_reported_as_means(worker: Worker) -> None:
    """Over the conversations of a rollout batch that reported one; nothing else has to know the name."""

    async def script(episode: Episode) -> Rollout:
        main = episode.open("main")
        main.append("hi")
        await main.sample(2, stop=".")
        main.metric("words", 1 + episode.rollout)
        if episode.rollout:
            episode.metric("late", 7)
        main.close(format=1.0)
        return episode.finish(1.0)

    worker.context.task = GivenTask(script)
    worker.open("open", "open")
    metrics = worker.play()
    assert (metrics["main/task/words"], metrics["rollout/task/late"]) == (1.5, 7.0)


def test_a_score_that_the_reward_needs_is_missed_by_name(worker: Worker) -> None:
    """Before anything is sent, so that no trainer meets a trajectory that it cannot pay."""
    worker.store.opened = {0: group("0/4", 4), 1: RetryAfterError("too far ahead")}
    assert worker.play()["rollout/failed_by_task"] == 1
    assert "format" in worker.store.reasons[0]
    assert [q for m, q, k in worker.store.records if m == "rollout_final"] == ["0/4"]


def test_closed_groups_are_left_out(worker: Worker) -> None:
    """What the store has dropped incomplete is not played again; its place in the order is passed."""
    worker.open("open", "dropped", "open", "sealed")
    batch = worker.batches._open_batch()
    assert [g.index for g, _ in batch] == [0, 2]
    worker.batches._skipped = 0
    assert worker.play()["rollout/closed_groups"] == 2 and worker.batches._cursor == 4
    worker.store.opened = {4: GroupClosedError("lost to every role"), 5: RetryAfterError("too far ahead")}
    assert worker.batches._open_batch() == [] and worker.batches._cursor == 5
    worker.store.opened = {5: group("1/0", 5), 6: RetryAfterError("too far ahead")}
    worker.batches._play(worker.batches._open_batch())
    assert worker.store.reports[-1]["metrics"]["rollout/closed_groups"] == 1


def test_complete_groups_stay_beside_an_incomplete_one(worker: Worker) -> None:
    """After a restart the engines see the batches they saw before: what has ended is played along and not sent."""
    worker.store.opened = {
        0: group("0/0", 0, state="sealed", finished=2),
        1: group("0/2", 1, finished=1),
        2: RetryAfterError("too far ahead"),
    }
    worker.play()
    assert {(query, k) for _, query, k in worker.store.records} == {("0/2", 1)}


def test_a_group_that_is_dropped_while_it_is_played_is_counted(worker: Worker) -> None:
    """Its records are refused, the others arrive, and the worker goes on."""
    worker.store.closed = ("0/1",)
    worker.open("open", "open")
    assert worker.play()["rollout/closed_groups"] == 1
    assert ("rollout_final", "0/0", 1) in worker.store.records


def test_what_fails_every_rollout_ends_the_run_with_its_place(worker: Worker) -> None:
    """Rollout batches in a row without a rollout: the error carries the reason and the line that raised it."""
    worker.store.opened = {0: group("0/5", 0), 1: RetryAfterError("too far ahead")}
    for _ in range(MAX_FAILED_BATCHES - 1):
        assert worker.play()["rollout/failed"] == 2
    with pytest.raises(
        InfrastructureError,
        match=r"each of 3 rollout batches .* KeyError: 'all' \(.*test_rollout_worker\.py:\d+, in _",
    ):
        worker.play()


def test_a_question_in_any_language_is_opened(worker: Worker) -> None:
    """The store takes 256 bytes of a question, and no lone surrogate."""
    for text in ("\u5929" * 200, "a\ud800"):
        worker.store.metas.clear()
        worker.open("open")
        worker.context.task.question = lambda index, seed, text=text: Question(text, "a")
        worker.play()
        assert 0 < len(str(worker.store.metas[0]["question"]).encode()) <= 256


@pytest.mark.parametrize("gives", ["raises", "nothing", "numbers"])
def test_a_question_that_the_task_cannot_give_fails_its_rollouts(worker: Worker, gives: str) -> None:
    """One bad row of a data set: its group fails by name and place, the next question is played."""

    def question(index: int, seed: int) -> Any:
        if index == 1:
            return Question("q", "a")
        return {}["row"] if gives == "raises" else Question(7, "a") if gives == "numbers" else None  # type: ignore

    worker.context.task.question = question
    worker.store.opened = {0: group("1/1", 0), 1: group("1/0", 1), 2: RetryAfterError("too far ahead")}
    assert worker.play()["rollout/failed"] == 2
    words = {"raises": "KeyError: 'row' (", "nothing": "type NoneType", "numbers": "the text of question(0)"}[
        gives
    ]
    assert all(words in reason and ".py:" in reason for reason in worker.store.reasons)
    assert [q for m, q, k in worker.store.records if m == "rollout_final"] == ["1/0"] * 2


def test_a_stopped_worker_plays_nothing_more(worker: Worker) -> None:
    """Neither a batch nor an evaluation is begun."""
    worker.open("open")
    worker.context.loop.stop()
    with pytest.raises(Shutdown):
        worker.play()
    assert not worker.store.records


def _play_for_ever(folder: str) -> None:
    """A worker process whose rollouts never end; it says when it plays and when it has left."""

    async def script(episode: Episode) -> None:
        print("playing", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("cancelled", flush=True)

    store = FakeStore()
    store.opened = {1: group("0/1", 1), 3: RetryAfterError("too far ahead")}
    module: Any = worker_module
    module.WorkerClient = lambda *_, **__: store
    module.Team = lambda *_, **__: FakeTeam()
    config = load_config(RELAY, ["rollout.workers=2", "trainer.group_size=2"])
    agents = {role: f"ipc://{folder}/{role}" for role in ROLES}
    addresses = Addresses(f"ipc://{folder}/store", agents)
    run_worker(config, 1, GivenTask(script), addresses, Path(folder))
    print("left", flush=True)


def test_sigterm_while_rollouts_are_played(tmp_path: Path) -> None:
    """The rollouts are cancelled, the process ends well, and its log has no traceback."""
    code = "import sys; from tests.test_rollout_worker import _play_for_ever; _play_for_ever(sys.argv[1])"
    with started([sys.executable, "-c", code, str(tmp_path)]) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["playing\n"] * 2
        process.terminate()
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    assert output.splitlines() == ["cancelled", "cancelled", "left"]
