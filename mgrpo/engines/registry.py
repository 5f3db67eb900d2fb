"""The one place where a config becomes an engine: the model itself in this process, or a client of vLLM servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig
from mgrpo.config.policy import EngineConfig, PolicyConfig
from mgrpo.engines.base import Engine
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.engines.pool import EnginePool
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.engine import VllmEngine
from mgrpo.engines.vllm.nccl import NcclSync
from mgrpo.engines.vllm.weight_sync import FolderSync, LoraSync, WeightSync
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy
from mgrpo.model.shell import policy_from_shell, tokenizer_from_shell
from mgrpo.model.tokens import Tokenizer
from mgrpo.model.vocabulary import Vocabulary


def open_engine(
    config: RunConfig,
    role: str,
    shell: Mapping[str, bytes],
    addresses: Addresses,
    say: Callable[[str], None],
) -> tuple[Engine, Tokenizer]:
    """The engine and tokenizer of `role`. shell: its policy's files without weights, as its trainer sends them.
    say: told in one line of servers that go and come."""
    kind = config.agents[config.owner(role)].engine.kind
    if kind not in _KINDS:
        raise ConfigError(f"agents.{role}.engine.kind={kind!r} is none of {', '.join(_KINDS)}")
    return _KINDS[kind](config, role, shell, addresses, say)


def _open_hf(
    config: RunConfig,
    role: str,
    shell: Mapping[str, bytes],
    addresses: Addresses,
    say: Callable[[str], None],
) -> tuple[Engine, Tokenizer]:
    engine = config.agents[config.owner(role)].engine
    policy = policy_from_shell(shell, role)
    if engine.device != "cpu" or engine.dtype != "float32":
        model = policy.model.to(device=engine.device, dtype=getattr(torch, engine.dtype))
        # sdpa: the engine brings masks of its own, which packed attention does not take
        policy = Policy(model, policy.tokenizer, role, PolicyConfig(device=engine.device, attention="sdpa"))
    length = config.agents[role].max_length
    return HfEngine(policy, slots=config.rollout.slots, max_length=length), policy.tokenizer


def _open_vllm(
    config: RunConfig,
    role: str,
    shell: Mapping[str, bytes],
    addresses: Addresses,
    say: Callable[[str], None],
) -> tuple[Engine, Tokenizer]:
    owner, length = config.owner(role), config.agents[role].max_length
    engine = config.agents[owner].engine
    tokenizer, vocab_size = tokenizer_from_shell(shell, role)
    vocabulary = Vocabulary(tokenizer, vocab_size, role)
    if addresses.weights is None:
        raise ConfigError(f"agents.{owner}.engine: no folder for weights is known")
    folder = Path(engine.folder) / owner if engine.folder is not None else addresses.weights / owner
    sync = open_sync(config, owner, folder)
    urls = engine.urls or addresses.engines[owner]
    servers = [VllmClient(url, engine.timeout) for url in urls]
    replicas = EnginePool(
        servers,
        sync,
        timeout=engine.timeout,
        max_length=length,
        say=lambda line: say(f"{role}: {line}"),
    )
    return (
        VllmEngine(replicas, sync, name=f"policy of {role}", vocabulary=vocabulary, max_length=length),
        tokenizer,
    )


_KINDS = {"hf": _open_hf, "vllm": _open_vllm}


def open_sync(config: RunConfig, owner: str, folder: Path) -> WeightSync:
    """The way of new weights that the config chose."""
    agent = config.agents[owner]
    engine: EngineConfig = agent.engine
    if engine.sync == "lora":
        return LoraSync(folder, engine.timeout, agent.policy.lora)
    if engine.sync == "nccl":
        return NcclSync(folder, engine.timeout)
    if engine.sync == "fs":
        return FolderSync(folder, engine.timeout)
    raise ConfigError(
        f"agents.{owner}.engine.sync={engine.sync!r} is no way to reach a server: fs, lora, nccl"
    )
