"""Templates that write today's date write the same one on every day."""

from __future__ import annotations

import datetime

import pytest

from mgrpo.model.chat import ChatFormat
from mgrpo.model.chat_clock import without_clock
from tests.test_chat import CHATML, tokenizer

DATED = (
    "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    'Today is {{ date_string or date }}, {{ strftime_now(format="%Y-%m-%d") }}.\n' + CHATML
)


@pytest.mark.parametrize("variables", [{}, {"date_string": "2 May 2031"}])
def test_the_date_does_not_move(variables: dict[str, str]) -> None:
    """Whatever the calendar says, unless the task's settings name a day."""
    form = ChatFormat(tokenizer(DATED), **variables)
    text = form.tokenizer.decode(form.begin([{"role": "user", "content": "u"}]))
    assert text.startswith(
        f"Today is {variables.get('date_string', '01 Jan 2025')}, 2025-01-01.\n<|im_start|>"
    )
    now = datetime.datetime.now().strftime("%Y-%m-%d")
    assert now not in text


def test_a_template_without_a_date_is_left_alone() -> None:
    """Byte for byte, so that compiled templates are shared."""
    assert without_clock(CHATML) is CHATML
    assert without_clock("\n{{ strftime_now(fmt) }}").endswith("\n{{ strftime_now(fmt) }}")
    assert "2031" in without_clock("{{ strftime_now('%Y') }}", datetime.datetime(2031, 5, 2))
