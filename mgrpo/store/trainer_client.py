"""The store from a trainer's side: it claims groups, trains on them and accounts for them.

trainer = mgrpo.connect(url, role="trainer:sub")
trainer.resume(checkpoint_step=-1)
trainer.status(version=0, step=-1, checkpoint_step=-1)
groups = trainer.claim(n=32, timeout=600)
trainer.apply(step=0, groups=groups)
trainer.commit(step=0)
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

from mgrpo.errors import DeadlineError, FencedError, MgrpoError
from mgrpo.store import records as rec
from mgrpo.store.client import SLICE_S, StoreClient

log = logging.getLogger("mgrpo.store")


class TrainerClient(StoreClient):
    """Claims groups for one role and accounts for them. A background thread renews the leases."""

    def __init__(self, url: str, role: str, **options: Any) -> None:
        self.agent = role.partition(":")[2]
        self.epoch = 0
        self._claim_seq = 1
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None
        self.lease_s = 60.0
        super().__init__(url, role, **options)

    def close(self) -> None:
        self._stop.set()
        super().close()
        if self._renewer is not None:
            self._renewer.join(5.0)

    def resume(self, checkpoint_step: int) -> rec.Resumed:
        """Take the role over from a checkpoint that holds every step up to checkpoint_step (the value before the first
        step when there is none). Fences any older holder; everything beyond the checkpoint becomes ready again."""
        self.lease_s = (self._params or self.params()).lease_s
        nonce = secrets.token_hex(8)
        for last in (False, False, True):  # refused when another trainer of the role resumed in between
            epoch = self._call("role", rec.RoleName(self.agent), rec.RoleStatus).epoch
            request = rec.Resume(self.agent, checkpoint_step, nonce, epoch)
            try:
                resumed: rec.Resumed = self._call(
                    "resume", request, rec.Resumed, queue=f"resume({self.agent})"
                )
                break
            except FencedError:
                if last:
                    raise
        with self._lock:
            self.epoch, self._held = resumed.epoch, {}
            self._claim_seq = 1
        if self._renewer is None:
            self._renewer = threading.Thread(
                target=self._renew, name=f"mgrpo-renew {self.agent}", daemon=True
            )
            self._renewer.start()
        return resumed

    def claim(self, n: int, timeout: float | None = None) -> list[rec.ClaimedGroup]:
        """The n oldest sealed groups that this role has not trained on. Raises DeadlineError when there are
        fewer."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        seq = self._claim_seq  # a claim that ended without an answer is repeated: it may have been granted
        queue = f"claim({n} groups of {self.agent!r})"
        while True:
            left = max(0.0, deadline - time.monotonic())
            request = rec.Claim(self.agent, self.epoch, seq, n, min(left, SLICE_S))
            groups: list[rec.ClaimedGroup] | None = self._call(
                "claim", request, list[rec.ClaimedGroup] | None, timeout=left + 0.5, queue=queue
            )
            if groups is not None:
                self._claim_seq += 1
                with self._lock:
                    self._held |= {group.query: group.lease for group in groups}
                return groups
            if time.monotonic() >= deadline:
                world = self.world()
                raise DeadlineError(
                    f"store at {self._link.url}: {queue}{self._at()}: fewer are sealed after {limit:g} s; workers have "
                    f"{world.open} groups open, and {len(world.workers)} of them are alive"
                )

    def apply(
        self, step: int, groups: Sequence[rec.ClaimedGroup], surplus: Sequence[rec.ClaimedGroup] = ()
    ) -> None:
        """The optimizer step `step` has used these groups and sets those of `surplus` aside, which were claimed for it
        too; one request accounts for both. Call it before the step's checkpoint is written."""
        self.step = step
        request = self._named(groups, step=step)
        request.surplus = [(group.query, group.lease) for group in surplus]
        self._call("apply", request, None)
        self._drop([*groups, *surplus])

    def commit(self, step: int) -> int:
        """A durable checkpoint holds every step up to `step`. Returns the cursor: trajectories of groups with a lower
        index are needed only to roll back behind this checkpoint (see TrajectoryLog.truncate)."""
        cursor: int = self._call("commit", rec.Commit(self.agent, self.epoch, step), int)
        return cursor

    def nack(self, groups: Sequence[rec.ClaimedGroup], reason: str) -> None:
        """Give groups back unused. The third time a group is quarantined with this reason."""
        self._call("nack", self._named(groups, reason=reason), None)
        self._drop(groups)

    def status(self, *, version: int, step: int, checkpoint_step: int) -> rec.RoleStatus:
        """Publish: the role's weights of `version` can be fetched. Admission of new groups follows this
        number."""
        request = rec.Status(self.agent, self.epoch, version, step, checkpoint_step)
        status: rec.RoleStatus = self._call("status", request, rec.RoleStatus)
        return status

    def leave(self) -> None:
        """This trainer ends; another one may come. What it holds stays leased until then."""
        self._call("leave", rec.RoleName(self.agent), None)

    def _named(self, groups: Sequence[rec.ClaimedGroup], step: int = -1, reason: str = "") -> rec.Groups:
        return rec.Groups(self.agent, self.epoch, [(g.query, g.lease) for g in groups], step, reason)

    def _drop(self, groups: Sequence[rec.ClaimedGroup]) -> None:
        with self._lock:
            for group in groups:
                self._held.pop(group.query, None)

    def _renew(self) -> None:
        while not self._stop.wait(self.lease_s / 3):
            with self._lock:
                request = rec.Groups(self.agent, self.epoch, list(self._held.items()))
            if not request.groups:
                continue
            try:
                gone = self._call("renew", request, list[str], timeout=self.lease_s / 3)
            except FencedError as error:
                log.error("%s", error)
                return
            except MgrpoError as error:
                log.warning("leases not renewed: %s", error)
            else:
                if gone:
                    log.warning("leases lost: %s", gone)
