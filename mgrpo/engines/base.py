"""The engine interface: token ids in; token ids, log-probs and policy versions out.

Every engine (in-process Hugging Face, servers over HTTP) implements this and nothing more, so an agent never knows
which one serves it. `seed` makes the sampled tokens a pure function of (weights, prompt, seed): the noise of a request
depends neither on its neighbours in the batch nor on arrival order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mgrpo.errors import ConfigError
from mgrpo.model.tokens import check_text
from mgrpo.types import Experts, Float32, Int32

MAX_STOPS = 16
"""Stop texts of one request."""
MAX_STOP_LENGTH = 256
"""Characters of a stop text."""


def check_stops(stop: object) -> None:
    """Refuse what are no stop texts: see SamplingParams."""
    if not isinstance(stop, tuple):
        raise TypeError(f"stop is {stop!r:.40} of type {type(stop).__name__}; expected a tuple of texts")
    if len(stop) > MAX_STOPS:
        raise ValueError(f"{len(stop)} stop texts; at most {MAX_STOPS} are taken")
    for text in stop:
        check_text(text)
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ValueError(
                f"a stop text of {len(text)} characters ({text:.20}); expected 1..{MAX_STOP_LENGTH}"
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """max_tokens: bound on new tokens. temperature 0 is greedy. Generation ends after any of stop_token_ids (kept).

    stop: texts; generation ends after the token whose text completes one of them. The sampled ids stay as sampled: they
    hold the stop text, and what else its last token spells. Raises ValueError for more than MAX_STOPS texts, an empty
    one, one of more than MAX_STOP_LENGTH characters or with a lone surrogate, TypeError for what is no tuple of
    texts."""

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stop:
            check_stops(self.stop)


@dataclass(slots=True)
class Generation:
    """n sampled tokens with the log-prob each had in the sampling distribution and the version that sampled it."""

    token_ids: Int32  # (n,)
    logprobs: Float32  # (n,) nats; of the temperature-1 distribution when greedy
    versions: Int32  # (n,)
    finish_reason: Literal["stop", "length"]
    experts: Experts | None = None
    """(m, N, k) of the first m tokens of prompt and sampled tokens together, from an engine that was asked for them
    (policy.routing_replay): usually all but the last one, which was no input yet."""


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """What a server's own parsers make of a sampled turn. calls: (name, JSON text of the arguments) of each tool
    call."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]


PATIENCE_SECONDS = 600.0
"""How long load() may wait for a server, which may load a large model, or be started again meanwhile."""


class Engine(ABC):
    """Serves one agent's policy. Methods are called from one asyncio loop."""

    takes_patches = False
    """Whether load() takes what changed since the version that the engine holds; else it gets whole versions."""
    parses_turns = False
    """Whether parse_turn() can be called."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Policy version of the weights that will serve the next request (-1 before the first load)."""

    @abstractmethod
    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        """Continue prompt_ids, to the first end that params name. Calls of one `session` extend one append-only
        history, which lets the engine keep its KV cache. Raises ValueError when the prompt leaves no room for
        max_tokens, InfrastructureError when the engine fails."""

    @abstractmethod
    async def load(self, path_or_state: object, version: int) -> None:
        """Swap the weights (between decode steps, never inside one) and label them `version`. path_or_state: from a
        trainer, Weights (mgrpo/weights/version.py). Raises CorruptionError where these do not lead on from what the
        engine holds or arrived damaged: a whole version follows."""

    async def parse_turn(
        self, token_ids: Sequence[int], tools: Sequence[Mapping[str, object]], prompt_ids: Sequence[int] = ()
    ) -> ParsedTurn:
        """What the server's own parsers of tool calls and thoughts make of a turn. token_ids: at least one, without the
        token that ended the turn. tools: {"type": "function", "function": {...}} each. prompt_ids: the last ones before
        the turn, which a decoder may need to see.

        Raises InfrastructureError when no server answers, ValueError when it refuses the tools, ConfigError where it
        has no parser."""
        raise ConfigError(f"{type(self).__name__} has no parser of tool calls: parses_turns is False")

    def waiting(self) -> int:
        """Requests that wait for something to sample them and are not being sampled yet; 0 for an engine that does not
        know."""
        return 0

    def release(self, session: str) -> None:  # noqa: B027 - optional: engines without a cache have nothing to free
        """The session will not be continued; its cache may go."""

    async def close(self) -> None:  # noqa: B027 - optional
        """Free everything. Idempotent."""
