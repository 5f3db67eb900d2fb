"""Every record that crosses the link to the store, as one file: requests, answers, and what a claim delivers.

All are MessagePack arrays in the order of the fields. A field may be appended with a default; none is ever
reordered.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from mgrpo.trajectory_log.format import LogRef as LogRef
from mgrpo.transport.codec import Count, Name, Record, Scores, Signed, Small

Rollouts = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Counts = dict[Name, Small]


class RunParams(Record):
    """What a run is, fixed when its store is created. run: its name. digest: any text that stands for the run's
    configuration; a peer that names another one is refused. roles: of all agents. training_roles: those whose trainers
    claim groups. k: rollouts of a group. batch: groups of one optimizer step. max_lag: how many versions old a group
    may be when it is trained. pool: groups that one claim takes, of which the step uses `batch` and sets the rest
    aside (0: batch). in_order: groups are numbered from 0 without gaps and are claimed in that order, whichever is
    ready first, but for claim_window: with an older group still to come, so many younger ones less one may be claimed
    before it.
    Times in seconds, and the only thing that may change when a run is resumed: lease_s, after which a claim that is not
    renewed is taken back; group_timeout_s, after which a group is closed if nothing of it has arrived meanwhile;
    heartbeat_timeout_s, after which a silent worker counts as dead, and others may take its open groups over."""

    run: Name
    digest: Name
    roles: list[Name]
    training_roles: list[Name]
    k: Rollouts
    batch: Rollouts
    max_lag: Small = 0
    pool: Count = 0
    lease_s: float = 60.0
    group_timeout_s: float = 1800.0
    max_failures: Small = 3
    in_order: bool = False
    claim_window: Rollouts = 1
    heartbeat_timeout_s: float = 30.0

    def claim_size(self) -> int:
        """Groups of one claim, used or set aside."""
        return self.pool or self.batch

    def admitted_lag(self) -> int:
        """What the claim window leaves of max_lag: a group that waits while younger ones are claimed is trained up to
        ceil((claim_window - 1) / batch) steps later."""
        return self.max_lag - -(-(self.claim_window - 1) // self.batch)


class OpenGroup(Record):
    query: Name
    k: Rollouts
    d_max: Counts
    index: Count
    meta: dict[Name, str | int | float | bool | None] = msgspec.field(default_factory=dict)
    seed: Count = 0
    policy: dict[Name, Signed] = msgspec.field(default_factory=dict)
    wait_s: float = 0.0


class Opened(Record):
    """index: the group's number. attempt: which opening this is. finished: rollouts that need no replay.
    min_versions: of each training role, the oldest version whose tokens are not too old when the group's turn comes, as
    far as the groups before it are known."""

    query: str
    index: int
    attempt: int
    state: str
    k: int
    finished: list[int]
    min_versions: dict[str, int] = msgspec.field(default_factory=dict)


class InvocationDone(Record):
    query: Name
    rollout: Small
    attempt: Count
    role: Name
    invocation: Small
    n_tokens: Count
    version_min: Signed
    version_max: Signed
    scores: Scores
    ref: LogRef | None


class RolloutFinal(Record):
    query: Name
    rollout: Small
    attempt: Count
    reward: float
    correct: float
    d_k: Counts
    scores: Scores
    version_min: Signed
    version_max: Signed
    status: Name = "ok"


class RolloutFail(Record):
    query: Name
    rollout: Small
    attempt: Count
    reason: Name


class RoleName(Record):
    role: Name


class Resume(Record):
    """epoch: the one the sender has just read. A resume that was delayed on its way names an old one and is
    refused, so a dead trainer's message cannot fence its successor."""

    role: Name
    checkpoint_step: Signed
    nonce: Name
    epoch: Count


class Resumed(Record):
    """epoch: the caller's fencing token. requeued: groups made ready again. step: last step the checkpoint
    holds."""

    epoch: int
    requeued: int
    step: int


class Claim(Record):
    role: Name
    epoch: Count
    seq: Count
    n: Rollouts
    wait_s: float


class ClaimedInvocation(Record):
    """One trajectory of the claiming role. Versions are -1 where nothing was sampled."""

    rollout: int
    invocation: int
    n_tokens: int
    version_min: int
    version_max: int
    scores: dict[str, float]
    ref: LogRef | None


class ClaimedRollout(Record):
    """status: "ok", or "failed" (no reward, never trained on)."""

    rollout: int
    status: str
    reward: float
    correct: float
    d_k: dict[str, int]
    scores: dict[str, float]
    version_min: int
    version_max: int


class ClaimedGroup(Record):
    """A sealed group in the hands of one role. lease: which claim it came with."""

    query: str
    index: int
    k: int
    d_max: dict[str, int]
    seed: int
    meta: dict[str, Any]
    policy: dict[str, str]
    rollouts: list[ClaimedRollout]
    invocations: list[ClaimedInvocation]
    lease: int


class Groups(Record):
    """Names claimed groups, each with its lease, to renew, apply or nack. step is that of apply, and surplus what it
    sets aside: groups that were claimed for the step and not used; reason is that of nack."""

    role: Name
    epoch: Count
    groups: list[tuple[Name, Count]]
    step: Signed = -1
    reason: Name = ""
    surplus: list[tuple[Name, Count]] = msgspec.field(default_factory=list)


class Commit(Record):
    role: Name
    epoch: Count
    step: Signed


class Status(Record):
    role: Name
    epoch: Count
    version: Signed
    step: Signed
    checkpoint_step: Signed


class RoleStatus(Record):
    """label: the published version as <role>.e<epoch>.v<version>; plain versions repeat after a rollback."""

    role: str
    epoch: int
    version: int | None
    step: int
    checkpoint_step: int
    label: str


class Report(Record):
    n: Count
    kind: Name
    payload: dict[str, Any]


class Reported(Record):
    seq: int
    source: str
    kind: str
    payload: dict[str, Any]


class Control(Record):
    state: Name
    reason: Annotated[str, msgspec.Meta(max_length=2048)] = ""


class WaitFor(Record):
    """Level-triggered: satisfied as soon as all that is given holds. versions: at least these are published. sealed: at
    least so many groups are sealed or gone. not_state: the run state is another. after: reports beyond this sequence
    number exist."""

    wait_s: float
    versions: dict[Name, Signed] = msgspec.field(default_factory=dict)
    sealed: Count = 0
    not_state: Name = ""
    after: Signed = -1


class World(Record):
    """What a wait answers: the state of everything one can wait for, and whether the condition holds. open: groups
    that workers have in hand. workers: names of the rollout workers that gave a sign of life within
    heartbeat_timeout_s, sorted. trainers: roles whose trainer did, and has not left since, sorted. paused: those of the
    workers whose last sign of life says that they wait for a service that is down."""

    satisfied: bool
    control: Control
    roles: list[RoleStatus]
    sealed: int
    reports: int
    open: int = 0
    workers: list[str] = msgspec.field(default_factory=list)
    trainers: list[str] = msgspec.field(default_factory=list)
    paused: list[str] = msgspec.field(default_factory=list)


class OpenGroups(Record):
    worker: Name = ""
    first: Count = 0
    last: Count = (1 << 62) - 1


class OpenGroupInfo(Record):
    query: str
    index: int
    attempt: int
    worker: str
    finished: list[int]


class Trained(Record):
    """One line of the trained-group ledger: `group` was part of `step` of `role`."""

    role: str
    step: int
    query: str
    index: int
    state: str
