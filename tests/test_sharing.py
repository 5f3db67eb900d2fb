"""Agents on one engine: how a config says so, what is refused, and which servers a run starts and asks."""

from __future__ import annotations

import asyncio
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mgrpo.cli.cluster.plan import Site, make_plan
from mgrpo.config import config_digest, dump_config, load_config, view_of
from mgrpo.engines.base import SamplingParams
from mgrpo.engines.probe_gap import TOLERANCE
from mgrpo.engines.registry import open_engine
from mgrpo.engines.vllm import backend
from mgrpo.engines.vllm.backend import VllmBackend
from mgrpo.engines.weight_folder import KEEP
from mgrpo.errors import ConfigError
from mgrpo.model.policy_files import policy_files
from mgrpo.run.folder import RunFolder, started_engines
from mgrpo.weights.version import Weights
from tests.fake_server import token
from tests.fake_vllm import FakeVllm
from tests.models import tiny_policy
from tests.runs import RELAY

LORA = [
    *(
        f"agents.{role}.policy.lora={{rank={rank}}}"
        for role, rank in (("main", 4), ("left", 12), ("right", 40))
    ),
    *(f"agents.{role}.model=/models/base" for role in ("main", "left", "right")),
    *(f"agents.{role}.sft.steps=0" for role in ("main", "left", "right")),
]
ENGINE = f'agents.main.engine={{type="vllm", sync="lora", replicas=2, python="{sys.executable}"}}'
GUESTS = [f'agents.{role}.engine={{shared_with="main"}}' for role in ("left", "right")]


def test_guests_have_the_engine_of_their_host(tmp_path: Path) -> None:
    """All settings are the host's, also after an override of them and in the run's own copy, which says them once."""
    config = load_config(RELAY, [*LORA, *GUESTS, ENGINE])
    for role in ("left", "right"):
        engine = config.agents[role].engine
        assert engine == config.agents["main"].engine.model_copy(update={"shared_with": "main"})
    assert config.served_by("main") == ("main", "left", "right") and config.served_by("left") == ()
    dump_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    slower = load_config(tmp_path / "config.json", ["agents.main.engine.timeout=7.0"])
    assert {a.engine.timeout for a in slower.agents.values()} == {7.0}  # type: ignore[union-attr]
    assert config_digest(slower) == config_digest(config)


def test_one_set_of_servers_is_started_and_asked_by_all(tmp_path: Path) -> None:
    """The host's, with room for the adapters of all roles, for the largest of them and for the longest history."""
    config = load_config(RELAY, [*LORA, *GUESTS, ENGINE, "agents.right.max_length=57"])
    assert started_engines(config) == [("main", 0), ("main", 1)]
    addresses = RunFolder(tmp_path).addresses(config)
    assert set(addresses.engines) == {"main", "left", "right"} and len(set(addresses.engines.values())) == 1
    words = VllmBackend.command(view_of(config, "main"), "unix:///s").arguments
    assert {
        ("--max-lora-rank", "64"),
        ("--max-loras", "6"),
        ("--max-cpu-loras", "12"),
        ("--max-model-len", "57"),
    } <= set(itertools.pairwise(words))
    assert backend.HELD == KEEP + 1


def test_each_role_asks_the_shared_server_for_its_own_adapter(tmp_path: Path) -> None:
    """Engines of three roles, as a worker opens them from the config, on one server that the launcher started: answers
    are those of the role's own adapter in its own version, whatever the others load meanwhile."""
    policy = tiny_policy("llama", 3)
    config = load_config(RELAY, [*LORA, *GUESTS, ENGINE, "agents.main.engine.replicas=1"])

    def adapter(role: str, version: int) -> Weights:
        g = torch.Generator().manual_seed(version + 100 * len(role))
        state = {
            f"model.layers.0.self_attn.q_proj.lora_{x}.default.weight": torch.randn(4, 4, generator=g)
            for x in "AB"
        }
        return Weights.of_bytes(f"{role}.e1.v{version}", version, safetensors.torch.save(state))

    async def play() -> None:
        async with FakeVllm(tmp_path / "s", max_length=32) as server:
            addresses = RunFolder(tmp_path / "run").addresses(config)
            addresses = replace(addresses, engines=dict.fromkeys(addresses.engines, (server.url,)))
            engines = {}
            for role in ("main", "left", "right"):
                engines[role], _ = open_engine(
                    config, role, policy_files(policy), addresses, lambda line: None
                )
            try:
                newest = {"main": 5, "left": 1, "right": 6}
                for version in range(1, 7):
                    for role, engine in engines.items():
                        if version <= newest[role]:
                            await engine.load(adapter(role, version), version)
                for role, engine in engines.items():
                    out = await engine.generate([5, 6, 7], SamplingParams(6), seed=3)
                    name = f"{role}.e1.v{newest[role]}"
                    assert server.bodies[-1]["model"] == name and out.versions.tolist() == [newest[role]] * 6
                    assert out.token_ids.tolist() == [
                        token(server.adapters[name], [5, 6, 7], 3, i) for i in range(6)
                    ]
                kept = {f"{role}.e1.v{v}" for role, n in newest.items() for v in range(1, n + 1)[-KEEP:]}
                assert set(server.adapters) == kept and "/pause" not in server.calls
            finally:
                for engine in engines.values():
                    await engine.close()

    asyncio.run(play())


def test_a_rounded_base_widens_the_bound_of_the_comparison(tmp_path: Path) -> None:
    """The server's base is as its folder has it; a trainer in bfloat16 says of its probe what a rounded base gives."""
    for dtype, bound in (("float32", TOLERANCE["float32"]), ("bfloat16", TOLERANCE["bfloat16"])):
        config = load_config(RELAY, [*LORA, *GUESTS, ENGINE, f"agents.left.policy.dtype={dtype}"])
        assert VllmBackend.open_sync(view_of(config, "left"), tmp_path).tolerance == bound


def test_a_cluster_has_the_hosts_servers_only(tmp_path: Path) -> None:
    """One part a server; every agent of the planned config has their addresses."""
    site = Site(tmp_path, "python", None, None, 5600, 8)
    plan = make_plan(RELAY, [*LORA, *GUESTS, ENGINE], site)
    assert [part.name for part in plan.parts if part.is_server] == ["vllm-main-0", "vllm-main-1"]
    urls = {agent.engine.running_servers for agent in plan.config.agents.values()}
    assert len(urls) == 1 and len(urls.pop()) == 2


def test_agents_of_one_policy_share_it_with_the_host() -> None:
    """An agent that acts with a guest's policy is served where that policy is."""
    shares = ['agents.right={shares="left", max_length=44, reward={expert=1.0}, optimizer={lr=3e-3}}']
    config = load_config(RELAY, [*LORA[:-1], *shares, GUESTS[0], ENGINE])
    assert config.engine_of("right") == "main" and config.served_by("main") == ("main", "left")
    assert view_of(config, "right").served_longest == 44


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ['agents.left.engine={shared_with="nobody"}'],
            "shared_with='nobody': expected another agent with an",
        ),
        (
            ['agents.left.engine={shared_with="left"}'],
            "shared_with='left': expected another agent with an engine",
        ),
        (
            [GUESTS[1], 'agents.left.engine={shared_with="right"}'],
            "shared_with='right': expected another agent",
        ),
        (["agents.left.engine={shared_with=3}"], "shared_with=3: expected another agent"),
        (
            ['agents.left.engine={shared_with="main", timeout=3.0}'],
            "agents.left.engine.timeout has no effect beside shared_with='main': set it in agents.main.engine",
        ),
        (
            ['agents.left.engine={type="hf", shared_with="main"}'],
            "agents.left.engine.type has no effect beside shared_with='main'",
        ),
        (
            [GUESTS[0], 'agents.main.engine={type="vllm", sync="fs"}'],
            "agents.left.engine.shared_with='main': two policies with whole weights cannot be on one engine; set "
            'agents.main.engine.sync = "lora"',
        ),
        (
            [GUESTS[0], "agents.main.engine={}"],
            "two policies with whole weights cannot be on one engine; set agents.main.engine.adapters = true",
        ),
        (
            [GUESTS[0], 'agents.main.engine={type="sglang", urls=["http://h:1"]}'],
            "an engine of type 'sglang' gets the whole weights of one policy; expected hf or vllm",
        ),
        (
            [GUESTS[0], "agents.left.model=/other"],
            "agents.left.model='/other' and agents.main.model='/models/base'",
        ),
        (
            [GUESTS[0], "agents.left.policy.lora.rank=0"],
            'agents.left.engine.sync = "lora" needs agents.left.policy.lora.rank of 1 or more',
        ),
        (
            ["agents.left.engine={adapters=true}", "agents.left.policy.lora.rank=0"],
            "agents.left.engine.adapters = true needs agents.left.policy.lora.rank of 1 or more",
        ),
        (
            [
                f'agents.{role}.engine={{type="vllm", sync="lora", urls=["http://h:1"]}}'
                for role in ("main", "left")
            ]
            + ["agents.left.model=/other"],
            "urls: http://h:1: agents.left.model='/other' and agents.main.model='/models/base' differ",
        ),
    ],
)
def test_what_cannot_share_an_engine_is_refused(sets: list[str], message: str) -> None:
    """By name, with the config: nothing has been started yet."""
    with pytest.raises(ConfigError) as error:
        load_config(RELAY, [*LORA, ENGINE, *sets])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_adapters_in_process_need_the_base_models_folder() -> None:
    """The stream holds no base, and the worker must take it from somewhere."""
    sets = ["agents.left.policy.lora.rank=4", "agents.left.engine={adapters=true}"]
    with pytest.raises(ConfigError, match=r"agents\.left\.engine\.adapters = true needs agents\.left\.model"):
        load_config(RELAY, sets)
