"""The expected split of a step into rollout, training and publishing: arithmetic on data sheets, for GPUs alone.

    training    FLOPs of forward (2 a parameter and token), backward (4; 2 where nothing trains) and recompute (2),
                with active parameters, at train_mfu; or the bytes of FSDP's collectives, whichever takes longer;
                and the vectors of tokens that ranks of tp and ep exchange in each layer, which is waited for
    rollout     the longest chain of turns (main agent, then its sub-agents' invocations one by one), each token a
                pass over the weights at decode_share of the memory bandwidth; or all sampled tokens over the servers'
                GPUs at train_mfu, whichever takes longer
    publishing  a whole version, or the largest patch, over the link

Attention's own FLOPs, waiting, tools and batching effects are left out: it says which part is large, not how long a run
takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mgrpo.config import AgentView, RunConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.planning.assumptions import Assumptions, Gpu
from mgrpo.planning.step import Parameters
from mgrpo.planning.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds a step, predicted."""

    rollout: float
    train: float
    publish: float

    @property
    def total(self) -> float:
        return self.rollout + self.train + self.publish


def split_of(
    config: RunConfig, view: AgentView, found: Parameters, traffic: Traffic, gpu: Gpu, assumed: Assumptions
) -> Split:
    """Of the agent whose policy it is."""
    policy, ranks = view.owner.policy, view.ranks
    backbone = found.active - found.head
    per_token = (
        2 * backbone
        + (4 if found.trained > found.total // 2 else 2) * backbone
        + 6 * found.head * assumed.sampled
    )
    if policy.gradient_checkpointing:
        per_token += 2 * backbone
    compute = traffic.tokens * per_token / (ranks * gpu.flops * assumed.train_mfu)
    micro_steps = math.ceil(traffic.tokens / (config.trainer.micro_batch * policy.data_ranks))
    mesh = policy.mesh
    cut = (found.total - found.experts) / mesh.tp + found.experts / mesh.ep  # what a rank gathers
    gathered = cut * (2 + 2 + 4 if policy.dtype == "bfloat16" else 12) if ranks > 1 else 0
    train = max(compute, micro_steps * gathered / _speed(ranks, assumed))
    train += _exchange(policy, found, traffic.tokens / ranks, assumed)
    servers = max(1, len(view.owner.engine.running_servers) or view.owner.engine.started_servers)
    longest = sum(
        config.agents[role].max_length * config.agents[role].d_max * assumed.mean_length * assumed.sampled
        for role in config.roles_of(view.role)
    )
    width = 2 if view.owner.engine.weights_dtype == "bfloat16" else 4
    one_pass = found.total * width / (gpu.bandwidth * assumed.decode_share)
    sampled = traffic.tokens * assumed.sampled
    busy = sampled * 2 * found.active / (servers * gpu.flops * assumed.train_mfu)
    patched = getattr(view.owner.engine, "sync", "") == "patch"
    return Split(
        max(longest * one_pass, busy),
        train,
        (traffic.patch[1] if patched else traffic.version) / assumed.link,
    )


def _speed(ranks: int, assumed: Assumptions) -> float:
    """Bytes/s of collectives of so many ranks that stand side by side."""
    return assumed.within if ranks <= assumed.gpus_per_host else assumed.between


def _exchange(policy: PolicyConfig, found: Parameters, tokens: float, assumed: Assumptions) -> float:
    """Seconds in which a rank's share of the tokens (its number by that of all ranks) travels through tp and ep. Each
    pass of a layer: with tp two sums over all rows of a group, each as two times its bytes; with ep a vector to each
    expert and one back."""
    mesh, passes = policy.mesh, 3 if policy.gradient_checkpointing else 2
    vector = found.hidden * (2 if policy.dtype == "bfloat16" else 4)
    one = tokens * vector * passes * found.layers
    summed = 4 * one * mesh.tp / _speed(mesh.tp, assumed) if mesh.tp > 1 else 0.0
    sent = 2 * one * found.chosen / _speed(mesh.ep, assumed) if mesh.ep > 1 else 0.0
    return summed + sent
