"""The tools of an agent, called by what a policy wrote.

A policy may ask for anything: a tool that is not there, arguments of the wrong kind, an address that it may not see.
Each of these is an observation with the status tool_error and words that help, and never an exception. What a tool
raises beside ToolError (mgrpo/tools/base.py) passes through, so that no text of such a failure is ever shown.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mgrpo.errors import ConfigError
from mgrpo.tools.base import Observation, Tool, ToolError, occurrence
from mgrpo.tools.blocklist import BlockList, refusal

WORDS = 300  # characters of what is wrong with arguments


class ToolSet:
    """Tools by name. Several rollouts call them at once, on one event loop."""

    def __init__(
        self, tools: Sequence[Tool], *, blocked: BlockList | None = None, max_chars: int | None = None
    ) -> None:
        """max_chars: what an observation is cut to, with a mark; None: nothing is cut. Raises ConfigError for two tools
        of one name, a name that is no identifier, and parameters that are no JSON schema of an object."""
        if max_chars is not None and max_chars < 1:
            raise ConfigError(f"observations of max_chars = {max_chars} characters, expected >= 1")
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise ConfigError(f"two tools are named {tool.name!r}")
            if not tool.name.isidentifier():
                raise ConfigError(
                    f"tool {tool.name!r}: a name of letters, digits and _ is expected; rename it"
                )
            self._tools[tool.name] = tool
        self._validators = {name: _validator(name, tool.parameters) for name, tool in self._tools.items()}
        self.blocked, self._max_chars = blocked, max_chars

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    @property
    def versions(self) -> dict[str, str]:
        """Tool -> what its answers depend on beside the arguments, of those that say so."""
        return {name: tool.version for name, tool in self._tools.items() if tool.version}

    def schemas(self) -> list[dict[str, object]]:
        """Of all tools, as chat templates and the OpenAI API take them."""
        return [tool.schema() for tool in self._tools.values()]

    def only(self, names: Sequence[str]) -> ToolSet:
        """These tools alone, with the same block list and counts. Raises ConfigError naming what there is not."""
        if unknown := [name for name in names if name not in self._tools]:
            raise ConfigError(
                f"no tool {', '.join(map(repr, unknown))}; there are {', '.join(self._tools) or 'none'}"
            )
        tools = [self._tools[name] for name in names]
        return ToolSet(tools, blocked=self.blocked, max_chars=self._max_chars)

    def plus(self, tools: Sequence[Tool]) -> ToolSet:
        """These tools and others, with the same block list. Raises ConfigError as __init__."""
        return ToolSet([*self._tools.values(), *tools], blocked=self.blocked, max_chars=self._max_chars)

    def fits(self, name: str, arguments: object) -> bool:
        """Whether a call is one that the schemas describe; call() answers any other with a tool_error."""
        if name not in self._tools or not isinstance(arguments, Mapping):
            return False
        return not _wrong(self._validators[name], arguments)

    async def call(self, name: str, arguments: object, *, occurrence: str = "") -> Observation:
        """What the tool `name` observes. arguments: as a policy wrote them, decoded. occurrence: which of several equal
        calls this is, for the recording of tools that are not pure.

        Never raises for what a policy did. Raises InfrastructureError, ServiceError, and what else the tool raises.
        """
        began = time.monotonic()
        seen = self._cut(_clean(await self._seen(name, arguments, occurrence)))
        return seen if seen.seconds else dataclasses.replace(seen, seconds=time.monotonic() - began)

    async def preflight(self) -> None:
        """Raises ConfigError where a tool could not work."""
        for tool in self._tools.values():
            await tool.preflight()

    async def close(self) -> None:
        """Close every tool, also where closing one fails. Idempotent."""
        failed: list[Exception] = []
        for tool in self._tools.values():
            try:
                await tool.close()
            except Exception as error:
                failed.append(error)
        if failed:
            raise failed[0]

    async def _seen(self, name: str, arguments: object, which: str) -> Observation:
        tool = self._tools.get(name)
        if tool is None:
            return _tool_error(f"There is no tool {name!r:.80}. Tools: {', '.join(self._tools) or 'none'}.")
        if not isinstance(arguments, Mapping):
            return _tool_error(f"The arguments must be a JSON object. Expected: {signature(tool)}.")
        try:
            if wrong := _wrong(self._validators[name], arguments):
                return _tool_error(f"{wrong}. Expected: {signature(tool)}.")
            if self.blocked is not None and self.blocked.refuses(arguments):
                return refusal()
        except RecursionError:
            return _tool_error(f"The arguments are nested too deeply. Expected: {signature(tool)}.")
        before = occurrence.set(which)
        try:
            seen = await tool.call(arguments)
        except ToolError as error:
            seen = _tool_error(str(error))
        finally:
            occurrence.reset(before)
        return seen if self.blocked is None else self.blocked.filtered(seen)

    def _cut(self, seen: Observation) -> Observation:
        most = self._max_chars
        if most is None or len(seen.text) <= most:
            return seen
        mark = f"\n[cut: the first {most} of {len(seen.text)} characters]"
        return dataclasses.replace(seen, text=seen.text[:most] + mark)


def signature(tool: Tool) -> str:
    """A tool's call in one line: search(query: string, k?: integer)."""
    properties = tool.parameters.get("properties", {})
    required = tool.parameters.get("required", [])
    assert isinstance(properties, Mapping) and isinstance(required, list | tuple), "ToolSet checks the schema"
    parts = (f"{key}{'' if key in required else '?'}: {_kind(value)}" for key, value in properties.items())
    return f"{tool.name}({', '.join(parts)})"


def _kind(schema: object) -> str:
    """A schema in one word, where one is enough."""
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(allowed := schema.get("enum"), list):
        return " | ".join(map(repr, allowed))
    if isinstance(kinds := schema.get("anyOf"), list):
        return " | ".join(map(_kind, kinds))
    kind = schema.get("type", "any")
    return " | ".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _tool_error(words: str) -> Observation:
    return Observation(words, status="tool_error")


def _clean(seen: Observation) -> Observation:
    """Half of a surrogate pair is no character, and a NUL ends texts elsewhere: neither reaches a tokenizer."""
    text = seen.text.encode("utf-8", "replace").decode() if not seen.text.isascii() else seen.text
    text = text.replace("\x00", "")
    return seen if text == seen.text else dataclasses.replace(seen, text=text)


def _validator(name: str, schema: Mapping[str, object]) -> Any:
    """Checks arguments against a tool's schema, which may refer to nothing outside itself."""
    try:
        from jsonschema import Draft202012Validator, SchemaError
    except ImportError:
        raise ConfigError('tools need jsonschema; pip install "mgrpo[research]"') from None
    if schema.get("type") != "object":
        raise ConfigError(
            f"tool {name!r}: its parameters are of type {schema.get('type')!r}, expected 'object'"
        )
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(
            f"tool {name!r}: its parameters are no JSON schema: {error.message:.{WORDS}}"
        ) from None
    if outside := [ref for ref in _references(schema) if not ref.startswith("#")]:
        raise ConfigError(
            f"tool {name!r}: its parameters refer to {outside[0]!r:.100}, outside of themselves"
        )
    return Draft202012Validator(schema)


def _references(tree: object) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, part in tree.items():
            if key in ("$ref", "$dynamicRef") and isinstance(part, str):
                yield part
            yield from _references(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _references(part)


def _wrong(validator: Any, arguments: Mapping[str, object]) -> str:
    """What is wrong with arguments in one short sentence without its full stop; empty: they fit."""
    from jsonschema.exceptions import best_match

    error = best_match(validator.iter_errors(dict(arguments)))
    if error is None:
        return ""
    place = ".".join(map(str, error.absolute_path))
    said = error.message if len(error.message) <= WORDS else f"{error.message[:WORDS]}..."
    return f"{place}: {said}" if place else said
