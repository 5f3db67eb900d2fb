"""A policy as its trainer will hold it, from config.json alone: the weights need not be there.

Call everything here inside `FakeTensors`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import attention
from mgrpo.model.folder import check_experts
from mgrpo.model.loading import BlankPolicy
from mgrpo.model.mesh import check_mesh
from mgrpo.model.policy import Policy
from mgrpo.model.register import register_architecture
from mgrpo.trainers.torch import context
from mgrpo.trainers.torch.ranks import Ranks

if TYPE_CHECKING:
    from mgrpo.model.parts import Parts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class StandInTokenizer:
    """As many tokens as the head has rows, for a folder without a tokenizer."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.eos_token_id = 0

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._size)}


def on_cpu(config: PolicyConfig) -> PolicyConfig:
    """The same choices for fake tensors, which all say that they are on the CPU. No token is another's: rows that share
    nothing are the most that a micro-batch holds. Routing replay, whose proof compares numbers, is left out: a choice
    that is given takes as much as one that is made."""
    kind = attention.resolve(config.attention, config.device, config.dtype)
    chosen = "varlen" if kind == "flash" else kind  # the same tensors, without the package
    if config.routing_replay and chosen == "rows":  # as Policy does
        chosen = "sdpa"
    update = {"device": "cpu", "attention": chosen, "share_prefixes": False, "routing_replay": False}
    return config.model_copy(update=update)


def fake_model(folder: Path, name: str) -> Any:
    """The causal language model of the folder's config.json, in float32. name: of the setting. Raises ConfigError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name}: {folder} has no config.json; expected a Hugging Face model folder")
    register_architecture(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{name}: no causal language model follows from {folder}: {error}") from error


def fake_policy(folder: Path, config: PolicyConfig, ranks: Ranks, name: str, frozen: bool = False) -> Policy:
    """The policy, whole or this rank's part. config: with the device that it is planned for. frozen: nothing of it
    trains. Raises ConfigError as loading does for a model that cannot be trained; what needs numbers is not checked."""
    check_mesh(folder, config)
    model = fake_model(folder, name)
    check_experts(folder, f"{name.removesuffix('.model')}.policy", config)
    tokenizer, config = _tokenizer(folder, model), on_cpu(config)
    if ranks.size == 1:
        policy = Policy(model, tokenizer, str(folder), config)
        if frozen:
            policy.freeze()
        return policy
    from mgrpo.trainers.torch.shard import ShardedPolicy

    blank = BlankPolicy(model, tokenizer, str(folder), config, cast("Parts", _NoParts()), "")
    return ShardedPolicy(blank, ranks, frozen)


class _NoParts:
    """In the place of files: what they would fill has no data."""

    def read_into(self, model: Any) -> None:
        pass


def _tokenizer(folder: Path, model: Any) -> Any:
    from transformers import AutoTokenizer

    if any((folder / file).exists() for file in TOKENIZER_FILES):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return StandInTokenizer(model.get_output_embeddings().weight.shape[0])


@contextlib.contextmanager
def packed_in_one_call(policy: Policy) -> Iterator[None]:
    """A GPU computes all packed sequences in one call, whose output is there once; the CPU's loop over sequences puts
    its pieces together into a second copy. Divided rows need a mask in memory on a CPU alone."""
    name = policy.model.config._attn_implementation
    if policy.attention not in attention.PACKED and name != context.ATTENTION:
        yield
        return
    from transformers import AttentionInterface

    before = AttentionInterface._global_mapping[name]
    AttentionInterface.register(name, _divided if name == context.ATTENTION else _one_call)
    try:
        yield
    finally:
        AttentionInterface.register(name, before)


def _one_call(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """AttentionInterface function: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D)."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


def _divided(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As _one_call for a rank's part (R, G, n, D) of rows: the keys and values of all ranks are gathered."""
    if (split := kwargs.pop(context.SPLIT, None)) is not None:
        n = query.shape[2]
        key, value = (context.in_order(x, split)[:, :, :n] for x in (key, value))
    return _one_call(module, query, key, value, attention_mask)
