"""A streaming rollout worker on a thread, with a real store and a trainer that the test plays; its engines are
scripted, its trajectory logs in memory. Nothing here depends on speed: rollouts wait at gates that the test opens."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig, config_digest, load_config
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.environments.episode import Agent, Episode
from mgrpo.pipeline.rollout_worker import RolloutWorker
from mgrpo.pipeline.shipper import Shipper
from mgrpo.pipeline.worker_context import main_reward
from mgrpo.run.processes import run_params
from mgrpo.store.server import StoreServer
from mgrpo.store.trainer_client import TrainerClient
from mgrpo.trajectory_log.format import LogRef
from mgrpo.types import Rollout, Trajectory
from mgrpo.weights.layout import Layout
from mgrpo.weights.version import Weights
from tests.play_kit import GivenTask, Letters
from tests.runs import ROOT, wait_for
from tests.ship_kit import answered

SMALL = (
    "eval.every=1000",
    "trainer.questions=2",
    "trainer.group_size=2",
    "trainer.max_lag=2",
    "trainer.steps=3",
)


class VersionedEngine(Engine):
    """One token a turn of the event loop, each of the version held then."""

    def __init__(self) -> None:
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        versions = []
        for _ in range(params.max_tokens):
            await asyncio.sleep(0)
            versions.append(self._version)
        n = len(versions)
        return Generation(
            np.full(n, ord("x"), np.int32), np.full(n, -1, np.float32), np.array(versions, np.int32), "length"
        )

    async def load(self, path_or_state: object, version: int) -> None:
        self._version = version


class ScriptedTeam:
    """An agent alone. Its trainer's weights can be fetched while `open` is set."""

    def __init__(self) -> None:
        self.engine = VersionedEngine()
        self.agents = {"main": Agent("main", self.engine, Letters(), 1.0, 64)}
        self.published = 0
        self.begun: list[int] = []  # versions whose pull was broken off: they come before the newest
        self.open = threading.Event()
        self.open.set()

    def connect(self, *_: object) -> None:
        pass

    def sync(self, at_least: Mapping[str, int]) -> int:
        self.engine._version = self.published
        return self.published

    def versions(self) -> dict[str, int]:
        return {"main": self.engine.version}

    def waiting(self) -> int:
        return 3

    def fetch(self, role: str, at_least: int) -> Weights | None:
        assert self.open.wait(60) and self.published >= at_least
        version = self.begun[0] if self.begun else self.published
        if version == self.engine.version and not self.begun:
            return None
        self.begun = self.begun[1:]
        return Weights(f"{role}.e1.v{version}", version, Layout(b"", ()))

    async def load(self, role: str, weights: Weights) -> None:
        await self.engine.load(weights, weights.version)

    async def close(self) -> None:
        pass


class KeptLog:
    """A trajectory log that keeps what it is sent."""

    url = "tcp://10.0.0.7/main"

    def __init__(self) -> None:
        self.kept: list[Trajectory] = []

    def append(self, trajectory: Trajectory, *, attempt: int = 0, index: int = 0) -> Future[LogRef]:
        self.kept.append(trajectory)
        return answered(LogRef("main", 0, 0, 0, 0))

    def close(self) -> None:
        pass


class Gates:
    """The script of a task: every rollout is noted as it starts, and waits where the test has shut its gate."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []  # (group, rollout)
        self.ended: list[tuple[int, int]] = []
        self.in_flight = self.most = 0
        self.evaluated: list[list[int]] = []  # versions of the tokens of each rollout of an evaluation
        self.shut: set[tuple[int, int] | str] = set()  # rollouts, or "eval"
        self.failing = False
        self.lost: set[int] = set()  # groups of which no rollout succeeds

    async def wait(self, key: tuple[int, int] | str) -> None:
        while key in self.shut:
            await asyncio.sleep(0.005)

    async def script(self, episode: Episode) -> Rollout:
        evaluation = episode.query.startswith("eval/")
        key = (int(episode.query.split("/")[-1]), episode.rollout)
        if not evaluation:
            self.started.append(key)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            main = episode.open("main")
            main.append("hi")
            await main.sample(2, stop=".")
            await self.wait("eval" if evaluation else key)
            if self.failing or (key[0] in self.lost and not evaluation):
                raise KeyError("nothing works")
            await main.sample(2, stop=".")
        finally:
            self.in_flight -= 1
        main.close(format=1.0)
        if evaluation:
            self.evaluated.append(versions_of(main.trajectory()))
        else:
            self.ended.append(key)
        return episode.finish(1.0)


def versions_of(trajectory: Trajectory) -> list[int]:
    """Of its sampled tokens, in order."""
    return [int(v) for v in trajectory.versions[trajectory.loss_mask != 0]]


class Run:
    """A store, and the one trainer of the run."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.config: RunConfig = load_config(ROOT / "tests" / "alone.toml", [*SMALL, *overrides])
        self.server = StoreServer("tcp://127.0.0.1:0", folder / "store.db", run_params(self.config))
        self.server.__enter__()
        self.trainer = TrainerClient(self.server.url, "trainer:main", run=config_digest(self.config))
        self.trainer.resume(-1)
        self.step = 0
        self.workers: list[Streamed] = []
        self.publish()

    def publish(self) -> None:
        """Version = steps done."""
        for worker in self.workers:
            worker.team.published = self.step
        self.trainer.status(version=self.step, step=self.step, checkpoint_step=-1)

    def train(self) -> list[int]:
        """One step, as soon as its groups are complete; their indices."""
        groups = self.trainer.claim(self.config.trainer.questions, timeout=120)
        for group in groups:
            oldest = min(i.version_min for i in group.invocations)
            assert self.step - oldest <= self.config.trainer.max_lag, f"{group.query} is too old"
        self.trainer.apply(self.step, groups)
        self.step += 1
        self.publish()
        return [group.index for group in groups]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.trainer.close()
        self.server.__exit__(None, None, None)


class Streamed:
    """A worker of the run, streaming on a thread from begin() to end()."""

    def __init__(self, run: Run, number: int = 0) -> None:
        self.gates, self.team, self.log = Gates(), ScriptedTeam(), KeptLog()
        self.team.published = run.step
        addresses = Addresses(run.server.url, {"main": f"ipc://{run.folder}/main"})
        folder = run.folder / f"worker-{number}-{len(run.workers)}"
        self.worker: Any = RolloutWorker(run.config, number, GivenTask(self.gates.script), addresses, folder)
        self.context = self.worker._context
        self.context.shipper.close()
        self.context.shipper = Shipper(
            self.context.store,
            {"main": self.log},
            main_reward(run.config),
            60.0,  # type: ignore[dict-item]
        )
        self.context.team = self.team
        self.reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
        send = self.context.store.report

        def report(kind: str, payload: dict[str, Any]) -> None:
            self.reports[kind].append(payload)
            send(kind, payload)

        self.context.store.report = report
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="streamed")
        run.workers.append(self)

    def begin(self, *shut: tuple[int, int] | str) -> Streamed:
        """Stream, with these gates shut."""
        self.gates.shut.update(shut)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self.worker._stream()
        except BaseException as error:
            self._error = error

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it, and for the worker's own error if that comes first."""
        wait_for(lambda: self._error is not None or condition(), what)
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait for its end; raises what it ended with."""
        self._thread.join(240)
        assert not self._thread.is_alive(), "the worker did not end"
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self.gates.shut.clear()
        self.worker.stop()
        self.team.open.set()
        if self._thread.is_alive():
            self._thread.join(240)
        self.worker.__exit__(None, None, None)
