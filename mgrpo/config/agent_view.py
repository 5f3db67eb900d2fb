"""One agent as its engine and its trainer see a run."""

from __future__ import annotations

from dataclasses import dataclass

from mgrpo.config.run import AgentConfig, RolloutConfig, RunConfig, TrainerConfig


@dataclass(frozen=True, slots=True)
class AgentView:
    """The parts of a RunConfig that one agent's engine and trainer need.

    role: the agent, and `agent` its section. owner_role: the role whose policy it acts with, itself unless it shares
    another's, and `owner` that section: model, policy, engine and optimizer are set there. longest: tokens of the
    longest trajectory of all roles that act with the policy. ranks: processes of its trainer. idle_timeout: seconds
    that a trainer or worker waits for its next work.
    """

    role: str
    agent: AgentConfig
    owner_role: str
    owner: AgentConfig
    longest: int
    ranks: int
    seed: int
    trainer: TrainerConfig
    rollout: RolloutConfig
    idle_timeout: float


def view_of(config: RunConfig, role: str) -> AgentView:
    """The run as `role` sees it. Raises KeyError for a role that it does not have."""
    owner = config.policy_of(role)
    return AgentView(
        role=role,
        agent=config.agents[role],
        owner_role=owner,
        owner=config.agents[owner],
        longest=max(config.agents[r].max_length for r in config.roles_of(owner)),
        ranks=config.ranks(role),
        seed=config.seed,
        trainer=config.trainer,
        rollout=config.rollout,
        idle_timeout=config.store.idle_timeout,
    )
