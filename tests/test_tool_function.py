"""@tool: what a function's hints and docstring say is what an agent is shown and what is checked."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.errors import ConfigError, InfrastructureError, ServiceError
from mgrpo.services.cassette import Cassette
from mgrpo.tools.base import Observation, Tool, ToolError, occurrence
from mgrpo.tools.function import FunctionTool, docstring, tool
from mgrpo.tools.registry import build_tools
from mgrpo.tools.toolset import ToolSet


@tool
async def area(
    country: str,
    unit: Literal["km2", "mi2"] = "km2",
    years: list[int] | None = None,
    scale: float = 1.0,
    *,
    exact: bool = False,
) -> str:
    """Area of a country.

    Counts lakes, too.

    Args:
        country: Its name in English,
            as the United Nations write it.
        unit (str): Unit of the answer.
        exact: Whether to round: never here.

    Returns:
        A number.
    """
    if country == "Atlantis":
        raise ToolError("There is no Atlantis.")
    return json.dumps([country, unit, years, scale, exact])


def call(made: Tool, arguments: object) -> Observation:
    return asyncio.run(ToolSet([made]).call(made.name, arguments))


def test_hints_and_docstring_make_the_schema() -> None:
    """Written out by hand: types, defaults, what is required, the words of each parameter, nothing else."""
    assert area.schema()["function"] == {
        "name": "area",
        "description": "Area of a country.\n\nCounts lakes, too.",
        "parameters": {
            "type": "object",
            "properties": {
                "country": {"type": "string", "description": "Its name in English, as the United Nations write it."},
                "unit": {"type": "string", "enum": ["km2", "mi2"], "default": "km2",
                         "description": "Unit of the answer."},
                "years": {
                    "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
                    "default": None,
                },
                "scale": {"type": "number", "default": 1.0},
                "exact": {"type": "boolean", "default": False, "description": "Whether to round: never here."},
            },
            "required": ["country"],
            "additionalProperties": False,
        },
    }  # fmt: skip
    assert area.pure and isinstance(area, Tool)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"country": "Fiji"}, ["Fiji", "km2", None, 1.0, False]),
        ({"country": "", "years": [1, 2.0], "scale": 3, "exact": True}, ["", "km2", [1, 2], 3.0, True]),
        ({"country": "é", "unit": "mi2", "years": None}, ["é", "mi2", None, 1.0, False]),
    ],
)
def test_a_function_gets_what_its_hints_say(arguments: Any, got: Any) -> None:
    """Defaults fill in, whole floats are integers where integers are asked, integers are floats where floats are."""
    seen = call(area, arguments)
    assert (json.loads(seen.text), seen.status) == (got, "ok")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "'country' is a required property"),
        ({"country": 1}, "country: 1 is not of type 'string'"),
        ({"country": "Fiji", "unit": "acre"}, "unit: 'acre' is not one of ['km2', 'mi2']"),
        ({"country": "Fiji", "years": ["1"]}, "years"),
        ({"country": "Fiji", "scale": "1"}, "scale: '1' is not of type 'number'"),
        ({"country": "Fiji", "exact": 1}, "exact: 1 is not of type 'boolean'"),
        ({"country": "Fiji", "city": "Suva"}, "'city' was unexpected"),
        ({"country": "Atlantis"}, "There is no Atlantis."),
        ({"country": "Fiji", "scale": 10**400}, "scale"),
    ],
)
def test_what_does_not_fit_is_the_policys_to_read(arguments: Any, words: str) -> None:
    """As is what the function itself says with ToolError."""
    seen = call(area, arguments)
    assert seen.status == "tool_error" and words in seen.text


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["country", "unit", "years", "scale", "exact", "self", "model_config"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.floats(), max_size=2),
        max_size=5,
    )
)
def test_no_arguments_raise(arguments: Any) -> None:
    """Whatever a policy gives, NaN and infinities too, is called or answered."""
    assert call(area, arguments).status in ("ok", "tool_error")


def test_a_tool_is_still_a_function() -> None:
    """Called as one it gives what the function gives; in @tool(...) its name and pureness are set."""

    @tool(name="now", pure=False)
    async def clock() -> Observation:
        """The time."""
        return Observation("12:00", links=("https://time.org",))

    assert (clock.name, clock.pure, clock.description) == ("now", False, "The time.")
    assert clock.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert call(clock, {}).links == ("https://time.org",)
    assert json.loads(str(asyncio.run(area("Fiji", exact=True))))[-1] is True


def test_answers_that_say_nothing_or_are_no_text() -> None:
    """White space alone is an empty observation; another type is the function's mistake and fails the rollout."""

    async def says(what: int) -> Any:
        return [" \n", "a", 5][what]

    made = FunctionTool(says)
    assert [call(made, {"what": n}).status for n in (0, 1)] == ["empty", "ok"]
    with pytest.raises(TypeError, match="'says' returned int"):
        call(made, {"what": 2})


def test_functions_that_are_no_tools_are_refused() -> None:
    """When they are made, naming function and parameter."""

    def blocks(a: str) -> str: ...

    async def untyped(a) -> str: ...  # type: ignore[no-untyped-def,empty-body]

    async def many(*words: str) -> str: ...  # type: ignore[empty-body]

    async def wrong(a: str) -> str:  # type: ignore[empty-body]
        """Args:
        b: not there
        """

    async def taken(model_dump: str) -> str: ...  # type: ignore[empty-body]

    for function, words in (
        (blocks, "'blocks' is no async function"),
        (untyped, "parameter 'a' has no type hint"),
        (many, "cannot be given by name"),
        (wrong, r"its docstring describes \['b'\], its parameters are \['a'\]"),
        (taken, "cannot be named 'model_dump'"),
    ):
        with pytest.raises(TypeError, match=words):
            FunctionTool(function)  # type: ignore[arg-type]


def test_docstrings_of_other_shapes() -> None:
    """None at all, without sections, and text that only looks like a parameter before the section begins."""

    async def bare() -> str: ...  # type: ignore[empty-body]

    async def plain(a: int) -> str:  # type: ignore[empty-body]
        """Note: a is a number.

        Args:
            a: first: then this
              a: and this

        Raises:
            ToolError: never
        """

    assert docstring(bare) == ("", {})
    assert docstring(plain) == ("Note: a is a number.", {"a": "first: then this a: and this"})


# -- type = "python" --

FILE = '''
from mgrpo.tools.base import Observation, Result, Tool, ToolError
from mgrpo.tools.function import tool

COUNT = [0]

@tool
async def double(n: int) -> str:
    """Twice a number."""
    COUNT[0] += 1
    if n < 0:
        raise ToolError("n is negative")
    return str(2 * n)

@tool(pure=False)
async def draw() -> str:
    """The next number."""
    COUNT[0] += 1
    return str(COUNT[0])

async def find(query: str) -> Observation:
    return Observation.of_results([Result("T", "https://x.org", query)])

def blocks(n: int) -> str:
    return ""

class Own(Tool):
    name, description, parameters = "own", "Mine.", {"type": "object"}

    async def call(self, arguments):
        return Observation("own")
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tools_of_a_test.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tools_of_a_test", raising=False)
    return str(tmp_path / "tools_of_a_test.py")


def test_a_config_takes_functions_by_name(module: str) -> None:
    """From a module on the path and from a file, which is loaded once; a Tool class is made."""
    names = ["tools_of_a_test:double", "tools_of_a_test:find", "tools_of_a_test:Own"]
    tools = build_tools({"mine": {"type": "python", "functions": names, "rename": {"own": "mine"}}})
    assert tools.names == ("double", "find", "mine")
    assert asyncio.run(tools.call("double", {"n": 4})).text == "8"
    options = {"type": "python", "functions": [f"{module}:draw"]}
    for expected in ("1", "2"):  # one module for both
        assert asyncio.run(build_tools({"m": options}).call("draw", {})).text == expected


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("double", 'is no "package.module:name" or "file.py:name"'),
        ("tools_of_a_test:triple", "has no async function or Tool 'triple'"),
        ("tools_of_a_test:blocks", "has no async function or Tool 'blocks'"),
        ("no_such_module:x", "module 'no_such_module' is not installed"),
        ("no_such_file.py:x", "no_such_file.py: no such file"),
    ],
)
def test_functions_that_are_not_there(module: str, target: str, words: str) -> None:
    """Entry, key and name are in the refusal."""
    with pytest.raises(ConfigError) as raised:
        build_tools({"mine": {"type": "python", "functions": [target]}})
    assert words in str(raised.value) and "tools.mine.functions" in str(raised.value)


def test_answers_are_recorded_and_replayed(module: str, tmp_path: Path) -> None:
    """A replay calls no function: pure tools have one recording for all, others one for each occurrence; what the
    policy was told with ToolError is recorded as well, and what was not asked then ends the run."""
    options = {"mine": {"type": "python", "functions": [f"{module}:{n}" for n in ("double", "draw", "find")]}}

    async def play(mode: str, *more: Any) -> list[Observation]:
        cassette = Cassette(tmp_path / "tools.cassette", mode)  # type: ignore[arg-type]
        tools = build_tools(options, cassette)
        calls = [("double", {"n": 4}, ""), ("double", {"n": -1}, "1"), ("find", {"query": "q"}, ""),
                 ("draw", {}, "a"), ("draw", {}, "b"), ("draw", {}, "a"), *more]  # fmt: skip
        try:
            return [await tools.call(name, given, occurrence=which) for name, given, which in calls]
        finally:
            await tools.close()
            cassette.close()

    first = asyncio.run(play("cached"))
    assert [seen.text for seen in first[:2]] == ["8", "n is negative"]
    drawn = [int(seen.text) for seen in first[3:]]
    assert drawn[1] == drawn[0] + 1 and drawn[2] == drawn[0]
    again = asyncio.run(play("replay"))
    assert [s.text for s in again] == [s.text for s in first] and {s.source for s in again} == {"replay"}
    assert [s.status for s in again] == [s.status for s in first] and again[2].results == first[2].results
    with pytest.raises(ServiceError, match="holds no answer of service 'mine'"):
        asyncio.run(play("replay", ("double", {"n": 5}, "")))


def test_a_failure_is_no_recording(tmp_path: Path) -> None:
    """A tool that could not answer is asked again."""
    from mgrpo.tools.function import Recorded

    answers: list[Any] = [InfrastructureError("503"), "there"]

    @tool
    async def flaky() -> str:
        """Fails once."""
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return str(answer)

    async def play() -> None:
        cassette = Cassette(tmp_path / "tools.cassette", "cached")
        tools = ToolSet([Recorded(flaky, "s", cassette)])
        with pytest.raises(InfrastructureError):
            await tools.call("flaky", {})
        for source in ("live", "cache"):
            seen = await tools.call("flaky", {})
            assert (seen.text, seen.source) == ("there", source)
        assert occurrence.get() == ""
        cassette.close()

    asyncio.run(play())
