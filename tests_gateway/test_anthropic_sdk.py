"""Anthropic's SDK as it is: Messages with tools, plain and streamed."""

from __future__ import annotations

import pytest

from tests_gateway.kit import PROGRAMS, play
from tests_gateway.test_openai_sdk import SCRIPTS, check_team


@pytest.mark.parametrize("arguments", [[], ["--stream"]], ids=["plain", "streamed"])
def test_messages(arguments: list[str]) -> None:
    """Two calls in one turn and their results in one message."""
    check_team(play(PROGRAMS / "messages.py", SCRIPTS, *arguments))
