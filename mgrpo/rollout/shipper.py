"""From a finished rollout to durable records: tokens to the owning trainers' spools, numbers to the store.

    trajectory --(spool.append)--> its trainer's disk --> reference --(invocation_done)--> store
    rollout    --(rollout_final, once every reference is durable)-----------------------> store

Runs on a thread of its own, so that the engines go on while records travel. Everything is idempotent by its natural
key: a rollout that is shipped again after a restart changes nothing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from mgrpo.errors import DeadlineError
from mgrpo.rollout.play import Played
from mgrpo.spool import SpoolClient, SpoolRef
from mgrpo.store.client import WorkerClient, WorkerGroup
from mgrpo.transport.client import Answer
from mgrpo.types import Rollout, Trajectory

REASON = 200  # characters of a failure's reason that the store keeps


@dataclass(frozen=True, slots=True)
class _Work:
    group: WorkerGroup
    played: Played


class Shipper:
    """ship() hands over, drain() waits until everything handed over is durable and raises what went wrong."""

    def __init__(
        self,
        store: WorkerClient,
        spools: Mapping[str, SpoolClient],
        reward: Callable[[Rollout], float],
        timeout: float,
    ) -> None:
        """spools: of the roles that train; other roles' tokens are dropped. timeout: seconds for one rollout."""
        self._store, self._spools, self._reward, self._timeout = store, spools, reward, timeout
        self._queue: queue.Queue[_Work | None] = queue.Queue()
        self._error: BaseException | None = None
        self._open = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mgrpo-shipper", daemon=True)
        self._thread.start()

    def ship(self, group: WorkerGroup, played: Played) -> None:
        with self._changed:
            self._open += 1
        self._queue.put(_Work(group, played))

    def drain(self) -> None:
        """Raises DeadlineError when the records are not durable within timeout seconds of the last progress."""
        with self._changed:
            while self._open and self._error is None:
                before = self._open
                self._changed.wait(self._timeout)
                if self._open == before and self._error is None:
                    raise DeadlineError(
                        f"{before} finished rollouts were not taken by the store and the trainers' spools within "
                        f"{self._timeout:g} s"
                    )
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(5.0)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            batch = [work]
            while not self._queue.empty() and (more := self._queue.get()) is not None:
                batch.append(more)
            try:
                self._ship(batch)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._open -= len(batch)
                self._changed.notify_all()

    def _ship(self, batch: list[_Work]) -> None:
        """All spool writes of the batch travel together, then all records: two round trips, however many rollouts.
        The store's client lets a rollout's end leave only after its invocations are acknowledged."""
        deadline = time.monotonic() + self._timeout
        written: list[list[tuple[Trajectory, Future[SpoolRef] | None]]] = [
            [(t, self._append(work.group, t)) for t in _trajectories(work.played.rollout)] for work in batch
        ]
        answers = []
        for work, trajectories in zip(batch, written, strict=True):
            for trajectory, reference in trajectories:
                if reference is not None:
                    ref = reference.result(max(0.0, deadline - time.monotonic()))
                    answers.append(self._invocation(work.group, trajectory, ref))
            answers.append(self._end(work))
        for answer in answers:
            answer.result(max(0.0, deadline - time.monotonic()))

    def _append(self, group: WorkerGroup, trajectory: Trajectory) -> Future[SpoolRef] | None:
        spool = self._spools.get(trajectory.role)
        return spool.append(trajectory, attempt=group.attempt, index=group.index) if spool else None

    def _invocation(self, group: WorkerGroup, trajectory: Trajectory, ref: SpoolRef) -> Future[Answer]:
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
        played, rollout = work.played, work.played.rollout
        if rollout is None:
            return self._store.rollout_fail(work.group, played.ask.rollout, played.failure[:REASON])
        return self._store.rollout_final(
            work.group,
            rollout.rollout,
            reward=self._reward(rollout),
            correct=rollout.correct,
            d_k={role: n for role, n in rollout.d_k().items() if role in self._spools},
            scores=rollout.main.scores,
            versions=rollout.main.version_span(),
        )


def _trajectories(rollout: Rollout | None) -> list[Trajectory]:
    if rollout is None:
        return []
    return [rollout.main, *(t for role in sorted(rollout.invocations) for t in rollout.invocations[role])]
