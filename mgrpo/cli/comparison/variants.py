"""What is compared: each variant is one config with a few overrides, each score one team of policies on one task.

All variants of a seed but the shared policy start from the same policies: those of its co-training run, or for all
seeds those of one run before (--from). The paper's rivals (M-GRPO, arXiv 2511.13288) are "frozen sub" (main only),
"single" (one agent with all tools) and "no alignment".

1. The single agent is main with the tools of all roles; it may write trajectories as long as the longest of any role.
2. Without alignment every invocation is trained on and those of a rollout weigh 1 together; the paper does not print
   its weights.
3. What is equal for all is the number of rollouts (spent.py), not of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from mgrpo.cli.comparison.shuffled import ShuffledRewards
from mgrpo.config import AgentConfig, RunConfig
from mgrpo.config.policy import EXTERNAL
from mgrpo.environments.comparison import BEFORE_RL, COTRAIN
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError
from mgrpo.run.external import external_roles
from mgrpo.types import MAIN

FROZEN_SUB, FROZEN_MAIN = "frozen sub", "frozen main"
ALIASES = {"cotrain": COTRAIN, "main only": FROZEN_SUB, "sub only": FROZEN_MAIN}
"""Other names on the command line, spelt as _plain() spells them."""


@dataclass(frozen=True)
class Variant:
    """One training run of a seed."""

    name: str
    about: str
    overrides: tuple[str, ...] = ()
    own_start: bool = False
    """Its policies are not those that co-training starts from."""
    only_main: bool = False
    """Main's is the only policy."""
    alone: bool = False
    """Main is the only role: see single_agent()."""
    on_request: bool = False
    """Part of a comparison only where it is named."""


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
        Variant(FROZEN_SUB, "only the main agent trains", tuple(f"agents.{r}.frozen=true" for r in subs)),
        Variant(FROZEN_MAIN, "only the sub-agents train", (f"agents.{MAIN}.frozen=true",)),
        Variant("single", "one agent with all tools", only_main=True, alone=True, on_request=True),
        Variant("no alignment", "all invocations are trained on, however many",
                tuple(f'agents.{r}.alignment.mode="none"' for r in subs), on_request=True),
        Variant("shared", "one policy for all roles, trained on all of it", _shared(config.agents),
                own_start=True, only_main=True),
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


def single_agent(config: RunConfig, task: Task) -> RunConfig:
    """The config of the variant "single": agents.main alone, with the length of the longest role, and the options that
    the task gives it. Raises ConfigError where the task offers none, or main cannot stand alone."""
    tree = config.model_dump(mode="json")
    main: dict[str, Any] = tree["agents"][MAIN]
    main["max_length"] = max(agent.max_length for agent in config.agents.values())
    main["engine"].pop("shared_with", None)
    tree["agents"] = {MAIN: main}
    for table in (tree["task"], *tree["task"]["stages"]):
        options = task.single_agent(table["options"])
        if options is None:
            raise ConfigError(f"the task {config.task.label} offers no single agent with all tools")
        table["options"] = dict(options)
    for stage in tree["task"]["stages"]:
        stage["reward"] = {role: parts for role, parts in stage["reward"].items() if role == MAIN}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"agents.{MAIN} alone: {error.errors()[0]['msg']}") from None


def named(config: RunConfig, names: Sequence[str]) -> set[str]:
    """Names of the variants that are meant: each of `names` may list several with commas, in either spelling of spaces.
    Raises ConfigError."""
    known = {_plain(v.name): v.name for v in variants(config)} | ALIASES
    found = set()
    for name in (part.strip() for text in names for part in text.split(",")):
        if _plain(name) not in known:
            expected = ", ".join(sorted({name.replace(" ", "-") for name in known.values()}))
            raise ConfigError(f"--variant {name!r}: expected one of {expected}")
        found.add(known[_plain(name)])
    return found


def _plain(name: str) -> str:
    return name.replace("-", " ").lower()


def chosen(config: RunConfig, names: Sequence[str]) -> list[Variant]:
    """The named variants (without names: all that are not on request); co-training is always among them. Raises
    ConfigError."""
    if not config.sub_roles:
        raise ConfigError(
            "compare needs a sub-agent beside agents.main: it compares co-training with frozen agents"
        )
    if external := external_roles(config):
        raise ConfigError(
            f'agents.{external[0]}.policy.trainer = "{EXTERNAL}": compare starts every trainer itself, run after run; '
            "leave it out"
        )
    wanted = named(config, names)
    return [
        v for v in variants(config) if v.name == COTRAIN or (v.name in wanted if names else not v.on_request)
    ]


def scores(
    roles: Sequence[str], trained: list[Variant], controls: Mapping[str, Mapping[str, object]]
) -> list[Score]:
    """Every held-out score of one seed: the start, each trained variant, and co-training's policies put to the test.
    controls: of the task, see Task.controls."""
    out = [Score(BEFORE_RL, dict.fromkeys(roles, (COTRAIN, "start")))]
    for v in trained:
        out.append(Score(v.name, dict.fromkeys([MAIN] if v.alone else roles, (v.name, "final"))))
    final = dict.fromkeys(roles, (COTRAIN, "final"))
    for role in roles:
        others = {r: (COTRAIN, "final" if r == role else "start") for r in roles}
        out.append(Score(f"only {role} trained (cross pair)", others))
    return [*out, *(Score(name, final, options) for name, options in controls.items())]
