"""A policy without its weights: what a rollout worker on another server needs before the first weights arrive."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy, quiet

WEIGHT_FILES = (".safetensors", ".bin", ".index.json", ".pt")


def shell_files(policy: Policy) -> dict[str, bytes]:
    """The policy's configuration and tokenizer files by name."""
    with tempfile.TemporaryDirectory(prefix="mgrpo-shell-") as folder, quiet():
        policy.model.config.save_pretrained(folder)
        policy.model.generation_config.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


def policy_from_shell(files: Mapping[str, bytes], name: str) -> Policy:
    """A policy with arbitrary weights from shell_files' output. Raises ConfigError naming the policy."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import mgrpo.model.shift_decoder  # noqa: F401 - registers our own architecture

    with tempfile.TemporaryDirectory(prefix="mgrpo-shell-") as folder, quiet():
        for file, data in files.items():
            if Path(file).name != file or file.endswith(WEIGHT_FILES):
                raise ConfigError(
                    f"{name}: the trainer sent a file {file!r}, expected configuration and tokenizer"
                )
            (Path(folder) / file).write_bytes(data)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_config(config)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{name}: no policy can be built from what its trainer sent: {error}"
            ) from error
    return Policy(model, tokenizer, name)
