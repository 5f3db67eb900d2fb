"""The store's state: groups, deliveries, roles, reports. Plain data, rows for the database, no rules.

Everything that must survive a crash becomes a row in `State.dirty` when it changes; the database writes the
rows of many requests in one commit. Deadlines are not rows: after a restart every lease, every open group and every
worker that was alive gets its full time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mgrpo.store.records import (
    Control,
    InvocationDone,
    OpenGroup,
    Reported,
    RoleStatus,
    RolloutFail,
    RolloutFinal,
    RunParams,
)
from mgrpo.transport import codec
from mgrpo.transport.codec import Record
from mgrpo.types import version_label

Row = tuple[Any, ...]
InvocationKey = tuple[int, int, str, int]  # rollout, attempt, role, invocation

OPEN, SEALED, DROPPED = "open", "sealed", "dropped"
READY, LEASED, APPLIED, COMMITTED = "ready", "leased", "applied", "committed"
QUARANTINED, STALE = "quarantined", "stale"
SKIPPED = (QUARANTINED, STALE)  # this role will never train on it
SURPLUS = (
    "surplus"  # claimed for a step and not used: like skipped, but a rollback behind that step undoes it
)
LOST = (*SKIPPED, SURPLUS)  # admission gives its place to another group
KEEP_REPORTS = 20_000


class GroupBody(Record):
    """The part of a group's row that is not a column."""

    opened: OpenGroup
    attempt: int
    worker: str
    session: str
    policy: dict[str, str]
    reason: str


class RoleBody(Record):
    epoch: int
    nonce: str
    resumed_from: int
    version: int | None
    step: int
    checkpoint_step: int
    claim_seq: int
    claimed: list[str]
    requeued: int


@dataclass(slots=True)
class Delivery:
    """One group on its way to one role."""

    role: str
    query: str
    index: int
    state: str = READY
    epoch: int = 0
    step: int = -1
    failures: int = 0
    reason: str = ""
    lease: int = 0
    deadline: float = 0.0

    def row(self) -> Row:
        return (
            self.role,
            self.query,
            self.index,
            self.state,
            self.epoch,
            self.step,
            self.failures,
            self.reason,
            self.lease,
        )


@dataclass(slots=True)
class Group:
    opened: OpenGroup
    index: int
    progress_at: float  # when it was opened, or something of it arrived last
    state: str = OPEN
    attempt: int = 0
    worker: str = ""
    session: str = ""
    policy: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    rollouts: dict[int, RolloutFinal | RolloutFail] = field(default_factory=dict)
    invocations: dict[InvocationKey, InvocationDone] = field(default_factory=dict)
    deliveries: dict[str, Delivery] = field(default_factory=dict)

    def row(self) -> Row:
        body = GroupBody(self.opened, self.attempt, self.worker, self.session, self.policy, self.reason)
        return (self.opened.query, self.index, self.state, codec.encode(body))

    def finished(self) -> list[int]:
        return sorted(self.rollouts)

    def real(self) -> int:
        """Rollouts that ended with a reward."""
        return sum(isinstance(rollout, RolloutFinal) for rollout in self.rollouts.values())


@dataclass(slots=True)
class Role:
    """A training role. `ready` holds (index, query) in order; `skipped` the indices that it will never train on, and
    `surplus` those that its steps have set aside, both in order."""

    name: str
    epoch: int = 0
    nonce: str = ""
    resumed_from: int = -1
    requeued: int = 0
    version: int | None = None
    step: int = -1
    checkpoint_step: int = -1
    claim_seq: int = 0
    claimed: list[str] = field(default_factory=list)
    ready: list[tuple[int, str]] = field(default_factory=list)
    leased: set[str] = field(default_factory=set)
    applied: set[str] = field(default_factory=set)
    skipped: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)
    cursor: int = 0  # every group below this index is committed or lost for this role

    def row(self) -> Row:
        body = RoleBody(
            self.epoch, self.nonce, self.resumed_from, self.version, self.step, self.checkpoint_step,
            self.claim_seq, self.claimed, self.requeued,
        )  # fmt: skip
        return (self.name, codec.encode(body))

    def label(self) -> str:
        return version_label(self.name, self.epoch, self.version) if self.version is not None else ""

    def status(self) -> RoleStatus:
        return RoleStatus(self.name, self.epoch, self.version, self.step, self.checkpoint_step, self.label())

    def place(self, index: int) -> int:
        """How many groups the role trains on before the one with this index."""
        return index - bisect_left(self.skipped, index) - bisect_left(self.surplus, index)

    def lost(self, state: str) -> list[int]:
        """The list that holds deliveries in this state, one of LOST."""
        return self.surplus if state == SURPLUS else self.skipped


class State:
    """Everything the ledger knows. Settled groups leave memory; the database brings one back when it is asked
    for."""

    def __init__(self, params: RunParams) -> None:
        self.params = params
        self.groups: dict[str, Group] = {}
        self.indices: dict[int, str] = {}
        self.next_index = 0
        self.open: dict[str, Group] = {}
        self.sealed = 0
        self.dropped = 0
        self.roles = {name: Role(name) for name in params.training_roles}
        self.frozen = {name: Role(name) for name in params.roles if name not in params.training_roles}
        self.control = Control("running")
        self.reports: deque[Reported] = deque(maxlen=KEEP_REPORTS)
        self.last_report = 0
        self.heard: dict[str, set[int]] = {}
        self.counters: Counter[str] = Counter()
        self.settled: set[str] = set()
        self.workers: dict[str, float] = {}  # workers that are alive -> when each gave its last sign of life
        self.paused: set[str] = set()  # workers that wait for a service that is down; no row
        self.trainers: dict[str, float] = {}  # "trainer:<role>" -> when it gave its last sign of life; no row
        self._arrived = 0  # every group below this index is sealed or dropped
        self.dirty: dict[tuple[object, ...], Row] = {}

    # -- rows -----------------------------------------------------------------------------------------------

    def save_group(self, group: Group) -> None:
        self.dirty["groups", group.opened.query] = group.row()

    def save_role(self, role: Role) -> None:
        self.dirty["roles", role.name] = role.row()

    def save_rollout(self, record: RolloutFinal | RolloutFail) -> None:
        kind = "final" if isinstance(record, RolloutFinal) else "fail"
        self.dirty["rollouts", record.query, record.rollout] = (
            record.query, record.rollout, kind, codec.encode(record),
        )  # fmt: skip

    def save_invocation(self, record: InvocationDone) -> None:
        key = (record.query, record.rollout, record.attempt, record.role, record.invocation)
        self.dirty["invocations", *key] = (*key, codec.encode(record))

    def save_meta(self, key: str, value: object) -> None:
        self.dirty["meta", key] = (key, codec.encode(value))

    def save_report(self, report: Reported, n: int) -> None:
        self.dirty["reports", report.seq] = (
            report.seq,
            report.source,
            n,
            report.kind,
            codec.encode(report.payload),
        )

    def take_dirty(self) -> dict[str, list[Row]]:
        """Rows changed since the last call, by table."""
        out: dict[str, list[Row]] = {}
        for key, row in self.dirty.items():
            out.setdefault(str(key[0]), []).append(row)
        self.dirty.clear()
        return out

    # -- the one place where a delivery changes state -------------------------------------------------------

    def move(self, delivery: Delivery, state: str, **changes: Any) -> None:
        """Set a delivery's state and fields, keep the role's indexes right, and remember its row."""
        role = self.roles[delivery.role]
        entry = (delivery.index, delivery.query)
        if delivery.state == READY:
            at = bisect_left(role.ready, entry)
            if at < len(role.ready) and role.ready[at] == entry:
                del role.ready[at]
        elif delivery.state == LEASED:
            role.leased.discard(delivery.query)
        elif delivery.state == APPLIED:
            role.applied.discard(delivery.query)
        elif delivery.state in LOST:
            lost = role.lost(delivery.state)
            del lost[bisect_left(lost, delivery.index)]
        delivery.state = state
        for name, value in changes.items():
            setattr(delivery, name, value)
        self.index_delivery(delivery)
        self.dirty["deliveries", delivery.role, delivery.query] = delivery.row()
        self.settle(self.groups[delivery.query])

    def drop(self, index: int) -> None:
        """No role will ever train on this index."""
        self.dropped += 1
        for role in self.roles.values():
            insort(role.skipped, index)

    def index_delivery(self, delivery: Delivery) -> None:
        role = self.roles[delivery.role]
        if delivery.state == READY:
            insort(role.ready, (delivery.index, delivery.query))
        elif delivery.state == LEASED:
            role.leased.add(delivery.query)
        elif delivery.state == APPLIED:
            role.applied.add(delivery.query)
        elif delivery.state in LOST:
            insort(role.lost(delivery.state), delivery.index)

    # -- groups that have left the making, and memory ---------------------------------------------------------

    def first_missing(self) -> int:
        """The oldest index whose group is neither sealed nor dropped; it may not be open yet."""
        while (query := self.indices.get(self._arrived)) is not None:
            group = self.groups.get(query)
            if group is not None and group.state == OPEN:
                break
            self._arrived += 1
        return self._arrived

    def taken_beyond(self, role: Role, index: int) -> int:
        """How many groups beyond `index`, the first missing one, the role has claimed and not given back. Those before
        it have all arrived, so whatever else arrived lies beyond it."""
        arrived = self.sealed + self.dropped - index
        ready = len(role.ready) - bisect_left(role.ready, (index, ""))
        return arrived - ready - (len(role.skipped) - bisect_right(role.skipped, index))

    def is_settled(self, group: Group) -> bool:
        """Nothing can happen to it any more, short of a rollback or a requeue."""
        if group.state == SEALED:
            return all(self.is_final(delivery) for delivery in group.deliveries.values())
        return group.state == DROPPED

    def is_final(self, delivery: Delivery) -> bool:
        """Its role is through with it, and a checkpoint holds that."""
        if delivery.state == SURPLUS:
            return delivery.step <= self.roles[delivery.role].checkpoint_step
        return delivery.state in (COMMITTED, *SKIPPED)

    def settle(self, group: Group) -> None:
        """Mark a group that may leave memory."""
        if self.is_settled(group):
            self.settled.add(group.opened.query)

    def retire(self) -> None:
        """Let settled groups leave memory (their rows are written by now)."""
        for query in self.settled:
            group = self.groups.get(query)
            if group is not None and self.is_settled(group):
                del self.groups[query]
        self.settled.clear()

    # -- workers ----------------------------------------------------------------------------------------------

    def heard_from(self, worker: str, now: float) -> None:
        """A worker has given a sign of life. Only names are rows, so that a restarted store knows whom to wait for."""
        known = worker in self.workers
        self.workers[worker] = now
        if not known:
            self.save_meta("workers", sorted(self.workers))

    def is_alive(self, worker: str, now: float) -> bool:
        at = self.workers.get(worker)
        return at is not None and now - at < self.params.heartbeat_timeout_s

    def forget_silent_workers(self, now: float) -> None:
        silent = [worker for worker in self.workers if not self.is_alive(worker, now)]
        for worker in silent:
            del self.workers[worker]
            self.paused.discard(worker)
        if silent:
            self.save_meta("workers", sorted(self.workers))

    def heard_from_trainer(self, sender: str, now: float | None) -> None:
        """A trainer has given a sign of life, or (None) has left."""
        if now is None:
            self.trainers.pop(sender, None)
        else:
            self.trainers[sender] = now

    def present_trainers(self, now: float) -> list[str]:
        """The roles of those that gave one within heartbeat_timeout_s, sorted."""
        limit = self.params.heartbeat_timeout_s
        return sorted(sender.partition(":")[2] for sender, at in self.trainers.items() if now - at < limit)

    # -- from rows ------------------------------------------------------------------------------------------

    def load_role(self, name: str, body: bytes) -> None:
        role = self.roles.get(name) or self.frozen[name]
        b = codec.decode(body, RoleBody)
        role.epoch, role.nonce, role.resumed_from, role.version = b.epoch, b.nonce, b.resumed_from, b.version
        role.step, role.checkpoint_step, role.claim_seq = b.step, b.checkpoint_step, b.claim_seq
        role.claimed, role.requeued = list(b.claimed), b.requeued

    def load_group(
        self,
        row: Row,
        rollouts: Iterable[Row],
        invocations: Iterable[Row],
        deliveries: Iterable[Row],
        now: float,
    ) -> Group:
        """Bring a group (back) into memory from its rows."""
        query, index, state, body = row
        b = codec.decode(body, GroupBody)
        group = Group(b.opened, index, now, state, b.attempt, b.worker, b.session, dict(b.policy), b.reason)
        for _, rollout, kind, blob in rollouts:
            final = kind == "final"
            group.rollouts[rollout] = (
                codec.decode(blob, RolloutFinal) if final else codec.decode(blob, RolloutFail)
            )
        for _, rollout, attempt, role, invocation, blob in invocations:
            group.invocations[rollout, attempt, role, invocation] = codec.decode(blob, InvocationDone)
        for row in deliveries:
            delivery = Delivery(*row)
            delivery.deadline = now + self.params.lease_s
            if delivery.role in self.roles:
                group.deliveries[delivery.role] = delivery
                if delivery.state not in LOST:  # those are indexed at start, in memory or not
                    self.index_delivery(delivery)
        self.groups[query] = group
        if state == OPEN:
            self.open[query] = group
        self.settle(group)
        return group

    def load_report(self, row: Row) -> None:
        seq, source, n, kind, body = row
        self.reports.append(Reported(seq, source, kind, codec.decode(body, dict)))
        self.heard.setdefault(source, set()).add(n)
        self.last_report = max(self.last_report, seq)
