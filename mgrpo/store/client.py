"""The store from the other processes' side: what a rollout worker, a trainer and the launcher can say to it.

    worker = mgrpo.connect(url, role="worker")
    group = worker.open_group(query="q7/0", k=8, d_max={"sub": 4})
    worker.invocation_done(group, 0, role="sub", invocation=0, n_tokens=31, versions=(4, 4), ref=ref)
    worker.rollout_final(group, 0, reward=1.0, correct=1.0, d_k={"sub": 1})

    trainer = mgrpo.connect(url, role="trainer:sub")
    trainer.resume(checkpoint_step=-1)
    groups = trainer.claim(n=32, timeout=600)
    trainer.apply(step=0, groups=groups)
    trainer.commit(step=0)

Every call has a deadline; when it passes, DeadlineError names the store, the step and what was waited for.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mgrpo.errors import DeadlineError, FencedError, GroupClosedError, MgrpoError, PeerError, RetryAfterError
from mgrpo.spool import SpoolRef
from mgrpo.store import records as rec
from mgrpo.transport.client import Answer, Client
from mgrpo.transport.codec import Record, Sender

log = logging.getLogger("mgrpo.store")
SLICE_S = 5.0  # one long poll; a wait is many of them


class StoreClient:
    """What every role can do. `run` is the run's digest; without it the store's own is taken."""

    def __init__(
        self, url: str, role: str, *, key: Any = None, timeout: float = 30.0, name: str | None = None,
        run: str | None = None, window: int = 1024,
    ) -> None:  # fmt: skip
        self.role = role
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.session = secrets.token_hex(8)
        self.timeout = timeout
        self._link = Client(
            url, peer="store", sender=Sender(run or "", role, self.name, self.session), timeout=timeout,
            window=window, security=key,
        )  # fmt: skip
        self._reports = itertools.count(1)
        self._params: rec.RunParams | None = None
        self.step: int | None = None  # for error messages
        try:
            if run is None and role != "launcher":
                self._adopt(self.params())
        except BaseException:
            self._link.close()
            raise

    def _adopt(self, params: rec.RunParams) -> None:
        self._params = params
        self._link.sender = Sender(params.digest, self.role, self.name, self.session)

    def hurry(self, seconds: float) -> None:
        """This process is to end: wait for no answer longer than `seconds`. A signal handler may call it."""
        self._link.hurry(seconds)

    def close(self) -> None:
        """Idempotent."""
        self._link.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self, method: str, body: object, kind: Any, *, timeout: float | None = None, queue: str = ""
    ) -> Any:
        return self._link.call(method, body, timeout=timeout, step=self.step, queue=queue).decode(kind)

    def params(self) -> rec.RunParams:
        """What the run is."""
        params: rec.RunParams = self._call("params", None, rec.RunParams)
        return params

    def stats(self) -> dict[str, Any]:
        """Counts of groups, deliveries and requests."""
        stats: dict[str, Any] = self._call("stats", None, dict[str, Any])
        return stats

    def report(self, kind: str, payload: Mapping[str, object]) -> None:
        """Append a small dict (16 KiB encoded, finite numbers) to the run's durable stream of reports."""
        self._call("report", rec.Report(next(self._reports), kind, dict(payload)), int)

    def reports(self, after: int = 0, timeout: float = 0.0) -> list[rec.Reported]:
        """Up to 256 reports with a sequence number beyond `after`; waits up to `timeout` for the first
        one."""
        deadline = time.monotonic() + timeout
        while True:
            slice_s = max(0.0, min(SLICE_S, deadline - time.monotonic()))
            request = rec.WaitFor(slice_s, after=after)
            found: list[rec.Reported] = self._call(
                "reports", request, list[rec.Reported], timeout=self.timeout + slice_s, queue="reports"
            )
            if found or time.monotonic() >= deadline:
                return found

    def wait(
        self, *, versions: Mapping[str, int] | None = None, sealed: int = 0, not_state: str = "", after: int =
        -1, timeout: float | None = None,
    ) -> rec.World:  # fmt: skip
        """Wait until all that is given holds (see records.WaitFor), and return the state of everything.
        Level-triggered: what already holds returns at once. Raises DeadlineError."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        what = (
            f"wait(versions={dict(versions or {})}, sealed={sealed}, not_state={not_state!r}, after={after})"
        )
        while True:
            left = deadline - time.monotonic()
            request = rec.WaitFor(
                max(0.0, min(SLICE_S, left)), dict(versions or {}), sealed, not_state, after
            )
            world: rec.World = self._call(
                "wait", request, rec.World, timeout=max(left, 0.0) + 0.5, queue=what
            )
            if world.satisfied:
                return world
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"store at {self._link.url}: {what}{self._at()}: not so within {limit:g} s"
                )

    def set_control(self, state: str, reason: str = "") -> None:
        """Set the run state: "running", "stopping" or "finished"."""
        self._call("set_control", rec.Control(state, reason), None)

    def world(self) -> rec.World:
        """The state of everything one can wait for, now."""
        world: rec.World = self._call("wait", rec.WaitFor(0.0), rec.World)
        return world

    def trained(self, role: str) -> list[rec.Trained]:
        """The role's trained-group ledger: every group in its surviving optimizer history, in order."""
        rows: list[rec.Trained] = self._call("trained", role, list[rec.Trained])
        return rows

    def open_groups(
        self, worker: str = "", first: int = 0, last: int = (1 << 62) - 1
    ) -> list[rec.OpenGroupInfo]:
        """Groups with index first..last that are not sealed yet, of one worker or of all."""
        request = rec.OpenGroups(worker, first, last)
        groups: list[rec.OpenGroupInfo] = self._call("open_groups", request, list[rec.OpenGroupInfo])
        return groups

    def _at(self) -> str:
        return "" if self.step is None else f" at step {self.step}"


class LauncherClient(StoreClient):
    """Creates the run and steers it. Call create() or attach() first, unless `run` was given."""

    def attach(self) -> rec.RunParams:
        """Take part in whatever run the store holds."""
        params = self.params()
        self._adopt(params)
        return params

    def create(self, params: rec.RunParams) -> rec.RunParams:
        """Create the run, or check that the store holds exactly this one; raises PeerError naming both
        otherwise."""
        known: rec.RunParams = self._call("create", params, rec.RunParams)
        self._adopt(known)
        return known

    def requeue(self, role: str, queries: Sequence[str]) -> list[str]:
        """Make quarantined groups ready again; returns the state of each."""
        states: list[str] = self._call("requeue", rec.Groups(role, 0, [(q, 0) for q in queries]), list[str])
        return states

    def backup(self, path: str) -> None:
        """Write a consistent copy of the store to a new file on the store's machine."""
        self._call("backup", path, None)


@dataclass(slots=True)
class WorkerGroup:
    """An open group in a worker's hands. `finished`: rollouts that already ended and need no replay. `oldest`: of each
    training role, the oldest version to sample it with. `closed`: the store takes no more of its records, because it is
    complete, its time was up, or too few of its rollouts had a reward; it becomes true as soon as a record is refused
    for that reason."""

    query: str
    index: int
    attempt: int
    state: str
    k: int
    finished: list[int]
    oldest: dict[str, int] = field(default_factory=dict)
    closed: bool = False
    _waiting: dict[int, list[Future[Answer]]] = field(default_factory=dict)


class WorkerClient(StoreClient):
    """Opens groups and fills them. Records are pipelined: the methods return futures that raise the typed
    errors, and flush raises the first of them."""

    def __init__(self, url: str, role: str = "worker", **options: Any) -> None:
        self._failed: list[BaseException] = []
        super().__init__(url, role, **options)

    def open_group(
        self, *, query: str, k: int, d_max: Mapping[str, int], index: int | None = None,
        meta: Mapping[str, str | int | float | bool | None] | None = None, seed: int = 0,
        policy: Mapping[str, int] | None = None, timeout: float | None = None,
    ) -> WorkerGroup:  # fmt: skip
        """Open a group, or open it again after a crash (a new attempt). Waits while the store refuses new
        groups and raises RetryAfterError after `timeout` (0: at once)."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while True:
            left = max(0.0, deadline - time.monotonic())
            request = rec.OpenGroup(
                query, k, dict(d_max), index, dict(meta or {}), seed, dict(policy or {}), min(left, SLICE_S)
            )
            try:
                opened: rec.Opened = self._call(
                    "open_group",
                    request,
                    rec.Opened,
                    timeout=self.timeout + left,
                    queue=f"open_group({query!r})",
                )
            except RetryAfterError:
                if time.monotonic() >= deadline:
                    raise
            else:
                return WorkerGroup(
                    opened.query, opened.index, opened.attempt, opened.state, opened.k, opened.finished,
                    opened.oldest, opened.state != "open",
                )  # fmt: skip

    def invocation_done(
        self, group: WorkerGroup, rollout: int, *, role: str, invocation: int = 0, n_tokens: int,
        versions: tuple[int, int] = (-1, -1), scores: Mapping[str, float] | None = None,
        ref: SpoolRef | None = None,
    ) -> Future[Answer]:  # fmt: skip
        """One trajectory is done and lies in its role's spool at `ref` (role "main": invocation 0)."""
        record = rec.InvocationDone(
            group.query,
            rollout,
            group.attempt,
            role,
            invocation,
            n_tokens,
            *versions,
            dict(scores or {}),
            ref,
        )
        queue = f"invocation_done({group.query!r})"
        future = self._watch(group, self._link.submit("invocation_done", record, queue=queue))
        group._waiting.setdefault(rollout, []).append(future)
        return future

    def rollout_final(
        self, group: WorkerGroup, rollout: int, *, reward: float, correct: float, d_k: Mapping[str, int],
        scores: Mapping[str, float] | None = None, versions: tuple[int, int] = (-1, -1), status: str = "ok",
    ) -> Future[Answer]:  # fmt: skip
        """The rollout ended. Leaves once all its invocations are acknowledged; if one was refused, so is
        this."""
        record = rec.RolloutFinal(
            group.query,
            rollout,
            group.attempt,
            reward,
            correct,
            dict(d_k),
            dict(scores or {}),
            *versions,
            status,
        )
        return self._after(group, rollout, "rollout_final", record)

    def rollout_fail(self, group: WorkerGroup, rollout: int, reason: str) -> Future[Answer]:
        """The rollout ended without a reward: an engine, tool or judge failed."""
        return self._after(
            group, rollout, "rollout_fail", rec.RolloutFail(group.query, rollout, group.attempt, reason)
        )

    def _after(self, group: WorkerGroup, rollout: int, method: str, record: Record) -> Future[Answer]:
        """Submit `record` when the rollout's invocations are acknowledged. Callbacks run on the link's I/O
        thread, which must not wait for room in its own window: the record's place is taken by
        submit_later."""
        waiting = [
            future for future in group._waiting.pop(rollout, []) if not future.done() or future.exception()
        ]
        queue = f"{method}({group.query!r})"
        if not waiting:
            return self._watch(group, self._link.submit(method, record, queue=queue))
        start, result = self._link.submit_later(method, record, queue=queue)
        self._watch(group, result)
        left = len(waiting)
        lock = threading.Lock()

        def arrived(future: Future[Answer]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                start(next((f.exception() for f in waiting if f.exception() is not None), None))

        for future in waiting:
            future.add_done_callback(arrived)
        return result

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every record is acknowledged; raises the first error of those since the last flush."""
        self._link.flush(timeout)
        failed, self._failed = self._failed, []
        if failed:
            raise failed[0]

    def _watch(self, group: WorkerGroup, future: Future[Answer]) -> Future[Answer]:
        def remember(done: Future[Answer]) -> None:
            error = done.exception()
            if isinstance(error, GroupClosedError):
                group.closed = True
            if error is not None:
                self._failed.append(error)

        future.add_done_callback(remember)
        return future


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
        """Take the role over from a checkpoint that holds every step up to checkpoint_step (the value before
        the first step when there is none). Fences any older holder; everything beyond the checkpoint becomes
        ready again."""
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
                raise DeadlineError(
                    f"store at {self._link.url}: {queue}{self._at()}: fewer are sealed after {limit:g} s"
                )

    def apply(self, step: int, groups: Sequence[rec.ClaimedGroup]) -> None:
        """The optimizer step `step` has used these groups. Call it before the step's checkpoint is
        written."""
        self.step = step
        self._call("apply", self._named(groups, step=step), None)
        self._drop(groups)

    def commit(self, step: int) -> int:
        """A durable checkpoint holds every step up to `step`. Returns the cursor: trajectories of groups with
        a lower index are needed only to roll back behind this checkpoint (see Spool.truncate)."""
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


def connect(
    url: str,
    role: str,
    *,
    key: Any = None,
    timeout: float = 30.0,
    name: str | None = None,
    run: str | None = None,
) -> Any:
    """A client of the store at `url`: a WorkerClient, TrainerClient, LauncherClient or plain StoreClient for
    the role "worker", "trainer:<agent>", "launcher" or "observer".

    key: this peer's keys where the link is encrypted. name: stable across restarts, so that a worker finds
    its open groups again. run: digest of the configuration; the store refuses another one (None: take the
    store's)."""
    if role == "worker":
        return WorkerClient(url, role, key=key, timeout=timeout, name=name, run=run)
    if role == "launcher":
        return LauncherClient(url, role, key=key, timeout=timeout, name=name, run=run)
    if role == "observer":
        return StoreClient(url, role, key=key, timeout=timeout, name=name, run=run)
    if role.startswith("trainer:") and len(role) > len("trainer:"):
        return TrainerClient(url, role, key=key, timeout=timeout, name=name, run=run)
    raise PeerError(f"unknown role {role!r}, expected worker, trainer:<agent>, launcher or observer")
