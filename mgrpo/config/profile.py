"""Which steps of which processes a profiler looks at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import field_validator, model_validator

from mgrpo.config.policy import PolicyConfig
from mgrpo.config.settings import Settings

MAX_STEPS = 50  # the profiler of torch keeps every event in memory until its window closes


class ProfileConfig(Settings):
    """A profiler over a few steps, off unless `steps` is set; what it writes is in <run>/profile."""

    steps: tuple[int, int] | None = None
    """First and last RL step, both included, counted from 1 as in the logs: [10, 13]; 50 steps at most. A process that
    starts inside of them begins with the first step that it sees. Unset: no profiler."""
    tool: Literal["torch", "nsys", "memory"] = "torch"
    """torch: operators, kernels and stages as a Chrome trace, and the longest operators as a table. nsys: the process
    runs under NVIDIA's `nsys profile`. memory: the history of allocations on the GPU."""
    roles: tuple[str, ...] = ()
    """Roles whose trainers are looked at. Empty: all that mgrpo trains."""
    ranks: tuple[int, ...] = (0,)
    """Their ranks. Empty: no trainer. With nsys, which sees all ranks of a trainer, those that open its range."""
    workers: tuple[int, ...] = ()
    """Rollout workers that are looked at too, by number; a worker's step is the one that it samples for."""
    with_stack: bool = False
    """Tool torch: keep the Python stack of every operator too, which makes all steps of the window slower."""

    _tuples = field_validator("steps", "roles", "ranks", "workers", mode="before")(
        lambda v: tuple(v) if isinstance(v, list) else v  # TOML has no tuples
    )

    @model_validator(mode="after")
    def _steps_are_a_range(self) -> ProfileConfig:
        if self.steps is not None:
            first, last = self.steps
            if not 1 <= first <= last:
                raise ValueError(
                    f"steps={list(self.steps)}: expected the first step, from 1 on, and the last"
                )
            if last - first >= MAX_STEPS:
                raise ValueError(
                    f"steps={list(self.steps)} are {last - first + 1}, at most {MAX_STEPS} are kept"
                )
            if not self.ranks and not self.workers:
                raise ValueError("steps has no effect: ranks and workers are both empty")
        if self.with_stack and self.tool != "torch":
            raise ValueError(f'with_stack has no effect with tool "{self.tool}"')
        return self

    def check(
        self, last: int, trainers: Mapping[str, PolicyConfig], engines: Collection[str], workers: int
    ) -> None:
        """Raise ValueError for what a run does not have. last: its last step. trainers: role -> policy of those that
        mgrpo trains. engines: the devices of engines inside the workers. workers: their number."""
        if self.steps is None:
            return
        if self.steps[1] > last:
            raise ValueError(f"profile.steps={list(self.steps)}: the last step is {last} (trainer.steps)")
        if unknown := [role for role in self.roles if role not in trainers]:
            raise ValueError(
                f"profile.roles: mgrpo trains no policy of {unknown[0]!r}, but {', '.join(trainers) or 'none'}"
            )
        chosen = {role: policy for role, policy in trainers.items() if role in (self.roles or trainers)}
        for rank in self.ranks:
            if not 0 <= rank < (most := max((p.ranks for p in chosen.values()), default=0)):
                raise ValueError(f"profile.ranks: rank {rank} does not exist; policy.ranks is at most {most}")
        for worker in self.workers:
            if not 0 <= worker < workers:
                raise ValueError(
                    f"profile.workers: worker {worker} does not exist; rollout.workers is {workers}"
                )
        if self.tool != "torch":
            for role, policy in chosen.items() if self.ranks else ():
                if policy.device == "cpu":
                    raise ValueError(
                        f'profile.tool "{self.tool}" looks at a GPU, agents.{role}.policy.device is "cpu"; use "torch"'
                    )
            if self.workers and "cuda" not in engines:
                raise ValueError(
                    f'profile.tool "{self.tool}" looks at a GPU, the workers have no engine on one'
                )

    def looks_at_trainer(self, role: str) -> bool:
        """Whether any rank of this trainer is looked at."""
        return self.steps is not None and bool(self.ranks) and (not self.roles or role in self.roles)

    def looks_at_worker(self, worker: int) -> bool:
        """Whether this rollout worker is looked at."""
        return self.steps is not None and worker in self.workers
