"""The world of the task: what was kept, how it was split, what the documents and the search say about it."""

from __future__ import annotations

import random

import pytest

from mgrpo.tasks.atlas.documents import build_documents
from mgrpo.tasks.atlas.facts import (
    FIELDS,
    SPLIT_SIZES,
    World,
    entities,
    fold,
    load_countries,
    split_countries,
)
from mgrpo.tasks.atlas.language import language
from mgrpo.tasks.atlas.questions import HOP_WEIGHTS, QuestionBank
from mgrpo.tasks.words.questions import plan_of, start_of
from mgrpo.tasks.words.search import Index

WORLD = World()
DOCUMENTS = build_documents(WORLD)
BANK = QuestionBank(WORLD)


def test_sizes_of_the_world() -> None:
    """181 countries in disjoint splits of 109, 27 and 45; 955 names and values; 543 documents; 976 words."""
    names = {split: {c.name for c in split_countries(split)} for split in SPLIT_SIZES}
    assert {split: len(n) for split, n in names.items()} == {"train": 109, "validation": 27, "heldout": 45}
    assert len(set.union(*names.values())) == len(load_countries()) == 181
    assert len(entities()) == 955 and len(DOCUMENTS) == 543
    assert len(language().vocabulary) == len(set(language().vocabulary)) == 976


def test_known_facts() -> None:
    """A few facts anyone can check, accents folded, one word each."""
    assert WORLD.value("capital", "Fiji") == "Suva" and WORLD.value("country", "Fijian") == "Fiji"
    assert WORLD.value("phone", "Iceland") == "+354" and WORLD.value("currency", "Japan") == "JPY"
    assert WORLD.value("language", "Fiji") == "en_" and WORLD.value("capital", "Suva") is None
    assert fold("Côte d'Ivoire") == "CotedIvoire"
    assert all(len(word.split()) == 1 and word.isascii() for word in entities())


def test_chains_stay_in_their_split() -> None:
    """No hop of a question leads out of its split, and no question is asked in two of them."""
    owners: dict[str, str] = {}
    for split in SPLIT_SIZES:
        own = set(WORLD.countries[split])
        for question in (q for pool in BANK.chains(split) for q in pool):
            assert owners.setdefault(question.text, split) == split
            values = WORLD.follow(start_of(question), plan_of(question))
            assert values is not None and values[-1] == question.answer
            passed = [start_of(question), *values]
            assert {v for v in passed if v in DOCUMENTS and WORLD.value("phone", v)} <= own
            assert question.answer not in passed[:-1]


def test_wrong_documents_do_not_answer() -> None:
    """The value of a country's field stands in no other document except another country's own fields."""
    for name in ("Fiji", *WORLD.countries["heldout"]):
        own = {WORLD.facts["capital", name], WORLD.facts["people", name]}
        for title in own:
            assert DOCUMENTS[title].fields == (("country", name),)


def test_search_always_finds_the_right_document() -> None:
    """For every (relation, entity) with an answer the document that holds it is among the three results."""
    index = Index(DOCUMENTS.values())
    for (relation, entity), value in WORLD.facts.items():
        found = index.search(entity)
        assert len(set(found)) == 3 and entity in found
        assert DOCUMENTS[entity].value(relation) == value
    position = [index.search(entity).index(entity) for _, entity in WORLD.facts]
    assert all(position.count(i) > len(position) / 4 for i in range(3))  # rank says nothing


def test_search_takes_any_text() -> None:
    """Operators, quotes, nothing at all: always three distinct titles, the same ones again."""
    index = Index(DOCUMENTS.values())
    for query in ('"', "NEAR(", "a OR b", "*", "", "-", "Fiji AND", "x\0y", "ü", "'; DROP TABLE docs"):
        assert len(set(index.search(query))) == 3
        assert index.search(query) == Index(DOCUMENTS.values()).search(query)


def test_random_search_hides_the_document() -> None:
    """The control finds the right document no more often than chance would."""
    index = Index(DOCUMENTS.values(), "random")
    asked = sorted({entity for _, entity in WORLD.facts})
    hits = sum(entity in index.search(entity) for entity in asked)
    assert hits <= 12  # 543 queries, expectation 3


def test_permuted_facts_contradict_the_world() -> None:
    """The control deals every relation anew inside a split, and asks only what tells both worlds apart."""
    permuted = World("permuted")
    for relation in FIELDS:
        for split in SPLIT_SIZES:
            real = [WORLD.value(relation, c) for c in WORLD.countries[split]]
            dealt = [permuted.value(relation, c) for c in WORLD.countries[split]]
            assert real != dealt and {v for v in dealt if v} <= {v for v in real if v}
    documents = build_documents(permuted)
    assert all(documents[e].value(r) == v for (r, e), v in permuted.facts.items())
    for question in QuestionBank(permuted).fixed("heldout", 400, 0):
        assert question.info["real_answer"] != question.answer
        values = WORLD.follow(start_of(question), plan_of(question))
        assert question.info["real_answer"] == (values[-1] if values else None)


def test_question_streams() -> None:
    """draw() is a function of (index, seed); fixed sets are distinct and in the hop mix."""
    stream = [BANK.draw(i, 3) for i in range(2000)]
    order = random.Random(0).sample(range(2000), 50)
    assert all(QuestionBank(WORLD).draw(i, 3).text == stream[i].text for i in order)
    assert [BANK.draw(i, 4).text for i in range(20)] != [q.text for q in stream[:20]]
    hops = [q.info["hops"] for q in stream]
    assert all(abs(hops.count(h + 1) / 2000 - w) < 0.04 for h, w in enumerate(HOP_WEIGHTS))
    for split in SPLIT_SIZES:
        fixed = BANK.fixed(split, 400, 0)
        assert len({q.text for q in fixed}) == 400
        assert [sum(q.info["hops"] == h for q in fixed) for h in (1, 2, 3)] == [100, 200, 100]
    with pytest.raises(ValueError, match="there are"):
        BANK.fixed("validation", 4000, 0)


def test_guessing_the_majority_does_not_pay() -> None:
    """The most frequent training answer of a relation is right for one held-out question in twenty."""
    count: dict[str, dict[str, float]] = {}
    for pool, weight in zip(BANK.chains("train"), HOP_WEIGHTS, strict=True):
        for q in pool:
            answers = count.setdefault(plan_of(q)[-1], {})
            answers[q.answer] = answers.get(q.answer, 0.0) + weight / len(pool)
    guess = {relation: max(answers, key=lambda a: answers[a]) for relation, answers in count.items()}
    score = sum(
        weight * sum(guess[plan_of(q)[-1]] == q.answer for q in pool) / len(pool)
        for pool, weight in zip(BANK.chains("heldout"), HOP_WEIGHTS, strict=True)
    )
    assert 0.03 < score < 0.07
