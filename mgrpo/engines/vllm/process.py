"""A vLLM server as a process of the run: what it is started with, and how it is started, watched and stopped.

vLLM is several processes. Its front end, when killed, leaves the one that holds the model behind; so the process that
the launcher knows is a keeper of ours, which starts vLLM as a group and ends the whole group, whatever ends first:

    launcher -> keeper (mgrpo engine) -> vLLM front end -> vLLM engine and workers
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgrpo.config import RunConfig
from mgrpo.config.policy import EngineConfig
from mgrpo.engines.vllm.client import COOLEST, HOTTEST, VllmClient
from mgrpo.errors import ConfigError, InfrastructureError

STOP_SECONDS = 8.0  # of the 15 that the launcher gives a child
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as --max-lora-rank
MODEL = "policy"  # the name that requests ask for


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start one server: program and arguments, and the variables that it needs beside ours."""

    arguments: Sequence[str]
    variables: Mapping[str, str]


def server_command(config: RunConfig, role: str, listen: Sequence[str]) -> ServerCommand:
    """The server of `role`'s policy. listen: where, in vLLM's arguments, e.g. ("--uds", path). Raises ConfigError where
    the config cannot have one."""
    agent = config.agents[role]
    engine = agent.engine
    if agent.model is None:
        raise ConfigError(f"agents.{role}.model is missing: a vllm server starts from a Hugging Face folder")
    length = max(config.agents[r].max_length for r in config.served_by(role))
    arguments = [
        *(engine.python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(agent.model), "--served-model-name", MODEL, *listen),
        *("--dtype", engine.dtype, "--max-model-len", str(length)),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--enable-scale-out", "--disable-log-stats", "--uvicorn-log-level", "warning"),
    ]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if engine.device == "cpu":
        # One process for engine and worker: adapters hang in vLLM's two-process form on the CPU.
        arguments += ["--enforce-eager", "--distributed-executor-backend", "uni"]
        variables |= {
            "OMP_NUM_THREADS": str(config.rollout.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        }
    if engine.sync == "lora":
        rank = next((r for r in LORA_RANKS if r >= agent.policy.lora.rank), None)
        if rank is None:
            raise ConfigError(
                f"agents.{role}.policy.lora.rank={agent.policy.lora.rank}: vLLM takes up to 512"
            )
        arguments += [
            "--enable-lora",
            "--max-lora-rank",
            str(rank),
            "--max-loras",
            "2",
            "--max-cpu-loras",
            "4",
        ]
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if engine.sync == "nccl":
        arguments += ["--weight-transfer-config", '{"backend":"nccl"}']
    return ServerCommand([*arguments, *engine.arguments], variables)


def check_startable(config: RunConfig, role: str) -> None:
    """Raises ConfigError naming the setting with which no server of `role` could be started here."""
    server_command(config, role, ())
    agent = config.agents[role]
    engine = agent.engine
    where = f"agents.{role}"
    if not Path(engine.python).exists():
        raise ConfigError(f"{where}.engine.python: no interpreter {engine.python}; make vllm sets one up")
    if engine.device == "cuda" and engine.replicas > 1:
        raise ConfigError(
            f"{where}.engine.replicas={engine.replicas}: on GPUs, start the servers yourself, each on its own, and "
            "name them in engine.urls"
        )


def check_engine(config: RunConfig, role: str) -> None:
    """What of `role`'s vllm engine can be known to fail before anything runs. Raises ConfigError in one line."""
    engine, temperature = config.agents[role].engine, config.agents[role].loss.temperature
    if not COOLEST <= temperature <= HOTTEST:
        raise ConfigError(
            f"agents.{role}.loss.temperature={temperature:g}: vLLM samples at {COOLEST:g}..{HOTTEST:g}"
        )
    if starts_servers(engine):
        check_startable(config, role)
        return

    async def ask(url: str) -> None:
        server = VllmClient(url, engine.timeout)
        try:
            await server.healthy()
        except InfrastructureError as error:
            raise ConfigError(f"agents.{role}.engine.urls: {error}") from None
        finally:
            await server.close()

    async def ask_all() -> None:
        for url in engine.urls:
            await ask(url)

    asyncio.run(ask_all())


def starts_servers(engine: EngineConfig) -> bool:
    """Whether the launcher has servers to start for this engine."""
    return engine.kind == "vllm" and not engine.urls


def keep(command: ServerCommand, socket: Path) -> int:
    """Run a server until it ends; its exit status, negative for a signal. SIGTERM must raise SystemExit here."""
    socket.unlink(missing_ok=True)  # of a server that was killed
    process = subprocess.Popen(
        command.arguments,
        env=os.environ | command.variables,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        os.waitid(
            os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
        )  # not reaped yet: the group's number stays ours
    finally:
        _end_group(process)
        socket.unlink(missing_ok=True)
    return process.returncode


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the front end, which stops the others in order; then SIGKILL to what is left of the group."""
    deadline = time.monotonic() + STOP_SECONDS
    if _alive(process.pid):
        os.kill(process.pid, signal.SIGTERM)  # not terminate(), which would reap it
        while _alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(5)


def _alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None


def _end_with_parent() -> None:
    """In the new process: the kernel sends it SIGTERM when the keeper is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
