"""What a sampled turn says: thoughts, words and tool calls, as a chat message keeps them apart.

    "hermes"   <think>...</think> words <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as text
               (mgrpo/tools/calls.py says how generously)
    "server"   what the parsers of the role's own inference server make of the ids (vLLM's derender route, started with
               --enable-auto-tool-choice --tool-call-parser NAME), for models that write their calls otherwise

Nothing that was sampled is lost: what a parser does not understand stays content, with its tags. Neither parser changes
what is trained, which are the ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mgrpo.engines.base import Engine
from mgrpo.environments.episode import Agent
from mgrpo.errors import ConfigError
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.turn import FinishReason
from mgrpo.model.chat import ChatFormat
from mgrpo.model.tokens import Tokenizer, decode_piece
from mgrpo.tools.calls import MAX_CALLS, OPEN, blocks

Tools = Sequence[Mapping[str, object]]
THINK, THOUGHT = "<think>", "</think>"
PROMPT_TAIL = 32
"""Ids before the turn that a server's decoder may see."""


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A tool call. arguments: JSON text of an object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """A turn in its parts. finish_reason: "tool_calls" where there are calls, otherwise why sampling ended."""

    content: str
    reasoning: str
    calls: tuple[ParsedCall, ...]
    finish_reason: FinishReason


class ToolParser(Protocol):
    """Takes turns apart; for all turns of one agent."""

    async def parse(
        self, ids: Sequence[int], text: str, tools: Tools, *, finish: Literal["stop", "length"]
    ) -> Parsed:
        """ids: as sampled. text: what they say, without the token that ended the turn and without a stop text. tools:
        of the request; without any, nothing is a call. Raises InfrastructureError where a server fails, GatewayError
        where it refuses the tools, ConfigError where it has no parser."""


def open_parser(
    kind: Literal["hermes", "server"], agent: Agent, form: ChatFormat | None = None
) -> ToolParser:
    """The parser of an agent's turns. form: how its conversations are written (default: as its tokenizer's template
    has them). Raises ConfigError for "server" where the agent's engine has no server that parses."""
    form = form or ChatFormat(agent.tokenizer)
    opening = form.open([{"role": "user", "content": "u"}])
    if kind == "hermes":
        return HermesParser(thinks=opening.text.rstrip().endswith(THINK))
    if not agent.engine.parses_turns:
        raise ConfigError(
            f'tool_parser="server": the engine of role {agent.role!r} has no server that parses tool calls; use '
            'engine.type="vllm", or tool_parser="hermes"'
        )
    return ServerParser(agent.engine, agent.tokenizer, form.stop_ids, opening.ids[-PROMPT_TAIL:])


class HermesParser:
    """Reads the text of a turn."""

    def __init__(self, *, thinks: bool = False) -> None:
        """thinks: the template opens each turn's thoughts itself, so that a turn begins within them."""
        self._thinks = thinks

    async def parse(
        self, ids: Sequence[int], text: str, tools: Tools, *, finish: Literal["stop", "length"]
    ) -> Parsed:
        """See ToolParser. Of a turn that was cut off, the last call counts if its closing tag is there."""
        reasoning, said = split_thoughts(text, opened=self._thinks)
        found = blocks(said)[:MAX_CALLS] if tools else []
        if finish == "length" and found and not found[-1].closed:
            found.pop()
        calls, words, at = [], [], 0
        for block in found:
            if block.call.problem:
                continue
            calls.append(ParsedCall(block.call.name, _json(block.call.arguments)))
            words.append(said[at : block.start])
            at = block.end
        content = "".join([*words, said[at:]])
        return _parsed(content.strip() if calls else content, reasoning, calls, finish)


class ServerParser:
    """Asks the inference server of the agent."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, ends: Collection[int], prompt_ids: Sequence[int] = ()
    ) -> None:
        """ends: ids that end a turn. prompt_ids: what stands before each turn, as far as a decoder needs it."""
        self._engine, self._tokenizer = engine, tokenizer
        self._ends, self._prompt = frozenset(ends), tuple(prompt_ids)

    async def parse(
        self, ids: Sequence[int], text: str, tools: Tools, *, finish: Literal["stop", "length"]
    ) -> Parsed:
        """See ToolParser. The server sees no stop texts: what `text` has lost at its end, content loses too."""
        said = list(ids[:-1] if ids and ids[-1] in self._ends else ids)
        if not said:
            return Parsed("", "", (), finish)
        try:
            turn = await self._engine.parse_turn(said, tools, self._prompt)
        except ValueError as error:
            raise GatewayError(400, "tools_not_taken", f"the server's parser refuses: {error}") from error
        content, reasoning = turn.content, turn.reasoning
        whole = decode_piece(self._tokenizer, said)
        if whole.startswith(text):
            lost = whole[len(text) :]
            content, reasoning = _without(content, lost), reasoning if content else _without(reasoning, lost)
        calls = [ParsedCall(name, arguments) for name, arguments in turn.calls]
        return _parsed(content, reasoning, calls, finish)


def split_thoughts(text: str, *, opened: bool = False) -> tuple[str, str]:
    """(thoughts, what is said behind them). Thoughts reach to the first </think>, whoever opened them; without one they
    are the whole turn, where the turn or `opened`, the template, has begun them. A turn that begins with a call or a
    JSON object has none, unless the template opened them."""
    start = text.lstrip()
    if not opened and start.startswith(("{", OPEN)):
        return "", text
    thoughts, end, rest = text.partition(THOUGHT)
    if end:
        return thoughts.lstrip().removeprefix(THINK).strip(), rest.lstrip()
    if opened or start.startswith(THINK):
        return start.removeprefix(THINK).strip(), ""
    return "", text


def _parsed(content: str, reasoning: str, calls: Sequence[ParsedCall], finish: FinishReason) -> Parsed:
    return Parsed(content, reasoning, tuple(calls), "tool_calls" if calls else finish)


def _without(text: str, lost: str) -> str:
    """`text` without `lost` at its end, which a server may have trimmed."""
    return text.removesuffix(lost) if text.endswith(lost) else text.removesuffix(lost.strip())


def _json(arguments: Mapping[str, object]) -> str:
    return json.dumps(dict(arguments), ensure_ascii=False)
