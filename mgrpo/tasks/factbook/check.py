"""How hard the world's questions are without the work that they ask for, and that the work leads to the answer.

    best_constant     share of the questions that the best fixed answer is right for
    one_search        share whose last page is among the results of one search with the question's own words: no policy
                      that searches once can be right more often
    walk              follows a gold path with the agents' own tools: every page is found where the step before leads,
                      and shows its value

Random search is `one_search` on results that have nothing to do with the query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mgrpo.environments.task import Question
from mgrpo.tasks.factbook.pages import HOME, ROOT
from mgrpo.tools.base import Observation
from mgrpo.tools.corpus import Corpus
from mgrpo.tools.toolset import ToolSet

QUERIES: Mapping[str, str] = {
    "longest_border": "land boundaries",
    "shortest_border": "land boundaries",
    "top_export": "exports partners",
    "top_import": "imports partners",
    "independent_from": "independence",
    "capital": "capital",
    "highest_point": "elevation highest point",
    "area": "area total",
    "population": "population total",
    "internet_code": "internet country code",
    "independence_date": "independence",
    "currency": "exchange rates currency",
    "anthem": "national anthem title",
    "coastline": "coastline",
    "median_age": "median age",
    "literacy": "literacy total population",
}
"""Words for each relation and leaf that find its page, behind the entry's name."""


def best_constant(questions: Sequence[Question]) -> float:
    """Of questions of one number of hops."""
    answers = Counter(answer for question in questions for answer in set(question.gold))
    return max(answers.values()) / len(questions)


def one_search(questions: Sequence[Question], corpus: Corpus, k: int = 5, *, ranked: bool = True) -> float:
    """ranked: by the corpus' search; otherwise random results."""
    find = corpus.search if ranked else corpus.random
    hits = sum(_path(q)[-1]["url"] in [hit.url for hit in find(q.text, k)] for q in questions)
    return hits / len(questions)


async def walk(question: Question, tools: ToolSet) -> str:
    """The answer at the end of a question's gold path. "" where a page is not found, or does not show its value.

    Found with `search` (the entry's name and QUERIES; in vain for one step in 150, then with the section's name) and
    `visit`, or with `visit` alone by links from the root page.
    """
    at, value = f"{ROOT}/", ""
    for step in _path(question):
        url, value, words = str(step["url"]), str(step["value"]), QUERIES[str(step["relation"])]
        if "search" in tools.names:
            section = url.rpartition("/")[2].replace("-", " ")
            reached = await _finds(tools, url, f"{step['entity']} {words}", f"{step['entity']} {section}")
        else:
            reached = await _reaches(tools, at, url)
        if not reached or not await _shows(tools, url, value, words):
            return ""
        at = url
    return value


async def _finds(tools: ToolSet, url: str, *queries: str) -> bool:
    """Whether one of the queries finds a page; later ones are asked where those before did not."""
    for query in queries:
        if url in (await tools.call("search", {"query": query})).links:
            return True
    return False


async def _reaches(tools: ToolSet, at: str, url: str) -> bool:
    """Whether links lead from the page `at` to `url` by the first page of its entry; from the root by a region."""
    home = f"{url.rpartition('/')[0]}/{HOME.lower()}"
    pages = await _links(tools, at) if at == f"{ROOT}/" else [at]
    for page in pages:
        if home in await _links(tools, page):
            return url in await _links(tools, home)
    return False


async def _links(tools: ToolSet, url: str) -> list[str]:
    """All links of a page."""
    return [link for seen in await _parts(tools, url) for link in seen.links]


async def _shows(tools: ToolSet, url: str, value: str, goal: str) -> bool:
    """Whether a page shows a value, in its passages nearest to the goal or in one of its parts."""
    seen = await tools.call("visit", {"url": url, "goal": goal})
    return value in seen.text or any(value in part.text for part in await _parts(tools, url))


async def _parts(tools: ToolSet, url: str) -> list[Observation]:
    """A page in all its parts; none where there is no such page."""
    parts: list[Observation] = []
    while (seen := await tools.call("visit", {"url": url, "part": len(parts) + 1})).status != "tool_error":
        parts.append(seen)
    return parts


def _path(question: Question) -> Sequence[Mapping[str, object]]:
    path = question.info["path"]
    assert isinstance(path, list), "questions.py makes it"
    return path
