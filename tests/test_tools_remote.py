"""Clients of searches and readers against servers on real sockets: requests, answers, and what becomes of failures."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.config.settings import Settings
from mgrpo.errors import ConfigError, InfrastructureError, ServiceError
from mgrpo.plugins import find_class
from mgrpo.services import counters
from mgrpo.services.cassette import Cassette
from mgrpo.services.failures import ServiceFailure
from mgrpo.tools.base import Observation
from mgrpo.tools.registry import BUILT_IN, GROUP, ToolConfig, build_tools
from mgrpo.tools.remote import UNREADABLE, address, links_of
from mgrpo.tools.search_r1 import split_contents
from tests.fake_services import Asked, FakeService, Raw

KEY = "sk-very-secret"
FIJI, TONGA = "https://x.org/fj", "https://x.org/to"
LISTED = f"[1] Fiji\n{FIJI}\nIts capital is Suva.\n\n[2] Tonga\n{TONGA}"
PAGE = f"Fiji\n{FIJI}\n\nIts capital is [Suva](https://x.org/suva)."
BODY = "Its capital is [Suva](https://x.org/suva)."
MRLX_SEARCH = f"A Google search found 1 results:\n\n1. [Fiji]({FIJI})\nIts capital is Suva."
MRLX_VISIT = (
    f"The useful information in {FIJI} for user goal capital as follows: \n\nEvidence in page: \nSuva\n\n"
)


def hits(url: str, text: str, title: str = "title") -> list[dict[str, object]]:
    """Two results as an API spells them: the second without text."""
    return [
        {title: "Fiji", url: FIJI, text: "Its capital is Suva."},
        {title: "Tonga", url: TONGA, text: None},
    ]


DOCUMENTS: list[dict[str, Any]] = [
    {"id": 7, "url": FIJI, "contents": '"Fiji"\nIts capital is Suva.'},
    {"id": TONGA, "contents": "Tonga\n"},
]
# client and tool -> (type, further keys, arguments, answer, text that the agent sees)
CASES: dict[str, tuple[str, dict[str, object], dict[str, object], object, str]] = {
    "serper search": ("serper", {}, {"query": "q"}, {"organic": hits("link", "snippet")}, LISTED),
    "brave search": (
        *("brave", {}, {"query": "q"}),
        *({"type": "search", "web": {"results": hits("url", "description")}}, LISTED),
    ),
    "searxng search": ("searxng", {}, {"query": "q"}, {"results": hits("url", "content")}, LISTED),
    "tavily search": ("tavily", {}, {"query": "q"}, {"results": hits("url", "content")}, LISTED),
    "tavily visit": (
        *("tavily", {}, {"url": FIJI}),
        *({"results": [{"url": FIJI, "title": "Fiji", "raw_content": BODY}], "failed_results": []}, PAGE),
    ),
    "jina visit": (
        *("jina", {}, {"url": FIJI}),
        *({"code": 200, "data": {"title": "Fiji", "url": FIJI, "content": BODY}}, PAGE),
    ),
    "search_r1 search": (
        *("search_r1", {}, {"query": "q"}),
        *({"result": [[{"document": d, "score": 1.5} for d in DOCUMENTS]]}, LISTED),
    ),
    "search_r1 visit": (
        *("search_r1", {"visit": True}, {"url": FIJI}),
        *({"result": [{"contents": f'"Fiji"\n{BODY}'}]}, PAGE),
    ),
    "mrlx search": ("mrlx", {}, {"query": "q"}, {"result": MRLX_SEARCH}, MRLX_SEARCH),
    "mrlx visit": (
        *("mrlx", {}, {"url": FIJI, "goal": "capital"}, {"result": MRLX_VISIT}),
        MRLX_VISIT.strip(),
    ),
}
KEYS = {"serper": "SERPER_API_KEY", "brave": "BRAVE_API_KEY", "tavily": "TAVILY_API_KEY"}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS.values():
        monkeypatch.setenv(name, KEY)


def call(
    service: FakeService,
    case: str,
    *calls: dict[str, object],
    cassette: Cassette | None = None,
    blocked: dict[str, object] | None = None,
    **keys: object,
) -> list[Any]:
    """Observation or error of each call after the other, by one tool set."""
    kind, own, arguments, _, _ = CASES[case]
    entry = {"type": kind, "url": service.url, "attempts": 3, "backoff": 0.0, "timeout": 10.0} | own | keys

    async def main() -> list[Any]:
        tools = build_tools({"web": entry}, cassette, blocked=blocked)
        found: list[Any] = []
        try:
            for one in calls or (arguments,):
                try:
                    found.append(await tools.call(case.split()[1], arguments | one))
                except Exception as error:
                    found.append(error)
        finally:
            await tools.close()
        return found

    return asyncio.run(main())


@pytest.mark.parametrize("case", CASES)
def test_what_an_agent_sees(case: str) -> None:
    """An answer in the service's own shape becomes one list or page, the same for all; its links are named."""
    with FakeService(CASES[case][3]) as service:
        [seen] = call(service, case)
    assert isinstance(seen, Observation)
    assert (seen.text, seen.status, seen.source) == (CASES[case][4], "ok", "live")
    assert FIJI in seen.links and seen.seconds > 0
    assert len(service.requests) == 1


def test_requests() -> None:
    """Method, path, body or query, and the key's header, as each service documents them."""
    expected: dict[str, tuple[str, str, object, str, str]] = {
        "serper search": ("POST", "/search", {"q": "q", "num": 5, "gl": "us"}, "x-api-key", KEY),
        "brave search": (
            *("GET", "/res/v1/web/search", {"q": "q", "count": "5", "text_decorations": "false"}),
            *("x-subscription-token", KEY),
        ),
        "searxng search": (
            *("GET", "/search", {"q": "q", "format": "json", "engines": "wikipedia,ddg"}),
            *("authorization", ""),
        ),
        "tavily search": (
            *("POST", "/search"),
            {"query": "q", "max_results": 5, "search_depth": "basic", "include_answer": False},
            *("authorization", f"Bearer {KEY}"),
        ),
        "tavily visit": (
            *("POST", "/extract", {"urls": [FIJI], "extract_depth": "basic", "format": "markdown"}),
            *("authorization", f"Bearer {KEY}"),
        ),
        "jina visit": ("GET", f"/{FIJI}", {}, "accept", "application/json"),
        "search_r1 search": (
            *("POST", "/retrieve", {"queries": ["q"], "topk": 5, "return_scores": True}),
            *("authorization", ""),
        ),
        "search_r1 visit": ("POST", "/access", {"urls": [FIJI]}, "authorization", ""),
        "mrlx search": ("POST", "/retrieve", {"name": "search", "query": "q"}, "authorization", ""),
        "mrlx visit": (
            *("POST", "/retrieve", {"name": "visit", "url": FIJI, "goal": "capital"}),
            *("authorization", ""),
        ),
    }
    more: dict[str, dict[str, object]] = {
        "serper search": {"country": "us"},
        "searxng search": {"engines": ["wikipedia", "ddg"]},
    }
    for case, (method, path, sent, header, value) in expected.items():
        with FakeService(CASES[case][3]) as service:
            call(service, case, **more.get(case, {}))
        [asked] = service.requests
        body = asked.json if asked.method == "POST" else dict(asked.query)
        assert (asked.method, asked.path, body, asked.headers.get(header, "")) == (method, path, sent, value)


FAULTS = ["429", "503", "504", "cut", "shape", "html", "empty"]


@pytest.mark.parametrize("case", CASES)
def test_infrastructure_is_tried_again_and_never_seen(case: str) -> None:
    """Whatever goes wrong twice spends two attempts, which are counted, and the third is the answer."""
    _, _, _, answer, text = CASES[case]
    counters.take()
    with FakeService(answer) as service:
        planned = iter([one for fault in FAULTS for one in (fault, fault, None)])
        service.fault_of = lambda asked: next(planned)
        found = call(service, case, *[{}] * len(FAULTS))
    assert [seen.text for seen in found if isinstance(seen, Observation)] == [text] * len(FAULTS), found
    assert len(service.requests) == 3 * len(FAULTS)
    assert counters.take()["service/web/retries"] == 2.0 * len(FAULTS)


@pytest.mark.parametrize("case", CASES)
def test_what_fails_every_time_raises(case: str) -> None:
    """Nothing of the service's words becomes an observation: at the end of an outage the run ends by name."""
    for fault in FAULTS if case in ("serper search", "jina visit") else ["504"]:
        with FakeService(CASES[case][3]) as service:
            service.down = fault
            [error] = call(service, case, attempts=1, max_outage=0.01)
        assert isinstance(error, InfrastructureError | ServiceError), error


@pytest.mark.parametrize("case", ["serper search", "jina visit"])
def test_a_slow_answer_is_tried_again(case: str) -> None:
    """After its time-out."""
    with FakeService(CASES[case][3]) as service:
        service.faults += ["slow"]
        [seen] = call(service, case, timeout=0.5, attempts=20)
    assert isinstance(seen, Observation) and seen.text == CASES[case][4] and len(service.requests) >= 2


@pytest.mark.parametrize("case", CASES)
def test_a_refused_key_ends_the_run(case: str) -> None:
    """At the first answer, without the key in the message."""
    with FakeService(CASES[case][3]) as service:
        service.faults += ["401", "402", "403"]
        found = call(service, case, {}, {}, {})
    assert len(service.requests) == 3
    for error, fault in zip(found, ("401", "402", "403"), strict=True):
        assert isinstance(error, ServiceError) and f"status {fault}" in str(error) and KEY not in str(error)
    if case.startswith("searxng"):
        assert "search.formats" in str(found[2])


VISITS = [case for case in CASES if case.endswith("visit") and not case.startswith("mrlx")]


@pytest.mark.parametrize("case", VISITS)
def test_a_dead_page_is_the_policys_while_others_are_answered(case: str, tmp_path: Path) -> None:
    """One page that fails after every attempt, between two that are read: fixed words, and the cassette replays them.
    429 is never the page's."""
    other, dead = CASES[case][2], {"url": "https://x.org/dead"}
    with FakeService(CASES[case][3]) as service:
        service.fault_of = lambda asked: "503" if b"dead" in (asked.path.encode() + asked.body) else None
        with_cassette = Cassette(tmp_path / "c.sqlite", "cached")
        first, failed, again = call(service, case, other, dead, other, cassette=with_cassette)
        with_cassette.close()
        service.fault_of = lambda asked: "429" if b"dead" in (asked.path.encode() + asked.body) else None
        _, limited = call(service, case, other, dead)
    assert first.status == again.status == "ok" and again.source == "cache"
    assert (failed.status, failed.text) == ("tool_error", UNREADABLE)
    assert isinstance(limited, ServiceFailure)
    with FakeService() as unused:
        replay = Cassette(tmp_path / "c.sqlite", "replay")
        [replayed] = call(unused, case, dead, cassette=replay)
        replay.close()
    assert (replayed.status, replayed.text, replayed.source) == ("tool_error", UNREADABLE, "replay")
    assert not unused.requests


@pytest.mark.parametrize(
    ("case", "answer", "words"),
    [
        *(("jina visit", Raw("{}", status), f"status {status}") for status in (404, 410, 451)),
        ("jina visit", Raw("{}", 422), "file of another kind"),
        ("jina visit", Raw("{}", 400), "no address"),
        ("jina visit", {"data": {"warning": "Target URL returned error 404: Not Found"}}, "status 404"),
        ("jina visit", {"data": {"warning": "Target URL returned error 403: x"}}, UNREADABLE),
        ("tavily visit", {"results": [], "failed_results": [{"url": FIJI, "error": "FAULT"}]}, UNREADABLE),
        ("search_r1 visit", {"result": [None]}, "There is no such page"),
        (
            "mrlx visit",
            {
                "result": MRLX_VISIT.replace(
                    "Suva", "The provided webpage content could not be accessed or processed."
                )
            },
            UNREADABLE,
        ),
    ],
)
def test_a_page_that_is_not_there_is_a_tool_error(case: str, answer: object, words: str) -> None:
    """Asked for once, with words of ours."""
    with FakeService(answer) as service:
        [seen] = call(service, case)
    assert isinstance(seen, Observation) and seen.status == "tool_error" and words in seen.text
    assert "FAULT" not in seen.text and len(service.requests) == 1


@pytest.mark.parametrize(
    ("case", "answer"),
    [
        ("mrlx search", {"result": "Error searching 'q': Search error: 503 FAULT"}),
        ("mrlx search", {"result": "Error: Search tool not available. Please check dependencies."}),
        ("mrlx visit", {"result": f"Error visiting '{FIJI}': FAULT"}),
        ("mrlx visit", {"result": MRLX_VISIT.replace("Suva", "The LLM response was in an invalid format.")}),
        ("mrlx search", {"result": ["a"]}),
        ("searxng search", {"results": [], "unresponsive_engines": [["google", "timeout"]]}),
        ("search_r1 search", {"result": []}),
        ("search_r1 search", {"result": [[{"document": {"id": [1], "contents": "a"}}]]}),
        ("search_r1 search", {"result": [[{"id": "a"}]]}),
        ("search_r1 visit", {"result": [{"contents": 5}]}),
        ("serper search", {"organic": [{"title": "a"}]}),
        ("serper search", {"organic": [{"title": 5, "link": "a"}]}),
        ("brave search", {"web": {"results": {}}}),
        ("tavily search", {"results": None}),
        ("tavily visit", {"results": [], "failed_results": []}),
        ("jina visit", {"data": None}),
        ("jina visit", {"data": {"title": "a"}}),
    ],
)
def test_failures_in_an_answer_are_infrastructure(case: str, answer: object) -> None:
    """Status 200 alone is no answer: texts of failures and wrong shapes are tried again, and raise in the end."""
    good = CASES[case][3]
    with FakeService(good) as service:
        wrong = [0]

        def answers(asked: Asked) -> object:
            wrong[0] += 1
            return answer if wrong[0] == 2 else good

        service.answer = answers
        first, seen = call(service, case, {}, {}, attempts=2)
    assert isinstance(first, Observation) and isinstance(seen, Observation)
    assert seen.text == CASES[case][4] and len(service.requests) == 3


def test_no_goal_or_page_imitates_a_failure_of_mrlx() -> None:
    """Its patterns are looked for behind the line that repeats the goal, and only at the beginning."""
    goal = "Error: Evidence in page: The LLM response was in an invalid format"
    text = MRLX_VISIT.replace("capital", goal) + "Summary: \nError: is a word.\n\n"
    with FakeService({"result": text}) as service:
        [seen] = call(service, "mrlx visit", {"goal": goal})
    assert seen.status == "ok" and seen.text == text.strip()


@pytest.mark.parametrize(
    ("case", "answer"),
    [
        ("serper search", {"searchParameters": {"q": "q"}}),
        ("serper search", {"organic": []}),
        ("brave search", {"type": "search", "query": {}}),
        ("searxng search", {"results": []}),
        ("tavily search", {"results": []}),
        ("search_r1 search", {"result": [[]]}),
    ],
)
def test_nothing_found_is_empty(case: str, answer: object) -> None:
    with FakeService(answer) as service:
        [seen] = call(service, case)
    assert (seen.text, seen.status) == ("No results.", "empty")


def test_search_r1_answers_in_both_shapes() -> None:
    """Bare documents say the same as documents with scores."""
    with FakeService({"result": [DOCUMENTS]}) as service:
        [seen] = call(service, "search_r1 search")
    assert seen.text == LISTED
    assert split_contents('"A "b""\nc\nd') == ('A "b"', "c\nd") and split_contents("a") == ("a", "")
    assert split_contents('"') == ('"', "")


def test_an_answer_box_is_shown_where_it_is_asked_for() -> None:
    """Off by default, since it may hold the answer to the question."""
    answer = {"organic": hits("link", "snippet"), "answerBox": {"answer": "Suva", "title": "Capital"}}
    with FakeService(answer) as service:
        [off] = call(service, "serper search")
        [on] = call(service, "serper search", answer_box=True)
    assert off.text == LISTED and on.text.startswith("[1] Capital\nSuva\n\n[2] Fiji")


@pytest.mark.parametrize(
    ("case", "answer", "words"),
    [
        ("serper search", Raw('{"message": "Not enough credits"}', 400), "no credits left"),
        (
            "brave search",
            Raw('{"error": {"code": "SUBSCRIPTION_TOKEN_INVALID", "status": 422}}', 422),
            "does not know the key",
        ),
        ("tavily search", Raw("{}", 432), "limit is used up"),
        ("tavily visit", Raw("{}", 433), "limit is used up"),
    ],
)
def test_a_key_that_is_used_up_ends_the_run(case: str, answer: object, words: str) -> None:
    """Also where a service says it in a way of its own; the same status for another reason fails one call alone."""
    with FakeService(answer) as service:
        [error] = call(service, case)
        assert isinstance(error, ServiceError) and words in str(error) and KEY not in str(error)
        if case.split()[0] in ("serper", "brave"):
            service.answer = Raw('{"message": "bad query"}', answer.status if isinstance(answer, Raw) else 0)
            [error] = call(service, case)
            assert isinstance(error, ServiceFailure)


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
    monkeypatch.delenv("SERPER_API_KEY")
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


def test_tools_of_one_entry_share_the_service() -> None:
    """Its concurrency holds for all of them together."""

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


ROOT = Path(__file__).parent.parent
COMMON = {"type", "include", "exclude", "rename"}


def config_of(kind: str) -> type[Settings]:
    return find_class("type", kind, BUILT_IN, GROUP, ToolConfig)  # type: ignore[type-abstract]


def test_the_page_about_tools_names_every_key() -> None:
    """docs/research-tools.md: each type's row lists its own keys with their defaults, as the config classes have them;
    those of every service stand in a table of their own."""
    page = (ROOT / "docs" / "research-tools.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    base = find_class("type", "mgrpo.tools.remote:RemoteConfig", BUILT_IN, GROUP, ToolConfig)  # type: ignore[type-abstract]
    shared = set(base.model_fields) - COMMON
    assert {name for name in shared if name not in rows} == set(), "keys of every service"
    assert set(BUILT_IN) <= set(rows), "types"
    for kind in BUILT_IN:
        fields = config_of(kind).model_fields
        own = {
            name
            for name, found in fields.items()
            if name not in COMMON
            and (name not in shared or repr(found.default) != repr(base.model_fields[name].default))
        }
        cell = dict(re.findall(r"`(\w+)(?: = ([^`]*))?`", rows[kind].split(" | ")[-1]))
        named = set(cell)
        for name, shown in cell.items():
            assert not shown or json.loads(shown) == fields[name].default, f"{kind}.{name}"
        assert named - {"url"} == own - {"url"}, (
            f"{kind}: the page names {sorted(named)}, the class has {sorted(own)}"
        )


def test_blocks_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/research-tools.md: its entries are configs, its tool answers, its client asks and reads."""
    page = (ROOT / "docs" / "research-tools.md").read_text()
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL)]
    entries = [entry for block in blocks for entry in block["task"]["options"]["tools"].values()]
    assert {"serper", "jina", "mcp", "search_r1", "python", "own_search:OwnSearch"} == {
        e["type"] for e in entries
    }
    for entry in entries:
        config_of(entry["type"]).model_validate(entry)
    units, mine = (
        next(e for e in entries if e["type"] == kind) for kind in ("python", "own_search:OwnSearch")
    )
    with FakeService({"hits": [{"name": "Fiji", "at": FIJI, "about": None}]}) as service:

        async def main() -> list[Observation]:
            tools = build_tools({"units": units, "mine": mine | {"url": service.url}})
            calls = [("miles", {"kilometres": 5}), ("miles", {"kilometres": -1}), ("search", {"query": "q"})]
            try:
                return [await tools.call(name, arguments) for name, arguments in calls]
            finally:
                await tools.close()

        good, bad, found = asyncio.run(main())
    assert good.text == "3.107" and (bad.status, bad.text) == ("tool_error", "A distance is 0 or more.")
    assert found.text == f"[1] Fiji\n{FIJI}" and service.requests[0].json == {"q": "q", "n": 5, "until": 2024}
