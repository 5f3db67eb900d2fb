"""One agent's part of a run, for whatever trains its policy:

    resume -> publish -> [ step: claim -> read trajectory log -> credit -> advantage -> align -> rows
      -> (the trainer) -> applied -> publish weights -> (saved: commit) -> record ] -> serve

Beside a step's training the next one is claimed, read and built (step_ahead.py), and the one before is recorded and
reported (step_reporter.py); everything else is this thread's, in this order.

Everything it needs of other agents arrives through the store as rewards, counts and versions. A restarted trainer goes
back to its last checkpoint; the store hands it the groups it had applied since then once more, in the same order, and
the trajectory log still holds their tokens. Roles that share this agent's policy are trained here too: each comes
through a role stream of its own, and their minibatches make one optimizer step with the agent's.

Our own trainers are its first user (trainer_loop.py); a program of the user's gets it from mgrpo.feed (external.py).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig
from mgrpo.errors import ConfigError, DeadlineError, PeerError
from mgrpo.pipeline.batch import StepBatch, merge_streams
from mgrpo.pipeline.role_stream import RoleStream
from mgrpo.pipeline.step_ahead import PreparedStep, StepAhead
from mgrpo.pipeline.step_clock import StepClock
from mgrpo.pipeline.step_perf import step_perf
from mgrpo.pipeline.step_reporter import StepReporter
from mgrpo.record import spans
from mgrpo.record.schema import StepSettings
from mgrpo.trainers.base import StepCost
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.schedule import learning_rate
from mgrpo.types import Probe, version_label
from mgrpo.weights.publisher import WeightPublisher

STOP_SECONDS = 5.0  # for one answer of the store, once the process is asked to stop


class Shutdown(Exception):
    """The run was ended, or this process was asked to stop."""


@dataclass(frozen=True, slots=True)
class FeedStep:
    """One RL step's data. Train on each minibatch in turn, an optimizer step each."""

    number: int
    """Of the step: the optimizer history before it has so many RL steps."""
    lr: float
    """Learning rate of this step, after agents.<role>.optimizer."""
    recompute_old: bool
    """trainer.old_logprobs is "recompute": the ratio's denominator is to be this policy before the step."""
    minibatches: Sequence[MiniBatch]
    """Those of all roles that act with the policy; what a loss sums is divided by MiniBatch.denominator."""
    batches: Sequence[StepBatch]
    """One a role: groups, members and metrics."""


@dataclass(slots=True)
class _Begun:
    """The step in the trainer's hands. learned: None until it is applied."""

    number: int
    lr: float
    prepared: PreparedStep
    published: bool = False
    learned: Mapping[str, float] | None = None
    cost: StepCost | None = None


class Feed:
    """Iterate over the steps; with each call applied(), then publish(). Use as a context manager; leaving it closes the
    address, the trajectory log and the store connection, and leaves the run to be resumed."""

    def __init__(
        self,
        config: RunConfig,
        role: str,
        folder: Path,
        streams: Sequence[RoleStream],
        weights: WeightPublisher,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        """folder: the agent's. streams: of the role and those that share its policy. weights: what their addresses
        serve. heartbeat: called about once a second where this waits."""
        self.config, self.role, self.agent, self.folder = config, role, config.agents[role], folder
        self.step = 0
        """RL steps that the policy has taken: the next step's number."""
        self.saved_step = 0
        """RL steps of the newest durable checkpoint."""
        self.stopped = False
        """The iteration has ended before the last step: the run was ended, or this process was asked to stop."""
        self._streams, self._store, self._weights = list(streams), streams[0].store, weights
        self._heartbeat = heartbeat
        self._ahead = StepAhead(self._streams, config.trainer.steps)
        self._reporter = StepReporter(self._streams)
        self._begun: _Begun | None = None
        self._version: int | None = None  # published last
        self._clock = StepClock(role)
        self._spans: spans.SpanLog | None = None  # of this process, where it was opened with the feed
        self._stop_requested = False
        self._handlers: dict[int, Any] = {}  # of signals, as they were before

    @classmethod
    def open(
        cls,
        config: RunConfig,
        role: str,
        agents: Path,
        addresses: Addresses,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> Self:
        """agents: folder of the agents' folders on this server, one a role. Raises ConfigError where the role's address
        is taken."""
        folder = agents / role
        folder.mkdir(parents=True, exist_ok=True)
        weights = WeightPublisher(getattr(torch, config.agents[role].engine.weights_dtype))
        streams: list[RoleStream] = []
        try:
            for r in config.roles_of(role):
                streams.append(RoleStream(config, r, agents / r, addresses, weights))
            feed = cls(config, role, folder, streams, weights, heartbeat)
            feed._spans = spans.SpanLog(config.record, folder / "record", f"trainer {role}", feed.say)
            spans.record_to(feed._spans)
            return feed
        except BaseException:
            for stream in streams:
                stream.close()
            weights.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.stop()
        self._reporter.close()
        if self._spans is not None:
            spans.stop_recording(self._spans)
            self._spans.close()
        for stream in self._streams:
            stream.close()
        self._weights.close()
        self._ahead.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # -- before the first step -------------------------------------------------------------------------------------

    def describe(self, files: dict[str, bytes]) -> None:
        """The policy's folder but its weights: what an engine is built from."""
        self._weights.describe(files)

    def resume(self, step: int | None, kept: Path) -> int:
        """Take the run over from a checkpoint of `step` RL steps, None where there is none; the groups that are handed
        out again. kept: where checkpoints are. Raises ConfigError where tokens are gone that this would take."""
        if step is None and (
            cut := [s.trajectory_log.path for s in self._streams if s.trajectory_log.segments()[0] > 1]
        ):
            raise ConfigError(
                f"{cut[0]} holds no tokens of the first steps any more, and no checkpoint is left in "
                f"{kept}: put one back, or begin again with --fresh"
            )
        self.step = self.saved_step = step or 0
        for stream in self._streams:
            resumed = stream.store.resume(checkpoint_step=self.step - 1)
            stream.recorder.begin(self.step)
        return resumed.requeued

    def share_prefixes(self) -> None:
        """Before the first step: whoever trains computes once what the rows of a micro-batch begin with. They are
        packed by the tokens that are left, and trainer.micro_batch bounds these. Raises ValueError after it."""
        if self._clock.running:
            raise ValueError(
                f"feed of {self.role}: share_prefixes() comes before the first step, step {self.step} is on its way"
            )
        for stream in self._streams:
            stream.builder.shares_prefixes = True

    def report(self, kind: str, payload: dict[str, object]) -> None:
        """To the run's reports."""
        self._store.report(kind, payload)

    def say(self, line: str) -> None:
        """A line for people."""
        self.report("phase", {"text": f"{self.role}: {line}"})

    # -- steps -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FeedStep:
        """The next step, once its groups are there. Ends after the last one and, with `stopped`, where the run was
        ended or this process asked to stop. Raises ValueError where the step before was not applied and published,
        DeadlineError where nothing comes for store.idle_timeout."""
        if self.stopped:
            raise StopIteration
        try:
            return self._next()
        except Shutdown:
            self.stopped = True
            self._ahead.stop()
            raise StopIteration from None

    def _next(self) -> FeedStep:
        trainer = self.config.trainer
        self._end_step()
        if (
            self.step >= trainer.steps
        ):  # the run may be over before the final policy is written: no look at it
            raise StopIteration
        first = not self._clock.running
        if first:
            self._clock.start()
            self._catch_signals()
            self._ahead.begin(self.step)
        with self._clock.part("wait", {"step": self.step}):
            if not first:
                self.check_stop()
            prepared = self._ahead.take(self.step, self.check_stop)
        self._clock.begin("train", {"step": self.step})
        lr = learning_rate(self.agent.optimizer, self.step, trainer.steps)
        self._begun = _Begun(self.step, lr, prepared)
        recompute = trainer.old_logprobs == "recompute"
        batches = prepared.batches
        return FeedStep(self.step, lr, recompute, merge_streams(batches), batches)

    def applied(self, metrics: Mapping[str, float], cost: StepCost | None = None) -> None:
        """The optimizer steps of this RL step are taken; once a step. metrics: finite numbers of the training, for the
        run's records; cost: what they took, for `*/perf/mfu` and its like. Raises ValueError; then nothing is
        accounted for."""
        begun = self._begun
        if begun is None or begun.learned is not None:
            last = f"step {self.step - 1} was applied" if self._clock.running else "no step was taken"
            raise ValueError(
                f"feed of {self.role}: applied() comes once a step, {last}; take the next one first"
            )
        learned = {name: float(value) for name, value in metrics.items()}
        if bad := [name for name, value in learned.items() if not math.isfinite(value)]:
            raise ValueError(
                f"feed of {self.role}: metric {bad[0]!r} of step {begun.number} is {learned[bad[0]]}, expected a "
                "finite number; the step was not accounted for"
            )
        begun.cost = cost
        self._clock.finish("train")
        with self._clock.part("apply", {"step": begun.number}):
            for stream, batch in zip(self._streams, begun.prepared.batches, strict=True):
                stream.store.apply(step=begun.number, groups=batch.groups, surplus=batch.surplus)
        self.step, begun.learned = begun.number + 1, learned
        self._clock.begin("publish")  # whatever the trainer does until its weights are announced

    def publish(self, tensors: Iterable[tuple[str, torch.Tensor]], probe: Probe | None = None) -> None:
        """Serve the weights of `step` RL steps, and announce the version afterwards. tensors: (name in a checkpoint,
        tensor), in the same order every time. probe: what engines are compared with; None: they are not."""
        self._check_order("publish()")
        with self._publishing():
            self._weights.publish(self.label(), self.step, tensors, probe)

    def announce(self, probe: Probe | None) -> None:
        """Instead of publish(): the trainer has brought these weights to the servers itself."""
        self._check_order("announce()")
        with self._publishing():
            self._weights.announce(self.label(), self.step, probe)

    def label(self) -> str:
        """Of the version that is published next."""
        return version_label(self.role, self._store.epoch, self.step)

    def _check_order(self, what: str) -> None:
        if self._begun is not None and self._begun.learned is None:
            raise ValueError(
                f"feed of {self.role}: {what} of step {self._begun.number} comes after applied() of that step"
            )
        if self._version == self.step:
            raise ValueError(f"feed of {self.role}: the weights of {self.step} steps were published already")

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """Around what makes the weights of `step` RL steps available; announces them to the store afterwards. Where
        that fails, the part stays open for another try."""
        if not self._clock.inside("publish"):
            self._clock.begin("publish")
        yield
        for stream in self._streams:
            stream.store.status(version=self.step, step=self.step, checkpoint_step=self.saved_step)
        self._clock.finish("publish", {"version": self.step, "label": self.label()})
        self._version = self.step
        if self._begun is not None:
            self._begun.published = True

    def end_step(self, upto: int) -> None:
        """Record and report the step that was trained and published, where it is one of the first `upto`."""
        if self._begun is not None and self._begun.published and self._begun.number < upto:
            self._end_step()

    def _end_step(self) -> None:
        begun = self._begun
        if begun is None:
            return
        for call, done in (
            ("applied(metrics)", begun.learned is not None),
            ("publish(model)", begun.published),
        ):
            if not done:
                raise ValueError(
                    f"feed of {self.role}: step {begun.number} was taken without {call}; call it before the next step"
                )
        assert begun.learned is not None
        times = step_times(self._clock.end(begun.number), begun.prepared.hidden)
        times |= step_perf(begun.cost, begun.prepared.batches, times["time/train"], times["time/step"])
        ranks, data_ranks = self.config.ranks(self.role), self.config.data_ranks(self.role)
        shared = self._streams[0].builder.shares_prefixes
        settings = StepSettings(begun.lr, self.config.trainer.threads, ranks, data_ranks, shared)
        self._begun = None
        times |= self._weight_metrics()
        with self._clock.part("report", {"step": begun.number}):
            self._reporter.submit(begun.prepared.batches, begun.learned, settings, times)

    def part(self, kind: str) -> AbstractContextManager[None]:
        """Around work of the trainer's own within a step, for its named times. kind: of step_clock.METRICS."""
        return self._clock.part(kind, {"step": max(0, self.step - 1)})

    def _weight_metrics(self) -> dict[str, float]:
        """What the newest version costs a receiver that holds the one before."""
        size = self._weights.size
        return {} if size is None else {"weights/bytes": size.nbytes, "weights/share": size.share}

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def commit(self, step: int, note: Callable[[dict[str, int]], Mapping[str, int]]) -> None:
        """A checkpoint of `step` RL steps is durable: nothing up to there is handed out again, unless the trainer comes
        back with an older one. note(cursors): takes the group of each role from which on the checkpoint needs tokens,
        and returns those that all kept checkpoints do: the trajectory log keeps them."""
        self.end_step(upto=step)
        self.flush()  # a durable step's record is written before the step is committed
        try:
            cursors = {stream.role: stream.store.commit(step=step - 1) for stream in self._streams}
        except (DeadlineError, PeerError):
            if not self._stop_requested:
                raise
            # The store has ended too: it learns of this checkpoint when the trainer comes back.
        else:
            needed = note(cursors)
            for stream in self._streams:
                stream.trajectory_log.truncate(needed[stream.role])
        self.saved_step = step

    def flush(self) -> None:
        """Wait until the last step is recorded and reported."""
        try:
            with self.part("report"):
                self._reporter.flush()
        except (DeadlineError, PeerError):
            if not self._stop_requested:  # else: the store has ended too, and nobody reads them
                raise

    @property
    def recorder(self) -> Any:
        """The agent's own step recorder, which keeps checkpoints for replay."""
        return self._streams[0].recorder

    # -- the end ---------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until the run is over: workers still need the weights for the last evaluation."""
        try:
            while True:
                self.check_stop()
                time.sleep(0.1)
        except Shutdown:
            pass

    def check_stop(self) -> None:
        """Raise Shutdown where the run was ended or this process asked to stop, MgrpoError where an address is not
        served any more."""
        self._heartbeat()
        for stream in self._streams:
            stream.check()
        if self._stop_requested or self._store.world().control.state != "running":
            raise Shutdown

    def _catch_signals(self) -> None:
        """From here on there is something to save; before, a signal has its usual effect."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # the latter where the trainer was started by hand
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only a mark: an optimizer step is never torn apart; the loop looks at the mark between steps. Where the store
        # has ended too (the launcher was killed), its answer is not waited for as long as usual. No Event: its lock is
        # not reentrant, and the kernel sends the death of a launcher several times, also into this handler.
        self._stop_requested = True
        if number == signal.SIGINT:  # another Ctrl-C does not wait for the checkpoint
            signal.signal(signal.SIGINT, self._handlers.get(signal.SIGINT) or signal.SIG_DFL)
        for stream in self._streams:
            stream.store.shorten_deadlines(STOP_SECONDS)


def step_times(seconds: Mapping[str, float], hidden: Mapping[str, float]) -> dict[str, float]:
    """Metrics of where a step's seconds went on the main thread (StepClock.end), which add up to it, and of what ran
    beside it (`hidden`, by part)."""
    return {
        **{f"time/{name}": taken for name, taken in seconds.items()},
        **{f"time/hidden_{name}": taken for name, taken in hidden.items()},
        "perf/idle": seconds["wait_batch"] / seconds["step"],
    }
