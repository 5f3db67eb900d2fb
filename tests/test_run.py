"""Whole runs of a tiny task: three agents in processes of their own, killed, stopped, resumed, taken apart."""

from __future__ import annotations

import contextlib
import gzip
import os
import signal
import socket
import sqlite3
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from mgrpo.transport.keys import add_key, init_keys
from tests.runs import (
    ALONE,
    RELAY,
    command,
    final_weights,
    kill,
    leftovers,
    processes_of,
    records,
    resume,
    started,
    steps_of,
    summary,
    train,
    wait_for,
)
from tests.span_kit import check_spans
from tests.stopped import stand_still

ROLES = ("main", "left", "right")
STEPS = 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with, bit for bit."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(RELAY, out)
    return out


def test_a_run_leaves_results_and_nothing_else(undisturbed: Path) -> None:
    """Summary, metrics, curves and policies are there; no process, socket or lock is."""
    data = summary(undisturbed)
    assert (
        data["finished"] and data["valid"] and data["steps"] == STEPS and data["retokenization_mismatch"] == 0
    )
    for when in ("start", "final"):
        assert set(data["heldout"][when]) == {"greedy", "sampled"}
    assert set(data["d_k"]) == {"left", "right"}
    assert set(final_weights(undisturbed)) == set(ROLES)
    assert (undisturbed / "curves.png").stat().st_size > 10_000
    assert list((undisturbed / "tensorboard").iterdir())
    assert leftovers(undisturbed) == []


def test_everything_has_its_span(undisturbed: Path) -> None:
    """Each rollout, turn, claim, part of a step, version and update is in the record of spans, once, and a trainer's
    named times are its steps' seconds."""
    spans = check_spans(undisturbed, ROLES, STEPS)["rollout-0"]
    for role in ROLES:
        updates = [s.args["version"] for s in spans if s.kind == "update" and s.name == role]
        assert updates == list(range(STEPS + 1))
    evaluations = Counter(s.name for s in spans if s.kind == "evaluation")
    assert evaluations == {"validation": 3, "heldout": 2, "start validation": 1}
    waits = [s for s in spans if s.kind == "wait"]
    assert waits and all(before.end <= after.start for before, after in pairwise(waits))


def test_every_role_trains_on_its_own_counts(undisturbed: Path) -> None:
    """d_k, alignment and staleness are each role's own; the trainer's log-probs are the sampler's."""
    last = {role: [r for r in records(undisturbed) if f"{role}/reward/mean" in r] for role in ROLES}
    for role, rows in last.items():
        assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
        assert all(r[f"{role}/staleness/max"] == 0 for r in rows)
        differences = [r[d] for r in rows if (d := f"{role}/policy/logprob_diff_max") in r]
        assert differences and max(differences) < 1e-4
    assert max(r["left/d_k/max"] for r in last["left"]) == 3
    assert max(r["right/d_k/max"] for r in last["right"]) == 2
    assert any(r["left/align/dup_ratio"] > 0 for r in last["left"])
    assert all(r["right/align/dup_ratio"] == 0 for r in last["right"])  # "expected" copies nothing
    assert any(r["right/align/drop_ratio"] > 0 for r in last["right"])  # d_k = 2, D_max = 1


def test_policies_have_changed_and_differ(undisturbed: Path) -> None:
    """Each agent has weights of its own, and RL has moved them."""
    final = final_weights(undisturbed)
    assert len(set(final.values())) == 3
    for role in ROLES:
        start = (undisturbed / "agents" / role / "start" / "model.safetensors").read_bytes()
        assert start != final[role]


def test_the_same_seed_gives_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """Synchronous mode: a second run ends with the same weights, also where profilers look at three of its steps in
    two trainers and the rollout worker."""
    again = tmp_path / "again"
    output = train(
        RELAY, again, "profile.steps=[2, 4]", 'profile.roles=["main", "left"]', "profile.workers=[0]"
    )
    assert final_weights(again) == final_weights(undisturbed)
    for name, inside in {"main-rank0": "publish", "left-rank0": "backward", "rollout-0": "decode"}.items():
        trace = again / "profile" / f"{name}-steps-2-4.json.gz"
        assert f"mgrpo/{inside}".encode() in gzip.decompress(trace.read_bytes())
    assert len(list((again / "profile").iterdir())) == 6  # a table beside each
    assert output.count("profile of steps 2 to 4") == 3, output


def test_killed_processes_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 of a worker, a trainer and the store, one after the other: each comes back, the run ends, and the weights
    are those of the undisturbed run."""
    out = tmp_path / "run"
    with started(command("train", str(RELAY), "--out", str(out))) as process:
        for step, victim in ((3, "rollout"), (7, "trainer-left"), (11, "store")):
            wait_for(lambda step=step: steps_of(out) >= step or process.poll() is not None, f"step {step}")
            kill(out, victim)
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    assert output.count("started again (restart 1)") == 3
    assert final_weights(out) == final_weights(undisturbed)
    assert leftovers(out) == []


def test_interrupt_and_resume_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """Ctrl-C while the trainers wait for rollouts, as they do most of the time: each leaves a checkpoint of its last
    step, and its log no trace; --resume goes on to the same bits and one set of metrics."""
    out = tmp_path / "run"
    sets = ["--set=trainer.checkpoint_every=1000"]
    with started(command("train", str(RELAY), "--out", str(out), *sets)) as process:
        # One role may report a step before another has.
        wait_for(lambda: min(steps_of(out, r) for r in ROLES) >= 3 or process.poll() is not None, "step 3")
        worker = processes_of(out)["rollout"]
        stand_still(worker)  # in the middle of a batch, or before one
        process.send_signal(signal.SIGINT)
        try:
            wait_for(lambda: all(checkpoints(out, role) for role in ROLES), "the checkpoints")
        finally:
            os.kill(worker, signal.SIGCONT)
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 130 and "--resume" in output
    assert leftovers(out) == [] and not summary(out)["finished"]
    for role in ROLES:
        assert checkpoints(out, role)[-1] >= steps_of(out, role) >= 3
        assert (out / "logs" / f"trainer-{role}.log").read_text() == ""
    resume(out)
    assert final_weights(out) == final_weights(undisturbed)
    assert summary(out)["finished"] and summary(out)["valid"]
    sequence = [r["seq"] for r in records(out)]
    assert sequence == sorted(set(sequence))  # nothing written twice
    assert leftovers(out) == []


def checkpoints(out: Path, role: str) -> list[int]:
    """The steps of a role's complete checkpoints."""
    folders = (out / "agents" / role / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in folders)


def test_a_killed_launcher_takes_its_children_along(tmp_path: Path) -> None:
    """kill -9 of the launcher: no process of the run outlives it, and the run can be resumed. The kernel tells them of
    its death, here many times in a row, as it does for a launcher of several threads."""
    out = tmp_path / "run"
    with started(command("train", str(RELAY), "--out", str(out), "--set=trainer.steps=100")) as process:
        wait_for(lambda: steps_of(out) >= 1 or process.poll() is not None, "step 1")
        children = list(processes_of(out).values())
        process.kill()
        process.wait(60)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                for _ in range(2000):
                    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not processes_of(out), "the end of the children", 120)
    resume(out, "trainer.steps=5")
    assert summary(out)["finished"]
    assert leftovers(out) == []


def test_an_invalid_start_ends_the_run_and_says_why(tmp_path: Path) -> None:
    """The start validation does not pass: no RL step, a reason with the figure and its bound, nothing left behind."""
    out = tmp_path / "run"
    with started(
        command("train", str(ALONE), "--out", str(out), "--set=task.options.valid=false")
    ) as process:
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 1
    assert "not a valid start" in output and "readiness 0.000 (outside 0.5..1)" in output
    assert steps_of(out) == 0 and not summary(out)["valid"]
    assert leftovers(out) == []


def test_a_bug_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    """An error that repeats is not restarted for ever: the run ends with the message and names the log."""
    out = tmp_path / "run"
    with started(command("train", str(RELAY), "--out", str(out), "--set=task.options.bug=true")) as process:
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 1
    assert "the relay has a bug" in output.splitlines()[-1] and "rollout-0.log" in output.splitlines()[-1]
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("outage", "words"),
    [("batches", "each of 3 rollout batches"), ("evaluations", "8 rollouts of an evaluation")],
)
def test_an_outage_ends_the_run_with_its_own_error(tmp_path: Path, outage: str, words: str) -> None:
    """Where nothing is answered any more, the run does not go on for ever nor ends on a figure that nobody measured: it
    says what failed, in the words of what failed."""
    out = tmp_path / "run"
    with started(
        command("train", str(RELAY), "--out", str(out), f'--set=task.options.outage="{outage}"')
    ) as process:
        output, _ = process.communicate(timeout=800)
    last = output.splitlines()[-1]
    assert process.returncode == 1 and words in last and "failed, the last with: the relay is gone" in last
    assert not summary(out)["finished"] and leftovers(out) == []


def test_asynchronous_runs_keep_the_lag_and_survive_failures(tmp_path: Path) -> None:
    """max_lag = 1 with two workers and failing rollouts: no token is older than one step, failures are never scored."""
    out = tmp_path / "run"
    train(
        RELAY, out, "trainer.max_lag=1", "rollout.workers=2", "task.options.fail_every=4", "trainer.steps=8"
    )
    rows = [r for r in records(out) if "main/reward/mean" in r]
    assert [r["step"] for r in rows] == list(range(1, 9))
    assert max(r["main/staleness/max"] for r in rows) <= 1
    with contextlib.closing(sqlite3.connect(out / "store.db")) as database:
        assert database.execute("SELECT count(*) FROM groups").fetchone() == (
            8 * 4,
        )  # none beyond the last step
    assert all(r["main/rollouts/failed"] == 4 for r in rows)  # one of four rollouts in each of four groups
    check_spans(out, ROLES, 8)
    assert leftovers(out) == []


def test_dropped_groups_are_replaced(tmp_path: Path) -> None:
    """Every third question fails as a whole, whole steps' worth of them: later groups take their places, each step has
    its four groups and the weights of its own version, and the run ends."""
    out = tmp_path / "run"
    train(RELAY, out, "task.options.lose_every=3", "trainer.steps=6")
    rows = [r for r in records(out) if "main/reward/mean" in r]
    assert [r["step"] for r in rows] == list(range(1, 7))
    assert all(r["main/staleness/max"] == 0 for r in rows)
    database = sqlite3.connect(out / "store.db")
    with contextlib.closing(database):
        states = Counter(s for (s,) in database.execute("SELECT state FROM groups"))
        lost = Counter(s for (s,) in database.execute("SELECT state FROM deliveries"))
    assert states == {"sealed": 24, "dropped": 12}
    assert lost == {"committed": 3 * 24}
    assert leftovers(out) == []


def test_a_worker_that_stands_still_makes_nothing_stale(tmp_path: Path) -> None:
    """max_lag = 1, one of two workers stopped for a while in the middle of its batch: the others wait for it, no
    group is passed over, and the run ends with every group trained once."""
    out = tmp_path / "run"
    with started(
        command("train", str(RELAY), "--out", str(out), "--set=trainer.max_lag=1", "--set=rollout.workers=2")
    ) as process:
        wait_for(lambda: steps_of(out) >= 2 or process.poll() is not None, "step 2")
        second = processes_of(out)["rollout-1"]
        stand_still(second)
        time.sleep(3)
        stood = steps_of(out)
        time.sleep(2)
        assert (
            steps_of(out) - stood <= 1
        )  # the trainers wait: they do not run ahead on the other worker's groups
        os.kill(second, signal.SIGCONT)
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    with contextlib.closing(sqlite3.connect(out / "store.db")) as database:
        states = Counter(s for (s,) in database.execute("SELECT state FROM deliveries"))
    assert states == {"committed": 3 * 20 * 4}
    assert max(r["main/staleness/max"] for r in records(out) if "main/staleness/max" in r) <= 1
    assert leftovers(out) == []


def test_parts_started_one_by_one_on_addresses(undisturbed: Path, tmp_path: Path) -> None:
    """Store, trainers and worker started by hand on their own tcp addresses, with encrypted links, compute what the
    launcher's run does."""
    keys = tmp_path / "keys"
    init_keys(keys)
    for name, who in (("worker", "worker"), *((role, f"trainer:{role}") for role in ROLES)):
        add_key(keys, name, who)
    ports = free_ports(4)
    urls = [f"--set=store.url=tcp://127.0.0.1:{ports[0]}", f"--set=link.keys={keys}"]
    urls += [
        f"--set=agents.{role}.url=tcp://127.0.0.1:{port}" for role, port in zip(ROLES, ports[1:], strict=True)
    ]
    folders = {name: tmp_path / name for name in ("store", "worker", *ROLES)}  # no folder is shared
    config = str(RELAY)
    with started(command("store", "--config", config, "--out", str(folders["store"]), *urls)) as store:
        parts = [
            started(command("trainer", config, "--agent", role, "--out", str(folders[role]), *urls))
            for role in ROLES
        ]
        worker = started(command("rollout", config, "--out", str(folders["worker"]), *urls))
        with parts[0] as one, parts[1] as two, parts[2] as three, worker as rollouts:
            for process in (rollouts, one, two, three):
                output, _ = process.communicate(timeout=800)
                assert process.returncode == 0, output
        assert store.poll() is None
    for role in ROLES:
        path = folders[role] / "agents" / role / "final" / "model.safetensors"
        assert path.read_bytes() == final_weights(undisturbed)[role]


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports
