"""The config tree of a run: one TOML file, the same on every server.

A docstring stands under each field; unknown keys, wrong types and settings that could not act are errors that name
the key. Fields of a role that only another role can use (an outcome weight on the main agent, say) are refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from mgrpo.config.algorithm import AlgorithmConfig, MGrpoAlgorithm
from mgrpo.config.engine import EngineConfig, HfEngineConfig
from mgrpo.config.evaluation import EvalConfig
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import EXTERNAL, PolicyConfig
from mgrpo.config.profile import ProfileConfig
from mgrpo.config.record import MetricsConfig, RecordConfig
from mgrpo.config.reward import RewardConfig
from mgrpo.config.settings import MAX_SECONDS, Settings, first_problem
from mgrpo.config.sharing import check_engines, with_shared_engines
from mgrpo.config.store import LinkConfig, StoreConfig
from mgrpo.config.task import TaskConfig
from mgrpo.types import MAIN


class OptimizerConfig(Settings):
    """AdamW of one agent's trainer."""

    lr: float = Field(1e-3, ge=0)
    """Highest learning rate; 0 is allowed as a control."""
    warmup_steps: int = Field(0, ge=0)
    """RL steps of the linear rise to lr."""
    decay: float = Field(0.0, ge=0, le=1)
    """Fraction of trainer.steps, at the end, over which lr falls to 0."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """How it falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments, each in [0, 1)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Global norm bound of one optimizer step."""

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerConfig:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        return self


class SftConfig(Settings):
    """Supervised steps on the task's demonstrations before RL; skipped when steps is 0."""

    steps: int = Field(0, ge=0)
    """Optimizer steps."""
    batch_size: int = Field(96, ge=1)
    """Sequences a step."""
    lr: float | None = Field(None, gt=0)
    """Highest learning rate. Unset: what the task proposes for the policies that it builds."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    warmup_steps: int = Field(30, ge=0)
    """Steps of the linear rise to lr."""
    decay: float = Field(0.4, ge=0, le=1)
    """Fraction of the steps, at the end, over which lr falls to 0."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """How it falls."""

    _pair = field_validator("betas", mode="before")(lambda v: tuple(v) if isinstance(v, list) else v)


class AlignmentConfig(Settings):
    """How a varying number of invocations becomes a fixed batch; see docs/algorithm.md."""

    renamed: ClassVar = {"vote": "sequence_weight"}

    mode: Literal["weights", "duplicate", "expected", "none"] = "weights"
    """The paper's draw computed once with multiplicities, the same with copies, its expectation, or no alignment."""
    sequence_weight: Literal["per_rollout", "per_invocation"] = "per_rollout"
    """per_rollout: a rollout's invocations weigh 1 together; per_invocation: each weighs 1, with mode "none" only."""

    @model_validator(mode="after")
    def _sequence_weight_fits(self) -> AlignmentConfig:
        if self.sequence_weight == "per_invocation" and self.mode != "none":
            raise ValueError(f'sequence_weight "per_invocation" needs mode "none", got mode "{self.mode}"')
        return self


class AgentConfig(Settings):
    """One agent: its policy, its trainer and the trainer's address."""

    renamed: ClassVar = {"warm_start": "sft"}

    model: str | None = None
    """Folder of a Hugging Face causal LM with its tokenizer; unset: the task builds a fresh policy."""
    shares: str | None = None
    """Act with the policy of this role, whose trainer then trains on both roles' trajectories."""
    frozen: bool = False
    """Roll out with the starting policy, never train it."""
    url: str | None = None
    """Where this agent's trainer listens for trajectories and serves weights, e.g. "tcp://10.0.0.2:5601". Unset: a
    local socket of the run."""
    d_max: int = Field(1, ge=1)
    """Invocations per rollout after alignment; 1 for the main agent."""
    max_length: int = Field(128, ge=2)
    """Longest trajectory in tokens, each of its segments alone."""
    alignment: AlignmentConfig = AlignmentConfig()
    reward: RewardConfig
    algorithm: AlgorithmConfig = MGrpoAlgorithm()
    """How rewards become advantages; roles that share a policy may differ in it."""
    loss: GrpoLossConfig = GrpoLossConfig()
    """loss.temperature is the sampling temperature too: there is one distribution."""
    optimizer: OptimizerConfig = OptimizerConfig()
    sft: SftConfig = SftConfig()
    policy: PolicyConfig = PolicyConfig()
    engine: EngineConfig = HfEngineConfig()
    """What samples its tokens: a table whose keys depend on its type."""

    @model_validator(mode="before")
    @classmethod
    def _no_moved_keys(cls, tree: object) -> object:
        loss = tree.get("loss") if isinstance(tree, dict) else None
        for name, moved in _MOVED_FROM_LOSS.items():
            if isinstance(loss, dict) and name in loss:
                raise ValueError(
                    f"loss.{name} is unknown: advantages are set by agents.<role>.algorithm, {moved}"
                )
        return tree


_MOVED_FROM_LOSS = {
    "estimator": 'e.g. { type = "rloo" } (what was estimator = "grpo" is type = "mgrpo")',
    "advantage_eps": "e.g. { eps = 1e-6 }",
}


class TrainerConfig(Settings):
    """What every trainer of the run shares."""

    steps: int = Field(150, ge=1)
    """RL steps."""
    questions: int = Field(16, ge=1)
    """Rollout groups a step."""
    group_size: int = Field(8, ge=2)
    """Rollouts of one question (K)."""
    minibatches: int = Field(2, ge=1)
    """Optimizer steps a step; groups are split evenly among them."""
    micro_batch: int = Field(16384, ge=1)
    """Tokens, padding included, of one forward and backward pass. Where the policy shares prefixes: distinct tokens,
    what several rows begin with once."""
    max_lag: int = Field(0, ge=0)
    """Steps that a sampled token may be older than the weights it trains; 0 is synchronous and reproducible, from 1 on
    rollouts stream: they run while the trainers train, and new weights reach them on the way."""
    claim_window: int = Field(1, ge=1, le=4096)
    """With an older group still being sampled, a trainer may take claim_window - 1 younger complete groups past it; 1:
    groups are trained on in strict order. It costs ceil((claim_window - 1) / questions) of max_lag."""
    oversample: float = Field(1.0, ge=1, le=16)
    """A step claims ceil(questions * oversample) groups and trains on `questions` of them, those with unequal rewards
    first. The rest are not trained on; 1: none is set aside."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """Denominator of the ratio: what the sampler reported, or a forward pass of the trainer before the step."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints; a restarted trainer repeats at most so many."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""
    stop_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Seconds that a trainer may take to stop, since it writes a checkpoint first; what has not stopped by then is
    killed. A second Ctrl-C kills at once."""
    threads: int = Field(1, ge=1)
    """CPU threads of one trainer process."""

    @model_validator(mode="after")
    def _groups_split_evenly(self) -> TrainerConfig:
        if self.questions % self.minibatches:
            raise ValueError(
                f"questions={self.questions} is not a multiple of minibatches={self.minibatches}"
            )
        return self

    @model_validator(mode="after")
    def _window_fits_the_lag(self) -> TrainerConfig:
        if self.window_lag > self.max_lag:
            raise ValueError(
                f"claim_window={self.claim_window} with questions={self.questions} makes tokens {self.window_lag} "
                f"steps older, max_lag={self.max_lag} allows {self.max_lag}"
            )
        return self

    @property
    def pool(self) -> int:
        """Groups that one step claims; it trains on `questions` of them."""
        return math.ceil(round(self.questions * self.oversample, 6))

    @property
    def window_lag(self) -> int:
        """Steps of max_lag that the claim window may use up."""
        return -(-(self.claim_window - 1) // self.questions)


class RolloutConfig(Settings):
    """The rollout workers."""

    workers: int = Field(1, ge=1)
    """Worker processes; they divide the groups of a step among them by a fixed rule."""
    slots: int = Field(160, ge=1)
    """Conversations of one agent that are decoded together."""
    threads: int = Field(1, ge=1)
    """CPU threads of one worker process; more than 1 pays only for models of many millions of parameters."""
    concurrency: int | None = Field(None, ge=1)
    """Rollouts in flight in each worker, with trainer.max_lag of 1 or more. Unset: as many as slots and max_lag
    admit."""
    deadline: float | None = Field(None, gt=0, le=MAX_SECONDS)
    """Seconds that one rollout may take; one that takes longer counts as failed, for the reason "deadline", in
    an evaluation too. It does not run while the rollout waits for a service that is down. Must be less than
    store.group_timeout. Unset: no bound of its own."""
    wait_for_calls: bool = False
    """Engines of type "hf" compute only while no tool or judge is asked. Then nothing depends on how long answers take,
    and a run over services that was recorded replays bit for bit; all rollouts of a step wait for its slowest call."""


class RunConfig(Settings):
    """A whole run."""

    seed: int = Field(1, ge=0)
    """Everything random follows from it: questions, sampling, the draw, fresh policies."""
    task: TaskConfig = TaskConfig()
    agents: dict[str, AgentConfig]
    """One section a role: agents.main and any number of sub-agents. agents.main alone is single-agent GRPO."""
    trainer: TrainerConfig = TrainerConfig()
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig = EvalConfig()
    record: RecordConfig = RecordConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig = ProfileConfig()
    store: StoreConfig = StoreConfig()
    link: LinkConfig = LinkConfig()

    @model_validator(mode="before")
    @classmethod
    def _shared_engines(cls, tree: object) -> object:
        return with_shared_engines(tree)

    @model_validator(mode="after")
    def _roles_make_sense(self) -> RunConfig:
        if MAIN not in self.agents:
            raise ValueError(f"agents.{MAIN} is missing; found {sorted(self.agents)}")
        for role, agent in self.agents.items():
            if role == MAIN and agent.d_max != 1:
                raise ValueError(f"agents.main.d_max must be 1 (one trajectory a rollout), got {agent.d_max}")
            if agent.model is not None and agent.sft.steps:
                raise ValueError(f"agents.{role} has both model and sft.steps; set sft.steps = 0")
            if (unused := agent.engine.unused_without_lag) and not self.trainer.max_lag:
                raise ValueError(
                    f"agents.{role}.engine.{unused} has no effect with trainer.max_lag=0: no rollout is under way "
                    "while weights change"
                )
            if agent.max_length > self.trainer.micro_batch:
                raise ValueError(
                    f"agents.{role}.max_length={agent.max_length} exceeds "
                    f"trainer.micro_batch={self.trainer.micro_batch}"
                )
            if agent.shares is not None:
                self._check_sharing(role, agent)
        check_engines({role: self.agents[role] for role in self.roles})
        self._check_rollouts()
        if all(self.agents[self.policy_of(r)].frozen for r in self.agents):
            raise ValueError("every agent is frozen; nothing would be trained")
        self._check_rewards()
        trained = {r: self.agents[r] for r in self.policy_roles if not self.agents[r].frozen}
        self.profile.check(
            self.trainer.steps,
            {r: agent.policy for r, agent in trained.items() if agent.policy.trainer != EXTERNAL},
            [self.agents[r].engine.worker_device for r in self.policy_roles],
            self.rollout.workers,
        )
        remote = [r for r, a in self.agents.items() if a.url is None] if self.store.url else []
        if (
            self.store.url
            and self.store.url.startswith("tcp://")
            and len(remote) not in (0, len(self.agents))
        ):
            raise ValueError(f"agents.{remote[0]}.url is missing: other agents of this run have an address")
        return self

    def _check_rewards(self) -> None:
        """Of every stage that changes one; without stages, those of the agents."""
        for number, stage in enumerate(self.task.stages):
            if unknown := sorted(set(stage.reward) - set(self.agents)):
                raise ValueError(
                    f"task.stages.{number}.reward.{unknown[0]}: no such role; found {sorted(self.agents)}"
                )
        for number in range(self.task.last_stage + 1):
            changed = self.task.stages[number].reward if self.task.stages else {}

            def where(role: str, number: int = number, changed: Collection[str] = tuple(changed)) -> str:
                return f"task.stages.{number}.reward.{role}" if role in changed else f"agents.{role}.reward"

            for role in self.agents:
                try:
                    reward = self.stage_reward(role, number)
                except ValidationError as error:
                    raise ValueError(first_problem(error, where(role), got=False)) from None
                self._check_reward(role, reward, where(role))
            for role in self.training_roles:
                paid = MAIN if self.agents[role].algorithm.type == "grpo" else role  # a team reward is main's
                if not any(self.stage_reward(paid, number).parts.values()):
                    raise ValueError(
                        f"{where(paid)} has no part with a weight above 0: all its rewards would be equal"
                    )

    def _check_reward(self, role: str, reward: RewardConfig, where: str) -> None:
        wrong, right = ("outcome", "correct") if role == MAIN else ("correct", "outcome")
        if reward.parts.get(wrong):
            raise ValueError(
                f"{where}.{wrong} has no meaning for role {role!r}, "
                f"whose part of the rollout's outcome is called {right!r}"
            )

    def _check_rollouts(self) -> None:
        if self.rollout.concurrency is not None and not self.trainer.max_lag:
            raise ValueError(
                f"rollout.concurrency={self.rollout.concurrency} has no effect with trainer.max_lag=0: a worker runs "
                "its share of a step at once"
            )
        if self.rollout.wait_for_calls and (self.trainer.max_lag or not self._samples_here()):
            raise ValueError(
                'rollout.wait_for_calls has no effect: it needs trainer.max_lag=0 and engines of type "hf" alone'
            )
        deadline, limit = self.rollout.deadline, self.store.group_timeout
        if deadline is not None and deadline >= limit:
            raise ValueError(
                f"rollout.deadline={deadline:g} must be less than store.group_timeout={limit:g}, which would close "
                "the group first"
            )

    def _samples_here(self) -> bool:
        return all(agent.engine.type == "hf" for agent in self.agents.values())

    def _check_sharing(self, role: str, agent: AgentConfig) -> None:
        """What a policy is and how it is optimised is said once, by the role it belongs to."""
        owner = self.agents.get(agent.shares or "")
        if owner is None or owner.shares is not None or agent.shares == role:
            raise ValueError(
                f"agents.{role}.shares={agent.shares!r}: expected a role with a policy of its own"
            )
        for name in ("model", "frozen", "sft", "policy", "engine"):
            if getattr(agent, name) != AgentConfig.model_fields[name].default:
                raise ValueError(
                    f"agents.{role}.{name} has no effect: the policy is that of {agent.shares!r}"
                )
        for name in ("loss", "optimizer"):
            if getattr(agent, name) != getattr(owner, name):
                raise ValueError(
                    f"agents.{role}.{name} differs from that of {agent.shares!r}, whose policy it shares"
                )

    def stage_of(self, index: int) -> int:
        """Number of the stage that rollout group `index` belongs to: that of the step which claims it where no group is
        lost."""
        return self.task.stage_at(index // self.trainer.pool)

    def stage_reward(self, role: str, stage: int) -> RewardConfig:
        """What a trajectory of `role` earns in a stage."""
        reward, stages = self.agents[role].reward, self.task.stages
        if not stages or role not in stages[stage].reward:
            return reward
        return RewardConfig.model_validate({**reward.model_dump(), **stages[stage].reward[role]})

    def policy_of(self, role: str) -> str:
        """The role whose policy `role` acts with: itself, unless it shares another's."""
        return self.agents[role].shares or role

    def roles_of(self, role: str) -> tuple[str, ...]:
        """The roles that act with the policy of `role`, itself first."""
        return (role, *(r for r in self.roles if self.agents[r].shares == role))

    def engine_of(self, role: str) -> str:
        """The role whose engine, and so whose servers, sample for `role`: that of its policy, unless it shares
        another's."""
        owner = self.policy_of(role)
        return self.agents[owner].engine.engine_of or owner

    def served_by(self, role: str) -> tuple[str, ...]:
        """The roles with a policy of their own that the engine of `role` samples for."""
        return tuple(r for r in self.policy_roles if self.engine_of(r) == role)

    def ranks(self, role: str) -> int:
        """Processes of the trainer that serves `role`; a frozen policy needs one."""
        owner = self.agents[self.policy_of(role)]
        return 1 if owner.frozen else owner.policy.ranks

    def data_ranks(self, role: str) -> int:
        """Of those, the ranks that get micro-batches of their own."""
        owner = self.agents[self.policy_of(role)]
        return 1 if owner.frozen else owner.policy.data_ranks

    @property
    def policy_roles(self) -> tuple[str, ...]:
        """The roles with a policy, and so a trainer, of their own."""
        return tuple(r for r in self.roles if self.agents[r].shares is None)

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, "main" first, the others in order of name: the canonical order everywhere."""
        return (MAIN, *sorted(r for r in self.agents if r != MAIN))

    @property
    def training_roles(self) -> tuple[str, ...]:
        return tuple(r for r in self.roles if not self.agents[self.policy_of(r)].frozen)

    @property
    def sub_roles(self) -> tuple[str, ...]:
        return self.roles[1:]
