"""A model of what the store owes its users, run beside the real core by Hypothesis.

Two training roles, a slow worker that keeps using old attempts, zombie trainers that keep using old epochs,
crashes of the store between any two requests. The model knows only promises: what was acknowledged stays, the
first write under a key stays, and every sealed group is exactly once in each role's surviving optimizer
history.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mgrpo.store import records as rec
from mgrpo.store.core import Core
from mgrpo.store.database import Database
from mgrpo.store.ledger import Ledger
from mgrpo.transport.codec import BadMessage, Refusal, Sender
from tests.store_kit import DIGEST, run_params

ROLES = ("main", "sub")
K = 2


@dataclass
class Trainer:
    """One life of a trainer process: what it holds and what its weights have seen."""

    epoch: int
    step: int
    history: list[tuple[int, str]]
    held: dict[str, int] = field(default_factory=dict)  # query -> lease
    seq: int = 0


@dataclass
class RoleModel:
    live: Trainer
    zombies: list[Trainer] = field(default_factory=list)
    checkpoints: dict[int, list[tuple[int, str]]] = field(default_factory=lambda: {-1: []})
    nonce: int = 0


@dataclass
class GroupModel:
    attempt: int
    # rollout -> (method, acknowledged record)
    final: dict[int, tuple[str, Any]] = field(default_factory=dict)
    sent: list[tuple[str, Any]] = field(default_factory=list)  # acknowledged records
    progress: float = 0.0  # when something of it was new to the store
    dropped: bool = False


class LedgerMachine(RuleBasedStateMachine):
    """Set `make_ledger` in a subclass to run a mutant, `in_order` for a run that trains its groups in order, and
    `group_timeout` for one in which groups run out of time."""

    make_ledger: Any = Ledger
    in_order = False
    group_timeout = 1e6

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.now = 0.0
        self.database = Database(self.folder / "s.db", synchronous="OFF")
        self.core = Core(self.database, self.now, type(self).make_ledger)
        params = run_params(
            max_lag=1000, lease_s=60.0, group_timeout_s=self.group_timeout, in_order=self.in_order
        )
        self.core.create(params, self.now)
        self.groups: dict[str, GroupModel] = {}
        self.roles: dict[str, RoleModel] = {}
        self.applies: list[tuple[str, rec.Groups]] = []  # acknowledged, by epoch still current

    def teardown(self) -> None:
        try:
            if self.roles:
                self.drain()
        finally:
            self.database.close()
            shutil.rmtree(self.folder)

    # -- plumbing -------------------------------------------------------------------------------------------

    def call(self, method: str, body: Any, role: str, session: str = "s") -> Any:
        answer = self.core.handle(method, body, Sender(DIGEST, role, "w", session), self.now)
        self.core.commit()
        return answer

    def refused(self, method: str, body: Any, role: str, *codes: str) -> None:
        """The call must be refused with one of these codes."""
        try:
            answer = self.call(method, body, role)
        except Refusal as refusal:
            assert refusal.code in codes, f"{method}: {refusal.code}: {refusal}"
        except BadMessage:
            assert "BAD" in codes, method
        else:
            raise AssertionError(f"{method} {body} was accepted: {answer}")

    @initialize()
    def start(self) -> None:
        for role in ROLES:
            self.roles[role] = RoleModel(Trainer(0, -1, []))
            self.take_over(role, -1)

    def take_over(self, role: str, checkpoint: int) -> None:
        model = self.roles[role]
        model.nonce += 1
        nonce = f"{role}{model.nonce}"
        epoch = model.live.epoch
        if epoch > 1:
            late = rec.Resume(role, checkpoint, "late", epoch - 1)
            self.refused("resume", late, f"trainer:{role}", "FENCED")
        for _ in range(2):  # its answer may get lost: asking again must not raise the epoch again
            resumed = self.call("resume", rec.Resume(role, checkpoint, nonce, epoch), f"trainer:{role}")
        if model.live.epoch:
            model.zombies = [*model.zombies[-2:], model.live]
        assert resumed.epoch == model.live.epoch + 1
        model.live = Trainer(resumed.epoch, checkpoint, list(model.checkpoints[checkpoint]))
        model.checkpoints = {s: h for s, h in model.checkpoints.items() if s <= checkpoint}
        self.applies = [(r, a) for r, a in self.applies if r != role]
        self.call("status", rec.Status(role, resumed.epoch, 0, checkpoint, checkpoint), f"trainer:{role}")

    # -- workers --------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 4), session=st.integers(0, 1))
    def open_group(self, number: int, session: int) -> None:
        query = f"q{number}"
        known = self.groups.get(query)
        body = rec.OpenGroup(query, K, {"sub": 4}, number)
        opened = self.call("open_group", body, "worker", f"s{session}")
        if known is None:
            assert (opened.attempt, opened.state, opened.finished) == (0, "open", [])
            self.groups[query] = GroupModel(0, progress=self.now)
        else:
            assert opened.state == self.state_of(known)
            assert opened.finished == sorted(known.final), "an acknowledged rollout is forgotten"
            assert opened.attempt in (known.attempt, known.attempt + 1)
            if opened.attempt > known.attempt:
                known.attempt, known.progress = opened.attempt, self.now

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), rollout=st.integers(0, K - 1), subs=st.integers(0, 2), slow=st.booleans())
    def finish_rollout(self, data: st.DataObject, rollout: int, subs: int, slow: bool) -> None:
        """All invocations, then the end; a slow worker still uses the attempt before."""
        query = data.draw(st.sampled_from(sorted(self.groups)))
        group = self.groups[query]
        if slow and group.attempt:
            record = rec.RolloutFail(query, rollout, group.attempt - 1, "slow")
            known = group.final.get(rollout)
            if known is None:
                self.refused("rollout_fail", record, "worker", "FENCED", "CLOSED")
            return
        if group.dropped:
            self.refused(
                "rollout_fail", rec.RolloutFail(query, rollout, 99, "late"), "worker", "CLOSED", "CONFLICT"
            )
        elif rollout not in group.final:
            self.end_well(query, rollout, subs)

    @precondition(lambda self: len(self.groups) < 8)
    @rule(subs=st.integers(0, 2))
    def whole_group(self, subs: int) -> None:
        """A worker without trouble: most programs get far enough to train."""
        number = next(i for i in range(9) if f"q{i}" not in self.groups)
        self.open_group(number, 0)
        for rollout in range(K):
            self.end_well(f"q{number}", rollout, subs)

    def end_well(self, query: str, rollout: int, subs: int) -> None:
        group = self.groups[query]
        for role, n in (("main", 1), ("sub", subs)):
            for i in range(n):
                self.accept(group, "invocation_done", invocation(query, rollout, group.attempt, role, i))
        final = rec.RolloutFinal(query, rollout, group.attempt, float(rollout), 1.0, {"sub": subs}, {}, 0, 0)
        self.accept(group, "rollout_final", final)
        group.final[rollout] = ("rollout_final", final)

    def accept(self, group: GroupModel, method: str, record: Any) -> None:
        self.call(method, record, "worker")
        if (method, record) not in group.sent:
            group.progress = self.now
        group.sent.append((method, record))

    @precondition(lambda self: any(g.sent for g in self.groups.values()))
    @rule(data=st.data(), change=st.booleans())
    def send_again(self, data: st.DataObject, change: bool) -> None:
        """An acknowledged record again is acknowledged again; with other content it is a conflict."""
        sent = [item for group in self.groups.values() for item in group.sent]
        method, record = data.draw(st.sampled_from(sent))
        if not change:
            self.call(method, record, "worker")
            return
        other = rec.RolloutFinal if method == "rollout_final" else rec.InvocationDone
        values = {name: getattr(record, name) for name in record.__struct_fields__}
        values["reward" if other is rec.RolloutFinal else "n_tokens"] = 77
        self.refused(method, other(**values), "worker", "CONFLICT")

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), subs=st.integers(0, 1))
    def end_too_early(self, data: st.DataObject, subs: int) -> None:
        """A rollout cannot end while an invocation of it is missing."""
        query = data.draw(st.sampled_from(sorted(self.groups)))
        group = self.groups[query]
        for rollout in range(K):
            if rollout not in group.final:
                record = rec.RolloutFinal(query, rollout, group.attempt, 0.0, 0.0, {"sub": 9}, {}, 0, 0)
                self.refused("rollout_final", record, "worker", "CLOSED" if group.dropped else "INCOMPLETE")

    @precondition(lambda self: self.group_timeout < 1e6)
    @rule(number=st.integers(0, 4))
    def time_passes(self, number: int) -> None:
        """A group is dropped once nothing new of it has arrived for group_timeout (60 s), however old it is."""
        self.forty_seconds_later()
        self.open_group(number, 0)
        group = self.groups[f"q{number}"]
        rollout = next((k for k in range(K) if k not in group.final), None)
        if not group.dropped and rollout is not None:
            self.end_well(f"q{number}", rollout, 1)
        self.forty_seconds_later()

    def forty_seconds_later(self) -> None:
        """Trainers renew their leases."""
        for role, model in self.roles.items():
            held = list(model.live.held.items())
            self.call("renew", rec.Groups(role, model.live.epoch, held), f"trainer:{role}")
        self.clock(40.0)

    def clock(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)
        self.core.commit()
        for group in self.groups.values():
            late = self.now - group.progress >= self.group_timeout
            group.dropped = group.dropped or (late and len(group.final) < K)

    @staticmethod
    def state_of(group: GroupModel) -> str:
        return "dropped" if group.dropped else "sealed" if len(group.final) == K else "open"

    # -- trainers -------------------------------------------------------------------------------------------

    def sealed(self) -> list[str]:
        return sorted(query for query, group in self.groups.items() if len(group.final) == K)

    def dropped(self) -> list[str]:
        return [query for query, group in self.groups.items() if group.dropped]

    def claim(self, role: str, n: int) -> bool:
        trainer = self.roles[role].live
        trainer.seq += 1
        groups = self.call("claim", rec.Claim(role, trainer.epoch, trainer.seq, n, 0.0), f"trainer:{role}")
        again = self.call("claim", rec.Claim(role, trainer.epoch, trainer.seq, n, 0.0), f"trainer:{role}")
        assert groups == again
        if groups is None:
            trainer.seq -= 1
            return False
        assert [g.index for g in groups] == sorted(g.index for g in groups)
        if self.in_order:
            taken = {query for _, query in trainer.history} | set(trainer.held) | {g.query for g in groups}
            older = {f"q{i}" for i in range(groups[-1].index)} - set(self.dropped())
            assert older <= taken, f"q{groups[-1].index} was claimed before {sorted(older - taken)}"
        for group in groups:
            assert group.query in self.sealed(), "a group that is not complete was claimed"
            seen = {query for _, query in trainer.history}
            assert group.query not in seen, "a group was claimed after it was trained"
            model = self.groups[group.query]
            for rollout in group.rollouts:
                assert rollout.d_k == model.final[rollout.rollout][1].d_k
            subs = sum(model.final[k][1].d_k["sub"] for k in range(K))
            assert len(group.invocations) == (K if role == "main" else subs)
            trainer.held[group.query] = group.lease
        return True

    @rule(role=st.sampled_from(ROLES), n=st.integers(1, 2))
    def claim_some(self, role: str, n: int) -> None:
        self.claim(role, n)

    @rule(role=st.sampled_from(ROLES), commit=st.booleans())
    def apply(self, role: str, commit: bool) -> None:
        """The live trainer makes a step with what it holds; an expired lease must be refused."""
        trainer = self.roles[role].live
        if trainer.held:
            self.step(role)
        if commit:
            self.commit(role)

    def step(self, role: str) -> None:
        trainer = self.roles[role].live
        query = min(trainer.held)
        body = rec.Groups(role, trainer.epoch, [(query, trainer.held.pop(query))], trainer.step + 1)
        try:
            self.call("apply", body, f"trainer:{role}")
        except Refusal as refusal:
            assert refusal.code == "FENCED"
            self.expired(role, query)
        else:
            trainer.step += 1
            trainer.history.append((trainer.step, query))
            self.applies.append((role, body))

    def expired(self, role: str, query: str) -> None:
        """A live trainer's apply may only be refused when its lease ran out."""
        group = self.core.ledger.state.groups.get(query)  # type: ignore[union-attr]
        assert group is not None
        assert group.deliveries[role].failures > 0, "a valid lease was refused"

    def commit(self, role: str) -> None:
        trainer = self.roles[role].live
        self.roles[role].checkpoints[trainer.step] = list(trainer.history)
        self.call("commit", rec.Commit(role, trainer.epoch, trainer.step), f"trainer:{role}")

    @precondition(lambda self: self.applies)
    @rule(data=st.data())
    def apply_again(self, data: st.DataObject) -> None:
        """The same apply twice is one apply; the step with other groups is a conflict."""
        role, body = data.draw(st.sampled_from(self.applies))
        self.call("apply", body, f"trainer:{role}")
        held = self.roles[role].live.held
        if held:
            other = rec.Groups(role, body.epoch, list(held.items()), body.step)
            self.refused("apply", other, f"trainer:{role}", "CONFLICT")

    @rule(role=st.sampled_from(ROLES), older=st.booleans())
    def trainer_dies(self, role: str, older: bool) -> None:
        """Its successor starts from the last checkpoint, or from the one before when that is damaged."""
        steps = sorted(self.roles[role].checkpoints)
        self.take_over(role, steps[-2] if older and len(steps) > 1 else steps[-1])

    @rule(role=st.sampled_from(ROLES), what=st.sampled_from(["apply", "commit", "claim", "status", "nack"]))
    def zombie_acts(self, role: str, what: str) -> None:
        for zombie in self.roles[role].zombies:
            held = list(zombie.held.items()) or [("q0", 1)]
            body: Any = {
                "apply": rec.Groups(role, zombie.epoch, held, zombie.step + 1),
                "nack": rec.Groups(role, zombie.epoch, held, -1, "zombie"),
                "commit": rec.Commit(role, zombie.epoch, zombie.step),
                "claim": rec.Claim(role, zombie.epoch, zombie.seq + 1, 1, 0.0),
                "status": rec.Status(role, zombie.epoch, 5, 5, 5),
            }[what]
            self.refused(what, body, f"trainer:{role}", "FENCED")

    @rule(role=st.sampled_from(ROLES))
    def lease_runs_out(self, role: str) -> None:
        """The trainer was away for too long. Whoever holds the group then, the old lease is worth nothing."""
        trainer = self.roles[role].live
        if not trainer.held or any(d.failures for d in self.deliveries(role)):
            return  # once a group: three expiries would quarantine it
        old = dict(trainer.held)
        self.clock(61.0)
        for other in self.roles.values():
            other.live.held.clear()
        if self.claim(role, len(old)):
            body = rec.Groups(role, trainer.epoch, list(old.items()), trainer.step + 1)
            self.refused("apply", body, f"trainer:{role}", "FENCED")

    def deliveries(self, role: str) -> list[Any]:
        groups = self.core.ledger.state.groups.values()  # type: ignore[union-attr]
        return [g.deliveries[r] for g in groups for r in ROLES if r in g.deliveries]

    # -- the store ------------------------------------------------------------------------------------------

    @rule()
    def store_crashes(self) -> None:
        self.database.reopen()
        self.core.reload(self.now)
        for group in self.groups.values():
            group.progress = self.now  # a store that was away does not hold that against anybody

    @invariant()
    def history_is_what_the_weights_have_seen(self) -> None:
        for role, model in self.roles.items():
            told = [(line.step, line.query) for line in self.core.trained(role)]
            assert told == sorted(model.live.history), f"{role}: ledger {told}, weights {model.live.history}"
            assert len({query for _, query in told}) == len(told)

    @invariant()
    def counts_agree(self) -> None:
        if self.roles:
            stats = self.core.ledger.stats()  # type: ignore[union-attr]
            assert stats["sealed"] == len(self.sealed())
            assert stats["dropped"] == len(self.dropped())
            assert stats["open"] == len(self.groups) - len(self.sealed()) - len(self.dropped())

    def drain(self) -> None:
        """In the end every group that was not dropped is completed and trained, exactly once a role."""
        self.store_crashes()
        if self.in_order:  # without gaps
            last = max((int(query[1:]) for query in self.groups), default=-1)
            for number in range(last):
                if f"q{number}" not in self.groups:
                    self.open_group(number, 0)
        for query, group in self.groups.items():
            for rollout in range(K):
                if rollout not in group.final and not group.dropped:
                    self.end_well(query, rollout, 0)
        for role, model in self.roles.items():
            self.take_over(role, max(model.checkpoints))
            while self.claim(role, 1):
                self.step(role)
                self.commit(role)
            trained = sorted(query for _, query in model.live.history)
            assert trained == self.sealed(), f"{role}: trained {trained}, sealed {self.sealed()}"
        self.history_is_what_the_weights_have_seen()
        self.counts_agree()


def invocation(query: str, rollout: int, attempt: int, role: str, i: int) -> rec.InvocationDone:
    return rec.InvocationDone(query, rollout, attempt, role, i, 10 + i, 0, 0, {}, None)
