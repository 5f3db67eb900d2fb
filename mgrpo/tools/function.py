"""Tools from Python functions.

    @tool
    async def area(country: str, unit: Literal["km2", "mi2"] = "km2") -> str:
        '''Area of a country.

        Args:
            country: Its name in English.
            unit: Unit of the answer.
        '''
        if country not in AREAS:
            raise ToolError(f"no country {country!r}")
        return ...

The type hints make the JSON schema of the arguments (what pydantic can check: str, int, float, bool, Literal, lists,
tables, Optional, defaults), the docstring the words. The function is awaited on the loop on which all rollouts of a
worker run: what blocks belongs into asyncio.to_thread. It returns a str or an Observation; ToolError is the policy's
matter, InfrastructureError fails the call, anything else fails the rollout.

`type = "python"` gives such functions to a run: `functions = ["package.module:area"]` or `["my_tools.py:area"]`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from mgrpo.errors import ConfigError
from mgrpo.plugins import errors_named
from mgrpo.tools.base import Observation, Tool, ToolError, occurrence, restored, stored
from mgrpo.tools.registry import ToolConfig

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

Function = Callable[..., Awaitable[str | Observation]]
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*$")
_PARAMETER = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")
_EXACT = 2.0**53  # a float below it that is whole is the integer that was meant


class FunctionTool(Tool):
    """A tool that awaits a function. It may be called as the function, too."""

    def __init__(self, function: Function, name: str | None = None, pure: bool = True) -> None:
        """Raises TypeError for a function that is not async, a parameter without a type hint, and a docstring that
        describes a parameter that there is not."""
        own = getattr(function, "__name__", type(function).__name__)
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"tool {own!r} is no async function; one that blocks would stop every rollout")
        self.function, self.name, self.pure = function, name or own, pure
        self.description, words = docstring(function)
        self._model = _arguments_model(self.name, function, words)
        self.parameters = _parameters(self._model)

    async def __call__(self, *args: Any, **kwargs: Any) -> str | Observation:
        return await self.function(*args, **kwargs)

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        try:
            # as JSON: there a list may be a tuple's, a text a Literal's, and a whole float an integer's
            given = self._model.model_validate_json(json.dumps(_whole(dict(arguments))), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise ToolError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
        values = {name: getattr(given, name) for name in type(given).model_fields}
        answer = await self.function(**values)
        if isinstance(answer, Observation):
            return answer
        if not isinstance(answer, str):
            raise TypeError(
                f"tool {self.name!r} returned {type(answer).__name__}, expected str or Observation"
            )
        return Observation(answer, status="ok" if answer.strip() else "empty")


@overload
def tool(function: Function, /) -> FunctionTool: ...
@overload
def tool(*, name: str | None = None, pure: bool = True) -> Callable[[Function], FunctionTool]: ...


def tool(
    function: Function | None = None, *, name: str | None = None, pure: bool = True
) -> FunctionTool | Callable[[Function], FunctionTool]:
    """Make a tool of an async function, with or without arguments of its own: @tool or @tool(name="area").

    name: by which agents call it; None: the function's. pure: the same arguments give the same answer, so that a
    cassette may serve one recording for all.
    """
    if function is not None:
        return FunctionTool(function)
    return lambda function: FunctionTool(function, name, pure)


def docstring(function: Function) -> tuple[str, dict[str, str]]:
    """Description and parameter -> words of a docstring in Google's style."""
    text: list[str] = []
    words: dict[str, str] = {}
    section, last, depth = "", "", 0
    for line in (inspect.getdoc(function) or "").splitlines():
        if found := _SECTION.match(line):
            section, last = found[1], ""
        elif not section:
            text.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            indent = len(line) - len(line.lstrip())
            found = _PARAMETER.match(line.strip())
            if found and (not last or indent <= depth):
                last, depth = found[1], indent
                words[last] = found[2].strip()
            elif last:
                words[last] = f"{words[last]} {line.strip()}".strip()
    return "\n".join(text).strip(), words


def _arguments_model(name: str, function: Function, words: Mapping[str, str]) -> type[BaseModel]:
    """A model whose fields are the function's parameters."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    if unknown := sorted(words.keys() - parameters.keys()):
        raise TypeError(
            f"tool {name!r}: its docstring describes {unknown}, its parameters are {[*parameters]}"
        )
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"tool {name!r}: parameter {parameter} cannot be given by name")
        if key not in hints:
            raise TypeError(f"tool {name!r}: parameter {key!r} has no type hint")
        if key.startswith("_") or hasattr(BaseModel, key):
            raise TypeError(f"tool {name!r}: a parameter cannot be named {key!r}")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[key] = (hints[key], Field(default, description=words.get(key)))
    return create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def _parameters(model: type[BaseModel]) -> dict[str, object]:
    """The JSON schema of a model without the titles that pydantic makes of names."""
    schema = cast(dict[str, object], _untitled(model.model_json_schema()))
    schema.setdefault("properties", {})
    return schema


def _untitled(tree: object, names: bool = False) -> object:
    """names: the keys of this table are names of parameters, and "title" may be one."""
    if isinstance(tree, Mapping):
        kept = {
            key: part for key, part in tree.items() if names or key != "title" or not isinstance(part, str)
        }
        return {
            key: part if key in ("default", "enum", "const") and not names
            else _untitled(part, not names and key in ("properties", "$defs"))
            for key, part in kept.items()
        }  # fmt: skip
    return [_untitled(part) for part in tree] if isinstance(tree, list) else tree


def _whole(tree: object) -> object:
    """A tree in which floats without a fraction are integers, as JSON Schema counts them."""
    if isinstance(tree, float) and tree.is_integer() and abs(tree) < _EXACT:
        return int(tree)
    if isinstance(tree, Mapping):
        return {key: _whole(part) for key, part in tree.items()}
    return [_whole(part) for part in tree] if isinstance(tree, list | tuple) else tree


class Recorded(Tool):
    """A tool whose answers a cassette records and replays."""

    def __init__(self, tool: Tool, service: str, cassette: Cassette) -> None:
        self._tool, self._service, self._cassette = tool, service, cassette
        self.name, self.description, self.parameters = tool.name, tool.description, tool.parameters
        self.pure, self.version = tool.pure, tool.version

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        async def live() -> dict[str, object]:
            try:
                return stored(await self._tool.call(arguments))
            except ToolError as error:
                return stored(Observation(str(error), status="tool_error"))

        request = {"tool": self.name, "arguments": dict(arguments)}
        answer, source = await self._cassette.through(
            self._service, request, live, pure=self.pure, occurrence=occurrence.get()
        )
        return restored(answer, source)

    async def preflight(self) -> None:
        await self._tool.preflight()

    async def close(self) -> None:
        await self._tool.close()


class PythonConfig(ToolConfig):
    """type = "python": tools in Python."""

    type: Literal["python"]
    functions: list[str]
    """"package.module:name" or "folder/file.py:name" of each: what @tool made, an async function, or a Tool class that
    is made without arguments."""
    recorded: bool = True
    """Whether the run's cassette records their answers."""

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        made = [_python_tool(f"tools.{name}.functions", target) for target in self.functions]
        if cassette is None or not self.recorded:
            return made
        return [Recorded(tool, name, cassette) for tool in made]


def _python_tool(where: str, target: str) -> Tool:
    """The tool that a name stands for; its module is imported only now. Raises ConfigError."""
    module_name, colon, name = target.rpartition(":")
    if not (module_name and colon and name):
        raise ConfigError(f'{where}: {target!r} is no "package.module:name" or "file.py:name"')
    with errors_named(f"{where} {target!r}"):
        try:
            if module_name.endswith(".py"):
                module = _file(Path(module_name), where)
            else:
                module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{where} {target!r}: module {error.name!r} is not installed") from error
        found = getattr(module, name, None)
        if isinstance(found, Tool):
            return found
        if isinstance(found, type) and issubclass(found, Tool):
            return found()
        if inspect.iscoroutinefunction(found):
            return FunctionTool(found)
    raise ConfigError(f"{where}: {module_name} has no async function or Tool {name!r}")


def _file(path: Path, where: str) -> Any:
    """The module in a file, loaded once in a process. where: the config's key."""
    if not path.is_file():
        raise ConfigError(f"{where}: {path}: no such file")
    name = f"mgrpo_tools_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, "it ends with .py"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
