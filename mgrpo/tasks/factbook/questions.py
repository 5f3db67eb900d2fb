"""Chains in words, with their gold paths.

The information of a question, for people and for scoring (no agent sees it):

    path    for each fact in the order to be found: url of the page where it stands, entity whose page that is,
            relation, value as it stands there, names (every spelling of it that is right)
    hops, leaf, start, split
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mgrpo.environments.task import Question
from mgrpo.tasks.factbook.chains import Chain, split_of
from mgrpo.tasks.factbook.names import Names
from mgrpo.tasks.factbook.pages import page_url

RELATION_WORDS: Mapping[str, str] = {
    "longest_border": "the country that shares the longest land border with {}",
    "shortest_border": "the country that shares the shortest land border with {}",
    "top_export": "the largest export partner of {}",
    "top_import": "the largest import partner of {}",
    "independent_from": "the country that {} became independent from",
}
LEAF_WORDS: Mapping[str, str] = {
    "capital": "What is the capital of {}?",
    "highest_point": "What is the name of the highest point of {}?",
    "area": "What is the total area in square kilometers of {}?",
    "population": "What is the total population of {}?",
    "internet_code": "What is the internet country code of {}?",
    "independence_date": "What is the date of independence of {}?",
    "currency": "What is the currency of {}?",
    "anthem": "What is the title of the national anthem of {}?",
    "coastline": "What is the length in kilometers of the coastline of {}?",
    "median_age": "What is the median age in years of {}?",
    "literacy": "What is the literacy in percent of the total population of {}?",
}


def in_words(chain: Chain, names: Names) -> str:
    """The question as an agent reads it: it names the start and nothing else."""
    thing = names[chain.start].spoken
    for fact in chain.facts[:-1]:
        thing = RELATION_WORDS[fact.relation].format(thing)
    return LEAF_WORDS[chain.leaf.relation].format(thing)


def make_questions(chains: Sequence[Chain], names: Names) -> list[Question]:
    """A question of each chain."""
    return [_question(chain, names) for chain in chains]


def _question(chain: Chain, names: Names) -> Question:
    path = [
        {
            "url": page_url(names, code, fact.section),
            "entity": names[code].name,
            "relation": fact.relation,
            "value": fact.value,
            "names": list(names[fact.target].all if fact.target else fact.answers),
        }
        for code, fact in zip(chain.codes, chain.facts, strict=True)
    ]
    leaf = chain.leaf
    info = {
        "path": path,
        "hops": chain.hops,
        "leaf": leaf.relation,
        "start": names[chain.start].name,
        "split": split_of(chain.start),
    }
    tags = {"hops": str(chain.hops), "leaf": leaf.relation}
    return Question(in_words(chain, names), leaf.answers[0], info, chain.id, leaf.answers, tags)
