"""The store's core and its peers on one virtual clock, with a network that drops, duplicates, reorders and
delays.

Peers are generators: they yield a request and get its answer. A request is sent again until it is answered,
as the link's client does; copies may arrive late, twice, or after newer ones. Store and peers crash at random
moments and come back, or a worker dies for good and the other takes its groups over. Everything is a function of the
seed.
"""

from __future__ import annotations

import heapq
import random
import shutil
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgrpo.store import records as rec
from mgrpo.store.core import Core
from mgrpo.store.database import Database
from mgrpo.store.ledger import Ledger
from mgrpo.transport.codec import BadMessage, Refusal, Sender
from tests.ledger_machine import invocation
from tests.store_kit import DIGEST, run_params

Actor = Generator[tuple[str, Any], Any, None]
RESEND = 1.0
GROUPS = 4
ROLES = ("main", "sub")


@dataclass
class Life:
    """One run of a peer's program."""

    program: Actor
    sender: Sender
    number: int = 0  # of the request in flight
    request: tuple[str, Any] | None = None


class World:
    """One schedule."""

    def __init__(self, seed: int, make_ledger: type[Ledger] = Ledger) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.database = Database(self.folder / "s.db", synchronous="OFF")
        self.core = Core(self.database, 0.0, make_ledger)
        self.in_order = seed % 2 == 1
        self.pool = 1 + seed // 2 % 2  # a step uses one group of a claim and sets the others aside
        self.window = 1 + self.in_order * (seed // 4 % 3)
        params = run_params(
            batch=1, pool=self.pool, max_lag=1000, lease_s=30.0, group_timeout_s=1e6, in_order=self.in_order,
            claim_window=self.window, heartbeat_timeout_s=8.0,
        )  # fmt: skip
        self.core.create(params, 0.0)
        self.lives: dict[str, Life] = {}
        self.lost = self.random.choice([0.0, 0.1, 0.3])
        self.doubled = self.random.choice([0.0, 0.2])
        self.delay = self.random.choice([0.01, 0.3, 3.0])
        self.crashes = self.random.choice([0, 2, 5])
        self.finished: set[str] = set()
        # each role's history, rolled back with its optimizer: step, what it used, what it set aside
        self.weights: dict[str, list[tuple[int, str, tuple[str, ...]]]] = {}
        self.disk: dict[str, list[tuple[int, str, tuple[str, ...]]]] = {role: [] for role in ROLES}

    def at(self, after: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + after, self._count, what))

    def run(self) -> None:
        """Play until every peer is done; raises when that takes too long."""
        try:
            for name in ("w0", "w1", *ROLES):
                self.start(name)
            for _ in range(self.crashes):
                self.at(self.random.uniform(0, 30), self.crash_someone)
            if self.crashes == 5:
                self.at(self.random.uniform(0, 10), self.worker_dies)
            while len(self.finished) < 4:
                # type: ignore[union-attr]
                assert self._events and self.now < 5000, f"stuck at {self.now}: {self.core.ledger.stats()}"
                self.now, _, what = heapq.heappop(self._events)
                what()
            self.check()
        finally:
            self.database.close()
            shutil.rmtree(self.folder)

    def check(self) -> None:
        everything = sorted(f"q{i}" for i in range(GROUPS))
        for role in ROLES:
            told = [(line.step, line.query) for line in self.core.trained(role)]
            weights = self.weights[role]
            assert told == [(step, used) for step, used, _ in weights], (
                f"{role}: ledger {told}, weights {weights}"
            )
            order = [query for _, used, aside in weights for query in (used, *aside)]
            assert sorted(order) == everything, f"{role}: {order}"
            if self.in_order and self.window == 1:
                assert order == everything, f"{role}: not in order: {order}"

    def crash_someone(self) -> None:
        name = self.random.choice(["store", "w0", "w1", *ROLES])
        if name == "store":
            self.database.reopen()
            self.core.reload(self.now)
        elif name not in self.finished:
            self.start(name)

    def worker_dies(self) -> None:
        """For good: what it has in hand is the other's."""
        name = self.random.choice(["w0", "w1"])
        if name not in self.finished:
            self.lives[name] = Life(self.worker(name), Sender(DIGEST, "worker", name, "dead"))
            self.finished.add(name)

    # -- the network ----------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        program, role = (
            (self.worker(name), "worker") if name[0] == "w" else (self.trainer(name), f"trainer:{name}")
        )
        self._count += 1
        life = self.lives[name] = Life(program, Sender(DIGEST, role, name, str(self._count)))
        self.go_on(name, life, None)

    def go_on(self, name: str, life: Life, answer: Any) -> None:
        """Give the program its answer and send what it asks next."""
        if self.lives[name] is not life:
            return  # it has died meanwhile
        try:
            life.request = (
                life.program.throw(answer) if isinstance(answer, Exception) else life.program.send(answer)
            )
        except StopIteration:
            self.finished.add(name)
            return
        life.number += 1
        self.send(name, life, life.number)

    def send(self, name: str, life: Life, number: int) -> None:
        if self.lives[name] is not life or life.number != number or name in self.finished:
            return
        request = life.request
        for _ in range(1 + (self.random.random() < self.doubled)):
            if self.random.random() >= self.lost:
                self.at(self.random.uniform(0, self.delay), lambda: self.arrive(name, life, number, request))
        self.at(RESEND, lambda: self.send(name, life, number))

    def arrive(self, name: str, life: Life, number: int, request: Any) -> None:
        """At the store: handle, commit, answer. A dead peer's late copies arrive too."""
        self.core.tick(self.now)
        answer: Any
        try:
            answer = self.core.handle(*request, life.sender, self.now)
        except (Refusal, BadMessage) as refusal:
            answer = refusal
        self.core.commit()
        if request[0] == "claim" and answer is None:
            answer = Refusal("RETRY_AFTER", "fewer are sealed")
        if self.random.random() >= self.lost:
            self.at(self.random.uniform(0, self.delay), lambda: self.answered(name, life, number, answer))

    def answered(self, name: str, life: Life, number: int, answer: Any) -> None:
        if self.lives[name] is life and life.number == number:
            if isinstance(answer, Refusal) and answer.code in ("RETRY_AFTER", "HELD"):
                life.number += 1  # ask the same again, as a new request
                self.at(0.5, lambda: self.send(name, life, life.number))
            else:
                self.go_on(name, life, answer)

    # -- the peers ------------------------------------------------------------------------------------------

    def worker(self, name: str) -> Actor:
        """Fills every second group, then what the other has left; after a crash it opens them again and goes on where
        the store knows it to be."""
        mine = list(range(int(name[1]), GROUPS, 2))
        for number in [*mine, *(i for i in range(GROUPS) if i not in mine)]:
            while True:
                try:
                    yield from self.fill(f"q{number}", number)
                    break
                except Refusal:
                    continue  # another opening, also a predecessor's late one, took the group over: open it again

    def fill(self, query: str, number: int) -> Actor:
        opened = yield "open_group", rec.OpenGroup(query, 2, {"sub": 4}, number)
        for rollout in range(2):
            if rollout in opened.finished:
                continue
            subs = (number + rollout) % 3
            for role, n in (("main", 1), ("sub", subs)):
                for i in range(n):
                    yield "invocation_done", invocation(query, rollout, opened.attempt, role, i)
            final = rec.RolloutFinal(query, rollout, opened.attempt, 1.0, 1.0, {"sub": subs}, {}, 0, 0)
            yield "rollout_final", final

    def trainer(self, role: str) -> Actor:
        """Claims one pool at a time, steps, applies, checkpoints every second step; starts from its disk."""
        history = self.disk[role]
        weights = self.weights[role] = list(history)
        step = history[-1][0] if history else -1
        nonce = f"{role}{self._count}"
        while True:
            known = yield "role", rec.RoleName(role)
            try:
                resumed = yield "resume", rec.Resume(role, step, nonce, known.epoch)
                break
            except Refusal:
                continue  # a predecessor's late resume came in between
        epoch, seq = resumed.epoch, 0
        yield "status", rec.Status(role, epoch, 0, step, step)
        while len(weights) * self.pool < GROUPS:
            seq += 1
            groups = yield "claim", rec.Claim(role, epoch, seq, self.pool, 0.0)
            used, *aside = [(group.query, group.lease) for group in groups]
            try:
                yield "apply", rec.Groups(role, epoch, [used], step + 1, surplus=aside)
            except Refusal:
                continue  # the lease ran out on the way; the groups will come again
            step += 1
            weights.append((step, used[0], tuple(query for query, _ in aside)))
            if step % 2 or len(weights) * self.pool == GROUPS:
                self.disk[role] = list(weights)
                yield "commit", rec.Commit(role, epoch, step)
