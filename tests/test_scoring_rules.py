"""The rules: GAIA's by the verdicts of its own scorer, those of Search-R1 and FlashRAG by an independent twin."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.errors import ConfigError
from mgrpo.scoring.rules import elements, exact, f1, find_rule, gaia, listed, number, score, sub_exact

PAIRS = json.loads((Path(__file__).parent / "data" / "gaia_pairs.json").read_text("utf-8"))
WORDS = st.lists(
    st.sampled_from(
        ["The", "a", "an", "Paris", "paris.", "U.S.", "us", "house", "yes", "No", "noanswer", "!", "x-y", ""]
    ),
    max_size=5,
).map(" ".join)


def test_gaia_gives_the_verdicts_of_its_own_scorer() -> None:
    """2,000 pairs and their verdicts by the scorer of inspect-evals 0.26.0 (gaia_differential.py): numbers, lists,
    strings, both verdicts of each, and the listed edges."""
    assert len(PAIRS) == 2000 and 800 < sum(right for _, _, right in PAIRS) < 1200
    wrong = [(answer, gold, right) for answer, gold, right in PAIRS if gaia(answer, gold) != right]
    assert wrong == []


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("12345", "12,345", 0),
        ("12,345", "12,345", 1),
        ("25", "2.5%", 1),
        ("whatever", "inf", 1),
        ("12", "inf", 0),
        ("４２", "42", 1),
        ("\u22125", "-5", 0),
        ("b, a", "a, b", 0),
        ("A; b", "a,b", 1),
        ("Sea gull!", "seagull", 1),
        ("a.,b", "a,b", 0),
    ],
)
def test_gaias_edges(answer: str, gold: str, right: int) -> None:
    """By hand, so that a reader sees what the official rules do."""
    assert gaia(answer, gold) == right


def test_no_answer_is_wrong_under_every_rule() -> None:
    """Also for the gold answer "None", which GAIA's scorer accepts for it."""
    for rule in ("gaia", "exact", "f1", "sub_exact", "number", "number:0.1", "list"):
        assert score(rule, None, ["None"]) == 0.0
        assert score(rule, "None", ["None"]) == 1.0


def twin_normalize(text: str) -> list[str]:
    """SQuAD's normalisation, written with a loop over characters: the words of the text without articles."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    out = []
    for word in kept.split():
        # An article stands between word borders, not between spaces: none but spaces are left within ASCII.
        if word not in {"a", "an", "the"}:
            out.append(word)
    return out


def twin_f1(answer: str, gold: str) -> float:
    ours, theirs = twin_normalize(answer), twin_normalize(gold)
    if ours != theirs and any(words in ([w] for w in ("yes", "no", "noanswer")) for words in (ours, theirs)):
        return 0.0
    left, common = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


@given(WORDS, WORDS)
def test_squad_rules_equal_an_independent_twin(answer: str, gold: str) -> None:
    """exact, sub_exact and f1 wherever the gold answer has a word left; the twin shares no code with them."""
    ours, theirs = twin_normalize(answer), twin_normalize(gold)
    if theirs:
        assert exact(answer, gold) == (ours == theirs)
        assert sub_exact(answer, gold) == (" ".join(theirs) in " ".join(ours))
        assert f1(answer, gold) == pytest.approx(twin_f1(answer, gold), abs=1e-12)
    else:
        same = answer.strip().lower() == gold.strip().lower()
        assert exact(answer, gold) == sub_exact(answer, gold) == f1(answer, gold) == same


def test_squad_rules_by_hand() -> None:
    """Values that a reader can check: articles, punctuation, case; a part of a word counts for sub_exact."""
    assert exact("The  Beatles!", "beatles") == 1 and exact("Beatles band", "beatles") == 0
    assert sub_exact("It was Paris, France.", "paris") == 1 and sub_exact("houses", "us") == 1
    assert f1("the city of Paris", "Paris France") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert f1("yes it is", "yes") == 0 and f1("yes.", "Yes") == 1 and f1("", "Paris") == 0


@pytest.mark.parametrize("rule", ["exact", "sub_exact", "f1"])
def test_a_gold_answer_of_articles_alone_accepts_not_everything(rule: str) -> None:
    """Normalised it is empty, and an empty string stands in every answer."""
    assert score(rule, "Paris, London, Rome", ["A"]) == 0 and score(rule, "", ["The"]) == 0
    assert score(rule, " a", ["A"]) == 1


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("about 3.2 million people", "3,200,000", 1),
        ("$1,234.50", "1234.5", 1),
        ("42km", "42", 1),
        ("\u22125 °C", "-5", 1),
        ("1e3", "1000", 1),
        ("0", "0", 1),
        ("0.1", "0", 0),
        ("10-20", "10", 0),
        ("in 1990 it was 5", "5", 0),
        ("5, or 6", "5", 0),
        ("CO2: 5", "5", 1),
        ("1,2", "12", 0),
        ("1.2.3", "1.2", 0),
        ("none", "5", 0),
        ("Paris", "paris", 1),
        ("5.1", "5", 0),
    ],
)
def test_number(answer: str, gold: str, right: int) -> None:
    """One number, in any of its spellings, with its unit; two numbers are no answer."""
    assert number(answer, gold) == right


def test_numbers_tolerance_is_relative_and_inclusive() -> None:
    """|answer - gold| <= tolerance * |gold|, on both sides, for negative numbers too."""
    rule = "number:0.05"
    assert [score(rule, text, ["-200"]) for text in ("-190", "-210", "-189.9", "-210.1")] == [1, 1, 0, 0]


def test_list_takes_any_order_and_counts_repetitions() -> None:
    """Elements are compared as numbers or by exact; thousands stay one number."""
    assert listed("Rome; the Paris", "Paris, Rome") == 1
    assert listed("Paris", "Paris, Rome") == 0 and listed("Paris, Rome, Oslo", "Paris, Rome") == 0
    assert listed("a1, a1, b", "a1, b, b") == 0
    assert listed("7.0, $12,345", "12345; 7") == 1
    assert elements("12,345, 7;x\n y") == ["12,345", "7", "x", "y"]


@given(st.lists(st.sampled_from(["Paris", "12,345", "7", "São Tomé"]), min_size=1), st.randoms())
def test_list_is_blind_to_order(parts: list[str], rng: object) -> None:
    """A permuted list with other separators is the same list."""
    shuffled = list(parts)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert listed("; ".join(shuffled), "\n".join(parts)) == 1


@given(st.text(max_size=30), st.text(max_size=30))
def test_rules_take_any_text(answer: str, gold: str) -> None:
    """No text raises, values lie in 0..1, and an answer that is the gold answer is right; gold "nan" of GAIA aside."""
    for rule in ("gaia", "exact", "f1", "sub_exact", "number", "list"):
        assert 0.0 <= score(rule, answer, [gold]) <= 1.0
        if rule != "gaia" or not re.search("nan", gold, re.IGNORECASE):
            assert score(rule, gold, [gold]) == 1.0


def test_the_best_gold_answer_counts() -> None:
    """A question may have several."""
    assert score("f1", "New York City", ["Boston", "New York", "NYC"]) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="gold is empty"):
        score("exact", "x", [])


def half(answer: str, gold: str) -> float:
    return 0.5 if answer == gold else 0.0


def double(answer: str, gold: str) -> float:
    return 2.0


def test_an_own_rule_by_its_import_path() -> None:
    """A function of a module on the path; what it gives is checked."""
    assert score(f"{__name__}:half", "x", ["y", "x"]) == 0.5
    with pytest.raises(ValueError, match=r"gave 2\.0, expected 0 to 1"):
        score(f"{__name__}:double", "x", ["x"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bleu", "'bleu' is unknown, expected exact, f1, gaia, list, number, sub_exact, number:TOLERANCE or"),
        ("exact:0.1", "'exact:0.1' is unknown"),
        ("number:lots", "the tolerance is 'lots', expected a number from 0 to 1"),
        ("number:nan", "the tolerance is 'nan'"),
        ("no_such_module_here:rule", "No module named 'no_such_module_here'"),
        ("json:rule", "json has no function 'rule'"),
    ],
)
def test_a_rule_that_is_none_is_refused_by_name(name: str, words: str) -> None:
    """Before anything is scored."""
    with pytest.raises(ConfigError, match=re.escape(words)):
        find_rule(name)
