"""What may be kept of a rollout whose question is secret: ids, scores, counts and lengths, never a word.

Encrypted and gated benchmarks are published on the condition that their text stays out of training data, so no file of
a run may hold it: not the question, not its answer, not what agents, tools and judges wrote about it, not their tokens.
Of a rollout's info only the parts pass that are named below, and of their texts those of a fixed vocabulary: an answer
may be a number, so what a task calls by a name of its own does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mgrpo.types import Rollout

WITHHELD = "withheld: the question is secret"
WORDS = frozenset(
    {
        *("ok", "empty", "tool_error", "live", "cache", "replay", "correct", "incorrect", "failed"),
        *("gaia", "exact", "f1", "sub_exact", "number", "list"),
    }
)
"""Texts that say nothing of a question: states of tool calls, where an answer came from, verdicts, names of rules."""
KEYS = {
    "tools": ("role", "invocation", "turn", "status", "source", "seconds", "chars"),
    "verdict": ("rule", "rule_score", "judge", "source"),
}
"""Parts of info that are tables, or lists of tables, and what is kept of each."""


def redacted_info(rollout: Rollout, question_id: str) -> dict[str, Any]:
    """The info of a rollout without its words: `question_id`, `opened_at`, the states and times of its tool calls, and
    its verdict."""
    allowed = WORDS | {t.role for t in rollout.trajectories()}
    kept: dict[str, Any] = {"question_id": question_id}
    for name, value in rollout.info.items():
        if name in KEYS:
            tables = value if isinstance(value, list | tuple) else [value]
            parts = [_fields(table, KEYS[name], allowed) for table in tables]
            kept[name] = parts if isinstance(value, list | tuple) else parts[0]
        elif name == "opened_at" and isinstance(value, Mapping):
            kept[name] = {
                role: [n for n in at if _is_number(n)] for role, at in value.items() if role in allowed
            }
    return kept


def _fields(table: object, names: tuple[str, ...], allowed: frozenset[str]) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        return {}
    found = {name: table[name] for name in names if name in table}
    return {
        name: value
        for name, value in found.items()
        if _is_number(value) or (isinstance(value, str) and value in allowed)
    }


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float)
