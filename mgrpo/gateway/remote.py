"""Rollouts that a program elsewhere plays: it claims one, talks to its agents through its base URL, and answers.

    POST /harness/claim {wait}          Bearer: the harness key, where there is one
        200 {rollout, base_url, api_key, anthropic_url, alive_seconds, question {text, id, info, tags, attachments}}
        204 nothing to claim within `wait` seconds     410 the run is over
    POST /rollout/{id}/alive            Bearer: the rollout's own key, here and below; at least every alive_seconds
    POST /rollout/{id}/answer {answer, correct, scores}    or {error, retry}

    play() offers -> claim() hands over -> alive() ... -> answer() settles -> play() returns

A rollout that nobody has claimed yet waits as for a service that is down: its deadline stands still. Nobody asking at
all for max_outage seconds ends the run by name. Who has claimed a rollout and gives no sign of life loses it, and it is
played again; so is one whose claimer answers {error, retry: true}. Any other error fails the rollout.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mgrpo.environments.task import Question
from mgrpo.errors import InfrastructureError, MgrpoError, RolloutError, ServiceError
from mgrpo.gateway.access import Access
from mgrpo.gateway.command import question_json
from mgrpo.gateway.scores import Answer, read_answer
from mgrpo.services import outage

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

LONGEST_WAIT = 30.0  # seconds of one claim
BODY_BYTES = 4 << 20  # of a request
ERROR_CHARS = 2000  # of what a program says of its failure


@dataclass(eq=False, slots=True)
class Offer:
    """A rollout that waits for a program, then for its answer. seen: when the program was heard of last."""

    id: str
    access: Access
    question: Question
    alive_seconds: float
    claimed: asyncio.Event = field(default_factory=asyncio.Event)
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    seen: float = 0.0

    def json(self) -> dict[str, object]:
        """What a program that claims it is told."""
        return {
            "rollout": self.id,
            "base_url": str(self.access),
            "api_key": self.access.api_key,
            "anthropic_url": self.access.anthropic_url,
            "alive_seconds": self.alive_seconds,
            "question": question_json(self.question),
        }


class Claims:
    """The rollouts of one worker that programs elsewhere play. Use from the loop that plays."""

    def __init__(self, key: str | None, max_outage: float, alive_seconds: float) -> None:
        """key: of the programs; None asks for none. max_outage, alive_seconds: see HarnessOptions."""
        self._key, self._max_outage, self._alive_seconds = key, max_outage, alive_seconds
        self._offers: dict[str, Offer] = {}
        self._waiting: deque[Offer] = deque()
        self._pollers: deque[asyncio.Future[Offer | None]] = deque()
        self._asked = 0.0  # when a program did last, on the monotonic clock
        self._over = False

    # -- the rollout's side ----------------------------------------------------------------------------------------

    async def play(self, rollout: str, question: Question, access: Access) -> Answer:
        """Offer a rollout, wait for a program to claim it and for its answer. Raises RolloutError for an error that the
        program names, InfrastructureError where it is to be played again, ServiceError where nobody asks for
        rollouts."""
        offer = Offer(rollout, access, question, self._alive_seconds)
        self._offers[rollout] = offer
        self._waiting.append(offer)
        self._match()
        try:
            while True:
                with outage.waiting():
                    await self._until_claimed(offer)
                if (answer := await self._until_answered(offer)) is not None:
                    return answer
        finally:
            self._offers.pop(rollout, None)
            with contextlib.suppress(ValueError):
                self._waiting.remove(offer)
            offer.answer.cancel()

    async def _until_claimed(self, offer: Offer) -> None:
        since = time.monotonic()
        while not offer.claimed.is_set():
            if any(other.claimed.is_set() for other in self._offers.values()) or self._pollers:
                self._asked = time.monotonic()  # programs are there, and busy
            left = max(since, self._asked) + self._max_outage - time.monotonic()
            if left <= 0:
                raise ServiceError(
                    f"no program has asked for a rollout at {offer.access.root.rpartition('/rollout/')[0]} for "
                    f"{self._max_outage:g} s (task.options.max_outage); start `mgrpo gateway`, then resume the run"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await offer.claimed.wait()

    async def _until_answered(self, offer: Offer) -> Answer | None:
        """None where it was given back."""
        while not offer.answer.done():
            left = offer.seen + self._alive_seconds - time.monotonic()
            if left <= 0 and not offer.claimed.is_set():
                return None
            if left <= 0:
                raise InfrastructureError(
                    f"the program that claimed rollout {offer.id[:8]} gave no sign of life for "
                    f"{self._alive_seconds:g} s (task.options.alive_seconds)"
                )
            await asyncio.wait({offer.answer}, timeout=left)
        return offer.answer.result()

    # -- the programs' side ----------------------------------------------------------------------------------------

    async def claim(self, seconds: float) -> Offer | None:
        """The rollout that has waited longest; None where there is none within `seconds`, or the run is over."""
        poller: asyncio.Future[Offer | None] = asyncio.get_running_loop().create_future()
        self._asked = time.monotonic()
        if self._over:
            return None
        self._pollers.append(poller)
        self._match()
        try:
            await asyncio.wait({poller}, timeout=seconds)
        except asyncio.CancelledError:
            if poller.done() and (offer := poller.result()) is not None:
                self.give_back(offer)
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._pollers.remove(poller)
        return poller.result() if poller.done() else None

    def give_back(self, offer: Offer) -> None:
        """It did not reach who claimed it: it is the next to be claimed."""
        if offer.id in self._offers and not offer.answer.done():
            offer.claimed.clear()
            self._waiting.appendleft(offer)
            self._match()

    def find(self, rollout: str, token: str) -> Offer | None:
        """The claimed rollout with this id and key. Hearing of it is a sign of life."""
        offer = self._offers.get(rollout)
        if offer is None or not hmac.compare_digest(offer.access.api_key.encode(), token.encode()):
            return None
        offer.seen = time.monotonic()
        return offer

    def opens(self, token: str) -> bool:
        """Whether it is the harness key."""
        return self._key is None or hmac.compare_digest(self._key.encode(), token.encode())

    @property
    def over(self) -> bool:
        """Whether the run is."""
        return self._over

    def close(self) -> None:
        """The run is over: programs that ask are told so."""
        self._over = True
        for poller in self._pollers:
            if not poller.done():
                poller.set_result(None)

    def _match(self) -> None:
        while self._waiting and (poller := self._next_poller()) is not None:
            offer = self._waiting.popleft()
            offer.seen = time.monotonic()
            offer.claimed.set()
            poller.set_result(offer)

    def _next_poller(self) -> asyncio.Future[Offer | None] | None:
        while self._pollers:
            if not (poller := self._pollers.popleft()).done():
                return poller
        return None


def settle(offer: Offer, body: Mapping[str, Any]) -> None:
    """What a program answers. Raises RolloutError for a body that is no answer and no error."""
    if offer.answer.done():
        return  # said again by a client that lost our reply
    if "error" not in body:
        offer.answer.set_result(read_answer(body, "the rollout"))
        return
    if not isinstance(text := body["error"], str) or not isinstance(retry := body.get("retry", False), bool):
        raise RolloutError("expected {error: text, retry: true or false}")
    error: MgrpoError = (InfrastructureError if retry else RolloutError)(f"the harness failed: {text[:ERROR_CHARS]}")
    offer.answer.set_exception(error)


def routes(claims: Claims) -> list[Route]:
    """For Gateway(extra_routes=...)."""
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def refused(status: int, code: str, words: str) -> Response:
        return JSONResponse({"error": {"code": code, "message": words}}, status)

    async def claim(request: Request) -> Response:
        if not claims.opens(_token(request)):
            return refused(401, "wrong_key", "the harness key is wrong, or missing")
        try:
            wait = (await _body(request)).get("wait", LONGEST_WAIT)
            seconds = float(wait) if not isinstance(wait, bool) else -1.0
            if not 0 <= seconds <= LONGEST_WAIT:
                raise ValueError(f"wait {wait!r:.40}: expected seconds from 0 to {LONGEST_WAIT:g}")
        except (ValueError, TypeError) as error:
            return refused(400, "bad_request", str(error))
        offer = await _unless_gone(request, claims.claim(seconds), claims.give_back)
        if offer is not None:
            return JSONResponse(offer.json())
        return refused(410, "run_over", "the run is over") if claims.over else Response(status_code=204)

    async def alive(request: Request) -> Response:
        if claims.find(request.path_params["id"], _token(request)) is None:
            return refused(404, "rollout_over", "no such rollout is under way")
        return Response(status_code=204)

    async def answer(request: Request) -> Response:
        offer = claims.find(request.path_params["id"], _token(request))
        if offer is None:
            return refused(404, "rollout_over", "no such rollout is under way")
        try:
            settle(offer, await _body(request))
        except ValueError as error:  # a RolloutError is one
            return refused(400, "bad_request", str(error))
        return Response(status_code=204)

    return [
        Route("/harness/claim", claim, methods=["POST"]),
        Route("/rollout/{id}/alive", alive, methods=["POST"]),
        Route("/rollout/{id}/answer", answer, methods=["POST"]),
    ]


def _token(request: Request) -> str:
    scheme, _, token = (request.headers.get("authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else (request.headers.get("x-api-key") or "")


async def _body(request: Request) -> dict[str, Any]:
    """A request's JSON object; empty where it has no body. Raises ValueError for anything else."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES:
            raise ValueError(f"the request has more than {BODY_BYTES} bytes")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts) or b"{}")
    except (ValueError, RecursionError):
        raise ValueError("the request is no JSON") from None
    if not isinstance(body, dict):
        raise ValueError("the request is no JSON object")
    return body


async def _unless_gone(
    request: Request, claiming: Awaitable[Offer | None], give_back: Callable[[Offer], None]
) -> Offer | None:
    """What was claimed; None, and given back, where the client has gone meanwhile."""
    claimed = asyncio.ensure_future(claiming)
    leaving = asyncio.ensure_future(request.receive())  # after the body: that the client has gone
    try:
        await asyncio.wait({claimed, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and claimed.done() and (offer := claimed.result()) is not None:
            give_back(offer)
            return None
        return claimed.result() if claimed.done() else None
    finally:
        claimed.cancel()
        leaving.cancel()
        await asyncio.gather(claimed, leaving, return_exceptions=True)
