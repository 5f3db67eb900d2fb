"""What SGLang's routes and JSON are: the only file that knows them, with weight_sync.py for updates.

NOT RUN against a real server: routes and bodies follow the source of SGLang 0.5 and are tested against a server of the
tests' own that answers in the same form.

Tokens go through `/generate`: ids in; (log-prob, id, text) of each token out. Where it differs from what an engine
promises, one completion takes several requests, each of which continues the tokens of those before it:

1. An answer carries one weight_version, read when it is finished. An update therefore aborts what is running (see
   weight_sync.py): each aborted answer is of the weights before the update, and the request that continues it waits for
   the end of the update and is of those after it. So the version of each token is true.
2. A request ends at the model's own end-of-text ids, whatever it asks for: `ignore_eos` turns stop_token_ids off as
   well. One that ended at an id that is none of our stop_token_ids is continued.
3. An answer holds the experts of the tokens from `routed_experts_start_len` on, all but the last one. Those of an
   aborted request are of the weights that sampled its tokens, so the one that continues it asks for the rest alone.

`sampling_seed` acts in servers that were started with --enable-deterministic-inference; there the noise is a function
of seed and position, which a continued request keeps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec

from mgrpo.engines import routed
from mgrpo.engines.base import SamplingParams
from mgrpo.engines.client import LOOK_SECONDS, NEVER, Completion, ServerClient, ServerInfo, Span
from mgrpo.errors import InfrastructureError
from mgrpo.types import Experts

RETRY_SECONDS = 0.05  # before a request that was aborted without a token is sent again
UPDATING = "updating:"  # before the label of a server whose update is under way; see weight_sync.py

Triple = tuple[float, int, str | None]
"""(log-prob, token id, its text where that was asked for)."""


class _FinishReason(msgspec.Struct):
    type: str
    matched: int | str | None = None
    message: str | None = None


class _MetaInfo(msgspec.Struct):
    finish_reason: _FinishReason
    weight_version: str
    output_token_logprobs: list[Triple] = []
    input_token_logprobs: list[tuple[float | None, int, str | None]] = []
    output_top_logprobs: list[list[Triple] | None] = []
    routed_experts: str | None = None


class _Generated(msgspec.Struct):
    meta_info: _MetaInfo


class SglangClient(ServerClient):
    """See ServerClient."""

    name = "SGLang"
    temperatures = (1e-6, 1e6)  # below, it takes the likeliest token
    logprobs_hint = "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
    versions_hint = "needs SGLang 0.5.6 or newer"
    length_setting = "context-length"

    async def generate(
        self,
        model: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        never: Sequence[int] = (),
        known: int = 0,
    ) -> Completion:
        """See ServerClient. The bound of `timeout` seconds is for all requests together."""
        deadline = time.monotonic() + self.timeout
        sampling = sampling_body(params, seed, never)
        token_ids: list[int] = []
        logprobs: list[float] = []
        spans: list[Span] = []
        experts: list[Experts] = []
        routed_to = known  # tokens whose experts are known by now
        while True:
            sampling["max_new_tokens"] = params.max_tokens - len(token_ids)
            left = deadline - time.monotonic()
            if left <= 0:
                raise InfrastructureError(
                    f"{self.url}: a generation was not finished within {self.timeout:g} s, after "
                    f"{len(token_ids)} tokens"
                )
            meta = await self._generate([*prompt_ids, *token_ids], sampling, left, routed_to)
            start = len(token_ids)
            logprobs += [logprob for logprob, _, _ in meta.output_token_logprobs]
            token_ids += [token for _, token, _ in meta.output_token_logprobs]
            if len(token_ids) > start:
                # Between the end of an update and its label the server samples with the new weights already.
                spans.append(Span(meta.weight_version.removeprefix(UPDATING), start, len(token_ids)))
            stopped = bool(token_ids) and token_ids[-1] in params.stop_token_ids
            stopped |= _at_text(meta.finish_reason, params.stop)
            over = stopped or len(token_ids) >= params.max_tokens
            self._check_reason(meta.finish_reason, len(token_ids), over, params.stop)
            inputs = len(prompt_ids) + len(token_ids) - 1
            found = self._experts(meta, routed_to, inputs) if len(token_ids) > start else None
            if found is not None:
                experts.append(found)
                routed_to = inputs
            if over:
                break
            if len(token_ids) == start:  # aborted while it was waiting
                await asyncio.sleep(RETRY_SECONDS)
        self._checked(token_ids, logprobs, params.max_tokens)
        complete = experts and routed_to == len(prompt_ids) + len(token_ids) - 1
        routes = routed.joined(experts) if complete else None
        return Completion(token_ids, logprobs, spans, "stop" if stopped else "length", routes)

    def _experts(self, meta: _MetaInfo, start: int, end: int) -> Experts | None:
        """Those of tokens start..end-1; None where the answer has none, or an aborted one not all of them: the request
        that continues it reports them too."""
        if self.routing is None or meta.routed_experts is None:
            return None
        raw = routed.from_int32(meta.routed_experts, self.routing, self.url)
        if len(raw) == end:  # of a version that does not know where to start, or start is 0
            raw = raw[start:]
        if len(raw) != end - start and meta.finish_reason.type == "abort":
            return None
        return routed.experts_of(raw, self.routing, end - start, self.url)

    async def _generate(
        self, input_ids: list[int], sampling: dict[str, object], seconds: float, routed_to: int
    ) -> _MetaInfo:
        body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True, "stream": False}
        if self.routing is not None:
            body |= {"return_routed_experts": True, "routed_experts_start_len": routed_to}
        answer = await self._call("POST", "/generate", json=body, timeout=seconds)
        try:
            return msgspec.json.decode(answer, type=_Generated).meta_info
        except msgspec.DecodeError as error:
            raise InfrastructureError(f"{self.url}: an answer that is no generation: {error}") from None

    def _check_reason(self, reason: _FinishReason, n: int, over: bool, stop: Sequence[str]) -> None:
        """Raise InfrastructureError for a request that failed, or that no other can continue although not all is
        `over`. n: tokens so far."""
        at_token = reason.type == "stop" and isinstance(reason.matched, int)
        if not (
            at_token or _at_text(reason, stop) or reason.type == "abort" or (reason.type == "length" and over)
        ):
            raise InfrastructureError(
                f"{self.url}: a generation ended by {reason.type!r} ({reason.matched or reason.message}) "
                f"after {n} tokens"
            )

    async def info(self) -> ServerInfo:
        """See ServerClient."""
        path = str((await self.get("/get_model_info"))["model_path"])
        # Input and output together may be a few tokens longer; more is cut off without an error.
        return ServerInfo(path, int((await self.get("/get_server_info"))["max_req_input_len"]))

    async def weight_version(self) -> str:
        """The text that update() labelled the weights with, or the server's own."""
        return str((await self.get("/get_model_info"))["weight_version"])

    async def healthy(self) -> None:
        """See ServerClient. Its route samples a token, which a paused server cannot."""
        if not (await self.weight_version()).startswith(UPDATING):
            await self._call("GET", "/health", timeout=LOOK_SECONDS)

    async def top_logprobs(self, model: str, temperature: float) -> list[float]:
        """See ServerClient."""
        body = {
            "input_ids": [1],
            "sampling_params": sampling_body(SamplingParams(1, temperature), 0),
            "return_logprob": True,
            "top_logprobs_num": 5,
            "stream": False,
        }
        answer = await self._call("POST", "/generate", json=body)
        (top,) = msgspec.json.decode(answer, type=_Generated).meta_info.output_top_logprobs or [None]
        return [logprob for logprob, _, _ in top or []]

    async def prompt_logprobs(self, model: str, token_ids: Sequence[int]) -> list[float]:
        """See ServerClient."""
        body = {
            "input_ids": list(token_ids),
            "sampling_params": sampling_body(SamplingParams(1, 1.0), 0),
            "return_logprob": True,
            "logprob_start_len": 0,
            "stream": False,
        }
        answer = await self._call("POST", "/generate", json=body)
        found = msgspec.json.decode(answer, type=_Generated).meta_info.input_token_logprobs[1:]
        logprobs = [logprob for logprob, _, _ in found if logprob is not None]
        if [token for _, token, _ in found] != list(token_ids[1:]) or len(logprobs) != len(found):
            raise InfrastructureError(f"{self.url}: no log-probs of its prompt: {answer[:80]!r}")
        return logprobs

    def _hint(self, path: str, status: int) -> str:
        return self.versions_hint if status == 404 and path not in ("/generate", "/health") else ""


def _at_text(reason: _FinishReason, stop: Sequence[str]) -> bool:
    """Whether a stop text ended the request. Any other text is what the server says where it met a NaN."""
    return reason.type == "stop" and reason.matched in stop


def sampling_body(params: SamplingParams, seed: int, never: Sequence[int] = ()) -> dict[str, object]:
    """Everything for the tokens to come from softmax(logits / temperature) and nothing else, over all ids but those of
    `never`."""
    body: dict[str, object] = {
        "n": 1,
        "max_new_tokens": params.max_tokens,
        "min_new_tokens": 0,
        "temperature": params.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "sampling_seed": seed & 0x7FFF_FFFF_FFFF_FFFF,  # the server takes non-negative 64-bit integers
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": not params.stop_token_ids,
        "skip_special_tokens": False,
        "no_stop_trim": True,  # the answer's ids hold the stop text, too
    }
    if params.stop:
        body["stop"] = list(params.stop)
    if never:  # applied before the temperature, and part of the log-probs that the server reports
        body["logit_bias"] = {str(token): NEVER for token in never}
    return body
