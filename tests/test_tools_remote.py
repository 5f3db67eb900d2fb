"""Clients of searches and readers against servers on real sockets: requests, answers, and what becomes of failures."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from mgrpo.errors import InfrastructureError, ServiceError
from mgrpo.services import counters
from mgrpo.services.cassette import Cassette
from mgrpo.services.failures import ServiceFailure
from mgrpo.tools.base import Observation
from mgrpo.tools.registry import build_tools
from mgrpo.tools.remote import UNREADABLE
from mgrpo.tools.search_r1 import split_contents
from tests.fake_services import Asked, FakeService, Raw
from tests.remote_kit import (
    CASES,
    DOCUMENTS,
    FIJI,
    KEY,
    LISTED,
    MRLX_VISIT,
    VISITS,
    call,
    hits,
)


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


def test_a_reader_that_has_read_nothing_is_not_the_policys_matter() -> None:
    """Searches are answered, but no page ever: it is the reader that fails."""
    with FakeService(CASES["tavily search"][3]) as service:

        async def main() -> None:
            tools = build_tools(
                {"web": {"type": "tavily", "url": service.url, "attempts": 3, "backoff": 0.0}}
            )
            try:
                assert (await tools.call("search", {"query": "q"})).text == LISTED
                service.fault_of = lambda asked: "503" if asked.path == "/extract" else None
                with pytest.raises(ServiceFailure):
                    await tools.call("visit", {"url": FIJI})
            finally:
                await tools.close()

        with patch.dict(os.environ, {"TAVILY_API_KEY": KEY}):
            asyncio.run(main())


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
