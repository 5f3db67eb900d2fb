"""What the gateway asks of a dialect: JSON -> Wanted (with its TurnRequest), TurnReply -> JSON or events.

Each dialect is a module of its own: chat_completions, responses, messages. None of them knows HTTP or rollouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.fields import Table, needed
from mgrpo.gateway.turn import TurnReply, TurnRequest

Decode = Callable[[int], str]
"""The text of one token of the role that speaks."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request says outside of its body. role: that its path names, if it names one."""

    role: str | None = None
    invocation: int | None = None
    repeated: bool = False

    def speaker(self, body: Table) -> str:
        """The role: of the path, else the body's `model`."""
        return self.role if self.role is not None else needed(body, "model")


def _nothing(reply: TurnReply) -> None:
    """What most dialects do with a reply once it is there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that was understood. overridden: settings that are not taken. stream: the answer is to be events.
    usage: with a chunk of the tokens' numbers. logprobs: with those of the sampled tokens. echo: what the answer
    repeats of the request. played: called with the reply once it was sampled, also where nobody waits for it."""

    turn: TurnRequest
    overridden: tuple[str, ...]
    stream: bool
    usage: bool = False
    logprobs: bool = False
    echo: Mapping[str, object] = field(default_factory=dict)
    played: Callable[[TurnReply], None] = _nothing


class Dialect(ABC):
    """One API."""

    @abstractmethod
    def read(self, body: Table, asked: Asked) -> Wanted:
        """Raises GatewayError (400, 404) for what cannot be asked."""

    @abstractmethod
    def answer(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Mapping[str, object]:
        """decode: where wanted.logprobs asks for the tokens' texts."""

    @abstractmethod
    def events(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Iterator[bytes]:
        """The answer as server-sent events, each whole."""

    @abstractmethod
    def error(self, error: GatewayError) -> Mapping[str, object]:
        """The body of a refusal."""

    @abstractmethod
    def error_event(self, error: GatewayError) -> bytes:
        """A refusal of a stream that has begun."""


def place(reply: TurnReply) -> Mapping[str, object]:
    """Which conversation answered, for a program that posts rewards."""
    return {"role": reply.role, "invocation": reply.invocation}


def pieces(text: str, most: int = 4) -> Sequence[str]:
    """A text as at most `most` pieces of about the same length, to be streamed; none of an empty text."""
    length = max(1, -(-len(text) // most))
    return [text[begin : begin + length] for begin in range(0, len(text), length)]
