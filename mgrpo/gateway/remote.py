"""Rollouts that a program elsewhere plays: it claims one, talks to its agents through its base URL, and answers.

    POST /harness/claim {wait}          Bearer: the harness key, where there is one
        200 {rollout, base_url, api_key, anthropic_url, alive_seconds, question {text, id, info, tags, attachments}}
            {rollout: null}: nothing to claim within `wait` seconds
        410 the run is over
    POST /rollout/{id}/alive            Bearer: the rollout's own key, here and below; at least every alive_seconds
    POST /rollout/{id}/answer {answer, correct, scores}    or {error, retry}

    play() offers -> claim() -> confirm() -> find(): a sign of life ... -> settle() -> play() returns

A rollout that nobody has claimed yet waits as for a service that is down: its deadline stands still. Nobody asking at
all for max_outage seconds ends the run by name. Who has claimed a rollout and gives no sign of life loses it, and it is
played again; so is one whose claimer answers {error, retry: true}. Any other error fails the rollout.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgrpo.environments.task import Question
from mgrpo.errors import InfrastructureError, MgrpoError, RolloutError, ServiceError
from mgrpo.gateway import body, fields
from mgrpo.gateway.access import Access
from mgrpo.gateway.command import question_json
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.exchange import Exchange, PeerGoneError
from mgrpo.gateway.scores import Answer, read_answer
from mgrpo.services import outage

LONGEST_WAIT = 30.0  # seconds of one claim
BODY_BYTES = 4 << 20  # of a request
ARRIVING = 16  # such bodies that may be arriving at the same time
PATH = re.compile(r"/harness/claim|/rollout/(?P<id>[\w-]{1,200})/(?P<what>alive|answer)")
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
        self._asked = 0.0  # when a program did last, on the loop's clock
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
            with outage.waiting():
                await self._until_claimed(offer)
            return await self._until_answered(offer)
        finally:
            self._offers.pop(rollout, None)
            with contextlib.suppress(ValueError):
                self._waiting.remove(offer)
            if not offer.answer.cancel():
                offer.answer.exception()  # retrieved, where nobody waited for it any more

    async def _until_claimed(self, offer: Offer) -> None:
        since = _now()
        while not offer.claimed.is_set():
            if any(other.claimed.is_set() for other in self._offers.values()) or self._pollers:
                self._asked = _now()  # programs are there, and busy
            left = max(since, self._asked) + self._max_outage - _now()
            if left <= 0:
                raise ServiceError(
                    f"no program has asked for a rollout at {offer.access.root.rpartition('/rollout/')[0]} for "
                    f"{self._max_outage:g} s (task.options.max_outage); start `mgrpo gateway`, then resume the run"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await offer.claimed.wait()

    async def _until_answered(self, offer: Offer) -> Answer:
        while not offer.answer.done():
            left = offer.seen + self._alive_seconds - _now()
            if left <= 0:
                raise InfrastructureError(
                    f"the program that claimed rollout {offer.id[:8]} gave no sign of life for "
                    f"{self._alive_seconds:g} s (task.options.alive_seconds)"
                )
            await asyncio.wait({offer.answer}, timeout=left)
        return offer.answer.result()

    # -- the programs' side ----------------------------------------------------------------------------------------

    async def claim(self, seconds: float) -> Offer | None:
        """The rollout that has waited longest; None where there is none within `seconds`, or the run is over. Who gets
        one says confirm() once its program has it, or else give_back()."""
        poller: asyncio.Future[Offer | None] = asyncio.get_running_loop().create_future()
        self._asked = _now()
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

    def confirm(self, offer: Offer) -> None:
        """Its program has it."""
        offer.seen = _now()
        offer.claimed.set()

    def give_back(self, offer: Offer) -> None:
        """It did not reach its program: it is the next to be claimed."""
        if offer.id in self._offers:
            self._waiting.appendleft(offer)
            self._match()

    def find(self, rollout: str, token: str) -> Offer | None:
        """The claimed rollout with this id and key. Hearing of it is a sign of life."""
        offer = self._offers.get(rollout)
        if offer is None or not hmac.compare_digest(offer.access.api_key.encode(), token.encode()):
            return None
        offer.seen = _now()
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
            poller.set_result(self._waiting.popleft())

    def _next_poller(self) -> asyncio.Future[Offer | None] | None:
        while self._pollers:
            if not (poller := self._pollers.popleft()).done():
                return poller
        return None


def _now() -> float:
    return asyncio.get_running_loop().time()


def settle(offer: Offer, said: Mapping[str, Any]) -> None:
    """What a program answers. Raises RolloutError for a body that is no answer and no error."""
    if offer.answer.done():
        return  # said again by a client that lost our reply
    if "error" not in said:
        offer.answer.set_result(read_answer(said, "the rollout"))
        return
    if not isinstance(text := said["error"], str) or not isinstance(retry := said.get("retry", False), bool):
        raise RolloutError("expected {error: text, retry: true or false}")
    error: MgrpoError = (InfrastructureError if retry else RolloutError)(
        f"the harness failed: {text[:ERROR_CHARS]}"
    )
    offer.answer.set_exception(error)


class Endpoint:
    """Claims over HTTP: for Gateway(extra=...)."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._room = body.Room(ARRIVING * BODY_BYTES)

    async def __call__(self, exchange: Exchange) -> bool:
        """Answer a request whose path is one of these; False for any other. Raises GatewayError for a refusal."""
        found = PATH.fullmatch(exchange.path)
        if found is None:
            return False
        if exchange.method != "POST":
            raise GatewayError(
                405, "method_not_allowed", f"{exchange.method:.20} is not served here, POST is"
            )
        token = _token(exchange)
        if found["id"] is None:
            if not self._claims.opens(token):
                raise GatewayError(401, "invalid_api_key", "the harness key is wrong, or missing")
            await self._claim(exchange)
            return True
        offer = self._claims.find(found["id"], token)
        if offer is None:
            raise GatewayError(404, "rollout_over", "no rollout under way has this address and this key")
        table = await self._read(exchange)
        if found["what"] == "answer":
            try:
                settle(offer, table)
            except RolloutError as error:
                raise GatewayError(400, "invalid_value", str(error)) from None
        await exchange.answer(200, {})
        return True

    async def _claim(self, exchange: Exchange) -> None:
        wait = fields.number(await self._read(exchange), "wait")
        seconds = LONGEST_WAIT if wait is None else float(wait)
        if not 0 <= seconds <= LONGEST_WAIT:
            raise fields.refusal("wait", wait, f"seconds from 0 to {LONGEST_WAIT:g}")
        offer = await self._unless_gone(exchange, seconds)
        if offer is None:
            if self._claims.over:
                raise GatewayError(410, "run_over", "the run is over")
            await exchange.answer(200, {"rollout": None})
            return
        try:
            await exchange.answer(200, offer.json())
        except BaseException:
            self._claims.give_back(offer)
            raise
        self._claims.confirm(offer)

    async def _unless_gone(self, exchange: Exchange, seconds: float) -> Offer | None:
        """What was claimed; given back where nobody is there any more to be told of it."""
        claimed, gone = asyncio.create_task(self._claims.claim(seconds)), asyncio.create_task(exchange.gone())
        told = False
        try:
            await asyncio.wait({claimed, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise PeerGoneError
            told = True
            return claimed.result()
        finally:
            claimed.cancel()
            gone.cancel()
            if not told and claimed.done() and (offer := claimed.result()) is not None:
                self._claims.give_back(offer)
            await asyncio.gather(claimed, gone, return_exceptions=True)

    async def _read(self, exchange: Exchange) -> Mapping[str, Any]:
        return await body.read(exchange.parts(), exchange.length(), BODY_BYTES, self._room)


def _token(exchange: Exchange) -> str:
    scheme, _, token = (exchange.header(b"authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else (exchange.header(b"x-api-key") or "")
