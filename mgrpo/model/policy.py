"""One agent's policy: a Hugging Face causal language model, its tokenizer, and how its weights travel.

The trainer never asks the model for logits: it takes the final hidden states of the rows that carry loss and
the head weight, and lets the fused loss multiply them. That is exact only where logits = hidden @
head_weight.T, so a model that does anything after its head (a bias, a scale, a soft cap) is refused when it
is loaded.

Dropout stays off in training as well: the trainer must reproduce the sampler's log-probs.

transformers is imported when a policy is loaded, not with this module.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mgrpo.errors import ConfigError
from mgrpo.model.groups import width_groups

FORWARD_COST = 128
"""What one more forward and backward costs on a CPU, in token positions (of a token-shift decoder)."""


class Policy:
    """A causal language model with its tokenizer. Raises ConfigError where the model cannot be trained."""

    def __init__(self, model: Any, tokenizer: Any, name: str = "policy") -> None:
        """model: a transformers causal LM; tokenizer: its tokenizer; name: how errors call this policy."""
        head = model.get_output_embeddings()
        if head is None:
            raise ConfigError(
                f"{name}: {type(model).__name__} has no output head, expected a causal language model"
            )
        if len(tokenizer) > head.weight.shape[0]:
            raise ConfigError(
                f"{name}: the tokenizer has {len(tokenizer)} tokens, the model's head {head.weight.shape[0]}"
            )
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.vocab_size: int = head.weight.shape[0]  # may exceed the tokenizer's tokens
        self._trunk = model.base_model
        self._keeps = "keep" in inspect.signature(self._trunk.forward).parameters
        self._check_head()

    @property
    def head_weight(self) -> Tensor:
        """(V, H), the embedding itself where the model ties it."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def context_length(self) -> int:
        """Positions the model was built for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the head lives."""
        return self.head_weight.device

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Trainable parameters, each once even when tied."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def hidden(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Final hidden states (R, S, H) before the head, of right-padded rows input_ids (R, S).

        Row r has lengths[r] tokens (all S without `lengths`). Attention is causal and the padding comes after
        the tokens, so they never see it and no mask is built: hidden states at padding are finite and mean
        nothing.
        """
        if lengths is not None and (
            lengths.shape != input_ids.shape[:1]
            or not bool(((lengths > 0) & (lengths <= input_ids.shape[1])).all())
        ):
            raise ValueError(
                f"lengths {lengths.tolist()} do not fit rows of shape {tuple(input_ids.shape)}: 1..S each"
            )
        states: Tensor = self._trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    def hidden_before(self, input_ids: Tensor, lengths: Tensor, scored: Tensor) -> Tensor:
        """Final hidden states (T, H) that score the tokens where scored (R, S - 1) is set, row-major.

        scored[r, t] is about token t + 1 of row r, whose hidden state stands at t. Equal to
        hidden(input_ids, lengths)[:, :-1][scored] without the work that is not needed for it: no row's last
        token enters the model; on the CPU, rows of similar length share a forward, and our own decoder skips
        the last layer's feed-forward block where nothing is scored.
        """
        ids = input_ids[:, :-1]
        if self.device.type != "cpu":
            return self.hidden(ids)[scored]
        parts, places = [], []
        for group in width_groups((lengths - 1).clamp(min=1).numpy(), FORWARD_COST):
            rows = torch.from_numpy(group)
            width = max(1, int(lengths[rows].max()) - 1)
            mask = scored[rows, :width]
            at = mask.flatten().nonzero().squeeze(1)
            parts.append(self._trunk_at(ids[rows, :width], at))
            places.append((rows[:, None] * ids.shape[1] + torch.arange(width))[mask])
        return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, torch.cat(places).argsort())

    def _trunk_at(self, input_ids: Tensor, at: Tensor) -> Tensor:
        if self._keeps:
            states: Tensor = self._trunk(input_ids=input_ids, use_cache=False, keep=at).last_hidden_state
            return states
        return self.hidden(input_ids).flatten(0, 1).index_select(0, at)

    def step(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Hidden states (R, S, H) of new tokens on top of `cache`: 4-D additive mask, explicit positions."""
        states: Tensor = self._trunk(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return states

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.arange(min(3, self.vocab_size), device=self.device)[None]
        logits = self.model(input_ids=ids, use_cache=False).logits
        ours = self.hidden(ids) @ self.head_weight.T
        if ours.shape != logits.shape or not torch.allclose(ours, logits, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"{self.name}: the logits of {type(self.model).__name__} are not hidden @ head.T (a bias, "
                "scale or soft cap follows its head); the fused loss would train another model"
            )


def load_policy(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Policy:
    """The policy in the folder `path` (config.json, safetensors, tokenizer). Never goes to the network.

    Raises ConfigError naming the folder and what is missing or unreadable in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"policy folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"policy folder {folder} has no config.json; expected a Hugging Face model folder")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mgrpo.model.shift_decoder  # noqa: F401 - registers our own architecture

    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise ConfigError(
                f"policy folder {folder}: no causal language model loads from it: {error}"
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"policy folder {folder}: no tokenizer loads from it: {error}") from error
    return Policy(model.to(device), tokenizer, str(folder))


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write the policy to the folder `path`, which is complete or absent at every moment.

    A new folder appears by one rename. An existing one is moved aside first: a crash between the two renames
    leaves it as `<path>.old`.
    """
    folder = Path(path)
    fresh, old = folder.with_name(folder.name + f".tmp-{os.getpid()}"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with quiet():
        policy.model.save_pretrained(fresh)
        policy.tokenizer.save_pretrained(fresh)
    for file in fresh.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class quiet:
    """transformers' progress bars off: they would tear the run's own progress line."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        if self._shown:
            logging.enable_progress_bar()


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers by name, tied ones once, sharing the model's memory."""
    state = model.state_dict()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in state.items() if name not in tied}


def load_state(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` (as of state_of) into the model in place. Nothing is copied unless everything fits.

    Raises ValueError naming the first tensor that is missing, unexpected or of another shape.
    """
    own = state_of(model)
    if missing := sorted(own.keys() - state.keys()):
        raise ValueError(f"weights lack {missing[0]} ({len(missing)} of {len(own)} tensors are missing)")
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(
                f"weights have {name} of shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
    if unexpected := sorted(state.keys() - model.state_dict().keys()):
        raise ValueError(
            f"weights have {unexpected[0]}, which this model does not ({len(unexpected)} such tensors)"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def state_bytes(model: torch.nn.Module) -> bytes:
    """The model's weights in safetensors format."""
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in state_of(model).items()}
    return safetensors.torch.save(state)


def load_state_bytes(model: torch.nn.Module, data: bytes) -> None:
    """Copy weights written by state_bytes into the model in place. Raises ValueError if they do not fit."""
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{len(data)} bytes of weights are not in safetensors format: {error}") from error
    load_state(model, state)
