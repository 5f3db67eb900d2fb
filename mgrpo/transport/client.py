"""The asking side of the link: one DEALER on an I/O thread, pipelined requests with deadlines.

submit() hands a request to the I/O thread and returns a future; any number of threads may call it. At most
`window` requests are in flight; submit waits for room. Requests that wait together leave in one message. A
request is sent again, under the same id, when its connection was lost or the peer said UNAVAILABLE, and never while
its connection lasts: an answer may be long under way. The peer's methods are idempotent by their natural keys, so it
does not matter which of the copies is answered. (inproc has no connection events: there every `resend_s`.) Every
request has a deadline; when it passes the future raises DeadlineError naming peer, step, queue and what the peer said
last. Deadlines of bulk requests count from the last answer to one of them: what moves is not late.

libzmq traps handled here: nothing is queued towards a peer that is not connected (IMMEDIATE), so there is
nothing to lose when it comes back; a refused or wrong key shows only on the monitor socket, which is read and
turned into a PeerError; an oversize frame would silently cut the connection, so sizes are checked before
sending.
"""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import zmq

from mgrpo.errors import (
    ConflictError,
    DeadlineError,
    FencedError,
    GroupClosedError,
    GroupHeldError,
    MgrpoError,
    PeerError,
    RetryAfterError,
)
from mgrpo.transport import codec
from mgrpo.transport.address import Socket, check_url, needs_ipv6
from mgrpo.transport.codec import BadMessage, Buffer, Limits, Sender
from mgrpo.transport.connection import Connection
from mgrpo.transport.keys import ClientKeys
from mgrpo.transport.server import HEARTBEAT_TIMEOUT_MS, pack_counted
from mgrpo.waiting import wait_until

T = TypeVar("T")

SEND_ITEMS = 256
CHECK_S = 0.05
RETRY_S = 0.2  # after UNAVAILABLE

_ERRORS: dict[str, type[MgrpoError]] = {
    "CLOSED": GroupClosedError,
    "CONFLICT": ConflictError,
    "FENCED": FencedError,
    "HELD": GroupHeldError,
    "RETRY_AFTER": RetryAfterError,
}


@dataclass(slots=True)
class Answer:
    """What the peer said: a body and its payload frames (views of the received message)."""

    body: Buffer
    frames: list[Buffer]

    def decode(self, kind: type[T]) -> T:
        return codec.decode(self.body, kind)


@dataclass(slots=True)
class _Pending:
    id: int
    method: str
    body: bytes
    frames: Sequence[Buffer]
    future: Future[Answer]
    started: float
    timeout: float
    where: str
    bulk: bool
    again: float = 0.0  # when to send it again; 0: when its connection is lost
    said: str = ""  # why the peer could not answer yet


class Client:
    """Requests to the server at `url`. `peer` is its name in error messages. Threads: any; close() ends them
    all."""

    def __init__(
        self,
        url: str,
        *,
        peer: str = "store",
        sender: Sender | None = None,
        window: int = 256,
        timeout: float = 30.0,
        resend_s: float = 1.0,
        limits: Limits | None = None,
        security: ClientKeys | None = None,
    ) -> None:
        scheme, _ = check_url(url)
        self.url, self.peer, self.window, self.timeout = url, peer, window, timeout
        self.sender = sender or Sender(session=secrets.token_hex(8))
        self._resend_s, self._limits = resend_s, limits or Limits()
        self._socket: Socket = zmq.Context.instance().socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0), (zmq.MAXMSGSIZE, self._limits.frame), (zmq.IMMEDIATE, 1), (zmq.RECONNECT_IVL,
            50), (zmq.RECONNECT_IVL_MAX, 400), (zmq.HEARTBEAT_IVL, 500),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS), (zmq.IPV6, needs_ipv6(url)),
            (zmq.HANDSHAKE_IVL, 2000), (zmq.SNDHWM, 64), (zmq.RCVHWM, 256), (zmq.CONNECT_TIMEOUT, 1500),
        ):  # fmt: skip
            self._socket.setsockopt(option, value)
        if security is not None:
            security.attach(self._socket)
        self._connection = Connection(self._socket, scheme, security is not None)
        self._socket.connect(url)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._free = window
        self._answered = 0  # places to give back; in one go, so that waiting callers fill whole messages
        self._fresh: deque[_Pending] = deque()
        self._deferred: set[int] = set()
        self._pending: dict[int, _Pending] = {}
        self._unsent: deque[_Pending] = deque()  # the I/O thread's own: taken over, not yet on the wire
        self._awake = False
        self._shortened: tuple[float, float] | None = None  # (when, seconds)
        self._closed = False
        self.resent = 0
        self._ended = 0  # requests that were answered or have failed
        self._moved = 0.0  # when a bulk request was answered last
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._thread = threading.Thread(target=self._run, name=f"mgrpo-client {url}", daemon=True)
        self._thread.start()

    # -- for callers ----------------------------------------------------------------------------------------

    def submit(
        self, method: str, body: object = None, frames: Sequence[Buffer] = (), *, timeout: float | None =
        None, step: int | None = None, queue: str = "", bulk: bool = False,
    ) -> Future[Answer]:  # fmt: skip
        """Send a request; the future raises the typed error of a refusal, or DeadlineError. Waits for room in the
        window. bulk: one of many large ones, whose deadline counts from the last answer to any of them. Raises
        ValueError when a frame or the message is larger than the peer accepts."""
        pending = self._prepare(method, body, frames, timeout, step, queue, bulk)
        self._enqueue(pending)
        return pending.future

    def submit_later(
        self,
        method: str,
        body: object,
        *,
        timeout: float | None = None,
        step: int | None = None,
        queue: str = "",
    ) -> tuple[Callable[[BaseException | None], None], Future[Answer]]:
        """Reserve a place in the window now, send later: returns (start, future). start(None) sends, start(error) fails
        the future; it never blocks, so it may be called from another future's callback."""
        pending = self._prepare(method, body, (), timeout, step, queue)
        with self._lock:
            self._deferred.add(pending.id)

        def start(error: BaseException | None) -> None:
            with self._lock:
                if pending.id not in self._deferred:
                    return
                self._deferred.discard(pending.id)
            if error is None:
                try:
                    self._enqueue(pending)
                except PeerError as closed:
                    pending.future.set_exception(closed)
            else:
                self._give_back(1)
                pending.future.set_exception(error)

        return start, pending.future

    def _prepare(
        self,
        method: str,
        body: object,
        frames: Sequence[Buffer],
        timeout: float | None,
        step: int | None,
        queue: str,
        bulk: bool = False,
    ) -> _Pending:
        limit = self.timeout if timeout is None else timeout
        encoded = codec.encode(body)
        self._check_size(method, encoded, frames)
        where = f"{queue or method}" + (f" at step {step}" if step is not None else "")
        started = time.monotonic()
        with self._room:
            if self._free <= 0 and not self._room.wait_for(lambda: self._free > 0, limit):
                raise DeadlineError(self._late(where, limit, f"window of {self.window} requests stayed full"))
            self._free -= 1
        return _Pending(next(self._ids), method, encoded, frames, Future(), started, limit, where, bulk)

    def _enqueue(self, pending: _Pending) -> None:
        with self._lock:
            if self._closed:
                self._free += 1
                raise PeerError(f"the link to {self.peer} at {self.url} is closed")
            self._fresh.append(pending)
            if not self._awake:  # under the lock: close() may not take the pipe away in between
                self._awake = True
                os.write(self._wake_write, b"x")

    def call(
        self, method: str, body: object = None, frames: Sequence[Buffer] = (), *, timeout: float | None =
        None, step: int | None = None, queue: str = "",
    ) -> Answer:  # fmt: skip
        """submit() and wait for the answer."""
        return self.submit(method, body, frames, timeout=timeout, step=step, queue=queue).result()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until nothing is in flight. Raises DeadlineError when no request has ended for `timeout` seconds."""
        limit = self.timeout if timeout is None else timeout
        wait_until(
            lambda: not (self._fresh or self._pending or self._deferred),
            limit,
            lambda: self._late("flush", limit, f"{len(self._pending)} requests in flight"),
            progress=lambda: self._ended,
            pause=0.002,
        )

    def shorten_deadlines(self, seconds: float) -> None:
        """From now on no answer is waited for longer than `seconds`. Takes no lock: a signal handler may call it."""
        self._shortened = time.monotonic(), seconds

    def close(self) -> None:
        """Fail what is in flight and end the I/O thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.write(self._wake_write, b"x")
        self._thread.join(10.0)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_size(self, method: str, body: bytes, frames: Sequence[Buffer]) -> None:
        largest = max((len(frame) for frame in frames), default=0)
        total = len(body) + sum(len(frame) for frame in frames)
        if max(largest, len(body)) > self._limits.frame:
            raise ValueError(
                f"{method}: frame of {max(largest, len(body))} bytes, the limit is {self._limits.frame}"
            )
        if total > self._limits.message:
            raise ValueError(f"{method}: message of {total} bytes, the limit is {self._limits.message}")

    def _late(self, where: str, limit: float, why: str, said: str = "") -> str:
        link = "" if self._connection.connected else ", the link is down"
        said = f"; its last answer: {said}" if said else ""
        return f"{self.peer} at {self.url}: {where}: {why} within {limit:g} s{link}{said}"

    # -- the I/O thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        if self._connection.monitor is not None:
            poller.register(self._connection.monitor, zmq.POLLIN)
        checked = 0.0
        try:
            while not self._closed:
                writing = zmq.POLLOUT if self._unsent and self._connection.connected else 0
                poller.register(self._socket, zmq.POLLIN | writing)
                poller.poll(int(CHECK_S * 1000))
                self._take_fresh()
                if self._connection.read():
                    self._resend_all()
                self._receive()
                now = time.monotonic()
                if now - checked >= CHECK_S:
                    checked = now
                    self._check(now)
                self._send(now)
        finally:
            with self._lock:
                self._closed = True
            self._take_fresh()
            for pending in list(self._pending.values()):
                self._fail(pending, PeerError(f"the link to {self.peer} at {self.url} was closed"))
            self._connection.close()
            self._socket.close(linger=0)

    def _take_fresh(self) -> None:
        with self._lock:
            if self._awake:
                self._awake = False
                os.read(self._wake_read, 64)
            fresh, self._fresh = self._fresh, deque()
        for pending in fresh:
            self._pending[pending.id] = pending
        self._unsent.extend(fresh)

    def _resend_all(self) -> None:
        queued = {pending.id for pending in self._unsent}
        again = [pending for pending in self._pending.values() if pending.id not in queued]
        self.resent += len(again)
        self._unsent.extendleft(reversed(again))

    def _give_back(self, places: int) -> None:
        with self._room:
            self._free += places
            self._room.notify_all()

    def _receive(self) -> None:
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                if self._answered:
                    self._give_back(self._answered)
                    self._answered = 0
                return
            frames: list[Buffer] = [part.buffer for part in parts[1:]]
            try:
                batch = codec.decode_batch(parts[0].buffer, len(frames), self._limits)
            except BadMessage as error:
                self._fail_all(
                    PeerError(f"{self.peer} at {self.url} answers what this side cannot read: {error}")
                )
                continue
            at = 0
            for item in batch.items:
                body, payload = codec.body_of(item, frames[at : at + item.frames])
                at += item.frames
                self._answer(item.id, item.name, body, payload)

    def _answer(self, number: int, status: str, body: Buffer, frames: list[Buffer]) -> None:
        if number == 0 and status != codec.OK:  # the peer could not even read the header
            self._fail_all(PeerError(f"{self.peer} at {self.url}: {status}: {codec.decode(body, str)}"))
            return
        pending = self._pending.get(number)
        if pending is None:
            return  # the second answer to a request that was sent twice
        if status == codec.OK:
            del self._pending[number]
            self._answered += 1
            self._ended += 1
            if pending.bulk:
                self._moved = time.monotonic()
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_result(Answer(body, frames))
        elif status == "UNAVAILABLE":
            pending.said = codec.decode(body, str)
            pending.again = time.monotonic() + RETRY_S  # nothing was stored
        else:
            message = f"{self.peer} at {self.url}: {pending.where}: {codec.decode(body, str)}"
            self._fail(pending, _ERRORS.get(status, PeerError)(f"{message} [{status}]"))

    def _check(self, now: float) -> None:
        """Deadlines, resends, and connections that never get through their handshake."""
        if (refusal := self._connection.refusal(now)) is not None:
            self._fail_all(PeerError(f"{self.peer} at {self.url}: {refusal}"))
        again = []
        for pending in list(self._pending.values()):
            since, limit = max(pending.started, self._moved if pending.bulk else 0.0), pending.timeout
            if (
                self._shortened is not None
                and max(since, self._shortened[0]) + self._shortened[1] < since + limit
            ):
                since, limit = max(since, self._shortened[0]), self._shortened[1]
            if now > since + limit:
                why = f"no answer to {pending.method}"
                self._fail(pending, DeadlineError(self._late(pending.where, limit, why, pending.said)))
            elif pending.again and now > pending.again and self._connection.connected:
                again.append(pending)
                pending.again = 0.0
        if again:
            queued = {pending.id for pending in self._unsent}
            again = [pending for pending in again if pending.id not in queued]
            self.resent += len(again)
            self._unsent.extend(again)

    def _send(self, now: float) -> None:
        while self._unsent and self._connection.connected:
            live: list[_Pending] = []
            while self._unsent and len(live) < SEND_ITEMS:
                pending = self._unsent.popleft()
                if pending.id in self._pending:
                    live.append(pending)
            sent = 0
            requests = [(p.id, p.method, p.body, p.frames) for p in live]
            for header, frames, count in pack_counted(requests, self.sender):
                try:
                    self._socket.send_multipart([header, *frames], zmq.NOBLOCK, copy=False)
                except zmq.Again:  # the socket is full: the rest waits, in order
                    self._unsent.extendleft(reversed(live[sent:]))
                    return
                for pending in live[sent : sent + count]:
                    pending.again = 0.0 if self._connection.watched else now + self._resend_s
                sent += count

    def _fail(self, pending: _Pending, error: Exception) -> None:
        if self._pending.pop(pending.id, None) is None:
            return
        self._ended += 1
        self._give_back(1)
        if pending.future.set_running_or_notify_cancel():
            pending.future.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        for pending in list(self._pending.values()):
            self._fail(pending, error)
