"""What a process did and when: named spans of time, kept beside its record.

    with spans.span("tool", "search", lane=rollout) as args: ...        a span of the process that records
    spans.add("turn", "main", rollout, start, end, {"sampled": 41})     one whose times are known

A process has one SpanLog at most, named by record_to(); without one nothing is kept, and a span costs a look. Times are
Unix nanoseconds on a clock that never goes back: spans of one process nest exactly, those of two servers as well as
their clocks agree. `mgrpo trace` and the run page read them (span_reader.py).

    kind         lane            what it is (args)
    rollout      its id          from its start to its end, all attempts (split, status, failed_by, correct, attempts)
    invocation   its rollout     one conversation from open() to its end (role, invocation, attempt)
    turn         its rollout     one request to an engine (role, invocation, attempt, turn, context, sampled, version)
    tool         its rollout     one call with Episode.tool (attempt, retries, failed)
    fetch        weights <role>  a version on its way to a worker (version, label)
    update       weights <role>  it is loaded into the engine (version, label)
    evaluation   evaluation      questions of an evaluation are played (step)
    wait         main            the process waits for others (step)
    step         main            one RL step of a trainer, its parts inside (step)
    train        main            the optimizer steps of it (step)
    apply        main            the store accounts for the step's groups (step)
    publish      main            weights are served and announced (version, label)
    checkpoint   main            a checkpoint is begun, or one is waited for (step)
    report       main            the record of the step before is waited for (step)
    stage        main            forward, head, backward, reduce, optimizer ... within train (profiling/stages.py)
    claim        ahead           groups of a step are claimed at the store (step, groups)
    read, build  ahead           their tokens are read, their batch is built (step)
    record       record          a step's record and reports are written (step)
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mgrpo.config.record import RecordConfig
from mgrpo.errors import MgrpoError
from mgrpo.record.writer import RecordWriter, Report

FOLDER = "spans"
MAIN_LANE, AHEAD_LANE, RECORD_LANE, EVALUATION_LANE = "main", "ahead", "record", "evaluation"
FLUSH_NS = 1_000_000_000  # between two writes: what a killed process loses
_EPOCH = time.time_ns() - time.perf_counter_ns()

Args = dict[str, int | float | str]


class Span(msgspec.Struct, array_like=True, gc=False):
    """Something that took from `start` to `end`, in Unix ns."""

    kind: str
    name: str
    lane: str  # spans of a lane that overlap without nesting were concurrent
    start: int
    end: int
    args: Args = {}


class SpansHead(msgspec.Struct, tag="spans", gc=False):
    """Of a frame of spans: its body is list[Span], in the order in which they ended."""

    process: str  # "rollout-0", "trainer main"
    first: int  # earliest start, Unix ns
    last: int  # latest end


def now() -> int:
    """Unix ns, monotonic within the process."""
    return _EPOCH + time.perf_counter_ns()


class SpanLog:
    """Writes one process's spans to <folder>/spans; does nothing where recording is switched off. Thread-safe. Raises
    nothing for a disk that is full or gone, nor where that cannot be reported, and leaves out a span that MessagePack
    cannot hold."""

    def __init__(self, config: RecordConfig, folder: Path, process: str, report: Report) -> None:
        """folder: of the process's record. report: takes one line when recording has to stop."""
        wanted = config.enabled and config.spans

        def line(text: str) -> None:
            with contextlib.suppress(
                MgrpoError
            ):  # whoever ends a span has no part in what became of its record
                report(text)

        self._writer = RecordWriter(folder / FOLDER, int(config.max_mb * 1e6), line) if wanted else None
        self._process = process
        self._waiting: list[Span] = []
        self._flushed = now()
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        return self._writer is not None and self._writer.active

    def add(self, span: Span) -> None:
        if not self.active:
            return
        with self._lock:  # against a flush on another thread, which would leave it out
            self._waiting.append(span)
        if span.end - self._flushed > FLUSH_NS:
            self.flush()

    def flush(self) -> None:
        """Write what has ended."""
        with self._lock:
            self._flushed = now()
            waiting, self._waiting = self._waiting, []
            if not waiting or not self.active:
                return
            try:
                body = msgspec.msgpack.encode(waiting)
            except _UNWRITABLE:
                waiting = [span for span in waiting if _can_be_written(span)]
                body = msgspec.msgpack.encode(waiting)
            if waiting and self._writer is not None:
                head = SpansHead(
                    self._process, min(span.start for span in waiting), max(span.end for span in waiting)
                )
                self._writer.append(0, msgspec.msgpack.encode(head), body)

    def close(self) -> None:
        """Idempotent."""
        self.flush()
        with self._lock:  # against a flush on a thread that outlives the log
            if self._writer is not None:
                self._writer.close()


_UNWRITABLE = (TypeError, ValueError, OverflowError)  # such as a name with half a surrogate pair


def _can_be_written(span: Span) -> bool:
    """Names are a task's own, and whoever ends a span has no part in another one's."""
    try:
        msgspec.msgpack.encode(span)
    except _UNWRITABLE:
        return False
    return True


_log: SpanLog | None = None


def record_to(log: SpanLog | None) -> None:
    """The spans of this process go to `log` from now on; None: nowhere."""
    global _log
    _log = log


def stop_recording(log: SpanLog) -> None:
    """The spans of this process do not go to `log` any more; those that go to another one still do."""
    global _log
    if _log is log:
        _log = None


def recording() -> bool:
    """Whether spans of this process are kept."""
    log = _log
    return log is not None and log.active


def add(kind: str, name: str, lane: str, start: int, end: int, args: Args | None = None) -> None:
    """Keep a span whose times, by now(), are known."""
    log = _log  # another thread may set it to None
    if log is not None:
        log.add(Span(kind, name, lane, start, end, args or {}))


@contextlib.contextmanager
def span(kind: str, name: str, lane: str = MAIN_LANE, args: Args | None = None) -> Iterator[Args]:
    """Keep what the block takes, also where it raises. Yields the span's args, to which the block may add."""
    known: Args = {} if args is None else args
    start = now()
    try:
        yield known
    finally:
        add(kind, name, lane, start, now(), known)
