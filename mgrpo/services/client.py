"""One service over HTTP that answers with JSON (or text), called by many rollouts at once.

    request() -> cassette (cassette.py) -> breaker (breaker.py) -> a place of `concurrency` -> one attempt -> read()
                                              ^                                                  |
                                              +------ pause, then again, at most `attempts` -----+

What came of an attempt is one of four (failures.py): an answer that read() takes; a status that the caller names as the
policy's matter; infrastructure, which is tried again; or fatal. 2xx alone is no answer: an HTML page of a proxy, JSON
that is cut off or of another shape are infrastructure as much as 503 is. Statuses that say the request itself is wrong
(400, 413, 422 ...) are infrastructure too, but not tried again: they would come again. Those of a wrong address (3xx,
404, 405 ...) are fatal while the service has answered nothing.

A key is read from its environment variable when a request is sent, and is in no message: of a refusal the body is not
quoted, since services repeat keys there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from mgrpo.errors import ConfigError, ServiceError
from mgrpo.services import outage, outside
from mgrpo.services.answers import as_text as text_of
from mgrpo.services.answers import decoded, message_of, one_line, seconds_of, without
from mgrpo.services.breaker import Breaker
from mgrpo.services.cassette import Cassette
from mgrpo.services.config import ServiceConfig
from mgrpo.services.counters import counters_of
from mgrpo.services.failures import ServiceAnswer, ServiceFailure
from mgrpo.services.failures import Source as Source

if TYPE_CHECKING:
    import httpx2

LONGEST_PAUSE = 30.0  # seconds between two attempts, by the backoff
LONGEST_RETRY_AFTER = 60.0  # seconds that a call waits because the service asks for it, outside of an outage
CONNECT_SECONDS = 10.0
MAX_BYTES = 32 << 20  # of one answer, unpacked
NO_WORDS: Mapping[int, str] = MappingProxyType({})
RETRIED = frozenset({408, 425, 429})  # and all from 500 on
REFUSED = {401: "refuses the key", 402: "wants to be paid", 403: "forbids the request"}
MISPLACED = frozenset({301, 302, 303, 307, 308, 404, 405, 410, 501})  # nothing is there that serves this

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """value: what `read` made of the answer. seconds: from the call to its answer, waits included."""

    value: T
    source: Source
    seconds: float


@dataclass(frozen=True, slots=True)
class Request:
    """Everything of a request but its key."""

    method: str
    path: str
    read: Callable[[Any], object]
    json: object
    params: Mapping[str, object] | None
    headers: Mapping[str, str]
    answers: Mapping[int, str]
    fatal: Mapping[int, str]
    as_text: bool

    def canonical(self) -> dict[str, object]:
        """What decides the answer: neither headers nor the address, so that a recording fits another server's."""
        found: dict[str, object] = {"method": self.method, "path": self.path}
        if self.json is not None:
            found["json"] = self.json
        if self.params:
            found["params"] = dict(self.params)
        if self.as_text:
            found["as_text"] = True
        return found


class _Broken(Exception):
    """An attempt without a usable answer."""

    def __init__(self, words: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(words)
        self.words, self.status, self.retry_after = words, status, retry_after


class HttpService:
    """Use from one event loop; close() ends its connections. Nothing is connected before the first request."""

    def __init__(
        self,
        name: str,
        config: ServiceConfig,
        cassette: Cassette | None = None,
        *,
        transport: httpx2.AsyncBaseTransport | None = None,
        key_header: str = "Authorization",
    ) -> None:
        """name: an identifier, for errors, metrics and the cassette. key_header: the header that carries the key, as
        "Bearer KEY" where it is Authorization, else alone. transport: of httpx2, for tests."""
        if not name.replace("-", "_").replace(".", "_").isidentifier():
            raise ValueError(f"service {name!r:.100}: expected a name of letters, digits, _, - and .")
        self.name, self.config, self.counters = name, config, counters_of(name)
        self._cassette, self._transport, self._key_header = cassette, transport, key_header
        self._slots = asyncio.Semaphore(config.concurrency)
        self._noise = random.Random()
        self._breaker = Breaker(
            name,
            config.url,
            self.counters,
            threshold=max(2, config.attempts),  # with 1, a request that always fails would open it for ever
            backoff=config.backoff,
            max_outage=config.max_outage,
            noise=self._noise,
        )
        self._http: httpx2.AsyncClient | None = None
        self._answered = 0  # requests so far
        self._last_answered: Request | None = None  # that may be repeated

    async def request(
        self,
        method: str,
        path: str,
        read: Callable[[Any], T],
        *,
        json: object = None,
        params: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        pure: bool = True,
        occurrence: str = "",
        answers: Mapping[int, str] = NO_WORDS,
        fatal: Mapping[int, str] = NO_WORDS,
        as_text: bool = False,
    ) -> Reply[T]:
        """One request, with all its attempts.

        path: after config.url. read: decoded JSON, or text with as_text -> the value; raises ValueError for a wrong
        shape. pure, occurrence: see Cassette.through; a request that is not pure is never repeated as a probe.
        answers: HTTP status -> words for those that are the policy's matter. fatal: the same for those that end the
        run, before what is said of 401, 402, 403 and of the statuses of a wrong address.

        Raises ServiceAnswer, ServiceFailure (an InfrastructureError) and ServiceError as failures.py says.
        """
        began = time.monotonic()
        request = Request(method, path, read, json, params, headers or {}, answers, fatal, as_text)

        async def call() -> object:
            return await self.live(request, repeatable=pure)

        raw, source = await self.recorded(request.canonical(), call, pure=pure, occurrence=occurrence)
        try:
            value = read(raw)
        except ValueError as error:
            if source == "live":
                raise
            raise ServiceError(
                f"service {self.name!r}: the cassette's answer does not fit: {error}"
            ) from error
        return Reply(value, source, time.monotonic() - began)

    async def recorded(
        self, request: Mapping[str, object], call: Callable[[], Any], *, pure: bool, occurrence: str
    ) -> tuple[Any, Source]:
        """What `call` gives, through the cassette, and counted."""
        self.counters.calls += 1
        try:
            with outside.call():
                if self._cassette is None:
                    return await call(), "live"
                raw, source = await self._cassette.through(
                    self.name, request, call, pure=pure, occurrence=occurrence
                )
        except ServiceAnswer as answer:
            self._count(answer.source)
            raise
        self._count(source)
        return raw, source

    def _count(self, source: Source) -> None:
        self.counters.cache += source == "cache"
        self.counters.replay += source == "replay"

    async def live(self, request: Request, *, repeatable: bool = True) -> object:
        """The answer to a request as it came, once read() has taken it. repeatable: a probe may send it again."""
        spent, made, before = 0, 0, self._answered
        seen, has_waited = (
            before,
            False,
        )  # requests answered at the last failure; an outage was for this request's sake
        while True:
            is_probe = await self._breaker.admit()
            try:
                async with self._slots:
                    if self._breaker.is_open and not is_probe:
                        continue  # it opened while this call waited for its place
                    made += 1
                    with outage.waiting() if is_probe else contextlib.nullcontext():
                        raw = await self._attempt(request)
                is_probe = False
                self._note_answer(request if repeatable else None)
                self.counters.live += 1
                return raw
            except ServiceAnswer:
                is_probe = False
                self._note_answer(None)
                self.counters.live += 1
                raise
            except ServiceFailure:
                self.counters.failures += 1
                raise
            except _Broken as broken:
                failure = broken
                if is_probe and await self._is_up():
                    self._breaker.answered()  # it is the request's own, and spends the attempts that come
                else:
                    is_last = spent + 1 >= self.config.attempts and not has_waited
                    suspects = is_last and self._answered == seen  # nobody else was answered meanwhile
                    if not self._breaker.failed(
                        broken.words, is_probe=is_probe, suspects=suspects, retry_after=broken.retry_after
                    ):
                        spent += 1
                    has_waited = has_waited or suspects
                is_probe, seen = False, self._answered
            finally:
                if is_probe:
                    self._breaker.abandon()
            if spent >= self.config.attempts:
                self.counters.failures += 1
                others = self._answered - before
                raise ServiceFailure(failure.words, failure.status, made, others) from failure.__cause__
            self.counters.retries += 1
            if not self._breaker.is_open:
                await asyncio.sleep(self._pause(spent, failure.retry_after))

    def metrics(self) -> dict[str, float]:
        """service/<name>/<counter> of services.counters, since the process began."""
        return self.counters.metrics(self.name)

    async def close(self) -> None:
        """Idempotent."""
        self._breaker.close()
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    # -- one attempt ---------------------------------------------------------------------------------------------------

    async def _attempt(self, request: Request) -> object:
        """Raises _Broken, ServiceAnswer, ServiceFailure (not to be tried again) and ServiceError."""
        key = self._key()
        began = time.monotonic()
        try:
            status, kind, retry_after, body = await self._send(request, key)
        finally:
            self.counters.seconds += time.monotonic() - began
        where = self._where(request.path)
        if status in request.answers:
            raise ServiceAnswer(status, request.answers[status])
        if not 200 <= status < 300:
            self._refused(request, status, retry_after, without(key, message_of(body)))
        try:
            raw: object = text_of(body, kind) if request.as_text else decoded(body, kind)
            request.read(raw)
        except ValueError as error:
            words = without(key, one_line(str(error)))
            raise _Broken(f"{where}: status {status}, but {words}", status) from error
        return raw

    def _refused(self, request: Request, status: int, retry_after: float | None, message: str) -> None:
        """Raise what a status outside of 2xx means."""
        where = self._where(request.path)
        service = f"service {self.name!r}: {where}"
        if status in request.fatal:
            raise ServiceError(f"{service}: {request.fatal[status]} (status {status})")
        if status in REFUSED:
            key = (
                "no key is set (key_env)" if self.config.key_env is None else f"key of ${self.config.key_env}"
            )
            raise ServiceError(f"{service} {REFUSED[status]} (status {status}; {key})")
        if status in RETRIED or (status >= 500 and status != 501):
            raise _Broken(f"{where}: status {status}: {message}", status, retry_after)
        if status in MISPLACED and not self._answered:  # later it is what was asked, perhaps a policy's doing
            raise ServiceError(f"{service}: status {status}: {message}; is the address right?")
        self._breaker.answered()
        raise ServiceFailure(f"{where}: status {status}: {message}", status)

    async def _send(self, request: Request, key: str | None) -> tuple[int, str, float | None, bytes]:
        """(status, content type, Retry-After, body)."""
        client = self._client()
        import httpx2

        headers = dict(self.config.headers) | dict(request.headers)
        if key is not None:
            headers[self._key_header] = f"Bearer {key}" if self._key_header == "Authorization" else key
        where, seconds = self._where(request.path), self.config.timeout
        try:
            async with asyncio.timeout(seconds) as bound:
                sent = client.stream(
                    request.method,
                    self.config.url + request.path,
                    json=request.json,
                    params=request.params,  # type: ignore[arg-type]
                    headers=headers,
                )
                async with sent as response:
                    body = bytearray()
                    async for part in response.aiter_bytes():
                        body += part
                        if len(body) > MAX_BYTES:
                            raise ServiceFailure(f"{where}: an answer of more than {MAX_BYTES >> 20} MiB")
        except TimeoutError as late:
            if not bound.expired():
                raise
            raise _Broken(f"{where}: no answer within {seconds:g} s") from late
        except httpx2.TimeoutException as late:
            raise _Broken(f"{where}: {type(late).__name__} within {seconds:g} s") from late
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            words = without(key, one_line(str(error)))
            raise ServiceFailure(f"{where}: cannot be asked: {words}") from error
        except (httpx2.RequestError, OSError) as error:
            raise _Broken(f"{where}: {without(key, one_line(str(error) or type(error).__name__))}") from error
        kind = response.headers.get("content-type", "")
        return response.status_code, kind, seconds_of(response.headers.get("retry-after")), bytes(body)

    def _client(self) -> httpx2.AsyncClient:
        if self._http is None:
            try:
                import httpx2
            except ModuleNotFoundError:
                raise ConfigError(
                    f'service {self.name!r} needs httpx2; pip install "mgrpo[research]"'
                ) from None
            host = urlsplit(self.config.url).hostname or ""
            self._http = httpx2.AsyncClient(
                transport=self._transport,
                timeout=httpx2.Timeout(
                    self.config.timeout, connect=min(CONNECT_SECONDS, self.config.timeout)
                ),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self.config.concurrency),
                trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # a proxy stands before the internet
                follow_redirects=False,  # a key goes where it was meant to
            )
        return self._http

    def _key(self) -> str | None:
        name = self.config.key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise ServiceError(
                f"service {self.name!r}: key_env names the environment variable {name}, which "
                f"{'holds no key' if key else 'is not set'}"
            )
        return key

    def _where(self, path: str) -> str:
        return f"{self.config.url}{path}"[:200]

    # -- between attempts ----------------------------------------------------------------------------------------------

    def _note_answer(self, request: Request | None) -> None:
        self._answered += 1
        self._breaker.answered()
        if request is not None:
            self._last_answered = request

    async def _is_up(self) -> bool:
        """Whether the last request that was answered is so again."""
        if self._last_answered is None:
            return False
        try:
            with contextlib.suppress(ServiceAnswer), outage.waiting():
                async with self._slots:
                    await self._attempt(self._last_answered)
        except (_Broken, ServiceFailure):
            return False
        self._answered += 1
        return True

    def _pause(self, spent: int, retry_after: float | None) -> float:
        backoff = self.config.backoff * 2.0 ** max(0, spent - 1) * (0.5 + self._noise.random())
        return max(min(backoff, LONGEST_PAUSE), min(retry_after or 0.0, LONGEST_RETRY_AFTER))
