"""Weights straight from the trainer's ranks to the workers of vLLM servers: `nccl` between GPUs, `gloo` on CPUs.

NOT YET RUN between GPUs: what the tests run is the same code over gloo.

    rank 0: HTTP to each server (direct_servers.py)  -->  its workers call receive (plugin/receive.py)
    each rank: what it holds of a bucket (direct_parts.py)  --one message a server-->  the workers of each server

A bucket is packed once and goes to all servers at the same time, each over connections of its own (plugin/link.py).
After each bucket the ranks agree on which servers are still there: one that fails, or is silent for `timeout` seconds,
is dropped by all of them, by name, stays paused with torn weights, and gets the newest version when it answers again
and the trainer waits for rollouts (`tend`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

from mgrpo.config.engine import VllmEngineConfig
from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.vllm.plugin.buckets import BUCKET, Stream
from mgrpo.engines.vllm.plugin.link import (
    Backend,
    Link,
    group_store,
    meeting_point,
    own_address,
    serve_meeting_point,
)
from mgrpo.engines.vllm.plugin.receive import group_key
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.policy import Policy
from mgrpo.trainers.torch.direct_parts import Parts
from mgrpo.trainers.torch.direct_servers import REST_SECONDS, DirectServer, DirectServers, outcome
from mgrpo.trainers.torch.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Target:
    """A server of one transfer. key: of the meeting of its workers with our ranks; new: they have not met yet."""

    url: str
    workers: int
    key: str
    new: bool


@dataclass(frozen=True, slots=True)
class Transfer:
    """What rank 0 tells all ranks. address, port: of its store, as they reach it."""

    targets: tuple[Target, ...]
    address: str
    port: int


class DirectSender:
    """One rank's end of every server. Rank 0 has `servers`; the others only run()."""

    def __init__(
        self,
        policy: Policy,
        engine: VllmEngineConfig,
        ranks: Ranks,
        *,
        servers: DirectServers | None = None,
        report: Callable[[str], None] = lambda line: None,
        limit: int = BUCKET,
    ) -> None:
        """report: takes a line for people. limit: bytes of a bucket."""
        if engine.sync not in ("gloo", "nccl"):
            raise ConfigError(f'engine.sync={engine.sync!r}: expected "gloo" or "nccl"')
        self._backend: Backend = engine.sync
        if self._backend == "nccl" and policy.device.type != "cuda":
            raise ConfigError('engine.sync="nccl" needs policy.device="cuda": the ranks send from their GPUs')
        self._policy, self._ranks, self._timeout = policy, ranks, engine.timeout
        self._gpu = torch.cuda.current_device() if self._backend == "nccl" else -1
        self._dtype = getattr(torch, engine.weights_dtype)
        self._servers, self._report, self._limit = servers, report, limit
        self._parts: Parts | None = None
        self._stream: Stream | None = None
        self._links: dict[str, Link] = {}  # url -> this rank's
        self._store: Any = None  # rank 0's
        self._current: Label | None = None  # what the policy is now; None: between two versions
        self._ended = 0.0  # when the last transfer did

    # -- rank 0 --------------------------------------------------------------------------------------------------

    def publish(self, label: str, command: Callable[[Transfer], None]) -> None:
        """Bring the weights as they are now to all servers that answer. command: sends what run() takes to the other
        ranks. Raises ConfigError for a server that never can take them."""
        self._current = parse_label(label)
        if self._current is None:
            raise ConfigError(f"weights are labelled {label!r}; expected <role>.e<epoch>.v<version>")
        assert self._servers is not None
        now = time.monotonic()
        self._send([s for s in self._servers.servers if now >= s.rest_until], command)

    def change(self) -> None:
        """The weights are about to change: nobody gets them until the next publish()."""
        self._current = None

    def tend(self, command: Callable[[Transfer], None]) -> None:
        """Where the trainer waits: servers that came back, or are new, get the newest version."""
        if self._current is None or self._servers is None:
            return
        if lacking := self._servers.lacking(self._current, self._ended):
            self._send(lacking, command)

    def _send(self, servers: Sequence[DirectServer], command: Callable[[Transfer], None]) -> None:
        assert self._servers is not None and self._current is not None
        control, label, dtype = self._servers, self._current, str(self._dtype).removeprefix("torch.")
        prepared = [control.start(outcome(control.prepare(s, label, dtype))) for s in servers]
        ready = []
        for server, future in zip(servers, prepared, strict=True):
            if reason := future.result():
                self._failed(server, reason)
            else:
                ready.append(server)
        if ready:
            transfer = self._transfer(ready)
            command(transfer)
            failed = self.run(transfer)
            for server in ready:
                if server.url in failed:
                    self._failed(server, failed[server.url])
                else:
                    if server.failures:
                        self._report(f"{server.url} has the weights again: {label}")
                    server.failures, server.rest_until = 0, 0.0
        self._ended = time.monotonic()

    def _transfer(self, servers: Sequence[DirectServer]) -> Transfer:
        assert self._servers is not None
        self._store = self._store or serve_meeting_point(self._timeout)
        targets = []
        for server in servers:
            new = not server.met or server.url not in self._links
            server.meetings += new
            key = f"{self._servers.servers.index(server)}/{server.meetings}"
            targets.append(Target(server.url, server.workers, key, new))
        # Other ranks know rank 0 by this address, and meet one another there as well.
        return Transfer(tuple(targets), os.environ.get("MASTER_ADDR", "127.0.0.1"), self._store.port)

    def _failed(self, server: DirectServer, reason: str) -> None:
        server.met = False
        if server.answered:  # else it is still starting
            server.failures += 1
            server.rest_until = time.monotonic() + min(REST_SECONDS, 2.0 ** (server.failures - 1))
            self._report(f"weights {self._current} did not reach a server: {reason}")

    # -- every rank ----------------------------------------------------------------------------------------------

    def run(self, transfer: Transfer) -> dict[str, str]:
        """Send the weights as they are now, a collective of all ranks; url -> reason of each server that did not take
        them."""
        parts, stream = self._prepared()
        alive = {target.url: target for target in transfer.targets}
        failed: dict[str, str] = {}

        def agree(errors: Mapping[str, str]) -> None:
            for found in self._ranks.gather(dict(errors)):
                for url, reason in found.items():
                    failed.setdefault(url, reason)
            for url in failed:
                alive.pop(url, None)
                if link := self._links.pop(url, None):
                    link.close()

        agree(self._begin(transfer, stream))
        size = stream.largest_message(self._ranks.rank)
        buffer = torch.empty(size, dtype=torch.uint8, device="cuda" if self._backend == "nccl" else "cpu")
        for bucket, cuts in enumerate(stream.buckets):
            if not alive:
                break
            parts.prepare(sorted({cut.tensor for cut in cuts}))
            message = stream.pack(bucket, self._ranks.rank, parts.held, buffer)
            agree(self._send_bucket(bucket, message, list(alive)))
        parts.prepare(())  # nothing that was gathered stays
        agree(self._finish(alive) if self._servers is not None else {})
        return failed

    def close(self) -> None:
        """Idempotent."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        if self._servers is not None:
            self._servers.close()

    def _prepared(self) -> tuple[Parts, Stream]:
        if hasattr(self._policy, "let_go"):  # sharded: a forward without a backward leaves weights gathered
            self._policy.let_go()
        if self._parts is None or self._stream is None:
            self._parts = Parts(self._policy.model, self._dtype, self._ranks)
            self._stream = Stream(self._parts.tensors, self._ranks.size, self._limit)
        self._parts.refresh()
        return self._parts, self._stream

    def _begin(self, transfer: Transfer, stream: Stream) -> dict[str, str]:
        """Meet the workers of new servers while they are told to come."""
        answers = self._on_servers(
            {
                target.url: {
                    "label": str(self._current),
                    "meeting": self._meeting(target, transfer, stream) if target.new else None,
                }
                for target in transfer.targets
            },
            "begin",
        )
        new = [target for target in transfer.targets if target.new]
        for target in new:
            if link := self._links.pop(target.url, None):
                link.close()
        errors = {}
        with ThreadPoolExecutor(max(1, len(new))) as pool:
            meetings = {target.url: pool.submit(self._meet, target, transfer) for target in new}
        for url, meeting in meetings.items():
            try:
                self._links[url] = meeting.result()
            except InfrastructureError as error:
                errors[url] = self._line(url, "meeting", error)
        return errors | _failures(answers, "meeting")

    def _meet(self, target: Target, transfer: Transfer) -> Link:
        if self._backend == "nccl":
            torch.cuda.set_device(self._gpu)  # each thread has a GPU of its own choice
        # A connection of its own to the store: a wait for one server would keep all others waiting.
        store = meeting_point(transfer.address, transfer.port, self._timeout)
        part = group_store(store, group_key(target.key, self._ranks.rank))
        own = own_address(_host(target.url))
        return Link(self._backend, part, 0, 1 + target.workers, own, self._timeout)

    def _meeting(self, target: Target, transfer: Transfer, stream: Stream) -> dict[str, object]:
        """What Receiver.begin() is given."""
        return {
            "backend": self._backend,
            "address": own_address(_host(target.url)),
            "port": transfer.port,
            "key": target.key,
            "senders": self._ranks.size,
            "workers": target.workers,
            "limit": stream.limit,
            "seconds": self._timeout,
            "tensors": [[t.name, t.dtype, list(t.shape), list(t.ends)] for t in stream.tensors],
        }

    def _send_bucket(self, bucket: int, message: torch.Tensor, urls: Sequence[str]) -> dict[str, str]:
        step = f"bucket {bucket}"
        answers = self._on_servers({url: {"bucket": bucket} for url in urls}, "receive")
        errors, under_way = {}, {}
        if len(message):
            for url in urls:
                try:
                    under_way[url] = self._links[url].begin(message)
                except InfrastructureError as error:
                    errors[url] = self._line(url, step, error)
        for url, work in under_way.items():
            try:
                self._links[url].wait(work)
            except InfrastructureError as error:
                errors[url] = self._line(url, step, error)
        return errors | _failures(answers, step)

    def _finish(self, urls: Iterable[str]) -> dict[str, str]:
        assert self._servers is not None and self._current is not None
        control, label = self._servers, self._current
        return _failures(
            {
                server.url: control.start(outcome(control.finish(server, label)))
                for server in control.servers
                if server.url in urls
            },
            "end",
        )

    def _on_servers(self, arguments: Mapping[str, Mapping[str, object]], step: str) -> dict[str, Future[str]]:
        """Rank 0: begin a step in the workers of each server."""
        if self._servers is None:
            return {}
        control = self._servers
        return {
            server.url: control.start(outcome(control.call(server, step, **arguments[server.url])))
            for server in control.servers
            if server.url in arguments
        }

    def _line(self, url: str, step: str, error: Exception) -> str:
        return f"{step}: {url}, from rank {self._ranks.rank}: {error}"


def _failures(answers: Mapping[str, Future[str]], step: str) -> dict[str, str]:
    """What servers and their workers say, which is better than what we noticed of it."""
    return {url: f"{step}: {reason}" for url, answer in answers.items() if (reason := answer.result())}


def _host(url: str) -> str:
    """The machine of a server; "" for this one."""
    return "" if url.startswith("unix://") else urlsplit(url).hostname or ""
