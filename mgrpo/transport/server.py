"""The answering side of the link: one ROUTER on its own thread, handlers by method name.

One turn of the loop: take every message that has arrived (up to a bound), run its handlers, call `barrier` once, then
send the answers. With a barrier that fsyncs, an answer therefore means "durable", and one fsync serves many requests:
while it runs the next batch gathers in the socket. When the barrier fails nothing of the batch is answered with "ok";
every peer gets UNAVAILABLE and sends again.

A handler that cannot answer yet returns Park: it is polled after every batch and every `tick_s` until it has an answer
or its time is up (long polls are level-triggered: nothing is lost when the poller goes away and asks again).

An answer reaches every peer that stays connected: what a peer's connection has no room for waits here until it has.
So a client sends a request again only after a new connection, or after an answer UNAVAILABLE. A server that fails
answers everything with the reason until it is closed; check() raises it for the process around it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import zmq

from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.transport import codec
from mgrpo.transport.address import Binding, check_url, is_private
from mgrpo.transport.codec import BadMessage, Buffer, Item, Limits, Refusal, Sender
from mgrpo.transport.keys import ServerKeys

log = logging.getLogger("mgrpo.transport")
T = TypeVar("T")

BODY_IN_HEADER = 4 << 10  # larger bodies travel as a frame of their own
BAD_PER_MINUTE = 100  # malformed messages of one peer before it is cut off
TURN_MESSAGES = 512
TURN_BYTES = 32 << 20
WAITING_MESSAGES = (
    8192  # answers kept for one peer that reads too slowly; a peer of ours never asks for as many at once
)
HEARTBEAT_TIMEOUT_MS = 10_000
FLUSH_S = 0.01  # how soon they are tried again
KNOWN_PEERS = 4096


@dataclass(slots=True)
class Request:
    """One request. `user` is the peer's public key where the link is encrypted, "" elsewhere."""

    method: str
    sender: Sender
    body: Buffer
    frames: list[Buffer]
    user: str = ""

    def decode(self, kind: type[T]) -> T:
        """The body as `kind`; raises BadMessage."""
        return codec.decode(self.body, kind)


@dataclass(slots=True)
class Reply:
    body: object = None
    frames: Sequence[Buffer] = ()


@dataclass(slots=True)
class Park:
    """Not yet: `poll` is called again and again until it returns a reply; `late` is the answer after
    `seconds`."""

    poll: Callable[[], Reply | None]
    seconds: float
    late: Reply = field(default_factory=Reply)


Handler = Callable[[Request], Reply | Park]
Answer = tuple[bytes, int, str, object, Sequence[Buffer]]  # (identity, request id, status, body, frames)


class _Limiter:
    """Counts malformed messages per peer and minute."""

    def __init__(self) -> None:
        self._times: dict[bytes, deque[float]] = defaultdict(deque)

    def strike(self, identity: bytes, now: float) -> bool:
        """Record one; True when the peer has used up its minute."""
        times = self._times[identity]
        times.append(now)
        while times and times[0] < now - 60.0:
            times.popleft()
        if len(self._times) > 1024:  # forget the oldest peers, never grow without bound
            self._times.pop(next(iter(self._times)))
        return len(times) > BAD_PER_MINUTE

    def is_out(self, identity: bytes) -> bool:
        return len(self._times.get(identity, ())) > BAD_PER_MINUTE


class Server:
    """Serves `handlers` at `url` from its own thread until close(). Binding happens here, so a taken address
    raises ConfigError before anything starts. `url` is the address as bound (port 0 resolved)."""

    def __init__(
        self,
        url: str,
        handlers: Mapping[str, Handler],
        *,
        barrier: Callable[[], None] | None = None,
        tick: Callable[[], None] | None = None,
        tick_s: float = 0.05,
        fault: Callable[[], None] | None = None,
        limits: Limits | None = None,
        security: ServerKeys | None = None,
        insecure: bool = False,
    ) -> None:
        check_url(url)
        if security is None and not is_private(url):
            if not insecure:
                raise ConfigError(
                    f"{url} can be reached from other machines and is not encrypted: "
                    f"make keys with `mgrpo keys init`, or pass --insecure"
                )
            log.warning("%s IS NOT ENCRYPTED: anyone who reaches it may read and write this run", url)
        self._handlers = dict(handlers)
        self._barrier, self._tick, self._tick_s, self._fault = barrier, tick, tick_s, fault
        self._limits = limits or Limits()
        self._security = security
        self._context = zmq.Context() if security is not None else zmq.Context.instance()
        self._socket = self._context.socket(zmq.ROUTER)
        self._configure()
        try:
            if security is not None:
                security.attach(self._context, self._socket)
            self._binding = Binding(self._socket, url)
        except BaseException:
            self._socket.close(linger=0)
            self._close_context()
            raise
        self.url = self._binding.url
        self.counters: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._parked: dict[tuple[bytes, int], tuple[Park, float]] = {}
        self._waiting: dict[
            bytes, deque[list[Buffer]]
        ] = {}  # messages that a peer's connection had no room for
        self._peers: dict[bytes, None] = {}  # who has asked something, oldest first
        self._limiter = _Limiter()
        self._wake_read, self._wake_write = os.pipe()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"mgrpo-server {url}", daemon=True)
        self._thread.start()

    def _configure(self) -> None:
        socket = self._socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, self._limits.frame)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # libzmq counts whole messages, not bytes, as signs of life: a time-out must exceed the largest frame's way
        socket.setsockopt(zmq.HEARTBEAT_IVL, 500)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.RCVHWM, 256)
        socket.setsockopt(zmq.SNDHWM, 256)
        socket.setsockopt(zmq.BACKLOG, 512)

    def check(self) -> None:
        """Raises MgrpoError naming address and cause when it serves no more, because of a fault of its own."""
        if self.failure is not None:
            raise MgrpoError(self._last_words()) from self.failure

    def _last_words(self) -> str:
        return f"the server at {self.url} has stopped: {type(self.failure).__name__}: {self.failure}"

    def close(self, timeout: float = 10.0) -> None:
        """Finish the batch in hand, answer it, free the address. Idempotent."""
        if self._thread.is_alive():
            self._stopping = True
            os.write(self._wake_write, b"x")
            self._thread.join(timeout)
        if self._wake_read >= 0 and not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1
            self._close_context()

    def _close_context(self) -> None:
        if self._security is not None:
            self._security.detach()
            self._context.term()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the loop -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        last_tick = 0.0
        try:
            while not self._stopping:
                poller.poll(int(1000 * (FLUSH_S if self._waiting else self._tick_s)))
                answers = self._take_turn()
                now = time.monotonic()
                if now - last_tick >= self._tick_s:
                    last_tick = now
                    if self._tick is not None:
                        self._tick()
                answers += self._poll_parked(now)
                self._finish_turn(answers)
        except BaseException as error:
            self.failure = error
            log.exception("server at %s stopped", self.url)
            self._refuse_all(poller)
        finally:
            self._socket.close(linger=500)
            self._binding.release()

    def _refuse_all(self, poller: zmq.Poller) -> None:
        """Until close(): whoever waits for an answer, or asks, gets the reason why there is none. An answer to request
        0 is one to all requests of a peer."""
        ((header, _),) = pack([(0, "STOPPED", codec.encode(self._last_words()), ())], Sender())
        untold = list(self._peers)
        while not self._stopping:
            for identity in untold:
                with contextlib.suppress(zmq.ZMQError):  # gone, or it does not read
                    self._socket.send_multipart([identity, header], zmq.NOBLOCK)
            poller.poll(1000)
            untold = []
            with contextlib.suppress(zmq.Again):
                while True:
                    untold.append(self._socket.recv_multipart(zmq.NOBLOCK)[0])

    def _take_turn(self) -> list[Answer]:
        answers: list[Answer] = []
        size = 0
        for _ in range(TURN_MESSAGES):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            size += sum(len(part) for part in parts)
            self._take_message(parts, answers)
            if size > TURN_BYTES:
                break
        return answers

    def _take_message(self, parts: list[zmq.Frame], answers: list[Answer]) -> None:
        identity = parts[0].bytes
        if identity not in self._peers:
            self._peers[identity] = None
            if len(self._peers) > KNOWN_PEERS:
                del self._peers[next(iter(self._peers))]
        try:
            if len(parts) < 2:
                raise BadMessage("a message without a header")
            frames: list[Buffer] = [part.buffer for part in parts[2:]]
            total = sum(len(frame) for frame in frames)
            if total > self._limits.message:
                raise BadMessage(f"message of {total} bytes, the limit is {self._limits.message}")
            batch = codec.decode_batch(parts[1].buffer, len(frames), self._limits)
        except BadMessage as error:
            self._bad(identity, 0, str(error), answers)
            return
        if self._limiter.is_out(identity):
            self.counters["cut_off"] += 1
            return
        user = self._security.user_of(parts[1]) if self._security is not None else ""
        at = 0
        impostor = self._impostor(user, batch.sender.role)
        for item in batch.items:
            if impostor is not None:
                self.counters[impostor.code] += 1
                answers.append((identity, item.id, impostor.code, str(impostor), ()))
                continue
            mine = frames[at : at + item.frames]
            at += item.frames
            body, payload = codec.body_of(item, mine)
            self._dispatch(identity, item.id, Request(item.name, batch.sender, body, payload, user), answers)

    def _impostor(self, user: str, role: str) -> Refusal | None:
        """Why the holder of this key may not speak as `role`, if so."""
        if self._security is not None:
            try:
                self._security.check_role(user, role)
            except Refusal as refusal:
                return refusal
        return None

    def _dispatch(self, identity: bytes, number: int, request: Request, answers: list[Answer]) -> None:
        if (identity, number) in self._parked:
            return  # sent again while it waits
        handler = self._handlers.get(request.method)
        try:
            if handler is None:
                raise BadMessage(f"unknown method {request.method!r}")
            result = handler(request)
        except BadMessage as error:
            self._bad(identity, number, f"{request.method}: {error}", answers)
        except Refusal as error:
            self.counters[error.code] += 1
            answers.append((identity, number, error.code, str(error), ()))
        except Exception as error:
            self._internal(identity, number, request.method, error, answers)
        else:
            if isinstance(result, Park):
                self._parked[identity, number] = (result, time.monotonic() + result.seconds)
            else:
                answers.append((identity, number, codec.OK, result.body, result.frames))

    def _internal(
        self, identity: bytes, number: int, method: str, error: Exception, answers: list[Answer]
    ) -> None:
        """A handler's own bug: the asker gets an error, the others are served on after `fault` has mended the state."""
        log.error("handler of %s failed", method, exc_info=error)
        self.counters["INTERNAL"] += 1
        answers.append((identity, number, "INTERNAL", f"{type(error).__name__}: {error}", ()))
        if self._fault is not None:
            self._fault()

    def _bad(self, identity: bytes, number: int, why: str, answers: list[Answer]) -> None:
        self.counters["BAD_REQUEST"] += 1
        if self._limiter.strike(identity, time.monotonic()):
            self.counters["cut_off"] += 1
            return
        answers.append((identity, number, "BAD_REQUEST", why, ()))

    def _poll_parked(self, now: float) -> list[Answer]:
        answers: list[Answer] = []
        for key, (park, deadline) in list(self._parked.items()):
            try:
                reply = park.poll()
            except Refusal as error:
                answers.append((*key, error.code, str(error), ()))
            except Exception as error:
                self._internal(*key, "a parked request", error, answers)
            else:
                if reply is None and now < deadline:
                    continue
                reply = reply or park.late
                answers.append((*key, codec.OK, reply.body, reply.frames))
            del self._parked[key]
        return answers

    def _finish_turn(self, answers: list[Answer]) -> None:
        if self._barrier is not None:
            try:
                self._barrier()
            except Refusal as error:
                self.counters[error.code] += 1
                answers = [
                    (identity, number, error.code, str(error), ()) if status == codec.OK else refused
                    for refused in answers
                    for identity, number, status, *_ in [refused]
                ]
        by_peer: dict[bytes, list[Answer]] = defaultdict(list)
        for answer in answers:
            by_peer[answer[0]].append(answer)
        for identity, mine in by_peer.items():
            waiting = self._waiting.setdefault(identity, deque())
            for header, frames in pack([self._encoded(answer) for answer in mine], Sender()):
                if len(waiting) < WAITING_MESSAGES:
                    waiting.append([identity, header, *frames])
                else:
                    self.counters["undelivered"] += 1
        self._send_waiting()

    def _encoded(self, answer: Answer) -> tuple[int, str, bytes, Sequence[Buffer]]:
        """An answer as an item to pack. libzmq would cut the asker's connection without a word at an oversize frame."""
        _, number, status, value, frames = answer
        body = codec.encode(value)
        largest = max(len(body), max((len(frame) for frame in frames), default=0))
        if largest > self._limits.frame:
            self.counters["TOO_LARGE"] += 1
            text = f"the answer has a frame of {largest} bytes, the limit is {self._limits.frame}"
            return number, "TOO_LARGE", codec.encode(text), ()
        return number, status, body, frames

    def _send_waiting(self) -> None:
        for identity, waiting in list(self._waiting.items()):
            try:
                while waiting:
                    self._socket.send_multipart(waiting[0], zmq.NOBLOCK, copy=False)
                    waiting.popleft()
            except zmq.Again:
                continue  # its connection is full: the rest waits, in order
            except zmq.ZMQError:  # gone; should it come back, it asks again
                self.counters["undelivered"] += len(waiting)
            del self._waiting[identity]


def pack(
    items: Sequence[tuple[int, str, bytes, Sequence[Buffer]]], sender: Sender, header_bytes: int = 32 << 10
) -> list[tuple[bytes, list[Buffer]]]:
    """Messages (header, frames) that carry all items in order, each header below header_bytes plus one item."""
    return [(header, frames) for header, frames, _ in pack_counted(items, sender, header_bytes)]


def pack_counted(
    items: Sequence[tuple[int, str, bytes, Sequence[Buffer]]], sender: Sender, header_bytes: int = 32 << 10
) -> Iterator[tuple[bytes, list[Buffer], int]]:
    """The same one by one, each with the number of items it carries."""
    batch: list[Item] = []
    frames: list[Buffer] = []
    size = frame_bytes = 0
    for number, name, body, payload in items:
        framed = len(body) > BODY_IN_HEADER
        mine: list[Buffer] = [body, *payload] if framed else list(payload)
        inline = msgspec.Raw(b"\xc0" if framed else body)
        batch.append(Item(number, name, inline, len(mine), framed))
        frames += mine
        size += len(inline) + len(name) + 16
        frame_bytes += sum(len(frame) for frame in mine)
        if size > header_bytes or frame_bytes > codec.JOIN_BELOW:
            yield codec.encode_batch(sender, batch), frames, len(batch)
            batch, frames, size, frame_bytes = [], [], 0, 0
    if batch:
        yield codec.encode_batch(sender, batch), frames, len(batch)
