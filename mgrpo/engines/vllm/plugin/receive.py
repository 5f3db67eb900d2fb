"""The receiving half of weights that come straight from a trainer's ranks, in each worker of a server.

    mgrpo_direct_begin    meet the trainer's ranks where that has not happened, begin to load
    mgrpo_direct_receive  one bucket: a message of each rank that holds something of it -> whole tensors -> the model
    mgrpo_direct_finish   every tensor has come: the model is whole again

Each is a call of its own, so a trainer that dies between two buckets leaves a worker that waits for nothing. A worker
holds one bucket, the tensors that it completes, and what the model's loader keeps of a layer that is not complete.
Every worker receives whole tensors: the model's own loader takes its part of them (tensor or pipeline parallel).

After an error the connections are closed, on both sides, and the model may be torn: the server stays paused until a
later update, which meets anew, has ended well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mgrpo.engines.vllm.plugin.buckets import Assembler, Stream, StreamTensor
from mgrpo.engines.vllm.plugin.link import Backend, Link, group_store, meeting_point, own_address
from mgrpo.errors import InfrastructureError, MgrpoError

Load = Callable[[Iterable[tuple[str, Tensor]]], Any]
"""Takes whole tensors under their names in a checkpoint, any number of times."""


class Receiver:
    """One worker's end of all trainer ranks. Not thread-safe. What it raises has closed it: begin() meets anew."""

    def __init__(
        self, rank: int, device: torch.device | str, loading: Callable[[], AbstractContextManager[Load]]
    ) -> None:
        """rank: of this worker among those of its server. loading: its block loads all tensors of a model."""
        self._rank, self._device, self._loading = rank, torch.device(device), loading
        self._links: list[Link] = []
        self._stream: Stream | None = None
        self._assembler: Assembler | None = None
        self._update = contextlib.ExitStack()
        self._load: Load | None = None
        self.label = ""  # of the update that is under way
        self.received = 0  # buckets of it

    def begin(self, label: str, meeting: dict[str, Any] | None) -> None:
        """Begin an update. meeting: of meet(), where the ranks are to be met (anew)."""
        with self._closed_by_errors():
            self._end_update()
            if meeting is not None:
                self._leave()
                self._meet(**meeting)
            if self._stream is None:
                raise InfrastructureError(f"weights {label}: this worker has met no trainer")
            self._assembler = Assembler(self._stream, self._device)
            self._load = self._update.enter_context(self._loading())
            self.label, self.received = label, 0

    def receive(self, bucket: int) -> None:
        """Take the next bucket."""
        with self._closed_by_errors():
            if self._load is None or self._assembler is None or self._stream is None:
                raise InfrastructureError(f"bucket {bucket}: no update is under way")
            if bucket != self.received:
                raise InfrastructureError(f"bucket {bucket} came, {self.received} is the next")
            size = max(self._stream.message_size(bucket, sender) for sender in range(self._stream.senders))
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            for sender, link in enumerate(self._links):
                message = buffer[: self._stream.message_size(bucket, sender)]
                if len(message):
                    link.wait(link.begin(message))
                    self._assembler.unpack(bucket, sender, message)
            if tensors := self._assembler.complete():
                self._load(tensors)
            self.received += 1

    def finish(self) -> None:
        """The last bucket has come."""
        with self._closed_by_errors():
            if self._load is None or self._assembler is None or self._stream is None:
                raise InfrastructureError("no update is under way")
            if tensors := self._assembler.complete():  # of no elements
                self._load(tensors)
            if not self._assembler.is_done:
                raise InfrastructureError(
                    f"weights {self.label} end after {self.received} of {len(self._stream.buckets)} buckets"
                )
            self._load = self._assembler = None
            self._update.close()

    def close(self) -> None:
        """Leave the trainer's ranks. Idempotent."""
        with contextlib.suppress(Exception):
            self._end_update()
        self._leave()

    def _meet(
        self,
        *,
        backend: Backend,
        address: str,
        port: int,
        key: str,
        senders: int,
        workers: int,
        limit: int,
        seconds: float,
        tensors: Sequence[Sequence[Any]],
    ) -> None:
        """Connect with `senders` ranks, as one of `workers`. address, port: of rank 0's store; key: of this meeting in
        it. tensors: (name, dtype, shape, ends) of each; limit: of a bucket."""
        self._stream = Stream(
            [
                StreamTensor(str(name), str(dtype), tuple(shape), tuple(ends))
                for name, dtype, shape, ends in tensors
            ],
            senders,
            limit,
        )
        store, own = meeting_point(address, port, seconds), own_address(address)
        for sender in range(senders):
            part = group_store(store, group_key(key, sender))
            self._links.append(Link(backend, part, 1 + self._rank, 1 + workers, own, seconds))

    def _leave(self) -> None:
        self._stream = None
        links, self._links = self._links, []
        for link in links:
            link.close()

    def _end_update(self) -> None:
        """Break off one that is under way; the loader is told by an error, as of any that does not end well."""
        self._assembler = self._load = None
        broken, self._update = self._update, contextlib.ExitStack()
        error = InfrastructureError(f"weights {self.label}: the update was broken off")
        with contextlib.suppress(InfrastructureError):
            broken.__exit__(type(error), error, None)

    @contextlib.contextmanager
    def _closed_by_errors(self) -> Any:
        try:
            yield
        except BaseException:
            self.close()
            raise


def group_key(key: str, sender: int) -> str:
    """Of one sender's group, below that of the meeting."""
    return f"{key}/{sender}"


class DirectReceiving:
    """Mixed into the worker; see the module's docstring. Every answer is {"error": ...} or what is described."""

    device: torch.device  # the worker's own, as what follows
    rank: int
    vllm_config: Any
    model_runner: Any

    def mgrpo_direct_info(self) -> dict[str, object]:
        """{"dtype"}: what the model computes in."""
        return {"dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch.")}

    def mgrpo_direct_begin(self, label: str, meeting: dict[str, Any] | None = None) -> dict[str, object]:
        """{}; see Receiver.begin."""
        return _answer(lambda: self._receiver().begin(label, meeting))

    def mgrpo_direct_receive(self, bucket: int) -> dict[str, object]:
        """{}; see Receiver.receive."""
        return _answer(lambda: self._receiver().receive(bucket))

    def mgrpo_direct_finish(self) -> dict[str, object]:
        """{}; see Receiver.finish."""
        return _answer(self._receiver().finish)

    def mgrpo_direct_progress(self) -> dict[str, object]:
        """{"label", "received"}: the update that is under way, or was last, and its buckets that have come."""
        receiver = self._receiver()
        return {"label": receiver.label, "received": receiver.received}

    def _receiver(self) -> Receiver:
        found: Receiver | None = getattr(self, "_mgrpo_receiver", None)
        if found is None:
            found = Receiver(self.rank, self.device, self._mgrpo_loading)
            self._mgrpo_receiver = found
        return found

    @contextlib.contextmanager
    def _mgrpo_loading(self) -> Iterator[Load]:
        """A block that loads all of the model's parameters. Raises ValueError naming one that did not come."""
        from mgrpo.engines.vllm.plugin.reload import reloading

        model = self.model_runner.get_model()
        missing = {name for name, _ in model.named_parameters()}
        if self.vllm_config.quant_config is not None:
            missing.clear()  # vLLM computes some of them itself
        with reloading(model, self.vllm_config) as load:

            def take(tensors: Iterable[tuple[str, Tensor]]) -> None:
                missing.difference_update(load(tensors) or ())

            yield take
            if missing:
                raise ValueError(f"{min(missing)} did not come ({len(missing)} parameters of the model)")


def _answer(act: Callable[[], None]) -> dict[str, object]:
    try:
        act()
    except MgrpoError as error:
        return {"error": str(error)}
    except Exception as error:  # of the model's loader: it is another model, or has no such tensor
        return {"error": f"{type(error).__name__}: {error}"}
    return {}
