"""A vLLM server of the tests' own: the routes that mgrpo uses.

Token i of an answer is a function of (bytes of the weights, prompt, seed, i), so an answer by the wrong weights is a
wrong answer. It keeps vLLM's rules and breaks loudly where a client breaks them: weights change only while it is
paused, a label only then, and keys of older weights that a request could find are an error of whoever left them there:
a prefix cache that survives an update may be shared by nobody who asks for the new weights. A pause clears the cache,
running requests included, unless it is asked not to.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.types import Probe
from tests.fake_server import VOCAB, FakeServer, Routes, logprob, token, words
from tests.plugin_kit import Worker

START = "routed_experts_prompt_start"


def npy(array: np.ndarray[Any, Any]) -> str:
    """As vLLM sends arrays."""
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


class FakeVllm(FakeServer):
    """See FakeServer."""

    generate_path = "/inference/v1/generate"
    unrecorded = ("/health", "/weight_info", "/is_paused", "/v1/models")
    finish: str | None = None  # what ends every generation
    plugin = False  # ours is in it
    parser = True  # it was started with one of tool calls
    deaf = False  # as vLLM with a tied model on a CPU: it takes new weights and goes on with the old ones

    def _forget(self) -> None:
        super()._forget()
        self.adapters: dict[str, bytes] = {}
        self.salts: set[str | None] = set()  # of the keys in the cache
        self.stale: set[str | None] = set()  # those of older weights among them
        self.pauses: list[str] = []  # their queries
        self.rpcs: list[str] = []
        self.derendered: list[dict[str, Any]] = []
        self.probed = 0
        self.worker = Worker()

    async def _generate(self, body: dict[str, Any], reader: asyncio.StreamReader) -> tuple[int, Any]:
        params, prompt = body["sampling_params"], body["token_ids"]
        adapter = self.adapters.get(body["model"])
        if body["model"] != "policy" and adapter is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if params["temperature"] > 2.0:
            return 400, {"error": {"message": "temperature must be at most 2"}}
        if params.get("prompt_logprobs") == 0:
            await self.running.wait()
            self.probed += 1
            of = adapter or self.weights
            ranked = [{str(i): {"logprob": logprob(of, prompt[:n])}} for n, i in enumerate(prompt)]
            choice: dict[str, Any] = {"finish_reason": "length", "token_ids": [0]}
            return 200, {"choices": [choice], "prompt_logprobs": [None, *ranked[1:]]}
        self.bodies.append(body)
        salt = body.get("cache_salt")
        ids: list[int] = []
        spans: list[dict[str, Any]] = []
        reason = "length"
        routes = Routes()
        while len(ids) < params["max_tokens"]:
            if self.hold_at in (None, len(ids)):
                self.standing = not self.hold.is_set()
                await self.hold.wait()
            await self.running.wait()
            await asyncio.sleep(0)
            if reader.at_eof():  # as vLLM: a client that has gone ends its own request
                self.aborted += 1
                raise ConnectionResetError
            if len(prompt) > 1:  # one token has no prefix to find
                assert self.clean or salt is not None, "an answer from a prefix cache of older weights"
                assert ids or salt not in self.stale, "a new request that finds keys of older weights"
                self.salts.add(salt)
            routes.feed(adapter or self.weights, [*prompt, *ids])
            ids.append(token(adapter or self.weights, prompt, params["seed"], len(ids)))
            if not spans or spans[-1]["version"] != self.label:
                spans.append({"version": self.label, "start": len(ids) - 1})
            spans[-1]["end"] = len(ids)
            if ids[-1] in params["stop_token_ids"] or self._at_text(params, ids):
                reason = "stop"
                break
        logprobs = [
            -2.0 * rank / (1.0 if self.raw_logprobs else params["temperature"] or 1.0) for rank in range(1, 6)
        ]
        top = [
            {"token_id": rank, "logprob": value} for rank, value in enumerate(logprobs[: params["logprobs"]])
        ]
        if top:  # as vLLM: the sampled token first, then the likeliest, as many as were asked for with it
            top = [{"token_id": VOCAB - 1, "logprob": -20.0 * params["temperature"]}, *top[:-1]]
        content = [{"token_id": i, "logprob": logprobs[0], "rank": 1, "top_logprobs": top} for i in ids]
        choice = {"index": 0, "finish_reason": self.finish or reason, "token_ids": ids}
        if self.routes:
            choice["routed_experts"] = self.spoil(npy(routes.since(params.get(START, 0)).astype(np.uint8)))
        return 200, {"choices": [choice | {"logprobs": {"content": content}, "weight_versions": spans}]}

    def _at_text(self, params: dict[str, Any], ids: list[int]) -> bool:
        """As vLLM, which decodes for stop texts alone."""
        stops = params.get("stop", [])
        assert params["detokenize"] is bool(stops), "stop texts need detokenize, and nothing else does"
        return self.heeds_stops and any(stop in words(ids) for stop in stops)

    def on_v1_chat_completions_derender(self, body: dict[str, Any], query: str) -> Any:
        """As a server with a parser of tool calls, in which "w7" calls the first tool with the words behind it."""
        self.derendered.append(body)
        (choice,), chat = body["generate_response"]["choices"], body.get("chat_request")
        if not choice["token_ids"]:
            return 400, {"error": {"message": "choice 0 has empty or null token_ids"}}
        if chat is None and self.parser:
            return 400, {"error": {"message": "chat_request is required when a tool parser is configured"}}
        message: dict[str, Any] = {"content": words(choice["token_ids"]), "tool_calls": []}
        if chat is not None and "tools" in chat:
            if not all("function" in tool for tool in chat["tools"]) or not chat["tools"]:
                return 400, {"error": {"message": "tools: field required: function"}}
            content, called, behind = message["content"].partition("w7")
            name = chat["tools"][0]["function"]["name"]
            function = {"name": name, "arguments": json.dumps({"query": behind.strip()})}
            calls = [{"id": "x", "type": "function", "function": function}] if called else []
            message = {"content": content.strip() or None, "reasoning": None, "tool_calls": calls}
        return 200, {
            "choices": [{"index": 0, "message": message, "finish_reason": choice.get("finish_reason")}]
        }

    def _change(self) -> None:
        """What the cache holds from now on is of older weights."""
        self.clean = False
        self.stale |= self.salts

    # -- control routes ------------------------------------------------------------------------------------------

    def on_health(self, body: dict[str, Any], query: str) -> Any:
        return {}

    def on_v1_models(self, body: dict[str, Any], query: str) -> Any:
        names = ["policy", *self.adapters]
        return {"data": [{"id": name, "max_model_len": self.max_length} for name in names]}

    def on_weight_info(self, body: dict[str, Any], query: str) -> Any:
        return {"weight_version": self.label}

    def on_is_paused(self, body: dict[str, Any], query: str) -> Any:
        return {"is_paused": not self.running.is_set()}

    def on_pause(self, body: dict[str, Any], query: str) -> Any:
        assert query.startswith("mode=keep"), f"/pause?{query} would end the requests of other clients"
        self.pauses.append(query)
        self.running.clear()
        if query != "mode=keep&clear_cache=false":
            self.salts.clear()
        return {"status": "paused"}

    def on_collective_rpc(self, body: dict[str, Any], query: str) -> Any:
        method, arguments = body["method"], body["kwargs"]
        self.rpcs.append(method)
        if method in self.refuse:
            status, message = self.refuse[method]
            return status, {"error": {"message": message}}
        if method == "mgrpo_info" and self.plugin:
            return {"results": [self.worker.mgrpo_info()]}
        if method.startswith("mgrpo_") and not self.plugin:
            return 500, {
                "error": {
                    "message": f"Call to collective_rpc method failed: Method {method!r} is not implemented."
                }
            }
        assert not self.running.is_set()
        self._change()
        if method == "reload_weights":
            self._serve((Path(arguments["weights_path"]) / "model.safetensors").read_bytes())
            return {"results": [None]}
        answer = getattr(self.worker, method)(**arguments)
        self._serve(self.worker.bytes_held() if answer["label"] else b"torn")
        return {"results": [answer]}

    def _serve(self, weights: bytes) -> None:
        if not self.deaf or self.weights == b"its own":
            self.weights = weights

    def on_reset_prefix_cache(self, body: dict[str, Any], query: str) -> Any:
        self.clean = query == "reset_running_requests=true"
        if self.clean:
            self.salts.clear()
            self.stale.clear()
        return {"success": True}

    def on_update_weight_version(self, body: dict[str, Any], query: str) -> Any:
        assert not self.running.is_set(), "a label that changes while tokens are sampled"
        self.label = body["new_version"]
        return {"success": True}

    def on_resume(self, body: dict[str, Any], query: str) -> Any:
        self.running.set()
        return {"status": "resumed"}

    def on_v1_load_lora_adapter(self, body: dict[str, Any], query: str) -> Any:
        data = (Path(body["lora_path"]) / "adapter_model.safetensors").read_bytes()
        self.adapters[body["lora_name"]] = b"another adapter" if self.deaf else data
        return "Success"

    def on_v1_unload_lora_adapter(self, body: dict[str, Any], query: str) -> Any:
        del self.adapters[body["lora_name"]]
        return "Success"


class FakePlugin(FakeVllm):
    """With our plug-in, and a model double in it."""

    plugin = True


def probe_of(weights: bytes, prompt: tuple[int, ...] = (5, 9, 2, 6)) -> Probe:
    """What a trainer would say of these weights."""
    return Probe(prompt, tuple(logprob(weights, prompt[:n]) for n in range(1, len(prompt))))
