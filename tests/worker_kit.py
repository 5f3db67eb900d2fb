"""A rollout worker between a store, trajectory logs and engines in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgrpo.addresses import Addresses
from mgrpo.config import load_config
from mgrpo.environments.episode import Agent
from mgrpo.environments.task import Task
from mgrpo.errors import RetryAfterError
from mgrpo.pipeline.batch_rollouts import BatchRollouts
from mgrpo.pipeline.rollout_worker import RolloutWorker
from mgrpo.pipeline.shipper import Shipper
from mgrpo.pipeline.worker_context import main_reward
from tests.play_kit import Letters, SlowEngine
from tests.runs import RELAY
from tests.ship_kit import FakeLog, FakeStore, group

ROLES = ("main", "left", "right")


class FakeTeam:
    """Agents whose weights are always those of version 0."""

    def __init__(self) -> None:
        self.agents = {role: Agent(role, SlowEngine(), Letters(), 1.0, 64) for role in ROLES}

    def connect(self, *_: object) -> None:
        pass

    def sync(self, at_least: Mapping[str, int]) -> int:
        return 0

    async def close(self) -> None:
        pass


class Worker:
    """A RolloutWorker whose links are replaced."""

    def __init__(
        self, folder: Path, task: Task, *overrides: str, number: int = 0, store: Any = None, team: Any = None
    ) -> None:
        sets = ["eval.every=1000", "trainer.group_size=2", *overrides]
        self.config = load_config(RELAY, sets)
        agents = {role: f"ipc://{folder}/{role}" for role in ROLES}
        addresses = Addresses(f"ipc://{folder}/store", agents)
        self.worker: Any = RolloutWorker(self.config, number, task, addresses, folder)
        self.context = self.worker._context
        self.context.store.close()
        self.context.shipper.close()
        self.store = self.context.store = FakeStore() if store is None else store
        self.logs = {role: FakeLog(role) for role in ROLES}
        self.context.shipper = Shipper(self.store, self.logs, main_reward(self.config), 60.0)  # type: ignore[arg-type]
        self.context.team = FakeTeam() if team is None else team
        self.batches: Any = BatchRollouts(self.context, self.worker._evaluations)

    def open(self, *states: str) -> None:
        """What the store says of the next groups; it admits no more."""
        self.store.opened = {i: group(f"0/{i}", i, state=state) for i, state in enumerate(states)}
        self.store.opened[len(states)] = RetryAfterError("too far ahead")

    def play(self) -> dict[str, float]:
        """Play the next batch; its metrics."""
        self.batches._cursor = 0
        self.batches._play(self.batches._open_batch())
        metrics: dict[str, float] = self.store.reports[-1]["metrics"]
        return metrics

    def close(self) -> None:
        self.worker.__exit__(None, None, None)
