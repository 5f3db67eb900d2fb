"""One vLLM server over HTTP: what a rollout and a weight update say to it. The only file that knows vLLM's wire format.

Tokens go through `/inference/v1/generate`: ids in; ids, log-probs and spans of weight versions out, no text on the way.
Every sampling parameter that could change the distribution is sent, so that no default of the server or of the model's
generation_config.json acts. Weight updates go through the development routes (VLLM_SERVER_DEV_MODE=1, vLLM 0.32 or
newer), which no API key guards: a server that listens must do so on a private address.

An address is "http://host:port" or "unix:///path/of/a/socket".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
import msgspec

from mgrpo.engines.base import SamplingParams
from mgrpo.errors import ConfigError, InfrastructureError

CONNECT_SECONDS = 5.0
LOOK_SECONDS = 10.0  # for questions that a healthy server answers at once
PATIENCE_SECONDS = 600.0  # a server may load a large model, or be started again meanwhile
HOTTEST = 2.0  # the highest temperature the server takes
COOLEST = 0.01  # it raises lower ones to this
NEVER = -1e9  # added to the logit of an id that must not be sampled: its probability is exactly 0
LOWEST = -9999.0  # what the server writes for a log-prob of minus infinity


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


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself: the name of its model and the longest history it takes, in tokens."""

    model: str
    max_length: int


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Top(msgspec.Struct):
    token_id: int
    logprob: float


class _Token(msgspec.Struct):
    token_id: int
    logprob: float
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[_Span] | None = None


class _Generated(msgspec.Struct):
    choices: list[_Choice]


class VllmClient:
    """Use from one event loop. `close` ends its connections; the server itself goes on."""

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

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(
        self,
        model: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        never: Sequence[int] = (),
    ) -> Completion:
        """One completion by `model` (the served name or an adapter). never: ids that must not be sampled. Raises
        ServerDown, InfrastructureError when the generation failed or was aborted, ValueError when the server refuses
        the request."""
        body = {
            "model": model,
            "token_ids": list(prompt_ids),
            "sampling_params": sampling_body(params, seed, never),
            "stream": False,
        }
        answer = await self._call("POST", "/inference/v1/generate", json=body)
        try:
            (choice,) = msgspec.json.decode(answer, type=_Generated).choices
        except (msgspec.DecodeError, ValueError) as error:
            raise InfrastructureError(f"{self.url}: an answer that is no generation: {error}") from None
        return self._completion(choice, params.max_tokens)

    def _completion(self, choice: _Choice, max_tokens: int) -> Completion:
        ids = choice.token_ids or []
        reason = choice.finish_reason
        tokens = (choice.logprobs and choice.logprobs.content) or []
        if reason not in ("stop", "length"):
            raise InfrastructureError(f"{self.url}: a generation ended by {reason!r} after {len(ids)} tokens")
        if not 1 <= len(ids) <= max_tokens or [token.token_id for token in tokens] != ids:
            raise InfrastructureError(
                f"{self.url}: {len(ids)} tokens with {len(tokens)} log-probs for max_tokens {max_tokens}"
            )
        logprobs = [token.logprob for token in tokens]
        if not all(LOWEST < value <= 1e-4 for value in logprobs):
            raise InfrastructureError(
                f"{self.url}: log-probs outside ({LOWEST:g}, 0]: {min(logprobs)}..{max(logprobs)}"
            )
        spans = [Span(span.version, span.start, span.end) for span in choice.weight_versions or []]
        return Completion(ids, logprobs, spans, "stop" if reason == "stop" else "length")

    async def info(self) -> ServerInfo:
        """Raises ServerDown while it is not ready."""
        (first, *_) = (await self.get("/v1/models"))["data"]
        return ServerInfo(str(first["id"]), int(first["max_model_len"]))

    async def models(self) -> list[str]:
        """Names that generate() takes: the served one and those of the adapters it holds."""
        return [str(model["id"]) for model in (await self.get("/v1/models"))["data"]]

    async def healthy(self) -> None:
        """Raises ServerDown when it is not."""
        await self._call("GET", "/health", timeout=LOOK_SECONDS)

    async def logprobs_follow_temperature(self, model: str) -> bool:
        """True when the log-probs it reports are those of the distribution it samples from, temperature included.

        Twice the temperature halves the distance between the likeliest token and the next ones, however sure the model
        is; log-probs from before the temperature keep it.
        """
        spread = []
        for temperature in (1.0, 2.0):
            sampling = sampling_body(SamplingParams(1, temperature), 0) | {"logprobs": 5}
            body = {"model": model, "token_ids": [1], "sampling_params": sampling, "stream": False}
            answer = await self._call("POST", "/inference/v1/generate", json=body)
            (choice,) = msgspec.json.decode(answer, type=_Generated).choices
            (token,) = (choice.logprobs and choice.logprobs.content) or [_Token(0, 0.0)]
            by_id = {top.token_id: top.logprob for top in token.top_logprobs}
            top = sorted(by_id.values(), reverse=True)[
                :4
            ]  # the sampled token takes the place of one of the five
            spread.append(top[0] - top[-1] if top else 0.0)
        return spread[0] > 1.5 * spread[1] or spread[0] == 0.0  # all alike: any temperature is the same

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
            options["timeout"] = timeout
        try:
            response = await self._http.request(method, path, **options)
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            seconds = self.timeout if timeout is None else timeout
            raise InfrastructureError(f"{self.url}{path}: no answer within {seconds:g} s") from error
        except httpx2.TransportError as error:
            raise ServerDown(f"{self.url}: {str(error) or type(error).__name__}") from error
        if response.is_success:
            return response.content
        return self._refused(path, response)

    def _refused(self, path: str, response: httpx2.Response) -> bytes:
        what = f"{self.url}{path}: status {response.status_code}: {_message(response)}"
        if response.status_code == 404 and not path.startswith(("/inference/", "/v1/", "/health")):
            raise ConfigError(f"{what}; start it with VLLM_SERVER_DEV_MODE=1, vLLM 0.32 or newer")
        if response.status_code == 403 and path.startswith("/inference/"):
            raise ConfigError(f"{what}; start it with --enable-scale-out")
        if response.status_code in (404, 503):  # a model it does not know any more, an engine that has ended
            raise ServerDown(what)
        if response.status_code < 500 and response.status_code != 429:
            raise ValueError(what)
        raise InfrastructureError(what)


def sampling_body(params: SamplingParams, seed: int, never: Sequence[int] = ()) -> dict[str, object]:
    """What the server must be told for the tokens to come from softmax(logits / temperature) and nothing else, over
    all ids but those of `never`."""
    body: dict[str, object] = {
        "n": 1,
        "max_tokens": params.max_tokens,
        "min_tokens": 0,
        "temperature": params.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed & 0x7FFF_FFFF_FFFF_FFFF,  # the server takes non-negative 64-bit integers
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # only stop_token_ids end a generation
        "detokenize": False,
        "logprobs": 0,  # of the sampled token alone
    }
    if never:  # applied before the temperature, and part of the log-probs that the server reports
        body["logit_bias"] = {str(token): NEVER for token in never}
    return body


def _message(response: httpx2.Response) -> str:
    """What the server said, in one line of at most 300 characters."""
    try:
        body = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        body = response.text
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(body).split())[:300]
