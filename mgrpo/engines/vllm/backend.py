"""vLLM's engine from a config, and what its servers are started with."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mgrpo
from mgrpo.config import AgentView
from mgrpo.config.engine import VllmEngineConfig
from mgrpo.engines.backend import ServerCommand
from mgrpo.engines.client import check_healthy
from mgrpo.engines.server_backend import ServerBackend
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.plugin_client import held_version
from mgrpo.errors import ConfigError

if TYPE_CHECKING:
    from mgrpo.engines.weight_sync import WeightSync

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as --max-lora-rank
IN_A_BATCH, HELD = (
    2,
    4,
)  # adapters of one policy: newest and the one before; those kept (KEEP) and the next one
MODEL = "policy"  # the name that requests ask for
ROUTING = "--enable-return-routed-experts"
SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # of vLLM's two, the one that can report experts
NO_ROUTING = ("--no-enable-prefix-caching", f"--no-{ROUTING[2:]}")
"""Arguments with which a server reports no experts, or does not start."""
ONE_WITH_ROUTING = (
    *("--pipeline-parallel-size", "-pp", "--decode-context-parallel-size", "-dcp"),
    *("--prefill-context-parallel-size", "-pcp"),
)
"""Sizes that must be 1 in a server that reports experts."""
PARALLEL = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp")


class VllmBackend(ServerBackend):
    """See docs/engines.md."""

    client = VllmClient

    @classmethod
    def open_sync(cls, view: AgentView, folder: Path) -> WeightSync[Any]:
        """See ServerBackend."""
        from mgrpo.engines.probe_gap import TOLERANCE
        from mgrpo.engines.vllm.direct_sync import DirectSync
        from mgrpo.engines.vllm.plugin_sync import PluginSync
        from mgrpo.engines.vllm.weight_sync import LoraSync, VllmFolderSync

        engine = _settings(view)
        made: WeightSync[Any]
        if engine.sync == "lora":
            made = LoraSync(folder, engine.timeout, view.owner.policy.lora)
        elif engine.direct:
            made = DirectSync(folder, engine.timeout, engine.on_update)
        elif engine.sync == "patch":
            made = PluginSync(folder, engine.timeout, engine.on_update)
        else:
            made = VllmFolderSync(folder, engine.timeout, engine.on_update)
        # The base model is the server's own: where the trainer has rounded it, the two differ by as much.
        rounded = engine.sync == "lora" and view.owner.policy.dtype == "bfloat16"
        made.tolerance = TOLERANCE["bfloat16" if rounded else engine.dtype]
        return made

    @classmethod
    def check(cls, view: AgentView) -> None:
        """Also whether a server could be started here."""
        super().check(view)
        engine, where = _settings(view), f"agents.{view.role}.engine"
        if engine.sync == "nccl" and view.agent.policy.device != "cuda":
            raise ConfigError(
                f'{where}.sync="nccl" needs agents.{view.role}.policy.device="cuda", got '
                f"{view.agent.policy.device!r}: the trainer sends from its GPUs"
            )
        if (engine.sync == "patch" or engine.direct) and engine.running_servers:
            servers = [VllmClient(url, engine.timeout) for url in engine.running_servers]
            check_healthy(f"{where}.urls", servers, held_version)
        if not engine.started_servers:
            return
        cls.command(view, "unix:///socket")
        if engine.device == "cpu" and _replays(view) and os.environ.get(SECOND_RUNNER) != "1":
            raise ConfigError(
                f'agents.{view.role}.policy.routing_replay=true needs {where}.device="cuda": vLLM 0.32 reports experts '
                f"by Triton kernels, which its build for CPUs does without (where yours has them: {SECOND_RUNNER}=1)"
            )
        if not Path(engine.python).exists():
            raise ConfigError(f"{where}.python: no interpreter {engine.python}; make vllm sets one up")
        if engine.device == "cuda" and engine.replicas > 1:
            raise ConfigError(
                f"{where}.replicas={engine.replicas}: on GPUs, start the servers yourself, each on its own, and "
                "name them in engine.urls"
            )

    @classmethod
    def command(cls, view: AgentView, address: str) -> ServerCommand:
        """See EngineBackend."""
        role, agent, engine = view.role, view.agent, _settings(view)
        if agent.model is None:
            raise ConfigError(
                f"agents.{role}.model is missing: a vllm server starts from a Hugging Face folder"
            )
        arguments = [
            *(engine.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(agent.model), "--served-model-name", MODEL, *_listen(address)),
            *("--dtype", engine.dtype, "--max-model-len", str(view.served_longest)),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *("--enable-scale-out", "--disable-log-stats", "--uvicorn-log-level", "warning"),
        ]
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if engine.device == "cpu":
            # One process for engine and worker, which the variable below makes vLLM 0.32 accept on a CPU: a second one
            # would import all of vLLM again at every start, and hold it.
            arguments += ["--enforce-eager", "--distributed-executor-backend", "uni"]
            # vLLM 0.32 rewinds the generator of a seeded request whose prompt is split among steps, which a CPU's
            # generator cannot: its engine ends. So a prompt is computed in one step, or waits for the next.
            arguments.append("--no-enable-chunked-prefill")
            variables |= {
                "OMP_NUM_THREADS": str(view.rollout.threads),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # of engine and worker; the front end stays apart
                "TORCHDYNAMO_DISABLE": "1",  # eager, and so is the one function that would call a C++ compiler
            }
        if engine.sync == "lora":
            arguments += ["--enable-lora", "--max-lora-rank", str(_lora_rank(view))]
            policies = len(view.served)
            arguments += ["--max-loras", str(policies * IN_A_BATCH), "--max-cpu-loras", str(policies * HELD)]
            variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        else:
            arguments += ["--worker-extension-cls", "mgrpo_plugin.WorkerExtension"]
            variables |= plugin_variables(keep_plain=engine.sync == "patch")
        if _replays(view):
            _check_routing(role, engine.arguments)
            arguments.append(ROUTING)
        gpus = gpus_of(engine.arguments) if engine.device == "cuda" else 0
        return ServerCommand([*arguments, *engine.arguments], variables, gpus)


def plugin_variables(*, keep_plain: bool) -> dict[str, str]:
    """With which a server finds the plug-in of this very package; see plugin/bootstrap. keep_plain: see
    plugin/cpu.py."""
    from mgrpo import _C

    package = Path(mgrpo.__file__).parent
    folders = [str(package / "engines/vllm/plugin/bootstrap"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "MGRPO_PACKAGE": str(package),
        "MGRPO_CORE": str(_C.__file__),
        "MGRPO_KEEP_PLAIN": str(int(keep_plain)),
    }


def _words(arguments: Sequence[str]) -> list[str]:
    """Names and values one by one, however they are written; "" at the end."""
    return [*(word for argument in arguments for word in argument.split("=", 1)), ""]


def _replays(view: AgentView) -> bool:
    """Whether a policy that its servers sample for wants the experts of each token."""
    return any(agent.policy.routing_replay for agent in view.served.values())


def _check_routing(role: str, arguments: Sequence[str]) -> None:
    """Raise ConfigError for arguments with which vLLM 0.32 cannot report experts."""
    for name, value in itertools.pairwise(_words(arguments)):
        if name in NO_ROUTING or (name in ONE_WITH_ROUTING and value != "1"):
            shown = name if name in NO_ROUTING else f"{name} {value}"
            raise ConfigError(
                f"agents.{role}.engine.arguments: {shown}: a server does not report the experts of its tokens with it, "
                "and policy.routing_replay is true"
            )


def gpus_of(arguments: Sequence[str]) -> int:
    """GPUs that one server takes: the product of its parallel sizes. Raises ConfigError."""
    product = 1
    for name, value in itertools.pairwise(_words(arguments)):
        if name in PARALLEL:
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"engine.arguments: {name} {value}: expected a number of GPUs")
            product *= int(value)
    return product


def _settings(view: AgentView) -> VllmEngineConfig:
    engine = view.owner.engine
    assert isinstance(engine, VllmEngineConfig)
    return engine


def _listen(address: str) -> tuple[str, ...]:
    """vLLM's arguments for an address."""
    if address.startswith("unix://"):
        return ("--uds", address.removeprefix("unix://"))
    host, _, port = address.removeprefix("http://").rpartition(":")
    return ("--host", host, "--port", port)


def _lora_rank(view: AgentView) -> int:
    """The largest that its adapters need, as vLLM takes it."""
    role, agent = max(view.served.items(), key=lambda served: served[1].policy.lora.rank)
    rank = agent.policy.lora.rank
    found = next((r for r in LORA_RANKS if r >= rank), None)
    if found is None:
        raise ConfigError(f"agents.{role}.policy.lora.rank={rank}: vLLM takes up to {LORA_RANKS[-1]}")
    return found
