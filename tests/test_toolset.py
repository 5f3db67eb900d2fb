"""Tool sets: whatever a policy asks for is an observation, what is blocked stays unseen, and configs are checked."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo import plugins
from mgrpo.errors import ConfigError, InfrastructureError, ServiceError
from mgrpo.tools.base import Observation, Result, Tool, ToolError, listed, occurrence, restored, stored
from mgrpo.tools.blocklist import BlockConfig, BlockList
from mgrpo.tools.corpus import Corpus, Page
from mgrpo.tools.registry import ToolConfig, build_tools
from mgrpo.tools.toolset import ToolSet, signature

PAGE = Page("https://a.org/1", "Fiji", "Suva is the capital of Fiji.")


class Echo(Tool):
    """Answers with what it is made with, or raises it, and remembers how it was called."""

    def __init__(self, answer: Observation | Exception | None = None, name: str = "echo") -> None:
        self.name, self.description, self.answer = name, "Says it back.", answer
        self.parameters = {
            "type": "object",
            "properties": {
                "text": {"type": "string", "maxLength": 8},
                "times": {"type": "integer", "minimum": 1},
                "kind": {"enum": ["a", "b"]},
            },
            "required": ["text"],
            "additionalProperties": False,
        }
        self.calls: list[Mapping[str, object]] = []
        self.closed = 0

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        self.calls.append(arguments)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or Observation(str(arguments["text"]))

    async def close(self) -> None:
        self.closed += 1


def call(tools: ToolSet, name: str, arguments: object, **options: Any) -> Observation:
    return asyncio.run(tools.call(name, arguments, **options))


def blocking(**rules: list[str]) -> BlockList:
    return BlockList(BlockConfig(**rules))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("find", {}, "no tool 'find'. Tools: echo."),
        ("", {}, "no tool ''"),
        ("echo", None, "must be a JSON object"),
        ("echo", [1], "must be a JSON object"),
        ("echo", '{"text": "a"}', "must be a JSON object"),
        ("echo", {}, "'text' is a required property"),
        ("echo", {"text": 5}, "text: 5 is not of type 'string'"),
        ("echo", {"text": "a", "times": 0}, "times: 0 is less than the minimum of 1"),
        ("echo", {"text": "a", "times": True}, "times: True is not of type 'integer'"),
        ("echo", {"text": "a", "kind": "c"}, "kind: 'c' is not one of ['a', 'b']"),
        ("echo", {"text": "a", "txt": 1}, "'txt' was unexpected"),
    ],
)
def test_what_a_policy_asks_for_wrongly_is_an_observation(name: str, arguments: object, words: str) -> None:
    """It is a tool_error with words that help, the tool is not called, and nothing is raised."""
    echo = Echo()
    seen = call(ToolSet([echo]), name, arguments)
    assert seen.status == "tool_error" and words in seen.text and not echo.calls
    if name == "echo":
        assert "echo(text: string, times?: integer, kind?: 'a' | 'b')" in seen.text
    assert len(seen.text) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=6), part, max_size=3),
    max_leaves=8,
)
FITTING = st.fixed_dictionaries(
    {"text": st.text(max_size=8)}, optional={"times": st.integers(1, 9), "kind": st.sampled_from("ab")}
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        JSON, FITTING, st.dictionaries(st.sampled_from(["text", "times", "kind", "x"]), JSON, max_size=3)
    )
)
def test_a_tool_is_called_exactly_with_arguments_that_fit(arguments: Any) -> None:
    """Against the schema written out by hand; nothing that JSON can say raises."""

    def whole(value: object) -> bool:
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )

    fits = (
        isinstance(arguments, dict)
        and arguments.keys() <= {"text", "times", "kind"}
        and isinstance(arguments.get("text"), str)
        and len(arguments["text"]) <= 8
        and ("times" not in arguments or (whole(arguments["times"]) and arguments["times"] >= 1))
        and ("kind" not in arguments or arguments["kind"] in ("a", "b"))
    )
    echo = Echo()
    seen = call(ToolSet([echo], blocked=blocking(hosts=["x.org"])), "echo", arguments)
    assert (seen.status != "tool_error") == fits and echo.calls == [arguments] * fits


def test_arguments_of_any_depth_are_an_observation() -> None:
    """A policy that opens brackets without end meets no recursion limit of ours."""
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    loose = Echo()
    loose.parameters = {"type": "object"}
    seen = call(ToolSet([loose], blocked=blocking(hosts=["x.org"])), "echo", {"text": deep})
    assert seen.status == "tool_error" and "nested too deeply" in seen.text and not loose.calls


def test_three_kinds_of_failure() -> None:
    """ToolError is the policy's to read; infrastructure and fatal failures pass through with their type."""
    seen = call(ToolSet([Echo(ToolError("no such page"))]), "echo", {"text": ""})
    assert (seen.status, seen.text) == ("tool_error", "no such page")
    for error in (InfrastructureError("503"), ServiceError("key refused"), KeyError("a bug")):
        with pytest.raises(type(error)) as raised:
            call(ToolSet([Echo(error)]), "echo", {"text": ""})
        assert raised.value is error


def test_an_observation_is_cut_cleaned_timed_and_named() -> None:
    """Half surrogate pairs and NULs go, what is too long ends with a mark, seconds are measured where the tool gives
    none, and the digest is of the text that the policy reads."""
    tools = ToolSet([Echo(Observation("a\ud800\x00é" + "b" * 100))], max_chars=10)
    seen = call(tools, "echo", {"text": ""})
    assert seen.text == "a?é" + "b" * 7 + "\n[cut: the first 10 of 103 characters]"
    assert seen.digest == hashlib.sha256(seen.text.encode()).hexdigest()[:16] and seen.seconds > 0
    seen.text.encode()
    assert call(ToolSet([Echo(Observation("a", seconds=2.5))]), "echo", {"text": ""}).seconds == 2.5
    with pytest.raises(ConfigError, match="max_chars = 0"):
        ToolSet([], max_chars=0)


def test_results_are_numbered_lines() -> None:
    """Title, address and snippet, each on a line of its own, whatever white space they hold; none is an empty
    observation in words; and an observation survives a recording."""
    results = [Result("A\nB", "https://a.org"), Result("", "u", "two\t words")]
    assert listed(results) == "[1] A B\nhttps://a.org\n\n[2] \nu\ntwo words"
    found = Observation.of_results(results)
    assert found.status == "ok" and found.links == ("https://a.org", "u")
    nothing = Observation.of_results([])
    assert (nothing.status, nothing.text) == ("empty", "No results.")
    for seen in (found, nothing):
        again = restored(json.loads(json.dumps(stored(seen))), "replay")
        assert stored(again) == stored(seen) and again.source == "replay"
    for broken in (None, {}, {"text": "a"}, {"text": "a", "links": [], "status": "x", "results": []}):
        with pytest.raises(ValueError, match="stored observation"):
            restored(broken, "cache")


def test_a_call_that_is_not_pure_knows_which_it_is() -> None:
    """The occurrence stands while the tool is called, in each of several calls at once, and not behind it."""
    seen: list[str] = []

    class Asks(Echo):
        async def call(self, arguments: Mapping[str, object]) -> Observation:
            await asyncio.sleep(0)
            seen.append(occurrence.get())
            return Observation("")

    async def both() -> None:
        tools = ToolSet([Asks()])
        await asyncio.gather(*(tools.call("echo", {"text": ""}, occurrence=f"turn {n}") for n in range(3)))
        assert occurrence.get() == ""

    asyncio.run(both())
    assert sorted(seen) == ["turn 0", "turn 1", "turn 2"]


def test_a_set_is_what_its_tools_say() -> None:
    """Schemas as chat templates take them, subsets, versions; names and schemas that no agent could use are refused."""
    first, second = Echo(), Echo(name="other")
    second.version = "v1"
    tools = ToolSet([first, second])
    assert tools.names == ("echo", "other") and tools.versions == {"other": "v1"}
    assert tools.schemas()[0] == {
        "type": "function",
        "function": {"name": "echo", "description": "Says it back.", "parameters": first.parameters},
    }
    assert tools.only(["other"]).names == ("other",)
    with pytest.raises(ConfigError, match="no tool 'web'; there are echo, other"):
        tools.only(["web"])
    with pytest.raises(ConfigError, match="two tools are named 'echo'"):
        ToolSet([first, Echo()])
    with pytest.raises(ConfigError, match="'a-b'"):
        ToolSet([Echo(name="a-b")])
    for parameters, words in (
        ({"type": "string"}, "of type 'string', expected 'object'"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "no JSON schema"),
        ({"type": "object", "properties": {"a": {"$ref": "https://x.org/s"}}}, "outside of themselves"),
    ):
        bad = Echo()
        bad.parameters = parameters
        with pytest.raises(ConfigError, match=words):
            ToolSet([bad])
    within = Echo()
    within.parameters = {
        "type": "object",
        "$defs": {"n": {"type": "integer"}},
        "properties": {"a": {"$ref": "#/$defs/n"}},
    }
    assert "not of type 'integer'" in call(ToolSet([within]), "echo", {"a": "x", "text": ""}).text
    assert signature(within) == "echo(a?: any)"


def test_every_tool_is_closed() -> None:
    """Also behind one whose closing fails, which is raised in the end."""

    class Stuck(Echo):
        async def close(self) -> None:
            raise RuntimeError("stuck")

    last = Echo(name="last")
    with pytest.raises(RuntimeError, match="stuck"):
        asyncio.run(ToolSet([Stuck(), last]).close())
    assert last.closed == 1


# -- what is blocked --

BLOCKED = [
    "https://huggingface.co/datasets/gaia",
    "HTTP://WWW.HuggingFace.co",
    "huggingface.co",
    "huggingface.co/datasets",
    "https://cdn.huggingface.co:443/a?b#c",
    "https://user:pw@huggingface.co./x",
    "https:\\\\huggingface.co\\x",
    "https://ｈｕｇｇｉｎｇｆａｃｅ.co/x",
    "https://web.archive.org/web/2024/https://huggingface.co/datasets/gaia",
    "https://r.jina.ai/https://huggingface.co/x",
    "https://x.org/?u=https%3A%2F%2Fhuggingface.co%2Fx",
    "https://x.org/?u=https%253A%252F%252Fhuggingface.co",
    "https://hugging%66ace.co/x",
    "//huggingface.co/x",
    "see https://huggingface.co/x please",
    "https://github.com/gaia-team/answers/blob/main",
    "https://GitHub.com/gaia-team/answers",
    "github.com/gaia%2dteam/answers",
    "https://y.org/GAIA%20Benchmark",
]
FREE = [
    "https://huggingface.company/x",
    "https://nothuggingface.co",
    "https://x.org/huggingface.co",
    "https://x.org/?q=huggingface.co",
    "https://github.com/gaia-team2/answers",
    "who runs huggingface.co and why",
    "gaia benchmark",
    "",
    "https://",
    "https://[bad",
]
RULES = {"hosts": ["huggingface.co"], "urls": ["github.com/gaia-team/*"], "texts": ["gaia benchmark"]}


def test_addresses_are_blocked_in_every_spelling() -> None:
    """Hosts with subdomains, patterns, texts in addresses; in capitals, full width, escaped, inside other addresses."""
    rules = blocking(**RULES)
    assert [url for url in BLOCKED if rules.rule_of_url(url) is None] == []
    assert [url for url in FREE if rules.rule_of_url(url) is not None] == []
    assert blocking(hosts=["*.X.org"]).rule_of_url("https://a.x.org/") == "*.X.org"
    assert blocking(hosts=["https://www.x.org/"]).rule_of_url("x.org") == "https://www.x.org/"
    assert blocking(urls=["https://x.org/A*"]).rule_of_url("http://www.X.org/%41b") == "https://x.org/A*"


def test_a_blocked_address_is_refused_before_the_call() -> None:
    """Wherever it stands in the arguments; the tool is not called, the hit is counted by its rule."""
    loose, rules = Echo(), blocking(**RULES)
    loose.parameters = {"type": "object"}
    tools = ToolSet([loose], blocked=rules)
    for arguments in (
        {"u": "https://huggingface.co"},
        {"a": [{"b": "huggingface.co/x"}]},
        {"huggingface.co": 1},
    ):
        seen = call(tools, "echo", {"text": "", **arguments})
        assert (seen.status, seen.blocked) == ("tool_error", 1) and "blocked" in seen.text
        assert "huggingface" not in seen.text
    assert not loose.calls and rules.hits == {"huggingface.co": 3}


def test_blocked_results_never_were() -> None:
    """A search shows what is left, numbered anew, and nothing where nothing is left; a page with a blocked text is
    refused; links to blocked addresses are not handed on."""
    good, bad = Result("T", "https://x.org/1"), Result("G", "https://huggingface.co/1")
    named = Result("The GAIA  benchmark", "https://y.org")
    rules = blocking(**RULES)

    def searched(*results: Result) -> Observation:
        return call(
            ToolSet([Echo(Observation.of_results(results, "cache"))], blocked=rules), "echo", {"text": ""}
        )

    seen = searched(bad, good, named)
    assert seen.text == "[1] T\nhttps://x.org/1" and seen.links == ("https://x.org/1",)
    assert (seen.blocked, seen.status, seen.source) == (2, "ok", "cache")
    assert rules.hits == {"huggingface.co": 1, "gaia benchmark": 1}
    assert searched(bad).status == "empty" and searched(bad).text == "No results."
    assert searched(good).blocked == 0
    page = Observation("About the\nGaia benchmark.", ("https://x.org",))
    seen = call(ToolSet([Echo(page)], blocked=rules), "echo", {"text": ""})
    assert (seen.status, seen.blocked, seen.links) == ("tool_error", 1, ()) and "Gaia" not in seen.text
    linked = Observation("text", ("https://x.org", "https://huggingface.co/a"))
    assert call(ToolSet([Echo(linked)], blocked=rules), "echo", {"text": ""}).links == ("https://x.org",)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.sampled_from(BLOCKED[:1] + BLOCKED[4:6]))
def test_no_text_breaks_the_rules_or_hides_an_address(text: str, url: str) -> None:
    """Any text can be looked at, and an address behind a space is found whatever stands before it."""
    rules = blocking(**RULES)
    rules.rule_of_url(text)
    rules.rule_of_text(text)
    assert rules.rule_of_url(f"{text} {url}") is not None


@pytest.mark.parametrize("piece", ["a", ".", "a.", "/", "http://", "a:/", "%25", "a.b ", "\\", "@", ":"])
def test_a_policy_that_repeats_itself_costs_little(piece: str) -> None:
    """50,000 characters are looked through in linear time: this would not end otherwise."""
    text = piece * (50_000 // len(piece)) + " x"
    assert blocking(**RULES).rule_of_url(text) is None
    assert blocking(**RULES).rule_of_url(f"{text} https://huggingface.co") == "huggingface.co"


def test_a_rule_that_blocks_everything_is_refused() -> None:
    """An empty text stands in every page."""
    for rules in ({"hosts": [""]}, {"texts": [" "]}, {"urls": ["*/*"]}):
        with pytest.raises(ConfigError, match="would block everything"):
            blocking(**rules)


# -- from a config --


class OwnConfig(ToolConfig):
    type: str
    words: list[str] = ["own"]  # noqa: RUF012
    fails: Literal["", "value"] = ""

    def tools(self, name: str, cassette: object) -> Sequence[Tool]:
        if self.fails:
            raise ValueError("no such word")
        return [Echo(name=word) for word in self.words]


OWN = f"{__name__}:OwnConfig"


def test_a_config_names_its_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in types, classes on the path and of installed packages; tools are chosen and renamed."""
    Corpus.build(tmp_path / "c.sqlite", [PAGE]).close()
    corpus = {"type": "corpus", "path": str(tmp_path / "c.sqlite"), "k": 1}
    point = EntryPoint(name="own", value=OWN, group="mgrpo.tools")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "mgrpo.tools" else [])
    tools = build_tools(
        {
            "wiki": {**corpus, "rename": {"search": "wiki_search"}},
            "again": {**corpus, "include": ["search"]},
            "mine": {"type": OWN, "words": ["a", "b", "c"], "exclude": ["b"]},
            "packaged": {"type": "own"},
        },
        blocked={"hosts": ["b.org"]},
        max_chars=20,
    )
    assert tools.names == ("wiki_search", "visit", "search", "a", "c", "own")
    assert set(tools.versions) == {"wiki_search", "visit", "search"}

    async def use() -> None:
        assert (await tools.call("wiki_search", {"query": "capital"})).text.startswith(
            "[1] Fiji\nhttps://a.o\n[cut"
        )
        assert (await tools.call("visit", {"url": "https://b.org/1"})).blocked == 1
        await tools.close()

    asyncio.run(use())
    with pytest.raises(ConfigError, match="it is closed"):
        asyncio.run(tools.call("search", {"query": "capital"}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"a": {}}, 'tools.a needs type = "..."'),
        ({"a": {"type": 3}}, "tools.a needs type"),
        ({"a": {"type": "none"}}, "tools.a.type 'none' is unknown, expected brave, corpus,"),
        (
            {"a": {"type": OWN, "wrds": []}},
            "tools.a.wrds is unknown, expected one of exclude, fails, include, rename",
        ),
        ({"a": {"type": OWN, "words": "x"}}, "tools.a.words: Input should be a valid list"),
        ({"a": {"type": OWN, "fails": "value"}}, "tools.a: ValueError: no such word"),
        ({"a": {"type": OWN, "include": ["x"]}}, "tools.a.include: no tool 'x'; it has own"),
        ({"a": {"type": OWN, "rename": {"x": "y"}}}, "tools.a.rename: no tool 'x'"),
        ({"a": {"type": OWN}, "b": {"type": OWN}}, "tools.b and tools.a both have a tool 'own'"),
        ({"a": {"type": OWN, "rename": {"own": "x y"}}}, "'x y'"),
        ({"a": {"type": "corpus", "path": "nowhere.sqlite"}}, "nowhere.sqlite: no such file"),
        ({"a": {"type": "corpus", "path": "x", "k": 0}}, "tools.a.k: Input should be greater"),
        ({"a": {"type": f"{__name__}:Echo"}}, "no ToolConfig class 'Echo'"),
    ],
)
def test_a_config_that_is_wrong_is_refused_by_name(options: Any, words: str) -> None:
    """Entry and key are named."""
    with pytest.raises(ConfigError) as raised:
        build_tools(options)
    assert words in str(raised.value)


def test_the_block_list_of_a_config_is_checked() -> None:
    """A key that is none would silently block nothing."""
    with pytest.raises(ConfigError, match=r"blocked\.host is unknown, expected one of hosts, texts, urls"):
        build_tools({}, blocked={"host": ["x.org"]})
