"""kill -9 of a trainer and of a worker in the middle of a transfer of weights, and cut links: no token carries a
version that did not sample it.

A sender publishes versions of a small model, some of them changed a little (patches), some everywhere (whole ones). A
receiver samples from it with the in-process engine while versions arrive over a slow link, and brings them in through
Team, as a rollout worker does. The sender writes each version to disk before it serves it; every sampled token's
log-prob is computed again from the version that the token carries. A sender that comes back begins from an older
version, so that the same number names other weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mgrpo.addresses import Addresses
from mgrpo.config import load_config
from mgrpo.engines.base import SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.model.policy import Policy
from mgrpo.pipeline.team import Team, _Source
from mgrpo.pipeline.worker_loop import WorkerLoop
from mgrpo.transport.client import Client
from mgrpo.weights import pull
from mgrpo.weights.pull import Pull
from tests.chaos.kills import ROOT
from tests.chaos.proxy import Proxy
from tests.chaos.weight_sender import CHUNK, orphaned
from tests.models import VOCAB, tiny_tokenizer
from tests.runs import RELAY

RATE = 2 << 20  # bytes a second of the link
PATIENCE_S = 120.0  # without a chunk or a loaded version: it hangs
FAULTS = ("sender", "receiver", "reset", "silence")
LOADS = ("patch", "whole")
MORE_LOADS = 40  # after the faults, for a kind that has not come yet


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# -- the receiver -----------------------------------------------------------------------------------------------------


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


class Told(Pull):
    """Says what arrives."""

    def _take(self, pulled: Any, offset: int, chunk: Any) -> None:
        super()._take(pulled, offset, chunk)
        say("chunk", label=self.label, whole=bool(self.pulling), received=self.received, size=self.size)


def receiver(url: str, seed: int) -> None:
    """A rollout worker without a task."""
    loop = WorkerLoop(lambda: True)
    config = load_config(RELAY, ["store.idle_timeout=600"])
    engine = HfEngine(Policy(model_of(1), tiny_tokenizer(), "main"), max_length=64)
    with Client(url, peer="trainer main", timeout=5.0) as client:
        team = Team(config, Addresses("inproc://none", {}), {"main": client}, loop)
        team._sources["main"] = _Source(client, engine, lambda text: say("report", text=text), Told())
        loop.run(_receive(team, engine, seed, os.getppid()))


async def _receive(team: Team, engine: HfEngine, seed: int, parent: int) -> None:
    held: list[str] = []
    sampling: set[asyncio.Task[None]] = set()
    while not orphaned(parent):
        weights = await asyncio.to_thread(team.fetch, "main", 0)
        if weights is not None:
            held.append(weights.label)
            await team.load("main", weights)
            if held[-1] != (label := team._sources["main"].label):  # a whole version came instead
                held.append(label)
            say("loaded", label=label, whole=weights.is_whole)
        sampling = {task for task in sampling if not task.done() or task.result()}
        while len(sampling) < 3:
            seed += 1
            sampling.add(asyncio.create_task(_sample(engine, held, seed)))
        await asyncio.sleep(0.02)


async def _sample(engine: HfEngine, held: list[str], seed: int) -> None:
    before, rng = len(held) - 1, np.random.default_rng(seed)
    prompt = rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist()
    out = await engine.generate(prompt, SamplingParams(48), seed=seed)
    say(
        "sampled", prompt=prompt, ids=out.token_ids.tolist(), logprobs=out.logprobs.tolist(),
        versions=out.versions.tolist(), labels=held[before:],
    )  # fmt: skip


# -- the judge --------------------------------------------------------------------------------------------------------


class Judge(threading.Thread):
    """Computes the log-probs of sampled tokens again, on a thread of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.worst = 0.0  # nats between a token's log-prob and that of the version that it carries
        self.tokens = self.mixed = 0
        self.wrong: list[str] = []
        self.control: list[float] = []  # the same with the version before
        self._folder, self._model = folder, model_of(2)
        self.start()

    def run(self) -> None:
        while (line := self.lines.get()) is not None:
            try:
                self._judge(line)
            except Exception as error:
                self.wrong.append(f"{line['labels']}: {error!r}")

    def _judge(self, line: dict[str, Any]) -> None:
        versions, logprobs = np.array(line["versions"]), np.array(line["logprobs"])
        gaps = np.full(len(versions), np.inf)
        for label in line["labels"]:
            mine = versions == int(label.rpartition(".v")[2])
            if mine.any():
                found = np.abs(self._logprobs(label, line) - logprobs)
                gaps[mine] = np.minimum(gaps, found)[mine]
        self.tokens += len(versions)
        self.mixed += len(set(versions)) > 1
        self.worst = max(self.worst, float(gaps.max()))
        if not gaps.max() <= 1e-4:
            self.wrong.append(f"{line['labels']}: tokens of {sorted(set(versions))} differ by {gaps.max()}")
        stem, _, version = line["labels"][-1].rpartition(".v")
        if (self._folder / f"{(before := f'{stem}.v{int(version) - 1}')}.safetensors").exists():
            self.control.append(float(np.abs(self._logprobs(before, line) - logprobs).max()))

    def _logprobs(self, label: str, line: dict[str, Any]) -> np.ndarray:
        """(n,) of the sampled tokens under a version."""
        weights = safetensors.torch.load_file(self._folder / f"{label}.safetensors")
        self._model.load_state_dict(weights)
        row, first = torch.tensor([[*line["prompt"], *line["ids"]]]), len(line["prompt"])
        with torch.no_grad():
            given = self._model(row).logits[0].log_softmax(-1)
        return given[first - 1 : -1].gather(1, row[0, first:, None])[:, 0].numpy()  # type: ignore[no-any-return]

    def close(self) -> None:
        self.lines.put(None)
        self.join(60)


class Scene:
    """A sender, a receiver and the link between them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.judge = Judge(folder)
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.reports: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()
        self._epoch = self._life = 0
        first = {name: t.detach() for name, t in model_of(0).named_parameters()}
        safetensors.torch.save_file(first, folder / "main.e0.v0.safetensors")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.proxy = Proxy(self._port, RATE)
        self.sender, self.receiver = self._send(), self._sample()

    def _send(self) -> subprocess.Popen[str]:
        self._epoch += 1
        url = f"tcp://127.0.0.1:{self._port}"
        return _start("tests.chaos.weight_sender", str(self.folder), url, str(self._epoch))

    def _sample(self) -> subprocess.Popen[str]:
        self._life += 1
        url = f"tcp://127.0.0.1:{self.proxy.port}"
        process = _start("tests.chaos.weights", url, str(1000 * self._life), stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for text in lines:
                with contextlib.suppress(ValueError):  # a line that a kill has cut off
                    self._take(json.loads(text), process.pid)

    def _take(self, line: dict[str, Any], life: int) -> None:
        if line["event"] == "sampled":
            self.judge.lines.put(line)
        elif line["event"] == "report":
            self.reports[line["text"]] += 1
        elif line["event"] == "loaded":
            self.loads[LOADS[line["whole"]]] += 1
        self.events.put({**line, "life": life})

    def wait(self, good: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The next event of the living receiver that is `good`. It hangs when nothing arrives for long."""
        moved = time.monotonic()
        while time.monotonic() - moved < PATIENCE_S:
            with contextlib.suppress(queue.Empty):
                event = self.events.get(timeout=1.0)
                if event["life"] == self.receiver.pid:
                    if event["event"] in ("chunk", "loaded"):
                        moved = time.monotonic()
                    if good(event):
                        return event
            for process in (self.sender, self.receiver):
                assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        raise AssertionError(f"{what}: no weights have moved for {PATIENCE_S:g} s")

    def fault(self, kind: str) -> bool:
        """In the middle of a transfer; whether it still was when the fault came."""
        while not self.events.empty():
            self.events.get()
        share = self.rng.uniform(0.05, 0.9)
        at = self.wait(
            lambda e: e["event"] == "chunk" and share <= e["received"] / e["size"] < 0.98, f"before {kind}"
        )
        if kind == "sender":
            _kill(self.sender)
            self.sender = self._send()
        elif kind == "receiver":
            _kill(self.receiver)
            self.receiver = self._sample()
        else:
            self.proxy.mode = "reset" if kind == "reset" else "black hole"
            time.sleep(self.rng.uniform(0.1, 0.5) if kind == "reset" else self.rng.uniform(0.5, 7.0))
            self.proxy.mode = "pass"
        since = [at]
        while not self.events.empty():
            since.append(self.events.get())
        return not any(event["event"] == "loaded" and event["label"] == at["label"] for event in since)

    def close(self) -> None:
        for process in (self.sender, self.receiver):
            _kill(process)
        self._reader.join(60)
        self.proxy.close()
        self.judge.close()


def _start(module: str, *arguments: str, stdout: int | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, text=True)


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(10)


@contextlib.contextmanager
def scene(folder: Path, seed: int) -> Iterator[Scene]:
    made = Scene(folder, seed)
    try:
        yield made
    finally:
        made.close()


def _load_both_kinds(s: Scene) -> None:
    """Which kinds came beside the faults is chance: a receiver that has fallen behind takes a whole version. Without
    faults it catches up."""
    for kind in LOADS:
        most = s.loads.total() + MORE_LOADS
        if not s.loads[kind]:
            s.wait(lambda _, k=kind, n=most: s.loads[k] > 0 or s.loads.total() >= n, f"for a {kind}")  # type: ignore[misc]


def kill_weights(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Faults, so many of them in the middle of a transfer (some come when it has just ended); after each, a new version
    must be loaded and sampled from."""
    kinds, middle, happened = [FAULTS[i % len(FAULTS)] for i in range(3 * kills)], 0, Counter[str]()
    random.Random(seed).shuffle(kinds)
    with scene(folder, seed) as s:
        s.wait(lambda e: e["event"] == "sampled", "at the start")
        for number, kind in enumerate(kinds):
            if middle == kills:
                break
            middle += s.fault(kind)
            happened[kind] += 1
            version = s.wait(lambda e: e["event"] == "loaded", f"fault {number}, {kind}")["label"]
            s.wait(lambda e, v=version: e["event"] == "sampled" and v in e["labels"], f"after fault {number}")  # type: ignore[misc]
        _load_both_kinds(s)
    judge = s.judge
    return {
        "faults": dict(happened), "in_the_middle": middle, "loads": {kind: s.loads[kind] for kind in LOADS},
        "tokens": judge.tokens, "of_several_versions": judge.mixed, "worst_gap": judge.worst,
        "wrong": judge.wrong[:3], "control_gap": statistics.median(judge.control or [0.0]),
        "reports": dict(s.reports.most_common(5)),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    pull.CHUNK = CHUNK
    receiver(sys.argv[1], int(sys.argv[2]))
