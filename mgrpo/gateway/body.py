"""The body of a request: bytes that arrive, never more of them than is allowed, and the JSON object that they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.fields import Table

MAX_DEPTH = 64
"""Objects and lists within each other."""
LARGE = 1 << 20
MAX_OPEN, MAX_COMMAS = 500_000, 2_000_000
"""Opening brackets and commas of a body of more than LARGE bytes, texts included: what is parsed takes up to a hundred
times as much memory as the few bytes that ask for an empty list."""


class Room:
    """Bytes of all bodies that are arriving at the same time."""

    def __init__(self, size: int) -> None:
        self.left = self.size = size

    def take(self, n: int) -> None:
        """Raises GatewayError (429) where fewer are left."""
        if n > self.left:
            raise GatewayError(
                429,
                "too_many_bytes",
                f"requests are arriving with more than {self.size} bytes in all; ask again later",
            )
        self.left -= n


async def read(parts: AsyncIterator[bytes], length: int | None, limit: int, room: Room) -> Table:
    """The object that a request sends. length: that it declares. Raises GatewayError: 413 for more than `limit` bytes,
    declared or sent, 400 for what is no JSON object."""
    if length is not None and length > limit:
        raise _too_large(length, limit)
    found = bytearray()
    try:
        async for part in parts:
            if len(found) + len(part) > limit:
                raise _too_large(len(found) + len(part), limit)
            room.take(len(part))
            found += part
        return parse(found)
    finally:
        room.left += len(found)


def parse(body: bytes | bytearray) -> Table:
    """Raises GatewayError (400) for what is no JSON object, or one that is nested or filled beyond the bounds."""
    if len(body) > LARGE and (
        body.count(b"[") + body.count(b"{") > MAX_OPEN or body.count(b",") > MAX_COMMAS
    ):
        raise GatewayError(
            400,
            "invalid_json",
            f"the body has more than {MAX_OPEN} opening brackets or {MAX_COMMAS} commas",
        )
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, ValueError) as error:
        raise GatewayError(400, "invalid_json", f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise GatewayError(400, "invalid_json", "the body is JSON, but no object")
    if is_deeper(value, MAX_DEPTH):
        raise _too_deep()
    return value


def is_deeper(value: Mapping[str, Any] | Sequence[Any], most: int) -> bool:
    """Whether it has more than `most` levels of objects and lists, itself the first."""
    level: list[Any] = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _too_large(size: int, limit: int) -> GatewayError:
    return GatewayError(
        413, "request_too_large", f"the body has {size} bytes or more, body_mb allows {limit / 1e6:g} MB"
    )


def _too_deep() -> GatewayError:
    return GatewayError(
        400, "invalid_json", f"the body has more than {MAX_DEPTH} levels of objects and lists"
    )
