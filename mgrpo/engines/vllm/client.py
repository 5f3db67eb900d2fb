"""What vLLM's routes and JSON are: the only file that knows them, with weight_sync.py and plugin_client.py
for updates.

Tokens go through `/inference/v1/generate`: ids in; ids, log-probs and spans of weight versions out. The server decodes
them only where it is to look for stop texts.
Every sampling parameter that could change the distribution is sent, so that no default of the server or of the model's
generation_config.json acts. A server that was started with --enable-return-routed-experts puts the experts of each
token into every answer, as a numpy file; they are read where routing is replayed. Weight updates go through the
development routes (VLLM_SERVER_DEV_MODE=1, vLLM 0.32 or newer), which no API key guards: a server that listens must do
so on a private address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from mgrpo.engines import routed
from mgrpo.engines.base import ParsedTurn, SamplingParams
from mgrpo.engines.client import LOOK_SECONDS, NEVER, Completion, ServerClient, ServerInfo, Span
from mgrpo.errors import ConfigError, InfrastructureError

HOTTEST = 2.0  # the highest temperature the server takes
COOLEST = 0.01  # it raises lower ones to this
DERENDER = "/v1/chat/completions/derender"
PARSER_HINT = "start it with --enable-auto-tool-choice --tool-call-parser NAME (and --reasoning-parser NAME)"


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
    routed_experts: str | None = None


class _Ranked(msgspec.Struct):
    logprob: float


class _Generated(msgspec.Struct):
    choices: list[_Choice]
    prompt_logprobs: list[dict[str, _Ranked] | None] | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct):
    function: _Function


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] = []


class _ChatChoice(msgspec.Struct):
    message: _Message


class _Derendered(msgspec.Struct):
    choices: list[_ChatChoice]


class VllmClient(ServerClient):
    """See ServerClient."""

    name = "vLLM"
    temperatures = (COOLEST, HOTTEST)
    logprobs_hint = "start it with --logprobs-mode processed_logprobs"
    versions_hint = "needs vLLM 0.32 or newer"
    length_setting = "max-model-len"
    parses_turns = True

    cache_salt: str | None = None
    """Requests share cached keys and values with those of the same salt alone; see weight_sync.py."""
    plugin: bool | None = None
    """Whether it has our plug-in; None while nobody has asked (plugin_client.py)."""
    _has_parser = False
    """Whether it has shown that it was started with one."""

    async def generate(
        self,
        model: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        never: Sequence[int] = (),
        known: int = 0,
    ) -> Completion:
        """See ServerClient."""
        sampling = sampling_body(params, seed, never)
        if known:
            sampling["routed_experts_prompt_start"] = known
        body = {
            "model": model,
            "token_ids": list(prompt_ids),
            "sampling_params": sampling,
            "stream": False,
        }
        if self.cache_salt is not None:
            body["cache_salt"] = self.cache_salt
        answer = await self._call("POST", "/inference/v1/generate", json=body)
        try:
            (choice,) = msgspec.json.decode(answer, type=_Generated).choices
        except (msgspec.DecodeError, ValueError) as error:
            raise InfrastructureError(f"{self.url}: an answer that is no generation: {error}") from None
        made = self._completion(choice, params.max_tokens)
        if self.routing is not None and choice.routed_experts is not None:
            raw = routed.from_npy(choice.routed_experts, self.url)
            tokens = len(prompt_ids) + len(made.token_ids) - 1 - known
            return replace(made, experts=routed.experts_of(raw, self.routing, tokens, self.url))
        return made

    def _completion(self, choice: _Choice, max_tokens: int) -> Completion:
        ids = choice.token_ids or []
        reason = choice.finish_reason
        tokens = (choice.logprobs and choice.logprobs.content) or []
        if reason not in ("stop", "length"):
            raise InfrastructureError(f"{self.url}: a generation ended by {reason!r} after {len(ids)} tokens")
        logprobs = [token.logprob for token in tokens]
        self._checked(ids, logprobs, max_tokens)
        if [token.token_id for token in tokens] != ids:
            raise InfrastructureError(f"{self.url}: its log-probs are of other tokens than it sampled")
        spans = [Span(span.version, span.start, span.end) for span in choice.weight_versions or []]
        return Completion(ids, logprobs, spans, "stop" if reason == "stop" else "length")

    async def info(self) -> ServerInfo:
        """See ServerClient."""
        (first, *_) = (await self.get("/v1/models"))["data"]
        return ServerInfo(str(first["id"]), int(first["max_model_len"]))

    async def models(self) -> list[str]:
        """Names that generate() takes: the served one and those of the adapters it holds."""
        return [str(model["id"]) for model in (await self.get("/v1/models"))["data"]]

    async def healthy(self) -> None:
        """See ServerClient."""
        await self._call("GET", "/health", timeout=LOOK_SECONDS)

    async def top_logprobs(self, model: str, temperature: float) -> list[float]:
        """See ServerClient."""
        sampling = sampling_body(SamplingParams(1, temperature), 0) | {"logprobs": 5}
        body = {"model": model, "token_ids": [1], "sampling_params": sampling, "stream": False}
        answer = await self._call("POST", "/inference/v1/generate", json=body)
        (choice,) = msgspec.json.decode(answer, type=_Generated).choices
        (token,) = (choice.logprobs and choice.logprobs.content) or [_Token(0, 0.0)]
        return list({top.token_id: top.logprob for top in token.top_logprobs}.values())

    async def prompt_logprobs(self, model: str, token_ids: Sequence[int]) -> list[float]:
        """See ServerClient. The server computes them anew, whatever its prefix cache holds."""
        sampling = sampling_body(SamplingParams(1, 1.0), 0) | {"prompt_logprobs": 0}
        body = {"model": model, "token_ids": list(token_ids), "sampling_params": sampling, "stream": False}
        if self.cache_salt is not None:
            body["cache_salt"] = self.cache_salt
        answer = await self._call("POST", "/inference/v1/generate", json=body)
        try:
            found = msgspec.json.decode(answer, type=_Generated).prompt_logprobs or []
            return [
                (ranked or {})[str(token)].logprob
                for token, ranked in zip(token_ids[1:], found[1:], strict=True)
            ]
        except (msgspec.DecodeError, ValueError, KeyError) as error:
            raise InfrastructureError(f"{self.url}: no log-probs of its prompt: {error!r}") from None

    async def parse_turn(
        self, token_ids: Sequence[int], tools: Sequence[Mapping[str, object]], prompt_ids: Sequence[int]
    ) -> ParsedTurn:
        """See ServerClient. Its route makes plain text of everything where the server has no parser; whether it has one
        is asked first, once."""
        generated: dict[str, object] = {"choices": [{"index": 0, "token_ids": list(token_ids)}]}
        if not self._has_parser:
            await self._require_parser(generated)
        chat: dict[str, object] = {"messages": [{"role": "user", "content": ""}]}  # it looks at tools alone
        if tools:
            chat |= {"tools": list(tools), "tool_choice": "auto"}
        body: dict[str, object] = {"generate_response": generated, "chat_request": chat}
        if prompt_ids:
            generated["prompt_token_ids"] = body["prompt_token_ids"] = list(prompt_ids)
        answer = await self._call("POST", DERENDER, json=body)
        try:
            (choice,) = msgspec.json.decode(answer, type=_Derendered).choices
        except (msgspec.DecodeError, ValueError) as error:
            raise InfrastructureError(f"{self.url}: an answer that is no chat message: {error}") from None
        said = choice.message
        calls = tuple((call.function.name, call.function.arguments) for call in said.tool_calls)
        return ParsedTurn(said.content or "", said.reasoning or "", calls)

    async def _require_parser(self, generated: Mapping[str, object]) -> None:
        """Raise ConfigError for a server without a parser: it alone answers where no chat request is given."""
        try:
            await self._call("POST", DERENDER, json={"generate_response": generated})
        except ValueError as error:
            if "chat_request is required" not in str(error):
                raise
            self._has_parser = True
            return
        raise ConfigError(f"{self.url}: parses no tool calls; {PARSER_HINT}")

    def _hint(self, path: str, status: int) -> str:
        if path == DERENDER:
            return {403: "start it with --enable-scale-out", 404: "needs vLLM 0.32 or newer"}.get(status, "")
        if status == 404 and not path.startswith(("/inference/", "/v1/", "/health")):
            return "start it with VLLM_SERVER_DEV_MODE=1, vLLM 0.32 or newer"
        if status == 403 and path.startswith("/inference/"):
            return "start it with --enable-scale-out"
        return ""


def sampling_body(params: SamplingParams, seed: int, never: Sequence[int] = ()) -> dict[str, object]:
    """Everything for the tokens to come from softmax(logits / temperature) and nothing else, over all ids but those of
    `never`."""
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
        "detokenize": bool(params.stop),
        "logprobs": 0,  # of the sampled token alone
    }
    if params.stop:  # the answer's ids and log-probs hold all that was sampled, the stop text too
        body |= {"stop": list(params.stop), "include_stop_str_in_output": True, "skip_special_tokens": False}
    if never:  # applied before the temperature, and part of the log-probs that the server reports
        body["logit_bias"] = {str(token): NEVER for token in never}
    return body
