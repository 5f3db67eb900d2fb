"""From a finished rollout to durable records: tokens to the owning trainers' trajectory logs, numbers to the store.

    trajectory --(trajectory_log.append)--> its trainer's disk --> reference --(invocation_done)--> store
    rollout    --(rollout_final, once every reference is durable)-----------------------> store

Runs on a thread of its own, so that the engines go on while records travel. Everything is idempotent by its natural
key: a rollout that is shipped again after a restart changes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from mgrpo.environments.failure import shortened
from mgrpo.errors import DeadlineError, FencedError, GroupClosedError, PeerError
from mgrpo.pipeline.play import RolloutResult
from mgrpo.store.worker_client import WorkerClient, WorkerGroup
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.trajectory_log.format import LogRef
from mgrpo.transport.client import Answer
from mgrpo.types import Rollout, Trajectory

log = logging.getLogger("mgrpo.pipeline")
T = TypeVar("T")

LOOK = 0.2  # seconds between two looks at what drain() was given to check
GRACE = 5.0  # seconds beyond `timeout`: the clients' own deadlines pass first, and their errors name more
PLACE = (
    120  # bytes at the end of a failure's reason that the store keeps in any case: file, line and function
)


@dataclass(frozen=True, slots=True)
class _Work:
    group: WorkerGroup
    result: RolloutResult


class Shipper:
    """ship() hands over, drain() waits until everything handed over is durable and raises what went wrong.

    A group that the store has dropped meanwhile, or given to another worker, takes no records: they are left out
    quietly, its `closed` is set, and closed_groups() counts it. Leave with stop(), then close() once the clients are
    closed: nothing is waited for any more.
    """

    def __init__(
        self,
        store: WorkerClient,
        logs: Mapping[str, TrajectoryLogClient],
        reward: Callable[[int, Rollout], float],
        timeout: float,
    ) -> None:
        """logs: of the roles that train; other roles' tokens are dropped. reward: what the main agent earns in a
        group of that number. timeout: seconds that the store and the logs may go without taking a record."""
        self._store, self._logs, self._reward, self._timeout = store, logs, reward, timeout
        self._queue: deque[_Work] = deque()
        self._error: BaseException | None = None
        self._open = 0  # handed over, not durable yet
        self._stopping = False
        self._closed: set[str] = set()  # queries of groups that take nothing more
        self._counted = 0  # of them, by closed_groups()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mgrpo-shipper", daemon=True)
        self._thread.start()

    def ship(self, group: WorkerGroup, result: RolloutResult) -> None:
        """Never waits. Raises what has gone wrong with an earlier rollout."""
        with self._changed:
            self._check()
            self._open += 1
            self._queue.append(_Work(group, result))
            self._changed.notify_all()

    def drain(self, check: Callable[[], None] = lambda: None) -> None:
        """Raises DeadlineError naming the peer when it took no record for timeout seconds. check: raises when there is
        nothing to wait for any more."""
        with self._changed:
            while self._open:
                self._check()
                check()
                self._changed.wait(
                    LOOK
                )  # for the thread: all its waits are bounded, and its error names the cause
            self._check()

    def closed_groups(self) -> int:
        """Groups that were found closed since the last call."""
        with self._changed:
            n, self._counted = len(self._closed) - self._counted, len(self._closed)
            return n

    def check(self) -> None:
        """Raises what has gone wrong so far. Never waits."""
        with self._changed:
            self._check()

    def stop(self) -> None:
        """Wait for nothing more: what is not durable yet stays so, and will be played again by the next worker."""
        with self._changed:
            if self._open and self._error is None and not self._stopping:
                log.warning("%s", self._undelivered())
            self._stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """stop(), and wait for the thread. Idempotent."""
        self.stop()
        self._thread.join(GRACE)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopping:
            raise PeerError(f"the way to the store and the trajectory logs is closed: {self._undelivered()}")

    def _undelivered(self) -> str:
        return f"{self._open} finished rollouts were not delivered"

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while batch := self._next():
                self._ship(batch)
                with self._changed:
                    self._open -= len(batch)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> list[_Work]:
        """Everything that waits; [] when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            batch = [] if self._stopping else list(self._queue)
            self._queue.clear()
            return batch

    def _ship(self, batch: list[_Work]) -> None:
        """All trajectory log writes of the batch travel together, then all records: two round trips, however many
        rollouts. The store's client lets a rollout's end leave only after its invocations are acknowledged."""
        batch = [work for work in batch if work.group.query not in self._closed]
        written: list[list[tuple[Trajectory, Future[LogRef] | None]]] = [
            [(t, self._append(work.group, t)) for t in work.result.trajectories()] for work in batch
        ]
        answers: list[tuple[_Work, Future[Answer]]] = []
        for work, trajectories in zip(batch, written, strict=True):
            for trajectory, reference in trajectories:
                if reference is not None:
                    ref = self._result(
                        reference, f"the trajectory log of {trajectory.role!r}", trajectory.role
                    )
                    answers.append((work, self._invocation(work.group, trajectory, ref)))
            answers.append((work, self._end(work)))
        for work, answer in answers:
            try:
                self._result(answer, "the store")
            except (GroupClosedError, FencedError) as closed:
                self._close_group(work.group, closed)

    def _close_group(self, group: WorkerGroup, closed: GroupClosedError | FencedError) -> None:
        group.closed = True
        with self._changed:
            if group.query not in self._closed:
                self._closed.add(group.query)
                log.warning("%s; its other rollouts are left out", closed)

    def _result(self, future: Future[T], peer: str, role: str | None = None) -> T:
        """The future's result. Each is waited for from when the one before it came, so the bound is on progress."""
        future.add_done_callback(self._wake)
        with self._changed:
            self._changed.wait_for(lambda: future.done() or self._stopping, self._timeout + GRACE)
            waiting = f"{self._open} finished rollouts wait for it"
        if future.done():
            try:
                return future.result()
            except DeadlineError as late:
                raise DeadlineError(f"{late}; {waiting}") from late
        if self._stopping:
            raise PeerError(f"{peer} was not waited for any more: this worker ends")
        url = self._store.url if role is None else self._logs[role].url
        raise DeadlineError(f"{peer} at {url} took no record within {self._timeout:g} s; {waiting}")

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _append(self, group: WorkerGroup, trajectory: Trajectory) -> Future[LogRef] | None:
        trajectory_log = self._logs.get(trajectory.role)
        return (
            trajectory_log.append(trajectory, attempt=group.attempt, index=group.index)
            if trajectory_log
            else None
        )

    def _invocation(self, group: WorkerGroup, trajectory: Trajectory, ref: LogRef) -> Future[Answer]:
        return self._store.invocation_done(
            group,
            trajectory.rollout,
            role=trajectory.role,
            invocation=trajectory.invocation,
            n_tokens=len(trajectory),
            versions=trajectory.version_span(),
            scores=trajectory.scores,
            ref=ref,
        )

    def _end(self, work: _Work) -> Future[Answer]:
        result, rollout = work.result, work.result.rollout
        if rollout is None:
            return self._store.rollout_fail(
                work.group, result.request.rollout, shortened(result.failure, tail=PLACE)
            )
        return self._store.rollout_final(
            work.group,
            rollout.rollout,
            reward=self._reward(work.group.index, rollout),
            correct=rollout.correct,
            d_k={role: n for role, n in rollout.d_k().items() if role in self._logs},
            scores=rollout.main.scores,
            versions=rollout.main.version_span(),
        )
