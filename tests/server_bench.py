"""What the tests of engines over HTTP share: fake servers, engines over them, and what their answers must be."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Generic, TypeVar

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.client import ServerClient
from mgrpo.engines.pool import EnginePool
from mgrpo.engines.server_engine import ServerEngine
from mgrpo.engines.sglang.client import SglangClient
from mgrpo.engines.sglang.weight_sync import SglangFolderSync
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.plugin_sync import PluginSync
from mgrpo.engines.vllm.weight_sync import VllmFolderSync
from mgrpo.engines.weight_sync import WeightSync
from mgrpo.model.vocabulary import Vocabulary
from mgrpo.weights.version import Weights
from tests.fake_server import VOCAB, FakeServer, token
from tests.fake_sglang import FakeSglang
from tests.fake_vllm import FakePlugin, FakeVllm
from tests.models import tiny_tokenizer
from tests.plugin_kit import state, whole

PROMPT = [3, 1, 4]
SAMPLED = SamplingParams(max_tokens=8)


S = TypeVar("S", bound=FakeServer)


class Bench(Generic[S]):
    """Fake servers and engines over them, as several workers would have."""

    def __init__(self, folder: Path, servers: list[S]) -> None:
        self.folder, self.servers, self.said = folder, servers, list[str]()
        self._engines: list[ServerEngine[Any]] = []

    def engine(
        self,
        sync: WeightSync[Any] | None = None,
        *,
        timeout: float = 30.0,
        watch: float = 0.05,
        patience: float = 30.0,
        max_length: int = 64,
        tokens: int = VOCAB,
    ) -> ServerEngine[Any]:
        """tokens: of the tokenizer; the servers' head has VOCAB rows."""
        client: type[ServerClient] = VllmClient
        folder_sync: type[WeightSync[Any]] = VllmFolderSync
        if isinstance(self.servers[0], FakeSglang):
            client, folder_sync = SglangClient, SglangFolderSync
        if isinstance(self.servers[0], FakePlugin):
            folder_sync = PluginSync
        sync = sync or folder_sync(self.folder / "weights", timeout)
        sync.on_event = self.said.append
        self.pool: EnginePool[Any] = EnginePool(
            [client(s.url, timeout) for s in self.servers],
            sync,
            timeout=timeout,
            max_length=max_length,
            on_event=self.said.append,
            watch=watch,
        )
        made = ServerEngine(
            self.pool,
            sync,
            name="tests' policy",
            vocabulary=Vocabulary(tiny_tokenizer(tokens), VOCAB, "tests' policy"),
            max_length=max_length,
            tokenizer=tiny_tokenizer(tokens),
            patience=patience,
        )
        self._engines.append(made)
        return made

    async def close(self) -> None:
        for engine in self._engines:
            await engine.close()


def on_servers(
    n: int, test: Callable[[Bench[FakeVllm]], Coroutine[Any, Any, None]], tmp_path: Path, **options: Any
) -> None:
    """Run a test's coroutine beside n fake vLLM servers; everything is closed whatever it does."""
    on_fakes(FakeVllm, n, test, tmp_path, **options)


def on_fakes(
    fake: type[S],
    n: int,
    test: Callable[[Bench[S]], Coroutine[Any, Any, None]],
    tmp_path: Path,
    **options: Any,
) -> None:
    """As on_servers, with servers of another class."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(fake(tmp_path / f"s{i}", **options)) for i in range(n)]
            made = Bench(tmp_path, servers)
            stack.push_async_callback(made.close)
            await asyncio.wait_for(test(made), 200)

    asyncio.run(run())


def weights(version: int, epoch: int = 1) -> Weights:
    """A version without a probe."""
    return whole(f"e{epoch}.v{version}", version, state(1000 * epoch + version))


def expected(of: Weights, seed: int, n: int = 8, prompt: list[int] = PROMPT) -> list[int]:
    return [token(of.data, prompt, seed, i) for i in range(n)]


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.01)


async def across_update(
    server: Any, ours: ServerEngine[Any], theirs: ServerEngine[Any], split: int
) -> Generation:
    """Eight tokens of `ours` between which, behind `split` of them, `theirs` gives the server its next version."""
    old = ours.version
    server.hold.clear()
    server.hold_at, server.standing = split, False
    task = asyncio.create_task(ours.generate(PROMPT, SAMPLED, seed=9))
    await until(lambda: server.standing, "the request")
    await theirs.load(weights(old + 1), old + 1)
    server.hold.set()
    out = await task
    assert out.versions.tolist() == [old] * split + [old + 1] * (8 - split)
    return out
