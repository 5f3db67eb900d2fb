"""What tests of remote tools share: an answer of each service in its own shape, and calls to a fake one."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from unittest.mock import patch

from mgrpo.services.cassette import Cassette
from mgrpo.tools.registry import build_tools
from tests.fake_services import FakeService

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
VISITS = [case for case in CASES if case.endswith("visit") and not case.startswith("mrlx")]


def call(
    service: FakeService,
    case: str,
    *calls: dict[str, object],
    cassette: Cassette | None = None,
    blocked: dict[str, object] | None = None,
    **keys: object,
) -> list[Any]:
    """Observation or error of each call after the other, by one tool set. Keys of services are KEY meanwhile."""
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

    with patch.dict(os.environ, dict.fromkeys(KEYS.values(), KEY)):
        return asyncio.run(main())
