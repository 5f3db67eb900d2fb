"""A policy without its weights: what a rollout worker on another server needs before the first weights arrive."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy, quiet, save_policy_files
from mgrpo.model.register import register_architecture
from mgrpo.model.stops import remember_stops
from mgrpo.model.tokens import Tokenizer

WEIGHT_FILES = (".safetensors", ".bin", ".index.json", ".pt")


def policy_files(policy: Policy) -> dict[str, bytes]:
    """The policy's configuration and tokenizer files by their path in its folder (a tokenizer with several chat
    templates has a folder of them). Raises ConfigError as save_policy_files."""
    with tempfile.TemporaryDirectory(prefix="mgrpo-policy-") as name:
        folder = Path(name)
        save_policy_files(policy, folder)
        return {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
        }


def policy_from_files(files: Mapping[str, bytes], name: str) -> Policy:
    """A policy with arbitrary weights from policy_files' output. Raises ConfigError naming the policy."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with _unpacked(files, name) as folder:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config)
        if (folder / "generation_config.json").exists():  # its stop tokens are not those of the config
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Policy(model, tokenizer, name)


def tokenizer_from_files(files: Mapping[str, bytes], name: str) -> tuple[Tokenizer, int]:
    """Tokenizer and vocabulary size from policy_files' output; the model itself is not built. Raises as
    policy_from_files."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with _unpacked(files, name) as folder:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        generation = config
        if (folder / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        remember_stops(tokenizer, generation)
    return tokenizer, int(config.get_text_config().vocab_size)


@contextmanager
def _unpacked(files: Mapping[str, bytes], name: str) -> Iterator[Path]:
    """The files in a folder, for as long as it is loaded from."""
    with tempfile.TemporaryDirectory(prefix="mgrpo-policy-") as folder, quiet():
        for file, data in files.items():
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts or file.endswith(WEIGHT_FILES):
                raise ConfigError(
                    f"{name}: the trainer sent a file {file!r}, expected configuration and tokenizer"
                )
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        try:
            register_architecture(Path(folder))
            yield Path(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{name}: no policy can be built from what its trainer sent: {error}"
            ) from error
