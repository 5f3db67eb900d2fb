"""One agent as its engine and its trainer see a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mgrpo.config.run import AgentConfig, RolloutConfig, RunConfig, TrainerConfig


@dataclass(frozen=True, slots=True)
class AgentView:
    """The parts of a RunConfig that one agent's engine and trainer need.

    role: the agent, and `agent` its section. owner_role: the role whose policy it acts with, itself unless it shares
    another's, and `owner` that section: model, policy, engine and optimizer are set there. longest: tokens of the
    longest trajectory of all roles that act with the policy. served: the agents with a policy of their own that the
    engine of `role` samples for, by role (several where others are shared_with it), and served_longest the tokens of
    the longest trajectory of all of them. ranks: processes of its trainer. idle_timeout: seconds that a trainer or
    worker waits for its next work.
    """

    role: str
    agent: AgentConfig
    owner_role: str
    owner: AgentConfig
    longest: int
    served: Mapping[str, AgentConfig]
    served_longest: int
    ranks: int
    seed: int
    trainer: TrainerConfig
    rollout: RolloutConfig
    idle_timeout: float


def view_of(config: RunConfig, role: str) -> AgentView:
    """The run as `role` sees it. Raises KeyError for a role that it does not have."""
    owner = config.policy_of(role)
    served = config.served_by(config.engine_of(role))

    def longest(*policies: str) -> int:
        return max(config.agents[r].max_length for policy in policies for r in config.roles_of(policy))

    return AgentView(
        role=role,
        agent=config.agents[role],
        owner_role=owner,
        owner=config.agents[owner],
        longest=longest(owner),
        served={r: config.agents[r] for r in served},
        served_longest=longest(*served),
        ranks=config.ranks(role),
        seed=config.seed,
        trainer=config.trainer,
        rollout=config.rollout,
        idle_timeout=config.store.idle_timeout,
    )
