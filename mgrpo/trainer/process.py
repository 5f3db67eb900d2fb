"""One agent's trainer, station after station:

    start policy -> (warm start) -> serve weights -> [ claim -> read spool -> credit -> advantage -> align -> rows
      -> loss -> optimizer step -> apply -> publish weights -> status -> record -> (checkpoint -> commit) ]
      -> final policy

Everything it needs of other agents arrives through the store as rewards, counts and versions. A restarted trainer goes
back to its last checkpoint; the store hands it the groups it had applied since then once more, in the same order, and
the spool still holds their tokens. Roles that share this agent's policy are trained here too: each comes through a lane
of its own, and their minibatches make one optimizer step with the agent's.

With policy.ranks > 1 this is rank 0, which alone talks to store, spool and engines; what all ranks do is in crew.py.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

from mgrpo.config import RunConfig
from mgrpo.config.addresses import Addresses
from mgrpo.config.policy import LoraConfig
from mgrpo.errors import ConfigError, DeadlineError, PeerError
from mgrpo.model.chat_check import check_chat
from mgrpo.model.policy import Policy, adapter_bytes, load_policy, save_policy, state_bytes
from mgrpo.model.shell import shell_files
from mgrpo.record.schema import StepSettings
from mgrpo.rollout.task import Task
from mgrpo.trainer.batch import joined
from mgrpo.trainer.checkpoint import Checkpoint, note_cursors
from mgrpo.trainer.crew import Crew
from mgrpo.trainer.lane import Lane
from mgrpo.trainer.ranks import Ranks
from mgrpo.trainer.schedule import learning_rate
from mgrpo.trainer.warmstart import Demos, warm_start
from mgrpo.types import version_label
from mgrpo.weights import Weights, WeightsServer

STOP_SECONDS = 5.0  # for one answer of the store, once the process is told to leave


class Stopped(Exception):
    """The run was ended, or this process was told to leave."""


class TrainerProcess:
    """Use as a context manager; leaving it closes the endpoint, the spool and the store connection."""

    def __init__(
        self,
        config: RunConfig,
        role: str,
        task: Task,
        agents: Path,
        addresses: Addresses,
        ranks: Ranks | None = None,
    ) -> None:
        """agents: folder of the agents' folders on this server, one a role. ranks: those that this one leads."""
        self._crew = Crew(config, role, agents / role, ranks or Ranks())
        self._config, self._agent, self._role, self._task = config, config.agents[role], role, task
        self._folder = agents / role
        self._folder.mkdir(parents=True, exist_ok=True)
        self._told_to_stop = False
        self._step = 0  # optimizer steps that the policy has taken
        self._begun = self._checkpointed = (
            0  # step of the last checkpoint that was begun, and that is durable
        )
        self._weights = WeightsServer()
        self._lanes = [Lane(config, r, agents / r, addresses, self._weights) for r in config.served_by(role)]
        self._store = self._lanes[0].store

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self._lanes:
            lane.close()

    def run(self) -> None:
        """Train until the last step, serve the final weights until the run is over."""
        with contextlib.suppress(Stopped):
            self._run()
        self._crew.end()

    # -- stations ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        checkpoint = self._crew.begin(self._start_policy())
        step = checkpoint.step if checkpoint else 0
        if checkpoint is None and (
            cut := [lane.spool.path for lane in self._lanes if lane.spool.segments()[0] > 1]
        ):
            raise ConfigError(
                f"{cut[0]} holds no tokens of the first steps any more, and no checkpoint is left in "
                f"{self._folder / 'checkpoints'}: put one back, or begin again with --fresh"
            )
        policy = self._crew.policy()
        if self._task.chat:
            check_chat(policy.tokenizer, self._task.chat_use, f"policy of {self._role}")
        # Also tries what is saved at the end: a tokenizer that cannot be would otherwise say so after the last step.
        self._weights.describe(shell_files(policy))
        self._step = self._begun = self._checkpointed = step
        for lane in self._lanes:
            resumed = lane.store.resume(checkpoint_step=step - 1)
            lane.recorder.begin(step)
        if checkpoint is not None:
            for damage in checkpoint.passed_over:
                self._report("phase", {"text": f"{self._role}: a checkpoint was passed over: {damage}"})
            self._commit(checkpoint)
            self._report(
                "phase", {"text": f"{self._role}: resumed at step {step}, {resumed.again} groups again"}
            )
        self._publish(step)
        if not self._agent.frozen:
            # From here on there is something to save; before, a signal ends the process at once.
            for number in (signal.SIGTERM, signal.SIGINT):  # the latter where it was started by hand
                signal.signal(number, self._on_signal)
            try:
                self._train()
            except Stopped:
                # Wherever the loop was, mostly waiting for rollouts: the weights are those of a whole step.
                if self._step > self._begun:
                    self._checkpoint()
                self._settle(wait=True)
                raise
            self._settle(wait=True)
            save_policy(self._crew.policy(), self._folder / "final")
            self._report("phase", {"text": f"{self._role}: final policy in {self._folder / 'final'}"})
        self._crew.end()
        self._serve_until_over()

    def _start_policy(self) -> Path:
        """The policy RL starts from: the given model, or the task's own after its warm start (kept in start/)."""
        if self._agent.model is not None:
            return Path(self._agent.model)
        start = self._folder / "start"
        if not start.exists():
            self._task.build_policy(self._role, self._config.seed, str(self._folder / "fresh"))
            everything = self._agent.policy.model_copy(update={"lora": LoraConfig(), "last_layers": 0})
            policy = load_policy(self._folder / "fresh", everything)
            self._warm_start(policy)
            save_policy(policy, start)
        return start

    def _warm_start(self, policy: Policy) -> None:
        config, seed = self._agent.warm_start, self._config.seed
        if not config.steps:
            return

        def demos(step: int) -> Demos:
            return [
                demo
                for lane in self._lanes
                for demo in self._task.demo_batch(lane.role, step, config.batch_size, seed)
            ]

        def progress(step: int, loss: float) -> None:
            self._report("warm", {"role": self._role, "step": step, "steps": config.steps, "loss": loss})
            self._check_stop()

        lr = self._task.warm_start_lr(self._role) if config.lr is None else config.lr
        warm_start(policy, demos, config, lr, progress)

    def _train(self) -> None:
        trainer = self._config.trainer
        while (step := self._step) < trainer.steps:
            began = time.monotonic()
            claimed_groups = [lane.claim(step, self._check_stop) for lane in self._lanes]
            claimed = time.monotonic()
            batches = [
                lane.builder.build(step, groups)
                for lane, groups in zip(self._lanes, claimed_groups, strict=True)
            ]
            built = time.monotonic()
            lr = learning_rate(self._agent.optimizer, step, trainer.steps)
            settings = StepSettings(lr, trainer.threads, self._config.ranks(self._role))
            learned = self._crew.train(joined(batches), trainer.old_logprobs == "recompute", lr)
            for lane, groups in zip(self._lanes, claimed_groups, strict=True):
                lane.store.apply(step=step, groups=groups)
            self._step = step = step + 1
            trained = time.monotonic()
            due = step % trainer.checkpoint_every == 0 or step == trainer.steps
            self._publish(step)
            for lane, batch in zip(self._lanes, batches, strict=True):
                lane.recorder.step(batch, batch.metrics | learned, settings)
            if due:
                self._checkpoint()
            else:
                self._settle(wait=False)
            times = {
                "time/wait_batch": claimed - began,
                "time/build": built - claimed,
                "time/train": trained - built,
                "time/sync": time.monotonic() - trained,
                "time/step": time.monotonic() - began,
            }
            for lane, batch in zip(self._lanes, batches, strict=True):
                metrics = batch.metrics | learned | times
                named = {f"{lane.role}/{name}": float(value) for name, value in metrics.items()}
                self._report("step", {"role": lane.role, "step": step, "metrics": named})
            self._check_stop()

    def _checkpoint(self) -> None:
        """Begin to write a checkpoint of the last step; the steps go on meanwhile."""
        self._settle(wait=True)  # the one before
        self._begun = self._step
        self._crew.checkpoint(self._step)

    def _settle(self, wait: bool) -> None:
        """Commit the checkpoint that is being written once it is durable."""
        saved = self._crew.settle(wait)
        if saved is not None:
            self._commit(saved)

    def _commit(self, checkpoint: Checkpoint) -> None:
        """Tell the store: nothing up to here is handed out again, unless this trainer comes back with an older
        checkpoint. The spool keeps what the oldest of those that are kept would need."""
        try:
            cursors = {lane.role: lane.store.commit(step=checkpoint.step - 1) for lane in self._lanes}
        except (DeadlineError, PeerError):
            if not self._told_to_stop:
                raise
            # The store has ended too: it learns of this checkpoint when the trainer comes back.
        else:
            needed = note_cursors(checkpoint, cursors)
            for lane in self._lanes:
                lane.spool.truncate(needed[lane.role])
        self._lanes[0].recorder.keep(checkpoint)
        self._checkpointed = checkpoint.step

    def _publish(self, version: int) -> None:
        """Serve the weights first, announce the version afterwards."""
        model = self._crew.policy().model
        data = adapter_bytes(model) if self._agent.engine.sync == "lora" else state_bytes(model)
        self._weights.publish(Weights(version_label(self._role, self._store.epoch, version), version, data))
        for lane in self._lanes:
            lane.store.status(version=version, step=version, checkpoint_step=self._checkpointed)

    def _serve_until_over(self) -> None:
        """Workers still need the weights for the last evaluation."""
        while True:
            self._check_stop()
            time.sleep(0.1)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _report(self, kind: str, payload: dict[str, object]) -> None:
        self._store.report(kind, payload)

    def _check_stop(self) -> None:
        self._crew.alive()
        for lane in self._lanes:
            lane.check()
        if self._told_to_stop or self._store.world().control.state != "running":
            raise Stopped

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only a mark: an optimizer step is never torn apart; the loop looks at the mark between steps. Where the store
        # has ended too (the launcher was killed), its answer is not waited for as long as usual. No Event: its lock is
        # not reentrant, and the kernel sends the death of a launcher several times, also into this handler.
        self._told_to_stop = True
        if number == signal.SIGINT:  # another Ctrl-C does not wait for the checkpoint
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for lane in self._lanes:
            lane.store.hurry(STOP_SECONDS)
