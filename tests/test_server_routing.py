"""Experts of each token from servers of the tests' own: each row is by the weights that its token was input to."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrpo.addresses import Addresses
from mgrpo.config import load_config, view_of
from mgrpo.engines.base import SamplingParams
from mgrpo.engines.registry import find_engine, open_engine
from mgrpo.engines.server_engine import ServerEngine
from mgrpo.engines.vllm.backend import VllmBackend
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.policy_files import policy_files
from tests.fake_server import ROUTING, FakeServer, experts_by, words
from tests.fake_sglang import END_OF_TEXT, FakeSglang
from tests.fake_vllm import START, FakeVllm, npy
from tests.models import tiny_policy
from tests.runs import RELAY
from tests.server_bench import PROMPT, SAMPLED, Bench, across_update, on_fakes, weights

BOTH = pytest.mark.parametrize("fake", [FakeVllm, FakeSglang])
STARTS = {FakeVllm: START, FakeSglang: "routed_experts_start_len"}


def rows(of: int | list[int], ids: list[int]) -> np.ndarray[Any, Any]:
    """(len(ids) - 1, N, k) by a version, or by one for each token."""
    versions = [of] * len(ids) if isinstance(of, int) else of
    data = {version: weights(version).data for version in versions}
    found = [experts_by(data[versions[n]], ids[: n + 1]) for n in range(len(ids) - 1)]
    return np.asarray(found, np.uint8)[:, list(ROUTING.places)]


def replaying(bench: Bench[Any]) -> ServerEngine[Any]:
    """An engine whose policy replays routing, over servers that report it."""
    engine = bench.engine()
    for server in bench.pool.servers:
        server.client.routing = ROUTING
    for fake in bench.servers:
        fake.routes = True
    return engine


def starts(server: FakeServer) -> list[int]:
    """From which token on each request wanted experts."""
    name = STARTS[type(server)]
    return [{**body, **body["sampling_params"]}.get(name, 0) for body in server.bodies]


@BOTH
def test_a_session_is_asked_for_what_is_new(fake: type[FakeServer], tmp_path: Path) -> None:
    """Each answer holds the experts of all tokens but the last; those of a session's history are sent once, also where
    it went another way or was let go."""

    async def test(bench: Bench[FakeServer]) -> None:
        engine = replaying(bench)
        await engine.load(weights(3), 3)
        (server,) = bench.servers
        server.bodies.clear()

        async def turn(prompt: list[int], session: str | None, known: int) -> list[int]:
            out = await engine.generate(prompt, SAMPLED, seed=7, session=session)
            ids = [*prompt, *out.token_ids.tolist()]
            assert out.experts is not None and out.experts.dtype == np.uint8
            assert np.array_equal(out.experts, rows(3, ids))
            assert starts(server)[-1] == known
            return ids

        first = await turn(PROMPT, "a", 0)
        second = await turn([*first, 8, 9], "a", len(first) - 1)
        await turn([*first, 8, 9], None, 0)
        await turn([*first, 8, 9], "b", 0)
        forked = await turn([*second[:6], *[(i + 1) % 40 for i in second[6:9]]], "a", 6)
        await turn(forked[:4], "a", 4)
        engine.release("a")
        await turn([*forked[:4], 5], "a", 0)

    on_fakes(fake, 1, test, tmp_path)


@BOTH
def test_an_update_in_the_middle_of_a_request(fake: type[FakeServer], tmp_path: Path) -> None:
    """Tokens keep the experts of the weights that they were input to; an SGLang server aborts, and the request that
    goes on asks for the rest."""

    async def test(bench: Bench[FakeServer]) -> None:
        ours, theirs = replaying(bench), replaying(bench)
        await ours.load(weights(1), 1)
        await theirs.load(weights(1), 1)
        (server,) = bench.servers
        for split in (5, 0):
            old = ours.version
            out = await across_update(server, ours, theirs, split)
            ids = [*PROMPT, *out.token_ids.tolist()]
            # The last token of the old version was sampled, but not yet input; without one, the prompt is not either.
            before = len(PROMPT) + split - 1 if split else 0
            of = [old] * before + [old + 1] * (len(ids) - before)
            assert out.experts is not None and np.array_equal(out.experts, rows(of, ids))
            await ours.load(weights(old + 1), old + 1)

    on_fakes(fake, 1, test, tmp_path)


@pytest.mark.parametrize("knows", [True, False])
def test_sglang_in_several_requests(knows: bool, tmp_path: Path) -> None:
    """One that ends at the model's own end of text is continued; a server that reports from the first token on,
    whatever it is asked for, is understood."""

    async def test(bench: Bench[FakeSglang]) -> None:
        (server,) = bench.servers
        server.end_at, server.knows_start = (len(PROMPT) + 2, len(PROMPT) + 4), knows
        engine = replaying(bench)
        await engine.load(weights(1), 1)
        server.bodies.clear()
        params = SamplingParams(8, stop_token_ids=(END_OF_TEXT - 1,))
        for prompt, known in ((PROMPT, 0), ([*PROMPT, 5], 3)):
            out = await engine.generate(prompt, params, seed=5, session="a")
            ids = [*prompt, *out.token_ids.tolist()]
            assert out.experts is not None and np.array_equal(out.experts, rows(1, ids))
            assert starts(server)[0] == known and len(server.bodies) > 1
            server.bodies.clear()

    on_fakes(FakeSglang, 1, test, tmp_path)


@BOTH
def test_a_stop_text_that_the_server_passed(fake: type[FakeServer], tmp_path: Path) -> None:
    """What was sampled beyond it is thrown away with its experts."""

    async def test(bench: Bench[FakeServer]) -> None:
        engine = replaying(bench)
        await engine.load(weights(2), 2)
        (server,) = bench.servers
        whole = (await engine.generate(PROMPT, SAMPLED, seed=7)).token_ids.tolist()
        server.heeds_stops = False
        out = await engine.generate(PROMPT, SamplingParams(8, stop=(words(whole[2:4]),)), seed=7)
        ids = [*PROMPT, *whole[:4]]
        assert out.token_ids.tolist() == whole[:4] and out.experts is not None
        assert np.array_equal(out.experts, rows(2, ids))

    on_fakes(fake, 1, test, tmp_path)


def cut_short(text: str) -> str:
    """The array without its last token."""
    data = base64.b64decode(text)
    if data[:6] == b"\x93NUMPY":
        return npy(np.load(io.BytesIO(data))[:-1])
    return base64.b64encode(data[:-32]).decode()


@BOTH
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda text: None,
            "reports no experts of its tokens, and policy.routing_replay is true; start it with --enab",
        ),
        (lambda text: "#", "no base64"),
        (lambda text: text[:-8], "bytes of routed experts"),
        (cut_short, r"routed experts of shape \(9, 4, 2\); expected \(10, 4, 2\)"),
    ],
)
def test_an_answer_without_its_experts_is_none(
    fake: type[FakeServer], spoil: Callable[[str], Any], message: str, tmp_path: Path
) -> None:
    """Missing or malformed: a failure that names the server, never a trajectory without routing."""

    async def test(bench: Bench[FakeServer]) -> None:
        engine = replaying(bench)
        await engine.load(weights(2), 2)
        (server,) = bench.servers
        server.spoil = spoil
        with pytest.raises(InfrastructureError, match=f"{server.url}: .*{message}"):
            await engine.generate(PROMPT, SAMPLED, seed=7, session="a")
        server.spoil = lambda text: text
        out = await engine.generate(PROMPT, SAMPLED, seed=7, session="a")
        assert out.experts is not None and len(out.experts) == len(PROMPT) + 7

    on_fakes(fake, 1, test, tmp_path)


@BOTH
def test_a_server_that_was_not_started_for_it_is_refused(fake: type[FakeServer], tmp_path: Path) -> None:
    """Before the first rollout, with the flag that it lacks. Without replay nothing is asked, and nothing given."""

    async def test(bench: Bench[FakeServer]) -> None:
        engine = replaying(bench)
        bench.servers[0].routes = False
        with pytest.raises(
            ConfigError, match=r"reports no experts .*; start it with --enable-return-routed-experts"
        ):
            await engine.load(weights(0), 0)
        plain = bench.engine()
        await plain.load(weights(0), 0)
        for bench.servers[0].routes in (False, True):
            assert (await plain.generate(PROMPT, SAMPLED, seed=1)).experts is None

    on_fakes(fake, 1, test, tmp_path)


@BOTH
def test_routers_come_from_the_config(fake: type[FakeServer], tmp_path: Path) -> None:
    """`check` asks servers that run already; an engine reads where the routers are from its policy's files."""
    files = policy_files(tiny_policy("llama", 3))
    routers = {"num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [0, 2]}
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **routers}).encode()
    (tmp_path / "config.json").write_bytes(files["config.json"])
    kind = 'type="vllm", sync="fs"' if fake is FakeVllm else 'type="sglang"'

    async def ask() -> None:
        async with fake(tmp_path / "s") as server:
            table = f'{{{kind}, urls=["{server.url}"], folder="{tmp_path / "w"}"}}'
            sets = [
                f"agents.left.engine={table}",
                f"agents.left.model={tmp_path}",
                "agents.left.policy.routing_replay=true",
            ]
            config = load_config(RELAY, sets)
            view = view_of(config, "left")
            server.routes = True
            await asyncio.to_thread(find_engine(view).check, view)
            server.routes = False
            with pytest.raises(ConfigError, match=r"left\.engine\.urls: .* reports no experts of its tokens"):
                await asyncio.to_thread(find_engine(view).check, view)
            server.routes = True
            addresses = Addresses("", {}, weights=tmp_path / "run")
            engine, _ = open_engine(config, "left", files, addresses, lambda line: None)
            try:
                await engine.load(weights(4), 4)
                out = await engine.generate(PROMPT, SAMPLED, seed=1)
            finally:
                await engine.close()
            assert out.experts is not None
            assert np.array_equal(out.experts, rows(4, [*PROMPT, *out.token_ids.tolist()]))

    asyncio.run(ask())


def test_a_vllm_server_is_started_to_report_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the policy replays them alone; what contradicts is refused by name."""

    def view(replay: str, device: str, *arguments: str) -> Any:
        more = f'python="{sys.executable}", arguments={list(arguments)}'
        engine = f'{{type="vllm", sync="fs", device="{device}", {more}}}'
        sets = [f"agents.left.model={tmp_path}", f"agents.left.engine={engine}"]
        return view_of(load_config(RELAY, [*sets, f"agents.left.policy.routing_replay={replay}"]), "left")

    flag = "--enable-return-routed-experts"
    assert flag in VllmBackend.command(view("true", "cuda", "-pp", "1"), "unix:///s").arguments
    assert flag not in VllmBackend.command(view("false", "cuda"), "unix:///s").arguments
    for arguments, named in (
        (["--no-enable-prefix-caching"], "--no-enable-prefix-caching: a server does not report"),
        (["--no-enable-return-routed-experts"], "--no-enable-return-routed-experts: "),
        (["-pp", "2"], "-pp 2: "),
        (["--decode-context-parallel-size=2"], "--decode-context-parallel-size 2: "),
    ):
        with pytest.raises(ConfigError, match=rf"agents\.left\.engine\.arguments: {named}"):
            VllmBackend.command(view("true", "cuda", *arguments), "unix:///s")
        if "routed" not in arguments[0]:
            VllmBackend.command(view("false", "cuda", *arguments), "unix:///s")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    with pytest.raises(
        ConfigError, match=r'left\.policy\.routing_replay=true needs agents.left.engine.device="cuda"'
    ):
        VllmBackend.check(view("true", "cpu"))
    VllmBackend.check(view("false", "cpu"))
