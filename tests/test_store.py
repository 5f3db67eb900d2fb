"""The store end to end over the link: what one process says, another gets, and it survives a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mgrpo
from mgrpo.errors import (
    ConfigError,
    ConflictError,
    DeadlineError,
    FencedError,
    PeerError,
    RetryAfterError,
)
from mgrpo.store.server import StoreServer
from tests.store_kit import DIGEST, fill, publish, queries, run_params


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreServer]:
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "store.db", run_params()) as server:
        yield server


@pytest.fixture
def lagging(tmp_path: Path) -> Iterator[StoreServer]:
    """A store whose groups may be trained one step later than those they were sampled with."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "store.db", run_params(max_lag=1)) as server:
        yield server


def connect(store: StoreServer, role: str, **options: object):  # type: ignore[no-untyped-def]
    return mgrpo.connect(store.url, role=role, run=DIGEST, **options)


def test_a_group_travels_from_worker_to_both_trainers_once(store: StoreServer) -> None:
    """Sealed groups reach each role in index order with that role's invocations, d_k = 0 included, and never
    again."""
    with (
        publish(store.url, "main") as main,
        publish(store.url, "sub") as sub,
        connect(store, "worker") as worker,
    ):
        fill(worker, "b", index=1)
        fill(worker, "a", index=0)
        worker.flush()
        for trainer, per_group in ((main, [(0, 0), (1, 0)]), (sub, [(1, 0)])):
            groups = trainer.claim(2, timeout=60)
            assert queries(groups) == ["a", "b"]
            for group in groups:
                assert [(i.rollout, i.invocation) for i in group.invocations] == per_group
                assert [(r.rollout, r.reward, r.d_k) for r in group.rollouts] == [
                    (0, 0.0, {"sub": 0}),
                    (1, 1.0, {"sub": 1}),
                ]
                assert group.policy == {"main": "main.e1.v0", "sub": "sub.e1.v0"}
            trainer.apply(0, groups)
            assert trainer.commit(0) == 2
            with pytest.raises(DeadlineError, match="claim"):
                trainer.claim(1, timeout=0.2)
        assert [(t.step, t.query) for t in worker.trained("sub")] == [(0, "a"), (0, "b")]


def test_a_store_restart_keeps_every_acknowledged_record(tmp_path: Path) -> None:
    """After a restart an open group is still open, a lease is still held and a sealed group can be claimed."""
    path = tmp_path / "store.db"
    server = StoreServer(f"ipc://{tmp_path}/s", path, run_params())
    main, sub = publish(server.url, "main"), publish(server.url, "sub")
    worker = connect(server, "worker", name="w")
    fill(worker, "a", index=0)
    open_group = worker.open_group(query="b", k=2, d_max={}, index=1)
    worker.invocation_done(open_group, 0, role="main", n_tokens=5, versions=(0, 0))
    worker.flush()
    held = main.claim(1, timeout=60)
    server.close()
    with StoreServer(f"ipc://{tmp_path}/s", path) as server:
        main.apply(0, held)
        assert queries(sub.claim(1, timeout=60)) == ["a"]
        assert [(g.query, g.finished) for g in worker.open_groups(worker="w")] == [("b", [])]
        worker.rollout_final(open_group, 0, reward=0.5, correct=1.0, d_k={"sub": 0}).result(5)
        assert [g.finished for g in worker.open_groups(worker="w")] == [[0]]
        for client in (main, sub, worker):
            client.close()


def test_same_record_again_is_fine_and_other_content_is_a_conflict(store: StoreServer) -> None:
    """The first write stays, whatever comes later under its key."""
    with publish(store.url, "main"), publish(store.url, "sub"), connect(store, "worker") as worker:
        group = worker.open_group(query="a", k=2, d_max={}, index=0)
        for _ in range(3):
            worker.invocation_done(group, 0, role="main", n_tokens=5).result(5)
        with pytest.raises(ConflictError):
            worker.invocation_done(group, 0, role="main", n_tokens=6).result(5)
        group._waiting.clear()
        for _ in range(2):
            worker.rollout_final(group, 0, reward=1.0, correct=1.0, d_k={"sub": 0}).result(5)
        with pytest.raises(ConflictError):
            worker.rollout_final(group, 0, reward=0.0, correct=1.0, d_k={"sub": 0}).result(5)
        with pytest.raises(ConflictError, match="index 0"):
            worker.open_group(query="other", k=2, d_max={}, index=0)


def test_a_worker_that_comes_back_replays_under_a_new_attempt(store: StoreServer) -> None:
    """Invocations of the dead attempt are not claimed; the zombie is fenced; finished rollouts need no replay."""
    with publish(store.url, "main") as main, publish(store.url, "sub") as sub:
        with connect(store, "worker", name="w") as old, connect(store, "worker", name="w") as new:
            group = old.open_group(query="a", k=2, d_max={}, index=0)
            old.invocation_done(group, 0, role="main", n_tokens=1)
            old.rollout_final(group, 0, reward=1.0, correct=1.0, d_k={"sub": 0}).result(5)
            old.invocation_done(group, 1, role="main", n_tokens=1)
            old.invocation_done(group, 1, role="sub", n_tokens=1).result(5)
            again = new.open_group(query="a", k=2, d_max={}, index=0)
            assert (again.attempt, again.finished) == (1, [0])
            with pytest.raises(FencedError, match="attempt 0"):
                old.rollout_final(group, 1, reward=1.0, correct=1.0, d_k={"sub": 1}).result(5)
            new.invocation_done(again, 1, role="main", n_tokens=9)
            new.rollout_final(again, 1, reward=1.0, correct=1.0, d_k={"sub": 0}).result(5)
        (claimed,) = main.claim(1, timeout=60)
        assert [(i.rollout, i.n_tokens) for i in claimed.invocations] == [(0, 1), (1, 9)]
        (claimed,) = sub.claim(1, timeout=60)
        assert claimed.invocations == []


def test_admission_follows_the_slowest_trainer_by_index(store: StoreServer) -> None:
    """Index i is admitted iff i < (max_lag + slowest version + 1) * batch, and a waiting worker wakes up."""
    with (
        publish(store.url, "main") as main,
        publish(store.url, "sub") as sub,
        connect(store, "worker") as worker,
    ):
        worker.open_group(query="q1", k=2, d_max={}, index=1, timeout=0)
        with pytest.raises(RetryAfterError):
            worker.open_group(query="q2", k=2, d_max={}, index=2, timeout=0)
        main.status(version=1, step=0, checkpoint_step=0)
        with pytest.raises(RetryAfterError, match="sub"):
            worker.open_group(query="q2", k=2, d_max={}, index=2, timeout=0.1)
        threading.Timer(0.3, lambda: sub.status(version=1, step=0, checkpoint_step=0)).start()
        assert worker.open_group(query="q2", k=2, d_max={}, index=2, timeout=60).index == 2


def test_resume_fences_the_zombie_and_returns_what_the_checkpoint_lacks(lagging: StoreServer) -> None:
    """Steps beyond the checkpoint are trained again by the successor, each group once in the surviving
    history."""
    store = lagging
    with publish(store.url, "main") as zombie, publish(store.url, "sub"), connect(store, "worker") as worker:
        for i in range(2):
            fill(worker, f"q{i}", index=i)
        worker.flush()
        first = zombie.claim(1, timeout=60)
        zombie.apply(0, first)
        zombie.commit(0)
        second = zombie.claim(1, timeout=60)
        zombie.apply(1, second)
        with publish(store.url, "main", version=0, checkpoint_step=0) as heir:
            with pytest.raises(FencedError):
                zombie.commit(1)
            assert queries(heir.claim(1, timeout=60)) == ["q1"]
            assert [(t.step, t.query) for t in heir.trained("main")] == [(0, "q0")]


def test_failed_rollouts_make_partial_or_dropped_groups_and_admission_replaces_them(
    store: StoreServer,
) -> None:
    """One of two rollouts failed: too few for a baseline, the group is dropped and its place is given again."""
    with publish(store.url, "main") as main, publish(store.url, "sub"), connect(store, "worker") as worker:
        group = worker.open_group(query="a", k=2, d_max={}, index=0)
        worker.rollout_fail(group, 0, "engine down").result(5)
        worker.invocation_done(group, 1, role="main", n_tokens=5)
        worker.rollout_final(group, 1, reward=1.0, correct=1.0, d_k={"sub": 0}).result(5)
        assert worker.stats()["dropped"] == 1
        fill(worker, "b", index=1)
        fill(worker, "c", index=2)
        worker.flush()
        assert queries(main.claim(2, timeout=60)) == ["b", "c"]


def test_reports_and_run_state_reach_whoever_waits(store: StoreServer) -> None:
    """Waits are level-triggered: what already holds returns at once, what comes wakes the waiter."""
    with connect(store, "launcher") as launcher, connect(store, "observer") as observer:
        assert observer.reports(after=0) == []
        launcher.report("step", {"loss": 0.5, "role": "main"})
        (report,) = observer.reports(after=0, timeout=60)
        assert (report.kind, report.payload) == ("step", {"loss": 0.5, "role": "main"})
        threading.Timer(0.2, lambda: launcher.set_control("stopping", "enough")).start()
        world = observer.wait(not_state="running", timeout=60)
        assert (world.control.state, world.control.reason) == ("stopping", "enough")
        with pytest.raises(DeadlineError, match="versions"):
            observer.wait(versions={"main": 3}, timeout=0.3)
        with pytest.raises(PeerError, match="nan"):
            launcher.report("step", {"loss": float("nan")})


def test_peers_of_another_run_or_role_are_refused_by_name(store: StoreServer) -> None:
    """Nothing is stored for a peer with another digest, nor for a role that may not make the call."""
    with mgrpo.connect(store.url, role="worker", run="other", name="stranger") as stranger:
        with pytest.raises(PeerError, match=r"'stranger'.*'other'.*'digest-1'"):
            stranger.open_group(query="a", k=2, d_max={}, index=0)
    with connect(store, "worker") as worker, connect(store, "launcher") as launcher:
        with pytest.raises(PeerError, match="FORBIDDEN"):
            worker._link.call("requeue", ("main", 0, []))
        with pytest.raises(PeerError, match="WRONG_RUN"):
            launcher.create(run_params(digest="other"))
        assert launcher.create(run_params()) == run_params()
        assert worker.stats()["open"] == 0


def test_taken_addresses_and_files_are_named_before_anything_starts(
    store: StoreServer, tmp_path: Path
) -> None:
    """Port, ipc path and database file each have one owner."""
    with pytest.raises(ConfigError, match="in use"):
        StoreServer("tcp://127.0.0.1:0", tmp_path / "store.db")
    with pytest.raises(ConfigError, match="cannot serve"):
        StoreServer(store.url, tmp_path / "b.db")
    with StoreServer(f"ipc://{tmp_path}/x", tmp_path / "c.db"):
        with pytest.raises(ConfigError, match="another process"):
            StoreServer(f"ipc://{tmp_path}/x", tmp_path / "d.db")
    with pytest.raises(ConfigError, match="not encrypted"):
        StoreServer("tcp://0.0.0.0:0", tmp_path / "e.db")
    (tmp_path / "text").write_text("not a database, certainly not" * 100)
    with pytest.raises(mgrpo.errors.CorruptionError):
        StoreServer("tcp://127.0.0.1:0", tmp_path / "text")


def test_a_silent_store_is_a_deadline_error_with_its_name(tmp_path: Path) -> None:
    """Nobody listens: the call ends within its timeout plus a second, naming peer and queue."""
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"store at ipc://.*params.*link is down"):
        mgrpo.connect(f"ipc://{tmp_path}/nobody", role="worker", timeout=0.5)
    assert time.monotonic() - started < 1.5


def test_frozen_roles_serve_but_neither_claim_nor_hold_up_admission(
    tmp_path: Path,
) -> None:
    """A run whose main agent is frozen: only sub trajectories are needed, and only sub's version counts."""
    params = run_params(training_roles=["sub"])
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", params) as store:
        with (
            publish(store.url, "main") as main,
            publish(store.url, "sub") as sub,
            connect(store, "worker") as worker,
        ):
            assert worker.wait(versions={"main": 0, "sub": 0}, timeout=60).roles[0].role == "sub"
            sub.status(version=1, step=0, checkpoint_step=0)
            group = worker.open_group(query="a", k=2, d_max={}, index=3, timeout=0)
            for rollout in range(2):
                worker.invocation_done(group, rollout, role="sub", n_tokens=1)
                worker.rollout_final(group, rollout, reward=0.0, correct=0.0, d_k={"sub": 1})
            worker.flush()
            assert queries(sub.claim(1, timeout=60)) == ["a"]
            with pytest.raises(PeerError, match="not a training role"):
                main.claim(1, timeout=0.2)


def test_a_claim_that_was_granted_but_not_answered_is_granted_again(store: StoreServer) -> None:
    """The answer of a claim got lost: asking again returns the same groups, of another size anew."""
    with publish(store.url, "main") as main, publish(store.url, "sub"), connect(store, "worker") as worker:
        fill(worker, "a", index=0)
        fill(worker, "b", index=1)
        worker.flush()
        first = main.claim(1, timeout=60)
        main._claim_seq -= 1
        assert queries(main.claim(1, timeout=60)) == queries(first) == ["a"]
        main._claim_seq -= 1
        both = main.claim(2, timeout=60)
        assert queries(both) == ["a", "b"]
        main.apply(0, both)
        assert main.stats()["roles"]["main"]["ready"] == 0


@pytest.mark.parametrize("scheme", ["inproc", "ipc"])
def test_the_embedded_store_works_without_a_port(tmp_path: Path, scheme: str) -> None:
    """inproc inside one process, ipc beside it: the same calls, the same waits."""
    url = f"inproc://{tmp_path}" if scheme == "inproc" else f"ipc://{tmp_path}/s"
    with StoreServer(url, tmp_path / "s.db", run_params()) as store, publish(store.url, "main") as main:
        with publish(store.url, "sub"), connect(store, "worker") as worker:
            fill(worker, "a", index=0)
            worker.flush()
            assert queries(main.claim(1, timeout=60)) == ["a"]
            with pytest.raises(DeadlineError):
                main.claim(1, timeout=0.2)
