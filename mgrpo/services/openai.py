"""A chat model behind the OpenAI API (/v1/chat/completions), of whatever software: judges, experts, simulated users."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mgrpo.services.cassette import Cassette
from mgrpo.services.client import HttpService, Reply, Request
from mgrpo.services.config import ChatServiceConfig as ChatServiceConfig
from mgrpo.services.failures import ServiceAnswer, ServiceFailure

if TYPE_CHECKING:
    import httpx2

SCHEMA_NAME = "answer"
REFUSES_SCHEMA = {400: "the request is refused", 422: "the request is refused"}


class ChatService:
    """Use from one event loop. A server that refuses a JSON schema is asked without one from then on."""

    def __init__(
        self,
        name: str,
        config: ChatServiceConfig,
        cassette: Cassette | None = None,
        *,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """As HttpService. config.url with a path is the API's base, e.g. "https://api.openai.com/v1"; to one without,
        /v1 is added."""
        self.name, self.config = name, config
        self._http = HttpService(name, config, cassette, transport=transport)
        self._path = "/chat/completions" if urlsplit(config.url).path else "/v1/chat/completions"
        self._takes_schema = True

    async def complete(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        schema: Mapping[str, object] | None = None,
        pure: bool = True,
        occurrence: str = "",
    ) -> Reply[str]:
        """The text of the model's answer to a conversation ({"role": ..., "content": ...} each).

        schema: JSON schema that the text is asked to fit; whether it does is not checked here. pure: the same messages
        may be answered from a recording; at a temperature above 0 each asking may differ, and occurrence names it.
        Raises as HttpService.request; an answer without text (a refusal, nothing but reasoning) is a ServiceFailure.
        """
        began = time.monotonic()
        body: dict[str, object] = {
            "model": self.config.model,
            "messages": [dict(message) for message in messages],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            **self.config.extra,
        }
        wanted = body if schema is None else body | {"response_format": _format(schema)}

        async def call() -> object:
            return await self._call(body, wanted, pure)

        request = {"method": "POST", "path": "/chat/completions", "json": wanted}
        raw, source = await self._http.recorded(request, call, pure=pure, occurrence=occurrence)
        return Reply(str(raw), source, time.monotonic() - began)

    def metrics(self) -> dict[str, float]:
        """As HttpService.metrics, with tokens_in and tokens_out."""
        return self._http.metrics()

    async def close(self) -> None:
        """Idempotent."""
        await self._http.close()

    async def _call(self, body: dict[str, object], wanted: dict[str, object], pure: bool) -> str:
        """Ask with the schema, and without it where that is refused."""
        if wanted is body or not self._takes_schema:
            return await self._post(body, pure)
        try:
            return await self._post(wanted, pure, REFUSES_SCHEMA)
        except ServiceAnswer:
            text = await self._post(body, pure)  # raises where something else was wrong with it
            self._takes_schema = False
            return text

    async def _post(
        self, body: dict[str, object], pure: bool, answers: Mapping[int, str] | None = None
    ) -> str:
        unknown = f"model {self.config.model!r} is unknown there, or the address is wrong"
        request = Request(
            "POST", self._path, _message_of, body, None, {}, answers or {}, {404: unknown}, as_text=False
        )
        raw: Any = await self._http.live(request, repeatable=pure)
        usage = raw.get("usage") if isinstance(raw, dict) else None
        if isinstance(usage, dict):
            counters = self._http.counters
            counters.tokens_in += _count(usage.get("prompt_tokens"))
            counters.tokens_out += _count(usage.get("completion_tokens"))
        text, reason = _message_of(raw)
        if text is None:
            raise ServiceFailure(f"service {self.name!r}: an answer without text ({reason})")
        return text


def _format(schema: Mapping[str, object]) -> dict[str, object]:
    return {
        "type": "json_schema",
        "json_schema": {"name": SCHEMA_NAME, "schema": dict(schema), "strict": True},
    }


def _message_of(raw: Any) -> tuple[str | None, str]:
    """(text or None, why there is none). Raises ValueError for what is no completion."""
    try:
        choice = raw["choices"][0]
        message = choice["message"]
        text, reason = message.get("content"), str(choice.get("finish_reason"))
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError("the answer has no choices[0].message") from None
    if isinstance(text, list):  # parts, of which those of text count
        parts = [part.get("text") for part in text if isinstance(part, dict) and part.get("type") == "text"]
        text = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(text, str | None):
        raise ValueError(f"message.content is of type {type(text).__name__}, expected text")
    if text is None or not text.strip():
        return None, "it refuses" if message.get("refusal") else f"finish_reason {reason}"
    return text, reason


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
