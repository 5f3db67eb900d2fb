"""One turn as every dialect of the gateway says it: what a program asks, what the policy answered.

chat_completions, responses, messages  ->  TurnRequest  ->  GatewayRollout.turn  ->  TurnReply  ->  the same dialect
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mgrpo.model.chat import Message

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the policy calls. arguments: JSON text of an object."""

    id: str
    name: str
    arguments: str

    def message(self) -> Mapping[str, object]:
        """As an entry of a message's `tool_calls`, in the form of Chat Completions."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What a program sends for one turn of one agent.

    messages: the whole history as the program has it, in the form of Chat Completions: {"role", "content": str}, of the
    assistant also "tool_calls" and "reasoning_content", of a tool "tool_call_id" and "name"; the last is not the
    assistant's. tools: {"type": "function", "function": {"name", "description", "parameters"}} each. max_tokens: of the
    turn; None: what the gateway's options say. stop: texts at which the turn ends. invocation: that the program names;
    None: the history says which it is. repeated: an SDK sends the request again, because its first answer was lost."""

    role: str
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, object]] = ()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    invocation: int | None = None
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class TurnReply:
    """What the policy sampled, as text. content: without thoughts, tool calls and the stop text. prompt_tokens: of the
    history before the turn. logprobs: nats, of each sampled token, whose ids are token_ids."""

    id: str
    role: str
    invocation: int
    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def message(self) -> Message:
        """As the assistant's message that a program appends to its history."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.message() for call in self.tool_calls]
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message
