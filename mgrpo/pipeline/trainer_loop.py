"""One agent's trainer, stage after stage:

    start policy -> (SFT) -> serve weights -> [ step of the feed -> loss -> optimizer step -> applied -> publish weights
      -> (checkpoint -> commit) ] -> final policy

The run's side of it, from the claim of a step's groups to its record, is the feed's (feed.py).

With policy.ranks > 1 this is rank 0, which alone talks to store, trajectory log and engines; what all ranks do is the
PolicyTrainer's matter.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig
from mgrpo.environments.task import Task
from mgrpo.model.chat_check import check_chat
from mgrpo.pipeline.feed import Feed, Shutdown
from mgrpo.profiling.stages import mark
from mgrpo.profiling.window import close_window
from mgrpo.trainers.base import Checkpoint, Demos, PolicyTrainer


def run_trainer(
    config: RunConfig, role: str, task: Task, agents: Path, addresses: Addresses, trainer: PolicyTrainer
) -> None:
    """Train until the last step, serve the final weights until the run is over. agents: folder of the agents' folders
    on this server, one a role."""
    with Feed.open(config, role, agents, addresses, trainer.heartbeat) as feed:
        TrainerLoop(feed, task, addresses, trainer).run()


class TrainerLoop:
    """A PolicyTrainer that trains on a feed."""

    def __init__(self, feed: Feed, task: Task, addresses: Addresses, trainer: PolicyTrainer) -> None:
        self._feed, self._task, self._addresses, self._trainer = feed, task, addresses, trainer
        self._agent = feed.agent
        self._begun = 0  # step of the last checkpoint that was begun

    def run(self) -> None:
        """Train until the last step, serve the final weights until the run is over."""
        with contextlib.suppress(Shutdown):
            self._run()
        self._trainer.close()

    # -- stages ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        feed = self._feed
        checkpoint = self._trainer.load(start_policy(feed, self._task, self._trainer))
        if self._task.chat:
            check_chat(self._trainer.tokenizer, self._task.chat_use, f"policy of {feed.role}")
        # Also tries what is saved at the end: a tokenizer that cannot be would otherwise say so after the last step.
        feed.describe(self._trainer.policy_files())
        requeued = feed.resume(checkpoint.step if checkpoint else None, feed.folder / "checkpoints")
        self._begun = feed.step
        self._share_prefixes()
        if checkpoint is not None:
            for damage in checkpoint.passed_over:
                feed.say(f"a checkpoint was passed over: {damage}")
            self._commit(checkpoint)
            feed.say(f"resumed at step {feed.step}, {requeued} groups again")
        if self._agent.engine.direct:
            servers = self._agent.engine.running_servers or self._addresses.engines[feed.role]
            self._trainer.open_direct(servers, feed.say)
        self._publish()
        if not self._agent.frozen:
            self._train()
            if feed.stopped:
                return
            self._trainer.export(feed.folder / "final")
            feed.say(f"final policy in {feed.folder / 'final'}")
        self._trainer.close()
        feed.serve()

    def _share_prefixes(self) -> None:
        """All roles that act with the policy share what their rows begin with, or none does."""
        if self._trainer.shares_prefixes:
            self._feed.share_prefixes()
        elif not self._agent.frozen and (why := self._trainer.why_not_shared):
            self._feed.say(f"each row is computed whole (policy.share_prefixes): {why}")

    def _train(self) -> None:
        """All steps, or those until the stop: then the weights are those of a whole step, and are saved."""
        feed, trainer = self._feed, self._feed.config.trainer
        for step in feed:
            with self._trainer.profiled(step.number + 1, feed.say):
                with mark("train"):
                    learned = self._trainer.train(step.minibatches, step.recompute_old, step.lr)
                feed.applied(learned, self._trainer.cost())
                self._publish()
            with feed.part("checkpoint"):
                if feed.step % trainer.checkpoint_every == 0 or feed.step == trainer.steps:
                    self._checkpoint()
                else:
                    self._finish_checkpoint(wait=False)
        with feed.part("checkpoint"):
            if feed.step > self._begun:
                self._checkpoint()
            self._finish_checkpoint(wait=True)
        close_window()  # a stop within it: a profile takes its time, and the checkpoint has a deadline
        feed.flush()

    def _checkpoint(self) -> None:
        """Begin to write a checkpoint of the last step; the steps go on meanwhile."""
        self._finish_checkpoint(wait=True)  # the one before
        self._begun = self._feed.step
        self._trainer.save(self._begun)

    def _finish_checkpoint(self, wait: bool) -> None:
        """Commit the checkpoint that is being written once it is durable."""
        saved = self._trainer.saved(wait)
        if saved is not None:
            self._commit(saved)

    def _commit(self, checkpoint: Checkpoint) -> None:
        """The trajectory log keeps what the oldest of the kept checkpoints would need."""
        self._feed.commit(checkpoint.step, lambda cursors: self._trainer.note_cursors(checkpoint, cursors))
        self._feed.recorder.keep(checkpoint)

    def _publish(self) -> None:
        """Serve the weights first, announce the version afterwards."""
        with mark("publish"):
            probe = self._trainer.probe() if self._agent.engine.probed else None
            if self._agent.engine.direct:
                self._trainer.publish_direct(self._feed.label())
                self._feed.announce(probe)
            else:
                self._feed.publish(self._trainer.weights(), probe)


def start_policy(feed: Feed, task: Task, trainer: PolicyTrainer) -> Path:
    """The policy RL starts from: the given model, or the task's own after its SFT (kept in start/)."""
    if feed.agent.model is not None:
        return Path(feed.agent.model)
    start = feed.folder / "start"
    if not start.exists():
        task.build_policy(feed.role, feed.config.seed, str(feed.folder / "fresh"))
        sft(feed, task, trainer, feed.folder / "fresh", start)
    return start


def sft(feed: Feed, task: Task, trainer: PolicyTrainer, fresh: Path, start: Path) -> None:
    """From the policy in `fresh` to the one in `start`."""
    config, seed, role = feed.agent.sft, feed.config.seed, feed.role

    def demos(step: int) -> Demos:
        return [
            demo
            for r in feed.config.roles_of(role)
            for demo in task.demo_batch(r, step, config.batch_size, seed)
        ]

    def progress(step: int, loss: float) -> None:
        feed.report("sft", {"role": role, "step": step, "steps": config.steps, "loss": loss})
        feed.check_stop()

    lr = task.sft_lr(role) if config.lr is None else config.lr
    trainer.sft(fresh, start, demos, config, lr, progress)
