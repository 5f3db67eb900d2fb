"""The world under invented names: no old one is left, nothing else is changed, and the way back is unique."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.tasks.factbook.data import read_entries
from mgrpo.tasks.factbook.names import entry_names
from mgrpo.tasks.factbook.renaming import CODE, KEPT, code_table, masked, rename_table, substitution
from mgrpo.tasks.factbook.world import World

TABLE = {
    "Guinea": "Zorun",
    "Papua New Guinea": "Kelim",
    "Guinea-Bissau": "Vosan",
    "Niger": "Dalet",
    "Nigerian": "Motanian",
    "S. Korea": "Rulek",
    "Cote d'Ivoire": "Benar",
    "US": "QX",
    "USA": "QXZ",
    "Ni-Vanuatu": "Tolim",
    "MALI": "FARUM",
}
CHANGE = substitution(TABLE)
BACK = substitution({new: old for old, new in TABLE.items()})


@pytest.fixture(scope="module")
def worlds() -> tuple[World, World]:
    return World.build(), World.build(renamed=True)


@pytest.fixture(scope="module")
def tables() -> tuple[dict[str, str], dict[str, str]]:
    """Old name -> invented one, old code -> invented one."""
    entries = read_entries()
    return rename_table(entries, entry_names(entries), 0), code_table(entries, 0)


def test_the_longest_name_is_replaced_as_a_whole_word() -> None:
    """Hand-made cases: names within names, in hyphens, before an s, with a full stop, and words that only begin so."""
    assert CHANGE("Papua New Guinea, Guinea-Bissau and Guinea's gulf") == "Kelim, Vosan and Zorun's gulf"
    assert CHANGE("Niger, Nigeria, Nigerian; anti-US, USA, USAID, US$5") == (
        "Dalet, Nigeria, Motanian; anti-QX, QXZ, USAID, QX$5"
    )
    assert CHANGE("S. Korea 5%, Cote d'Ivoire 4%") == "Rulek 5%, Benar 4%"
    assert CHANGE("guinea fowl, NIGER, MALI, Ni-Vanuatu") == "guinea fowl, NIGER, FARUM, Tolim"


@given(
    st.lists(st.sampled_from([*TABLE, "of", "USAID", "x1", "the"]), max_size=12),
    st.sampled_from([" ", ", ", "; "]),
)
def test_the_way_back_is_unique(words: list[str], between: str) -> None:
    """Any text of names and other words comes back as it was."""
    text = between.join(words)
    assert BACK(CHANGE(text)) == text


def test_the_table_is_a_bijection(tables: tuple[dict[str, str], dict[str, str]]) -> None:
    """Every name, spelling, demonym, adjective and code has an invented one, all different, none of them a word of the
    corpus; another seed invents others."""
    entries = read_entries()
    names = entry_names(entries)
    table, codes = tables
    words = {w.casefold() for e in entries for rows in e.sections.values() for r in rows
             for w in re.findall(r"[^\W\d_]+", r.text)}  # fmt: skip
    assert len(set(table.values())) == len(table) and not {new.casefold() for new in table.values()} & words
    assert all(name in table for code, n in names.items() if code not in KEPT for name in n.all)
    assert {"Austrian", "Austrians", "Dane", "Danes", "Danish", "Frenchwomen", "Swiss", "Korea", "UAE", "AUSTRIA",
            "Oesterreich", "Burkinabe", "Ni-Vanuatu", "S. Korea", "Côte d'Ivoire"} <= set(table)  # fmt: skip
    assert table["Austrian"] + "s" == table["Austrians"] and table["Austria"].upper() == table["AUSTRIA"]
    assert len(set(codes.values())) == len(codes) > 240 and not set(codes) & set(codes.values())
    assert rename_table(entries, names, 1)["Austria"] != table["Austria"]


def test_no_old_name_is_left(
    worlds: tuple[World, World], tables: tuple[dict[str, str], dict[str, str]]
) -> None:
    """Nowhere an agent can read: texts, titles, links, addresses, questions, answers, gold paths; nor an old code."""
    _, renamed = worlds
    table, codes = tables
    slugs = {name.slug for code, name in entry_names(read_entries()).items() if code not in KEPT}

    by_first: dict[str, list[str]] = {}
    for name in table:
        by_first.setdefault(re.findall(r"[^\W\d_]+", name)[0], []).append(name)

    def left(text: str) -> list[str]:
        """Old names that stand in a text as whole words."""
        words = set(re.findall(r"[^\W\d_]+", text))
        there = [old for word in words & by_first.keys() for old in by_first[word] if old in text]
        return [old for old in there if re.search(rf"(?<![^\W\d_]){re.escape(old)}(?![^\W\d_])", text)]

    assert left("x Austria's y") == ["Austria"] and not left("Austrianism")
    for page in renamed.page_of.values():
        assert not left("\n".join((page.title, page.text, *(link.text for link in page.links)))), page.url
        assert not set(CODE.findall(page.text)) & set(codes), page.url
        assert not set(page.url.split("/")) & slugs, page.url
    for question in renamed.questions:
        said = (question.text, *question.gold, str(question.info["path"]), str(question.info["start"]))
        assert not left("\n".join(said)), question.id


def test_only_names_change(
    worlds: tuple[World, World], tables: tuple[dict[str, str], dict[str, str]]
) -> None:
    """Taking the invented names back gives every text of the real world, letter by letter; only addresses of web sites
    and mail are gone."""
    real, renamed = worlds
    table, codes = tables
    back = substitution({new: old for old, new in table.items()})
    codes_back = {new: old for old, new in codes.items()}
    for before, after in zip(real.pages, renamed.pages, strict=True):
        restored = CODE.sub(lambda match: codes_back.get(match[0], match[0]), back(after.text))
        assert restored == masked(before.text), before.url
        assert len(before.links) == len(after.links)


def test_the_same_questions_are_asked(worlds: tuple[World, World]) -> None:
    """The same chains in the same splits, about other names; the same world bit for bit."""
    real, renamed = worlds
    assert [c.id for c in real.chains] == [c.id for c in renamed.chains]
    assert all(a.text != b.text for a, b in zip(real.questions, renamed.questions, strict=True))
    assert [q.info["split"] for q in real.questions] == [q.info["split"] for q in renamed.questions]
    assert renamed.digest == "22e86bd5b541ba4a"
