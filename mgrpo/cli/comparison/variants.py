"""What is compared: each variant is one config with a few overrides, each score one pair of policies on one task.

All variants of a seed but the shared policy start from the same policies, those of its co-training run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mgrpo.cli.comparison.shuffled import ShuffledRewards
from mgrpo.config import AgentConfig, RunConfig
from mgrpo.config.policy import EXTERNAL
from mgrpo.environments.comparison import BEFORE_RL, COTRAIN
from mgrpo.errors import ConfigError
from mgrpo.run.external import external_roles
from mgrpo.types import MAIN


@dataclass(frozen=True)
class Variant:
    """One training run of a seed."""

    name: str
    about: str
    overrides: tuple[str, ...] = ()
    own_start: bool = False  # its policies are not those that co-training starts from


@dataclass(frozen=True)
class Score:
    """One held-out score: each role's policy as (variant that trained it, "start" or "final"), and task options."""

    name: str
    policies: Mapping[str, tuple[str, str]]
    options: Mapping[str, object] = field(default_factory=dict)


def variants(config: RunConfig) -> list[Variant]:
    """Every run of one seed, co-training first."""
    subs = config.sub_roles
    return [
        Variant(COTRAIN, "every agent trains its own policy"),
        Variant("frozen sub", "only the main agent trains", tuple(f"agents.{r}.frozen=true" for r in subs)),
        Variant("frozen main", "only the sub-agents train", (f"agents.{MAIN}.frozen=true",)),
        Variant("shared", "one policy for all roles, trained on all of it", _shared(config.agents), own_start=True),
        Variant("shuffled rewards", "control: rewards permuted at random within each group",
                tuple(f"agents.{r}.algorithm={_shuffled(config.seed)}" for r in config.roles)),
        Variant("lr 0", "control: no update", tuple(f"agents.{r}.optimizer.lr=0.0" for r in config.roles)),
        Variant("expert off", "control: sub-agents are paid for form and outcome only",
                (*(f"agents.{r}.reward.expert=0.0" for r in subs), *_experts_of_stages(config))),
    ]  # fmt: skip


def _experts_of_stages(config: RunConfig) -> list[str]:
    """Overrides that take the expert score out of the sub-agents' reward in the stages of a curriculum that set it."""
    return [
        f"task.stages.{number}.reward.{role}.expert=0.0"
        for number, stage in enumerate(config.task.stages)
        for role in config.sub_roles
        if "expert" in stage.reward.get(role, {})
    ]


def _shuffled(seed: int) -> str:
    """Of mgrpo.cli.comparison.shuffled, as TOML."""
    return f'{{ type = "{ShuffledRewards.__module__}:ShuffledRewards", options = {{ seed = {seed} }} }}'


def _shared(agents: Mapping[str, AgentConfig]) -> tuple[str, ...]:
    """Every sub-agent acts with the main agent's policy, whose SFT takes as long as the longest of theirs."""
    steps, subs = max(agent.sft.steps for agent in agents.values()), sorted(agents.keys() - {MAIN})
    return (
        f"agents.{MAIN}.sft.steps={steps}",
        *(f"agents.{r}.sft={{}}" for r in subs),
        *(f'agents.{r}.shares="{MAIN}"' for r in subs),
    )


def chosen(config: RunConfig, names: list[str]) -> list[Variant]:
    """The named variants (all without names); co-training is always among them. Raises ConfigError."""
    if not config.sub_roles:
        raise ConfigError(
            "compare needs a sub-agent beside agents.main: it compares co-training with frozen agents"
        )
    if external := external_roles(config):
        raise ConfigError(
            f'agents.{external[0]}.policy.trainer = "{EXTERNAL}": compare starts every trainer itself, run after run; '
            "leave it out"
        )
    every = variants(config)
    known = {v.name for v in every}
    for name in names:
        if name not in known:
            raise ConfigError(f"--variant {name!r}: expected one of {', '.join(sorted(known))}")
    return [v for v in every if not names or v.name in names or v.name == COTRAIN]


def scores(
    roles: Sequence[str], trained: list[Variant], controls: Mapping[str, Mapping[str, object]]
) -> list[Score]:
    """Every held-out score of one seed: the start, each trained variant, and co-training's policies put to the test.
    controls: of the task, see Task.controls."""
    out = [Score(BEFORE_RL, dict.fromkeys(roles, (COTRAIN, "start")))]
    out += [Score(v.name, dict.fromkeys(roles, (v.name, "final"))) for v in trained]
    final = dict.fromkeys(roles, (COTRAIN, "final"))
    for role in roles:
        others = {r: (COTRAIN, "final" if r == role else "start") for r in roles}
        out.append(Score(f"only {role} trained (cross pair)", others))
    return [*out, *(Score(name, final, options) for name, options in controls.items())]
