"""Other ways to compute rows with shared prefixes, on the same model and optimizer as ours (step_rivals.Trainee).

masked          our learner and head, with transformers' SDPA over the packed tree and a mask of all its pairs: a
                query sees its ancestors' tokens and its own node's up to itself. Pairs that the mask forbids are
                computed all the same
PrefixGrouper   the package of that name, as verl's `use_prefix_grouper` calls it: one prefix a group, the prefix's
                own attention and one of each continuation over [prefix, continuation], with masks; whole logits of
                prefix and continuations
naive, TRL      padded rows (step_rivals.py), nothing shared
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.prefix_workload import common_prefix, tree_of
from bench.step_rivals import Step, Trainee
from bench.step_workload import LOSS
from mgrpo.batcher.prefix_tree import PrefixTree, prefix_tree
from mgrpo.model.policy import Policy
from mgrpo.model.shared_rows import share
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner

GROUPER = "bench_prefix_grouper"


class MaskedPolicy(Policy):
    """The policy with one masked attention over each micro-batch's packed tree; it shares everything with it."""

    def __init__(self, policy: Policy) -> None:
        self.__dict__.update(policy.__dict__)

    def hidden_before(self, input_ids: Tensor, lengths: Tensor, scored: Tensor, *_: Any) -> Tensor:
        """As Policy.hidden_before."""
        ids, lengths = input_ids[:, :-1].contiguous(), (lengths - 1).clamp(min=1)
        rows = share(ids, lengths)
        if rows is None:
            raise ValueError("the rows share no prefix")
        states = self._states(
            input_ids=rows.input_ids.to(self.device),
            position_ids=rows.positions.to(self.device),
            attention_mask=tree_mask(prefix_tree(ids.numpy(), lengths.numpy())).to(self.device),
        )
        return states[0].index_select(0, rows.place[scored.cpu()].to(self.device))


def tree_mask(tree: PrefixTree) -> Tensor:
    """bool (1, 1, T, T): which of the nodes' tokens, one node after the other, each of them sees."""
    n = len(tree.row)
    above = np.eye(n, dtype=bool)
    for node, parent in enumerate(tree.parent.tolist()):  # preorder: a parent's row is complete
        if parent >= 0:
            above[node] |= above[parent]
    spans = zip(tree.begin.tolist(), tree.end.tolist(), strict=True)
    positions = torch.cat([torch.arange(begin, end) for begin, end in spans])
    node = torch.repeat_interleave(torch.arange(n), torch.from_numpy(tree.end - tree.begin).long())
    seen = torch.from_numpy(above)[node[:, None], node[None]]
    return (seen & (positions[:, None] >= positions[None]))[None, None]


def masked_step(trainee: Trainee, policy: Policy, batch: MiniBatch) -> Step:
    """Our learner with masked attention."""
    learner = Learner(MaskedPolicy(policy), trainee.optimizer, LOSS, 1.0)

    def step() -> None:
        trainee.model.set_attn_implementation("sdpa")
        learner.grad_clip = trainee.grad_clip
        learner.step(batch)

    return step


def grouper_step(trainee: Trainee, batch: MiniBatch, device: str, context: Callable[[], Any]) -> Step | str:
    """PrefixGrouper's step, each micro-batch a group with one prefix; why it is not run where the package is missing or
    rows share in another way."""
    try:
        from prefix_grouper import PrefixGrouper
    except ImportError as missing:
        return f"PrefixGrouper: {missing} (pip install --no-deps prefix-grouper)"
    _register()
    groups = []
    for part in batch.micro:
        prefix = len(common_prefix(part))
        if not prefix or len(tree_of(part).row) != 1 + len(part.lengths):
            return "PrefixGrouper: it takes groups with one prefix, and no tree of several levels"
        groups.append((part, prefix))

    def backward() -> None:
        for part, prefix in groups:
            with context():
                loss = _grouped_loss(trainee.model, PrefixGrouper, part, prefix, batch.denominator, device)
            loss.backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        trainee.model.set_attn_implementation(GROUPER)
        trainee.step(backward)

    return step


def _grouped_loss(
    model: Any, grouper: Any, part: MicroBatch, prefix: int, denominator: float, device: str
) -> Tensor:
    """The clipped loss of a group, by verl's calls of the package (trainer/ppo/prefix_grouper_utils.py)."""
    ids, rest = part.ids.to(device), (part.lengths - prefix).to(device)
    suffixes = ids[:, prefix:]
    inside = torch.arange(suffixes.shape[1], device=device)[None] < rest[:, None]
    head, head_mask = ids[:1, :prefix], torch.ones(1, prefix, dtype=torch.bool, device=device)
    group = grouper.from_ungrouped_masks(
        prefix_mask=head_mask, suffix_mask=inside, group_sizes=[len(ids)], padding_mode="right", device=device
    )
    joined = group.concat_input(head, head_mask, suffixes, inside)
    positions = torch.cat(
        [torch.arange(prefix, device=device)]
        + [torch.arange(prefix, prefix + n, device=device) for n in rest.tolist()]
    )
    logits = model(
        input_ids=joined,
        attention_mask=group.padding_mask,
        position_ids=positions[None],
        use_cache=False,
        prefix_grouper=group,
    ).logits
    _, _, found, _ = group.split_output(logits, include_prefix_last=1)
    logp = found[:, :-1].float().log_softmax(-1).gather(-1, suffixes[..., None]).squeeze(-1)
    a = part.advantages.to(device)[:, None]
    rate = (logp - part.rollout_logprobs.to(device)[:, prefix:]).exp()
    clipped = rate.clamp(1 - LOSS.clip_eps_low, 1 + LOSS.clip_eps_high)
    loss = -torch.minimum(rate * a, clipped * a) * part.loss_mask[:, prefix:].to(device)
    return (loss.sum(1) * part.weights.to(device)).sum() / denominator


def _register() -> None:
    """transformers' SDPA within PrefixGrouper, as verl patches it in, but for the mask: the package's has no causal
    part, which flash-attn adds and SDPA does not."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        group = kwargs.pop("prefix_grouper", None)
        if group is None:
            return sdpa_attention_forward(module, query, key, value, mask, *args, **kwargs)

        def inner(q: Tensor, k: Tensor, v: Tensor, inside: Tensor, *a: Any, **kw: Any) -> Tensor:
            causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            causal = causal.tril(k.shape[2] - q.shape[2]) & inside[:, None, None].to(q.device)
            return sdpa_attention_forward(module, q, k, v, causal, *a, **kw)[0]

        return group.forward(inner, query, key, value, *args, **kwargs), None

    AttentionInterface.register(GROUPER, attend)
    AttentionMaskInterface.register(GROUPER, sdpa_mask)
