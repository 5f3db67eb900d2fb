"""Tool calls and the verdict of a recorded rollout, in the form that the page draws.

A task that has tools notes its calls in `Rollout.info["tools"]` and its outcome in `info["verdict"]` (tasks/research).
info is the task's own and may hold anything, so nothing is taken on trust: an entry that is no table is passed over, a
number that is none is unknown. Of a secret question the record keeps states and times alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
TEXTS = ("tool", "arguments", "status", "source", "digest")
LONGEST = 2000
"""Characters of a text of a call or a verdict that the page is given."""


def tool_calls(info: Mapping[str, object]) -> list[Json]:
    """The calls of a rollout, in their order. role, invocation, turn: whose and when (turn: number of the agent's turn,
    from 0). status ok, empty or tool_error; source live, cache or replay; seconds; digest and chars of what was
    observed. "" and None stand for what is not known."""
    calls = info.get("tools")
    if not isinstance(calls, list | tuple):
        return []
    return [_call(call) for call in calls if isinstance(call, Mapping)]


def verdict(info: Mapping[str, object]) -> Json | None:
    """By which rule an answer was scored and what the rule and the judge said; None where the task notes none."""
    found = info.get("verdict")
    if not isinstance(found, Mapping):
        return None
    texts = {name: _text(found.get(name)) for name in ("rule", "judge", "source", "digest")}
    return texts | {"rule_score": _number(found.get("rule_score"))}


def labels(info: Mapping[str, object]) -> Json:
    """Id and tags of the question, where the task notes them."""
    tags = info.get("tags")
    return {
        "question_id": _text(info.get("question_id")),
        "tags": {_text(k): _text(v) for k, v in tags.items()} if isinstance(tags, Mapping) else {},
    }


def _call(call: Mapping[str, object]) -> Json:
    found: Json = {name: _text(call.get(name)) for name in TEXTS}
    found["role"] = _text(call.get("role"))
    for name in ("invocation", "turn", "chars"):
        number = _number(call.get(name))
        found[name] = None if number is None else int(number)
    return found | {"seconds": _number(call.get("seconds"))}


def _text(value: object) -> str:
    return "" if value is None else str(value)[:LONGEST]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
