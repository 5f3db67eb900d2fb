"""A trainer's next step in the making: claimed, read and built on a thread while the policy trains on the step before.

    take(s): begin(s + 1) ----> claim -> read -> build          (thread)
             train on s -> apply -> publish -> record -> take(s + 1)   (main)

One thread serves all role streams of a trainer, and it is one step ahead at most. In a synchronous run it does little
but wait: the groups of the next step are sampled with the weights that this one makes. Groups that were claimed ahead
when a trainer ends stay leased, until its successor's resume gives them back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from mgrpo.pipeline.batch import StepBatch
from mgrpo.pipeline.role_stream import POLL_SECONDS, RoleStream
from mgrpo.record import spans


class Closed(Exception):
    """The trainer wants no further step."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One step, a batch for each role stream. hidden: seconds of each part of the work that passed before the trainer
    began to wait for it."""

    batches: Sequence[StepBatch]
    hidden: dict[str, float]


class StepAhead:
    """Prepares one step after the other. All methods are for the trainer's main thread."""

    def __init__(self, streams: Sequence[RoleStream], steps: int) -> None:
        """steps: of the run; none beyond the last is claimed."""
        self._streams, self._steps = streams, steps
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mgrpo-ahead")
        self._next: Future[tuple[list[StepBatch], list[_Part]]] | None = None
        self._wanted, self._closing = threading.Event(), threading.Event()

    def begin(self, step: int) -> None:
        """Prepare `step`, unless it is beyond the last one."""
        self._next = self._executor.submit(self._prepare, step) if step < self._steps else None

    def take(self, step: int, check: Callable[[], None]) -> PreparedStep:
        """Wait for `step`, which was begun, and begin the one after it. check: called about once a second, raises to
        stop waiting. Raises what the preparation raised; its waits have the deadlines."""
        if self._next is None:
            raise ValueError(f"step {step} was not begun, the run has {self._steps}")
        began = spans.now()
        self._wanted.set()
        while not wait([self._next], POLL_SECONDS).done:
            check()
        self._wanted.clear()
        batches, parts = self._next.result()
        self.begin(step + 1)
        hidden = {part.name: 0.0 for part in parts}
        for part in parts:
            hidden[part.name] += max(0, min(part.ended, began) - part.began) / 1e9
        return PreparedStep(batches, hidden)

    def stop(self) -> None:
        """End the preparation at its next look, without waiting for that."""
        self._closing.set()

    def close(self) -> None:
        """Wait for the end of the thread; soon where the streams' stores are closed. Idempotent."""
        self.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)

    # -- on the thread -------------------------------------------------------------------------------------------

    def _prepare(self, step: int) -> tuple[list[StepBatch], list[_Part]]:
        marks = [spans.now()]
        claimed = [stream.claim(step, self._is_wanted) for stream in self._streams]
        marks.append(spans.now())
        both = list(zip(self._streams, claimed, strict=True))
        read = [stream.builder.read(step, groups) for stream, groups in both]
        marks.append(spans.now())
        batches = [stream.builder.assemble(seen) for stream, seen in zip(self._streams, read, strict=True)]
        marks.append(spans.now())
        parts = [_Part(name, *marks[n : n + 2]) for n, name in enumerate(("claim", "read", "build"))]
        args: spans.Args = {"step": step}
        for part in parts:
            more: spans.Args = {"groups": sum(map(len, claimed))} if part.name == "claim" else {}
            name = self._streams[0].role
            spans.add(part.name, name, spans.AHEAD_LANE, part.began, part.ended, args | more)
        return batches, parts

    def _is_wanted(self) -> bool:
        if self._closing.is_set():
            raise Closed
        return self._wanted.is_set()


@dataclass(frozen=True, slots=True)
class _Part:
    """Times in ns by spans.now()."""

    name: str
    began: int
    ended: int
