"""A service on the fake clock (tests/fake_clock.py) that is down when a test wants, and a client of it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from mgrpo.services.cassette import Cassette
from mgrpo.services.client import HttpService
from mgrpo.services.config import ServiceConfig
from tests import fake_clock


class Upstream:
    """A service on the fake clock: an answer takes a tenth of a second; `down` says when it is down, and how."""

    def __init__(self, *spans: tuple[float, float], how: int | str = 503, retry_after: str = "") -> None:
        self.spans, self.how, self.retry_after = spans, how, retry_after
        self.poison: set[str] = set()
        self.times: list[float] = []
        self.paths: list[str] = []

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.times.append(fake_clock.now())
        self.paths.append(request.url.path)
        is_down = any(start <= fake_clock.now() < end for start, end in self.spans)
        await asyncio.sleep(0.1)
        if request.url.path in self.poison:
            return httpx2.Response(500)
        if not is_down:
            return httpx2.Response(200, json={"path": request.url.path})
        if self.how == "refused":
            raise httpx2.ConnectError("connection refused")
        if self.how == "page":
            return httpx2.Response(200, text="<html>we are upgrading</html>")
        return httpx2.Response(
            int(self.how), headers={"Retry-After": self.retry_after} if self.retry_after else {}
        )

    def service(
        self,
        cassette: Cassette | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        **chosen: Any,
    ) -> HttpService:
        """transport: in place of this one."""
        config = ServiceConfig.model_validate({"url": "http://search.test", "attempts": 3, **chosen})
        return HttpService("search", config, cassette, transport=transport or httpx2.MockTransport(self))


def path_of(raw: Any) -> str:
    return str(raw["path"])


async def ask(service: HttpService, path: str) -> str:
    reply = await service.request("GET", path, path_of)
    assert reply.value == path
    return reply.value
