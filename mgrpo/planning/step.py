"""The memory of one rank while it trains: a real training step, by the trainer's own code, over fake tensors.

Policy, its sharding, Learner and optimizer are those of a run; what differs is that no tensor of the model's size holds
data, and that the collectives of rank 0 have nobody behind them. So the figures follow the code when it changes.

The micro-batches are as full as they can be: as many trajectories of the greatest length as trainer.micro_batch takes,
every token of them sampled.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgrpo.config import AgentView
from mgrpo.errors import ConfigError
from mgrpo.losses.registry import find_loss
from mgrpo.model.architecture import EXPERTS
from mgrpo.model.attention import PACKED
from mgrpo.model.loading import reference_config
from mgrpo.model.policy import Policy
from mgrpo.ops import head
from mgrpo.planning.fake import FakeTensors, fake_ranks
from mgrpo.planning.live import bytes_of
from mgrpo.planning.models import fake_policy, packed_in_one_call
from mgrpo.planning.routing import even_routing
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, adamw_way, new_learner
from mgrpo.trainers.torch.ranks import Ranks


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of tensors on one rank."""

    frozen: int
    """Weights that do not train, as they are kept; those of a reference policy among them."""
    masters: int
    """Weights that train, in float32."""
    gradients: int
    optimizer: int
    rest: int
    """What else stays from step to step: buffers, copies of weights."""
    activations: int
    """What a forward pass of one micro-batch leaves for its backward pass, with what is gathered then."""
    head: int
    """What the vocabulary head takes for itself: a chunk of logits and its gradient."""
    peak: int
    """The most at one time, of all of this."""

    @property
    def state(self) -> int:
        """What stays through the whole run: all but activations and the head's own."""
        return self.frozen + self.masters + self.gradients + self.optimizer + self.rest


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters of the whole policy."""

    total: int
    trained: int
    active: int
    """Of which a token meets with its experts; embeddings count, which are looked up."""
    experts: int
    """Of all experts of a mixture."""
    chosen: int
    """Experts that a layer of a mixture sends a token to; else 0."""
    routed: int
    """Bytes that say where all routers send a token, as routing replay keeps them; else 0."""
    head: int
    """Of the vocabulary head, which is the embedding where they are tied."""
    layers: int
    hidden: int
    largest: int
    """Of the largest tensor."""


class PlannedRanks(Ranks):
    """Rank 0 of `size`, beside whom nobody is."""

    def __init__(self, size: int) -> None:
        super().__init__(1)
        self.size = size

    def gather(self, item: Any) -> list[Any]:
        return [item] * self.size


class Head:
    """Watches the vocabulary head, whose op allocates for itself."""

    def __init__(self, device: str) -> None:
        self._device = "cpu" if device == "cpu" else "meta"  # any other device: no machine here need have it
        self.most = 0  # bytes that it took
        self.before = 0  # bytes alive when it began

    def scratch(self, tensors: FakeTensors, args: tuple[Any, ...]) -> int:
        """Bytes of one chunk of logits, of their gradient and of the weight where these are tensors of their own (see
        ops/head.py). args: hidden (T, H), weight (V, H), ..."""
        hidden, weight = args[0], args[1]
        like = torch.empty(weight.shape, dtype=weight.dtype, device=self._device)
        rows = min(head.chunk_rows(None, hidden, like), hidden.shape[0])
        half = hidden.dtype in head.HALF
        beside = hidden.element_size() if half and self._device != "cpu" else 0
        found: int = rows * weight.shape[0] * (max(hidden.element_size(), 4) + beside)
        # Its rows, those that move, their gradient.
        found += 3 * rows * hidden.shape[1] * max(hidden.element_size(), 4)
        if half and self._device == "cpu":  # a block of columns of gradient and weight, widened
            columns = min(weight.shape[0], head.COLUMNS)
            found += columns * (rows * (hidden.element_size() + 4) + hidden.shape[1] * 4)
        if weight.dtype != hidden.dtype:
            found += weight.numel() * hidden.element_size()
        self.before = max(self.before, tensors.live)
        self.most = max(self.most, found)
        return found


def micro_batch(view: AgentView, packed: bool, vocabulary: int) -> MicroBatch:
    """One full micro-batch. packed: without padding, so that a shorter trajectory fills it up."""
    tokens, width = view.trainer.micro_batch, view.longest
    lengths = [width] * (tokens // width)
    if packed and (rest := tokens - sum(lengths)) > 1:
        lengths.append(rest)
    rows = len(lengths)
    ids = torch.arange(rows * width).reshape(rows, width) % vocabulary
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    logprobs = torch.full((rows, width), -1.0)
    return MicroBatch(ids, inside, logprobs, torch.tensor(lengths), torch.ones(rows), torch.ones(rows))


def plan_step(folder: Path, view: AgentView, name: str) -> tuple[StepMemory, Parameters]:
    """Of the trainer of the policy in `folder` (config.json is enough). name: of the setting that gave the folder.
    Raises ConfigError for what cannot be trained."""
    gc.collect()
    watched = Head(view.agent.policy.device)
    tensors: FakeTensors
    tensors = FakeTensors(
        {
            op: lambda args: watched.scratch(tensors, args)
            for op in ("mgrpo::linear_grpo_loss", "mgrpo::linear_logprob", "mgrpo::linear_logprob_backward")
        }
    )
    ranks = PlannedRanks(view.ranks)
    with _ranks(view.ranks), even_routing() if view.agent.policy.mesh.ep > 1 else contextlib.nullcontext():
        with tensors:
            policy = fake_policy(folder, view.agent.policy, ranks, name)
            parameters = _parameters(policy)
        batch = _batch(policy, view)  # of real tensors, so outside
        with tensors:
            learner = _learner(folder, view, policy, ranks, name)
            del policy
            found = _measure(learner, batch, view, tensors, watched)
    del learner
    return found, parameters


def _batch(policy: Policy, view: AgentView) -> MiniBatch:
    micro = micro_batch(view, policy.attention in PACKED, policy.vocabulary.size)
    micro.ids = policy.vocabulary.tokens(micro.ids)
    return MiniBatch([micro], float(len(micro.lengths)))


def _learner(folder: Path, view: AgentView, policy: Policy, ranks: Ranks, name: str) -> Learner:
    reference: Policy | None = None
    if find_loss(view.agent.loss).needs_reference:
        reference = policy.base() if policy.config.lora.rank else _reference(folder, view, ranks, name)
    learner = new_learner(view.agent, policy, reference, ranks)
    way = {"foreach": False, "fused": False, **adamw_way(torch.device(view.agent.policy.device))}
    for group in learner.optimizer.param_groups:
        group.update(way)
    return learner


def _reference(folder: Path, view: AgentView, ranks: Ranks, name: str) -> Policy:
    """As load_reference."""
    return fake_policy(folder, reference_config(view.agent.policy), ranks, name, frozen=True)


def _measure(
    learner: Learner, batch: MiniBatch, view: AgentView, tensors: FakeTensors, watched: Head
) -> StepMemory:
    policy = learner.policy
    recompute = view.trainer.old_logprobs == "recompute"
    one_call = packed_in_one_call(policy) if view.agent.policy.device == "cuda" else contextlib.nullcontext()
    with one_call:
        begin_in_the_middle(learner)
        gc.collect()
        tensors.peak = tensors.live
        learner.train([batch], recompute)
    gc.collect()
    trained = list(policy.parameters())
    own = [p for p in policy.model.parameters() if not p.requires_grad]
    if learner.reference is not None and learner.reference.model is not policy.model:
        own += learner.reference.model.parameters()
    state = (
        bytes_of(own),
        bytes_of(trained),
        bytes_of(p.grad for p in trained if p.grad is not None),
        bytes_of(
            x
            for s in learner.optimizer.state.values()
            for x in s.values()
            if isinstance(x, Tensor) and x.dim()
        ),
    )
    rest = max(0, tensors.live - sum(state))
    activations = max(0, watched.before - sum(state) - rest)
    return StepMemory(*state, rest, activations, watched.most, tensors.peak)


def begin_in_the_middle(learner: Learner) -> None:
    """The optimizer has taken a step, and a first micro-batch has left its gradient: what comes next is as much as
    ever comes together."""
    for parameter in learner.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    learner.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]


def _parameters(policy: Policy) -> Parameters:
    named = dict(policy.model.named_parameters())  # tied ones once
    total = sum(p.numel() for p in named.values())
    config = policy.model.config.get_text_config()
    experts = sum(p.numel() for name, p in named.items() if ".experts." in name)
    chosen = (getattr(config, "num_experts_per_tok", None) or 0) if experts else 0
    there = next((n for key in EXPERTS if (n := getattr(config, key, None))), 0)
    active = total - experts + (experts * chosen // there if there else 0)
    return Parameters(
        total,
        sum(p.numel() for p in policy.parameters()),
        active,
        experts,
        chosen,
        len(policy.routing.routers) * chosen * (1 if there <= 255 else 2),
        policy.head_weight.numel(),
        len(policy.layers),
        policy.head_weight.shape[1],
        max(p.numel() for p in named.values()),
    )


@contextlib.contextmanager
def _ranks(size: int) -> Iterator[None]:
    if size == 1:
        yield
        return
    if torch.distributed.is_initialized():
        raise ConfigError("a plan needs a process of its own: torch.distributed is in use here")
    with fake_ranks(size):
        yield
