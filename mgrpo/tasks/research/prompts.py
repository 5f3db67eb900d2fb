"""What the agents of tasks/research are asked to do. The paper prints no prompts: these words are ours.

A system prompt of one's own may name {date}, {tools} and {format}, each of which is replaced once and as a whole; every
other brace stays as it is, and so does whatever the replacements hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from mgrpo.tools.calls import Format, render

ANSWER, REPORT, ASK = "answer", "report", "ask"
"""The tools that end a main agent's and a sub-agent's trajectory, and that gives a sub-agent a task."""
TASK = "task"
"""The argument of a tool that gives a task."""

MAIN_ALONE = (
    "Answer the question. Look up what you need with your tools, step by step, and trust what you have read more than "
    "what you remember."
)
MAIN_LEAD = (
    "Answer the question with the help of sub-agents. Split it into tasks, and give each to a sub-agent. A sub-agent "
    "sees nothing but the words of its task: name all that it must know. Tasks that do not depend on each other can be "
    "given in one turn and run at the same time."
)
MAIN_CLOSED = "Answer the question from what you know."
ANSWER_HOW = (
    f"When you know the answer, call {ANSWER} with it: a number, as few words as possible, or a list separated by "
    "commas, without explanation."
)
SUB = (
    "Work on the task that you are given. Look up what you need with your tools, and trust what you have read more "
    "than what you remember."
)
SUB_CLOSED = "Work on the task that you are given, from what you know."
REPORT_HOW = f"When you are done, call {REPORT} with what you found. Only this report is read."

NOW = {
    ANSWER: f"Give your answer now: call {ANSWER}.",
    REPORT: f"Give your report now: call {REPORT}.",
}
"""What an agent reads before the last turn that it has."""
CUT = "[There is no room for the results.]"
NOTHING = "(no result)"
NO_REPORT = "(The sub-agent gave no report.)"

_PLACEHOLDER = re.compile(r"\{(date|tools|format)\}")


def own_tool(name: str) -> dict[str, object]:
    """The schema of `answer` or `report`."""
    about = "Ends your work with the answer." if name == ANSWER else "Ends your work with what you found."
    return _schema(name, about, name, "The answer alone." if name == ANSWER else "What you found.")


def ask_tool(name: str, about: str) -> dict[str, object]:
    """The schema of a tool that gives a sub-agent a task."""
    return _schema(
        name, f"Give a task to a sub-agent. {about}".strip(), TASK, "The task, complete in itself."
    )


def _schema(name: str, about: str, argument: str, meaning: str) -> dict[str, object]:
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string", "description": meaning}},
        "required": [argument],
    }
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def default_prompt(final: str, *, leads: bool, has_tools: bool, described: bool) -> str:
    """The system prompt of a role. leads: it gives tasks to sub-agents. described: its tools stand in the prompt and
    not in the chat template."""
    if final == ANSWER:
        about = MAIN_LEAD if leads else MAIN_ALONE if has_tools else MAIN_CLOSED
        how = ANSWER_HOW
    else:
        about, how = SUB if has_tools else SUB_CLOSED, REPORT_HOW
    parts = ["{date}", about, how, *(["{tools}", "{format}"] if described else [])]
    return "\n\n".join(parts)


def filled(prompt: str, date: str | None, schemas: Sequence[Mapping[str, object]], form: Format) -> str:
    """The prompt with its placeholders replaced, in one pass: what replaces one is not looked into."""
    values = {
        "date": f"Today is {date}." if date else "",
        "tools": tools_text(schemas),
        "format": format_text(form),
    }
    text = _PLACEHOLDER.sub(lambda found: values[found[1]], prompt)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def tools_text(schemas: Sequence[Mapping[str, object]]) -> str:
    """The tools in JSON, one a line."""
    lines = [json.dumps(schema["function"], ensure_ascii=False) for schema in schemas]
    return "\n".join(["Tools:", *lines])


def format_text(form: Format) -> str:
    """How a tool call is written."""
    call = render(form, ("NAME", {"ARGUMENT": "..."}))
    if form == "hermes":
        return f"Every turn ends with one or more tool calls, each written so:\n{call}"
    return f"Every turn is one or more tool calls and nothing else, each written so, one a line:\n{call}"
