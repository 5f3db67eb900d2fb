"""Rollouts in batches, the way of trainer.max_lag = 0: synchronous, and reproducible to the last bit.

    admission -> newest weights -> a rollout batch -> tokens and numbers shipped -> the next

A rollout batch is the groups of one step that the store admits together; all its rollouts are played at once, batched
by the engines. Which questions it holds follows from (seed, index) alone, and a restarted worker plays the unfinished
one again as a whole: the same batches, so the same tokens to the last bit, of which only the missing ones are shipped.
"""

from __future__ import annotations

import time

from mgrpo.environments.task import Question
from mgrpo.errors import InfrastructureError, RetryAfterError
from mgrpo.pipeline.evaluations import Evaluations
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, all_failed, play_all
from mgrpo.pipeline.rollout_metrics import RolloutMetrics
from mgrpo.pipeline.worker_context import MAX_FAILED_BATCHES, WorkerContext, is_closed
from mgrpo.profiling.window import begin_step, end_step
from mgrpo.services.counters import take
from mgrpo.store.worker_client import WorkerGroup

RolloutBatch = list[tuple[WorkerGroup, Question]]


class BatchRollouts:
    """Plays one worker's share of each step."""

    def __init__(self, context: WorkerContext, evaluations: Evaluations) -> None:
        self._context, self._evaluations = context, evaluations
        self._config, self._store = context.config, context.store
        self._cursor = context.number  # index of the next group this worker may open
        self._skipped = 0  # groups that the store had closed incomplete, since the last report
        self._failed_batches = 0  # batches without a rollout since the last one that had some
        self._reported_at = time.monotonic()

    def run(self, version: int) -> int:
        """Play until every trainer has made its last step; the version then published. version: published now."""
        self._cursor += version * self._config.trainer.pool // self._workers * self._workers
        self._reported_at = idle_since = time.monotonic()
        context = self._context
        while (version := context.published()) < self._config.trainer.steps:
            context.loop.check_stop()
            if batch := self._open_batch():
                context.waited()
                self._play(batch)
                idle_since = time.monotonic()
            else:
                context.wait_a_little(version + 1, idle_since)
        context.waited()
        return version

    def _open_batch(self) -> RolloutBatch:
        """The groups that the store admits now, at most one step's share; [] when there is no work yet.

        Groups that are complete already (after a restart) stay in the batch as long as one of it is not, so that the
        engines see the batches they saw before. What the store has closed incomplete is left out.
        """
        context = self._context
        while True:
            batch: RolloutBatch = []
            opened = 0
            while opened < context.share:
                index = self._cursor + opened * self._workers
                if context.is_beyond_the_run(index):
                    break
                try:
                    found = context.open_group(index)
                except RetryAfterError:
                    break
                opened += 1
                if found is None or (is_closed(found[0]) and len(found[0].finished) < found[0].k):
                    self._skipped += 1
                else:
                    batch.append(found)
            self._cursor += opened * self._workers
            if any(len(group.finished) < group.k for group, _ in batch) or not opened:
                return batch

    def _play(self, batch: RolloutBatch) -> None:
        context = self._context
        min_versions = {
            role: max(group.min_versions.get(role, 0) for group, _ in batch)
            for role in self._config.training_roles
        }
        version = context.team.sync(min_versions)
        begin_step(version + 1, context.log)
        if context.number == 0 and self._evaluations.due(version):
            context.loop.run(self._evaluations.run_due(version))
        began = time.monotonic()
        groups = {group.query: group for group, _ in batch}
        requests = [
            RolloutRequest(group.query, question, k) for group, question in batch for k in range(group.k)
        ]
        metrics = RolloutMetrics()

        async def done(result: RolloutResult) -> None:
            metrics.take(result)
            group = groups[result.request.query]
            if result.request.rollout not in group.finished:
                context.deliver(group, result)

        context.loop.run(
            play_all(
                context.task,
                requests,
                context.team.agents,
                lambda request: context.seed(groups[request.query].index),
                done,
                context.check_rewards,
                self._config.rollout.deadline,
            )
        )
        context.shipper.drain(context.loop.check_stop)
        end_step(version + 1)
        self._check_outage(metrics, len(requests))
        self._report(version, metrics, len(requests), time.monotonic() - began)

    def _report(self, version: int, metrics: RolloutMetrics, rollouts: int, seconds: float) -> None:
        """seconds: of the batch. Its rollouts' places count as busy or not since the batch before it ended."""
        now = time.monotonic()
        report = metrics.report(seconds) | {
            "rollout/time/batch": seconds,
            "rollout/perf/busy": metrics.seconds / ((now - self._reported_at) * rollouts),
            "rollout/closed_groups": float(self._skipped + self._context.shipper.closed_groups()),
            **take(),
        }
        self._skipped, self._reported_at = 0, now
        self._store.report("rollouts", {"step": version, "metrics": report})

    def _check_outage(self, metrics: RolloutMetrics, rollouts: int) -> None:
        """Raise InfrastructureError after MAX_FAILED_BATCHES batches in a row of which no rollout is left: the next one
        would fare no better."""
        self._failed_batches = self._failed_batches + 1 if metrics.failed.total() == rollouts else 0
        if self._failed_batches == MAX_FAILED_BATCHES:
            where = f"each of {MAX_FAILED_BATCHES} rollout batches"
            raise InfrastructureError(all_failed(rollouts, where, metrics.failure))

    @property
    def _workers(self) -> int:
        return self._config.rollout.workers
