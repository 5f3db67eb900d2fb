"""One agent's trainer, stage after stage:

    start policy -> (SFT) -> serve weights -> [ claim -> read trajectory log -> credit -> advantage -> align
      -> rows -> loss -> optimizer step -> apply -> publish weights -> status -> record -> (checkpoint -> commit) ]
      -> final policy

Beside a step's training the next one is claimed, read and built (step_ahead.py), and the one before is recorded and
reported (step_reporter.py); everything else is this thread's, in this order.

Everything it needs of other agents arrives through the store as rewards, counts and versions. A restarted trainer goes
back to its last checkpoint; the store hands it the groups it had applied since then once more, in the same order, and
the trajectory log still holds their tokens. Roles that share this agent's policy are trained here too: each comes
through a role stream of its own, and their minibatches make one optimizer step with the agent's.

With policy.ranks > 1 this is rank 0, which alone talks to store, trajectory log and engines; what all ranks do is the
PolicyTrainer's matter.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError, DeadlineError, PeerError
from mgrpo.model.chat_check import check_chat
from mgrpo.pipeline.batch import merge_streams
from mgrpo.pipeline.role_stream import RoleStream
from mgrpo.pipeline.step_ahead import PreparedStep, StepAhead
from mgrpo.pipeline.step_reporter import StepReporter
from mgrpo.record.schema import StepSettings
from mgrpo.trainers.base import Checkpoint, Demos, PolicyTrainer
from mgrpo.trainers.torch.schedule import learning_rate
from mgrpo.types import version_label
from mgrpo.weights.publisher import WeightPublisher

STOP_SECONDS = 5.0  # for one answer of the store, once the process is asked to stop


class Shutdown(Exception):
    """The run was ended, or this process was asked to stop."""


class TrainerLoop:
    """Use as a context manager; leaving it closes the endpoint, the trajectory log and the store connection."""

    def __init__(
        self,
        config: RunConfig,
        role: str,
        task: Task,
        agents: Path,
        addresses: Addresses,
        trainer: PolicyTrainer,
    ) -> None:
        """agents: folder of the agents' folders on this server, one a role."""
        self._trainer = trainer
        self._config, self._agent, self._role, self._task = config, config.agents[role], role, task
        self._addresses = addresses
        self._folder = agents / role
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stop_requested = False
        self._step = 0  # optimizer steps that the policy has taken
        # Step of the last checkpoint that was begun, and of the last that is durable.
        self._begun = self._checkpointed = 0
        self._weights = WeightPublisher(getattr(torch, self._agent.engine.weights_dtype))
        self._streams = [
            RoleStream(config, r, agents / r, addresses, self._weights) for r in config.roles_of(role)
        ]
        self._store = self._streams[0].store
        self._ahead = StepAhead(self._streams, config.trainer.steps)
        self._reporter = StepReporter(self._streams)

    def __enter__(self) -> TrainerLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.stop()
        self._reporter.close()
        for stream in self._streams:
            stream.close()
        self._weights.close()
        self._ahead.close()

    def run(self) -> None:
        """Train until the last step, serve the final weights until the run is over."""
        with contextlib.suppress(Shutdown):
            self._run()
        self._trainer.close()

    # -- stages ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        checkpoint = self._trainer.load(self._start_policy())
        step = checkpoint.step if checkpoint else 0
        if checkpoint is None and (
            cut := [
                stream.trajectory_log.path
                for stream in self._streams
                if stream.trajectory_log.segments()[0] > 1
            ]
        ):
            raise ConfigError(
                f"{cut[0]} holds no tokens of the first steps any more, and no checkpoint is left in "
                f"{self._folder / 'checkpoints'}: put one back, or begin again with --fresh"
            )
        if self._task.chat:
            check_chat(self._trainer.tokenizer, self._task.chat_use, f"policy of {self._role}")
        # Also tries what is saved at the end: a tokenizer that cannot be would otherwise say so after the last step.
        self._weights.describe(self._trainer.policy_files())
        self._step = self._begun = self._checkpointed = step
        for stream in self._streams:
            resumed = stream.store.resume(checkpoint_step=step - 1)
            stream.recorder.begin(step)
        if checkpoint is not None:
            for damage in checkpoint.passed_over:
                self._report("phase", {"text": f"{self._role}: a checkpoint was passed over: {damage}"})
            self._commit(checkpoint)
            self._report(
                "phase", {"text": f"{self._role}: resumed at step {step}, {resumed.requeued} groups again"}
            )
        if self._agent.engine.direct:
            self._trainer.open_direct(
                self._agent.engine.running_servers or self._addresses.engines[self._role],
                lambda line: self._report("phase", {"text": f"{self._role}: {line}"}),
            )
        self._publish(step)
        if not self._agent.frozen:
            # From here on there is something to save; before, a signal ends the process at once.
            for number in (signal.SIGTERM, signal.SIGINT):  # the latter where it was started by hand
                signal.signal(number, self._on_signal)
            try:
                self._train()
            except Shutdown:
                # Wherever the loop was, mostly waiting for rollouts: the weights are those of a whole step.
                self._ahead.stop()
                if self._step > self._begun:
                    self._checkpoint()
                self._finish_checkpoint(wait=True)
                self._flush_reports()
                raise
            self._finish_checkpoint(wait=True)
            self._flush_reports()
            self._trainer.export(self._folder / "final")
            self._report("phase", {"text": f"{self._role}: final policy in {self._folder / 'final'}"})
        self._trainer.close()
        self._serve_until_over()

    def _start_policy(self) -> Path:
        """The policy RL starts from: the given model, or the task's own after its SFT (kept in start/)."""
        if self._agent.model is not None:
            return Path(self._agent.model)
        start = self._folder / "start"
        if not start.exists():
            self._task.build_policy(self._role, self._config.seed, str(self._folder / "fresh"))
            self._sft(self._folder / "fresh", start)
        return start

    def _sft(self, fresh: Path, start: Path) -> None:
        config, seed = self._agent.sft, self._config.seed

        def demos(step: int) -> Demos:
            return [
                demo
                for stream in self._streams
                for demo in self._task.demo_batch(stream.role, step, config.batch_size, seed)
            ]

        def progress(step: int, loss: float) -> None:
            self._report("sft", {"role": self._role, "step": step, "steps": config.steps, "loss": loss})
            self._check_stop()

        lr = self._task.sft_lr(self._role) if config.lr is None else config.lr
        self._trainer.sft(fresh, start, demos, config, lr, progress)

    def _train(self) -> None:
        trainer = self._config.trainer
        ended = time.monotonic()  # of the step before: a step's seconds are those since then
        self._ahead.begin(self._step)
        while (step := self._step) < trainer.steps:
            prepared = self._ahead.take(step, self._check_stop)
            began = time.monotonic()
            lr = learning_rate(self._agent.optimizer, step, trainer.steps)
            ranks, data_ranks = self._config.ranks(self._role), self._config.data_ranks(self._role)
            settings = StepSettings(lr, trainer.threads, ranks, data_ranks)
            recompute = trainer.old_logprobs == "recompute"
            learned = self._trainer.train(merge_streams(prepared.batches), recompute, lr)
            trained = time.monotonic()
            for stream, batch in zip(self._streams, prepared.batches, strict=True):
                stream.store.apply(step=step, groups=batch.groups, surplus=batch.surplus)
            self._step = step = step + 1
            applied = time.monotonic()
            self._publish(step)
            published = time.monotonic()
            if step % trainer.checkpoint_every == 0 or step == trainer.steps:
                self._checkpoint()
            else:
                self._finish_checkpoint(wait=False)
            before, ended = ended, time.monotonic()
            times = step_times(ended - before, prepared, trained - began, published - applied)
            self._reporter.submit(prepared.batches, learned, settings, times | self._weight_metrics())
            if (
                step < trainer.steps
            ):  # after the last one the run may be over before the final policy is written
                self._check_stop()

    def _checkpoint(self) -> None:
        """Begin to write a checkpoint of the last step; the steps go on meanwhile."""
        self._finish_checkpoint(wait=True)  # the one before
        self._begun = self._step
        self._trainer.save(self._step)

    def _finish_checkpoint(self, wait: bool) -> None:
        """Commit the checkpoint that is being written once it is durable."""
        saved = self._trainer.saved(wait)
        if saved is not None:
            self._commit(saved)

    def _commit(self, checkpoint: Checkpoint) -> None:
        """Commit at the store: nothing up to here is handed out again, unless this trainer comes back with an older
        checkpoint. The trajectory log keeps what the oldest of those that are kept would need."""
        self._flush_reports()  # a durable step's record is written before the step is committed
        try:
            cursors = {stream.role: stream.store.commit(step=checkpoint.step - 1) for stream in self._streams}
        except (DeadlineError, PeerError):
            if not self._stop_requested:
                raise
            # The store has ended too: it learns of this checkpoint when the trainer comes back.
        else:
            needed = self._trainer.note_cursors(checkpoint, cursors)
            for stream in self._streams:
                stream.trajectory_log.truncate(needed[stream.role])
        self._streams[0].recorder.keep(checkpoint)
        self._checkpointed = checkpoint.step

    def _flush_reports(self) -> None:
        try:
            self._reporter.flush()
        except (DeadlineError, PeerError):
            if not self._stop_requested:  # else: the store has ended too, and nobody reads them
                raise

    def _publish(self, version: int) -> None:
        """Serve the weights first, announce the version afterwards."""
        label = version_label(self._role, self._store.epoch, version)
        probe = self._trainer.probe() if self._agent.engine.probed else None
        if self._agent.engine.direct:
            self._trainer.publish_direct(label)
            self._weights.announce(label, version, probe)
        else:
            self._weights.publish(label, version, self._trainer.weights(), probe)
        for stream in self._streams:
            stream.store.status(version=version, step=version, checkpoint_step=self._checkpointed)

    def _weight_metrics(self) -> dict[str, float]:
        """What the newest version costs a receiver that holds the one before."""
        size = self._weights.size
        return {} if size is None else {"weights/bytes": size.nbytes, "weights/share": size.share}

    def _serve_until_over(self) -> None:
        """Workers still need the weights for the last evaluation."""
        while True:
            self._check_stop()
            time.sleep(0.1)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _report(self, kind: str, payload: dict[str, object]) -> None:
        self._store.report(kind, payload)

    def _check_stop(self) -> None:
        self._trainer.heartbeat()
        for stream in self._streams:
            stream.check()
        if self._stop_requested or self._store.world().control.state != "running":
            raise Shutdown

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only a mark: an optimizer step is never torn apart; the loop looks at the mark between steps. Where the store
        # has ended too (the launcher was killed), its answer is not waited for as long as usual. No Event: its lock is
        # not reentrant, and the kernel sends the death of a launcher several times, also into this handler.
        self._stop_requested = True
        if number == signal.SIGINT:  # another Ctrl-C does not wait for the checkpoint
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for stream in self._streams:
            stream.store.shorten_deadlines(STOP_SECONDS)


def step_times(step: float, prepared: PreparedStep, train: float, weights: float) -> dict[str, float]:
    """Metrics of where the `step` seconds of a step went on the main thread, which add up to it, and what ran beside.
    train: the optimizer step; weights: until their new version was announced."""
    other = (
        step - prepared.waited - train - weights
    )  # apply, checkpoint, and waiting for the record of the step before
    return {
        "time/step": step,
        "time/wait_batch": prepared.waited,
        "time/train": train,
        "time/weights": weights,
        "time/other": other,
        **{f"time/hidden_{name}": seconds for name, seconds in prepared.hidden.items()},
        "perf/idle": prepared.waited / step,
    }
