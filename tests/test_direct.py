"""Weights straight from two trainer ranks into the workers of servers, over gloo: bit-equal, and through failures."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mgrpo.model.policy import Policy, save_policy
from tests.direct_ranks import VARIANTS
from tests.direct_receivers import DirectVllm
from tests.direct_trainer import WAIT, Trainer
from tests.families import family
from tests.models import tiny_model, tiny_tokenizer
from tests.stopped import stands_still

TIMEOUT = 20.0  # seconds for which a silent server is waited for
BUCKET = 4096  # bytes: less than the larger tensors


class Servers:
    """Fake servers in an event loop of their own."""

    def __init__(self, folder: Path, sizes: list[int]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.all = self.do(self._make(folder, sizes))

    async def _make(self, folder: Path, sizes: list[int]) -> list[DirectVllm]:
        made = [DirectVllm(folder / f"s{number}", size) for number, size in enumerate(sizes)]
        for server in made:
            await server.start()
        return made

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT)

    def close(self) -> None:
        for server in self.all:
            self.do(server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT)
        self._loop.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One of two tensor-parallel workers, one of a single one."""
    made = Servers(tmp_path_factory.mktemp("servers"), [2, 1])
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies to start from."""
    folder = tmp_path_factory.mktemp("trainer")
    for kind in {kind for kind, _ in VARIANTS.values()}:
        model = family("Qwen3Moe") if kind == "moe" else tiny_model(kind)  # type: ignore[arg-type]
        save_policy(Policy(model, tiny_tokenizer(), kind), folder / kind)
    return folder


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Iterator[Trainer]:
    made = Trainer(folder, BUCKET)
    try:
        yield made
    finally:
        made.close()


def holds(servers: Servers, server: DirectVllm, sent: dict[str, torch.Tensor]) -> bool:
    """Whether its workers hold these weights, bit for bit, and no others."""
    held = servers.do(server.weights_of())
    return held.keys() == sent.keys() and all(
        held[name].dtype == tensor.dtype
        and held[name].shape == tensor.shape
        and torch.equal(held[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in sent.items()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_versions_arrive_bit_for_bit(servers: Servers, trainer: Trainer, variant: str) -> None:
    """Two FSDP ranks, uneven shards, buckets smaller than tensors, two servers: each worker's part is that of the
    trainer's weights in the engine's dtype, under the names of a checkpoint; label and pause are as they must be."""
    urls = [server.url for server in servers.all]
    assert "error" not in trainer.do("open", variant=variant, urls=urls, timeout=TIMEOUT)
    before: dict[str, torch.Tensor] = {}
    for version in range(3):
        sent = trainer.publish(f"main.e1.v{version}")
        assert sent.keys() == before.keys() or not before
        assert not before or any(not torch.equal(sent[name], before[name]) for name in sent)
        for server in servers.all:
            assert holds(servers, server, sent), trainer.said
            assert server.label == f"main.e1.v{version}" and server.running.is_set() and server.clean
        before = sent
        trainer.do("train", step=version)
    steps = servers.all[0].steps
    assert steps.count("mgrpo_direct_receive") > 3 * 3  # several buckets a version
    trainer.do("close")


def broken(server: DirectVllm) -> bool:
    """Its weights are torn, and answer nobody."""
    return not server.running.is_set()


def test_a_server_killed_in_the_middle_costs_the_others_nothing(servers: Servers, trainer: Trainer) -> None:
    """A worker dies inside a bucket: the trainer says which server and bucket and gives the version to the others. It
    goes on with the next versions, and the server that was started again gets the current one while it waits."""
    lost, other = servers.all
    trainer.do("open", variant="untied", urls=[lost.url, other.url], timeout=TIMEOUT)
    trainer.publish("main.e2.v0")
    servers.do(lost.ask("set_trap", rank=1, bucket=2, number=int(signal.SIGKILL)))
    trainer.said.clear()
    sent = trainer.publish("main.e2.v1")
    assert holds(servers, other, sent) and other.label == "main.e2.v1" and other.running.is_set()
    assert broken(lost) and lost.label == "main.e2.v0"
    (line,) = trainer.said
    assert lost.url in line and "bucket 2" in line and "main.e2.v1" in line
    trainer.do("train", step=0)
    sent = trainer.publish("main.e2.v2")
    assert holds(servers, other, sent) and other.label == "main.e2.v2"
    servers.do(lost.stop())
    servers.do(lost.start())
    trainer.wait_for(lambda: lost.label == "main.e2.v2" and lost.running.is_set(), "its return")
    assert holds(servers, lost, sent)
    assert any(f"{lost.url} has the weights again: main.e2.v2" in line for line in trainer.said)
    trainer.do("close")


def test_a_server_that_stands_still_is_waited_for_no_longer_than_its_timeout(
    servers: Servers, trainer: Trainer
) -> None:
    """A worker that is stopped, and comes back much later: the trainer goes on without it, and it gets the version when
    it is looked at again."""
    still, other = servers.all
    trainer.do("open", variant="untied", urls=[still.url, other.url], timeout=3.0)
    trainer.publish("main.e3.v0")
    servers.do(still.ask("set_trap", rank=1, bucket=1, number=int(signal.SIGSTOP)))
    trainer.said.clear()
    sent = trainer.publish("main.e3.v1")
    trainer.wait_for(
        lambda: other.label == "main.e3.v1", "the version of the other"
    )  # at once, on a quiet machine
    assert broken(still) and still.label == "main.e3.v0"
    assert any(still.url in line and "bucket 1" in line for line in trainer.said)
    os.kill(still.processes[1].pid or 0, signal.SIGCONT)
    trainer.wait_for(lambda: still.label == "main.e3.v1" and still.running.is_set(), "its return")
    assert holds(servers, still, sent) and holds(servers, other, sent)
    trainer.do("close")


def test_a_server_that_refuses_is_named_and_left_paused(servers: Servers, trainer: Trainer) -> None:
    """A model that does not know a tensor: the reason stands in the report; the trainer goes on. One that computes in
    another dtype ends the run by name, before anything is written."""
    odd, other = servers.all
    urls = [odd.url, other.url]
    trainer.do("open", variant="untied", urls=urls, timeout=TIMEOUT)
    servers.do(odd.ask("refuse", name="lm_head.weight"))
    sent = trainer.publish("main.e4.v0")
    assert holds(servers, other, sent) and broken(odd)
    assert any(odd.url in line and "KeyError: 'lm_head.weight'" in line for line in trainer.said)
    servers.do(odd.ask("refuse", name=""))
    trainer.wait_for(lambda: odd.label == "main.e4.v0" and odd.running.is_set(), "its healing")
    assert holds(servers, odd, sent)
    trainer.do("close")
    trainer.do("open", variant="untied", urls=urls, timeout=TIMEOUT, dtype="float32")
    found = trainer.do("publish", label="main.e4.v1")
    assert "computes in bfloat16, engine.dtype is float32" in found["error"] and odd.url in found["error"]
    assert odd.label == other.label == "main.e4.v0" and holds(servers, other, sent)
    trainer.do("close")


def test_a_trainer_that_dies_in_the_middle_leaves_a_server_that_the_next_one_updates(
    servers: Servers, folder: Path
) -> None:
    """Both ranks are killed inside a bucket: the workers stop waiting, the server stays paused, and the trainer that
    comes after, one epoch later, brings its version."""
    server = servers.all[0]
    first = Trainer(folder, BUCKET)
    try:
        first.do("open", variant="untied", urls=[server.url], timeout=TIMEOUT)
        first.publish("main.e6.v0")
        servers.do(server.ask("set_trap", rank=1, bucket=2, number=int(signal.SIGSTOP)))
        first.begin("publish", label="main.e6.v1")
        deadline = time.monotonic() + WAIT
        while not stands_still(server.processes[1].pid):
            assert time.monotonic() < deadline, server.steps
            time.sleep(0.02)
    finally:
        first.close()
    os.kill(server.processes[1].pid or 0, signal.SIGCONT)
    assert broken(server) and server.label == "main.e6.v0"
    second = Trainer(folder, BUCKET)
    try:
        second.do("open", variant="untied", urls=[server.url], timeout=TIMEOUT)
        sent = second.publish("main.e7.v0")
        second.wait_for(
            lambda: server.label == "main.e7.v0" and server.running.is_set(), "the next trainer's version"
        )
        assert holds(servers, server, sent)
    finally:
        second.close()
