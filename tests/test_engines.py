"""From a config to an engine: in this process or over HTTP, in the precision and with the servers that it names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mgrpo.addresses import Addresses
from mgrpo.config import load_config, view_of
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.engines.registry import find_engine, open_engine
from mgrpo.engines.server_engine import ServerEngine
from mgrpo.errors import ConfigError
from mgrpo.model.policy import state_of
from mgrpo.model.policy_files import policy_files
from mgrpo.run import launch
from mgrpo.weights.version import Weights
from tests.fake_server import token
from tests.fake_vllm import FakeVllm
from tests.models import state_bytes, tiny_policy
from tests.runs import RELAY

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, GREEDY = [5, 6, 7], SamplingParams(max_tokens=6, temperature=0.0)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("bfloat16", 0.2)])
def test_the_engine_in_this_process_computes_as_the_config_says(
    dtype: str, close: float, tmp_path: Path
) -> None:
    """The trainer's float32 weights travel in the precision of engine.dtype, are held as they came, and give the
    log-probs of the policy to that precision."""
    policy = tiny_policy("llama", 3)
    config = load_config(RELAY, [f"agents.left.engine.dtype={dtype}"])
    travels = getattr(torch, config.agents["left"].engine.weights_dtype)
    state = {name: tensor.to(travels) for name, tensor in state_of(policy.model).items()}
    weights = Weights.of_bytes("e1.v4", 4, safetensors.torch.save(state))

    async def ask() -> tuple[Generation, Generation, torch.dtype]:
        engine, tokenizer = open_engine(
            config, "left", policy_files(policy), Addresses("", {}), lambda line: None
        )
        assert isinstance(engine, HfEngine) and len(tokenizer.encode("w1")) == 1
        await engine.load(weights, 4)
        assert all(torch.equal(t, state[n]) for n, t in state_of(engine.policy.model).items())
        mine = HfEngine(policy, slots=4, max_length=32)
        return (
            await engine.generate(PROMPT, GREEDY, seed=0),
            await mine.generate(PROMPT, GREEDY, seed=0),
            engine.policy.head_weight.dtype,
        )

    theirs, mine, computed = asyncio.run(ask())
    assert computed == getattr(torch, dtype)
    assert theirs.versions.tolist() == [4] * 6 and theirs.token_ids.tolist() == mine.token_ids.tolist()
    assert abs(theirs.logprobs - mine.logprobs).max() < close


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{kind="vllm", sync="fs"}', r'agents\.left\.engine: kind is called type: type = "vllm"'),
        ('{type="hf", urls=["http://h:1"]}', r"agents\.left\.engine\.urls: unknown key"),
        (
            '{type="vllm", sync="copy"}',
            r"agents\.left\.engine\.sync: .*'fs', 'patch', 'nccl', 'gloo' or 'lora', got 'copy'",
        ),
        ('{type="vllm", sync="nccl"}', r"agents\.left\.engine: .*\"nccl\" needs device \"cuda\""),
        (
            '{type="vllm", sync="gloo", device="cuda"}',
            r"agents\.left\.engine: .*needs device \"cpu\", got 'cuda'",
        ),
        ('{type="sglang"}', r"agents\.left\.engine\.urls: required"),
        ('{type="vlm", sync="fs"}', r"type 'vlm' is none of hf, vllm, sglang; .* options = {...}, got sync"),
        ('{type="a:B", options={x=inf}}', r"agents\.left\.engine\.options: .*finite number"),
    ],
)
def test_an_engine_takes_only_the_settings_of_its_type(table: str, message: str) -> None:
    """A setting that could not act, and the former name of one that does, are refused by name."""
    with pytest.raises(ConfigError, match=message):
        load_config(RELAY, [f"agents.left.engine={table}"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", r"'other' is unknown, expected hf, sglang, vllm or 'package.module:Class'"),
        ("no_such_package:Engine", r".*module 'no_such_package' is not installed"),
        ("mgrpo.engines.base:Engine", r".*mgrpo.engines.base has no EngineBackend class 'Engine'"),
    ],
)
def test_an_engine_that_nobody_wrote_is_refused(name: str, message: str, tmp_path: Path) -> None:
    """Before a folder or a process exists, in one line that names the field and what there is."""
    with pytest.raises(ConfigError, match=rf"agents\.left\.engine\.type.* {message}") as error:
        launch.start(RELAY, tmp_path / "run", [f"agents.left.engine.type={name}"], fresh=False)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_run_starts_servers_of_those_engines_only_that_have_a_command() -> None:
    """vLLM's are started; SGLang's are named, and asking for a command is an error of the config."""
    config = load_config(RELAY, ['agents.left.engine={type="sglang", urls=["http://h:1"]}'])
    assert config.agents["left"].engine.started_servers == 0
    with pytest.raises(
        ConfigError, match=r"agents\.left\.engine\.type='sglang': its servers are not started"
    ):
        view = view_of(config, "left")
        find_engine(view).command(view, "http://h:1")


def test_one_server_holds_one_policy() -> None:
    """Two policies would replace each other's weights: refused with the address, and so is a repeated one."""
    one = 'agents.left.engine={type="vllm", sync="fs", urls=["http://h:1"]}'
    with pytest.raises(ConfigError, match=r"urls: http://h:1/? already serves the policy of '(left|main)'"):
        load_config(RELAY, [one, 'agents.main.engine={type="vllm", sync="fs", urls=["http://h:1/"]}'])
    with pytest.raises(ConfigError, match=r"agents\.left\.engine\.urls: http://h:1 stands there 2 times"):
        load_config(RELAY, [one.replace('["http://h:1"]', '["http://h:1", "http://h:1"]')])
    load_config(RELAY, [one, 'agents.main.engine={type="vllm", sync="fs", urls=["http://h:2"]}'])


def test_an_engine_over_http_gets_its_servers_and_folder_from_the_config(tmp_path: Path) -> None:
    """Named servers, or those that the launcher starts; weights go through the run's folder unless another is named."""
    policy = tiny_policy("llama", 3)
    weights = Weights.of_bytes("e1.v4", 4, state_bytes(policy.model))

    async def ask(named: bool) -> None:
        async with FakeVllm(tmp_path / "s", max_length=32) as server:
            where = f'urls=["{server.url}"], folder="{tmp_path / "shared"}"' if named else 'python="x"'
            config = load_config(RELAY, [f'agents.left.engine={{type="vllm", sync="fs", {where}}}'])
            own = {} if named else {"left": (server.url,)}
            addresses = Addresses("", {}, engines=own, weights=tmp_path / "run")
            engine, tokenizer = open_engine(
                config, "left", policy_files(policy), addresses, lambda line: None
            )
            try:
                assert isinstance(engine, ServerEngine) and len(tokenizer.encode("w1")) == 1
                await engine.load(weights, 4)
                out = await engine.generate(PROMPT, GREEDY, seed=0)
                assert out.token_ids.tolist() == [token(weights.data, PROMPT, 0, i) for i in range(6)]
                with pytest.raises(ValueError, match="has 32"):
                    await engine.generate([1] * 30, GREEDY, seed=0)
            finally:
                await engine.close()
        kept = tmp_path / ("shared" if named else "run") / "left" / "e1.v4" / "model.safetensors"
        assert kept.read_bytes() == weights.data

    asyncio.run(ask(True))
    asyncio.run(ask(False))
