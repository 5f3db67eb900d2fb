"""Rules of streaming rollouts on the core, with a clock of the test's own, and their way over the link."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mgrpo
from mgrpo.errors import ConfigError, FencedError, GroupHeldError
from mgrpo.store import records as rec
from mgrpo.store.core import check_params
from mgrpo.store.inspect import inspect
from mgrpo.store.server import StoreServer
from mgrpo.transport.codec import BadMessage, Refusal, Sender
from tests.store_kit import DIGEST, fill, publish, queries, run_params
from tests.test_link import until
from tests.test_store_rules import Driver


@pytest.fixture
def streaming(tmp_path: Path) -> Iterator[Driver]:
    """One role; steps of 2 groups from claims of 3, max_lag 2 of which the window of 3 uses up one."""
    driver = Driver(
        tmp_path, training_roles=["main"], batch=2, pool=3, max_lag=2, claim_window=3, in_order=True,
        lease_s=1000.0,
    )  # fmt: skip
    yield driver
    driver.database.close()


def play(driver: Driver, *indices: int) -> None:
    """Groups from their opening to their end."""
    for index in indices:
        driver.open(f"q{index}", index)
        for rollout in range(2):
            driver.end(f"q{index}", rollout)


def apply(driver: Driver, step: int, lease: int, used: list[str], aside: list[str], epoch: int = 1) -> None:
    named = [[(query, lease) for query in part] for part in (used, aside)]
    driver.call("apply", rec.Groups("main", epoch, named[0], step, surplus=named[1]), "trainer:main")


def ask(driver: Driver, worker: str, method: str, body: Any, session: str = "s") -> Any:
    answer = driver.core.handle(method, body, Sender(DIGEST, "worker", worker, session), driver.now)
    driver.core.commit()
    return answer


def alive(driver: Driver) -> list[str]:
    world = driver.call("wait", rec.WaitFor(0.0), "observer")
    return list(world.workers)


def test_so_many_groups_less_one_pass_one_that_is_still_sampled(tmp_path: Path) -> None:
    """A window of 3: two younger groups are claimed before q0, in one claim or in several, then the trainer waits for
    it, and it is next once it is complete."""
    driver = Driver(tmp_path, training_roles=["main"], batch=1, max_lag=6, claim_window=3, in_order=True)
    driver.open("q0", 0)
    play(driver, 1, 2, 3, 4)
    assert driver.claim(1, 3) is None
    assert [driver.claim(1), driver.claim(2), driver.claim(3)] == [["q1"], ["q2"], None]
    driver.database.reopen()
    driver.core.reload(driver.now)
    assert driver.claim(3) is None
    driver.call("nack", rec.Groups("main", 1, [("q1", 1)], -1, "unreadable"), "trainer:main")
    assert [driver.claim(3), driver.claim(4)] == [["q1"], None]
    for rollout in range(2):
        driver.end("q0", rollout)
    assert [driver.claim(4), driver.claim(5)] == [["q0"], ["q3"]]
    driver.database.close()


def test_a_group_that_nobody_has_opened_is_waited_for_as_well(tmp_path: Path) -> None:
    driver = Driver(tmp_path, training_roles=["main"], batch=1, max_lag=3, claim_window=2, in_order=True)
    play(driver, 1, 2)
    assert [driver.claim(1), driver.claim(2)] == [["q1"], None]
    play(driver, 0)
    assert driver.claim(2) == ["q0"]
    driver.database.close()


def test_the_window_is_part_of_admission(streaming: Driver) -> None:
    """max_lag 2 less ceil((3 - 1) / 2) leaves 1, and each of the two claims takes 3 groups: six are admitted."""
    with pytest.raises(Refusal, match="6 groups are ahead of this one, max_lag 2 admits 6"):
        streaming.open("q6", 6)
    opened = [streaming.call("open_group", rec.OpenGroup(f"q{i}", 2, {}, i)) for i in range(6)]
    assert [group.min_versions["main"] for group in opened] == [0] * 6


def test_what_a_step_sets_aside_makes_room_only_with_its_version(streaming: Driver) -> None:
    """Step 0 uses two of its three groups. Before version 1 is published the next group would be sampled with version 0
    and trained at step 2; afterwards three more are admitted, for that step, from version 1 on."""
    play(streaming, *range(6))
    assert streaming.claim(1, 3) == ["q0", "q1", "q2"]
    apply(streaming, 0, 1, ["q0", "q2"], ["q1"])
    with pytest.raises(Refusal, match="5 groups are ahead of this one, max_lag 2 admits 5"):
        streaming.open("q6", 6)
    streaming.publish("main", 1)
    opened = [streaming.call("open_group", rec.OpenGroup(f"q{i}", 2, {}, i)) for i in (6, 7, 8)]
    assert [group.min_versions["main"] for group in opened] == [1] * 3
    with pytest.raises(Refusal, match="admits 8"):
        streaming.open("q9", 9)


def test_surplus_is_no_history_and_comes_back_with_its_step(streaming: Driver) -> None:
    """The trained-group ledger names what was used. After a resume behind the step, a restart of the store in between,
    the same claim has the same groups; a resume at the step leaves them aside."""
    play(streaming, *range(6))
    for step in (0, 1):
        names = streaming.claim(step + 1, 3)
        assert names is not None
        apply(streaming, step, step + 1, names[:2], names[2:])
        apply(streaming, step, step + 1, names[:2], names[2:])
    assert streaming.call("commit", rec.Commit("main", 1, 0), "trainer:main") == 3
    assert [line.query for line in streaming.core.trained("main")] == ["q0", "q1", "q3", "q4"]
    assert streaming.stats()["roles"]["main"]["surplus"] == 2 and streaming.stats()["in_memory"] == 3
    streaming.database.reopen()
    streaming.core.reload(streaming.now)
    assert streaming.stats()["roles"]["main"]["surplus"] == 2 and streaming.stats()["in_memory"] == 3
    resumed = streaming.call("resume", rec.Resume("main", 0, "heir", 1), "trainer:main")
    assert resumed.requeued == 3 and streaming.stats()["roles"]["main"]["surplus"] == 1
    groups = streaming.call("claim", rec.Claim("main", 2, 1, 3, 0.0), "trainer:main")
    assert queries(groups) == ["q3", "q4", "q5"]
    apply(streaming, 1, 1, ["q3", "q4"], ["q5"], epoch=2)
    assert streaming.call("commit", rec.Commit("main", 2, 1), "trainer:main") == 6
    assert streaming.stats()["in_memory"] == 0
    assert streaming.call("resume", rec.Resume("main", -1, "again", 2), "trainer:main").requeued == 6


def test_surplus_that_does_not_fit_its_step_is_refused(streaming: Driver) -> None:
    """A step that uses too few, a group on both sides, a group that is not held, and the step again with others."""
    play(streaming, *range(4))
    assert streaming.claim(1, 3) == ["q0", "q1", "q2"]
    with pytest.raises(BadMessage, match="uses 1 groups and sets 2 aside, a step of this run uses 2"):
        apply(streaming, 0, 1, ["q0"], ["q1", "q2"])
    with pytest.raises(BadMessage, match="names a group twice"):
        apply(streaming, 0, 1, ["q0", "q1"], ["q1"])
    with pytest.raises(Refusal, match="'q3' is ready, not leased"):
        apply(streaming, 0, 1, ["q0", "q1"], ["q3"])
    apply(streaming, 0, 1, ["q0", "q1"], ["q2"])
    with pytest.raises(Refusal, match="applied with other groups"):
        apply(streaming, 0, 1, ["q0", "q2"], ["q1"])


def test_a_worker_that_is_alive_keeps_its_groups(tmp_path: Path) -> None:
    """Another one is refused by name until it was silent for heartbeat_timeout; then its late records are fenced, and
    it does not get the group back while the other is alive."""
    driver = Driver(tmp_path, heartbeat_timeout_s=30.0)
    body = rec.OpenGroup("q0", 2, {}, 0)
    ask(driver, "a", "open_group", body)
    for _ in range(3):
        driver.wait(20.0)
        ask(driver, "a", "heartbeat", None)
    driver.wait(20.0)
    with pytest.raises(
        Refusal, match=r"worker 'a', .* 20\.0 s ago; 'b' may take it over after 30 s"
    ) as refused:
        ask(driver, "b", "open_group", body)
    assert refused.value.code == "HELD"
    driver.wait(10.0)
    assert ask(driver, "b", "open_group", body).attempt == 1
    with pytest.raises(Refusal, match="attempt 0 of 'q0' was replaced by 1"):
        ask(driver, "a", "rollout_fail", rec.RolloutFail("q0", 0, 0, "late"))
    ask(driver, "a", "heartbeat", None)
    with pytest.raises(Refusal, match="in the hands of worker 'b'"):
        ask(driver, "a", "open_group", body)
    assert ask(driver, "b", "open_group", body, session="another life").attempt == 2
    driver.database.close()


def test_workers_get_their_full_time_after_a_restart_of_the_store(tmp_path: Path) -> None:
    """Who was alive is listed on, for heartbeat_timeout from the restart; who was dead is not."""
    driver = Driver(tmp_path, heartbeat_timeout_s=30.0)
    ask(driver, "dead", "open_group", rec.OpenGroup("q0", 2, {}, 0))
    driver.wait(29.0)
    ask(driver, "a", "open_group", rec.OpenGroup("q1", 2, {}, 1))
    driver.wait(29.0)
    assert alive(driver) == driver.stats()["workers"] == ["a"]
    driver.now = 0.5  # another boot: monotonic time starts again
    driver.database.reopen()
    driver.core.reload(driver.now)
    driver.wait(29.0)
    assert alive(driver) == ["a"]
    with pytest.raises(Refusal, match="in the hands of worker 'a'"):
        ask(driver, "b", "open_group", rec.OpenGroup("q1", 2, {}, 1))
    assert ask(driver, "b", "open_group", rec.OpenGroup("q0", 2, {}, 0)).attempt == 1
    driver.wait(1.0)
    assert alive(driver) == ["b"]
    driver.database.close()


def test_parameters_of_streaming_that_cannot_act_are_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"pool": 1}, "pool = 1, expected 0 or at least the 2 groups of a step"),
        ({"claim_window": 2, "max_lag": 1}, "claim_window = 2 has no effect without in_order"),
        ({"claim_window": 4, "max_lag": 1, "in_order": True}, "steps of 2 groups needs max_lag 2, got 1"),
        ({"heartbeat_timeout_s": 0.0}, "heartbeat_timeout_s = 0.0"),
    ]
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            check_params(run_params(**changes))


def test_the_heartbeat_timeout_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    driver = Driver(tmp_path, heartbeat_timeout_s=30.0)
    ask(driver, "a", "heartbeat", None)
    driver.core.create(run_params(heartbeat_timeout_s=10.0), driver.now)
    driver.wait(10.0)
    assert alive(driver) == []
    driver.database.close()


# -- over the link -------------------------------------------------------------------------------------------------


def test_a_worker_gives_signs_of_life_by_itself(tmp_path: Path) -> None:
    """From its first group on, however long a rollout takes; never before, and not once it is closed."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params(heartbeat_timeout_s=0.4)) as store:
        with publish(store.url, "main"), publish(store.url, "sub") as observer:
            with mgrpo.connect(store.url, role="worker", run=DIGEST) as worker:
                worker.flush()
                assert "heartbeat" not in observer.stats()["handled"]
                worker.open_group(query="q0", k=2, d_max={}, index=0)
                until(lambda: observer.stats()["handled"].get("heartbeat", 0) >= 3, "three signs of life")
            until(lambda: observer.world().workers == [], "the closed worker's silence")


def test_a_group_changes_hands_over_the_link(tmp_path: Path) -> None:
    """The holder is named to who asks for its group. The old holder's late record raises FencedError and marks its
    group as closed."""
    path, url = tmp_path / "s.db", f"ipc://{tmp_path}/s"
    store = StoreServer(url, path, run_params(heartbeat_timeout_s=600.0))
    publish(url, "main").close()
    publish(url, "sub").close()
    with mgrpo.connect(url, role="worker", run=DIGEST, name="old") as old:
        group = old.open_group(query="q0", k=2, d_max={}, index=0)
        with mgrpo.connect(url, role="worker", run=DIGEST, name="new") as new:
            with pytest.raises(GroupHeldError, match="in the hands of worker 'old'"):
                new.open_group(query="q0", k=2, d_max={}, index=0, timeout=0)
            new.report("note", {})
            assert new.world().workers == ["new", "old"]
        store.close()
        # `old` gives a sign of life every 150 s, as the first store asked.
        with StoreServer(url, path, run_params(heartbeat_timeout_s=0.2)):
            with mgrpo.connect(url, role="worker", run=DIGEST, name="new") as new:
                assert new.open_group(query="q0", k=2, d_max={}, index=0, timeout=60).attempt == 1
            with pytest.raises(FencedError, match="attempt 0 of 'q0' was replaced by 1"):
                old.rollout_fail(group, 0, "late").result(60)
            assert group.closed


def test_a_trainer_sets_groups_aside_over_the_link(tmp_path: Path) -> None:
    """One apply accounts for both parts, and nothing stays leased; inspect and stats show it."""
    params = run_params(batch=1, pool=2, in_order=True)
    store = StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", params)
    with publish(store.url, "main") as main, publish(store.url, "sub"):
        with mgrpo.connect(store.url, role="worker", run=DIGEST, name="w") as worker:
            fill(worker, "q0", index=0)
            fill(worker, "q1", index=1)
            worker.flush()
        claimed = main.claim(2, timeout=60)
        main.apply(0, claimed[1:], surplus=claimed[:1])
        assert [line.query for line in main.trained("main")] == ["q1"]
        role = main.stats()["roles"]["main"]
        assert (role["surplus"], role["leased"], role["applied"]) == (1, 0, 1) and main._held == {}
    store.close()
    shown = "\n".join(inspect(tmp_path / "s.db").lines())
    assert "role main: 1 applied, 1 surplus" in shown
    assert "1 groups of 2 rollouts a step, chosen from 2, max_lag 0" in shown and "workers: w" in shown
