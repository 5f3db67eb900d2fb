"""A policy from a folder in Hugging Face's layout, and the reference policy of a KL term.

transformers is imported when a policy is loaded, not with this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import architecture, head_guard
from mgrpo.model.parts import Parts
from mgrpo.model.policy import Policy, quiet
from mgrpo.model.register import register_architecture
from mgrpo.model.weight_slices import WeightFiles


def load_policy(path: str | Path, config: PolicyConfig | None = None) -> Policy:
    """The policy in the folder `path` (config.json, safetensors, tokenizer), held as `config` says (default: on the
    CPU, float32, everything trains, each row computed whole). Never goes to the network.

    Raises ConfigError naming the folder and what is missing or unreadable in it, or the setting that cannot be met.
    """
    config = config or PolicyConfig(share_prefixes=False)
    folder = _policy_folder(path, config)
    from transformers import AutoModelForCausalLM

    with quiet(), _named(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    _check_plain(model.config, folder)
    _check_complete(found, folder)
    policy = Policy(model.to(config.device), _tokenizer(folder), str(folder), config)
    if config.dtype != "float32" or policy.experts is not None:
        _leave_files(policy.model)
    return policy


def _leave_files(model: torch.nn.Module) -> None:
    """Weights as they are loaded are views of a mapped file. Where some have been rounded or joined (experts), any
    other would keep all of the file in memory: they get memory of their own."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
            parameter.data = parameter.data.clone()


@dataclass(frozen=True, slots=True)
class BlankPolicy:
    """All of a policy in a folder but its weights."""

    model: Any
    """On the meta device, but for buffers that no checkpoint holds."""
    tokenizer: Any
    name: str
    config: PolicyConfig
    parts: Parts
    """Where its weights are."""
    digest: str
    """Equal where the files are."""


def blank_policy(path: str | Path, config: PolicyConfig) -> BlankPolicy:
    """What load_policy would load, for a model that is divided before its weights are read: nothing of them is in
    memory yet. Raises ConfigError as load_policy, and for files that are missing, cut off, or of another model."""
    folder = _policy_folder(path, config)
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers import initialization as init

    files = WeightFiles(folder)
    with quiet(), _named(folder):
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
        _check_plain(found, folder)
        with torch.device("meta"), init.meta_device_safe_creation_ops():
            model = AutoModelForCausalLM.from_config(found, dtype=torch.float32)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        _compute_buffers(model)
    head = head_guard.head_of(model, str(folder))
    head_guard.check_structure(model, head_guard.backbone_of(model, str(folder)), head, str(folder))
    parts = Parts(model, files)
    return BlankPolicy(model, _tokenizer(folder), str(folder), config, parts, files.digest)


def _policy_folder(path: str | Path, config: PolicyConfig) -> Path:
    check_device(config.device)
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"policy folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"policy folder {folder} has no config.json; expected a Hugging Face model folder")
    register_architecture(folder)
    return folder


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What transformers raises, as ConfigError with the folder's name."""
    try:
        yield
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
        safetensors.SafetensorError,
    ) as error:
        raise ConfigError(
            f"policy folder {folder}: no causal language model loads from it: {error}"
        ) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"policy folder {folder}: no tokenizer loads from it: {error}") from error


def _check_plain(config: Any, folder: Path) -> None:
    if method := architecture.quantized(config.to_dict()):
        raise ConfigError(
            f"policy folder {folder}: its weights are quantised ({method}), and policies train in float32; take "
            "the folder with the plain weights"
        )


@torch.no_grad()
def _compute_buffers(model: Any) -> None:
    """Rotary frequencies and the like, which the meta device has lost and no file holds: the model's own
    initialisation makes them, of everything else it is told that it is done."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = False
    model.initialize_weights()


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
    reference = load_policy(path, reference_config(policy.config))
    reference.freeze()
    return reference


def reference_config(config: PolicyConfig) -> PolicyConfig:
    """How the reference of a policy without adapters is held: computed as the policy is, without what is there for a
    backward pass."""
    plain = {"last_layers": 0, "gradient_checkpointing": False, "activation_offload": False}
    return config.model_copy(update=plain)
