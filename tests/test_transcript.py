"""Tool calls and verdicts as the page is given them, whatever a task has left in its rollout's info."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.view.transcript import LONGEST, labels, tool_calls, verdict
from tests.research_record import CALLS, VERDICT

TEXT = st.text("ab<>&\x1b\u202e", max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["tools", "verdict", "tags", "question_id"])
CALL = st.dictionaries(st.sampled_from(sorted(CALLS[0])), VALUES)


def test_what_research_notes_is_passed_on_as_it_is() -> None:
    """Every field of a call and of a verdict, with its own value."""
    assert tool_calls({"tools": CALLS}) == CALLS
    assert verdict({"verdict": VERDICT}) == VERDICT
    assert labels({"question_id": 7, "tags": {"level": 2}}) == {"question_id": "7", "tags": {"level": "2"}}


def test_what_does_not_fit_is_unknown() -> None:
    """No numbers, no tables, texts without end."""
    odd: dict[str, Any] = {
        "tools": [{"turn": True, "seconds": float("nan"), "tool": "x" * 9999}, "search", None]
    }
    (call,) = tool_calls(odd)
    assert call == {
        "role": "", "invocation": None, "turn": None, "tool": "x" * LONGEST, "arguments": "", "status": "",
        "source": "", "seconds": None, "digest": "", "chars": None,
    }  # fmt: skip
    assert tool_calls({}) == tool_calls({"tools": "search"}) == []
    assert verdict({}) is verdict({"verdict": "correct"}) is None
    assert labels({"tags": ["a"]}) == {"question_id": "", "tags": {}}


@settings(max_examples=40)
@given(st.dictionaries(NAMES, VALUES | st.lists(CALL, max_size=3)))
def test_any_info_becomes_json(info: dict[str, Any]) -> None:
    """A task may leave anything in its info: the page gets texts and finite numbers, and one entry a table."""
    calls = tool_calls(info)
    json.dumps([calls, verdict(info), labels(info)], allow_nan=False)
    found = info.get("tools")
    assert len(calls) == (sum(isinstance(c, dict) for c in found) if isinstance(found, list) else 0)
