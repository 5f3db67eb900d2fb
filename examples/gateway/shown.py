"""What each agent of openai_sdk.py has seen done before its own task: a model of 135 million parameters calls no tool
that it has not seen called twice."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


def shown(task: str, name: str, arguments: dict[str, str], result: str, answer: str) -> list[Message]:
    """One task, its tool call, the result, the answer."""
    call = {
        "id": "shown0000",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }
    return [
        {"role": "user", "content": task},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "shown0000", "content": result},
        {"role": "assistant", "content": answer},
    ]


ITALY = "What is the capital of Italy?"
IRELAND = "What are the people of Ireland called?"
FOUND = {
    ITALY: "Italy: The capital is Rome. The currency is EUR. The people are called Italian.",
    IRELAND: "Ireland: The capital is Dublin. The currency is EUR. The people are called Irish.",
}
TO_MAIN = [
    *shown(ITALY, "ask_researcher", {"question": ITALY}, "Rome", "Rome"),
    *shown(IRELAND, "ask_researcher", {"question": IRELAND}, "Irish", "Irish"),
]
TO_RESEARCHER = [
    *shown(ITALY, "search", {"query": "Italy"}, FOUND[ITALY], "Rome"),
    *shown(IRELAND, "search", {"query": "Ireland"}, FOUND[IRELAND], "Irish"),
]
