"""The trainers' side of the ledger: each sealed group reaches each training role exactly once.

    ready --claim--> leased --apply--> applied --commit--> committed
      ^  ^             |  |               |                    |
      |  +--nack, expiry  +-resume--+     +--resume, when the checkpoint is older--> ready
      +-----------------------------+
    an apply may set some groups of its step aside: surplus, ready again after a resume from an older checkpoint
    three nacks or expiries: quarantined; too old at a claim: stale (never trained on; admission gives the places of
    all of these to other groups)

`epoch` fences: resume() hands out the next one, and whoever comes with an older one is refused. What a
crashed trainer held is released by its successor's resume and does not count as a failure of the group.
"""

from __future__ import annotations

from bisect import bisect_left

from mgrpo.store.records import (
    Claim,
    ClaimedGroup,
    ClaimedInvocation,
    ClaimedRollout,
    Commit,
    Groups,
    Resume,
    Resumed,
    RoleStatus,
    RolloutFinal,
    Status,
)
from mgrpo.store.state import (
    APPLIED,
    COMMITTED,
    DROPPED,
    LEASED,
    QUARANTINED,
    READY,
    STALE,
    SURPLUS,
    Delivery,
    Group,
    Role,
    State,
)
from mgrpo.transport.codec import BadMessage, Refusal, check_names


class Deliveries:
    """Rules of claims over the shared state."""

    def __init__(self, state: State) -> None:
        self.state = state

    # -- who ------------------------------------------------------------------------------------------------

    def resume(self, request: Resume) -> Resumed:
        """A trainer (re)starts from a checkpoint: raise the epoch, make everything beyond the checkpoint ready again.
        The caller has brought every group of the role with a later step into memory."""
        role = self._any_role(request.role)
        if request.nonce == role.nonce:
            return Resumed(role.epoch, role.requeued, role.resumed_from)
        self._check_epoch(role, request.epoch, first=True)
        if role.epoch and request.checkpoint_step > role.step:
            raise BadMessage(
                f"checkpoint of step {request.checkpoint_step}, but role {role.name!r} has applied up to "
                f"step {role.step}: this store is older than the checkpoint"
            )
        requeued = 0
        for delivery in self._of(role):
            if delivery.state == LEASED or (
                delivery.state in (APPLIED, COMMITTED, SURPLUS) and delivery.step > request.checkpoint_step
            ):
                self.state.move(delivery, READY, epoch=0, step=-1)
                role.cursor = min(role.cursor, delivery.index)
                requeued += 1
            elif delivery.state == APPLIED:
                self.state.move(delivery, COMMITTED)
        role.epoch, role.nonce, role.requeued = role.epoch + 1, request.nonce, requeued
        role.resumed_from = role.step = role.checkpoint_step = request.checkpoint_step
        role.claim_seq, role.claimed = 0, []
        self.state.save_role(role)
        self._settle_surplus(role)
        return Resumed(role.epoch, requeued, role.step)

    def status(self, request: Status) -> RoleStatus:
        """The trainer publishes a policy version."""
        role = self._check_epoch(self._any_role(request.role), request.epoch)
        if request.version < 0:
            raise BadMessage(f"version {request.version} of {role.name!r}, the first is 0")
        role.version = request.version
        self.state.save_role(role)
        return role.status()

    def _role(self, name: str) -> Role:
        role = self.state.roles.get(name)
        if role is None:
            roles = ", ".join(f"'trainer:{role}'" for role in self.state.roles)
            raise BadMessage(
                f"{name!r} is not a training role of this run ({list(self.state.roles)}); "
                f"its trainers connect as {roles}"
            )
        return role

    def _any_role(self, name: str) -> Role:
        """A training role, or a frozen one: it serves weights and has a version, and claims nothing."""
        return self.state.frozen[name] if name in self.state.frozen else self._role(name)

    def _holder(self, name: str, epoch: int) -> Role:
        return self._check_epoch(self._role(name), epoch)

    def role_status(self, name: str) -> RoleStatus:
        return self._any_role(name).status()

    def _check_epoch(self, role: Role, epoch: int, first: bool = False) -> Role:
        if epoch != role.epoch or (epoch == 0 and not first):
            todo = (
                ""
                if epoch
                else "; this trainer has not called resume(checkpoint_step), -1 without a checkpoint"
            )
            raise Refusal(
                "FENCED",
                f"epoch {epoch} of role {role.name!r} is over, the current one is {role.epoch}{todo}",
            )
        return role

    def _of(self, role: Role) -> list[Delivery]:
        mine = [g.deliveries[role.name] for g in self.state.groups.values() if role.name in g.deliveries]
        return sorted(mine, key=lambda delivery: delivery.index)

    # -- claim ----------------------------------------------------------------------------------------------

    def claim(self, request: Claim, now: float) -> list[ClaimedGroup] | None:
        """The n oldest ready groups, leased; None while there are fewer, or, in a run with in_order, while they would
        pass more than claim_window - 1 groups by one that is still to come. The same claim again (same epoch and seq)
        gets the same groups; with another n the asker cannot have had them, and gets new ones."""
        role = self._holder(request.role, request.epoch)
        if request.seq == role.claim_seq:
            if len(role.claimed) == request.n:
                return self._claim_again(role, request, now)
            self._release_claim(role)
        if request.seq < role.claim_seq:
            raise Refusal(
                "FENCED", f"claim {request.seq} of role {role.name!r} was followed by {role.claim_seq}"
            )
        while len(role.ready) >= request.n:
            chosen = [self.state.groups[query] for _, query in role.ready[: request.n]]
            if self.state.params.in_order and self._waits_for_older(role, chosen):
                return None
            version = self._version_at_training(role)
            stale = [group for group in chosen if self._is_stale(group, role, version)]
            if not stale:
                break
            for group in stale:
                self.state.move(group.deliveries[role.name], STALE, reason=f"stale at version {version}")
        else:
            return None
        for group in chosen:
            self._lease(group.deliveries[role.name], role, request.seq, now)
        role.claim_seq, role.claimed = request.seq, [group.opened.query for group in chosen]
        self.state.save_role(role)
        return [self._claimed(group, role.name) for group in chosen]

    def _waits_for_older(self, role: Role, chosen: list[Group]) -> bool:
        """Whether taking `chosen` would let more than claim_window - 1 groups in all pass the oldest one that is not
        sealed yet. Each one lets the role's version run ahead of tokens that are still being sampled, and admission has
        counted with so many. The oldest one is the one that is passed most."""
        first = self.state.first_missing()
        passing = sum(group.index > first for group in chosen)
        return (
            passing > 0 and self.state.taken_beyond(role, first) + passing >= self.state.params.claim_window
        )

    def _version_at_training(self, role: Role) -> int:
        """The version that a claim made now is trained at: that of the next step, later by the claims in hand."""
        in_hand = {self.state.groups[query].deliveries[role.name].lease for query in role.leased}
        return max(role.version or 0, role.step + 1) + len(in_hand)

    def _claim_again(self, role: Role, request: Claim, now: float) -> list[ClaimedGroup]:
        groups = [self.state.groups.get(query) for query in role.claimed]
        for group in groups:
            delivery = group.deliveries[role.name] if group is not None else None
            if delivery is not None and delivery.state == READY:
                self._lease(delivery, role, request.seq, now)
            elif delivery is None or delivery.state != LEASED:
                raise Refusal("FENCED", f"claim {request.seq} of role {role.name!r} is already applied")
        return [self._claimed(group, role.name) for group in groups if group is not None]

    def _release_claim(self, role: Role) -> None:
        for query in role.claimed:
            group = self.state.groups.get(query)
            delivery = group.deliveries[role.name] if group is not None else None
            if delivery is not None and self._holds(role, delivery, role.claim_seq):
                self.state.move(delivery, READY, epoch=0)

    def _lease(self, delivery: Delivery, role: Role, seq: int, now: float) -> None:
        self.state.move(
            delivery, LEASED, epoch=role.epoch, lease=seq, deadline=now + self.state.params.lease_s
        )

    def _is_stale(self, group: Group, role: Role, version: int) -> bool:
        oldest = min(
            (i.version_min for i in invocations_of(group, role.name) if i.version_min >= 0), default=None
        )
        return oldest is not None and version - oldest > self.state.params.max_lag

    def _claimed(self, group: Group, role: str) -> ClaimedGroup:
        opened = group.opened
        rollouts = [
            ClaimedRollout(
                r.rollout, r.status, r.reward, r.correct, r.d_k, r.scores, r.version_min, r.version_max
            )
            if isinstance(r, RolloutFinal)
            else ClaimedRollout(r.rollout, "failed", 0.0, 0.0, {}, {}, -1, -1)
            for _, r in sorted(group.rollouts.items())
        ]
        return ClaimedGroup(
            opened.query, group.index, opened.k, opened.d_max, opened.seed, dict(opened.meta), group.policy,
            rollouts, invocations_of(group, role), group.deliveries[role].lease,
        )  # fmt: skip

    # -- after the claim ------------------------------------------------------------------------------------

    def renew(self, request: Groups, now: float) -> list[str]:
        """Extend leases; returns the groups that are not held any more."""
        role = self._holder(request.role, request.epoch)
        gone = []
        for query, lease in request.groups:
            delivery = self._delivery(query, role)
            if self._holds(role, delivery, lease):
                delivery.deadline = now + self.state.params.lease_s
            else:
                gone.append(query)
        return gone

    def apply(self, request: Groups) -> None:
        """The optimizer step `step` has used these groups and sets those of `surplus` aside, which were claimed for it
        too."""
        role = self._holder(request.role, request.epoch)
        moves = [
            (self._delivery(query, role), lease, state)
            for named, state in ((request.groups, APPLIED), (request.surplus, SURPLUS))
            for query, lease in named
        ]
        used, surplus = {query for query, _ in request.groups}, {query for query, _ in request.surplus}
        if len(used | surplus) != len(moves):
            raise BadMessage(f"apply of step {request.step} names a group twice")
        if surplus and len(used) < self.state.params.batch:
            raise BadMessage(
                f"apply of step {request.step} uses {len(used)} groups and sets {len(surplus)} aside, a step of this "
                f"run uses {self.state.params.batch}"
            )
        if request.step <= role.step:
            before = [d for d in self._of(role) if d.step == request.step]
            if {d.query for d in before if d.state in (APPLIED, COMMITTED)} == used and (
                {d.query for d in before if d.state == SURPLUS} == surplus
            ):
                return
            raise Refusal(
                "CONFLICT", f"step {request.step} of role {role.name!r} was applied with other groups"
            )
        for delivery, lease, _ in moves:
            if not self._holds(role, delivery, lease):
                raise Refusal(
                    "FENCED", f"group {delivery.query!r} is {delivery.state}, not leased to {role.name!r}"
                )
        for delivery, _, state in moves:
            self.state.move(delivery, state, step=request.step)
        role.step = request.step
        self.state.save_role(role)

    def commit(self, request: Commit) -> int:
        """A durable checkpoint holds every step up to `step`. Returns the role's cursor: every group with a lower index
        is committed or lost, so its trajectories are needed only for a rollback behind this checkpoint."""
        role = self._holder(request.role, request.epoch)
        if request.step > role.step:
            raise BadMessage(
                f"commit of step {request.step}, role {role.name!r} has applied up to {role.step}; "
                f"call apply(step, groups) first"
            )
        for query in list(role.applied):
            delivery = self.state.groups[query].deliveries[role.name]
            if delivery.step <= request.step:
                self.state.move(delivery, COMMITTED)
        role.checkpoint_step = max(role.checkpoint_step, request.step)
        self.state.save_role(role)
        self._settle_surplus(role)
        while self._is_over(role, role.cursor):
            role.cursor += 1
        return role.cursor

    def _settle_surplus(self, role: Role) -> None:
        """Groups that were set aside up to the role's checkpoint may leave memory."""
        for index in role.surplus[bisect_left(role.surplus, role.cursor) :]:
            group = self.state.groups.get(self.state.indices[index])
            if group is not None:
                self.state.settle(group)

    def _is_over(self, role: Role, index: int) -> bool:
        """The group is committed or lost for the role, whatever checkpoint from here on it goes back to."""
        query = self.state.indices.get(index)
        if query is None:
            return False
        group = self.state.groups.get(query)
        if group is None or group.state == DROPPED:
            return True
        delivery = group.deliveries.get(role.name)
        return delivery is not None and self.state.is_final(delivery)

    def nack(self, request: Groups) -> None:
        """Give groups back unused, with a reason."""
        role = self._holder(request.role, request.epoch)
        check_names([request.reason])
        deliveries = [(self._delivery(query, role), lease) for query, lease in request.groups]
        for delivery, lease in deliveries:
            if self._holds(role, delivery, lease):  # a repeated nack does nothing
                self._fail(delivery, request.reason)

    def _holds(self, role: Role, delivery: Delivery, lease: int) -> bool:
        return delivery.state == LEASED and delivery.epoch == role.epoch and delivery.lease == lease

    def requeue(self, name: str, query: str) -> str:
        """An operator makes a quarantined group ready again; returns the state it has now."""
        delivery = self._delivery(query, self._role(name))
        if delivery.state == QUARANTINED:
            self.state.move(delivery, READY, epoch=0, failures=0)
        return delivery.state

    def expire(self, now: float) -> None:
        """Take back leases that were not renewed in time."""
        for role in self.state.roles.values():
            for query in sorted(role.leased):
                delivery = self.state.groups[query].deliveries[role.name]
                if now >= delivery.deadline:
                    self._fail(delivery, "lease expired")

    def _fail(self, delivery: Delivery, reason: str) -> None:
        failures = delivery.failures + 1
        state = QUARANTINED if failures >= self.state.params.max_failures else READY
        self.state.move(delivery, state, failures=failures, reason=reason, epoch=0)

    def _delivery(self, query: str, role: Role) -> Delivery:
        group = self.state.groups.get(query)
        if group is None or role.name not in group.deliveries:
            raise Refusal(
                "NOT_FOUND",
                f"no sealed group {query!r} for role {role.name!r}; claim() gives those there are",
            )
        return group.deliveries[role.name]


def invocations_of(group: Group, role: str) -> list[ClaimedInvocation]:
    """The role's trajectories in rollouts that ended well, of the attempt each ended in, in canonical order."""
    kept = [
        record
        for (rollout, attempt, its_role, _), record in group.invocations.items()
        if its_role == role
        and isinstance(end := group.rollouts.get(rollout), RolloutFinal)
        and end.attempt == attempt
    ]
    return [
        ClaimedInvocation(r.rollout, r.invocation, r.n_tokens, r.version_min, r.version_max, r.scores, r.ref)
        for r in sorted(kept, key=lambda r: (r.rollout, r.invocation))
    ]
