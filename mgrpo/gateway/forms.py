"""How the messages of a program become token ids of a role, and its sampled text a reply: one Form a role.

entries, messages --Form.open()--> Opening          the first messages, or all of them where a segment begins
new messages      --Form.follow()--> ids            what follows the last reply, alone
sampled ids       --Form.said()--> text             without the end of the turn and what follows a stop text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgrpo.environments.episode import Agent
from mgrpo.errors import ChatError
from mgrpo.gateway.body import MAX_DEPTH, is_deeper
from mgrpo.gateway.history import Entry, arguments_of, canonical, function_of
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.tool_parser import ToolParser, open_parser
from mgrpo.model.chat import ChatFormat, Message, Opening

Tools = Sequence[Mapping[str, object]]
OpenParser = Callable[[Any, Agent, ChatFormat], ToolParser]


@dataclass(frozen=True, slots=True)
class Form:
    """Of one role."""

    chat: ChatFormat
    parser: ToolParser

    def open(self, messages: Sequence[Message], entries: Sequence[Entry], tools: Tools) -> Opening:
        """The ids of a whole history and of the start of the next turn. Raises ChatError for what the chat template
        cannot carry, ValueError for calls whose arguments are no object and for text that cannot be encoded."""
        return self.chat.open(written(messages, entries), tools, calls=True)

    def follow(
        self, new: Sequence[Message], entries: Sequence[Entry], opening: Opening, last: int | None
    ) -> list[int]:
        """The ids behind a sampled turn. entries: of the whole history, the new messages the last of them. last: the
        token that the policy sampled last; None: it sampled none. Raises as open()."""
        behind = len(entries) - len(new)
        messages = written(new, entries[behind:], entries[behind - 1])
        ended = last is not None
        try:
            return self.chat.extend(messages, ended=ended, last=last, opening=opening)
        except ChatError:
            calls = _calls(entries[behind - 1])
            if not calls or all(m["role"] != "tool" for m in messages):
                raise
            return self.chat.extend(messages, ended=ended, last=last, opening=opening, calls=calls)

    def said(self, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
        """(the text of a sampled turn, whether it ended of itself): without its end token, and up to the first of the
        stop texts in it."""
        text = self.chat.text(ids)
        places = [at for at in map(text.find, stop) if at >= 0]
        if places:
            return text[: min(places)], True
        return text, bool(ids) and int(ids[-1]) in self.chat.stop_ids


class Forms:
    """The Form of every role, made once: share it among the rollouts of a task."""

    def __init__(
        self,
        options: GatewayOptions,
        template: Mapping[str, Any] | None = None,
        open_parser: OpenParser = open_parser,
    ) -> None:
        """template: variables of the chat templates, e.g. enable_thinking. open_parser: for tests."""
        self._options, self._template, self._open_parser = options, dict(template or {}), open_parser
        self._forms: dict[str, tuple[Agent, Form]] = {}

    def of(self, agent: Agent) -> Form:
        """Raises ConfigError where its tokenizer has no chat template, or one that cannot be continued."""
        known = self._forms.get(agent.role)
        if known is None or known[0].tokenizer is not agent.tokenizer or known[0].engine is not agent.engine:
            chat = ChatFormat(agent.tokenizer, **self._template)
            known = agent, Form(chat, self._open_parser(self._options.tool_parser, agent, chat))
            self._forms[agent.role] = known
        return known[1]


def written(
    messages: Sequence[Message], entries: Sequence[Entry], before: Entry | None = None
) -> list[dict[str, Any]]:
    """Messages as chat templates take them: contents are texts, arguments of calls are objects, a tool's result has its
    tool's name. entries: their normal forms; before: that of the reply before them. Raises ValueError for arguments
    that are no object."""
    names = _names(before) if before is not None else {}
    made = []
    for message, e in zip(messages, entries, strict=True):
        new: dict[str, Any] = {"role": e.role, "content": e.content}
        if e.calls:
            names |= _names(e)
            new["tool_calls"] = [_call(call) for call in message["tool_calls"]]
        if e.reasoning:
            new["reasoning_content"] = e.reasoning
        if e.role != "assistant" and e.ids:
            new["tool_call_id"] = e.ids[0]
        name = message.get("name") or names.get(e.ids[0] if e.ids else "")
        if isinstance(name, str) and name and e.role != "assistant":
            new["name"] = name
        made.append(new)
    return made


def _names(e: Entry) -> dict[str, str]:
    """Id of a call -> name of its tool."""
    return {i: name for i, (name, _) in zip(e.ids, e.calls, strict=True)} if e.calls else {}


def _call(call: object) -> dict[str, Any]:
    number, name, given = function_of(call)
    arguments = arguments_of(given)
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"the arguments of a call of {name!r:.50} are {given!r:.100}, expected an object in JSON"
        )
    if is_deeper(arguments, MAX_DEPTH):
        raise ValueError(f"the arguments of a call of {name!r:.50} have more than {MAX_DEPTH} levels")
    _check_texts(arguments, name)
    return {"type": "function", "id": number, "function": {"name": name, "arguments": arguments}}


def _check_texts(arguments: Mapping[str, Any], name: str) -> None:
    try:
        canonical(arguments).encode()
    except UnicodeEncodeError:  # which JSON can spell, and a chat template does not refuse
        raise ValueError(
            f"the arguments of a call of {name!r:.50} hold a lone surrogate, which no tokenizer can encode"
        ) from None


def _calls(reply: Entry) -> list[dict[str, Any]]:
    """The calls of a reply as its program has them."""
    return [
        {"type": "function", "id": number, "function": {"name": name, "arguments": arguments_of(arguments)}}
        for number, (name, arguments) in zip(reply.ids, reply.calls, strict=True)
    ]
