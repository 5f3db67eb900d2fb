"""The roles of a team as a rollout needs them: what each may call, how it is addressed, how its chats begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from mgrpo.model.chat import ChatFormat, Message
from mgrpo.tasks.research.options import AgentOptions, ResearchOptions
from mgrpo.tasks.research.prompts import ANSWER, ASK, REPORT, ask_tool, default_prompt, filled, own_tool
from mgrpo.tasks.research.talk import Manner, Start
from mgrpo.tools.toolset import ToolSet
from mgrpo.types import MAIN


@dataclass(frozen=True, slots=True)
class Role:
    """One role. delegates: tool -> the sub-agent role that it gives a task to. searches: tools with a `query`."""

    name: str
    prompt: str
    tools: ToolSet
    manner: Manner
    delegates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    searches: frozenset[str] = frozenset()

    def start(self, form: ChatFormat, text: str) -> Start:
        """Its chat about a question or task. Raises ChatError for a template that cannot carry it."""
        return Start(form, self.manner, self.messages(text))

    def messages(self, text: str) -> list[Message]:
        return [{"role": "system", "content": self.prompt}, {"role": "user", "content": text}]


def make_roles(options: ResearchOptions, names: Sequence[str], tools: ToolSet) -> dict[str, Role]:
    """The roles of a run, "main" first. Raises ValueError for options that do not fit them."""
    if not names or names[0] != MAIN:
        raise ValueError(f"roles {list(names)} given, expected {MAIN!r} first")
    if unknown := sorted(set(options.agents) - set(names)):
        raise ValueError(f"options.agents.{unknown[0]}: the run has no such role; it has {', '.join(names)}")
    if len(names) == 1 and options.single is not None:
        options = options.model_copy(update={"agents": {MAIN: options.single}})
    subs = names[1:]
    asks = {ASK: subs[0]} if len(subs) == 1 else {name: name for name in subs}
    return {name: _role(options, name, tools, asks if name == MAIN else {}) for name in names}


def _role(options: ResearchOptions, name: str, tools: ToolSet, asks: Mapping[str, str]) -> Role:
    agent = options.agents.get(name, AgentOptions())
    final = ANSWER if name == MAIN else REPORT
    mine = tools.only(_tool_names(agent, name, tools, bool(asks)))
    if taken := sorted(set(mine.names) & {final, *asks}):
        raise ValueError(f"options.tools: {taken[0]!r} is the name of a tool of {name}'s own; rename it")
    abouts = {ask: options.agents.get(sub, AgentOptions()).about for ask, sub in asks.items()}
    schemas = [*(ask_tool(ask, about) for ask, about in abouts.items()), *mine.schemas(), own_tool(final)]
    in_template = options.tools_in == "template"
    prompt = _own_prompt(agent, name) or default_prompt(
        final, leads=bool(asks), has_tools=bool(mine.names), described=not in_template
    )
    return Role(
        name,
        filled(prompt, options.date, schemas, options.format),
        mine,
        Manner(
            options.format,
            final,
            options.limits,
            observed="tool" if in_template else "user",
            schemas=schemas if in_template else None,
        ),
        delegates=asks,
        searches=frozenset(_searches(mine)),
    )


def _tool_names(agent: AgentOptions, name: str, tools: ToolSet, leads: bool) -> Sequence[str]:
    if agent.tools is None:
        return () if leads else tools.names
    if not tools.names:  # closed book: the same config without its tools
        return ()
    if unknown := [tool for tool in agent.tools if tool not in tools.names]:
        raise ValueError(
            f"options.agents.{name}.tools: no tool {unknown[0]!r}; there are {', '.join(tools.names)}"
        )
    return agent.tools


def _own_prompt(agent: AgentOptions, name: str) -> str | None:
    if agent.prompt_file is None:
        return agent.prompt
    try:
        return Path(agent.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"options.agents.{name}.prompt_file {agent.prompt_file!r}: {error}") from None


def _searches(tools: ToolSet) -> list[str]:
    """Tools that take a `query`."""
    found = []
    for schema in tools.schemas():
        function = schema["function"]
        assert isinstance(function, Mapping)
        parameters = function["parameters"]
        if isinstance(parameters, Mapping) and "query" in parameters.get("properties", {}):
            found.append(str(function["name"]))
    return found
