"""kill -9: the store under load, and a trainer at every stage of its step."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import mgrpo
from mgrpo.errors import MgrpoError
from mgrpo.store.database import Database
from mgrpo.store.worker_client import WorkerClient, WorkerGroup
from tests.store_kit import DIGEST

ROOT = Path(__file__).parent.parent.parent
STATIONS = ("claimed", "stepped", "applied", "checkpointed", "committed")


def python(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment)


class StoreProcess:
    """A store in a process of its own that can be killed and started again at the same address."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder, self.url, self._changes = folder, f"ipc://{folder}/store", changes
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        code = (
            "import sys; from mgrpo.store.server import run_store; from tests.store_kit import run_params;"
            f"run_store(sys.argv[1], sys.argv[2], run_params(**{self._changes!r}))"
        )
        self.process = python("-c", code, self.url, str(self.folder / "s.db"))
        return self.process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def running_store(folder: Path, **changes: object) -> Iterator[StoreProcess]:
    store = StoreProcess(folder, **changes)
    try:
        yield store
    finally:
        store.kill()


# -- the store ----------------------------------------------------------------------------------------------


class _Load:
    """One client that writes as fast as its window allows and remembers what was acknowledged."""

    def __init__(self, url: str, number: int) -> None:
        self.number = number
        self.client: WorkerClient = mgrpo.connect(
            url, role="worker", run=DIGEST, name=f"load{number}", timeout=900
        )
        self.group = self.client.open_group(query=f"load{number}", k=2, d_max={}, index=number, timeout=60)
        self.acked: list[tuple[int, int]] = []
        self.stop = threading.Event()
        self.errors: list[str] = []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        at = 0
        while not self.stop.is_set():
            rollout, invocation = at % 2, at // 2 % 60_000
            at += 1
            future = self.client.invocation_done(
                self.group, rollout, role="sub", invocation=invocation, n_tokens=invocation
            )
            self.group._waiting.clear()
            future.add_done_callback(lambda done, key=(rollout, invocation): self.done(done, key))
            if at % 64 == 0:
                time.sleep(0.005)

    def done(self, future: Future, key: tuple[int, int]) -> None:
        error = future.exception()
        if error is None:
            self.acked.append(key)
        else:
            self.errors.append(str(error))


def kill_store(folder: Path, kills: int, seed: int, clients: int = 4) -> dict[str, int]:
    """Kill the store at random moments under load; every acknowledged record must be in its file."""
    rng = random.Random(seed)
    with running_store(folder, max_lag=1000) as store:
        for role in ("main", "sub"):
            with mgrpo.connect(store.url, role=f"trainer:{role}", run=DIGEST, timeout=60) as trainer:
                trainer.resume(-1)
                trainer.status(version=0, step=-1, checkpoint_step=-1)
        loads = [_Load(store.url, number) for number in range(clients)]
        for _ in range(kills):
            time.sleep(rng.uniform(0.05, 0.4))
            store.kill()
            store.start()
            seen = sum(len(load.acked) for load in loads)
            deadline = time.monotonic() + 30
            while sum(len(load.acked) for load in loads) < seen + 100 and time.monotonic() < deadline:
                time.sleep(0.01)
        for load in loads:
            load.stop.set()
            load.thread.join(60)
            load.client.flush(300)
            load.client.close()
        store.kill()
    database = Database(folder / "s.db")
    present = {row[:3] for row in database._db.execute("SELECT query, rollout, invocation FROM invocations")}
    rows = database._db.execute("SELECT count(*) FROM invocations").fetchone()[0]
    database.close()
    acked = {(f"load{load.number}", *key) for load in loads for key in load.acked}
    return {
        "kills": kills,
        "acks": sum(len(load.acked) for load in loads),
        "lost": len(acked - present),
        "duplicates": rows - len(present),
        "errors": sum(len(load.errors) for load in loads),
    }


# -- a trainer ----------------------------------------------------------------------------------------------


def toy_trainer(url: str, folder: str, steps: int, die: str) -> None:
    """A trainer whose weights are a vector; `die` is STATION:STEP. Its checkpoint is one file, renamed into
    place."""
    at = tuple(die.split(":")) if die else ("", "")
    path = Path(folder) / "checkpoint.npz"

    def stage(name: str, step: int) -> None:
        if at == (name, str(step)):
            os.kill(os.getpid(), signal.SIGKILL)

    step, weights = 0, np.zeros(8)
    if path.exists():
        with np.load(path) as saved:
            step, weights = int(saved["step"]), saved["weights"]
    with mgrpo.connect(url, role="trainer:main", run=DIGEST, timeout=60) as trainer:
        trainer.resume(step - 1)
        trainer.status(version=step, step=step, checkpoint_step=step - 1)
        while step < steps:
            groups = trainer.claim(2, timeout=60)
            stage("claimed", step)
            for group in groups:
                rng = np.random.default_rng([group.index, step])
                weights = weights * 0.9 + sum(r.reward for r in group.rollouts) * rng.standard_normal(8)
            stage("stepped", step)
            trainer.apply(step, groups)
            stage("applied", step)
            if step % 2 or step == steps - 1:
                with Path(f"{path}.new").open("wb") as file:
                    np.savez(file, step=step + 1, weights=weights)
                    file.flush()
                    os.fsync(file.fileno())
                Path(f"{path}.new").rename(path)
                stage("checkpointed", step)
                trainer.commit(step)
                stage("committed", step)
            step += 1
            trainer.status(version=step, step=step, checkpoint_step=step - 1)


def kill_trainer(folder: Path, deaths: Sequence[tuple[str, int]], steps: int) -> dict[str, object]:
    """Train in synchronous mode while the trainer dies at each of `deaths` (stage, step); returns its final
    weights and the trained-group ledger."""
    folder.mkdir()
    with running_store(folder, training_roles=["main"]) as store:
        worker = mgrpo.connect(store.url, role="worker", run=DIGEST, timeout=60)
        left = [f"{stage}:{step}" for stage, step in deaths] + [""]
        process = spawn(store.url, folder, steps, left.pop(0))
        index = restarts = 0
        deadline = time.monotonic() + 300 + 60 * len(deaths)
        while process.poll() is None or process.returncode != 0:
            assert time.monotonic() < deadline, f"stuck at group {index} after {restarts} restarts"
            if process.poll() is not None:
                assert process.returncode == -signal.SIGKILL, process.returncode
                restarts += 1
                process = spawn(store.url, folder, steps, left.pop(0))
            if index < 2 * steps:
                try:
                    group = worker.open_group(query=f"q{index}", k=2, d_max={}, index=index, timeout=0.1)
                except MgrpoError:
                    continue
                finish(worker, group)
                index += 1
            else:
                time.sleep(0.02)
        lines = worker.trained("main")
        worker.close()
    with np.load(folder / "checkpoint.npz") as saved:
        weights = saved["weights"].tobytes().hex()
    return {"weights": weights, "trained": [(t.step, t.index) for t in lines], "restarts": restarts}


def spawn(url: str, folder: Path, steps: int, die: str) -> subprocess.Popen[bytes]:
    return python("-m", "tests.chaos.kills", json.dumps([url, str(folder), steps, die]))


def finish(worker: WorkerClient, group: WorkerGroup) -> None:
    for rollout in range(2):
        worker.invocation_done(group, rollout, role="main", n_tokens=1)
        worker.rollout_final(group, rollout, reward=rollout + group.index, correct=1.0, d_k={}).result(60)


if __name__ == "__main__":
    toy_trainer(*json.loads(sys.argv[1]))
