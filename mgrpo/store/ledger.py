"""The ledger: the store's rules as one pure state machine. No I/O and no clock: time is an argument.

`handle` runs one request of one sender against the state and returns the answer, raising Refusal (a named
refusal) or BadMessage; a refused request changes nothing. `State.take_dirty()` then holds the rows to make
durable; until they are, the answer must not leave. Groups live in intake.py, claims in delivery.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mgrpo.store import records as rec
from mgrpo.store.delivery import Deliveries
from mgrpo.store.intake import Intake
from mgrpo.store.state import State
from mgrpo.transport import codec
from mgrpo.transport.codec import BadMessage, Refusal, Sender

WORKER, LAUNCHER, ANY = "worker", "launcher", "any"
MEMBER = "member"  # anyone who takes part: not an observer
TRAINER = "trainer"  # of the role that the request names
CONTROL_STATES = ("running", "stopping", "finished")
MAX_REPORT = 16 << 10  # bytes of one encoded report
HEARD = 4096  # report numbers remembered per sender

METHODS: dict[str, tuple[type[Any] | None, str]] = {  # method -> (request record, who may call it)
    "open_group": (rec.OpenGroup, WORKER),
    "heartbeat": (None, WORKER),
    "pause": (None, WORKER),
    "open_groups": (rec.OpenGroups, ANY),
    "invocation_done": (rec.InvocationDone, WORKER),
    "rollout_final": (rec.RolloutFinal, WORKER),
    "rollout_fail": (rec.RolloutFail, WORKER),
    "role": (rec.RoleName, ANY),
    "resume": (rec.Resume, TRAINER),
    "claim": (rec.Claim, TRAINER),
    "renew": (rec.Groups, TRAINER),
    "apply": (rec.Groups, TRAINER),
    "commit": (rec.Commit, TRAINER),
    "nack": (rec.Groups, TRAINER),
    "status": (rec.Status, TRAINER),
    "leave": (rec.RoleName, TRAINER),
    "params": (None, ANY),
    "report": (rec.Report, MEMBER),
    "reports": (rec.WaitFor, ANY),
    "wait": (rec.WaitFor, ANY),
    "set_control": (rec.Control, MEMBER),
    "requeue": (rec.Groups, LAUNCHER),
}


class Ledger:
    """One run's ledger."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.intake = Intake(state)
        self.deliveries = Deliveries(state)
        self._calls: dict[str, Callable[[Any, Sender, float], Any]] = {
            "open_group": lambda r, s, now: self.intake.open_group(r, s.name, s.session, now),
            "heartbeat": lambda r, s, now: self.intake.go_on(s.name),  # also a sign of life, as every request
            "pause": lambda r, s, now: self.intake.pause(s.name, now),
            "open_groups": lambda r, s, now: self.intake.open_groups(r.worker, r.first, r.last),
            "invocation_done": lambda r, s, now: self.intake.invocation_done(r, now),
            "rollout_final": lambda r, s, now: self.intake.rollout_final(r, now),
            "rollout_fail": lambda r, s, now: self.intake.rollout_fail(r, now),
            "role": lambda r, s, now: self.deliveries.role_status(r.role),
            "resume": lambda r, s, now: self.deliveries.resume(r),
            "claim": lambda r, s, now: self.deliveries.claim(r, now),
            "renew": lambda r, s, now: self.deliveries.renew(r, now),
            "apply": lambda r, s, now: self.deliveries.apply(r),
            "commit": lambda r, s, now: self.deliveries.commit(r),
            "nack": lambda r, s, now: self.deliveries.nack(r),
            "status": lambda r, s, now: self.deliveries.status(r),
            "leave": lambda r, s, now: None,
            "params": lambda r, s, now: state.params,
            "report": lambda r, s, now: self.report(r, s),
            "reports": lambda r, s, now: self.reports(r),
            "wait": lambda r, s, now: self.world(r, now),
            "set_control": lambda r, s, now: self.set_control(r),
            "requeue": lambda r, s, now: [self.deliveries.requeue(r.role, query) for query, _ in r.groups],
        }

    def handle(self, method: str, request: Any, sender: Sender, now: float) -> Any:
        """The answer to one request; None from claim and [] from reports mean "not yet"."""
        answer = self._calls[method](request, sender, now)
        if sender.role == WORKER:
            self.state.heard_from(sender.name, now)
        elif sender.role.startswith(f"{TRAINER}:"):
            self.state.heard_from_trainer(sender.role, None if method == "leave" else now)
        self.state.counters[method] += 1
        return answer

    def tick(self, now: float) -> None:
        """Time has passed: expire leases, groups and workers."""
        self.deliveries.expire(now)
        self.intake.expire(now)
        self.state.forget_silent_workers(now)

    # -- reports, run state, waiting ------------------------------------------------------------------------

    def report(self, record: rec.Report, sender: Sender) -> int:
        """Append to the run's stream of small reports; the same (sender, n) again changes nothing."""
        body = codec.encode(record.payload)
        if len(body) > MAX_REPORT:
            raise BadMessage(f"report {record.kind!r} of {len(body)} bytes, the limit is {MAX_REPORT}")
        check_tree(record.payload, record.kind)
        state = self.state
        source = f"{sender.role}/{sender.name}#{sender.session}"
        heard = state.heard.setdefault(source, set())
        if record.n in heard or (len(heard) >= HEARD and record.n < min(heard)):
            return state.last_report
        heard.add(record.n)
        if len(heard) > HEARD:
            heard.remove(min(heard))
        state.last_report += 1
        entry = rec.Reported(state.last_report, source, record.kind, record.payload)
        state.reports.append(entry)
        state.save_report(entry, record.n)
        return entry.seq

    def reports(self, request: rec.WaitFor) -> list[rec.Reported]:
        """Up to 256 reports after the given sequence number, oldest first."""
        first = self.state.reports[0].seq if self.state.reports else 0
        at = max(0, request.after + 1 - first)
        return [self.state.reports[i] for i in range(at, min(at + 256, len(self.state.reports)))]

    def set_control(self, control: rec.Control) -> None:
        if control.state not in CONTROL_STATES:
            raise BadMessage(f"run state {control.state!r}, expected one of {CONTROL_STATES}")
        self.state.control = control
        self.state.save_meta("control", control)

    def world(self, request: rec.WaitFor, now: float) -> rec.World:
        state = self.state
        satisfied = True
        for name, version in request.versions.items():
            role = state.roles.get(name) or state.frozen.get(name)
            if role is None:
                raise BadMessage(f"{name!r} is not a role of this run ({state.params.roles})")
            satisfied = satisfied and role.version is not None and role.version >= version
        satisfied = satisfied and state.sealed + state.dropped >= request.sealed
        satisfied = satisfied and (request.not_state == "" or state.control.state != request.not_state)
        satisfied = satisfied and state.last_report > request.after
        roles = [role.status() for role in state.roles.values()]
        workers = sorted(worker for worker in state.workers if state.is_alive(worker, now))
        open_, trainers = len(state.open), state.present_trainers(now)
        paused = [worker for worker in workers if worker in state.paused]
        return rec.World(
            satisfied, state.control, roles, state.sealed, state.last_report, open_, workers, trainers, paused
        )

    def stats(self) -> dict[str, Any]:
        """Counts for people and for metrics; `workers`: the names of those alive at the last tick."""
        state = self.state
        return {
            "open": len(state.open),
            "sealed": state.sealed,
            "dropped": state.dropped,
            "in_memory": len(state.groups),
            "reports": state.last_report,
            "workers": sorted(state.workers),
            "control": state.control.state,
            "handled": dict(state.counters),
            "roles": {
                role.name: {
                    "epoch": role.epoch,
                    "version": role.version,
                    "step": role.step,
                    "checkpoint_step": role.checkpoint_step,
                    "ready": len(role.ready),
                    "leased": len(role.leased),
                    "applied": len(role.applied),
                    "skipped": len(role.skipped),
                    "surplus": len(role.surplus),
                }
                for role in state.roles.values()
            },
        }


def queries_of(method: str, request: Any) -> list[str]:
    """Groups the request is about: they must be in memory before `handle`."""
    if method in ("open_group", "invocation_done", "rollout_final", "rollout_fail"):
        return [request.query]
    if method in ("apply", "nack", "renew", "requeue"):
        return [query for query, _ in (*request.groups, *request.surplus)]
    return []


def check_sender(method: str, request: Any, sender: Sender) -> None:
    """Raise FORBIDDEN when the sender's role may not call this."""
    allowed = METHODS[method][1]
    if allowed == TRAINER:
        allowed = f"trainer:{request.role}"
    if allowed == MEMBER and sender.role.partition(":")[0] in (WORKER, TRAINER, LAUNCHER):
        return
    if allowed not in (ANY, sender.role):
        named = WORKER if allowed == MEMBER else allowed
        raise Refusal(
            "FORBIDDEN",
            f"{sender.role or 'nobody'!r} may not {method}, only {allowed} may: connect(url, role={named!r})",
        )


def check_tree(value: object, what: str, depth: int = 0) -> None:
    """Reports hold strings, finite numbers, booleans, None, lists and dicts, eight levels deep at most."""
    if depth > 8:
        raise BadMessage(f"report {what!r} is nested deeper than 8")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadMessage(f"report {what!r} holds {value}, only finite numbers are accepted")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadMessage(f"report {what!r} has a key that is not a string: {key!r}")
            check_tree(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_tree(item, what, depth + 1)
