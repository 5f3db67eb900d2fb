"""From a run's [task.options.tools] to a ToolSet.

    [task.options.tools.wiki]          # an entry: its name is free
    type = "corpus"                    # built-in, of an installed package (entry points `mgrpo.tools`), or
    path = "wiki.sqlite"               # "package.module:Class", a ToolConfig
    rename = { search = "wiki_search" }

Each type is a ToolConfig: its fields are the entry's keys, its tools() makes the tools, of which `include`, `exclude`
and `rename` choose and name those that agents get. A new type: a file beside these with such a class and a line in
BUILT_IN, or a class in a package of one's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, ValidationError

from mgrpo.config.settings import Settings
from mgrpo.errors import ConfigError
from mgrpo.plugins import errors_named, find_class
from mgrpo.tools.base import Observation, Tool
from mgrpo.tools.blocklist import BlockConfig, BlockList
from mgrpo.tools.toolset import ToolSet

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

S = TypeVar("S", bound=Settings)
GROUP = "mgrpo.tools"
BUILT_IN = {
    "corpus": "mgrpo.tools.corpus_tools:CorpusConfig",
    "python": "mgrpo.tools.function:PythonConfig",
    "search_r1": "mgrpo.tools.search_r1:SearchR1Config",
    "mrlx": "mgrpo.tools.mrlx:MrlxConfig",
    "serper": "mgrpo.tools.serper:SerperConfig",
    "jina": "mgrpo.tools.jina:JinaConfig",
    "brave": "mgrpo.tools.brave:BraveConfig",
    "tavily": "mgrpo.tools.tavily:TavilyConfig",
    "searxng": "mgrpo.tools.searxng:SearxngConfig",
    "mcp": "mgrpo.tools.mcp:McpConfig",
}


class ToolConfig(Settings):
    """Base of every type's keys."""

    type: str
    """Which tools these are."""
    include: list[str] | None = None
    """Names of the tools that agents get; left out: all of them."""
    exclude: list[str] = Field(default_factory=list)
    """Names of tools that agents do not get."""
    rename: dict[str, str] = Field(default_factory=dict)
    """A tool's own name -> the name by which agents call it."""

    @abstractmethod
    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        """The tools of an entry. name: the entry's, for services and errors. cassette: what answers are recorded on and
        replayed from; None: neither. Raises ConfigError; opens no connection that nobody would close."""


class Renamed(Tool):
    """A tool under another name."""

    def __init__(self, tool: Tool, name: str) -> None:
        self._tool = tool
        self.name, self.description, self.parameters = name, tool.description, tool.parameters
        self.pure, self.version = tool.pure, tool.version

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        return await self._tool.call(arguments)

    async def preflight(self) -> None:
        await self._tool.preflight()

    async def close(self) -> None:
        await self._tool.close()


def build_tools(
    options: Mapping[str, Mapping[str, object]],
    cassette: Cassette | None = None,
    *,
    blocked: Mapping[str, object] | BlockConfig | None = None,
    max_chars: int | None = None,
) -> ToolSet:
    """The tools of all entries. options: entry -> its keys. blocked: keys of a BlockConfig. max_chars: what an
    observation is cut to, None: nothing. Raises ConfigError naming entry and key."""
    found: dict[str, tuple[str, Tool]] = {}
    for entry, keys in options.items():
        for tool in _tools_of(entry, keys, cassette):
            if tool.name in found:
                raise ConfigError(
                    f"tools.{entry} and tools.{found[tool.name][0]} both have a tool {tool.name!r}: rename one, "
                    f'e.g. tools.{entry}.rename = {{ {tool.name} = "{entry}_{tool.name}" }}'
                )
            found[tool.name] = entry, tool
    rules = None
    if blocked is not None:
        config = blocked if isinstance(blocked, BlockConfig) else _checked(BlockConfig, "blocked", blocked)
        rules = BlockList(config)
    return ToolSet([tool for _, tool in found.values()], blocked=rules, max_chars=max_chars)


def _tools_of(entry: str, keys: Mapping[str, object], cassette: Cassette | None) -> list[Tool]:
    """The tools of one entry as its include, exclude and rename leave them."""
    where = f"tools.{entry}"
    if not isinstance(keys, Mapping) or not isinstance(kind := keys.get("type"), str):
        raise ConfigError(f'{where} needs type = "...", one of {", ".join(sorted(BUILT_IN))}')
    found = find_class(f"{where}.type", kind, BUILT_IN, GROUP, ToolConfig)  # type: ignore[type-abstract]
    config = _checked(found, where, keys)
    with errors_named(where):
        made = {tool.name: tool for tool in config.tools(entry, cassette)}
    for key, names in (
        ("include", config.include or []),
        ("exclude", config.exclude),
        ("rename", config.rename),
    ):
        for name in names:
            if name not in made:
                raise ConfigError(f"{where}.{key}: no tool {name!r}; it has {', '.join(made) or 'none'}")
    kept = [
        tool
        for name, tool in made.items()
        if name not in config.exclude and (config.include is None or name in config.include)
    ]
    return [Renamed(t, config.rename[t.name]) if t.name in config.rename else t for t in kept]


def _checked(kind: type[S], where: str, keys: Mapping[str, object]) -> S:
    """The settings of an entry. Raises ConfigError naming every key that is wrong."""
    try:
        return kind.model_validate(dict(keys))
    except ValidationError as error:
        wrong = []
        for problem in error.errors():
            key = ".".join(str(part) for part in (where, *problem["loc"]))
            unknown = problem["type"] == "extra_forbidden"
            known = f"is unknown, expected one of {', '.join(sorted(kind.model_fields))}"
            wrong.append(f"{key} {known}" if unknown else f"{key}: {problem['msg']}")
        raise ConfigError("; ".join(wrong)) from None
