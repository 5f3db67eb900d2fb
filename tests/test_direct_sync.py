"""A rollout worker whose servers get their weights from the trainer itself: it waits for labels, updates nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mgrpo.engines.client import ServerDown
from mgrpo.engines.labels import Label
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.direct_sync import DirectSync
from mgrpo.weights.layout import Layout
from mgrpo.weights.version import Weights
from tests.fake_vllm import FakeVllm
from tests.server_bench import PROMPT, SAMPLED, Bench, on_fakes, until


class Receiving(FakeVllm):
    """A fake server with the plug-in, as it looks from outside."""

    received = 0

    def on_collective_rpc(self, body: dict[str, Any], query: str) -> Any:
        assert body["method"] == "mgrpo_direct_progress"
        return {"results": [{"label": "", "received": self.received}]}


def direct(version: int) -> Weights:
    return Weights(f"e1.v{version}", version, Layout(b"", ()))


def serve(server: FakeVllm, version: int) -> None:
    """What the trainer does at the end of an update."""
    server.label, server.clean = f"e1.v{version}", True
    server.running.set()


def test_a_worker_waits_until_the_trainer_has_updated_the_server(tmp_path: Path) -> None:
    """The label alone makes a version known; requests are answered by it, and no call changes the server."""

    async def test(bench: Bench[Receiving]) -> None:
        (server,) = bench.servers
        engine = bench.engine(DirectSync(tmp_path / "weights", 30.0, idle=0.2))
        serve(server, 1)
        await engine.load(direct(1), 1)
        assert engine.version == 1
        assert (await engine.generate(PROMPT, SAMPLED, seed=1)).versions.tolist() == [1] * 8
        server.running.clear()  # the trainer updates it
        loading = asyncio.create_task(engine.load(direct(2), 2))
        await asyncio.sleep(0.5)
        assert not loading.done()
        serve(server, 2)
        await loading
        assert engine.version == 2
        assert (await engine.generate(PROMPT, SAMPLED, seed=1)).versions.tolist() == [2] * 8
        assert not {"/pause", "/resume", "/update_weight_version"} & set(server.calls)

    on_fakes(Receiving, 1, test, tmp_path)


def test_a_server_that_missed_a_version_is_asked_nothing_until_it_has_it(tmp_path: Path) -> None:
    """The others answer meanwhile; it returns without any call of the worker's that changes it."""

    async def test(bench: Bench[Receiving]) -> None:
        late, other = bench.servers
        engine = bench.engine(DirectSync(tmp_path / "weights", 30.0, idle=0.2))
        for server in (late, other):
            serve(server, 1)
        await engine.load(direct(1), 1)
        serve(other, 2)
        await engine.load(direct(2), 2)
        assert engine.version == 2
        late.bodies.clear()
        answers = await asyncio.gather(*(engine.generate(PROMPT, SAMPLED, seed=s) for s in range(4)))
        assert {int(v) for a in answers for v in a.versions} == {2} and not late.bodies
        assert any("has not brought e1.v2 within 0.2 s" in line for line in bench.said)
        serve(late, 2)
        await until(lambda: bench.pool.servers[0].ready, "its return")

    on_fakes(Receiving, 2, test, tmp_path)


def test_an_update_is_waited_for_as_long_as_it_moves(tmp_path: Path) -> None:
    """Buckets that arrive are progress; a paused server without any is given up by name, after `timeout` seconds."""

    async def run() -> None:
        async with Receiving(tmp_path / "s") as server:
            client, sync = VllmClient(server.url, 5.0), DirectSync(tmp_path / "weights", 0.6, idle=0.1)
            serve(server, 1)
            server.running.clear()
            waiting = asyncio.create_task(sync.ensure_version(client, Label(1, 2)))
            for _ in range(8):  # longer than the bound in all
                await asyncio.sleep(0.2)
                server.received += 1
            moved = not waiting.done()
            serve(server, 2)
            if moved:  # else this machine stood still for longer than the bound
                assert await waiting == Label(1, 2)
            server.running.clear()
            with pytest.raises(ServerDown, match=r"an update of it stands still; .* e1.v3 within 0.6 s"):
                await sync.ensure_version(client, Label(1, 3))
            await client.close()

    asyncio.run(run())
