"""Calls of remote tools as policies make them: odd, blocked, long, recorded; and the keys of their configs."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.errors import ConfigError
from mgrpo.services.cassette import Cassette
from mgrpo.tools.base import Observation
from mgrpo.tools.registry import build_tools
from mgrpo.tools.remote import address, links_of
from tests.fake_services import Asked, FakeService
from tests.remote_kit import (
    CASES,
    FIJI,
    KEY,
    TONGA,
    VISITS,
    call,
)


@pytest.mark.parametrize(
    ("case", "arguments", "words"),
    [
        ("serper search", {"query": " \t\x00"}, "empty"),
        ("serper search", {"query": "a" * 1001}, "at most 1000 characters."),
        ("brave search", {"query": "a " * 51}, "400 characters and 50 words"),
        ("mrlx search", {"query": ""}, "empty"),
        ("mrlx visit", {"goal": ""}, "empty"),
        ("jina visit", {"part": 2}, "There is no part 2: the page has 1."),
        ("search_r1 visit", {"url": "\n"}, "no address"),
        *(
            ("jina visit", {"url": url}, "no address")
            for url in (
                *("ftp://x.org/", "file:///etc/passwd", "http://localhost/", "http://127.0.0.1:80/", "x"),
                *("http://169.254.169.254/latest", "http://[::1]/", "https://a@x.org/", "http://x.org:z/"),
                *("https://x.org/" + "a" * 2000, "http://db.internal/", "https://x.org\\@y.org", ""),
            )
        ),
    ],
)
def test_what_a_policy_asks_for_wrongly(case: str, arguments: dict[str, object], words: str) -> None:
    """A tool_error that says what is wrong; nothing is requested but the page whose parts are counted."""
    with FakeService(CASES[case][3]) as service:
        [seen] = call(service, case, arguments)
    assert isinstance(seen, Observation) and seen.status == "tool_error" and words in seen.text
    assert len(service.requests) == ("part" in arguments)


@pytest.mark.parametrize("case", CASES)
def test_any_text_can_be_asked_for(case: str) -> None:
    """Halves of surrogate pairs, control characters and what an address escapes reach the service as text."""
    odd, page = "Ünï \ud800 \x01 %zz ?&=#'\"", "https://x.org/Ünï\ud800%zz?a&=b'#c"
    asked: dict[str, object] = {"url": page} if "visit" in case else {"query": odd}
    with FakeService(CASES[case][3]) as service:
        [seen] = call(service, case, asked)
    assert isinstance(seen, Observation) and seen.status == "ok", seen
    said = json.dumps([service.requests[0].path, dict(service.requests[0].query)], ensure_ascii=False)
    if service.requests[0].body:
        said = json.dumps(service.requests[0].json, ensure_ascii=False)
    assert "Ünï" in said and "\\u0001" not in said


@pytest.mark.parametrize("case", [*VISITS, "mrlx visit"])
def test_blocked_addresses_are_never_requested(case: str) -> None:
    """Nor are pages shown that were found at one."""
    with FakeService(CASES[case][3]) as service:
        [seen] = call(service, case, {"url": "https://www.blocked.org/a"}, blocked={"hosts": ["blocked.org"]})
    assert seen.status == "tool_error" and seen.blocked == 1 and not service.requests


def test_blocked_results_and_redirects_are_not_shown() -> None:
    """A result is left out; a page that moved to a blocked address, or holds a blocked text, is not shown."""
    with FakeService(CASES["serper search"][3]) as service:
        [seen] = call(service, "serper search", blocked={"urls": ["x.org/fj"]})
    assert seen.text == f"[1] Tonga\n{TONGA}" and seen.blocked == 1
    moved = {"data": {"title": "t", "url": "https://blocked.org/", "content": "the gold answer"}}
    with FakeService(moved) as service:
        [by_host] = call(service, "jina visit", blocked={"hosts": ["blocked.org"]})
        [by_text] = call(service, "jina visit", blocked={"texts": ["gold  ANSWER"]})
        [shown] = call(service, "jina visit", blocked={"texts": ["canary"]})
    assert "gold" not in by_host.text + by_text.text and by_host.blocked == by_text.blocked == 1
    assert shown.text == "t\nhttps://blocked.org/\n\nthe gold answer"


def test_a_page_of_ten_megabytes_is_cut(tmp_path: Path) -> None:
    """It is kept up to max_chars, on the cassette too, and read in parts; the last says that it is cut."""
    content = "word " * 2_000_000
    cassette = Cassette(tmp_path / "c.sqlite", "cached")
    with FakeService({"data": {"title": "Long", "url": FIJI, "content": content}}) as service:
        first, last, beyond = call(
            service, "jina visit", {}, {"part": 11}, {"part": 12}, cassette=cassette, max_chars=43_000
        )
    cassette.close()
    assert first.text.startswith(f"Long\n{FIJI}\nPart 1 of 11\n\nword word") and len(first.text) < 4100
    assert last.text.endswith("word\n\n[cut: the first 43000 characters of the page]")
    assert beyond.text == "There is no part 12: the page has 11." and len(service.requests) == 1
    assert (tmp_path / "c.sqlite").stat().st_size < 300_000


def test_recordings_serve_other_runs(tmp_path: Path) -> None:
    """A replay asks no service and needs no key; calls that are not pure are recorded one by one."""
    counted = iter(range(9))
    with FakeService(lambda asked: {"organic": [{"link": FIJI, "title": str(next(counted))}]}) as service:
        for pure, shown in ((True, "00"), (False, "12")):
            for mode, sources in (
                ("cached", "live cache" if pure else "live live"),
                ("replay", "replay replay"),
            ):
                cassette = Cassette(tmp_path / f"{pure}.sqlite", mode)  # type: ignore[arg-type]
                found = call(service, "serper search", {}, {}, cassette=cassette, pure=pure)
                cassette.close()
                assert "".join(seen.text[4] for seen in found) == shown
                assert " ".join(seen.source for seen in found) == sources
    assert len(service.requests) == 3


def test_a_key_is_asked_for_before_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the name of its variable; a replay needs none."""
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    tools = build_tools({"web": {"type": "serper"}})
    with pytest.raises(ConfigError, match=r"tools.web.key_env: .* SERPER_API_KEY is not set"):
        asyncio.run(tools.preflight())
    made = Cassette(tmp_path / "c.sqlite", "record")
    assert len(made) == 0
    made.close()
    asyncio.run(
        build_tools({"web": {"type": "serper"}}, Cassette(tmp_path / "c.sqlite", "replay")).preflight()
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"type": "search_r1"}, "tools.web.url: Field required"),
        ({"type": "search_r1", "url": "http://h/retrieve"}, "leave out /retrieve"),
        ({"type": "mrlx", "url": "http://h/retrieve"}, "leave out /retrieve"),
        ({"type": "mrlx", "url": "http://h", "failures": ["("]}, "is no regular expression"),
        ({"type": "mrlx", "url": "http://h", "unreadable": [""]}, "would match every text"),
        ({"type": "serper", "k": 0}, "tools.web.k"),
        ({"type": "serper", "kk": 1}, "tools.web.kk is unknown, expected one of answer_box"),
        ({"type": "jina", "key_env": KEY}, "expected the name of an environment variable"),
        ({"type": "brave", "headers": {"X-API-Key": KEY}}, "would stand in the run's folder"),
    ],
)
def test_wrong_keys_are_named(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tools({"web": keys})
    assert words in str(caught.value)


@given(st.text(max_size=60) | st.from_regex(r"https?://[a-z.:/@\[\]0-9#\\ ]{0,30}"))
def test_an_address_is_one_or_none(text: str) -> None:
    """Whatever is let through names a host of the web by http or https, and is not changed by a second reading."""
    url = address(text)
    assert url == "" or (re.match(r"(?i)https?://[^/@\s\\]+", url) and address(url) == url)


def test_links_are_named_once() -> None:
    """Without the signs that stand around them in Markdown and sentences."""
    text = "[a](https://x.org/a) https://x.org/b, <https://x.org/a>. **http://y.org/?q=1&r=2**"
    assert links_of(text) == ("https://x.org/a", "https://x.org/b", "http://y.org/?q=1&r=2")


def test_tools_of_one_entry_share_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its concurrency holds for all of them together."""
    monkeypatch.setenv("TAVILY_API_KEY", KEY)

    def answer(asked: Asked) -> object:
        return CASES["tavily visit" if asked.path == "/extract" else "tavily search"][3]

    with FakeService(answer) as service:

        async def main() -> list[Observation]:
            tools = build_tools({"web": {"type": "tavily", "url": service.url, "concurrency": 1}})
            work = [
                tools.call("search", {"query": "q"}),
                tools.call("visit", {"url": FIJI}),
                tools.call("visit", {"url": TONGA}),
            ]
            try:
                return list(await asyncio.gather(*work))
            finally:
                await tools.close()

        seen = asyncio.run(main())
    assert [one.status for one in seen] == ["ok"] * 3 and service.most_open == 1
