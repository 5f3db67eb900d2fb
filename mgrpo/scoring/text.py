"""Text from outside within a judge's prompt: data, never instructions, never control tokens, never a verdict.

    template "Question: {question} Answer: {answer}" + parts -> prompt, in one pass: braces within a part stay braces

What a candidate writes is neutralised before it is put there:

1. Invisible characters are removed: they hide instructions from people, and words from the next steps.
2. Whatever looks like a control token or a tag (`<|im_end|>`, `</s>`, `<tool_call>`, `[INST]`) gets a space behind its
   first character. It is then no token of any vocabulary, and no end of the template's own marks. Every tag is broken,
   not those of a list: the judge's tokenizer is not known here.
3. What is longer than a cap is cut, visibly.
4. Colons behind a word that a verdict or a score begins with ("Verdict: correct", `"score": 10`) become dashes: a
   judge that quotes the candidate does not thereby pronounce a verdict.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from mgrpo.errors import ConfigError
from mgrpo.scoring.verdict import COLON, MARK

_HIDDEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
)  # control, format (zero width, direction, tags), lone surrogates, private use
_TAG = re.compile(r"<(?=[/|!?\uff5c\u2581\w])|\[(?=\||/?[A-Za-z_]\w*\])")
_LABEL = re.compile(rf"(verdict|score|grade|rating|judge?ment)((?:{MARK}|{COLON})+)", re.IGNORECASE)
_COLON = re.compile(COLON)
_FIELD = re.compile(r"\{(\w+)\}")


def fill(template: str, **parts: str) -> str:
    """`template` with each {name} of `parts` replaced. What the parts say is not looked at again, and other braces stay
    as they are."""
    return _FIELD.sub(lambda match: parts.get(match[1], match[0]), template)


def check_template(where: str, template: str, names: Sequence[str]) -> None:
    """Raises ConfigError where a template lacks one of `names`: the judge would not see that part."""
    if missing := sorted(set(names) - set(_FIELD.findall(template))):
        raise ConfigError(f"{where} lacks {', '.join(f'{{{name}}}' for name in missing)}")


def plain(text: str) -> str:
    """Steps 1 and 2, which suffice for text of a data set: a question, gold answers. Idempotent."""
    visible = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in _HIDDEN)
    return _TAG.sub(lambda match: match[0] + " ", visible)


def of_candidate(text: str, limit: int) -> str:
    """All steps. limit: most characters of it, at least 1."""
    cut = shortened(plain(text), limit)
    return _LABEL.sub(lambda match: match[1] + _COLON.sub(" -", match[2]), cut)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, three quarters of them from its start, with a mark where it was cut."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    mark = f"\n(... {len(text) - limit} characters left out ...)\n"
    return text[: limit - tail] + mark + text[len(text) - tail :]
