"""Chat templates without a clock.

Templates of some families (Llama 3, gpt-oss) write today's date, from transformers' function strftime_now. A rollout
that is played again, or that lives past midnight, must read the same prompt: for them it is always the same day.
"""

from __future__ import annotations

import datetime
import re
from functools import lru_cache

TODAY = datetime.datetime(2025, 1, 1)
"""The day that templates write where the task gives none."""

_CALLS = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")


@lru_cache(maxsize=32)
def without_clock(template: str, today: datetime.datetime = TODAY) -> str:
    """The template with strftime_now answering for `today`. A format that stands in no literal gives an ISO date."""
    if "strftime_now" not in template:
        return template
    formats = {found[1] for found in _CALLS.findall(template)}
    answers = {written: today.strftime(written) for written in sorted(formats)}
    # A macro hides the global function of its name. The empty text keeps a line break that the template begins with.
    return (
        "{% macro strftime_now(format) %}{{ "
        + f"{answers!r}.get(format, {today.date().isoformat()!r})"
        + " }}{% endmacro %}{{ '' }}"
        + template
    )
