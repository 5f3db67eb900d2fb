"""One optimizer step on one minibatch: rows -> hidden states -> sampled tokens -> fused loss -> gradient -> update.

What cannot change the gradient is not computed: a trajectory with advantage 0 needs no forward pass (unless the loss
has a term that acts on it all the same), and masked tokens never reach the vocabulary. The denominators are those of
the whole minibatch, so the gradient does not depend on how it is cut into micro-batches, or divided among ranks: every
rank steps through its own micro-batches, and the gradients are summed over the ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from mgrpo.config import AgentConfig
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.errors import NumericsError
from mgrpo.losses.registry import find_loss
from mgrpo.model import moe
from mgrpo.model.policy import Policy
from mgrpo.model.shared_rows import HeldPrefix
from mgrpo.ops.divided_head import divided_grpo_loss
from mgrpo.ops.linear_grpo_loss import linear_grpo_loss
from mgrpo.ops.loss_metrics import join_metrics, read_metrics, step_metrics
from mgrpo.ops.selective_logprob import selective_logprob
from mgrpo.profiling.devices import PeakMemory
from mgrpo.profiling.stages import stage
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.mesh import by_mesh, clip_gradient
from mgrpo.trainers.torch.ranks import Ranks


def logprobs_of(
    policy: Policy, batch: MicroBatch, temperature: float, held: HeldPrefix | None = None
) -> torch.Tensor:
    """Log-probs f32[T] of the sampled tokens under `policy`, on its device, without a graph. NumericsError where one is
    not finite: the policy's numbers are not, or it gives a sampled token probability 0."""
    active = batch.active().to(policy.device)
    with torch.no_grad():
        hidden = policy.hidden_before(batch.ids, batch.lengths, active.mask, held)
        targets = policy.vocabulary.classes(active.targets)
        share = policy.share_of(active.mask)
        own = targets if share is None else targets[share.own]
        found = selective_logprob(hidden, policy.token_head, own, temperature=temperature)[0]
        found = found if share is None else share.gather(found)
    bad = int((~found.isfinite()).sum())
    if bad:
        raise NumericsError(
            f"{bad} of {len(found)} sampled tokens have no finite log-prob under the policy that the loss compares "
            "with (its old or reference policy); the step was not taken"
        )
    return found


class Prefixes:
    """What neighbouring micro-batches begin with, held by each policy from the first of them to the last."""

    def __init__(self, ranks: Ranks) -> None:
        # A forward pass more would be one that the other ranks know nothing of.
        self._holds = ranks.size == 1
        self._held: dict[Policy, HeldPrefix] = {}

    def of(self, policy: Policy, rows: MicroBatch) -> HeldPrefix | None:
        """What the policy's forward pass over `rows` takes, after leave(rows)."""
        if rows.prefix is None or not self._holds or not policy.shares:
            return None
        if policy not in self._held:
            self._held[policy] = policy.hold(rows.prefix)
        return self._held[policy]

    def leave(self, rows: MicroBatch | None) -> None:
        """Take the backward pass of what is held and `rows` do not begin with; None: of whatever is held. Those of all
        micro-batches that began with it are done."""
        for policy, held in list(self._held.items()):
            if rows is None or rows.prefix is None or not torch.equal(held.ids, rows.prefix):
                del self._held[policy]
                with stage("backward"):
                    held.backward()


class Learner:
    """A policy with its optimizer, its loss and, where the loss compares with one, its frozen reference.

    With several ranks each has a learner, and all take the same steps: train() is a collective.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        loss: GrpoLossConfig,
        grad_clip: float,
        reference: Policy | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        found = find_loss(loss)
        if (reference is None) == found.needs_reference:
            raise ValueError(
                f"reference policy given: {reference is not None}, with kl_coef={loss.kl_coef} and type={loss.type!r}"
            )
        self._every_row_acts = found.every_token_acts
        self.policy, self.optimizer, self.loss, self.grad_clip = policy, optimizer, loss, grad_clip
        self.reference, self.ranks = reference, ranks or Ranks()
        self.aux_loss_coef = policy.config.aux_loss_coef
        self.memory: PeakMemory | None = None
        """Whoever sets it finds the most of all ranks in `most_memory` after a step."""
        self.most_memory = 0.0

    def train(
        self, batches: Sequence[MiniBatch], recompute_old: bool, lr: float | None = None
    ) -> dict[str, float]:
        """One RL step: an optimizer step on each minibatch in turn; the means of their metrics.

        lr: learning rate of this step; None leaves the optimizer's.
        recompute_old: take the ratio's denominator from this policy before the first update instead of the sampler's
        report. `policy/logprob_diff_max` compares this policy with that report, either way, on the first minibatch,
        where nothing has been updated yet: in synchronous mode it is the numerical difference of sampler and trainer.
        It is in nats, so it says how far apart they are where a ratio is 0 or held at its bound.
        """
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        if recompute_old:
            with stage("recompute"), torch.no_grad():
                prefixes = Prefixes(self.ranks)
                for micro in (m for batch in batches for m in batch.micro):
                    self._recompute(micro, prefixes)
        results = [result for batch in batches if (result := self.step(batch))]
        if not results:
            return {}
        return step_metrics(results, float(self.optimizer.param_groups[0]["lr"])) | moe.means(results)

    def _recompute(self, micro: MicroBatch, prefixes: Prefixes) -> None:
        """Set its old_logprobs to those of the policy as it is."""
        micro.old_logprobs = torch.zeros_like(micro.rollout_logprobs)
        rows = micro if len(micro.lengths) else _blank()
        prefixes.leave(rows)
        with self.policy.routing.forcing(rows.experts):
            found = logprobs_of(self.policy, rows, self.loss.temperature, prefixes.of(self.policy, rows))
        if rows is micro:
            micro.old_logprobs[:, 1:][micro.active().mask] = found.to(micro.old_logprobs.device)

    def step(self, batch: MiniBatch) -> dict[str, float]:
        """One optimizer step; returns the loss metrics of the minibatch. A minibatch that cannot move the policy
        (no trajectory with an advantage) leaves weights and optimizer state untouched and returns {}."""
        parts: list[tuple[int, Mapping[str, torch.Tensor | float]]] = []
        load = moe.RouterLoad()
        self.optimizer.zero_grad(set_to_none=True)
        balance = None
        if self.aux_loss_coef:
            with stage("count"):
                balance = self._count(batch, load)
        prefixes = Prefixes(self.ranks)
        for rows in self._parts(batch):
            prefixes.leave(rows)
            if len(rows.lengths):
                parts.append(self._backward(rows, batch.denominator, prefixes, load, balance))
            else:  # the others gather weights in this micro-step, which takes every rank
                self._backward(_blank(), batch.denominator, prefixes)
        prefixes.leave(None)
        if self.ranks.size > 1:  # in the order of ranks, of those that have the same rows one
            with stage("reduce"):  # of the metrics; FSDP sums gradients within the backward passes
                every = self.ranks.gather((read_metrics(parts), self.memory.most() if self.memory else 0.0))
            self.most_memory = max(held for _, held in every)
            parts = [part for found, _ in every[:: self.policy.config.mesh.same_rows] for part in found]
        if not sum(tokens for tokens, _ in parts):
            return {}
        balance = balance or self._balance(load)
        with stage("clip"):  # the float waits for all of the device's work so far
            norm = float(clip_gradient(list(self.policy.parameters()), self.grad_clip))
        result = join_metrics(parts)
        if not math.isfinite(norm) or result["nonfinite_rows"]:
            raise NumericsError(
                f"gradient norm {norm}, {result['nonfinite_rows']:.0f} tokens with non-finite log-probs; "
                "the step was not taken"
            )
        with stage("optimizer"):
            self.optimizer.step()
        return result | {"grad_norm": norm} | balance.metrics()

    def _parts(self, batch: MiniBatch) -> Iterator[MicroBatch]:
        """The rows of each micro-batch that are computed; with several ranks every micro-batch, be it empty."""
        for micro in batch.micro:
            rows = micro if self._every_row_acts else micro.rows(micro.with_advantage())
            if len(rows.lengths) or self.ranks.size > 1:
                yield rows

    def _count(self, batch: MiniBatch, load: moe.RouterLoad) -> moe.Balance:
        """How the routers spread the minibatch, before it is trained on."""
        for rows in self._parts(batch):
            real = rows if len(rows.lengths) else _blank()
            routing = self.policy.routing
            with (
                torch.no_grad(),
                routing.record(load if real is rows else None),
                routing.forcing(real.experts),
            ):
                self.policy.hidden_before(real.ids, real.lengths, real.active().mask)
        return self._balance(load)

    def _balance(self, load: moe.RouterLoad) -> moe.Balance:
        if not self.policy.routing.routers:
            return moe.Balance([])
        same = self.policy.config.mesh.tp  # ranks, side by side, with the same tokens; along cp they differ
        parts = self.ranks.gather(load.packed())[::same]
        return moe.Balance(parts, self.policy.config.routing_replay)

    def _backward(
        self,
        rows: MicroBatch,
        denominator: float,
        prefixes: Prefixes,
        load: moe.RouterLoad | None = None,
        balance: moe.Balance | None = None,
    ) -> tuple[int, dict[str, torch.Tensor]]:
        """load: takes what the routers do, unless `balance` has it already, which is of the whole minibatch."""
        device = self.policy.device
        active = rows.active().to(device)
        routing = self.policy.routing.record(load if balance is None else None, keep=balance is not None)
        # The reference, which may be the same modules without adapters, routes freely in between.
        forcing = self.policy.routing.forcing(rows.experts)
        with stage("forward"), routing, forcing:
            held = prefixes.of(self.policy, rows)
            hidden = self.policy.hidden_before(rows.ids, rows.lengths, active.mask, held)  # (T, H), or own
        reference = None
        if self.reference is not None:
            with stage("reference"), torch.no_grad():
                held = prefixes.of(self.reference, rows)
                reference = logprobs_of(self.reference, rows, self.loss.temperature, held)
        with stage("head"):
            share = self.policy.share_of(active.mask)
            loss_of = linear_grpo_loss if share is None else functools.partial(divided_grpo_loss, share=share)
            loss, metrics = loss_of(
                hidden,
                self.policy.token_head,
                self.policy.vocabulary.classes(active.targets),
                cu_seqlens=active.cu_seqlens,
                advantages=rows.advantages.to(device) if active.token_advantages is None else None,
                token_advantages=active.token_advantages,
                seq_weight=rows.weights.to(device),
                old_logprobs=active.old_logprobs,
                ref_logprobs=reference,
                rollout_logprobs=active.rollout_logprobs,
                denominator=denominator,
                config=self.loss,
            )
            if balance is not None and (uneven := self.policy.routing.balance_loss(balance)) is not None:
                loss = loss + self.aux_loss_coef * uneven
        with stage("backward"), forcing:  # what is recomputed chooses the same
            loss.backward()  # type: ignore[no-untyped-call]
        return len(active.targets), metrics


def _blank() -> MicroBatch:
    """One row without weight: it moves no gradient and counts nowhere."""
    mask = torch.tensor([[False, True]])
    zeros = torch.zeros(1, 2)
    return MicroBatch(
        torch.zeros(1, 2, dtype=torch.int64),
        mask,
        zeros,
        torch.tensor([2]),
        torch.zeros(1),
        torch.zeros(1),
    )


def adamw_way(device: torch.device) -> dict[str, bool]:
    """How AdamW goes over the parameters: on a GPU fused, since foreach holds 4 bytes a parameter more at its peak."""
    return {"fused": True} if device.type == "cuda" else {"foreach": True}


def adamw(
    policy: Policy, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01
) -> torch.optim.AdamW:
    """AdamW over what trains of `policy`, on however many ranks; torch's own defaults."""
    groups = [{"params": group} for group in by_mesh(policy.parameters())]
    return torch.optim.AdamW(
        groups, lr=lr, betas=betas, weight_decay=weight_decay, **adamw_way(policy.device)
    )


def new_learner(
    agent: AgentConfig, policy: Policy, reference: Policy | None, ranks: Ranks | None = None
) -> Learner:
    """A learner with the optimizer that the agent's config asks for, before its first step."""
    o = agent.optimizer
    optimizer = adamw(policy, o.lr, betas=o.betas, weight_decay=o.weight_decay)
    return Learner(policy, optimizer, agent.loss, o.grad_clip, reference, ranks)
