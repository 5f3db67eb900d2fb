"""A tool of an agent: a name, a JSON schema of its arguments, and what it observes.

Three kinds of failure, kept apart:

    tool_error       the policy's matter, which it sees and learns from: bad arguments, an unknown tool, a page that is
                     not there (404, 410, 451), blocked, binary or behind a paywall. An Observation like any other.
    infrastructure   429, 5xx, timeouts, broken answers: InfrastructureError once the call's own retries are used up. No
                     policy ever sees its text.
    fatal            a refused key, an unknown model, a replay miss: ServiceError, which ends the run.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "empty", "tool_error"]
Source = Literal["live", "cache", "replay"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a tool call gave. text is from outside: data, never instructions and never control tokens."""

    text: str
    links: tuple[str, ...] = ()
    """Addresses that the text names and that a visit may open."""
    status: Status = "ok"
    source: Source = "live"
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the text's SHA-256."""
        return hashlib.sha256(self.text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


class Tool(ABC):
    """One tool. Several rollouts call it at once, on one event loop."""

    name: str
    """An identifier; agents call it by this."""
    description: str
    """What it does, in words for the agent."""
    parameters: Mapping[str, object]
    """JSON schema of its arguments, an object."""
    pure: bool = True
    """The same arguments give the same answer, so that a cassette may serve one recording for all."""

    @abstractmethod
    async def call(self, arguments: Mapping[str, object]) -> Observation:
        """arguments fit the schema. Raises InfrastructureError and ServiceError as said above."""

    async def close(self) -> None:  # noqa: B027
        """Close connections, end processes. Idempotent."""

    def schema(self) -> dict[str, object]:
        """As chat templates and the OpenAI API take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}
