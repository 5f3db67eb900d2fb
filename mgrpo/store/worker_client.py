"""The store from a rollout worker's side: it opens groups and fills them.

worker = mgrpo.connect(url, role="worker")
group = worker.open_group(query="q7/0", k=8, d_max={"sub": 4}, index=0)
worker.invocation_done(group, 0, role="sub", invocation=0, n_tokens=31, versions=(4, 4), ref=ref)
worker.rollout_final(group, 0, reward=1.0, correct=1.0, d_k={"sub": 1})
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mgrpo.errors import FencedError, GroupClosedError, MgrpoError, RetryAfterError
from mgrpo.store import records as rec
from mgrpo.store.client import SLICE_S, StoreClient
from mgrpo.trajectory_log.format import LogRef
from mgrpo.transport.client import Answer
from mgrpo.transport.codec import Record

log = logging.getLogger("mgrpo.store")
LOOK_SECONDS = 0.25  # between two looks at what the worker waits for: its groups lose no more time than that


@dataclass(slots=True)
class WorkerGroup:
    """An open group in a worker's hands. `finished`: rollouts that already ended and need no replay. `min_versions`: of
    each training role, the oldest version to sample it with. `closed`: the store takes no more of its records, because
    it is complete, its time was up, too few of its rollouts had a reward, or another worker has opened it since; it
    becomes true as soon as a record is refused for that reason."""

    query: str
    index: int
    attempt: int
    state: str
    k: int
    finished: list[int]
    min_versions: dict[str, int] = field(default_factory=dict)
    closed: bool = False
    _waiting: dict[int, list[Future[Answer]]] = field(default_factory=dict)


class WorkerClient(StoreClient):
    """Opens groups and fills them. Records are pipelined: the methods return futures that raise the typed errors, and
    flush raises the first of them. From be_alive() or the first open_group on a background thread tells the store that
    this worker is alive, however long its rollouts take."""

    def __init__(
        self, url: str, role: str = "worker", *, waits: Callable[[], list[str]] = list, **options: Any
    ) -> None:
        """waits: the services that are down and that this worker waits for now, a sentence each. While there are any
        the store closes none of its groups, and people are told. Asked from another thread."""
        self._waits = waits
        self._failed: list[BaseException] = []
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        super().__init__(url, role, **options)

    def close(self) -> None:
        self._stop.set()
        super().close()
        if self._heart is not None:
            self._heart.join(5.0)

    def open_group(
        self, *, query: str, k: int, d_max: Mapping[str, int], index: int,
        meta: Mapping[str, str | int | float | bool | None] | None = None, seed: int = 0,
        policy: Mapping[str, int] | None = None, timeout: float | None = None,
    ) -> WorkerGroup:  # fmt: skip
        """Open group number `index`, or open it again (a new attempt): after a crash of this worker, or of the one that
        had it. Waits while the store refuses it and raises RetryAfterError after `timeout` (0: at once): GroupHeldError
        where another worker has the group and is alive, otherwise because the trainers are too far behind."""
        self.be_alive()
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
                    opened.min_versions, opened.state != "open",
                )  # fmt: skip

    def invocation_done(
        self, group: WorkerGroup, rollout: int, *, role: str, invocation: int = 0, n_tokens: int,
        versions: tuple[int, int] = (-1, -1), scores: Mapping[str, float] | None = None,
        ref: LogRef | None = None,
    ) -> Future[Answer]:  # fmt: skip
        """One trajectory is done and lies in its role's trajectory log at `ref` (role "main": invocation 0)."""
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
        """The rollout ended. Leaves once all its invocations are acknowledged; if one was refused, so is this."""
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
        """Submit `record` when the rollout's invocations are acknowledged. Callbacks run on the link's I/O thread,
        which must not wait for room in its own window: the record's place is taken by submit_later."""
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
            if isinstance(error, (GroupClosedError, FencedError)):
                group.closed = True
            if error is not None:
                self._failed.append(error)

        future.add_done_callback(remember)
        return future

    def be_alive(self) -> None:
        """Give signs of life from now on. Idempotent."""
        if self._heart is None:
            period = (self._params or self.params()).heartbeat_timeout_s / 4
            self._heart = threading.Thread(
                target=self._beat, args=(period,), name=f"mgrpo-heartbeat {self.name}", daemon=True
            )
            self._heart.start()

    def _beat(self, period: float) -> None:
        beaten, waited = time.monotonic(), False
        while not self._stop.wait(min(period, LOOK_SECONDS)):
            waits = list(self._waits())  # as it is now: it may change while this look is told
            if bool(waits) == waited and time.monotonic() - beaten < period:
                continue
            try:
                method = "pause" if waits else "heartbeat"
                self._call(method, None, None, timeout=self.timeout, queue=method)
                if waits and not waited:
                    self.report("phase", {"text": f"worker {self.name} is {waits[0]}"})
                elif waited and not waits:
                    self.report("phase", {"text": f"worker {self.name} goes on: the services answer"})
            except MgrpoError as error:
                if not self._stop.is_set():
                    log.warning("no heartbeat of worker %s: %s", self.name, error)
            beaten, waited = time.monotonic(), bool(waits)
