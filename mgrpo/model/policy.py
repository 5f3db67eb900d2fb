"""One agent's policy: a Hugging Face causal language model, its tokenizer, and how its weights travel.

The trainer never asks the model for logits: it takes the final hidden states of the rows that carry loss and the head
weight, and lets the fused loss multiply them. That is exact only where logits = hidden @ head_weight.T, so a model that
does anything after its head (a bias, a scale, a soft cap) is refused when it is loaded (head_guard.py). Rows of the
head that are no token of the tokenizer take no part (vocabulary.py).

Dropout stays off in training as well: the trainer must reproduce the sampler's log-probs.

With dtype "bfloat16" the backbone computes in bfloat16 on copies of float32 weights (precision.py). Logits are float32
whatever their operands are (ops/head.py): one in bfloat16 is rounded to 1/256 of itself, which a ratio of probabilities
would feel.

transformers is imported when a policy is loaded, not with this module.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.files import sync_folder, sync_tree
from mgrpo.model import architecture, attention, head_guard, lora, moe, names, sharing
from mgrpo.model.groups import width_groups
from mgrpo.model.precision import Precision, head_dtype
from mgrpo.model.shared_rows import HeldPrefix, SharedRows, share
from mgrpo.model.stops import remember_stops
from mgrpo.model.stream import WeightStream, own_state
from mgrpo.model.trained import (
    choose_trained,
    compile_layers,
    decoder_layers,
    recompute_layers,
    uncompiled,
)
from mgrpo.model.vocabulary import Vocabulary
from mgrpo.model.weight_files import write_weights

if TYPE_CHECKING:
    from mgrpo.ops.divided_head import TokenShare

FORWARD_COST = 128
"""What one more forward and backward costs on a CPU, in token positions (of a token-shift decoder)."""


class Policy:
    """A causal language model with its tokenizer. Raises ConfigError where the model cannot be trained."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str = "policy", config: PolicyConfig | None = None
    ) -> None:
        """model: a transformers causal LM with float32 weights, on its device, taken over; tokenizer: its tokenizer;
        name: how errors call this policy; config: how it is computed and what of it trains (default: everything,
        float32, each row whole)."""
        head = head_guard.head_of(model, name)
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        remember_stops(tokenizer, getattr(model, "generation_config", None))
        self.vocab_size: int = head.weight.shape[0]  # may exceed the tokenizer's tokens
        self.vocabulary = Vocabulary(tokenizer, self.vocab_size, name)
        self.context_length: int | None = architecture.positions(model.config.to_dict())
        """Positions the model was built for; None where it has no bound, as state-space models and ALiBi."""
        self.config = config or PolicyConfig(share_prefixes=False)
        self._trunk = head_guard.backbone_of(model, name)
        self._keeps = "keep" in inspect.signature(self._trunk.forward).parameters
        self._dtype, self._offload = head.weight.dtype, False
        self.shares = False
        """Whether what rows of a batch begin with is computed once (shared_rows.py)."""
        self.why_not: str | None = None
        """Why it is not, where the configuration asks for it."""
        self.precision = Precision(model, PolicyConfig(), name)
        self.routing = moe.Routing(model, self.config.routing_replay, name)
        moe.check(model, self.config, self.routing, name)
        self.experts = moe.choose(model, self.config, name)
        """How its experts multiply; None for a dense model."""
        self._set_up(head)

    def _set_up(self, head: Any) -> None:
        """Judge what the model computes, then choose what of it trains."""
        head_guard.check_head(self.model, self._trunk, head, self._states, self.name)
        attention.check_padded(self.model, self._states, self.device, self.name)
        choose_trained(self.model, self.config, self.name)
        compile_layers(self.model, self.config, self.name)
        self._round()
        with uncompiled():
            self.attention = attention.choose(self.model, self._states, self.config, self.device, self.name)
            self._prove_replay()
            self._choose_sharing()
        recompute_layers(self.model, self.config, self.name)
        self._offload = self.config.activation_offload

    def _prove_replay(self) -> None:
        if self.routing.replay is not None:
            self.routing.replay.prove(self._states, self.device)
            # One forward pass a micro-batch, whose tokens the choices are laid out for.
            self.attention = "sdpa" if self.attention == "rows" else self.attention

    def _choose_sharing(self) -> None:
        self.why_not = sharing.choose(self.model, self._states, self.config, self.device, self.attention)
        self.shares = self.config.share_prefixes and self.why_not is None

    def _round(self) -> None:
        """From now on, compute in what the configuration says. Comes when what trains is chosen."""
        self.precision = Precision(self.model, self.config, self.name)
        if self.config.dtype != "float32" or self.config.head_dtype != "auto":
            self._dtype = head_dtype(self.config)

    @property
    def head_weight(self) -> Tensor:
        """(V, H), the embedding itself where the model ties it; in full_precision() float32."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight.float() if self.precision.exact else weight

    @property
    def token_head(self) -> Tensor:
        """(N, H), the rows of head_weight that are tokens; the loss numbers them as vocabulary.classes does. The others
        have no gradient."""
        return self.vocabulary.head(self.head_weight)

    @property
    def backbone(self) -> Any:
        """The module that ends in the final hidden states."""
        return self._trunk

    @property
    def device(self) -> torch.device:
        """Where the head lives."""
        return self.head_weight.device

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The decoder layers, first to last."""
        return decoder_layers(self.model, self.name)

    def base(self) -> Policy:
        """This policy with its adapters off, sharing its weights: the reference of a KL term without a second model.
        Raises ValueError where there are no adapters."""
        return WithoutAdapters(self)

    def freeze(self) -> None:
        """Train nothing of it from now on."""
        self.model.requires_grad_(False)
        self.precision.freeze_in_half()

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
        return self._states(input_ids=input_ids)

    def hidden_before(
        self, input_ids: Tensor, lengths: Tensor, scored: Tensor, held: HeldPrefix | None = None
    ) -> Tensor:
        """Final hidden states (T, H) that score the tokens where scored (R, S - 1) is set, row-major.

        scored[r, t] is about token t + 1 of row r, whose hidden state stands at t. Equal to
        hidden(input_ids, lengths)[:, :-1][scored] without the work that is not needed for it: what rows begin with is
        computed once (where the policy `shares`), no row's last token enters the model, padding little (rows) or not at
        all (packed), and our own decoder skips the last layer's feed-forward block where nothing is scored. held: a
        prefix that every row begins with, which is not computed here. Arguments may lie in main memory. Of ranks that
        have the same rows each gets the hidden states of its own tokens: share_of(scored).
        """
        ids, lengths = input_ids[:, :-1], (lengths - 1).clamp(min=1)
        if self.shares:
            # Micro-batches that are packed by their distinct tokens have no room for the padding of whole rows.
            pads = self.attention == "sdpa" and bool((lengths < ids.shape[1]).any())
            known = 0 if held is None else len(held.ids)
            rows = share(ids.cpu(), lengths.cpu(), known, anyway=pads)
            if rows is not None:
                return self._of_tree(rows, scored.cpu(), held)
        if self.attention == "rows":
            return self._grouped(ids, lengths, scored)
        self.routing.expect(lengths, ids.shape[1] if self.attention == "sdpa" else None, self.device)
        if self.attention == "sdpa":
            return self._states(input_ids=ids.to(self.device))[scored.to(self.device)]
        packed = attention.pack(ids, lengths)
        at = scored[packed.inside].nonzero().squeeze(1).to(self.device)
        return self._states(**packed.to(self.device).arguments())[0].index_select(0, at)

    def share_of(self, scored: Tensor) -> TokenShare | None:
        """Which of the tokens where scored (R, S - 1) is set are this rank's; None: all, no rank has the same rows."""
        return None

    def hold(self, ids: Tensor) -> HeldPrefix:
        """Compute a prefix i64 (P,) now for several calls of hidden_before(), whose backward passes come before the
        prefix's own. Raises ValueError where the policy does not share."""
        if not self.shares:
            raise ValueError(f"{self.name} computes each row whole: {self.why_not or 'share_prefixes=false'}")
        self.routing.expect(torch.tensor([len(ids)]), None, self.device)
        return HeldPrefix.of(ids, self._states, self.device)

    def _of_tree(self, rows: SharedRows, scored: Tensor, held: HeldPrefix | None) -> Tensor:
        parts = [] if held is None else [held.hidden.to(self._head_dtype)]
        if rows.sizes:
            self.routing.expect(torch.tensor(rows.sizes), None, self.device)
            parts.append(rows.forward(self._states, self.device, held))
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        return states.index_select(0, rows.place[scored].to(self.device))

    def _grouped(self, ids: Tensor, lengths: Tensor, scored: Tensor) -> Tensor:
        """Rows of similar length share a forward."""
        parts, places = [], []
        for group in width_groups(lengths.cpu().numpy(), FORWARD_COST):
            rows = torch.from_numpy(group)
            width = int(lengths[rows].max())
            mask = scored[rows, :width]
            at = mask.flatten().nonzero().squeeze(1)
            self.routing.expect(lengths[rows], width, self.device)
            parts.append(self._trunk_at(ids[rows, :width].to(self.device), at.to(self.device)))
            places.append((rows[:, None] * ids.shape[1] + torch.arange(width))[mask.cpu()])
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts).index_select(0, torch.cat(places).argsort().to(self.device))

    def _trunk_at(self, input_ids: Tensor, at: Tensor) -> Tensor:
        if self._keeps:
            return self._states(input_ids=input_ids, keep=at)
        return self._states(input_ids=input_ids).flatten(0, 1).index_select(0, at)

    def _states(self, **arguments: Any) -> Tensor:
        """Final hidden states of the backbone, in the head's dtype."""
        store = (
            torch.autograd.graph.save_on_cpu(pin_memory=True) if self._offload else contextlib.nullcontext()
        )
        with store:
            states: Tensor = self._trunk(**arguments, use_cache=False).last_hidden_state
        return states.to(self._head_dtype)

    @property
    def _head_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision.exact else self._dtype

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside the block what is computed in bfloat16 otherwise is computed in float32, hidden states and head_weight
        are float32. A collective where the policy lies on several ranks."""
        with self.precision.full(), uncompiled():
            yield

    def step(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Hidden states (R, S, H) of new tokens on top of `cache`: 4-D additive mask, explicit positions."""
        states: Tensor = self._trunk(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return states.to(self._dtype)


class WithoutAdapters(Policy):
    """The policy below its adapters, which shares everything with it: see Policy.base."""

    def __init__(self, policy: Policy) -> None:
        if not policy.config.lora.rank:
            raise ValueError(f"{policy.name} has no adapters, so it is not its own reference")
        self.__dict__.update(policy.__dict__)

    def _states(self, **arguments: Any) -> Tensor:
        with torch.no_grad(), lora.adapters_off(self.model):
            return super()._states(**arguments)


def save_policy(
    policy: Policy, path: str | Path, weights: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """Write the policy to the folder `path`, adapters merged. See write_folder for what a crash leaves. weights: those
    of the policy's stream, where it lies on several ranks."""
    stream = WeightStream(policy.model)
    config = policy.model.config
    config.architectures = [type(policy.model).__name__]
    widest = max((p.dtype for p in policy.model.parameters()), key=lambda dtype: dtype.itemsize)
    config.dtype = str(widest).removeprefix("torch.")  # frozen parts may be kept in less

    def write(fresh: Path) -> None:
        save_policy_files(policy, fresh)
        write_weights(fresh, stream.tensors, stream.read() if weights is None else weights)

    write_folder(path, write)


def save_policy_files(policy: Policy, folder: Path) -> None:
    """Write all of the policy but its weights into `folder`. Every way to save a policy goes through here, so a trainer
    that sends this at its start knows that it can save at its end. Raises ConfigError for what cannot be saved."""
    try:
        with quiet():
            policy.model.config.save_pretrained(folder)
            policy.model.generation_config.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{policy.name}: the configuration or the tokenizer cannot be saved ({type(error).__name__}: {reason}); "
            "mend generation_config.json, tokenizer_config.json or the chat templates in its folder"
        ) from error


def save_adapter(policy: Policy, path: str | Path) -> None:
    """Write the policy's adapters alone to the folder `path`, in peft's format, as vLLM loads them. Raises ValueError
    where it has none."""
    if not policy.config.lora.rank:
        raise ValueError(f"{policy.name} has no adapters to save: policy.lora.rank is 0")
    write_folder(
        path, lambda fresh: lora.write_adapter(policy.model, policy.model.state_dict(), fresh, policy.name)
    )


def write_folder(path: str | Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder that then becomes `path`, which is complete or absent at every moment.

    A new folder appears by one rename. An existing one is moved aside first: a crash between the two renames
    leaves it as `<path>.old`.
    """
    folder = Path(path)
    fresh, old = folder.with_name(folder.name + f".tmp-{os.getpid()}"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    sync_tree(fresh)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    sync_folder(folder.parent)
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
    """The model's parameters and persistent buffers under the names of its checkpoint (names.py), tied ones once,
    sharing the model's memory where the layout allows. Adapters are merged: adapted weights are copies.
    stream.py gives the same, one after the other."""
    return names.published(model, _plain_state(model))


def _plain_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """state_of under the model's names in memory."""
    state = own_state(model)
    return lora.merged(state, model) if lora.has_adapters(state) else state


def trained_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold beside the starting policy, under the names in memory, sharing the model's memory:
    what trains where some of the model is frozen (adapters under their own names), else everything, tied ones once."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return _plain_state(model) if len(trained) == len(list(model.parameters())) else trained


def state_from_bytes(data: bytes) -> dict[str, Tensor]:
    """The tensors in safetensors format. Raises ValueError where they are not."""
    try:
        state: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{len(data)} bytes of weights are not in safetensors format: {error}") from error
    return state
