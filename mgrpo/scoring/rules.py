"""Rules that compare an answer with the gold answers, by name.

    gaia        GAIA's own scorer (https://huggingface.co/spaces/gaia-benchmark/leaderboard, scorer.py): by the gold
                answer's form a number, a list or a string
    exact       exact match after SQuAD's normalisation, as in Search-R1 and FlashRAG
    f1          overlap of words after SQuAD's normalisation, as in FlashRAG
    sub_exact   the normalised gold answer stands somewhere in the normalised answer, as in Search-R1; "us" stands in
                "house" too
    number      the one number of the answer is the gold one; "number:0.05" allows a relative difference of 5 %
    list        the same elements in any order; commas within numbers do not separate
    package.module:function     one's own: function(answer, gold) -> 0..1, or a truth value

A question may have several gold answers: the best of them counts. No answer (None) is worth 0 under every rule.

1. GAIA's scorer takes None for the text "None"; here it is wrong. Everything else is as there, also what looks odd:
   "25" is right for the gold answer "2.5%" (a string without its punctuation), "12,345" is a list of two numbers, and a
   gold "inf" accepts whatever is no number.
2. A gold answer that SQuAD's normalisation leaves nothing of ("A", "The", "!") is compared as text, up to case and
   outer spaces: as an empty string it would stand in every answer.
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

from mgrpo.errors import ConfigError
from mgrpo.plugins import errors_named

Rule = Callable[[str, str], float]
"""(answer, gold) -> 0..1."""

_UNITS = str.maketrans("", "", "$%,")  # what GAIA ignores in a number
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CLOSED = ("yes", "no", "noanswer")  # FlashRAG: no partial credit beside these
_NUMBER = re.compile(
    r"(?<![\w.,])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?![\d.,]*\d)"
    r"(?:\s*(thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_ROUNDING = 1e-9  # relative: two spellings of one number
_SEPARATORS = re.compile(
    r"[;\n]|,(?!\d{3}(?!\d))|(?<!\d),"
)  # a comma between digits and exactly three more: 12,345


def score(rule: str, answer: str | None, gold: Sequence[str]) -> float:
    """What `answer` is worth, 0..1: the best over the gold answers. Raises ConfigError for an unknown rule, ValueError
    where there is no gold answer and where an own rule gives anything but 0..1."""
    if not gold:
        raise ValueError("gold is empty, expected at least one answer")
    if answer is None:
        return 0.0
    compare = find_rule(rule)
    best = 0.0
    for one in gold:
        value = float(compare(answer, one))
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"rule {rule!r} gave {value}, expected 0 to 1")
        best = max(best, value)
    return best


@lru_cache(maxsize=64)
def find_rule(name: str) -> Rule:
    """The rule of a name; see the module's docstring. Raises ConfigError for a name that is unknown, a tolerance that
    is no number from 0 to 1, and a module that cannot be loaded."""
    if name in RULES:
        return RULES[name]
    head, colon, tail = name.partition(":")
    if head == "number" and colon:
        return partial(number, tolerance=_tolerance(name, tail))
    if not (head and colon and tail) or head in RULES:
        known = ", ".join(sorted(RULES))
        raise ConfigError(
            f"rule {name!r} is unknown, expected {known}, number:TOLERANCE or package.module:function"
        )
    with errors_named(f"rule {name!r}"):
        found = getattr(importlib.import_module(head), tail, None)
    if not callable(found):
        raise ConfigError(f"rule {name!r}: {head} has no function {tail!r}")
    own: Rule = found
    return own


def _tolerance(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"rule {name!r}: the tolerance is {text!r}, expected a number from 0 to 1")
    return value


def gaia(answer: str, gold: str) -> float:
    """1 or 0 by GAIA's rules: see the module's docstring."""
    if _is_float(gold):
        return float(_gaia_number(answer) == float(gold))
    if "," not in gold and ";" not in gold:
        return float(_gaia_text(answer).translate(_PUNCTUATION) == _gaia_text(gold).translate(_PUNCTUATION))
    given, wanted = re.split("[,;]", answer), re.split("[,;]", gold)
    return float(len(given) == len(wanted) and all(map(_gaia_element, given, wanted)))


def _gaia_element(given: str, wanted: str) -> bool:
    """One place of a list. Punctuation counts here."""
    if _is_float(wanted):
        return _gaia_number(given) == float(wanted)
    return _gaia_text(given) == _gaia_text(wanted)


def _gaia_text(text: str) -> str:
    return re.sub(r"\s", "", text).lower()


def _gaia_number(text: str) -> float:
    """Without `$ % ,`; infinity where that is no number."""
    plain = text.translate(_UNITS)
    return float(plain) if _is_float(plain) else math.inf


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, gold: str) -> float:
    """1 if both are the same after normalisation, else 0."""
    wanted = normalized(gold)
    return float(normalized(answer) == wanted if wanted else _bare_match(answer, gold))


def sub_exact(answer: str, gold: str) -> float:
    """1 if the normalised answer holds the normalised gold answer, else 0."""
    wanted = normalized(gold)
    return float(wanted in normalized(answer) if wanted else _bare_match(answer, gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of the precision and recall of words, 0..1; "yes" and "no" are right or wrong as a whole."""
    given, wanted = normalized(answer), normalized(gold)
    if not wanted:
        return float(_bare_match(answer, gold))
    if given != wanted and (given in _CLOSED or wanted in _CLOSED):
        return 0.0
    words, golden = given.split(), wanted.split()
    same = sum((Counter(words) & Counter(golden)).values())
    return 2.0 * same / (len(words) + len(golden))  # = 2PR / (P + R), with P = same/words and R = same/golden


def _bare_match(answer: str, gold: str) -> bool:
    return answer.strip().lower() == gold.strip().lower()


def number(answer: str, gold: str, tolerance: float = 0.0) -> float:
    """1 if the answer's only number is the gold one within tolerance * |gold|, else 0. Thousands may be grouped by
    commas or written out ("3.2 million"); units and words around the number do not matter, a second number is wrong. A
    gold answer without exactly one number is compared as `exact`."""
    wanted = _only_number(gold)
    if wanted is None:
        return exact(answer, gold)
    given = _only_number(answer)
    return float(given is not None and abs(given - wanted) <= max(tolerance, _ROUNDING) * abs(wanted))


def _only_number(text: str) -> float | None:
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    scale = _SCALES.get((found[0].group(1) or "").lower(), 1.0)
    digits = found[0].group().lower().removesuffix((found[0].group(1) or "").lower()).strip()
    return float(digits.replace(",", "").replace("\u2212", "-")) * scale


def listed(answer: str, gold: str) -> float:
    """1 if both are the same elements in any order, else 0. Elements end at a semicolon, a line or a comma that groups
    no thousands ("12,345" is one number); each pair is compared as a number where it is one, else as `exact`."""
    given, wanted = (sorted(map(_element, elements(text))) for text in (answer, gold))
    return float(given == wanted)


def elements(text: str) -> list[str]:
    """The parts of a list, without those that are blank."""
    return [part.strip() for part in _SEPARATORS.split(text) if part.strip()]


def _element(text: str) -> str:
    plain = text.translate(_UNITS).strip().replace("\u2212", "-")
    return repr(float(plain)) if _is_float(plain) else normalized(text) or text.strip().lower()


RULES: Mapping[str, Rule] = {
    "gaia": gaia,
    "exact": exact,
    "f1": f1,
    "sub_exact": sub_exact,
    "number": number,
    "list": listed,
}
