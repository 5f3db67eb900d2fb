"""The torch backend: learner, sharding over ranks with FSDP2, and distributed checkpoints behind PolicyTrainer.

Rank 0 broadcasts a command with each call; the other ranks run the same part of it (`run_commands`). With one rank
nothing is broadcast, and the policy is whole where it trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from mgrpo.config import AgentView
from mgrpo.config.engine import VllmEngineConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.config.run import SftConfig
from mgrpo.engines.vllm.plugin.buckets import BUCKET
from mgrpo.losses.registry import find_loss
from mgrpo.model.loading import load_policy, load_reference
from mgrpo.model.policy import Policy, save_policy
from mgrpo.model.policy_files import policy_files
from mgrpo.model.probe import probe, probe_ids
from mgrpo.model.stream import Reading, WeightStream
from mgrpo.model.tokens import Tokenizer
from mgrpo.profiling.devices import PeakMemory
from mgrpo.profiling.window import begin_step, covers, end_step
from mgrpo.trainers.base import Checkpoint, Demos, PolicyTrainer, StepCost
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.checkpoint import (
    CheckpointWriter,
    latest_checkpoint,
    note_cursors,
    prepare_folder,
    restore_checkpoint,
    snapshot,
)
from mgrpo.trainers.torch.cost import StepMeter
from mgrpo.trainers.torch.direct import DirectSender, Transfer
from mgrpo.trainers.torch.direct_servers import DirectServers
from mgrpo.trainers.torch.heap import return_freed_memory
from mgrpo.trainers.torch.learner import Learner, new_learner
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.sft import Sft, shares
from mgrpo.types import Probe

T = TypeVar("T")


class TorchTrainer(PolicyTrainer):
    """One rank's part of the policy; see PolicyTrainer."""

    bucket_bytes = BUCKET
    """Of weights that go straight to servers: what is under way at a time."""

    def __init__(self, view: AgentView, folder: Path, ranks: Ranks) -> None:
        """folder: the agent's, the same on all ranks (on several servers: a shared file system)."""
        torch.set_num_threads(view.trainer.threads)
        torch.manual_seed(view.seed)
        if view.agent.policy.device == "cpu":
            return_freed_memory()
        self._agent, self._ranks = view.agent, ranks
        self._root = folder / "checkpoints"
        self._writer = CheckpointWriter(
            self._root, view.trainer.keep_checkpoints, ranks.files, is_main=ranks.is_main
        )
        self._learner: Learner | None = None
        self._meter: StepMeter | None = None  # of rank 0
        self._cost: StepCost | None = None
        self._sft: Sft | None = None
        self._longest = view.longest
        self._streams: dict[bool, WeightStream] = {}  # by adapter_only
        self._reading: Reading | None = None  # the last one of rank 0, which may not have come to its end
        self._direct: DirectSender | None = None
        self._closed = False
        self.is_main = ranks.is_main

    @classmethod
    def open(cls, view: AgentView, folder: Path) -> TorchTrainer:
        limits = (view.idle_timeout, view.trainer.stop_timeout)
        return cls(view, folder, Ranks(view.ranks, view.agent.policy.device, *limits))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._direct is not None:
            self._direct.close()
        self._ranks.__exit__(kind, error, trace)

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def sft(
        self,
        fresh: Path,
        start: Path,
        demos: Callable[[int], Demos],
        config: SftConfig,
        lr: float,
        progress: Callable[[int, float], None],
    ) -> None:
        self._broadcast("begin sft", (fresh, config, lr))
        self._begin_sft(fresh, config, lr)
        assert self._sft is not None
        for step in range(config.steps):
            parts = self._for_ranks([(step, share) for share in shares(demos(step), self._data_ranks)])
            self._ranks.broadcast("sft", parts)
            loss = self._sft.step(*parts[0])
            if loss is not None:
                progress(step + 1, loss)
        policy = self._sft.policy
        self._broadcast("end sft")
        self._reading = self._end_sft()
        save_policy(policy, start, self._reading)

    def load(self, start: Path) -> Checkpoint | None:
        checkpoint = latest_checkpoint(self._root)
        self._broadcast("load", (start, checkpoint))
        self._load(start, checkpoint)
        return checkpoint

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer = self._own.policy.tokenizer
        return tokenizer

    @property
    def shares_prefixes(self) -> bool:
        return self._own.policy.shares

    @property
    def why_not_shared(self) -> str:
        return self._own.policy.why_not or ""

    def policy_files(self) -> dict[str, bytes]:
        return policy_files(self._own.policy)

    def train(
        self, batches: Sequence[MiniBatch], recompute_old: bool, lr: float | None = None
    ) -> dict[str, float]:
        """See PolicyTrainer. lr None leaves the optimizer's."""
        if self._direct is not None:
            self._direct.change()
        size = self._data_ranks
        shards = self._for_ranks(
            [([batch.shard(rank, size) for batch in batches], recompute_old, lr) for rank in range(size)]
        )
        self._finish_reading()
        self._ranks.broadcast("train", shards)
        self._cost = None
        learned = self._train(*shards[0])
        if self._meter is not None:
            self._cost = self._meter.cost(batches, recompute_old, self._own.most_memory)
        return learned

    def cost(self) -> StepCost | None:
        return self._cost

    @contextlib.contextmanager
    def profiled(self, step: int, report: Callable[[str], object]) -> Iterator[None]:
        """See PolicyTrainer."""
        window = covers(step)
        if window:
            self._broadcast("begin profile", step)
        with super().profiled(step, report):
            yield
        if window:
            self._broadcast("end profile", step)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See PolicyTrainer."""
        return self._begin_reading(self._agent.engine.adapter_only)

    def probe(self) -> Probe | None:
        ids = probe_ids(self._own.policy, self._longest)
        self._broadcast("probe", ids)
        return self._probe(ids)

    def open_direct(self, servers: Sequence[str], report: Callable[[str], None]) -> None:
        engine = self._direct_engine()
        control = DirectServers(servers, engine.timeout, engine.on_update)
        self._direct = self._new_sender(servers=control, report=report)

    def publish_direct(self, label: str) -> None:
        assert self._direct is not None, "open_direct() comes first"
        self._direct.publish(label, self._command_direct)

    def save(self, step: int) -> None:
        prepare_folder(self._root, step)
        self._broadcast("save", step)
        self._save(step)

    def saved(self, wait: bool) -> Checkpoint | None:
        return self._writer.saved(wait)

    def note_cursors(self, checkpoint: Checkpoint, cursors: Mapping[str, int]) -> dict[str, int]:
        return note_cursors(checkpoint, cursors)

    def export(self, folder: Path) -> None:
        save_policy(self._own.policy, folder, self._begin_reading(adapter_only=False))

    def heartbeat(self) -> None:
        self._ranks.heartbeat()
        if self._direct is not None:
            self._direct.tend(self._command_direct)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._broadcast("close")
            if self._direct is not None:
                self._direct.close()

    # -- the others ------------------------------------------------------------------------------------------------

    def run_commands(self) -> None:
        """See PolicyTrainer. Raises DeadlineError or PeerError when rank 0 is gone."""
        self._ranks.defer_signals()
        while True:
            command, part = self._ranks.receive()
            if command == "close":
                break
            if command == "load":
                self._load(*part)
            elif command == "begin sft":
                self._begin_sft(*part)
            elif command == "sft":
                assert self._sft is not None
                self._sft.step(*part)
            elif command == "end sft":
                self._end_sft().finish()
            elif command == "train":
                self._train(*part)
            elif command == "weights":
                self._read(part).finish()
            elif command == "begin profile":
                begin_step(part)
            elif command == "end profile":
                end_step(part)
            elif command == "probe":
                self._probe(part)
            elif command == "direct":
                self._direct = self._direct or self._new_sender()
                self._direct.run(part)
            else:
                assert command == "save", f"rank 0 sent {command!r}"
                self._writer.saved(wait=True)
                self._save(part)
        self._writer.saved(wait=True)

    # -- every rank ------------------------------------------------------------------------------------------------

    @property
    def _own(self) -> Learner:
        assert self._learner is not None, "load() comes first"
        return self._learner

    def _begin_sft(self, fresh: Path, config: SftConfig, lr: float) -> None:
        everything = self._agent.policy.model_copy(update={"lora": LoraConfig(), "last_layers": 0})
        self._sft = Sft(self._policy(fresh, everything), config, lr, self._ranks)

    def _end_sft(self) -> Reading:
        """The weights that SFT has made; nothing else of it stays."""
        assert self._sft is not None
        policy, self._sft = self._sft.policy, None
        return self._reading_of(WeightStream(policy.model), policy)

    def _load(self, start: Path, checkpoint: Checkpoint | None) -> None:
        policy = self._policy(start, self._agent.policy)
        reference = self._reference(policy, start) if find_loss(self._agent.loss).needs_reference else None
        self._learner = new_learner(self._agent, policy, reference, self._ranks)
        self._learner.memory = PeakMemory(policy.device)
        self._meter = self._new_meter(policy, reference is not None) if self.is_main else None
        self._streams.clear()
        if checkpoint is not None:
            restore_checkpoint(checkpoint, policy, self._learner.optimizer, self._ranks.files)

    def _policy(self, folder: Path, config: PolicyConfig) -> Policy:
        if self._ranks.size == 1:
            return load_policy(folder, config)
        from mgrpo.trainers.torch.shard import load_sharded

        return load_sharded(folder, config, self._ranks)

    def _reference(self, policy: Policy, folder: Path) -> Policy:
        if self._ranks.size == 1:
            return load_reference(policy, folder)
        from mgrpo.trainers.torch.shard import load_sharded_reference

        return load_sharded_reference(policy, folder, self._ranks)

    def _train(self, batches: Sequence[MiniBatch], recompute_old: bool, lr: float | None) -> dict[str, float]:
        learner = self._own
        assert learner.memory is not None
        learner.memory.begin()
        learned = learner.train(batches, recompute_old, lr)
        if self._ranks.size == 1:
            learner.most_memory = learner.memory.most()
        return learned

    def _new_meter(self, policy: Policy, has_reference: bool) -> StepMeter | None:
        """Whoever does not train has no steps."""
        if self._agent.frozen:
            return None
        every_row_acts = find_loss(self._agent.loss).every_token_acts
        return StepMeter(policy, every_row_acts, has_reference, self._ranks.size)

    def _read(self, adapter_only: bool) -> Reading:
        if adapter_only not in self._streams:
            self._streams[adapter_only] = WeightStream(self._own.policy.model, adapter_only)
        return self._reading_of(self._streams[adapter_only], self._own.policy)

    def _reading_of(self, stream: WeightStream, policy: Policy) -> Reading:
        if self._ranks.size == 1:
            return stream.read()
        from mgrpo.trainers.torch.shard import gather_to_main

        self._let_go(policy)
        return stream.read(gather_to_main)

    def _direct_engine(self) -> VllmEngineConfig:
        engine = self._agent.engine
        assert isinstance(engine, VllmEngineConfig), f"{engine.type} takes no weights from a trainer"
        return engine

    def _new_sender(self, **for_main: Any) -> DirectSender:
        policy, engine = self._own.policy, self._direct_engine()
        return DirectSender(policy, engine, self._ranks, limit=self.bucket_bytes, **for_main)

    def _command_direct(self, transfer: Transfer) -> None:
        self._broadcast("direct", transfer)

    def _probe(self, ids: tuple[int, ...]) -> Probe:
        found = probe(self._own.policy, ids)
        self._let_go(self._own.policy)
        return found

    def _let_go(self, policy: Policy) -> None:
        if self._ranks.size > 1:
            policy.let_go()  # type: ignore[attr-defined]

    def _save(self, step: int) -> None:
        self._let_go(self._own.policy)
        self._writer.begin(step, snapshot(self._own.policy, self._own.optimizer))

    @property
    def _data_ranks(self) -> int:
        """Ranks with rows of their own; those of a tp or cp group compute theirs together."""
        return self._ranks.size // self._agent.policy.mesh.same_rows

    def _for_ranks(self, parts: Sequence[T]) -> list[T]:
        """What each rank gets where parts[i] is for the i-th of _data_ranks."""
        return [part for part in parts for _ in range(self._ranks.size // len(parts))]

    def _begin_reading(self, adapter_only: bool) -> Reading:
        self._broadcast("weights", adapter_only)
        self._reading = self._read(adapter_only)
        return self._reading

    def _finish_reading(self) -> None:
        """The other ranks take part in a reading to its end, also where whoever asked for the weights gave up."""
        if self._reading is not None:
            self._reading.finish()
            self._reading = None

    def _broadcast(self, command: str, part: Any = None) -> None:
        self._finish_reading()
        self._ranks.broadcast(command, [part] * self._ranks.size)
