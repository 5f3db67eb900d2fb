"""An SGLang server of the tests' own: the routes that mgrpo uses, in the form of SGLang 0.5's answers.

The token at a position is a function of (bytes of the weights, seed, position), as with deterministic inference, so an
answer by the wrong weights is a wrong answer. It keeps SGLang's rules: one weight_version for an answer, read at its
end; `ignore_eos` turns stop_token_ids off; a pause aborts, and returns when nothing runs any more; a new request waits
for the end of a pause; nobody can ask whether it is paused, and its health check samples a token.
"""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

from tests.fake_server import VOCAB, FakeServer, Routes, logprob, token, words

END_OF_TEXT = VOCAB - 1  # the model's own; sampled at end_at only


class FakeSglang(FakeServer):
    """See FakeServer. end_at: positions at which the model samples its end of text. finish: what ends a generation."""

    generate_path = "/generate"
    unrecorded = ("/health", "/get_model_info", "/get_server_info")
    end_at: tuple[int, ...] = ()
    finish: dict[str, Any] | None = None
    knows_start = True  # routed_experts_start_len
    deaf = False  # it takes new weights and goes on with the old ones

    def _forget(self) -> None:
        super()._forget()
        self.in_flight = 0
        self.aborting = asyncio.Event()
        self.path = "/models/start"

    def token(self, weights: bytes, seed: int, position: int) -> int:
        return END_OF_TEXT if position in self.end_at else token(weights, [], seed, position) % END_OF_TEXT

    async def _generate(self, body: dict[str, Any], reader: asyncio.StreamReader) -> tuple[int, Any]:
        params, prompt = body["sampling_params"], body["input_ids"]
        assert body["return_logprob"] is True and body["stream"] is False
        await self.running.wait()
        self.bodies.append(body)
        self.in_flight += 1
        try:
            ids, reason = await self._sample(params, prompt, reader, routes := Routes())
        finally:
            self.in_flight -= 1
        temperature = 1.0 if self.raw_logprobs else params["temperature"] or 1.0
        top = [
            [-2.0 * rank / temperature, rank, None] for rank in range(1, 1 + body.get("top_logprobs_num", 0))
        ]
        meta = {
            "id": "a4d1",
            "finish_reason": self.finish or reason,
            "prompt_tokens": len(prompt),
            "weight_version": self.label,
            "total_retractions": 0,
            "input_token_logprobs": self._of_prompt(prompt) if body.get("logprob_start_len") == 0 else [],
            "output_token_logprobs": [[-2.0 / temperature, i, None] for i in ids],
            "output_top_logprobs": [top for _ in ids],
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "e2e_latency": 0.01,
        }
        if self.routes and body.get("return_routed_experts"):
            start = body.get("routed_experts_start_len", 0) if self.knows_start else 0
            assert 0 <= start <= len(prompt), "as SGLang: the start lies in the prompt"
            meta["routed_experts"] = self.spoil(
                base64.b64encode(routes.since(start).astype("<i4").tobytes()).decode()
            )
        return 200, {"text": "", "output_ids": ids, "meta_info": meta}

    def _of_prompt(self, prompt: list[int]) -> list[list[Any]]:
        said = [None, *(logprob(self.weights, prompt[:n]) for n in range(1, len(prompt)))]
        return [[value, token, None] for value, token in zip(said, prompt, strict=True)]

    async def _sample(
        self, params: dict[str, Any], prompt: list[int], reader: asyncio.StreamReader, routes: Routes
    ) -> tuple[list[int], dict[str, Any]]:
        ids: list[int] = []
        ends = [] if params["ignore_eos"] else [*params["stop_token_ids"], END_OF_TEXT]
        while len(ids) < params["max_new_tokens"]:
            if self.hold_at in (None, len(ids)) and not self.hold.is_set():
                self.standing = True
                await asyncio.wait(
                    [asyncio.ensure_future(self.hold.wait()), asyncio.ensure_future(self.aborting.wait())],
                    return_when=asyncio.FIRST_COMPLETED,
                )
            await asyncio.sleep(0)
            if reader.at_eof():
                self.aborted += 1
                raise ConnectionResetError
            if self.aborting.is_set():
                return ids, {"type": "abort", "message": "Abort in waiting queue"}
            assert self.running.is_set(), "a token that was sampled during an update"
            assert self.clean, "an answer from a prefix cache of older weights"
            routes.feed(self.weights, [*prompt, *ids])
            ids.append(self.token(self.weights, params["sampling_seed"], len(prompt) + len(ids)))
            at_text = next((stop for stop in params.get("stop", []) if stop in words(ids)), None)
            if self.heeds_stops and at_text is not None:  # in the tokens of this request alone
                return ids, {"type": "stop", "matched": at_text}
            if ids[-1] in ends:
                return ids, {"type": "stop", "matched": ids[-1]}
        return ids, {"type": "length", "length": len(ids)}

    async def _abort(self) -> None:
        self.aborting.set()
        while self.in_flight:
            await asyncio.sleep(0.001)
        self.aborting.clear()

    # -- control routes ------------------------------------------------------------------------------------------

    def on_health(self, body: dict[str, Any], query: str) -> Any:
        return {} if self.running.is_set() else (503, {})

    def on_get_model_info(self, body: dict[str, Any], query: str) -> Any:
        return {"model_path": self.path, "is_generation": True, "weight_version": self.label}

    def on_get_server_info(self, body: dict[str, Any], query: str) -> Any:
        return {"context_length": None, "max_req_input_len": self.max_length, "version": "0.5.6"}

    async def on_pause_generation(self, body: dict[str, Any], query: str) -> Any:
        assert body == {"mode": "abort"}
        self.running.clear()
        await self._abort()
        return {"message": "Generation paused successfully.", "status": "ok"}

    def on_update_weight_version(self, body: dict[str, Any], query: str) -> Any:
        assert body["abort_all_requests"] is False, "it would end the requests of other clients"
        self.label = body["new_version"]
        return {"success": True, "message": "", "new_version": self.label}

    def on_update_weights_from_disk(self, body: dict[str, Any], query: str) -> Any:
        assert not self.running.is_set() and not self.in_flight
        self.path, self.clean = body["model_path"], False
        if not self.deaf:
            self.weights = (Path(self.path) / "model.safetensors").read_bytes()
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def on_flush_cache(self, body: dict[str, Any], query: str) -> Any:
        self.clean = not self.in_flight
        return (200 if self.clean else 400), "Cache flushed."

    def on_continue_generation(self, body: dict[str, Any], query: str) -> Any:
        self.running.set()
        return {"message": "Generation continued successfully.", "status": "ok"}
