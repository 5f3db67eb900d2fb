"""Whole groups for slime of trajectories that were played elsewhere, such as those of MrlX's sub-agent, whose queue
gives one trajectory at a time, of any question.

A trajectory is a mapping: tokens (L,), responseLength, lossMask of the response, reward, and optionally response,
messages, role ("sub"), logprobs of the response. Two more fields say where it belongs: "query", the asking of a
question (the `group_index` of the planner's sample), and "rollout": [index of the planner's sample, d_k]. A rollout
without an invocation sends one mapping with d_k = 0 and no tokens. A group is complete when n_samples_per_prompt
rollouts are, each with its d_k trajectories; invocations are numbered as they arrive.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mgrpo.errors import DeadlineError

if TYPE_CHECKING:
    from mgrpo.integrations.slime_rows import Settings

FIELDS = ("query", "rollout", "tokens", "responseLength", "lossMask", "reward")


@dataclass(slots=True)
class _Group:
    """The trajectories of one query so far."""

    rows: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)  # rollout -> in order of arrival
    counts: dict[int, int] = field(default_factory=dict)  # rollout -> d_k

    def complete(self, size: int) -> bool:
        return len(self.counts) == size and all(len(self.rows[k]) == d for k, d in self.counts.items())


class Groups:
    """Groups that are not complete yet, between one rollout batch and the next."""

    def __init__(self) -> None:
        self.open: dict[str | int, _Group] = {}
        self.samples = 0  # made so far: the next one's index

    def add(self, row: Mapping[str, Any], size: int) -> tuple[str | int, _Group] | None:
        """Take one trajectory; its query and group when that is now complete. ValueError naming query, rollout and what
        is wrong."""
        if missing := [name for name in FIELDS if name not in row]:
            raise ValueError(
                f"trajectory {row.get('id', '')!r}: no field {missing[0]!r}, expected {', '.join(FIELDS)}"
            )
        query, (rollout, count) = row["query"], row["rollout"]
        where = f"query {query!r}, rollout {rollout}"
        group = self.open.setdefault(query, _Group())
        if group.counts.setdefault(rollout, count) != count:
            raise ValueError(f"{where}: d_k {count}, and {group.counts[rollout]} before")
        if len(group.counts) > size:
            raise ValueError(
                f"{where}: rollout {len(group.counts)} of a group of n_samples_per_prompt = {size}"
            )
        rows = group.rows.setdefault(rollout, [])
        if bool(count) != bool(row["tokens"]):
            raise ValueError(f"{where}: d_k {count} and {len(row['tokens'])} tokens")
        if count:
            rows.append(row)
        if len(rows) > count:
            raise ValueError(f"{where}: trajectory {len(rows)} of d_k = {count}")
        return (query, self.open.pop(query)) if group.complete(size) else None

    def to_samples(self, query: str | int, group: _Group, sample_type: Any) -> list[list[Any]]:
        """slime's samples of a complete group: a list for each rollout."""
        made = []
        for rollout, rows in sorted(group.rows.items()):
            given: list[Mapping[str, Any]] = rows or [
                {"tokens": [0, 0], "responseLength": 1, "lossMask": [0], "reward": 0.0}
            ]
            samples = []
            for invocation, row in enumerate(given):
                own = {"role": str(row.get("role", "sub")), "invocation": invocation}
                sample = sample_type(
                    group_index=query, index=self.samples, rollout_id=rollout, tokens=list(row["tokens"]),
                    response=row.get("response", ""), response_length=row["responseLength"],
                    loss_mask=list(row["lossMask"]), reward=row["reward"], status=sample_type.Status.COMPLETED,
                    rollout_log_probs=row.get("logprobs"),
                    metadata={"mgrpo": own, "messages": row.get("messages", []), "reward": row["reward"]},
                )  # fmt: skip
                self.samples += 1
                samples.append(sample)
            made.append(samples)
        return made


_GROUPS: dict[str, Groups] = {}  # by source: slime calls a function, so what is held between calls is here


def claim(
    args: Any, settings: Settings, load: Callable[[str], Any]
) -> tuple[list[list[list[Any]]], dict[str, Any]]:
    """`rollout_batch_size` whole groups from the source, rewarded and filtered as slime's arguments say, and metrics.

    Waits for them; DeadlineError when no trajectory has come for settings.patience seconds, naming the source.
    """
    assert settings.source is not None
    module, _, name = settings.source.partition(":")
    source = getattr(importlib.import_module(module), name)
    held = _GROUPS.setdefault(settings.source, Groups())
    sample_type = importlib.import_module("slime.utils.types").Sample
    judge = load(args.custom_rm_path) if getattr(args, "custom_rm_path", None) else None
    keep = (
        load(args.dynamic_sampling_filter_path)
        if getattr(args, "dynamic_sampling_filter_path", None)
        else None
    )
    groups: list[list[list[Any]]] = []
    dropped, heard = 0, time.monotonic()
    while len(groups) < args.rollout_batch_size:
        row = source()
        if row is None:
            if time.monotonic() - heard > settings.patience:
                raise DeadlineError(
                    f"{settings.source}: no trajectory for {settings.patience:g} s; {len(groups)} of "
                    f"{args.rollout_batch_size} groups are whole and {len(held.open)} are not"
                )
            time.sleep(settings.poll)
            continue
        heard = time.monotonic()
        whole = held.add(row, args.n_samples_per_prompt)
        if whole is None:
            continue
        group = held.to_samples(*whole, sample_type)
        if judge is not None:
            asyncio.run(
                _judge(
                    judge, args, [sample for rollout in group for sample in rollout if any(sample.loss_mask)]
                )
            )
        if keep is not None and not getattr(verdict := keep(args, group), "keep", verdict):
            dropped += 1
            continue
        groups.append(group)
    return groups, {"mgrpo/groups_dropped": dropped, "mgrpo/groups_waiting": len(held.open)}


async def _judge(judge: Any, args: Any, samples: list[Any]) -> None:
    for sample, reward in zip(samples, await asyncio.gather(*(judge(args, s) for s in samples)), strict=True):
        sample.reward = reward
