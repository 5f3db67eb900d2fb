"""The workers' side of the ledger: groups are opened, filled, sealed or dropped.

    open --(every rollout ended, or nothing of it arrived for group_timeout_s)--> sealed   with at least
                                                                         |        max(2, ceil(K/2)) real rollouts
                                                                         \\-----> dropped  with fewer

Natural keys: a group is its query; an invocation (query, rollout, attempt, role, invocation); a rollout's end
(query, rollout). The same record again gets the same answer, another content under the key is refused and the
first stays. A worker that comes back opens its groups again under a new attempt; a rollout counts only the
invocations of the attempt it ended in, and it cannot end before all of them are here: sealed means complete.
"""

from __future__ import annotations

from msgspec.structs import replace

from mgrpo.store.records import InvocationDone, Opened, OpenGroup, OpenGroupInfo, RolloutFail, RolloutFinal
from mgrpo.store.state import DROPPED, OPEN, SEALED, Delivery, Group, Role, State
from mgrpo.transport.codec import BadMessage, Refusal, check_finite, check_names
from mgrpo.types import MAIN, version_label

MAX_OPEN = 65_536  # groups in the making that one store carries
MAX_META = 32
UNPUBLISHED = "its trainer calls status(version=0, step=-1, checkpoint_step=-1) once its weights can be had"


class Intake:
    """Rules of groups and rollouts over the shared state."""

    def __init__(self, state: State) -> None:
        self.state = state

    # -- opening --------------------------------------------------------------------------------------------

    def open_group(self, request: OpenGroup, worker: str, session: str, now: float) -> Opened:
        """Open a group, or open it again: a worker its own, any worker one of a dead worker. Refuses with RETRY_AFTER
        while the trainers are too far behind, with HELD while another worker that is alive has the group."""
        state = self.state
        self._check_open(request)
        content = replace(request, policy={}, wait_s=0.0)
        group = state.groups.get(request.query)
        if group is None:
            self._admit(request)
            index = request.index
            group = Group(content, index, now, worker=worker, session=session)
            state.groups[request.query] = state.open[request.query] = group
            state.indices[index] = request.query
            state.next_index = max(state.next_index, index + 1)
        else:
            if content != group.opened:
                raise Refusal("CONFLICT", f"group {request.query!r} is already open with other content")
            if group.state != OPEN or (group.worker, group.session) == (worker, session):
                return self._opened(group)
            if group.worker != worker and state.is_alive(group.worker, now):
                raise Refusal(
                    "HELD",
                    f"group {request.query!r} is in the hands of worker {group.worker!r}, which gave its last sign of "
                    f"life {now - state.workers[group.worker]:.1f} s ago; {worker!r} may take it over after "
                    f"{state.params.heartbeat_timeout_s:g} s (store.heartbeat_timeout)",
                )
            group.attempt += 1
            group.progress_at = now
            group.worker, group.session = worker, session
        group.policy = {
            role: version_label(role, state.roles[role].epoch if role in state.roles else 0, version)
            for role, version in request.policy.items()
        }
        state.save_group(group)
        return self._opened(group)

    def _check_open(self, request: OpenGroup) -> None:
        params = self.state.params
        if request.k != params.k:
            raise BadMessage(f"group {request.query!r} of {request.k} rollouts, this run has {params.k}")
        unknown = (set(request.d_max) | set(request.policy)) - set(params.roles)
        if unknown:
            raise BadMessage(f"unknown role {sorted(unknown)[0]!r}, this run has {params.roles}")
        if not request.query:
            raise BadMessage("a group needs a query")
        if len(request.meta) > MAX_META:
            raise BadMessage(f"meta of {len(request.meta)} entries, the limit is {MAX_META}")
        check_names([request.query, *request.meta])
        check_names(v for v in request.meta.values() if isinstance(v, str))
        check_finite("meta", (v for v in request.meta.values() if isinstance(v, float)))

    def _admit(self, request: OpenGroup) -> None:
        """Refuses a new group that is too early. It is admitted by its number alone, so admission does not depend on
        who asks first."""
        state, params = self.state, self.state.params
        if len(state.open) >= MAX_OPEN:
            raise Refusal("RETRY_AFTER", f"{MAX_OPEN} groups are open")
        if request.index in state.indices:
            holder = state.indices[request.index]
            raise Refusal(
                "CONFLICT", f"index {request.index} belongs to group {holder!r}, not {request.query!r}"
            )
        for role in state.roles.values():
            if role.version is None:
                raise Refusal(
                    "RETRY_AFTER", f"role {role.name!r} has not published a version yet: {UNPUBLISHED}"
                )
            done = role.step + 1
            claims = (
                role.version - done + params.admitted_lag() + 1
            )  # those whose groups may be in the making
            room = done * params.batch + claims * params.claim_size()
            if (taken := role.place(request.index)) >= room:
                raise Refusal(
                    "RETRY_AFTER",
                    f"role {role.name!r} is at version {role.version}: {taken} groups are ahead of this one, "
                    f"max_lag {params.max_lag} admits {room} until its trainer calls status() with the next version",
                )

    def _opened(self, group: Group) -> Opened:
        opened = group.opened
        min_versions = {
            role.name: max(0, self._step_of(role, group.index) - self.state.params.admitted_lag())
            for role in self.state.roles.values()
        }
        return Opened(
            opened.query, group.index, group.attempt, group.state, opened.k, group.finished(), min_versions
        )

    def _step_of(self, role: Role, index: int) -> int:
        """The step that the role trains on the group in, as far as the groups before it are known and if no younger one
        is claimed before it. Its steps so far have used `batch` places each and moved what they set aside out of the
        count; each one to come takes claim_size() places."""
        params, done = self.state.params, role.step + 1
        return done + (role.place(index) - done * params.batch) // params.claim_size()

    def open_groups(self, worker: str, first: int, last: int) -> list[OpenGroupInfo]:
        """Groups that are not sealed yet, in order of their index; of one worker, or of all for ""."""
        mine = [g for g in self.state.open.values() if worker in ("", g.worker) and first <= g.index <= last]
        return [
            OpenGroupInfo(g.opened.query, g.index, g.attempt, g.worker, g.finished())
            for g in sorted(mine, key=lambda g: g.index)
        ]

    # -- filling --------------------------------------------------------------------------------------------

    def invocation_done(self, record: InvocationDone, now: float) -> None:
        group = self._group(record.query)
        key = (record.rollout, record.attempt, record.role, record.invocation)
        known = group.invocations.get(key)
        if known is not None:
            if known != record:
                raise Refusal(
                    "CONFLICT", f"invocation {key} of {record.query!r} is already known with other content"
                )
            return
        self._check_rollout(group, record.rollout)
        if record.role not in self.state.params.roles:
            raise BadMessage(f"unknown role {record.role!r}, this run has {self.state.params.roles}")
        if record.role == MAIN and record.invocation != 0:
            raise BadMessage(f"invocation {record.invocation} of the main role, it has only 0")
        if record.ref is not None and record.ref.role != record.role:
            raise BadMessage(
                f"trajectory of role {record.role!r} lies in the trajectory log of {record.ref.role!r}"
            )
        if (record.version_min, record.version_max) != (-1, -1) and not (
            0 <= record.version_min <= record.version_max
        ):
            raise BadMessage(f"versions {record.version_min}..{record.version_max} of {key}")
        check_names(record.scores)
        check_finite("score", record.scores.values())
        self._check_attempt(group, record.attempt)
        if record.rollout in group.rollouts:
            raise Refusal("CONFLICT", f"rollout {record.rollout} of {record.query!r} has already ended")
        group.invocations[key] = record
        group.progress_at = now
        self.state.save_invocation(record)

    def rollout_final(self, record: RolloutFinal, now: float) -> None:
        group = self._group(record.query)
        if self._is_repeat(group, record):
            return
        self._check_rollout(group, record.rollout)
        check_names([*record.scores, record.status])
        check_finite("reward, correct or score", (record.reward, record.correct, *record.scores.values()))
        if not 0.0 <= record.correct <= 1.0:
            raise BadMessage(f"correct={record.correct} is outside [0, 1]")
        params = self.state.params
        needed = set(params.training_roles) - {MAIN}
        if not needed <= set(record.d_k) <= set(params.roles) - {MAIN}:
            raise BadMessage(
                f"d_k names {sorted(record.d_k)}, sub-agent roles in training are {sorted(needed)}: each needs its "
                f"number, 0 where it was not called"
            )
        self._check_attempt(group, record.attempt)
        due = [(role, d_k) for role, d_k in record.d_k.items() if role in needed]
        for role, d_k in [*due, (MAIN, 1)] if MAIN in params.training_roles else due:
            here = sum(
                (record.rollout, record.attempt, role, invocation) in group.invocations
                for invocation in range(d_k)
            )
            extra = (record.rollout, record.attempt, role, d_k) in group.invocations
            if here != d_k or extra:
                raise Refusal(
                    "INCOMPLETE",
                    f"rollout {record.rollout} of {record.query!r} ends with {d_k} invocations of {role!r}, "
                    f"{here + extra} have arrived: call invocation_done once for each of 0..d_k - 1 first",
                )
        self._end(group, record, now)

    def rollout_fail(self, record: RolloutFail, now: float) -> None:
        group = self._group(record.query)
        if self._is_repeat(group, record):
            return
        self._check_rollout(group, record.rollout)
        check_names([record.reason])
        self._check_attempt(group, record.attempt)
        self._end(group, record, now)

    def _end(self, group: Group, record: RolloutFinal | RolloutFail, now: float) -> None:
        group.rollouts[record.rollout] = record
        group.progress_at = now
        self.state.save_rollout(record)
        if len(group.rollouts) == group.opened.k:
            self._close(group, "")

    def _is_repeat(self, group: Group, record: RolloutFinal | RolloutFail) -> bool:
        known = group.rollouts.get(record.rollout)
        if known is not None and known != record:
            raise Refusal(
                "CONFLICT", f"rollout {record.rollout} of {record.query!r} already ended with other content"
            )
        return known is not None

    def _group(self, query: str) -> Group:
        group = self.state.groups.get(query)
        if group is None:
            raise Refusal("NOT_FOUND", f"unknown group {query!r}: call open_group first")
        return group

    def _check_rollout(self, group: Group, rollout: int) -> None:
        if rollout >= group.opened.k:
            raise BadMessage(f"rollout {rollout} of a group of {group.opened.k}")
        if group.state != OPEN:
            raise Refusal(
                "CLOSED", f"group {group.opened.query!r} is {group.state} ({group.reason or 'complete'})"
            )

    def _check_attempt(self, group: Group, attempt: int) -> None:
        if attempt != group.attempt:
            raise Refusal(
                "FENCED", f"attempt {attempt} of {group.opened.query!r} was replaced by {group.attempt}"
            )

    # -- closing --------------------------------------------------------------------------------------------

    def pause(self, worker: str, now: float) -> None:
        """The worker waits for a service that is down, and says so again and again: its groups lose no time."""
        self.state.paused.add(worker)
        for group in self.state.open.values():
            if group.worker == worker:
                group.progress_at = now

    def go_on(self, worker: str) -> None:
        """It does not wait any more."""
        self.state.paused.discard(worker)

    def expire(self, now: float) -> None:
        """Close groups of which nothing has arrived for group_timeout_s: a rollout may take that long, and a group as
        long as its rollouts keep ending. Those of a paused worker get that time anew."""
        limit = self.state.params.group_timeout_s
        for group in [g for g in self.state.open.values() if now - g.progress_at >= limit]:
            self._close(
                group, f"not complete, and nothing of it arrived for {limit:g} s (store.group_timeout)"
            )

    def _close(self, group: Group, reason: str) -> None:
        state, k = self.state, group.opened.k
        del state.open[group.opened.query]
        if group.real() >= min(k, max(2, (k + 1) // 2)):
            group.state, group.reason = SEALED, reason
            state.sealed += 1
            for name in state.roles:
                delivery = group.deliveries[name] = Delivery(name, group.opened.query, group.index)
                state.index_delivery(delivery)
                state.dirty["deliveries", name, group.opened.query] = delivery.row()
        else:
            group.state = DROPPED
            group.reason = reason or f"{group.real()} of {k} rollouts have a reward"
            state.drop(group.index)
            state.settled.add(group.opened.query)
        state.save_group(group)
