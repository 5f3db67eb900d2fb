"""Who may open a group and who may train on it: the real ledger, and the rules of others for comparison.

`RealStore` sends the requests that workers and trainers send to the store's own state machine (mgrpo/store/ledger.py),
with virtual time as its clock; only the database is left out. `AnyOrder` is what asynchronous trainers of the field do:
a bound on the number of groups in the making, and whichever groups are complete first are trained first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mgrpo.store import records as rec
from mgrpo.store.ledger import Ledger
from mgrpo.store.state import SEALED, State
from mgrpo.transport.codec import Refusal, Sender

ROLE = "main"


class Ended(Protocol):
    """A rollout that is over. versions: of its turns, in order."""

    index: int
    rollout: int
    versions: list[int]
    failed: bool

    @property
    def tokens(self) -> int: ...


class StoreRules(ABC):
    """One training role, whose version is the number of its steps."""

    version = 0

    @abstractmethod
    def open(self, worker: int, index: int, now: float) -> int | None:
        """The oldest version that may sample group `index`; None while the group is not admitted."""

    @abstractmethod
    def ended(self, worker: int, rollout: Ended, now: float) -> bool:
        """A rollout of an open group is over. True: its group is complete."""

    @abstractmethod
    def claim(self, now: float) -> list[int] | None:
        """The groups of the next step; None while there are too few."""

    @abstractmethod
    def trained(self, step: int, groups: Sequence[int], now: float) -> None:
        """Step `step` has used these groups: the role is at version step + 1."""

    def lost(self) -> int:
        """Groups that were sampled and will never be trained on."""
        return 0


class RealStore(StoreRules):
    """The run's own rules."""

    def __init__(self, k: int, batch: int, max_lag: int, **params: Any) -> None:
        """params: further fields of RunParams, e.g. claim_window."""
        self._batch, self._k = batch, k
        known = {"run": "sim", "digest": "sim", "roles": [ROLE], "training_roles": [ROLE]}
        times = {"lease_s": math.inf, "group_timeout_s": math.inf}
        numbers = {"k": k, "batch": batch, "max_lag": max_lag, "in_order": True}
        allowed = rec.RunParams.__struct_fields__
        wanted: Mapping[str, Any] = known | times | numbers | params
        self._state = State(rec.RunParams(**{n: v for n, v in wanted.items() if n in allowed}))
        self._ledger = Ledger(self._state)
        self._trainer = Sender("sim", f"trainer:{ROLE}", "trainer-main", "0")
        self._leases: dict[int, int] = {}
        self._seq = 0
        self._resume()

    def _ask(self, method: str, request: Any, sender: Sender, now: float) -> Any:
        return self._ledger.handle(method, request, sender, now)

    def _resume(self) -> None:
        resumed = self._ask("resume", rec.Resume(ROLE, -1, "sim", 0), self._trainer, 0.0)
        self._epoch = resumed.epoch
        self._publish(0.0)

    def _publish(self, now: float) -> None:
        status = rec.Status(ROLE, self._epoch, self.version, self.version, self.version)
        self._ask("status", status, self._trainer, now)

    def _worker(self, number: int) -> Sender:
        return Sender("sim", "worker", f"rollout-{number}", "0")

    def open(self, worker: int, index: int, now: float) -> int | None:
        request = rec.OpenGroup(_name(index, self._batch), self._k, {ROLE: 1}, index)
        try:
            opened = self._ask("open_group", request, self._worker(worker), now)
        except Refusal as refusal:
            if refusal.code != "RETRY_AFTER":
                raise
            return None
        return int(opened.min_versions.get(ROLE, 0))

    def ended(self, worker: int, rollout: Ended, now: float) -> bool:
        query, number, sender = _name(rollout.index, self._batch), rollout.rollout, self._worker(worker)
        if rollout.failed:
            self._ask("rollout_fail", rec.RolloutFail(query, number, 0, "deadline"), sender, now)
        else:
            low, high = rollout.versions[0], rollout.versions[-1]
            trajectory = rec.InvocationDone(query, number, 0, ROLE, 0, rollout.tokens, low, high, {}, None)
            self._ask("invocation_done", trajectory, sender, now)
            end = rec.RolloutFinal(query, number, 0, 0.0, 0.0, {}, {}, low, high)
            self._ask("rollout_final", end, sender, now)
        return self._state.groups[query].state == SEALED

    def claim(self, now: float) -> list[int] | None:
        request = rec.Claim(ROLE, self._epoch, self._seq + 1, self._batch, 0.0)
        claimed = self._ask("claim", request, self._trainer, now)
        if claimed is None:
            return None
        self._seq += 1
        self._leases = {group.index: group.lease for group in claimed}
        return sorted(self._leases)

    def trained(self, step: int, groups: Sequence[int], now: float) -> None:
        names = [(_name(index, self._batch), self._leases[index]) for index in groups]
        self._ask("apply", rec.Groups(ROLE, self._epoch, names, step), self._trainer, now)
        self._ask("commit", rec.Commit(ROLE, self._epoch, step), self._trainer, now)
        self.version = step + 1
        self._publish(now)
        self._state.take_dirty()  # what the database would write now
        self._state.retire()

    def lost(self) -> int:
        return len(self._state.roles[ROLE].skipped)


class AnyOrder(StoreRules):
    """At most (max_lag + 1) steps' worth of groups ahead of the trainer, trained in the order of completion. A slow
    group is trained whenever it comes, however old it is by then; with drop_late it is thrown away instead."""

    def __init__(self, k: int, batch: int, max_lag: float, drop_late: bool = False) -> None:
        """max_lag: math.inf admits every group at once."""
        self._k, self._batch, self._max_lag, self._drop_late = k, batch, max_lag, drop_late
        self._ends: dict[int, int] = {}
        self._oldest: dict[int, int] = {}
        self._ready: list[int] = []
        self._lost = 0

    def open(self, worker: int, index: int, now: float) -> int | None:
        if index - self._lost >= (self.version + self._max_lag + 1) * self._batch:
            return None
        return 0

    def ended(self, worker: int, rollout: Ended, now: float) -> bool:
        index, oldest = rollout.index, rollout.versions[0]
        self._ends[index] = self._ends.get(index, 0) + 1
        self._oldest[index] = min(self._oldest.get(index, oldest), oldest)
        if self._ends[index] < self._k:
            return False
        insort(self._ready, index)  # an older one that is complete goes first
        return True

    def claim(self, now: float) -> list[int] | None:
        if self._drop_late:
            late = {i for i in self._ready if self.version - self._oldest[i] > self._max_lag}
            self._lost += len(late)
            self._ready = [i for i in self._ready if i not in late]
        if len(self._ready) < self._batch:
            return None
        taken, self._ready = self._ready[: self._batch], self._ready[self._batch :]
        return taken

    def trained(self, step: int, groups: Sequence[int], now: float) -> None:
        self.version = step + 1

    def lost(self) -> int:
        return self._lost


def _name(index: int, batch: int) -> str:
    return f"{index // batch}/{index}"
