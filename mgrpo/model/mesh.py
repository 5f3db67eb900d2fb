"""Whether a model can be cut as policy.mesh asks, from its configuration alone: before anything of it is in memory.

What cuts a model is transformers' plan for its type (`base_model_tp_plan`, `base_model_ep_plan`); there are no parallel
layers of our own. A plan takes some cuts that do not come out even, and others that no checkpoint can hold: those are
refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import architecture
from mgrpo.model.architecture import EXPERTS
from mgrpo.model.register import register_architecture

STYLES = frozenset(
    {
        *("colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_rep", "rowwise_split_input"),
        *("replicated_with_grad_allreduce", "embedding_rowwise", "replicate"),
    }
)
"""How a tensor-parallel plan may treat a layer here; each leaves a rank one contiguous part of a weight, or all."""
_HEADS = ("num_attention_heads", "num_key_value_heads")
_WIDTHS = ("hidden_size", "intermediate_size", "shared_expert_intermediate_size", "vocab_size")


def check_mesh(folder: Path, policy: PolicyConfig) -> None:
    """Raises ConfigError naming the setting and the bound where the model in `folder` cannot be cut so."""
    mesh = policy.mesh
    if mesh.tp == mesh.ep == mesh.cp == 1:
        return
    try:
        import transformers.distributed.expert_parallel  # noqa: F401 - the plans are applied by it
        from transformers import AutoConfig, __version__
    except ImportError:
        from transformers import __version__

        raise ConfigError(
            f"policy.mesh tp={mesh.tp}, ep={mesh.ep}, cp={mesh.cp} needs transformers 5.23, found {__version__}"
        ) from None
    register_architecture(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"policy folder {folder}: no configuration loads from it: {error}") from error
    for reason in (*_tensor(config, policy), *_expert(config, policy), *_context(config, policy)):
        raise ConfigError(f"policy folder {folder}: {reason}")


def _tensor(config: Any, policy: PolicyConfig) -> Iterator[str]:
    tp, asked = policy.mesh.tp, f"policy.mesh.tp={policy.mesh.tp}"
    if tp == 1:
        return
    plan, kind = getattr(config, "base_model_tp_plan", None) or {}, config.model_type
    if not plan:
        yield (
            f"{asked}: transformers has no tensor-parallel plan for model type {kind!r}; use policy.mesh.dp"
        )
        return
    experts = getattr(config, "base_model_ep_plan", None) or {}
    for name, style in plan.items():
        of_experts = any(name == rule or name.startswith(f"{rule}.") for rule in experts)
        if policy.mesh.ep > 1 if of_experts else style in STYLES:  # with ep whole experts are spread instead
            continue
        advice = f"set policy.mesh.ep to a multiple of {tp}" if experts else "use policy.mesh.dp"
        yield f"{asked}: the plan of {kind!r} cuts {name} as {style!r}, of which no checkpoint is written; {advice}"
    for setting in (*_HEADS, *_WIDTHS):
        value = getattr(config, setting, None)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and number % tp:
                yield f"{asked} does not divide {setting}={number} of {kind!r}"


def _expert(config: Any, policy: PolicyConfig) -> Iterator[str]:
    ep, asked = policy.mesh.ep, f"policy.mesh.ep={policy.mesh.ep}"
    if ep == 1:
        return
    kind = config.model_type
    if not getattr(config, "base_model_ep_plan", None):
        yield (
            f"{asked}: transformers has no expert-parallel plan for model type {kind!r}; use policy.mesh.dp"
        )
        return
    for setting in EXPERTS:
        number = getattr(config, setting, None)
        if isinstance(number, int) and number % ep:
            yield f"{asked} does not divide {setting}={number} of {kind!r}"


def _context(config: Any, policy: PolicyConfig) -> Iterator[str]:
    asked, found = f"policy.mesh.cp={policy.mesh.cp}", config.to_dict()
    if policy.mesh.cp == 1:
        return
    if others := sorted(architecture.layer_kinds(found) - architecture.ATTENTION):
        yield f"{asked}: {others[0]} layers of {config.model_type!r} need whole rows; use policy.mesh.dp"
    if others := sorted(architecture.windows(found).keys() - {"sliding_window"}):
        yield f"{asked}: {config.model_type!r} attends within {others[0]} in a way of its own; use policy.mesh.dp"
