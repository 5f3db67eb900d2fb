"""A model of what the store owes a run whose rollouts stream, run beside the real core through random programs.

Two training roles make one version a step, from claims that they make ahead, and set a part of each claim aside. Three
workers open groups in any order that admission allows, sample them with the oldest version that it allows, lose groups,
fall silent and take each other's groups over. The model knows only promises: no token is trained on when it is older
than max_lag, no group is passed more often than claim_window says, a worker that is alive keeps its groups, nothing is
lost or trained twice, and the run can always go on. Everything is a function of the seed.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgrpo.store import records as rec
from mgrpo.store.core import Core
from mgrpo.store.database import Database
from mgrpo.store.ledger import Ledger
from mgrpo.store.state import QUARANTINED, STALE
from mgrpo.transport.codec import Refusal, Sender
from tests.store_kit import DIGEST, run_params

ROLES = ("main", "sub")
WORKERS = ("w0", "w1", "w2")
K = 2
HEARTBEAT = 30.0  # seconds
AHEAD = 6  # indices beyond the first unopened one that a worker may try


@dataclass
class GroupModel:
    worker: str
    session: str
    attempt: int
    versions: dict[str, int]  # of each role, what it is sampled with
    state: str = "open"


@dataclass
class Claimed:
    """A claim in hand: index -> lease."""

    groups: dict[int, int]


@dataclass
class Trainer:
    """One life of a trainer; what its weights have seen, and what its steps have set aside."""

    epoch: int
    steps: int  # that it has made; the next one trains weights of this version
    trained: list[tuple[int, int]]  # (step, index)
    surplus: list[tuple[int, int]]
    held: list[Claimed] = field(default_factory=list)
    seq: int = 0


@dataclass
class RoleModel:
    live: Trainer
    published: int = 0
    checkpoints: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = field(
        default_factory=lambda: {0: ([], [])}
    )
    claims: dict[int, set[int]] = field(default_factory=dict)  # step -> what was claimed for it
    nonce: int = 0


class StreamingRun:
    """One program."""

    def __init__(self, seed: int, make_ledger: type[Ledger] = Ledger) -> None:
        self.random = rng = random.Random(seed)
        self.window, self.batch = rng.choice([1, 1, 2, 3, 4, 5]), rng.randint(1, 3)
        self.pool = self.batch + rng.randint(0, 2)
        self.max_lag = -(-(self.window - 1) // self.batch) + rng.randint(0, 2)
        # What goes wrong in this program: others get further without it.
        self.troubles = {kind for kind in ("workers", "trainers", "nacks", "store") if rng.random() < 0.4}
        self.now = 0.0
        self.groups: dict[int, GroupModel] = {}
        self.roles: dict[str, RoleModel] = {}
        self.alive: dict[str, float] = {}  # worker -> its last sign of life
        self.lives = dict.fromkeys(WORKERS, 0)  # which life of each worker this is
        self.nacked = False  # then order and ages may change, and claims may be too old
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.database = Database(self.folder / "s.db", synchronous="OFF")
        self.core = Core(self.database, self.now, make_ledger)

    def run(self, steps: int = 40) -> None:
        actions = [self.play_all, self.both_train] * 3 + [self.open_some, self.end_some, self.end_all] * 2
        actions += [self.steady, self.claim_one, self.commit_one, self.publish_one]
        actions += [self.worker_restarts, self.time_passes, self.time_passes] * ("workers" in self.troubles)
        actions += [self.trainer_dies] * ("trainers" in self.troubles)
        actions += [self.nack, self.nack] * ("nacks" in self.troubles)
        actions += [self.store_crashes] * ("store" in self.troubles)
        try:
            self.start()
            for _ in range(steps):
                self.random.choice(actions)()
                self.check()
            self.drain()
        finally:
            self.database.close()
            shutil.rmtree(self.folder)

    def start(self) -> None:
        params = run_params(
            batch=self.batch, pool=self.pool, max_lag=self.max_lag, claim_window=self.window, in_order=True,
            lease_s=50.0, group_timeout_s=1e6, heartbeat_timeout_s=HEARTBEAT,
        )  # fmt: skip
        self.core.create(params, self.now)
        for role in ROLES:
            self.roles[role] = RoleModel(Trainer(0, 0, [], []))
            self.take_over(role, 0)

    def check(self) -> None:
        self.check_histories()
        world = self.call("wait", rec.WaitFor(0.0), "observer")
        assert world.workers == sorted(worker for worker in self.alive if self.is_alive(worker))
        if not self.nacked:
            assert not any(self.lost(role) for role in ROLES), "a group was too old, for no reason"

    # -- plumbing -------------------------------------------------------------------------------------------

    def call(self, method: str, body: Any, role: str, name: str = "t", session: str = "s") -> Any:
        answer = self.core.handle(method, body, Sender(DIGEST, role, name, session), self.now)
        self.core.commit()
        if role == "worker":
            self.alive[name] = self.now
        return answer

    def send(self, index: int, method: str, body: Any) -> None:
        group = self.groups[index]
        self.call(method, body, "worker", group.worker, group.session)

    def is_alive(self, worker: str) -> bool:
        return self.now - self.alive.get(worker, -1e9) < HEARTBEAT

    def arrived(self, *states: str) -> set[int]:
        return {i for i, g in self.groups.items() if g.state in (states or ("sealed", "dropped"))}

    def first_missing(self) -> int:
        return next(i for i in range(len(self.groups) + 1) if i not in self.arrived())

    def lost(self, role: str) -> set[int]:
        """What the store has given up for the role; the model checks elsewhere that it had reason to."""
        deliveries = self.database._db.execute(
            "SELECT idx FROM deliveries WHERE role = ? AND state IN (?, ?)", (role, QUARANTINED, STALE)
        )
        return {index for (index,) in deliveries.fetchall()}

    def taken(self, role: str) -> set[int]:
        live = self.roles[role].live
        held = {index for claim in live.held for index in claim.groups}
        return held | {index for _, index in live.trained + live.surplus}

    # -- workers --------------------------------------------------------------------------------------------

    def first_new(self) -> int:
        return next(i for i in range(len(self.groups) + 1) if i not in self.groups)

    def open_some(self) -> None:
        """A new group, perhaps not the next one, or one that somebody has opened before."""
        index = self.first_new() + self.random.randint(0, AHEAD)
        if self.random.random() < 0.3 and self.groups and "workers" in self.troubles:
            index = self.random.choice(sorted(self.groups))
        self.open_index(self.random.choice(WORKERS), index)

    def play_all(self) -> None:
        """Everything that admission allows is opened, and ends but for some slow groups, so that windows get full and
        ages reach their bound."""
        worker, slow = self.random.choice(WORKERS), self.random.choice([0.0, 0.1, 0.3])
        for _ in range(20):
            index = self.first_new()
            if not self.open_index(worker, index):
                break
            if self.random.random() >= slow:
                self.end_index(index)

    def open_index(self, worker: str, index: int) -> bool:
        session = f"{worker}.{self.lives[worker]}"
        known = self.groups.get(index)
        body = rec.OpenGroup(f"q{index}", K, {"sub": 1}, index)
        try:
            opened = self.call("open_group", body, "worker", worker, session)
        except Refusal as refusal:
            if refusal.code == "HELD":
                assert known is not None and known.state == "open" and known.worker != worker
                assert self.is_alive(known.worker), f"{known.worker} is dead: {refusal}"
            else:
                assert refusal.code == "RETRY_AFTER" and known is None, refusal
            return False
        for role, oldest in opened.min_versions.items():
            assert oldest <= self.roles[role].published or known is not None, (
                "no version is fresh enough for it"
            )
        versions = {role: min(v, self.roles[role].published) for role, v in opened.min_versions.items()}
        if known is None:
            self.groups[index] = GroupModel(worker, session, opened.attempt, versions)
        elif known.state == "open" and (known.worker, known.session) != (worker, session):
            assert known.worker == worker or not self.is_alive(known.worker), (
                f"{known.worker} lost q{index} alive"
            )
            assert opened.attempt == known.attempt + 1
            late = rec.RolloutFail(f"q{index}", 0, known.attempt, "late")
            self.refused("rollout_fail", late, known.worker, "FENCED")
            self.groups[index] = GroupModel(worker, session, opened.attempt, versions)
        else:
            assert (opened.state, opened.attempt) == (known.state, known.attempt)
        return True

    def refused(self, method: str, body: Any, worker: str, code: str) -> None:
        try:
            self.core.handle(method, body, Sender(DIGEST, "worker", worker, "old"), self.now)
        except Refusal as refusal:
            assert refusal.code == code, refusal
        else:
            raise AssertionError(f"{method} {body} was accepted")

    def end_some(self) -> None:
        if still_open := sorted(self.arrived("open")):
            self.end_index(
                self.random.choice(still_open), self.random.choice(["sealed", "sealed", "dropped"])
            )

    def end_all(self) -> None:
        for index in sorted(self.arrived("open")):
            self.end_index(index)

    def end_index(self, index: int, ends: str = "sealed") -> None:
        """Every rollout ends: with a trajectory of each role, or without a reward."""
        group, query = self.groups[index], f"q{index}"
        for rollout in range(K):
            if ends == "dropped":
                self.send(index, "rollout_fail", rec.RolloutFail(query, rollout, group.attempt, "down"))
                continue
            for role, version in group.versions.items():
                record = rec.InvocationDone(
                    query, rollout, group.attempt, role, 0, 1, version, version, {}, None
                )
                self.send(index, "invocation_done", record)
            final = rec.RolloutFinal(query, rollout, group.attempt, 1.0, 1.0, {"sub": 1}, {}, 0, 0)
            self.send(index, "rollout_final", final)
        group.state = ends

    def worker_restarts(self) -> None:
        self.lives[self.random.choice(WORKERS)] += 1

    def time_passes(self) -> None:
        """Forty seconds, in which some workers give no sign of life; trainers renew their leases."""
        silent = set(self.random.sample(WORKERS, self.random.randint(0, 2)))
        for _ in range(4):
            self.now += 10.0
            for worker in sorted(set(self.alive) - silent):
                self.call("heartbeat", None, "worker", worker)
            for role, model in self.roles.items():
                held = [(f"q{i}", lease) for c in model.live.held for i, lease in c.groups.items()]
                assert self.call("renew", rec.Groups(role, model.live.epoch, held), f"trainer:{role}") == []
            self.core.tick(self.now)
            self.core.commit()

    # -- trainers -------------------------------------------------------------------------------------------

    def take_over(self, role: str, checkpoint: int) -> None:
        """A trainer starts from the checkpoint after so many steps."""
        model = self.roles[role]
        model.nonce += 1
        body = rec.Resume(role, checkpoint - 1, f"{role}{model.nonce}", model.live.epoch)
        resumed = self.call("resume", body, f"trainer:{role}")
        trained, surplus = model.checkpoints[checkpoint]
        model.live = Trainer(resumed.epoch, checkpoint, list(trained), list(surplus))
        model.checkpoints = {s: kept for s, kept in model.checkpoints.items() if s <= checkpoint}
        self.publish(role)

    def trainer_dies(self) -> None:
        """Its successor starts from one of the last two checkpoints."""
        role = self.random.choice(ROLES)
        self.take_over(role, self.random.choice(sorted(self.roles[role].checkpoints)[-2:]))

    def publish(self, role: str) -> None:
        model = self.roles[role]
        model.published = model.live.steps
        status = rec.Status(role, model.live.epoch, model.published, model.live.steps - 1, -1)
        self.call("status", status, f"trainer:{role}")

    def claim_one(self) -> None:
        self.claim(self.random.choice(ROLES))

    def steady(self) -> None:
        """Some steps without trouble, after which every group in the making is as old as admission allows."""
        for _ in range(3):
            self.play_all()
            self.end_all()
            self.both_train()
            self.publish_one()

    def commit_one(self) -> None:
        self.commit(self.random.choice(ROLES))

    def publish_one(self) -> None:
        self.publish(self.random.choice(ROLES))

    def both_train(self) -> None:
        """Each role makes a step, and may claim the next one before."""
        ahead, publish, commit = (self.random.random() < p for p in (0.5, 0.7, 0.3))
        for role, model in self.roles.items():
            for _ in range(1 + ahead):
                self.claim(role)
            if model.live.held:
                due = sorted(model.live.held[0].groups)
                self.step(role, self.random.sample(due, self.batch))
                if publish:
                    self.publish(role)
                if commit:
                    self.commit(role)

    def claim(self, role: str) -> bool:
        """At most two claims in hand: one is trained on, the other is read meanwhile."""
        model, live = self.roles[role], self.roles[role].live
        if len(live.held) == 2:
            return False
        before, first = self.taken(role), self.first_missing()
        body = rec.Claim(role, live.epoch, live.seq + 1, self.pool, 0.0)
        answer = self.call("claim", body, f"trainer:{role}")
        ready = sorted(self.arrived("sealed") - before - self.lost(role))  # after what it found too old
        due = ready[: self.pool]
        passed = sum(index > first for index in [*before, *due])
        passing = any(index > first for index in due)
        if answer is None:
            assert len(due) < self.pool or (passing and passed > self.window - 1), f"{due} may be claimed"
            return False
        assert [group.index for group in answer] == due, "not the oldest ones"
        assert not passing or passed <= self.window - 1, (
            f"{passed} groups pass q{first}, window {self.window}"
        )
        live.seq += 1
        live.held.append(Claimed({group.index: group.lease for group in answer}))
        step = live.steps + len(live.held) - 1
        if self.window == 1 and not self.nacked:
            known = model.claims.setdefault(step, set(due))
            assert known == set(due), f"step {step} had {known}, after a rollback it has {due}"
        return True

    def step(self, role: str, used: list[int]) -> None:
        live = self.roles[role].live
        groups = live.held.pop(0).groups
        for index in used:
            age = live.steps - self.groups[index].versions[role]
            assert age <= self.max_lag, f"q{index} is trained {age} versions late, max_lag {self.max_lag}"
        spare = [index for index in groups if index not in used]
        named = [[(f"q{i}", groups[i]) for i in part] for part in (used, spare)]
        body = rec.Groups(role, live.epoch, named[0], live.steps, surplus=named[1])
        for _ in range(2):  # its answer may get lost
            self.call("apply", body, f"trainer:{role}")
        live.trained += [(live.steps, index) for index in used]
        live.surplus += [(live.steps, index) for index in spare]
        live.steps += 1

    def commit(self, role: str) -> None:
        """A checkpoint of all steps is durable, or of all but the last one, which was made meanwhile."""
        model, live = self.roles[role], self.roles[role].live
        last = max(model.checkpoints)
        steps = self.random.choice([s for s in (live.steps - 1, live.steps) if s >= last])
        trained, surplus = (
            [line for line in part if line[0] < steps] for part in (live.trained, live.surplus)
        )
        model.checkpoints[steps] = (trained, surplus)
        cursor = self.call("commit", rec.Commit(role, live.epoch, steps - 1), f"trainer:{role}")
        over = {index for _, index in trained + surplus} | self.lost(role) | self.arrived("dropped")
        behind = set(range(cursor)) - over
        assert not behind, f"tokens of {behind} may be needed, and the cursor is {cursor}"

    def nack(self) -> None:
        """A claim is given back: its groups come again, after the other claim in hand, or are too old then."""
        role = self.random.choice(ROLES)
        live = self.roles[role].live
        if self.random.random() < 0.7:
            self.claim(role)
            self.claim(role)
        if live.held:
            groups = live.held.pop(self.random.choice([0, -1])).groups
            named = [(f"q{index}", lease) for index, lease in groups.items()]
            self.call("nack", rec.Groups(role, live.epoch, named, -1, "unreadable"), f"trainer:{role}")
            self.nacked = True

    # -- the store ------------------------------------------------------------------------------------------

    def store_crashes(self) -> None:
        """Whoever was alive gets the full time to give a sign of life."""
        self.core.tick(self.now)
        self.core.commit()
        self.database.reopen()
        self.core.reload(self.now)
        self.alive = {worker: self.now for worker in self.alive if self.is_alive(worker)}

    def check_histories(self) -> None:
        """The store's account is what the weights have seen."""
        for role, model in self.roles.items():
            told = [(line.step, line.index) for line in self.core.trained(role)]
            assert told == sorted(model.live.trained), f"{role}: ledger {told}, weights {model.live.trained}"
            aside = {index for _, index in model.live.surplus}
            both = [index for _, index in told] + sorted(aside)
            assert len(set(both)) == len(both), f"{role}: {both} holds a group twice"
            stats = self.core.ledger.stats()["roles"][role]  # type: ignore[union-attr]
            assert stats["surplus"] == len(aside)

    def drain(self) -> None:
        """In the end every group has arrived, all but a last incomplete claim of each role is trained on or set aside,
        and the next groups are admitted."""
        self.store_crashes()
        self.now += HEARTBEAT + 1  # nobody is alive any more
        self.core.tick(self.now)
        for role, model in self.roles.items():
            self.take_over(role, max(model.checkpoints))
        self.end_all()
        last = max(self.groups, default=-1) + 3 * self.pool
        while (first := self.first_missing()) <= last:
            opened = self.open_index("w0", first)
            if opened:
                self.end_index(first)
            moved = [self.claim(role) and self.finish_step(role) for role in ROLES]
            assert opened or any(moved), f"the run is stuck at q{first}"
        for role in ROLES:
            while self.claim(role):
                self.finish_step(role)
        for role in ROLES:
            left = self.arrived("sealed") - self.taken(role) - self.lost(role)
            assert len(left) < self.pool, f"{role} never trained on {left}"
        self.check()

    def finish_step(self, role: str) -> bool:
        self.step(role, sorted(self.roles[role].live.held[0].groups)[: self.batch])
        self.publish(role)
        self.commit(role)
        return True
