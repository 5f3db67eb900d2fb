"""A rollout worker: preflight -> start validation -> rollouts, in batches or streaming -> the last evaluation.

How rollouts are played follows from trainer.max_lag: 0 plays one step's share after the other (batch_rollouts.py),
reproducible to the last bit; from 1 on they stream (streaming.py). Worker 0 also validates the start before RL, and
evaluates (evaluations.py).
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig, config_digest
from mgrpo.environments.lifetime import close_task, preflight
from mgrpo.environments.task import Split, Task
from mgrpo.errors import MgrpoError
from mgrpo.pipeline.batch_rollouts import BatchRollouts
from mgrpo.pipeline.evaluations import Evaluations
from mgrpo.pipeline.shipper import Shipper
from mgrpo.pipeline.streaming import Streaming
from mgrpo.pipeline.team import Team
from mgrpo.pipeline.worker_context import WorkerContext, main_reward
from mgrpo.pipeline.worker_loop import Shutdown, WorkerLoop
from mgrpo.record import spans
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.services.outage import outages
from mgrpo.store.worker_client import WorkerClient
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.transport.client import Client
from mgrpo.transport.codec import Sender
from mgrpo.transport.keys import client_keys

STOP_SECONDS = 10.0  # for one answer of a peer, once the process is asked to stop


class RolloutWorker:
    """Use as a context manager; leaving it closes every connection."""

    def __init__(
        self, config: RunConfig, number: int, task: Task, addresses: Addresses, folder: Path
    ) -> None:
        """folder: this worker's own, for its record."""
        torch.set_num_threads(config.rollout.threads)
        digest, name, timeout = config_digest(config), f"rollout-{number}", config.store.timeout
        key = client_keys(addresses, "worker")
        store = WorkerClient(
            addresses.store, "worker", name=name, run=digest, timeout=timeout, key=key, waits=outages
        )
        sender = Sender(digest, "worker", name, "")
        self._clients = {
            role: Client(url, peer=f"trainer {role}", timeout=timeout, sender=sender, security=key)
            for role, url in addresses.agents.items()
        }
        self._logs = {
            role: TrajectoryLogClient(
                addresses.agents[role], digest=digest, role=role, timeout=timeout, security=key
            )
            for role in config.training_roles
        }
        loop = WorkerLoop(lambda: self._context.store.world().control.state == "running")
        self._context = WorkerContext(
            config,
            number,
            task,
            store,
            Shipper(store, self._logs, main_reward(config), timeout),
            RolloutRecorder(config.record, folder, lambda line: self._context.log(line)),
            Team(config, addresses, self._clients, loop),
            loop,
        )
        self._spans = spans.SpanLog(config.record, folder, name, lambda line: self._context.log(line))
        spans.record_to(self._spans)
        self._evaluations = Evaluations(self._context)
        self._streaming: Streaming | None = None

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context = self._context
        context.waited()
        self._spans.flush()  # while the store still takes a line that the disk is full
        context.shipper.stop()
        for trajectory_log in self._logs.values():
            trajectory_log.close()
        for client in self._clients.values():
            client.close()
        context.store.close()
        context.shipper.close()
        context.recorder.close()
        if self._streaming is not None:
            self._streaming.close()
        context.loop.close(self._close())
        spans.stop_recording(self._spans)
        self._spans.close()

    def run(self) -> None:
        """Roll out until every trainer has made its last step, the run is stopped, or stop() was called."""
        context = self._context
        try:
            context.team.connect(context.log, context.recorder.tokenizer)
            if context.number == 0:
                self._evaluations.prepare()
                context.loop.run(
                    preflight(context.task, context.config.task.label, context.config.store.idle_timeout)
                )
            version = self._wait_for_version(0)
            if context.number == 0 and version == 0 and not self._validate_start():
                return
            version = self._stream() if context.config.trainer.max_lag else self._play_batches(version)
            if context.number == 0:
                self._finish(version)
        except Shutdown:
            return
        except MgrpoError:
            if not context.loop.stopped:  # otherwise it was cut short by stop()
                raise

    # -- stages ------------------------------------------------------------------------------------------------

    def _play_batches(self, version: int) -> int:
        return BatchRollouts(self._context, self._evaluations).run(version)

    def _stream(self) -> int:
        context = self._context
        context.team.sync({})
        self._streaming = Streaming(context, self._evaluations)
        version = context.loop.run(self._streaming.run())
        context.shipper.drain(context.loop.check_stop)
        return version

    def _validate_start(self) -> bool:
        """Validate the policies RL starts from; False ends the run. A run that skips this goes on, and is not valid."""
        context = self._context
        n = context.config.eval.start_validation
        context.store.be_alive()  # before it opens a group: the evaluation may wait for a service
        context.team.sync({})
        self._evaluate("heldout", "validation", step=0)
        context.loop.run(self._evaluations.run_sets(0))
        if not n:
            context.store.report(
                "start_validation",
                {
                    "valid": False,
                    "figures": {},
                    "text": "skipped (eval.start_validation = 0), the run counts as not validated",
                },
            )
            return True
        with spans.span("evaluation", "start validation", spans.EVALUATION_LANE, {"step": 0}):
            report = context.loop.run(
                context.task.validate_start(context.team.agents, n, context.config.seed)
            )
        figures = {name: list(values) for name, values in report.figures.items()}
        context.store.report(
            "start_validation", {"valid": report.valid, "figures": figures, "text": str(report)}
        )
        if not report.valid:
            context.store.set_control("stopping", f"not a valid start, RL was not begun: {report}")
        return report.valid

    def _finish(self, version: int) -> None:
        """The last evaluation, with the weights of the last step; then the run is over."""
        context = self._context
        context.team.sync(dict.fromkeys(context.config.training_roles, version))
        self._evaluate("validation", "heldout", step=version)
        context.loop.run(self._evaluations.run_sets(version))
        context.store.set_control("finished", "all steps done")

    def _evaluate(self, *splits: Split, step: int) -> None:
        for split in splits:
            self._context.loop.run(self._evaluations.run(split, step))

    async def _close(self) -> None:
        """The last work on the worker's loop."""
        try:
            await self._context.team.close()
        finally:
            await close_task(self._context.task)

    def _wait_for_version(self, version: int) -> int:
        """The oldest published version, once it is at least `version`."""
        began = time.monotonic()
        while (published := self._context.published()) < version:
            self._context.wait_a_little(version, began)
        self._context.waited()
        return published

    def stop(self) -> None:
        """End as soon as possible: what is being played is cancelled. A signal handler may call it."""
        # Where the store has ended too (the launcher was killed), its answer is not waited for as long as usual.
        self._context.loop.stop()
        self._context.store.shorten_deadlines(STOP_SECONDS)
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
