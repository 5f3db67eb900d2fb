"""A tool of an agent: a name, a JSON schema of its arguments, and what it observes.

Three kinds of failure, kept apart:

    tool_error       the policy's matter, which it sees and learns from: bad arguments, an unknown tool, a page that is
                     not there (404, 410, 451), blocked, binary or behind a paywall. A tool raises ToolError with the
                     words for the policy; ToolSet.call makes an Observation like any other of it.
    infrastructure   429, 5xx, timeouts, broken answers: InfrastructureError once the call's own retries are used up. No
                     policy ever sees its text.
    fatal            a refused key, an unknown model, a replay miss: ServiceError, which ends the run.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

from mgrpo.errors import MgrpoError

Status = Literal["ok", "empty", "tool_error"]
Source = Literal["live", "cache", "replay"]
NO_RESULTS = "No results."

occurrence: ContextVar[str] = ContextVar("mgrpo_tool_occurrence", default="")
"""Which of several equal calls this one is: set by ToolSet.call, read by tools that are not pure for their cassette."""


class ToolError(MgrpoError):
    """A call that failed by the policy's doing. The message is what the policy reads: short, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Result:
    """One result of a search."""

    title: str
    url: str
    snippet: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a tool call gave. text is from outside: data, never instructions and never control tokens."""

    text: str
    links: tuple[str, ...] = ()
    """Addresses that the text names and that a visit may open."""
    status: Status = "ok"
    source: Source = "live"
    seconds: float = 0.0
    """Of the call; 0: ToolSet.call measures it."""
    results: tuple[Result, ...] = ()
    """What a search found, so that blocked results can be left out; `text` is then listed(results)."""
    blocked: int = 0
    """Results that the block list left out, 1 for a call that it refused."""

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the text's SHA-256."""
        return hashlib.sha256(self.text.encode("utf-8", "backslashreplace")).hexdigest()[:16]

    @classmethod
    def of_results(
        cls, results: Sequence[Result], source: Source = "live", seconds: float = 0.0, blocked: int = 0
    ) -> Observation:
        """The observation of a search: its results as a numbered list, or "No results." with the status empty."""
        return cls(
            text=listed(results),
            links=tuple(result.url for result in results),
            status="ok" if results else "empty",
            source=source,
            seconds=seconds,
            results=tuple(results),
            blocked=blocked,
        )


def listed(results: Sequence[Result]) -> str:
    """Results as an agent reads them: number, title, address and snippet."""
    entries = (
        "\n".join(part for part in (f"[{number}] {_line(r.title)}", _line(r.url), _line(r.snippet)) if part)
        for number, r in enumerate(results, 1)
    )
    return "\n\n".join(entries) or NO_RESULTS


def stored(seen: Observation) -> dict[str, object]:
    """An observation as JSON, for a cassette; without what belongs to this call (source, seconds, blocked)."""
    results = [[result.title, result.url, result.snippet] for result in seen.results]
    return {"text": seen.text, "links": list(seen.links), "status": seen.status, "results": results}


def restored(answer: object, source: Source) -> Observation:
    """An observation from what stored() gave. Raises ValueError for anything else."""
    try:
        kept = dict(answer)  # type: ignore[call-overload]
        text, links, status = str(kept["text"]), tuple(map(str, kept["links"])), kept["status"]
        results = tuple(Result(*map(str, entry)) for entry in kept["results"])
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{answer!r:.100} is no stored observation") from None
    if status not in get_args(Status):
        raise ValueError(f"a stored observation has the status {status!r:.40}")
    return Observation(text, links, status, source, results=results)


def _line(text: str) -> str:
    return " ".join(text.split())


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
    version: str = ""
    """What its answers depend on beside the arguments, e.g. a corpus' digest: recorded beside results."""

    @abstractmethod
    async def call(self, arguments: Mapping[str, object]) -> Observation:
        """arguments fit the schema. Raises ToolError, InfrastructureError and ServiceError as said above."""

    async def preflight(self) -> None:  # noqa: B027
        """Called before the first step: raises ConfigError where no call could work. Cheap."""

    async def close(self) -> None:  # noqa: B027
        """Close connections, end processes. Idempotent."""

    def schema(self) -> dict[str, object]:
        """As chat templates and the OpenAI API take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}
