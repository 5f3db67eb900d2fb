"""The one place where a config becomes an engine: the model itself in this process, or a client of vLLM servers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mgrpo.config import RunConfig
from mgrpo.config.addresses import Addresses
from mgrpo.config.policy import EngineConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy, quiet
from mgrpo.model.shell import policy_from_shell
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.episode import Tokenizer
from mgrpo.rollout.hf import HfEngine
from mgrpo.rollout.nccl import NcclSync
from mgrpo.rollout.replicas import Replicas
from mgrpo.rollout.server import VllmServer
from mgrpo.rollout.sync import FolderSync, LoraSync, WeightSync
from mgrpo.rollout.vllm import VllmEngine


def open_engine(
    config: RunConfig,
    role: str,
    shell: Mapping[str, bytes],
    addresses: Addresses,
    say: Callable[[str], None],
) -> tuple[Engine, Tokenizer]:
    """The engine and tokenizer of `role`. shell: its policy's files without weights, as its trainer sends them.
    say: told in one line of servers that go and come."""
    owner = config.owner(role)
    engine = config.agents[owner].engine
    length = config.agents[role].max_length
    if engine.kind == "hf":
        policy = policy_from_shell(shell, role)
        if engine.device != "cpu" or engine.dtype != "float32":
            model = policy.model.to(device=engine.device, dtype=getattr(torch, engine.dtype))
            # sdpa: the engine brings masks of its own, which packed attention does not take
            policy = Policy(
                model, policy.tokenizer, role, PolicyConfig(device=engine.device, attention="sdpa")
            )
        return HfEngine(policy, slots=config.rollout.slots, max_length=length), policy.tokenizer
    if engine.kind != "vllm":
        raise ConfigError(f"agents.{owner}.engine.kind: nothing opens an engine of kind {engine.kind!r}")
    return _open_vllm(config, role, shell, addresses, say)


def _open_vllm(
    config: RunConfig,
    role: str,
    shell: Mapping[str, bytes],
    addresses: Addresses,
    say: Callable[[str], None],
) -> tuple[Engine, Tokenizer]:
    owner, length = config.owner(role), config.agents[role].max_length
    engine = config.agents[owner].engine
    tokenizer, vocab_size = _tokenizer_of(shell, role)
    if addresses.weights is None:
        raise ConfigError(f"agents.{owner}.engine: no folder for weights is known")
    folder = Path(engine.folder) / owner if engine.folder is not None else addresses.weights / owner
    sync = open_sync(config, owner, folder)
    urls = engine.urls or addresses.engines[owner]
    servers = [VllmServer(url, engine.timeout) for url in urls]
    replicas = Replicas(
        servers,
        sync,
        timeout=engine.timeout,
        max_length=length,
        say=lambda line: say(f"{role}: {line}"),
    )
    return (
        VllmEngine(replicas, sync, name=f"policy of {role}", vocab_size=vocab_size, max_length=length),
        tokenizer,
    )


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
    raise ConfigError(f"agents.{owner}.engine.sync: no way of weights is called {engine.sync!r}")


def _tokenizer_of(shell: Mapping[str, bytes], name: str) -> tuple[Tokenizer, int]:
    """Tokenizer and vocabulary size from a policy's files; the model itself is not built."""
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="mgrpo-shell-") as folder, quiet():
        for file, data in shell.items():
            if Path(file).name != file:
                raise ConfigError(f"{name}: the trainer sent a file {file!r}, expected plain names")
            (Path(folder) / file).write_bytes(data)
        try:
            model = AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{name}: what its trainer sent is no tokenizer: {error}") from error
    return tokenizer, int(model.get_text_config().vocab_size)
