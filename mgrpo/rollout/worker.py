"""A rollout worker: admission -> newest weights -> a wave of rollouts -> tokens and numbers shipped.

A wave is the groups of one step that the store admits together; all its rollouts are played at once, batched by the
engines. Which questions a wave holds follows from (seed, index) alone, and a restarted worker plays the unfinished wave
again as a whole: the same batches, so the same tokens to the last bit, of which only the missing ones are shipped.

Worker 0 also checks the gate before RL and evaluates: with the weights of a step, between two waves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from mgrpo.config import RunConfig, config_digest
from mgrpo.config.addresses import Addresses
from mgrpo.credit import check_scores, trajectory_reward
from mgrpo.errors import DeadlineError, InfrastructureError, RetryAfterError
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.engines import open_engine
from mgrpo.rollout.episode import Agent, mix
from mgrpo.rollout.play import Accuracy, Ask, Played, all_failed, evaluate, play_all
from mgrpo.rollout.shipper import Shipper
from mgrpo.rollout.task import Question, Split, Task
from mgrpo.spool import SpoolClient
from mgrpo.store.client import WorkerClient, WorkerGroup
from mgrpo.store.records import World
from mgrpo.transport.client import Client
from mgrpo.transport.codec import Sender
from mgrpo.transport.keys import client_keys
from mgrpo.types import MAIN, Rollout
from mgrpo.weights import Weights, fetch_shell, fetch_weights

WAIT_SLICE = 1.0  # seconds between two looks at the run's state while waiting
LOST_WAVES = 3  # a wave can be one question that nothing answers; that many in a row are an outage
EVAL_SEED = 0x65_76_61_6C  # evaluation noise is the same in every run and at every step


class Over(Exception):
    """The run is not running any more."""


@dataclass(slots=True)
class _Source:
    """Where one role's weights come from, and which the engine holds."""

    client: Client
    engine: Engine
    label: str = ""


class RolloutWorker:
    """Use as a context manager; leaving it closes every connection."""

    def __init__(
        self, config: RunConfig, number: int, task: Task, addresses: Addresses, folder: Path
    ) -> None:
        """folder: this worker's own, for its record."""
        torch.set_num_threads(config.rollout.threads)
        self._config, self._number, self._task, self._addresses = config, number, task, addresses
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
        self._spools = {
            role: SpoolClient(
                addresses.agents[role], digest=digest, role=role, timeout=self._timeout, security=key
            )
            for role in config.training_roles
        }
        self._shipper = Shipper(self._store, self._spools, self._main_reward, self._timeout)
        self._recorder = RolloutRecorder(config.record, folder)
        self._sources: dict[str, _Source] = {}
        self._agents: dict[str, Agent] = {}
        self._loop = asyncio.new_event_loop()
        self._cursor = number  # index of the next group this worker may open
        self._evaluated = -1  # step of the last evaluation
        self._lost_waves = 0  # waves without a rollout since the last one that had some

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shipper.close()
        for spool in self._spools.values():
            spool.close()
        for client in self._clients.values():
            client.close()
        self._store.close()
        self._recorder.close()
        for source in self._sources.values():
            self._loop.run_until_complete(source.engine.close())
        self._loop.close()

    def run(self) -> None:
        """Roll out until every trainer has made its last step, or the run is stopped."""
        try:
            self._connect_policies()
            version = self._wait_for_version(0)
            if self._number == 0 and version == 0 and not self._gate():
                return
            self._cursor += version * self._config.trainer.questions // self._workers * self._workers
            idle_since = time.monotonic()
            while (version := self._published()) < self._config.trainer.steps:
                if wave := self._open_wave():
                    self._play(wave)
                    idle_since = time.monotonic()
                else:
                    self._wait_a_little(version + 1, idle_since)
            if self._number == 0:
                self._finish(version)
        except Over:
            return

    # -- stations ------------------------------------------------------------------------------------------------

    def _connect_policies(self) -> None:
        """Build each role's engine from what its trainer says of the policy; trainers may still be warming up."""
        for role in self._config.roles:
            client = self._clients[role]
            files = self._shell(client)
            self._recorder.tokenizer(role, files)
            agent = self._config.agents[role]
            engine, tokenizer = open_engine(self._config, role, files, self._addresses, self._say)
            self._sources[role] = _Source(client, engine)
            self._agents[role] = Agent(role, engine, tokenizer, agent.loss.temperature, agent.max_length)

    def _shell(self, client: Client) -> dict[str, bytes]:
        """The policy's files without weights. Its trainer may be warming up, for any time, or be between two lives, for
        idle_timeout seconds."""
        heard = time.monotonic()
        while True:
            try:
                if files := fetch_shell(client, WAIT_SLICE):
                    return files
                heard = time.monotonic()
            except DeadlineError:
                if time.monotonic() - heard > self._config.store.idle_timeout:
                    raise
            self._check_running()

    def _gate(self) -> bool:
        """Check the policies RL starts from; False ends the run. A run without the gate goes on, and is not valid."""
        n = self._config.eval.gate
        self._sync({})
        self._evaluate("heldout", 0)
        self._evaluate("validation", 0)
        if not n:
            self._store.report(
                "gate", {"valid": False, "figures": {}, "text": "skipped (eval.gate = 0): not valid"}
            )
            return True
        report = self._loop.run_until_complete(self._task.gate(self._agents, n, self._config.seed))
        figures = {name: list(values) for name, values in report.figures.items()}
        self._store.report("gate", {"valid": report.valid, "figures": figures, "text": str(report)})
        if not report.valid:
            self._store.set_control("stopping", f"not a valid start, RL was not begun: {report}")
        return report.valid

    def _open_wave(self) -> list[tuple[WorkerGroup, Question]]:
        """The groups that the store admits now, at most one step's share; [] when there is no work yet.

        Groups that are complete already (after a restart) stay in the wave as long as one of it is not, so that the
        engines see the batches they saw before.
        """
        share = max(1, self._config.trainer.questions // self._workers)
        wave: list[tuple[WorkerGroup, Question]] = []
        while len(wave) < share:
            index = self._cursor + len(wave) * self._workers
            if self._is_beyond_the_run(index):
                break
            question = self._task.question(index, self._config.seed)
            try:
                group = self._store.open_group(
                    query=f"{index // self._config.trainer.questions}/{index}",
                    k=self._config.trainer.group_size,
                    d_max={role: self._config.agents[role].d_max for role in self._config.roles},
                    index=index,
                    meta={"question": question.text[:200]},
                    seed=self._config.seed,
                    timeout=0.0,
                )
            except RetryAfterError:
                break
            wave.append((group, question))
        self._cursor += len(wave) * self._workers
        if all(len(group.finished) == group.k for group, _ in wave) and wave:
            return self._open_wave()
        return wave

    def _is_beyond_the_run(self, index: int) -> bool:
        """No step will claim this group: it comes after those of the last step, and no group that was lost to some role
        left room."""
        planned = self._config.trainer.steps * self._config.trainer.questions
        if index < planned:
            return False
        return index >= planned + max(int(role["lost"]) for role in self._store.stats()["roles"].values())

    def _play(self, wave: list[tuple[WorkerGroup, Question]]) -> None:
        oldest = {
            role: max(group.oldest.get(role, 0) for group, _ in wave) for role in self._config.training_roles
        }
        version = self._sync(oldest)
        if self._number == 0:
            self._evaluate_if_due(version)
        began = time.monotonic()
        groups = {group.query: group for group, _ in wave}
        tokens = drift = failed = 0
        failure = ""

        async def done(played: Played) -> None:
            nonlocal tokens, drift, failed, failure
            group = groups[played.ask.query]
            drift += played.drift
            failed += played.rollout is None
            failure = played.failure or failure
            tokens += _sampled_tokens(played.rollout)
            self._check_scores(played.rollout)
            if played.ask.rollout not in group.finished:
                self._record(group, played)
                self._shipper.ship(group, played)

        asks = [Ask(group.query, question, k) for group, question in wave for k in range(group.k)]
        self._loop.run_until_complete(
            play_all(self._task, asks, self._agents, lambda ask: self._seed(groups[ask.query].index), done)
        )
        self._shipper.drain()
        self._lost_waves = self._lost_waves + 1 if failed == len(asks) else 0
        if (
            self._lost_waves == LOST_WAVES
        ):  # the next would fare no better: whoever watches this process hears why
            raise InfrastructureError(all_failed(failed, f"each of {LOST_WAVES} waves", failure))
        seconds = time.monotonic() - began
        metrics = {
            "rollout/perf/tok_per_s": tokens / seconds,
            "rollout/time/wave": seconds,
            "rollout/retoken_drift": drift,
            "rollout/failed": failed,
        }
        self._store.report("rollouts", {"step": version, "metrics": metrics})

    def _finish(self, version: int) -> None:
        """The last evaluation, with the weights of the last step; then the run is over."""
        self._sync(dict.fromkeys(self._config.training_roles, version))
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

            def seen(number: int, played: Played) -> None:
                self._check_scores(played.rollout)
                asked = (played.ask.question.text, played.ask.question.answer)
                self._recorder.evaluation(step, split, mode, number, asked, played.rollout)

            return self._loop.run_until_complete(
                evaluate(self._task, questions, self._agents, greedy=greedy, seed=EVAL_SEED, seen=seen)
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

    def _record(self, group: WorkerGroup, played: Played) -> None:
        step = group.index // self._config.trainer.questions
        ask = played.ask
        asked = (ask.question.text, ask.question.answer)
        self._recorder.train(
            step, group.index, group.query, ask.rollout, asked, played.rollout, played.failure
        )

    # -- helpers -------------------------------------------------------------------------------------------------

    @property
    def _workers(self) -> int:
        return self._config.rollout.workers

    def _seed(self, index: int) -> int:
        return mix(self._config.seed, index)

    def _say(self, line: str) -> None:
        self._store.report("phase", {"text": line})

    def _main_reward(self, rollout: Rollout) -> float:
        weights = self._config.agents[MAIN].reward
        return trajectory_reward(MAIN, weights, rollout.main.scores, rollout.correct)

    def _check_scores(self, rollout: Rollout | None) -> None:
        """A reward that does not fit the task's scores would be wrong in every rollout: it ends the run by name."""
        for t in rollout.trajectories() if rollout is not None else ():
            check_scores(t.role, self._config.agents[t.role].reward, t.scores)

    def _sync(self, at_least: Mapping[str, int]) -> int:
        """Bring every engine to its trainer's newest weights, those of a role in `at_least` to this version or a later
        one; returns the oldest version of the training roles."""
        versions = []
        for role, source in self._sources.items():
            weights = self._fetch(source, at_least.get(role, 0))
            if weights is not None:
                self._loop.run_until_complete(source.engine.load(weights, weights.version))
                source.label = weights.label
            if role in self._config.training_roles:
                versions.append(source.engine.version)
        return min(versions)

    def _fetch(self, source: _Source, at_least: int) -> Weights | None:
        deadline = time.monotonic() + self._config.store.idle_timeout
        while True:
            try:
                return fetch_weights(source.client, source.label, at_least, WAIT_SLICE)
            except DeadlineError:
                if time.monotonic() > deadline:
                    raise
            self._check_running()

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
        self._check_running()

    def _check_running(self) -> None:
        if self._store.world().control.state != "running":
            raise Over


def run_worker(config: RunConfig, number: int, task: Task, addresses: Addresses, folder: Path) -> None:
    """Run rollout worker `number` until the run is over; its record goes to `folder`."""
    with RolloutWorker(config, number, task, addresses, folder) as worker:
        worker.run()


def _oldest(world: World) -> int:
    return min(-1 if role.version is None else role.version for role in world.roles)


def _sampled_tokens(rollout: Rollout | None) -> int:
    if rollout is None:
        return 0
    return sum(int(t.loss_mask.sum()) for t in rollout.trajectories())
