"""One server over HTTP, whatever runs it: connections, errors, and what an answer must be.

An address is "http://host:port" or "unix:///path/of/a/socket". Subclasses know their server's routes and JSON.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import httpx2
import msgspec

from mgrpo.engines.base import ParsedTurn, SamplingParams
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.routers import Routing
from mgrpo.types import Experts

CONNECT_SECONDS = 5.0
LOOK_SECONDS = 10.0  # for questions that a healthy server answers at once
NEVER = -1e9  # added to the logit of an id that must not be sampled: its probability is exactly 0
LOWEST = -9999.0  # nats; servers write this or less for a log-prob of minus infinity


C = TypeVar("C", bound="ServerClient")


class ServerDown(InfrastructureError):
    """A server cannot be reached, broke off, or is not the one we knew: another may do the same work."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start..end-1 of a completion were sampled by the weights of this label."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """n sampled tokens, the log-prob of each, who sampled which, and why it ended."""

    token_ids: list[int]
    logprobs: list[float]  # nats, of the distribution after the temperature
    spans: list[Span]  # [] when the server keeps no labels
    finish_reason: Literal["stop", "length"]
    experts: Experts | None = None
    """(m, N, k) of tokens `known`..known + m - 1 of prompt and completion together, all but the last one, which was no
    input; None where the server reported none. known: see ServerClient.generate."""

    def cut(self, n: int) -> Completion:
        """Its first n tokens, of which the last completes a stop text."""
        spans = [Span(span.label, span.start, min(span.end, n)) for span in self.spans if span.start < n]
        experts = self.experts
        if experts is not None and n < len(self.token_ids):
            experts = experts[: max(0, len(experts) - (len(self.token_ids) - n))]
        return Completion(self.token_ids[:n], self.logprobs[:n], spans, "stop", experts)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The name of a server's model and the longest history it takes, in tokens."""

    model: str
    max_length: int


class ServerClient(ABC):
    """Use from one event loop. `close` ends its connections; the server itself goes on."""

    name: ClassVar[str]
    """Of the software, for errors."""
    temperatures: ClassVar[tuple[float, float]]
    """Lowest and highest that the server samples at, beside 0."""
    logprobs_hint: ClassVar[str]
    """What to do with a server whose log-probs are not those of the distribution after the temperature."""
    versions_hint: ClassVar[str]
    """What a server needs for its answers to carry weight versions."""
    length_setting: ClassVar[str]
    """The server's argument that bounds a history."""
    parses_turns: ClassVar[bool] = False
    """Whether it has parse_turn()."""
    routing_hint: ClassVar[str] = "start it with --enable-return-routed-experts"
    """What a server needs to report the experts of each token."""

    routing: Routing | None = None
    """The routers whose choices its answers must hold; None where nobody replays them."""

    def __init__(self, url: str, timeout: float) -> None:
        """timeout: seconds of one generation. Raises ConfigError for a url that is none of ours."""
        self.url, self.timeout = url, timeout
        base, transport = url.rstrip("/"), None
        if url.startswith("unix://"):
            base = "http://server"
            transport = httpx2.AsyncHTTPTransport(
                uds=url.removeprefix("unix://"), limits=httpx2.Limits(max_connections=None)
            )
        elif not url.startswith(("http://", "https://")):
            raise ConfigError(f"engine url {url!r}: expected http://host:port or unix:///path")
        self._http = httpx2.AsyncClient(
            base_url=base,
            transport=transport,
            timeout=httpx2.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # no proxy between us and our own servers
        )

    @abstractmethod
    async def generate(
        self,
        model: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        never: Sequence[int] = (),
        known: int = 0,
    ) -> Completion:
        """One completion by `model` (the served name or an adapter). never: ids that must not be sampled. known: with
        `routing`, the first tokens of the prompt whose experts need not be sent. Raises ServerDown, InfrastructureError
        when the generation failed or was aborted, or reports experts that are none, ValueError when the server refuses
        the request."""

    @abstractmethod
    async def info(self) -> ServerInfo:
        """Raises ServerDown while it is not ready."""

    @abstractmethod
    async def healthy(self) -> None:
        """Raises ServerDown when it is not."""

    @abstractmethod
    async def top_logprobs(self, model: str, temperature: float) -> list[float]:
        """Log-probs of the likeliest five tokens after the prompt [1], as the server reports them at `temperature`, in
        any order; fewer where the sampled token has taken the place of one."""

    @abstractmethod
    async def prompt_logprobs(self, model: str, token_ids: Sequence[int]) -> list[float]:
        """(L - 1,) log-probs, in nats at temperature 1, of token_ids[1:], each given those before it, by `model`."""

    async def parse_turn(
        self, token_ids: Sequence[int], tools: Sequence[Mapping[str, object]], prompt_ids: Sequence[int]
    ) -> ParsedTurn:
        """See Engine.parse_turn. Raises ServerDown, too."""
        raise ConfigError(f"{self.url}: {self.name} has no route that parses a turn")

    async def logprobs_follow_temperature(self, model: str) -> bool:
        """True when the log-probs it reports are those of the distribution it samples from, temperature included.

        Twice the temperature halves the distance between the likeliest token and the next ones, however sure the model
        is; log-probs from before the temperature keep it.
        """
        spread = []
        for temperature in (1.0, 2.0):
            # The fifth may be the sampled token, however unlikely.
            top = sorted(await self.top_logprobs(model, temperature), reverse=True)[:4]
            spread.append(top[0] - top[-1] if top else 0.0)
        return spread[0] > 1.5 * spread[1] or spread[0] == 0.0  # all alike: any temperature is the same

    async def reports_routing(self, model: str) -> bool:
        """Whether its answers hold what `routing` asks for. Raises as generate()."""
        answer = await self.generate(model, [1], SamplingParams(1, 1.0), seed=0)
        return answer.experts is not None

    def no_routing(self) -> str:
        """What is wrong with a server that does not."""
        return f"{self.url}: reports no experts of its tokens, and policy.routing_replay is true; {self.routing_hint}"

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> Any:
        """JSON of a route that answers at once."""
        return self._json(path, await self._call("GET", path, timeout=LOOK_SECONDS))

    async def post(self, path: str, json: Mapping[str, object] | None = None, **query: str) -> Any:
        """A control route: JSON in, JSON out (None when the answer is empty)."""
        answer = await self._call("POST", path, json=json, params=query)
        return self._json(path, answer) if answer.lstrip().startswith((b"{", b"[")) else None

    def _json(self, path: str, answer: bytes) -> Any:
        try:
            return msgspec.json.decode(answer)
        except msgspec.DecodeError:
            raise InfrastructureError(
                f"{self.url}{path}: an answer that is no JSON: {answer[:80]!r}"
            ) from None

    async def _call(self, method: str, path: str, *, timeout: float | None = None, **options: Any) -> bytes:
        if timeout is not None:
            options["timeout"] = httpx2.Timeout(timeout, connect=CONNECT_SECONDS)
        try:
            response = await self._http.request(method, path, **options)
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            seconds = self.timeout if timeout is None else timeout
            raise InfrastructureError(f"{self.url}{path}: no answer within {seconds:g} s") from error
        except httpx2.TransportError as error:
            raise ServerDown(f"{self.url}: {str(error) or type(error).__name__}") from error
        if response.is_success:
            return response.content
        status = response.status_code
        what = f"{self.url}{path}: status {status}: {_message(response)}"
        if hint := self._hint(path, status):
            raise ConfigError(f"{what}; {hint}")
        if status in (404, 503):  # a model it does not know any more, an engine that has ended
            raise ServerDown(what)
        if status < 500 and status != 429:
            raise ValueError(what)
        raise InfrastructureError(what)

    def _hint(self, path: str, status: int) -> str:
        """What to change about a server that refuses this route with `status`; "" where that is not known."""
        return ""

    def _checked(self, token_ids: list[int], logprobs: list[float], max_tokens: int) -> None:
        """Raise InfrastructureError for what is no completion of max_tokens at most."""
        if not 1 <= len(token_ids) <= max_tokens or len(logprobs) != len(token_ids):
            raise InfrastructureError(
                f"{self.url}: {len(token_ids)} tokens with {len(logprobs)} log-probs for max_tokens {max_tokens}"
            )
        if not all(LOWEST < value <= 1e-4 for value in logprobs):
            raise InfrastructureError(
                f"{self.url}: log-probs outside ({LOWEST:g}, 0]: {min(logprobs)}..{max(logprobs)}"
            )


def check_healthy(
    where: str, servers: Sequence[C], look: Callable[[C], Awaitable[object]] | None = None
) -> None:
    """Raise ConfigError for the first of the servers that does not answer `look` (None: its health). where: the
    config's field, for errors."""

    async def check() -> None:
        for server in servers:
            try:
                await (server.healthy() if look is None else look(server))
            except InfrastructureError as error:
                raise ConfigError(f"{where}: {error}") from None
            finally:
                await server.close()

    asyncio.run(check())


def _message(response: httpx2.Response) -> str:
    """The server's own message, in one line of at most 300 characters."""
    try:
        body = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        body = response.text
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(body).split())[:300]
