"""Weights over the link: whole, once, however slow the link is, and from where they were after it was cut."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from mgrpo.errors import CorruptionError, DeadlineError, PeerError
from mgrpo.transport.client import Client
from mgrpo.transport.server import Handler, Reply, Request, Server
from mgrpo.weights import CHUNK, IN_FLIGHT, Pull, Weights, WeightsServer, fetch_policy_files, fetch_weights
from tests.chaos.proxy import Proxy

MIB = 1 << 20
OLD = Weights("main.e1.v3", 3, random.Random(3).randbytes(9 * CHUNK + 7))
NEW = Weights("main.e1.v4", 4, random.Random(4).randbytes(5 * CHUNK))


class Counted:
    """The handlers of a WeightsServer, with the offsets of the chunks that each label was asked for."""

    def __init__(self, weights: WeightsServer) -> None:
        self.chunks: Counter[tuple[str, int]] = Counter()
        self._weights = weights

    def handlers(self) -> Mapping[str, Handler]:
        handlers = dict(self._weights.handlers())
        inner = handlers["weights.chunk"]

        def chunk(request: Request) -> Reply:
            label, offset, _ = request.decode(tuple[str, int, int])
            self.chunks[label, offset] += 1
            reply = inner(request)
            assert isinstance(reply, Reply)
            return reply

        return handlers | {"weights.chunk": chunk}


@contextmanager
def served(*versions: Weights) -> Iterator[tuple[WeightsServer, Counted, Server]]:
    weights = WeightsServer()
    for version in versions:
        weights.publish(version)
    counted = Counted(weights)
    with Server("tcp://127.0.0.1:0", counted.handlers()) as server:
        yield weights, counted, server


@contextmanager
def proxied(server: Server, rate: float = 0.0) -> Iterator[tuple[Proxy, str]]:
    proxy = Proxy(int(server.url.rpartition(":")[2]), rate)
    try:
        yield proxy, f"tcp://127.0.0.1:{proxy.port}"
    finally:
        proxy.close()


def test_the_newest_version_arrives_bit_for_bit() -> None:
    """Sizes around a chunk's; nothing comes twice, and nothing when the asker has it."""
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK + 5):
        sent = Weights("main.e1.v3", 3, random.Random(size).randbytes(size))
        with served(sent) as (_, counted, server), Client(server.url, timeout=30) as client:
            assert fetch_weights(client, "", 3, 1.0) == sent
            assert fetch_weights(client, sent.label, 3, 1.0) is None
            assert set(counted.chunks.values()) <= {1} and len(counted.chunks) == -(-size // CHUNK)


def test_a_slow_link_carries_weights_once_with_progress_and_no_limit_on_the_whole() -> None:
    """16 MiB at 2.5 MiB/s: over six seconds, of which no request may last longer than two. Every byte crosses the link
    about once."""
    sent = Weights("main.e1.v3", 3, random.Random(1).randbytes(16 * MIB))
    told: list[tuple[int, int]] = []
    with served(sent) as (_, counted, server), proxied(server, 2.5 * MIB) as (proxy, url):
        with Client(url, timeout=5.0) as client:
            began = time.monotonic()
            got = fetch_weights(client, "", 3, 0.0, Pull(lambda *progress: told.append(progress)))
            assert got == sent and client.resent == 0
            assert time.monotonic() - began > 5.5, "the link was not slow"
        assert set(counted.chunks.values()) == {1}
        assert proxy.answered < 1.02 * 16 * MIB + 100_000
    assert len(told) >= 2 and told == sorted(told) and told[-1][1] == 16 * MIB


def test_a_cut_link_goes_on_from_where_it_was() -> None:
    """The connection is reset at half of the bytes: only the chunks that were under way are asked for again."""
    sent = Weights("main.e1.v3", 3, random.Random(2).randbytes(64 * CHUNK))
    with (
        served(sent) as (_, counted, server),
        proxied(server) as (proxy, url),
        Client(url, timeout=60) as client,
    ):

        class Cut(Pull):
            def take(self, offset: int, chunk: object) -> None:
                super().take(offset, chunk)  # type: ignore[arg-type]
                if self.received == 32 * CHUNK:
                    proxy.mode = "reset"
                    threading.Timer(0.3, setattr, (proxy, "mode", "pass")).start()

        assert fetch_weights(client, "", 3, 1.0, Cut()) == sent
        assert sum(counted.chunks.values()) <= 64 + 2 * IN_FLIGHT
        assert client.resent > 0


def test_a_stalled_pull_names_trainer_label_and_bytes_and_can_be_taken_up_again() -> None:
    """Nothing arrives any more: a DeadlineError after the client's timeout. The next try asks for what is missing."""
    sent = Weights("main.e1.v3", 3, random.Random(5).randbytes(64 * CHUNK))
    with served(sent) as (_, counted, server), proxied(server) as (proxy, url):
        with Client(url, peer="trainer main", timeout=3.0) as client:

            class Stalled(Pull):
                def take(self, offset: int, chunk: object) -> None:
                    super().take(offset, chunk)  # type: ignore[arg-type]
                    if self.received == 8 * CHUNK:
                        proxy.mode = "black hole"

            pull = Stalled()
            with pytest.raises(DeadlineError, match=r"trainer main at tcp://.*main\.e1\.v3") as late:
                fetch_weights(client, "", 3, 1.0, pull)
            assert f"{pull.received} of {64 * CHUNK} bytes have arrived" in str(late.value)
            assert 8 * CHUNK <= pull.received < 64 * CHUNK
            before = set(pull.chunks)
            proxy.mode = "pass"
            counted.chunks.clear()
            client.timeout = 60.0
            assert fetch_weights(client, "", 3, 60.0, pull) == sent
            assert not {offset for _, offset in counted.chunks} & before


def pull_while_publishing(*published: Weights) -> tuple[Weights | None, Counted]:
    """What a pull of OLD gets when these versions are published at its third chunk."""
    with served(OLD) as (weights, counted, server), Client(server.url, timeout=30) as client:

        class Publishing(Pull):
            def take(self, offset: int, chunk: object) -> None:
                super().take(offset, chunk)  # type: ignore[arg-type]
                if self.received == 3 * CHUNK:
                    for version in published:
                        weights.publish(version)

        return fetch_weights(client, "", 3, 1.0, Publishing()), counted


def test_a_version_that_is_being_pulled_stays_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two newer versions are published meanwhile: the pull ends with the old one. Then it is gone from memory."""
    monkeypatch.setattr("mgrpo.weights.IN_FLIGHT", 2)
    newest = Weights("main.e1.v5", 5, b"newest")
    got, _ = pull_while_publishing(NEW, newest)
    assert got == OLD
    with served(OLD) as (weights, _, server), Client(server.url, timeout=30) as client:
        assert fetch_weights(client, "", 3, 1.0) == OLD
        weights.publish(NEW)
        assert weights._pulled is None, "an older version that nobody pulls takes memory"


def test_a_pull_whose_version_is_gone_begins_again_with_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has asked for so long that the trainer let the version go; or the trainer was restarted."""
    monkeypatch.setattr("mgrpo.weights.IN_FLIGHT", 2)
    monkeypatch.setattr("mgrpo.weights.PULL_S", -1.0)
    got, counted = pull_while_publishing(NEW)
    assert got == NEW
    assert sum(label == NEW.label for label, _ in counted.chunks) == 5


def test_bytes_that_are_not_those_announced_are_refused() -> None:
    """A checksum over the whole version."""
    with served(OLD) as (weights, _, server), Client(server.url, timeout=30) as client:
        assert weights._newest is not None
        weights._newest.data = bytes(len(OLD.data))
        pull = Pull()
        with pytest.raises(CorruptionError, match=r"main\.e1\.v3.*checksum"):
            fetch_weights(client, "", 3, 1.0, pull)
        weights._newest.data = OLD.data
        assert fetch_weights(client, "", 3, 1.0, pull) == OLD


def test_policy_files_larger_than_a_frame_arrive() -> None:
    """Tokenizers of 30 MB exist, and no frame of the link is as large."""
    files = {"config.json": b"{}", "tokenizer.json": random.Random(6).randbytes(20 * MIB), "empty": b""}
    with served() as (weights, _, server), Client(server.url, timeout=30) as client:
        assert fetch_policy_files(client, 0.0) == {}
        weights.describe(files)
        assert fetch_policy_files(client, 1.0) == files


def test_an_answer_that_no_frame_can_carry_is_an_error_by_name() -> None:
    """libzmq would cut the connection without a word, again and again."""
    with Server("tcp://127.0.0.1:0", {"get": lambda request: Reply(None, [bytes(17 * MIB)])}) as server:
        with (
            Client(server.url, timeout=30) as client,
            pytest.raises(PeerError, match=r"17825792 bytes.*TOO_LARGE"),
        ):
            client.call("get")
