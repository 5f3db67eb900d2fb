"""A policy from a folder in Hugging Face's layout, and the reference policy of a KL term.

transformers is imported when a policy is loaded, not with this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import architecture
from mgrpo.model.policy import Policy, quiet
from mgrpo.model.register import register_architecture


def load_policy(path: str | Path, config: PolicyConfig | None = None) -> Policy:
    """The policy in the folder `path` (config.json, safetensors, tokenizer), held as `config` says (default: on the
    CPU, float32, everything trains). Never goes to the network.

    Raises ConfigError naming the folder and what is missing or unreadable in it, or the setting that cannot be met.
    """
    config = config or PolicyConfig()
    check_device(config.device)
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"policy folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"policy folder {folder} has no config.json; expected a Hugging Face model folder")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register_architecture(folder)
    with quiet():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
            safetensors.SafetensorError,
        ) as error:
            raise ConfigError(
                f"policy folder {folder}: no causal language model loads from it: {error}"
            ) from error
        if method := architecture.quantized(model.config.to_dict()):
            raise ConfigError(
                f"policy folder {folder}: its weights are quantised ({method}), and policies train in float32; take "
                "the folder with the plain weights"
            )
        _check_complete(found, folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"policy folder {folder}: no tokenizer loads from it: {error}") from error
    return Policy(model.to(config.device), tokenizer, str(folder), config)


def _check_complete(found: Mapping[str, Any], folder: Path) -> None:
    """transformers fills what the files do not give with noise, and says so in a warning."""
    for name, there, expected in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"policy folder {folder}: {name} has shape {tuple(there)}, config.json says {tuple(expected)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"policy folder {folder}: its weights lack {missing[0]} ({len(missing)} tensors are missing)"
        )


def check_device(device: str) -> None:
    """Raises ConfigError where `device` is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f'policy.device is "cuda", but torch {torch.__version__} sees no GPU on this machine'
        )


def load_reference(policy: Policy, path: str | Path) -> Policy:
    """The frozen reference of a KL term: the policy's own base where it has adapters, else what is in the folder
    `path`, computed as the policy is. Raises as load_policy."""
    if policy.config.lora.rank:
        return policy.base()
    plain = {"last_layers": 0, "gradient_checkpointing": False, "activation_offload": False}
    reference = load_policy(path, policy.config.model_copy(update=plain))
    reference.freeze()
    return reference
