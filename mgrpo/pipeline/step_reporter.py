"""What is written of a step, beside the next one: its record for replay, and its metrics for the store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from mgrpo.errors import DeadlineError
from mgrpo.pipeline.batch import StepBatch
from mgrpo.pipeline.role_stream import RoleStream
from mgrpo.record import spans
from mgrpo.record.schema import StepSettings

WRITE_SECONDS = 600.0  # for one step's record and reports


class StepReporter:
    """Records and reports steps in order on a thread. One step is in its hands at most: the next one waits."""

    def __init__(self, streams: Sequence[RoleStream]) -> None:
        self._streams = streams
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mgrpo-report")
        self._writing: Future[None] | None = None

    def submit(
        self,
        batches: Sequence[StepBatch],
        learned: Mapping[str, float],
        settings: StepSettings,
        times: Mapping[str, float],
    ) -> None:
        """Write a step: `batches`, one a role stream, and their metrics with those of training. times: metrics that
        are reported and not recorded. Raises what the step before raised; see flush()."""
        self.flush()
        self._writing = self._executor.submit(self._write, batches, learned, settings, times)

    def flush(self) -> None:
        """Wait until the last step is written; raises what that raised, or DeadlineError."""
        writing = self._writing
        if writing is None:
            return
        if not wait([writing], WRITE_SECONDS).done:
            raise DeadlineError(
                f"trainer {self._streams[0].role}: a step's record and reports were not written within "
                f"{WRITE_SECONDS:g} s"
            )
        self._writing = None
        writing.result()

    def close(self) -> None:
        """Wait until what was submitted is written, well or not. Idempotent."""
        self._executor.shutdown(wait=True)

    def _write(
        self,
        batches: Sequence[StepBatch],
        learned: Mapping[str, float],
        settings: StepSettings,
        times: Mapping[str, float],
    ) -> None:
        with spans.span("record", self._streams[0].role, spans.RECORD_LANE, {"step": batches[0].step}):
            began = time.monotonic()
            for stream, batch in zip(self._streams, batches, strict=True):
                stream.recorder.step(batch, {**batch.metrics, **learned}, settings)
            times = {**times, "time/hidden_record": time.monotonic() - began}
            for stream, batch in zip(self._streams, batches, strict=True):
                metrics = {**batch.metrics, **learned, **times}
                named = {f"{stream.role}/{name}": float(value) for name, value in metrics.items()}
                payload = {"role": stream.role, "step": batch.step + 1, "metrics": named}
                self._streams[0].store.report("step", payload)
