"""A corpus: any text is a query, the best pages come first, and nothing of a page is lost in its parts."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from itertools import pairwise
from math import log
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgrpo.errors import ConfigError
from mgrpo.tools.base import Observation
from mgrpo.tools.corpus import PASSAGE, Corpus, Heading, Link, Page, passages
from mgrpo.tools.corpus_tools import corpus_tools
from mgrpo.tools.page import parts
from mgrpo.tools.toolset import ToolSet

TEXT = "Geography\n\nFiji is an island country.\n\nGovernment\n\nThe capital is Suva. Its anthem is sung."
FIJI = Page(
    "https://www.Facts.org/fj/",
    "Fiji",
    TEXT,
    (Link("Suva", "https://facts.org/suva"), Link("Oceania", "https://facts.org/oceania")),
    (Heading("Geography", 1, 0), Heading("Government", 1, TEXT.index("Government"))),
)
PAGES = [
    FIJI,
    Page("https://facts.org/suva", "Suva", "Suva is a harbour city. " * 3),
    Page("https://facts.org/oceania", "Oceania", "Islands in the Pacific; Fiji is one."),
    Page("https://facts.org/empty", "A page about nothing", ""),
    Page("12345", "Tonga", "Un café à Nukuʻalofa."),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.build(tmp_path_factory.mktemp("corpus") / "c.sqlite", PAGES)


def call(corpus: Corpus, name: str, page_chars: int = 4000, **arguments: object) -> Observation:
    return asyncio.run(ToolSet(corpus_tools(corpus, page_chars=page_chars)).call(name, arguments))


def test_the_best_pages_come_first(corpus: Corpus) -> None:
    """Titles weigh more than text, headings find their section, case, accents and endings do not count; a page comes
    once, and scores fall."""
    assert [hit.url for hit in corpus.search("Suva", 5)] == ["https://facts.org/suva", FIJI.url]
    assert corpus.search("GOVERNMENT of which?", 5)[0].passage.startswith(
        "Government\n\nThe capital is Suva."
    )
    assert (
        corpus.search("cafe", 5)[0].title == "Tonga"
        and corpus.search("pacific island", 1)[0].title == "Oceania"
    )
    hits = corpus.search("fiji island suva capital", 9)
    assert len({hit.url for hit in hits}) == len(hits) == 3
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert corpus.search("about nothing", 5)[0].url == "https://facts.org/empty"
    assert (
        corpus.search("the of", 5)
        and corpus.search("zzz", 5) == corpus.search("", 5) == corpus.search("a", 0) == []
    )


def test_scores_are_bm25(tmp_path: Path) -> None:
    """Of a corpus with one field in use, against the formula: idf * f * (k + 1) / (f + k * (1 - b + b * n / mean))."""
    texts = ["red red fish", "red fish blue fish one", "blue", "blue sea", "a green hill far away"]
    built = Corpus.build(tmp_path / "c.sqlite", [Page(str(n), "", text) for n, text in enumerate(texts)])
    mean, idf = sum(len(text.split()) for text in texts) / 5, log((5 - 2 + 0.5) / (2 + 0.5))
    assert [hit.url for hit in built.search("red", 5)] == ["0", "1"]
    for hit in built.search("red", 5):
        words = texts[int(hit.url)].split()
        f = words.count("red")
        assert hit.score == pytest.approx(
            idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean)), rel=1e-6
        )
    built.close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["AND", "OR", "NOT", "NEAR(", ")", '"', "'", "*", "^", ":", "title:", "-", "+", "{a b}:",
                         "\x00", "fiji", "²", "ß", "\ud800", ";--", "%", "_"]),
        max_size=9,
    ).map(" ".join)
)  # fmt: skip
def test_any_text_is_a_query(corpus: Corpus, query: str) -> None:
    """Nothing of it is FTS5's syntax: it finds pages or none, as does a goal, and a page's address may be anything."""
    hits = corpus.search(query, 3)
    assert len(hits) <= 3 and all(hit.score >= 0 for hit in hits)
    if "fiji" in query.split():
        assert any(hit.title == "Fiji" for hit in hits)
    for start, stop in corpus.nearest(FIJI, query, 100):
        assert 0 <= start < stop <= len(TEXT)
    corpus.page(query)
    corpus.random(query, 2)


def test_an_address_finds_its_page(corpus: Corpus) -> None:
    """Without regard to scheme, "www.", case of the host, a closing slash, a fragment and escapes."""
    for url in (
        "https://www.Facts.org/fj/",
        "facts.org/fj",
        "http://FACTS.org/fj#x",
        " https://facts.org/%66j ",
    ):
        assert corpus.page(url) == FIJI
    assert corpus.page("12345") == PAGES[4]
    for url in ("https://facts.org/FJ", "https://facts.org", "", "Fiji"):
        assert corpus.page(url) is None
    assert list(corpus.pages()) == PAGES


def test_the_same_pages_make_the_same_corpus(corpus: Corpus, tmp_path: Path) -> None:
    """The digest is of what pages say and of their order, and so are scores and results; anything changes it."""
    again = Corpus.build(tmp_path / "again.sqlite", iter(PAGES))
    assert again.digest == corpus.digest and (again.size, again.passages) == (5, 6)
    assert again.search("fiji suva", 5) == corpus.search("fiji suva", 5)
    again.close()
    changed = [
        [*PAGES[1:], PAGES[0]],
        PAGES[:4],
        [*PAGES[:4], Page("12345", "Tonga", "Un cafe à Nukuʻalofa.")],
        [Page(FIJI.url, "Fiji", TEXT, FIJI.links[:1], FIJI.outline), *PAGES[1:]],
        [Page(FIJI.url, "Fiji", TEXT, FIJI.links), *PAGES[1:]],
    ]
    digests = {corpus.digest}
    for pages in changed:
        other = Corpus.build(tmp_path / "other.sqlite", pages)
        digests.add(other.digest)
        other.close()
    assert len(digests) == 6


def test_a_build_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Two pages of one address, or one without, are refused by name; nothing half-written stays."""
    path = tmp_path / "c.sqlite"
    Corpus.build(path, PAGES).close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"two pages have the address 'http://facts\.org/suva/'"):
        Corpus.build(path, [*PAGES, Page("http://facts.org/suva/", "", "")])
    with pytest.raises(ValueError, match=r"page 1 \('T'\) has the address ' '"):
        Corpus.build(path, [Page(" ", "T", "")])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.sqlite"]


def test_a_file_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    """Missing, not SQLite, another database, another format."""
    (tmp_path / "text").write_text("not a database at all" * 50)
    for name, sql in (("other", "CREATE TABLE t (a)"), ("old", "CREATE TABLE meta (key, value)")):
        db = sqlite3.connect(tmp_path / name)
        db.execute(sql)
        db.commit()
        db.close()
    for name, words in (
        ("none", "no such file"),
        ("text", "it is no corpus"),
        ("other", "no such table"),
        ("old", "None, exp"),
    ):
        with pytest.raises(ConfigError, match=words):
            Corpus.open(tmp_path / name)


def test_many_threads_read_at_once(corpus: Corpus) -> None:
    """Each gets what one alone would, and a closed corpus is closed for all."""
    own = Corpus.open(corpus.path)
    expected = [(own.search(q, 3), own.page(FIJI.url)) for q in ("fiji", "suva", "island pacific")]
    wrong: list[object] = []

    def read() -> None:
        for _ in range(30):
            found = [(own.search(q, 3), own.page(FIJI.url)) for q in ("fiji", "suva", "island pacific")]
            if found != expected:
                wrong.append(found)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not wrong
    own.close()
    own.close()
    with pytest.raises(ConfigError, match="closed"):
        own.search("fiji", 1)


# -- passages and parts, for any page --

LINES = st.lists(
    st.text(st.sampled_from("ab. \n"), max_size=80) | st.just("x" * 1500) | st.just("word " * 400), max_size=8
)


@st.composite
def any_page(draw: st.DrawFn) -> Page:
    text = "\n".join(draw(LINES))
    starts = sorted(draw(st.sets(st.integers(0, max(len(text) - 1, 0)), max_size=4))) if text else []
    words = draw(st.lists(st.sampled_from(["ab", "word", "a. b", "nowhere", "", "x" * 900]), max_size=6))
    links = tuple(Link(word, f"https://l.org/{n}") for n, word in enumerate(words))
    return Page(
        "https://p.org", "P", text, links, tuple(Heading(f"H{n}", 1, at) for n, at in enumerate(starts))
    )


@settings(max_examples=150, deadline=None)
@given(any_page())
def test_passages_hold_every_word_once(page: Page) -> None:
    """In order, without overlap, none longer than a passage may be, each in one section."""
    spans = list(passages(page))
    assert spans and all(a <= b <= a + PASSAGE for a, b, _ in spans)
    assert all(b <= c for (_, b, _), (c, _, _) in pairwise(spans))
    assert "".join("".join(page.text[a:b] for a, b, _ in spans).split()) == "".join(page.text.split())
    for a, b, heading in (span for span in spans if span[0] < span[1]):
        above = [h for h in page.outline if h.start <= a]
        assert heading == (above[-1].text if above else "")
        assert not any(a < h.start < b for h in page.outline)


@settings(max_examples=150, deadline=None)
@given(any_page(), st.sampled_from([200, 1000]))
def test_parts_hold_every_word_and_link_once(page: Page, size: int) -> None:
    """What has no room in a part stands in the next; all of them together are the page."""
    made = parts(page, size)
    assert [part.number for part in made] == [*range(1, len(made) + 1)] and {part.of for part in made} == {
        len(made)
    }
    assert [url for part in made for url in part.links] != [] or not page.links
    assert sorted(url for part in made for url in part.links) == sorted(link.url for link in page.links)
    texts = []
    for part in made:
        head, _, body = part.text.partition("\n\n")
        assert head.startswith("P\nhttps://p.org") and (f"Part {part.number} of {part.of}" in head) == (
            part.of > 1
        )
        assert len(body) <= size + len("\n\nLinks:\n")
        text, _, links = body.partition("Links:\n")
        assert len(links.splitlines()) == len(part.links)
        texts.append(text)
    assert "".join("".join(texts).split()) == "".join(page.text.split())


# -- the tools --


def test_visit_shows_outline_text_and_numbered_links(corpus: Corpus) -> None:
    """Word for word."""
    seen = call(corpus, "visit", url="facts.org/fj")
    assert seen.text == (
        f"Fiji\nhttps://www.Facts.org/fj/\nSections: Geography; Government\n\n{TEXT}\n\n"
        "Links:\n[1] Suva - https://facts.org/suva\n[2] Oceania - https://facts.org/oceania"
    )
    assert seen.links == ("https://facts.org/suva", "https://facts.org/oceania") and seen.status == "ok"


def test_visit_goes_part_by_part_or_to_the_goal(tmp_path: Path) -> None:
    """The passages nearest to a goal stand in the page's order with a mark between; a part that is asked for is shown
    although a goal is given; a goal that is nowhere shows the first part."""
    sections = [f"Section {n}\n\n" + f"Filler number {n} of many. " * 30 for n in range(6)]
    sections[4] += "The treasure is gold."
    sections[1] += "A treasure map shows the [x] link."
    text = "\n\n".join(sections)
    starts = tuple(Heading(f"Section {n}", 1, text.index(f"Section {n}")) for n in range(6))
    page = Page(
        "https://p.org",
        "Long",
        text,
        (Link("link", "https://p.org/x"), Link("gone", "https://p.org/y")),
        starts,
    )
    corpus = Corpus.build(tmp_path / "c.sqlite", [page])
    part = call(corpus, "visit", 2000, url="p.org", part=2, goal="treasure").text
    assert (
        part.startswith("Long\nhttps://p.org\nPart 2 of 3\n\n")
        and "Section 3" in part
        and "Section 0" not in part
    )
    near = call(corpus, "visit", 2000, url="p.org", goal="treasure")
    body = near.text.partition("Only the passages nearest to the goal.\n\n")[2]
    assert (
        body.startswith("Section 1\n\n") and "\n\n[...]\n\nSection 4\n\n" in body and "Section 3" not in body
    )
    assert near.links == ("https://p.org/x",) and near.text.endswith("[1] link - https://p.org/x")
    assert "Part 1 of 3" in call(corpus, "visit", 2000, url="p.org", goal="unheard").text
    assert "Part 3 of 3" in call(corpus, "visit", 2000, url="p.org", part=3).text
    corpus.close()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("visit", {"url": "https://facts.org/nowhere"}, "There is no page 'https://facts.org/nowhere'."),
        ("visit", {"url": ""}, "There is no page ''."),
        ("visit", {"url": "facts.org/fj", "part": 2}, "There is no part 2: the page has 1."),
        ("visit", {"url": "facts.org/fj", "part": 0}, "part: 0 is less than the minimum of 1"),
        ("visit", {"url": "facts.org/fj", "part": 1e300}, "There is no part"),
        ("search", {"query": " "}, "The query is empty."),
        ("search", {"q": "fiji"}, "Expected: search(query: string)."),
    ],
)
def test_what_a_policy_does_wrongly(
    corpus: Corpus, name: str, arguments: dict[str, object], words: str
) -> None:
    """It reads what, in words."""
    seen = call(corpus, name, **arguments)
    assert seen.status == "tool_error" and words in seen.text


def test_search_and_its_control(corpus: Corpus) -> None:
    """A numbered list; with random ranking the pages are drawn by the query alone, the same each time, whatever they
    say."""
    seen = call(corpus, "search", query="capital of Fiji")
    assert seen.text.startswith(
        "[1] Fiji\nhttps://www.Facts.org/fj/\nGovernment The capital is Suva. Its anthem is sung.\n\n[2] Oceania\n"
    )
    assert call(corpus, "search", query="zzz").status == "empty"
    search = corpus_tools(corpus, k=2, ranking="random")[0]
    drawn = [tuple(asyncio.run(search.call({"query": f"fiji {n}"})).links) for n in range(40)]
    assert drawn == [tuple(asyncio.run(search.call({"query": f"fiji {n}"})).links) for n in range(40)]
    assert {url for pair in drawn for url in pair} == {page.url for page in PAGES}
    assert all(len(set(pair)) == 2 for pair in drawn) and len(corpus.random("q", 9)) == 5
    assert json.dumps(search.schema())
