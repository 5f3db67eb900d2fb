"""slime's samples of a rollout batch as rows: role, rollout and invocation of each, its advantage and its vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

import mgrpo
from mgrpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """The mapping `mgrpo` in the file of --custom-config-path."""

    d_max: int | Mapping[str, int] = 1
    """Trajectories that each rollout contributes, of every sub-agent role or of each."""
    seed: int = 0
    """Of the draw to d_max, with the sample's group_index: the same after a restart."""
    mode: str = "weights"
    """As in `mgrpo.align`."""
    estimator: str | None = None
    """As in `mgrpo.group_advantage`. None: "grpo", or "dr_grpo" under --disable-grpo-std-normalization."""
    unbiased: bool = False
    """Divide by the sample deviation, as slime's own normalisation does; False: as a run of mgrpo."""
    source: str | None = None
    """`rollout` takes finished trajectories from it: "package.module:function", which gives one as a mapping, or None
    where there is none at the moment. None: the groups of slime's data source are finished themselves."""
    poll: float = 1.0
    """Seconds between calls of a source that had nothing."""
    patience: float = 3600.0
    """Seconds without a trajectory from the source after which `rollout` gives up."""

    @classmethod
    def of(cls, args: Any) -> Settings:
        """Those of slime's arguments; ConfigError for an unknown key or a contradiction."""
        given = getattr(args, "mgrpo", None) or {}
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ConfigError(f"mgrpo: {given!r}, expected a mapping of {', '.join(known)}")
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"mgrpo.{unknown[0]}: unknown, expected one of {', '.join(known)}")
        settings = cls(**given)
        deviation = getattr(args, "grpo_std_normalization", True)
        if settings.estimator is None:
            return cls(**{**given, "estimator": "grpo" if deviation else "dr_grpo"})
        if not deviation and settings.estimator != "dr_grpo":
            raise ConfigError(
                f"mgrpo.estimator: {settings.estimator!r} contradicts --disable-grpo-std-normalization, "
                "which is 'dr_grpo'"
            )
        return settings

    def assign(self, query: Any, role: Any, rollout: Any, invocation: Any, reward: Any) -> mgrpo.Assigned:
        """mgrpo.assign with these settings. A `group_index` is one asking of a prompt, so no step enters the draw."""
        return mgrpo.assign(
            query, role, rollout, invocation, reward,
            d_max=self.d_max, seed=self.seed, step=0, mode=self.mode,  # type: ignore[arg-type]
            estimator=self.estimator or "grpo", unbiased=self.unbiased,
        )  # fmt: skip

    def check(self) -> None:
        """ConfigError for a value that no batch could be assigned with."""
        for role in self.d_max if isinstance(self.d_max, Mapping) else ("sub",):
            try:
                self.assign([0], role, [0], [0], [0.0])
            except (ValueError, TypeError) as error:
                raise ConfigError(f"mgrpo: {error}") from error


class Rows:
    """The n samples of slime's rollout batch as columns, with their advantages and votes."""

    def __init__(self, args: Any, samples: Sequence[Any]) -> None:
        self.settings = Settings.of(args)
        self.samples = samples
        self.mask = [mask_of(sample) for sample in samples]
        self.tokens = np.array([sum(mask) for mask in self.mask], np.int64)  # (n,) trained ones
        self.reward = [reward_of(args, sample) if any(mask) else 0.0 for sample, mask in self._with_mask()]
        self.rollout_id = [rollout_id_of(sample) for sample in samples]
        query = [sample.group_index or 0 for sample in samples]
        rows = np.flatnonzero(self.tokens)
        place = self._places(query, getattr(args, "n_samples_per_prompt", None))
        role, invocation = self._invocations(rows)
        assigned = self.settings.assign(
            [query[j] for j in rows],
            role,
            [place[self.rollout_id[j]] for j in rows],
            invocation,
            [self.reward[j] for j in rows],
        )
        self.advantage, self.weight = np.zeros((2, len(samples)))
        self.advantage[rows], self.weight[rows] = assigned.advantage, assigned.weight
        self.vote = self.weight * self._scale(getattr(args, "global_batch_size", None))

    def _with_mask(self) -> list[tuple[Any, list[int]]]:
        return list(zip(self.samples, self.mask, strict=True))

    def kept(self) -> list[int]:
        """The samples to train on: those with a vote, and of a rollout that has none its first, which is masked, so
        that slime counts the rollout."""
        voting = {rollout for rollout, w in zip(self.rollout_id, self.weight, strict=True) if w}
        kept: list[int] = []
        silent: set[int] = set()
        for j, rollout in enumerate(self.rollout_id):
            if self.weight[j] or rollout not in voting | silent:
                kept.append(j)
                if rollout not in voting:
                    silent.add(rollout)
        return kept

    def _places(self, query: list[int], group_size: int | None) -> dict[int, int]:
        """rollout_id -> the rollout's number in its group; ValueError for a group of another size."""
        groups: dict[int, set[int]] = {}
        owner: dict[int, int] = {}
        for j, (group, rollout) in enumerate(zip(query, self.rollout_id, strict=True)):
            if owner.setdefault(rollout, group) != group:
                raise ValueError(
                    f"sample {j}: rollout_id {rollout} is in groups {owner[rollout]} and {group}"
                )
            groups.setdefault(group, set()).add(rollout)
        for group, rollouts in groups.items():
            if group_size is not None and len(rollouts) != group_size:
                raise ValueError(
                    f"group_index {group}: {len(rollouts)} rollouts, expected n_samples_per_prompt = {group_size}; "
                    "a rollout without invocations is samples_of(sample, [], 0.0)"
                )
        return {rollout: k for rollouts in groups.values() for k, rollout in enumerate(sorted(rollouts))}

    def _invocations(self, rows: Any) -> tuple[list[str], list[int]]:
        """Role and invocation of each row, the invocations numbered anew without those that have no trained token."""
        role: list[str] = []
        order: list[int] = []
        seen: set[tuple[int, str, int]] = set()
        for j in rows:
            own = place_of(self.samples[j])
            role.append(role_of(self.samples[j]))
            order.append(int(own.get("invocation", len(order))))
            name = (self.rollout_id[j], role[-1], order[-1])
            if name in seen:
                raise ValueError(
                    f"sample {j}: rollout_id {name[0]}, role {name[1]!r}, invocation {name[2]} comes twice"
                )
            seen.add(name)
        number: dict[tuple[int, str], int] = {}
        invocation = [0] * len(rows)
        for i in np.argsort(order, kind="stable"):
            key = (self.rollout_id[rows[i]], role[i])
            invocation[i] = number.get(key, 0)
            number[key] = invocation[i] + 1
        return role, invocation

    def _scale(self, step_rollouts: int | None) -> Any:
        """(n,) rollouts / sum of w of each row's optimizer step: slime cuts steps of `global_batch_size` rollouts in
        order of first appearance."""
        order = {rollout: i for i, rollout in enumerate(dict.fromkeys(self.rollout_id))}
        size = step_rollouts or len(order)
        step = np.array([order[rollout] // size for rollout in self.rollout_id], np.int64)
        votes = np.bincount(step, self.weight)
        counts = np.bincount(np.unique(np.array([order[r] for r in self.rollout_id])) // size)
        whole = np.flatnonzero((votes == 0) & (counts == size))
        if len(whole):
            raise ValueError(
                f"step {whole[0]} of the batch: none of its {size} rollouts has an invocation of a trained role; drop "
                "such groups: --dynamic-sampling-filter-path mgrpo.integrations.slime.reward_nonzero"
            )
        return (size / np.where(votes == 0, 1.0, votes))[step]


def flat(samples: Any) -> list[Any]:
    """The samples of slime's nested lists, in order."""
    return (
        [inner for outer in samples for inner in flat(outer)]
        if isinstance(samples, (list, tuple))
        else [samples]
    )


def mask_of(sample: Any) -> list[int]:
    """loss_mask of the response; of a removed sample all 0."""
    if getattr(sample, "remove_sample", False):
        return [0] * sample.response_length
    mask = [1] * sample.response_length if sample.loss_mask is None else list(sample.loss_mask)
    if len(mask) != sample.response_length:
        raise ValueError(
            f"sample {sample.index}: {len(mask)} loss_mask, expected response_length {sample.response_length}"
        )
    return mask


def place_of(sample: Any) -> Mapping[str, Any]:
    """What the sample says of itself: role and invocation."""
    own: Mapping[str, Any] = (sample.metadata or {}).get("mgrpo", {})
    return own


def role_of(sample: Any) -> str:
    return str(place_of(sample).get("role", "main"))


def reward_of(args: Any, sample: Any) -> float:
    """The sample's reward, or that of --reward-key."""
    key = getattr(args, "reward_key", None)
    value = sample.reward[key] if key else sample.reward
    if value is None:
        raise ValueError(f"sample {sample.index}: no reward")
    return float(value)


def rollout_id_of(sample: Any) -> int:
    number = sample.index if sample.rollout_id is None else sample.rollout_id
    if number is None:
        raise ValueError("a sample has neither index nor rollout_id")
    return int(number)
