"""A rank of a small trainer that measures its own memory: `python -m tests.plan_ranks CONFIG OUT [SET ...]`.

It takes a step as `mgrpo plan` imagines it: the optimizer's state is there and a first gradient; then one full
micro-batch. OUT gets the bytes of tensors at the peak, from the allocator's events, and the bytes of weights, gradients
and optimizer before. Used by tests/test_planning.py and, with RSS instead, by bench/bench_plan.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mgrpo.config import AgentView, load_config, view_of
from mgrpo.losses.registry import find_loss
from mgrpo.model.attention import PACKED
from mgrpo.model.loading import load_policy, load_reference
from mgrpo.model.moe import routers_of
from mgrpo.planning.live import bytes_of
from mgrpo.planning.step import begin_in_the_middle, micro_batch
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.heap import return_freed_memory
from mgrpo.trainers.torch.learner import Learner, new_learner
from mgrpo.trainers.torch.ranks import Ranks
from tests.live_bytes import peak_bytes


def learner_of(view: AgentView, ranks: Ranks) -> tuple[Learner, MiniBatch]:
    """The trainer of agents.main at the beginning of such a step, and its minibatch."""
    torch.set_num_threads(1)
    return_freed_memory()
    folder = Path(view.agent.model or "")
    if ranks.size == 1:
        policy = load_policy(folder, view.agent.policy)
    else:
        from mgrpo.trainers.torch.shard import load_sharded

        policy = load_sharded(folder, view.agent.policy, ranks)
        if view.agent.policy.mesh.ep > 1:
            route_evenly(policy.model)
    reference = None
    if find_loss(view.agent.loss).needs_reference:  # of one process
        reference = load_reference(policy, folder)
    learner = new_learner(view.agent, policy, reference, ranks)
    begin_in_the_middle(learner)
    micro = micro_batch(view, policy.attention in PACKED, policy.vocabulary.size)
    micro.ids = policy.vocabulary.tokens(micro.ids)
    return learner, MiniBatch([micro], float(len(micro.lengths)))


def route_evenly(model: Any) -> None:
    """Have each router send as many tokens to one expert as to another, as a plan takes it: pair j of token and expert
    to expert j mod E. What it weighs them by stays its own."""
    for router in routers_of(model):

        def even(module: Any, args: Any, output: Any) -> Any:
            choice = output[2]
            order = torch.arange(choice.numel()).reshape(choice.shape) % output[0].shape[-1]
            return *output[:2], order

        router.module.register_forward_hook(even)


def state_bytes(learner: Learner) -> int:
    """Of everything that is there before the step."""
    model = learner.policy.model
    tensors = [*model.parameters(), *model.buffers()]
    tensors += learner.reference.model.parameters() if learner.reference is not None else []
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [
        x for s in learner.optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)
    ]
    return bytes_of(tensors)


def measure(view: AgentView, ranks: Ranks, peak: Callable[[Callable[[], object]], int]) -> dict[str, Any]:
    """{"state", "peak"} in bytes. peak(run): the most that run() holds beside what was there. Of ranks the least of
    several steps: what a collective has read is let go when the thread that sends it comes to it, sooner or later."""
    learner, batch = learner_of(view, ranks)
    state = state_bytes(learner)
    steps = 1 if ranks.size == 1 else 10
    return {
        "state": state,
        "peak": state + min(peak(lambda: learner.train([batch], False)) for _ in range(steps)),
    }


def main(config: Path, out: Path, sets: list[str]) -> None:
    view = view_of(load_config(config, sets), "main")
    with Ranks(view.ranks) as ranks:
        found = measure(view, ranks, peak_bytes)
        if ranks.is_main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
