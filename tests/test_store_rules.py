"""Rules of groups and leases that depend on time and counts, on the core with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgrpo.errors import ConfigError
from mgrpo.store import records as rec
from mgrpo.store.core import Core
from mgrpo.store.database import MIGRATIONS, Database
from mgrpo.transport.codec import BadMessage, Refusal, Sender
from tests.store_kit import DIGEST, run_params


class Driver:
    """A core that one test talks to as everybody."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.now = 100.0
        self.database = Database(folder / "s.db", synchronous="OFF")
        self.core = Core(self.database, self.now)
        self.core.create(run_params(**changes), self.now)
        for role in self.core.ledger.state.roles:  # type: ignore[union-attr]
            self.call("resume", rec.Resume(role, -1, "n", 0), f"trainer:{role}")
            self.publish(role, 0)

    def call(self, method: str, body: Any, role: str = "worker") -> Any:
        answer = self.core.handle(method, body, Sender(DIGEST, role, "w", "s"), self.now)
        self.core.commit()
        return answer

    def publish(self, role: str, version: int) -> None:
        self.call("status", rec.Status(role, 1, version, 0, 0), f"trainer:{role}")

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)
        self.core.commit()

    def open(self, query: str, index: int, k: int = 2) -> None:
        self.call("open_group", rec.OpenGroup(query, k, {}, index))

    def end(self, query: str, rollout: int, version: int = 0) -> None:
        self.call(
            "invocation_done", rec.InvocationDone(query, rollout, 0, "main", 0, 1, version, version, {}, None)
        )
        self.call(
            "rollout_final", rec.RolloutFinal(query, rollout, 0, 1.0, 1.0, {"sub": 0}, {}, version, version)
        )

    def claim(self, seq: int, n: int = 1, role: str = "main") -> list[str] | None:
        groups = self.call("claim", rec.Claim(role, 1, seq, n, 0.0), f"trainer:{role}")
        return None if groups is None else [group.query for group in groups]

    def stats(self) -> dict[str, Any]:
        return self.core.ledger.stats()  # type: ignore[union-attr]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    it = Driver(tmp_path, k=5, batch=100, lease_s=60.0, group_timeout_s=1800.0)
    yield it
    it.database.close()


def test_after_its_time_a_group_is_trained_with_half_its_rollouts_or_dropped(driver: Driver) -> None:
    """K = 5: three real rollouts are enough, two are not; failed ones do not count as real."""
    for index, (query, real) in enumerate([("three", 3), ("two", 2)]):
        driver.open(query, index, k=5)
        for rollout in range(real):
            driver.end(query, rollout)
    driver.call("rollout_fail", rec.RolloutFail("two", 4, 0, "judge down"))
    driver.wait(1799.0)
    assert driver.stats()["open"] == 2
    driver.wait(2.0)
    assert (driver.stats()["open"], driver.stats()["sealed"], driver.stats()["dropped"]) == (0, 1, 1)
    (group,) = driver.call("claim", rec.Claim("main", 1, 1, 1, 0.0), "trainer:main")
    assert [(r.rollout, r.status) for r in group.rollouts] == [(0, "ok"), (1, "ok"), (2, "ok")]
    with pytest.raises(Refusal, match=r"dropped \(not complete, and nothing of it arrived for 1800 s"):
        driver.end("two", 3)


def test_a_lease_lasts_as_long_as_it_is_renewed(driver: Driver) -> None:
    """60 s without a renewal and the group is ready again; the old lease can neither renew nor apply."""
    driver.open("a", 0, k=5)
    for rollout in range(5):
        driver.end("a", rollout)
    assert driver.claim(1) == ["a"]
    held = rec.Groups("main", 1, [("a", 1)], 0)
    for _ in range(5):
        driver.wait(50.0)
        assert driver.call("renew", held, "trainer:main") == []
    driver.wait(61.0)
    assert driver.stats()["roles"]["main"]["ready"] == 1
    assert driver.call("renew", held, "trainer:main") == ["a"]
    with pytest.raises(Refusal, match=r"FENCED|not leased"):
        driver.call("apply", held, "trainer:main")
    assert driver.claim(2) == ["a"]


def test_leases_and_open_groups_get_their_full_time_after_a_restart(driver: Driver) -> None:
    """The store's clock does not run while it is down."""
    driver.open("a", 0, k=5)
    driver.open("b", 1, k=5)
    for rollout in range(5):
        driver.end("a", rollout)
    driver.claim(1)
    driver.wait(59.0)
    driver.now = 0.5  # another boot: monotonic time starts again
    driver.database.reopen()
    driver.core.reload(driver.now)
    driver.wait(59.0)
    assert driver.stats()["roles"]["main"]["leased"] == 1
    driver.wait(2.0)
    assert driver.stats()["roles"]["main"]["leased"] == 0
    assert driver.stats()["open"] == 1


def test_groups_too_old_at_the_claim_are_passed_over_and_replaced(tmp_path: Path) -> None:
    """max_lag 1: what version 0 sampled cannot be trained at version 2, and admission gives its place away."""
    driver = Driver(tmp_path, batch=1, max_lag=1)
    driver.open("old", 0)
    driver.open("new", 1)
    for query, version in (("old", 0), ("new", 1)):
        for rollout in range(2):
            driver.end(query, rollout, version)
    driver.publish("main", 2)
    assert driver.claim(1) == ["new"]
    assert driver.stats()["roles"]["main"]["skipped"] == 1
    with pytest.raises(Refusal, match=r"RETRY_AFTER|ahead"):
        driver.open("next", 2)  # sub is still at version 0 and has two groups before it
    driver.publish("sub", 1)
    driver.open("next", 2)
    driver.database.close()


def test_bad_records_are_refused_by_name_and_change_nothing(driver: Driver) -> None:
    """NaN, unknown roles, numbers out of range, d_k that does not fit, missing invocations."""
    driver.open("a", 0, k=5)
    before = list(driver.database._db.execute("SELECT * FROM invocations"))
    nan = float("nan")
    bad: list[tuple[str, Any, str]] = [
        ("invocation_done", rec.InvocationDone("a", 0, 0, "sub", 0, 1, -1, -1, {"x": nan}, None), "nan"),
        ("invocation_done", rec.InvocationDone("a", 0, 0, "judge", 0, 1, -1, -1, {}, None), "judge"),
        ("invocation_done", rec.InvocationDone("a", 9, 0, "sub", 0, 1, -1, -1, {}, None), "rollout 9"),
        ("invocation_done", rec.InvocationDone("a", 0, 0, "main", 1, 1, -1, -1, {}, None), "has only 0"),
        ("invocation_done", rec.InvocationDone("a", 0, 0, "sub", 0, 1, 5, 4, {}, None), "versions 5..4"),
        ("rollout_final", rec.RolloutFinal("a", 0, 0, nan, 1.0, {"sub": 0}, {}, 0, 0), "nan"),
        ("rollout_final", rec.RolloutFinal("a", 0, 0, 1.0, 1.5, {"sub": 0}, {}, 0, 0), "correct=1.5"),
        ("rollout_final", rec.RolloutFinal("a", 0, 0, 1.0, 1.0, {}, {}, 0, 0), "d_k names"),
        ("rollout_final", rec.RolloutFinal("a", 0, 0, 1.0, 1.0, {"sub": 1}, {}, 0, 0), "0 have arrived"),
        ("rollout_final", rec.RolloutFinal("b", 0, 0, 1.0, 1.0, {"sub": 0}, {}, 0, 0), "unknown group"),
        ("open_group", rec.OpenGroup("c", 4, {}, 1), "of 4 rollouts, this run has 5"),
        ("open_group", rec.OpenGroup("c", 5, {"judge": 1}, 1), "judge"),
        ("open_group", rec.OpenGroup("c", 5, {}, 1, meta={"x": nan}), "nan"),
    ]
    for method, body, message in bad:
        with pytest.raises((BadMessage, Refusal), match=message):
            driver.call(method, body)
    assert list(driver.database._db.execute("SELECT * FROM invocations")) == before
    assert driver.stats()["handled"] == {"resume": 2, "status": 2, "open_group": 1}


def test_settled_groups_leave_memory_and_come_back_for_a_rollback(tmp_path: Path) -> None:
    """Memory is bounded by what is in flight; an older checkpoint still finds everything after it."""
    driver = Driver(tmp_path, training_roles=["main"], batch=100, max_lag=20)
    for number in range(20):
        driver.open(f"q{number}", number)
        for rollout in range(2):
            driver.end(f"q{number}", rollout)
        driver.claim(number + 1)
        driver.call("apply", rec.Groups("main", 1, [(f"q{number}", number + 1)], number), "trainer:main")
        assert driver.call("commit", rec.Commit("main", 1, number), "trainer:main") == number + 1
    assert driver.stats()["in_memory"] == 0
    driver.end("q3", 0)  # a late copy of an old record: the same answer, nothing else
    resumed = driver.call("resume", rec.Resume("main", 11, "again", 1), "trainer:main")
    assert (resumed.epoch, resumed.requeued) == (2, 8)
    groups = driver.call("claim", rec.Claim("main", 2, 1, 8, 0.0), "trainer:main")
    assert [group.index for group in groups] == list(range(12, 20))
    driver.database.close()


def test_a_store_file_knows_what_it_is(tmp_path: Path) -> None:
    """Another application's database, a newer format, and other parameters of the run are refused by name."""
    driver = Driver(tmp_path)
    with pytest.raises(ConfigError, match="digest 'other'"):
        driver.core.create(run_params(digest="other"), 0.0)
    driver.database._db.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    driver.database.close()
    with pytest.raises(ConfigError, match="this program knows up to"):
        Database(tmp_path / "s.db")
    other = Database(tmp_path / "o.db")
    other._db.execute("PRAGMA application_id=7")
    other.close()
    with pytest.raises(ConfigError, match="something else"):
        Database(tmp_path / "o.db")


def play(driver: Driver, index: int, version: int) -> None:
    """A group from its opening to its end, sampled with `version`."""
    for rollout in range(2):
        driver.end(f"q{index}", rollout, version)


def train(driver: Driver, step: int, n: int) -> None:
    """One step of both roles on the groups of this step, and its version."""
    for role in ("main", "sub"):
        queries = driver.claim(step + 1, n, role)
        assert queries == [f"q{i}" for i in range(step * n, step * n + n)], f"step {step} of {role}"
        held = [(query, step + 1) for query in queries]
        driver.call("apply", rec.Groups(role, 1, held, step), f"trainer:{role}")
        driver.publish(role, step + 1)


def test_a_slow_worker_makes_no_group_stale_in_a_run_in_order(tmp_path: Path) -> None:
    """Two workers, max_lag 1: one is far ahead of the other. Steps take the groups in order, so the trainers wait for
    the slow one instead of passing its groups by until their tokens are too old. (Out of order they would train on
    q4, q6, q8 before q1, and reach version 2 while q5 was still being sampled with version 0.)"""
    driver = Driver(tmp_path, batch=4, max_lag=1, in_order=True)
    for index in (0, 2, 4, 6):  # the fast worker's
        driver.open(f"q{index}", index)
        play(driver, index, 0)
    for index in (1, 3):  # the slow worker's are open, and no step may overtake them
        driver.open(f"q{index}", index)
    assert driver.claim(1, 4) is None
    with pytest.raises(Refusal, match="max_lag 1 admits 8"):
        driver.open("q8", 8)
    for index in (1, 3):
        play(driver, index, 0)
    train(driver, 0, 4)
    for index in (5, 7):
        driver.open(f"q{index}", index)
    for index in (8, 10):
        driver.open(f"q{index}", index)
        play(driver, index, 1)
    assert driver.claim(2, 4) is None  # q4, q6, q8, q10 are ready, q5 and q7 are not
    for index in (5, 7):
        play(driver, index, 0)
    train(driver, 1, 4)
    assert all(role["skipped"] == 0 for role in driver.stats()["roles"].values())
    driver.database.close()


def test_a_dropped_group_moves_those_behind_it_one_place_up(tmp_path: Path) -> None:
    """In order, synchronous: without q1 the first step is q0 and q2, and q2 is to be sampled with version 0 although
    its number belongs to the second step."""
    driver = Driver(tmp_path, batch=2, in_order=True)
    opened = {}
    for index in (0, 1):
        opened[index] = driver.call("open_group", rec.OpenGroup(f"q{index}", 2, {}, index))
    play(driver, 0, 0)
    with pytest.raises(Refusal, match="2 groups are ahead"):
        driver.open("q2", 2)
    for rollout in range(2):
        driver.call("rollout_fail", rec.RolloutFail("q1", rollout, 0, "engine down"))
    opened[2] = driver.call("open_group", rec.OpenGroup("q2", 2, {}, 2))
    assert [o.min_versions for o in opened.values()] == [{"main": 0, "sub": 0}] * 3
    play(driver, 2, 0)
    assert driver.claim(1, 2) == ["q0", "q2"]
    driver.call("apply", rec.Groups("main", 1, [("q0", 1), ("q2", 1)], 0), "trainer:main")
    driver.publish("main", 1)
    assert driver.claim(1, 2, "sub") == ["q0", "q2"]
    driver.publish("sub", 1)
    assert driver.call("open_group", rec.OpenGroup("q3", 2, {}, 3)).min_versions == {"main": 1, "sub": 1}
    driver.database.close()


def test_a_group_of_forty_minutes_is_trained_when_its_rollouts_keep_ending(tmp_path: Path) -> None:
    """A rollout every ten minutes, group_timeout 30 minutes: the group's age does not matter."""
    driver = Driver(tmp_path, k=4, group_timeout_s=1800.0)
    driver.open("a", 0, k=4)
    for rollout in range(4):
        driver.wait(600.0)
        driver.end("a", rollout)
    assert driver.now - 100.0 == 2400.0 and driver.claim(1) == ["a"]
    driver.database.close()


def test_a_rollout_of_forty_minutes_closes_its_group_and_the_run_goes_on(tmp_path: Path) -> None:
    """Nothing of the group arrives for half an hour: it is dropped. Its worker is refused with CLOSED, by a reason that
    names the setting; opened again, after a restart too, the group says that it is dropped; the next number is admitted
    in its place."""
    driver = Driver(tmp_path, batch=1, group_timeout_s=1800.0, in_order=True)
    driver.open("a", 0)
    driver.wait(2400.0)
    for _ in range(2):
        with pytest.raises(
            Refusal, match=r"group 'a' is dropped .*1800 s \(store.group_timeout\)"
        ) as refused:
            driver.end("a", 0)
        assert refused.value.code == "CLOSED"
        opened = driver.call("open_group", rec.OpenGroup("a", 2, {}, 0))
        assert (opened.state, opened.attempt, opened.finished) == ("dropped", 0, [])
        driver.core.reload(driver.now)
    driver.open("b", 1)
    for rollout in range(2):
        driver.end("b", rollout)
    assert driver.claim(1) == ["b"]
    driver.database.close()


def test_the_times_of_a_run_may_change_when_it_is_resumed(tmp_path: Path) -> None:
    """lease_s and group_timeout_s of the later start hold, for what is open already too; another K is refused."""
    driver = Driver(tmp_path, group_timeout_s=10.0)
    driver.open("a", 0)
    driver.core.create(run_params(group_timeout_s=100.0, lease_s=30.0), driver.now)
    driver.wait(99.0)
    assert driver.stats()["open"] == 1 and driver.core.ledger is not None
    assert driver.core.ledger.state.params.lease_s == 30.0
    driver.wait(2.0)
    assert driver.stats()["open"] == 0
    with pytest.raises(ConfigError, match="k 2 there, 3 here; take"):
        driver.core.create(run_params(k=3), driver.now)
    with pytest.raises(ConfigError, match="lease_s = inf"):
        driver.core.create(run_params(lease_s=float("inf")), driver.now)
    driver.database.close()
