"""Weights over the link: exact, once, however slow the link is, and from where they were after it was cut."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mgrpo.errors import CorruptionError, DeadlineError, PeerError
from mgrpo.transport.client import Client
from mgrpo.transport.server import Handler, Reply, Request, Server
from mgrpo.types import Probe
from mgrpo.weights import history, publisher, pull, version
from mgrpo.weights.publisher import CHUNK, WeightPublisher
from mgrpo.weights.pull import IN_FLIGHT, Pull, fetch_policy_files, fetch_weights
from mgrpo.weights.version import Weights
from tests.chaos.proxy import Proxy

MIB = 1 << 20
Tensors = dict[str, torch.Tensor]


def model(size: int, seed: int = 0) -> Tensors:
    """About `size` bytes of float32."""
    generator = torch.Generator().manual_seed(seed)
    return {"layer": torch.randn(size // 4 + 1, generator=generator), "norm": torch.ones(3)}


def label(number: int) -> str:
    return f"main.e1.v{number}"


def after(tensors: Tensors, seed: int, share: float = 0.02) -> Tensors:
    """Some of the weights have moved."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(t.shape, generator=generator) < share, t * 1.001 + 1e-3, t)
        for name, t in tensors.items()
    }


class Receiver:
    """A worker's memory: the tensors of the version that it holds, as bytes, brought forward by what arrives."""

    def __init__(self, client: Client, pull: Pull | None = None) -> None:
        self.client, self.pull = client, pull or Pull()
        self.label, self.held = "", bytearray()

    def fetch(self, at_least: int = 0, whole: bool = False) -> Weights | None:
        weights = fetch_weights(
            self.client, self.label, at_least, 5.0, self.pull, whole=whole or not self.label
        )
        if weights is not None:
            self.load(weights)
        return weights

    def load(self, weights: Weights) -> None:
        if weights.is_whole:
            weights.verify()
            self.held = bytearray(weights.data)
        else:
            assert weights.base == self.label
            head = len(weights.layout.header)
            for _, changes in weights.patches():
                for change in changes:
                    at = head + change.slice.offset
                    data = memoryview(self.held)[at : at + change.slice.nbytes]
                    change.apply(data)
                    assert change.check(data)
        self.label = weights.label

    def tensors(self) -> Tensors:
        return safetensors.torch.load(bytes(self.held))


def equal(found: Tensors, expected: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == expected.keys() and all(
        (t.dtype, t.shape) == (expected[name].dtype, expected[name].shape)
        and torch.equal(t.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))
        for name, t in found.items()
    )


class Counted:
    """The handlers of a publisher, with the chunks that it was asked for."""

    def __init__(self, weights: WeightPublisher) -> None:
        self.chunks: Counter[tuple[str, str, int]] = Counter()
        self._weights = weights

    def handlers(self) -> Mapping[str, Handler]:
        handlers = dict(self._weights.handlers())
        inner = handlers["weights.chunk"]

        def chunk(request: Request) -> Reply:
            kind, name, offset, _ = request.decode(tuple[str, str, int, int])
            self.chunks[kind, name, offset] += 1
            reply = inner(request)
            assert isinstance(reply, Reply)
            return reply

        return handlers | {"weights.chunk": chunk}


@contextmanager
def served(
    *versions: Tensors, dtype: torch.dtype | None = None
) -> Iterator[tuple[WeightPublisher, Counted, Server]]:
    """The versions 0, 1, ... published one after the other."""
    weights = WeightPublisher(dtype)
    for number, tensors in enumerate(versions):
        weights.publish(label(number), number, tensors.items())
    counted = Counted(weights)
    with Server("tcp://127.0.0.1:0", counted.handlers()) as server:
        try:
            yield weights, counted, server
        finally:
            weights.close()


@contextmanager
def proxied(server: Server, rate: float = 0.0) -> Iterator[tuple[Proxy, str]]:
    proxy = Proxy(int(server.url.rpartition(":")[2]), rate)
    try:
        yield proxy, f"tcp://127.0.0.1:{proxy.port}"
    finally:
        proxy.close()


class Hooked(Pull):
    """Calls `act` once when so many bytes have arrived."""

    def __init__(self, at: int, act: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.at, self.act = at, act

    def _take(self, pulled: Any, offset: int, chunk: Any) -> None:
        super()._take(pulled, offset, chunk)
        if self.received >= self.at and self.act is not None:
            act, self.act = self.act, None
            act()


def test_the_newest_version_arrives_bit_for_bit() -> None:
    """Sizes around a chunk's; nothing comes twice, and nothing when the asker has it; the probe comes along."""
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK + 5):
        sent = model(size)
        with served(sent) as (weights, counted, server), Client(server.url, timeout=30) as client:
            receiver = Receiver(client)
            assert receiver.fetch() is not None and equal(receiver.tensors(), sent)
            assert receiver.fetch() is None
            assert set(counted.chunks.values()) <= {1}
            probe = Probe((1, 2), (-0.5,))
            weights.publish(label(1), 1, sent.items(), probe)
            got = receiver.fetch(1)
            assert got is not None and got.probe == probe and (got.label, got.version) == (label(1), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_twenty_patches_are_bit_equal_to_the_cast_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors of many slices, of one element and of none; a receiver that comes late, or asks for a whole version
    now and then, has the same bytes."""
    monkeypatch.setattr("mgrpo.weights.layout.SLICE", 1 << 12)
    monkeypatch.setattr(history, "BUCKET", 3 << 12)
    now = model(1 << 17) | {"scalar": torch.tensor(1.0), "none": torch.zeros(0, 4), "ids": torch.arange(9)}
    with served(now, dtype=dtype) as (weights, counted, server), Client(server.url, timeout=30) as client:
        receiver, late = Receiver(client), Receiver(client, Pull())
        receiver.fetch()
        for number in range(1, 21):
            moved = after(now, number, share=0.5 if number % 7 == 0 else 0.02)
            now = moved | {"ids": now["ids"] + (number % 2)}
            weights.publish(label(number), number, now.items())
            got = receiver.fetch(number, whole=number % 6 == 0)
            assert got is not None
            cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in now.items()}
            assert equal(receiver.tensors(), cast)
            if number % 3 == 0:
                late.fetch(number)
                assert equal(late.tensors(), cast)
    kinds = Counter(kind for kind, _, _ in counted.chunks)
    assert kinds["patch"] > 10 and kinds["whole"] >= 3


def test_patches_are_a_few_per_cent_of_a_bfloat16_version_and_never_longer_than_a_whole() -> None:
    """Steps of Adam's size at lr 1e-6 leave nearly all bits as they are; where all change, a whole version travels."""
    weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)) * 0.02
    step = torch.randn(1 << 20, generator=torch.Generator().manual_seed(2)).sign() * 1e-6
    first, second, other = ({"w": w} for w in (weights, weights + step, torch.flip(weights, (0,))))
    with (
        served(first, second, dtype=torch.bfloat16) as (server_side, _, server),
        Client(server.url, timeout=30) as client,
    ):
        receiver = Receiver(client)
        receiver.fetch()
        server_side.publish(label(2), 2, first.items())
        patch = receiver.fetch(2)
        assert patch is not None and not patch.is_whole and patch.nbytes < 0.04 * 2 * (1 << 20)
        server_side.publish(label(3), 3, other.items())
        last = receiver.fetch(3)
        assert last is not None and last.nbytes <= 1.01 * 2 * (1 << 20)
        assert equal(receiver.tensors(), {"w": other["w"].bfloat16()})


def test_a_slow_link_carries_weights_once_with_progress_and_no_limit_on_the_whole() -> None:
    """16 MiB at 2.5 MiB/s: over six seconds, of which no request may last longer than two. Every byte crosses the link
    about once."""
    sent = model(16 * MIB)
    told: list[tuple[int, int]] = []
    with served(sent) as (_, counted, server), proxied(server, 2.5 * MIB) as (proxy, url):
        with Client(url, timeout=5.0) as client:
            began = time.monotonic()
            receiver = Receiver(client, Pull(lambda *progress: told.append(progress)))
            receiver.fetch()
            assert equal(receiver.tensors(), sent) and client.resent == 0
            assert time.monotonic() - began > 5.5, "the link was not slow"
        assert set(counted.chunks.values()) == {1}
        assert proxy.answered < 1.02 * 16 * MIB + 100_000
    assert len(told) >= 2 and told == sorted(told) and told[-1][1] >= 16 * MIB


def test_a_cut_link_goes_on_from_where_it_was() -> None:
    """The connection is reset at half of the bytes: only the chunks that were under way are asked for again."""
    sent = model(64 * CHUNK)
    with (
        served(sent) as (_, counted, server),
        proxied(server) as (proxy, url),
        Client(url, timeout=60) as client,
    ):

        def cut() -> None:
            proxy.mode = "reset"
            threading.Timer(0.3, setattr, (proxy, "mode", "pass")).start()

        receiver = Receiver(client, Hooked(32 * CHUNK, cut))
        receiver.fetch()
        assert equal(receiver.tensors(), sent)
        assert sum(counted.chunks.values()) <= 66 + 2 * IN_FLIGHT
        assert client.resent > 0


def test_a_stalled_pull_goes_on_with_its_version_though_newer_ones_came() -> None:
    """Nothing arrives any more: a DeadlineError after the client's timeout naming trainer, label and bytes. Meanwhile
    the trainer publishes. The next try asks for what is missing of the old version, and then for what changed since."""
    versions = [model(64 * CHUNK)]
    versions += [after(versions[0], 1), after(versions[0], 2)]
    with served(versions[0]) as (weights, counted, server), proxied(server) as (proxy, url):
        with Client(url, peer="trainer main", timeout=3.0) as client:
            pull = Hooked(8 * CHUNK, lambda: setattr(proxy, "mode", "black hole"))
            receiver = Receiver(client, pull)
            with pytest.raises(DeadlineError, match=r"trainer main at tcp://.*main\.e1\.v0") as late:
                receiver.fetch()
            assert f"{pull.received} of {pull.size} bytes have arrived" in str(late.value)
            assert 8 * CHUNK <= pull.received < 64 * CHUNK and pull.pulling == label(0)
            missing = set(pull._parts[0].missing)
            for number in (1, 2):
                weights.publish(label(number), number, versions[number].items())
            proxy.mode = "pass"
            counted.chunks.clear()
            client.timeout = 60.0
            receiver.fetch(2)
            assert receiver.label == label(0) and equal(receiver.tensors(), versions[0])
            assert {offset for kind, _, offset in counted.chunks if kind == "whole"} <= missing
            got = receiver.fetch(2)
            assert got is not None and not got.is_whole and equal(receiver.tensors(), versions[2])


def test_a_version_that_is_being_pulled_stays_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions are published meanwhile, some of them different everywhere: the pull ends with the old one. Then
    nothing but the base is left in memory."""
    monkeypatch.setattr(pull, "IN_FLIGHT", 2)
    old = model(9 * CHUNK)
    newer = [model(9 * CHUNK, seed) for seed in (1, 2, 3)]
    with served(old) as (weights, _, server), Client(server.url, timeout=30) as client:

        def publish() -> None:
            for number, tensors in enumerate(newer, 1):
                weights.publish(label(number), number, tensors.items())

        receiver = Receiver(client, Hooked(3 * CHUNK, publish))
        receiver.fetch()
        assert receiver.label == label(0) and equal(receiver.tensors(), old)
        assert weights._history._kept is not None, "nobody pulled"
        receiver.fetch(3)
        assert equal(receiver.tensors(), newer[-1])
        receiver.fetch(3)
        weights.publish(label(4), 4, old.items())
        kept = weights._history
        assert kept._kept is None and not kept._patches, "an older version that nobody pulls takes memory"


def test_a_pull_whose_version_is_gone_begins_again_with_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has asked for so long that the trainer let the version go; or the trainer was restarted."""
    monkeypatch.setattr(pull, "IN_FLIGHT", 2)
    monkeypatch.setattr(publisher, "PULL_S", -1.0)
    old, new = model(9 * CHUNK), model(9 * CHUNK, 1)
    with served(old) as (weights, _, server), Client(server.url, timeout=30) as client:
        receiver = Receiver(client, Hooked(3 * CHUNK, lambda: weights.publish(label(1), 1, new.items())))
        receiver.fetch()
        assert receiver.label == label(1) and equal(receiver.tensors(), new)


def test_a_restarted_trainer_sends_whole_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label of another epoch is nothing that patches lead on from, whatever its number."""
    tensors = model(CHUNK)
    with served(tensors) as (_, _, server), Client(server.url, timeout=30) as client:
        receiver = Receiver(client)
        receiver.fetch()
    again = WeightPublisher()
    again.publish("main.e2.v1", 1, after(tensors, 1).items())
    again.publish("main.e2.v2", 2, after(tensors, 2).items())
    with Server("tcp://127.0.0.1:0", again.handlers()) as server, Client(server.url, timeout=30) as client:
        receiver.client = client
        got = receiver.fetch(2)
        assert got is not None and got.is_whole and equal(receiver.tensors(), after(tensors, 2))


def test_every_tensor_of_a_version_is_aligned() -> None:
    """Also one of eight bytes an element that was published after one of two with an odd number of them."""
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(2), "c": torch.ones(1)}
    with served(tensors) as (_, _, server), Client(server.url, timeout=30) as client:
        receiver = Receiver(client)
        got = receiver.fetch()
        assert got is not None and equal(receiver.tensors(), tensors)
        assert all(info.offset % info.itemsize == 0 for info in got.layout.tensors)


def test_what_the_iterator_raises_leaves_the_version_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gathering of a sharded model may fail half way; also other tensors than before are refused by name."""
    monkeypatch.setattr("mgrpo.weights.layout.SLICE", 1 << 12)
    old = model(1 << 16)

    def torn() -> Iterator[tuple[str, torch.Tensor]]:
        yield "layer", old["layer"] + 1
        raise RuntimeError("a rank has gone")

    with served(old) as (weights, _, server), Client(server.url, timeout=30) as client:
        with pytest.raises(RuntimeError, match="a rank has gone"):
            weights.publish(label(1), 1, torn())
        for wrong, words in (
            ({"layer": old["layer"]}, "lack norm"),
            ({"layer": old["layer"][:-1], "norm": old["norm"]}, r"\('layer', 'F32', \(16384,\)\)"),
            ({"layer": old["layer"].double(), "norm": old["norm"]}, "F64"),
        ):
            with pytest.raises(ValueError, match=words):
                weights.publish(label(1), 1, wrong.items())
        receiver = Receiver(client)
        receiver.fetch()
        assert receiver.label == label(0) and equal(receiver.tensors(), old)
        weights.publish(label(1), 1, after(old, 3).items())
        receiver.fetch(1)
        assert equal(receiver.tensors(), after(old, 3))


def test_bytes_that_are_not_those_announced_are_refused() -> None:
    """A flipped bit in a whole, of a patch, of its sums; the next try succeeds."""
    old, new = model(4 * CHUNK), after(model(4 * CHUNK), 1)
    with served(old) as (weights, _, server), Client(server.url, timeout=30) as client:
        receiver = Receiver(client)
        base = weights._history._base
        base[0][12345] ^= 1
        with pytest.raises(CorruptionError, match=r"main\.e1\.v0: layer arrived damaged"):
            receiver.fetch()
        base[0][12345] ^= 1
        receiver.fetch()
        weights.publish(label(1), 1, new.items())
        patch = weights._history.patch(label(1))
        assert patch is not None
        patch[len(patch) // 2] ^= 4
        with pytest.raises(CorruptionError, match=r"main\.e1\.v1: .* announced is"):
            receiver.fetch(1)
        patch[len(patch) // 2] ^= 4
        receiver.fetch(1)
        assert equal(receiver.tensors(), new)


def test_a_large_part_lies_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Bytes beyond SPOOL do not stay in main memory; the file has no name, so nothing is left of it."""
    monkeypatch.setattr(version, "SPOOL", CHUNK)
    sent = model(5 * CHUNK)
    with served(sent) as (_, _, server), Client(server.url, timeout=30) as client:
        folder = tmp_path / "run" / "weights"  # nobody has made it yet
        weights = fetch_weights(client, "", 0, 1.0, Pull(folder=folder))
        assert weights is not None and weights.parts[0].spool._memory is None and not list(folder.iterdir())
        weights.verify()
        assert equal(safetensors.torch.load(weights.data), sent)
        weights.write_safetensors(tmp_path / "model.safetensors")
        assert equal(safetensors.torch.load_file(tmp_path / "model.safetensors"), sent)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "run"]
        again = Weights.of_file("main.e1.v0", 0, tmp_path / "model.safetensors")
        assert sum(len(data) for _, data in again.slices()) == weights.layout.size
        weights.close()


def test_what_is_no_safetensors_file_is_refused(tmp_path: Any) -> None:
    """Cut off, too long, overlapping tensors, an unknown dtype."""
    data = safetensors.torch.save({"w": torch.zeros(4)})
    for bad in (
        b"",
        data[:7],
        data[:-1],
        data + b"x",
        data.replace(b"F32", b"F31"),
        data.replace(b"[0,16]", b"[4,20]"),
    ):
        with pytest.raises(ValueError, match="safetensors format"):
            Weights.of_bytes("e1.v1", 1, bad)


def test_a_direct_version_has_a_label_and_no_bytes() -> None:
    """Servers got it from the trainer itself."""
    with served() as (weights, _, server), Client(server.url, timeout=30) as client:
        weights.announce(label(7), 7)
        got = fetch_weights(client, "", 7, 1.0)
        assert got is not None and got.is_direct and (got.label, got.version) == (label(7), 7)
        assert fetch_weights(client, label(7), 7, 1.0) is None


def test_policy_files_larger_than_a_frame_arrive() -> None:
    """Tokenizers of 30 MB exist, and no frame of the link is as large."""
    files = {"config.json": b"{}", "tokenizer.json": np.random.default_rng(6).bytes(20 * MIB), "empty": b""}
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
