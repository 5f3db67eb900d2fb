"""A rollout worker: admission -> newest weights -> a rollout batch -> tokens and numbers shipped.

A rollout batch is the groups of one step that the store admits together; all its rollouts are played at once, batched
by the engines. Which questions it holds follows from (seed, index) alone, and a restarted worker plays the unfinished
one again as a whole: the same batches, so the same tokens to the last bit, of which only the missing ones are shipped.

Worker 0 also validates the start before RL and evaluates: with the weights of a step, between two rollout batches.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig, config_digest
from mgrpo.credit import check_scores, trajectory_reward
from mgrpo.environments.episode import mix
from mgrpo.environments.failure import encodable, shortened
from mgrpo.environments.task import Question, Split, Task
from mgrpo.errors import (
    ConfigError,
    DeadlineError,
    GroupClosedError,
    InfrastructureError,
    MgrpoError,
    RetryAfterError,
)
from mgrpo.pipeline.play import (
    Accuracy,
    RolloutRequest,
    RolloutResult,
    all_failed,
    evaluate,
    play_all,
    question_of,
)
from mgrpo.pipeline.rollout_metrics import RolloutMetrics
from mgrpo.pipeline.shipper import Shipper
from mgrpo.pipeline.team import WAIT_SLICE, Team
from mgrpo.pipeline.worker_loop import Shutdown, WorkerLoop
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.store.records import World
from mgrpo.store.worker_client import WorkerClient, WorkerGroup
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.transport.client import Client
from mgrpo.transport.codec import Sender
from mgrpo.transport.keys import client_keys
from mgrpo.types import MAIN, Rollout

MAX_FAILED_BATCHES = 3  # a batch can be one question that nothing answers; that many in a row are an outage
EVAL_SEED = 0x65_76_61_6C  # evaluation noise is the same in every run and at every step
STOP_SECONDS = 10.0  # for one answer of a peer, once the process is asked to stop


RolloutBatch = list[tuple[WorkerGroup, Question]]


class RolloutWorker:
    """Use as a context manager; leaving it closes every connection."""

    def __init__(
        self, config: RunConfig, number: int, task: Task, addresses: Addresses, folder: Path
    ) -> None:
        """folder: this worker's own, for its record."""
        torch.set_num_threads(config.rollout.threads)
        self._config, self._number, self._task = config, number, task
        self._timeout = config.store.timeout
        digest = config_digest(config)
        key = client_keys(addresses, "worker")
        self._store = WorkerClient(
            addresses.store, "worker", name=f"rollout-{number}", run=digest, timeout=self._timeout, key=key
        )
        sender = Sender(digest, "worker", f"rollout-{number}", "")
        self._clients = {
            role: Client(url, peer=f"trainer {role}", timeout=self._timeout, sender=sender, security=key)
            for role, url in addresses.agents.items()
        }
        self._logs = {
            role: TrajectoryLogClient(
                addresses.agents[role], digest=digest, role=role, timeout=self._timeout, security=key
            )
            for role in config.training_roles
        }
        self._shipper = Shipper(self._store, self._logs, self._main_reward, self._timeout)
        self._recorder = RolloutRecorder(config.record, folder, self._log)
        self._loop = WorkerLoop(lambda: self._store.world().control.state == "running")
        self._team = Team(config, addresses, self._clients, self._loop)
        self._cursor = number  # index of the next group this worker may open
        self._evaluated = -1  # step of the last evaluation
        self._skipped = 0  # groups that the store had closed incomplete, since the last report
        self._scored: set[str] = set()  # roles whose scores have fitted their reward
        self._failed_batches = 0  # batches without a rollout since the last one that had some

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shipper.stop()
        for trajectory_log in self._logs.values():
            trajectory_log.close()
        for client in self._clients.values():
            client.close()
        self._store.close()
        self._shipper.close()
        self._recorder.close()
        self._loop.close(self._team.close())

    def run(self) -> None:
        """Roll out until every trainer has made its last step, the run is stopped, or stop() was called."""
        try:
            self._team.connect(self._log, self._recorder.tokenizer)
            version = self._wait_for_version(0)
            if self._number == 0 and version == 0 and not self._validate_start():
                return
            self._cursor += version * self._config.trainer.questions // self._workers * self._workers
            idle_since = time.monotonic()
            while (version := self._published()) < self._config.trainer.steps:
                self._loop.check_stop()
                if batch := self._open_batch():
                    self._play(batch)
                    idle_since = time.monotonic()
                else:
                    self._wait_a_little(version + 1, idle_since)
            if self._number == 0:
                self._finish(version)
        except Shutdown:
            return
        except MgrpoError:
            if not self._loop.stopped:  # otherwise it was cut short by stop()
                raise

    # -- stages ------------------------------------------------------------------------------------------------

    def _validate_start(self) -> bool:
        """Validate the policies RL starts from; False ends the run. A run that skips this goes on, and is not valid."""
        n = self._config.eval.start_validation
        self._team.sync({})
        self._evaluate("heldout", 0)
        self._evaluate("validation", 0)
        if not n:
            self._store.report(
                "start_validation",
                {"valid": False, "figures": {}, "text": "skipped (eval.start_validation = 0): not valid"},
            )
            return True
        report = self._loop.run(self._task.validate_start(self._team.agents, n, self._config.seed))
        figures = {name: list(values) for name, values in report.figures.items()}
        self._store.report(
            "start_validation", {"valid": report.valid, "figures": figures, "text": str(report)}
        )
        if not report.valid:
            self._store.set_control("stopping", f"not a valid start, RL was not begun: {report}")
        return report.valid

    def _open_batch(self) -> RolloutBatch:
        """The groups that the store admits now, at most one step's share; [] when there is no work yet.

        Groups that are complete already (after a restart) stay in the batch as long as one of it is not, so that the
        engines see the batches they saw before. What the store has closed incomplete is left out.
        """
        share = max(1, self._config.trainer.questions // self._workers)
        while True:
            batch: RolloutBatch = []
            opened = 0
            while opened < share and not self._is_beyond_the_run(self._cursor + opened * self._workers):
                index = self._cursor + opened * self._workers
                question = question_of(self._task, index, self._config.seed)
                try:
                    group = self._open_group(index, question)
                except RetryAfterError:
                    break
                opened += 1
                if group is None or (_is_closed(group) and len(group.finished) < group.k):
                    self._skipped += 1
                else:
                    batch.append((group, question))
            self._cursor += opened * self._workers
            if any(len(group.finished) < group.k for group, _ in batch) or not opened:
                return batch

    def _open_group(self, index: int, question: Question) -> WorkerGroup | None:
        """Group number `index`, opened again after a restart; None where the store has closed it."""
        try:
            return self._store.open_group(
                query=f"{index // self._config.trainer.questions}/{index}",
                k=self._config.trainer.group_size,
                d_max={role: self._config.agents[role].d_max for role in self._config.roles},
                index=index,
                meta={"question": shortened(question.text[:200])},
                seed=self._config.seed,
                timeout=0.0,
            )
        except GroupClosedError:
            return None

    def _is_beyond_the_run(self, index: int) -> bool:
        """No step will claim this group: it comes after those of the last step, and no group that was lost to some role
        left room."""
        planned = self._config.trainer.steps * self._config.trainer.questions
        if index < planned:
            return False
        return index >= planned + max(int(role["skipped"]) for role in self._store.stats()["roles"].values())

    def _play(self, batch: RolloutBatch) -> None:
        min_versions = {
            role: max(group.min_versions.get(role, 0) for group, _ in batch)
            for role in self._config.training_roles
        }
        version = self._team.sync(min_versions)
        if self._number == 0:
            self._evaluate_if_due(version)
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
                self._record(group, result)
                self._shipper.ship(group, result)

        self._loop.run(
            play_all(
                self._task,
                requests,
                self._team.agents,
                lambda request: self._seed(groups[request.query].index),
                done,
                self._check_rewards,
            )
        )
        self._shipper.drain(self._loop.check_stop)
        self._check_outage(metrics, len(requests))
        closed = self._skipped + self._shipper.closed_groups()
        self._skipped = 0
        report = metrics.report(time.monotonic() - began) | {"rollout/closed_groups": closed}
        self._store.report("rollouts", {"step": version, "metrics": report})

    def _check_outage(self, metrics: RolloutMetrics, rollouts: int) -> None:
        """Raise InfrastructureError after MAX_FAILED_BATCHES batches in a row of which no rollout is left: the next one
        would fare no better."""
        self._failed_batches = self._failed_batches + 1 if metrics.failed.total() == rollouts else 0
        if self._failed_batches == MAX_FAILED_BATCHES:
            where = f"each of {MAX_FAILED_BATCHES} rollout batches"
            raise InfrastructureError(all_failed(rollouts, where, metrics.failure))

    def _finish(self, version: int) -> None:
        """The last evaluation, with the weights of the last step; then the run is over."""
        self._team.sync(dict.fromkeys(self._config.training_roles, version))
        self._evaluate("validation", version)
        self._evaluate("heldout", version)
        self._store.set_control("finished", "all steps done")

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate_if_due(self, version: int) -> None:
        every = self._config.eval.every
        if version and version // every > max(0, self._evaluated) // every:
            self._evaluate("validation", version)

    def _evaluate(self, split: Split, step: int) -> None:
        n = self._config.eval.validation if split == "validation" else self._config.eval.heldout
        questions = self._task.questions(split, n)

        def accuracy(greedy: bool) -> Accuracy:
            mode = "greedy" if greedy else "sampled"

            def seen(number: int, result: RolloutResult) -> None:
                asked = _asked(result.request.question)
                self._recorder.evaluation(step, split, mode, number, asked, result.rollout)

            return self._loop.run(
                evaluate(
                    self._task,
                    questions,
                    self._team.agents,
                    greedy=greedy,
                    seed=EVAL_SEED,
                    seen=seen,
                    accept=self._check_rewards,
                )
            )

        greedy, sampled = accuracy(True), accuracy(False)
        self._evaluated = step
        self._store.report(
            "eval",
            {
                "step": step,
                "split": split,
                "n": len(questions),
                "greedy": greedy.mean,
                "sampled": sampled.mean,
                "failed": greedy.failed + sampled.failed,
                "d_k": {role: {str(d): n for d, n in sorted(h.items())} for role, h in sampled.calls.items()},
            },
        )

    def _record(self, group: WorkerGroup, result: RolloutResult) -> None:
        step = group.index // self._config.trainer.questions
        request = result.request
        self._recorder.train(
            step,
            group.index,
            group.query,
            request.rollout,
            _asked(request.question),
            result.rollout,
            result.failure,
        )

    # -- helpers -------------------------------------------------------------------------------------------------

    @property
    def _workers(self) -> int:
        return self._config.rollout.workers

    def _seed(self, index: int) -> int:
        return mix(self._config.seed, index)

    def _log(self, line: str) -> None:
        self._store.report("phase", {"text": line})

    def _main_reward(self, rollout: Rollout) -> float:
        weights = self._config.agents[MAIN].reward
        return trajectory_reward(MAIN, weights, rollout.main.scores, rollout.correct)

    def _check_rewards(self, rollout: Rollout) -> None:
        """Raise for a rollout that could not be paid. Where the names of its scores never fitted the reward, that would
        be so in every rollout: ConfigError. Where they did, or the task declared them, it is this rollout's failure."""
        for t in rollout.trajectories():
            try:
                check_scores(t.role, self._config.agents[t.role].reward, t.scores)
            except ConfigError as error:
                if t.role in self._task.scores or t.role in self._scored:
                    raise ValueError(str(error)) from None
                raise
            self._scored.add(t.role)

    def _published(self) -> int:
        """The oldest version that the training roles have published (-1 before the first)."""
        return _oldest(self._store.world())

    def _wait_for_version(self, version: int) -> int:
        """The oldest published version, once it is at least `version`."""
        began = time.monotonic()
        while (published := self._published()) < version:
            self._wait_a_little(version, began)
        return published

    def _wait_a_little(self, version: int, since: float) -> None:
        """Wait for a version, but not for long: a dropped group may have left room for another one meanwhile. Raises
        DeadlineError when nothing has come for idle_timeout seconds."""
        if time.monotonic() - since > self._config.store.idle_timeout:
            raise DeadlineError(
                f"worker {self._number}: version {version} of {', '.join(self._config.training_roles)} was not "
                f"published within {self._config.store.idle_timeout:g} s"
            )
        with contextlib.suppress(DeadlineError):
            wanted = dict.fromkeys(self._config.training_roles, version)
            self._store.wait(versions=wanted, timeout=WAIT_SLICE)
        self._loop.check()

    def stop(self) -> None:
        """End as soon as possible: what is being played is cancelled. A signal handler may call it."""
        # Where the store has ended too (the launcher was killed), its answer is not waited for as long as usual.
        self._loop.stop()
        self._store.shorten_deadlines(STOP_SECONDS)
        for client in self._clients.values():
            client.shorten_deadlines(STOP_SECONDS)


def run_worker(config: RunConfig, number: int, task: Task, addresses: Addresses, folder: Path) -> None:
    """Run rollout worker `number` until the run is over; its record goes to `folder`."""
    worker = RolloutWorker(config, number, task, addresses, folder)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        worker.stop()

    signal.signal(signal.SIGTERM, on_sigterm)
    with worker:
        worker.run()


def _is_closed(group: WorkerGroup) -> bool:
    """Whether the store takes nothing more for this group."""
    return group.state != "open"


def _asked(question: Question) -> tuple[str, str]:
    """A question and its gold answer, as the record can write them."""
    return encodable(str(question.text)), encodable(str(question.answer))


def _oldest(world: World) -> int:
    return min(-1 if role.version is None else role.version for role in world.roles)
