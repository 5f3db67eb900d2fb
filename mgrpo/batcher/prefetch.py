"""Double buffering: the next batch is planned and assembled while the model computes on the current one.

    wanted = ((step, 8) for step in range(100) for _ in range(2))      # 2 minibatches of 8 groups a step
    with Prefetcher(batcher, wanted, rank=0, timeout=1800) as batches:
        for batch in batches:
            train(batch.plan, batch.buffers)

The core works without the GIL, so a background thread costs the model nothing but memory bandwidth. There are
two sets of buffers; they grow when a plan needs more and are reused otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from mgrpo.alignment import query_name
from mgrpo.batcher.batcher import Batcher
from mgrpo.batcher.plan import Buffers, Plan
from mgrpo.errors import DeadlineError

_SLICE = 0.1  # seconds between looks at close() while waiting for groups


@dataclass(frozen=True, slots=True)
class Batch:
    """A plan and one rank's packed buffers (see Batcher.write), valid until the next batch is asked for."""

    plan: Plan
    buffers: Buffers


class Prefetcher:
    """Iterates over batches. Asking for the next one ends the current: its queries leave the batcher only then, so a
    state_dict taken in between still holds everything that is not trained on.

    wanted: for every batch (step, n_groups) or (step, query names). With a number, the batch takes the first
    ready queries in canonical order, which depends on what has arrived; with names it does not.
    timeout: seconds to wait for one batch; then DeadlineError.
    """

    def __init__(
        self,
        batcher: Batcher,
        wanted: Iterable[tuple[int, int | Sequence[str | int]]],
        *,
        rank: int = 0,
        timeout: float,
        advantages: bool = False,
        position_ids: bool = False,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} is not above 0 s")
        self._batcher, self._rank, self._timeout = batcher, rank, timeout
        self._wanted = iter(wanted)
        self._extra = {"advantages": advantages, "position_ids": position_ids}
        self._pools: list[Buffers] = [{}, {}]
        self._turn = 0
        self._current: Batch | None = None
        self._pending: Future[Batch] | None = None
        self._closed = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mgrpo-prefetch")
        self._submit(())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the prefetcher is closed")
        self._finish_current()
        if self._pending is None:
            raise StopIteration
        try:
            batch = self._pending.result(self._timeout + 2 * _SLICE)
        except FutureTimeoutError as error:
            if isinstance(error, DeadlineError):
                raise
            raise DeadlineError(f"no batch assembled within {self._timeout} s (rank {self._rank})") from error
        self._current = batch
        self._submit(batch.plan.queries)
        return batch

    def _submit(self, in_flight: Sequence[str]) -> None:
        request = next(self._wanted, None)
        self._pending = None
        if request is not None:
            pool = self._pools[self._turn]
            self._turn ^= 1
            self._pending = self._executor.submit(self._assemble, *request, frozenset(in_flight), pool)

    def _assemble(
        self, step: int, wanted: int | Sequence[str | int], in_flight: frozenset[str], pool: Buffers
    ) -> Batch:
        plan = self._batcher.plan(step, queries=self._choose(step, wanted, in_flight))
        buffers = _fit(pool, plan, **self._extra)
        self._batcher.write(plan, self._rank, buffers)
        return Batch(plan, buffers)

    def _choose(self, step: int, wanted: int | Sequence[str | int], in_flight: frozenset[str]) -> list[str]:
        """Wait for the queries of one batch; those of the batch being trained on do not count."""
        deadline = time.monotonic() + self._timeout
        while not self._closed:
            ready = self._batcher.ready()
            if isinstance(wanted, int):
                free = [q for q in ready if q not in in_flight]
                if len(free) >= wanted:
                    return free[:wanted]
                what: str = str(wanted)
                enough: int | Sequence[str | int] = len(ready) + wanted - len(free)
            else:
                if self._batcher.wait_ready(wanted, 0.0):
                    return [query_name(q) for q in wanted]
                what, enough = str(list(wanted)), wanted
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineError(
                    f"step {step}: {what} groups were not ready within {self._timeout} s; "
                    f"{len(ready)} are ready, {len(self._batcher)} begun"
                )
            self._batcher.wait_ready(enough, min(left, _SLICE))
        raise DeadlineError(f"step {step}: the prefetcher was closed while waiting for groups")

    def _finish_current(self) -> None:
        if self._current is not None:
            for query in self._current.plan.queries:
                self._batcher.drop(query)
            self._current = None

    def close(self) -> None:
        """Stop the background thread. The current batch's queries stay in the batcher. Idempotent."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fit(pool: Buffers, plan: Plan, **extra: bool) -> Buffers:
    """The pool's buffers, cut to the plan's micro-batches; a buffer that is too small is replaced by a larger
    one."""
    views: Buffers = {}
    for name, (shape, dtype) in plan.buffer_shapes(**extra).items():
        old = pool.get(name)
        if old is None or len(old) < shape[0] or old.shape[1:] < shape[1:]:
            grown = tuple(
                max(a, b) for a, b in zip(shape, old.shape if old is not None else shape, strict=True)
            )
            pool[name] = np.empty(grown, dtype)
        views[name] = pool[name][: shape[0]]
    return views
