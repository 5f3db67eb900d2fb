"""What a trainer's weights take for certain, from the headers of its model's files: the part of a plan that costs
nothing, so the launcher looks at it before every run.

Counted are 16 bytes for each parameter that trains (float32 master, gradient, Adam's two moments), and for each that is
frozen its own bytes, divided by the ranks of one copy (mesh.replicate). Activations, the head and everything else come
on top, so a run that is refused here could not have taken its first step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mgrpo.config import RunConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.architecture import text_of
from mgrpo.planning.machine import gpu_memory, host_memory
from mgrpo.weights.layout import Layout

TRAINED = 16  # bytes a parameter: master, gradient, two moments
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class State:
    """parameters of the whole policy; nbytes: of weights, gradients and optimizer on one rank, at least."""

    parameters: int
    trained: int
    nbytes: float


def check_state(config: RunConfig) -> None:
    """Raises ConfigError where an agent's weights with gradients and optimizer cannot fit on this machine, which runs
    all of the run."""
    together, parts = 0.0, []
    for role in config.policy_roles:
        agent, ranks = config.agents[role], config.ranks(role)
        found = _state(agent.model, agent.policy, ranks, agent.frozen)
        if found is None:
            continue
        if agent.policy.device == "cuda":
            memory = gpu_memory()
            if memory is not None and found.nbytes > memory:
                raise ConfigError(_refusal(f"agents.{role}", found, ranks, memory))
        else:
            together += ranks * found.nbytes
            parts.append(f"agents.{role}: {found.parameters / 1e9:.1f} billion parameters")
    memory = host_memory(swap=True)
    if together > memory:
        raise ConfigError(
            f"weights, gradients and Adam of the trainers on the CPU take {together / 1e9:.1f} GB "
            f"({'; '.join(parts)}), this machine has {memory / 1e9:.1f} GB with its swap; train fewer "
            "weights (policy.lora.rank, policy.last_layers) or take smaller models; `mgrpo plan` says what fits"
        )


def _refusal(where: str, found: State, ranks: int, memory: float) -> str:
    enough = ranks
    while found.nbytes * ranks / enough > memory:
        enough *= 2
    return (
        f"{where}.policy: weights, gradients and Adam of {found.parameters / 1e9:.1f} billion parameters take "
        f"{found.nbytes / 1e9:.1f} GB on each of ranks={ranks}, its GPU has {memory / 1e9:.1f} GB; set policy.ranks to "
        f"{enough} or more, or train fewer weights (policy.lora.rank, policy.last_layers); `mgrpo plan` says what fits"
    )


def _state(model: str | None, policy: PolicyConfig, ranks: int, frozen: bool) -> State | None:
    """None where the files do not say: no model, weights in another format, damage (loading names it)."""
    if model is None:
        return None
    try:
        config = text_of(json.loads((Path(model) / "config.json").read_text(encoding="utf-8")))
        sizes = _sizes(Path(model), config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not sizes:
        return None
    total = sum(sizes.values())
    trained = 0 if frozen or policy.lora.rank else total
    if policy.last_layers and trained:
        first = _layers(config) - policy.last_layers
        trained = sum(n for name, n in sizes.items() if (at := _layer(name)) is not None and at >= first)
    kept = 2 if policy.dtype == "bfloat16" else 4
    shards = ranks / policy.mesh.replicate
    return State(total, trained, (trained * TRAINED + (total - trained) * kept) / shards)


def _sizes(folder: Path, config: Mapping[str, object]) -> dict[str, int]:
    """Elements of each tensor in the folder's safetensors files that the model certainly takes."""
    found: dict[str, int] = {}
    for file in folder.glob("model*.safetensors"):
        with file.open("rb") as opened:

            def read(at: int, size: int) -> bytes:
                opened.seek(at)
                return opened.read(size)

            layout = Layout.read(read, file.stat().st_size)
        found |= {info.name: prod(info.shape) for info in layout.tensors}
    if config.get("tie_word_embeddings"):
        found = {name: n for name, n in found.items() if not name.endswith("lm_head.weight")}
    count = _layers(config)
    return {name: n for name, n in found.items() if (at := _layer(name)) is None or at < count}


def _layers(config: Mapping[str, object]) -> int:
    found = config["num_hidden_layers"]
    if not isinstance(found, int):
        raise ValueError(f"num_hidden_layers is {found!r}")
    return found


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None
