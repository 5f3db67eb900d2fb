"""Whether a model's chat template can hold the conversations of a task: tried before a run, and refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgrpo.errors import ConfigError
from mgrpo.model.chat import SAMPLE_CALL, SAMPLE_RESULT, SAMPLE_TOOL, ChatFormat


@dataclass(frozen=True, slots=True)
class ChatUse:
    """What a task sends through its models' chat templates, for check_chat."""

    first: Sequence[str] = ("user",)
    """Roles of the first messages, in order."""
    observed: Sequence[str] = ("user",)
    """Roles that speak after the assistant."""
    tools: bool = False
    """Whether Chat.begin gets tools."""
    calls: bool = False
    """Whether Chat.observe gets the calls that a tool's result answers."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """The template's own settings, as the task gives them to ChatFormat."""


def check_chat(tokenizer: Any, use: ChatUse, name: str) -> None:
    """Hold a conversation of the kind `use`. name: of the setting that gave the model. Raises ConfigError with it where
    the chat template cannot hold one."""
    try:
        form = ChatFormat(tokenizer, **use.template)
        first = [{"role": role, "content": f"message {n}"} for n, role in enumerate(use.first)]
        opening = form.open(first, [SAMPLE_TOOL] if use.tools else None, calls=use.calls)
        for role in use.observed:
            if use.calls and role != "user":
                form.extend([{**SAMPLE_RESULT, "role": role}], calls=[SAMPLE_CALL], opening=opening)
            else:
                form.observe(role, "answer", opening=opening)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None
