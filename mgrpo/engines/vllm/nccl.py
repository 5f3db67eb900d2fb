"""Weights between GPUs through vLLM's own weight transfer.

NOT YET RUN on a GPU: the order of the calls and their bodies are tested against a server of the tests' own; what NCCL
does with them is not.

    once a server    /init_weight_transfer_engine  beside  this side's endpoint (both wait for each other)
    once a version   /pause?mode=keep -> /start_weight_update -> /update_weights beside the broadcast
                     -> /finish_weight_update (which labels) -> /reset_prefix_cache -> /resume

The sender is the process that holds the version, on a GPU that the servers' GPUs reach. It needs vLLM importable, since
the endpoint is vLLM's. The API moves between releases of vLLM: everything that knows it stands in this file.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from mgrpo.config.engine import OnUpdate
from mgrpo.engines.labels import Label
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.weight_sync import is_paused, pause, relabel_and_resume, server_label
from mgrpo.engines.weight_sync import WeightSync
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.weights.version import Weights


class Sender(Protocol):
    """This side's end of one server's group; rank 0 of it."""

    def open(self, address: str, port: int, world_size: int) -> None:
        """Meet the server's workers (ranks 1 and up). Blocks until they have come."""
        ...

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Broadcast the tensors in order. Blocks until they have been received."""
        ...

    def close(self) -> None:
        """Leave the group. Idempotent."""
        ...


class NcclSync(WeightSync[VllmClient]):
    """Whole weights from this process' GPU to the servers'. Raises ConfigError where there is no GPU."""

    def __init__(
        self,
        folder: Path,
        timeout: float,
        sender: type[Sender] | None = None,
        on_update: OnUpdate = "recompute",
    ) -> None:
        """folder: through which workers lock a server. sender: the end on this side; the default is vLLM's."""
        super().__init__(folder, timeout)
        if sender is None and not torch.cuda.is_available():
            raise ConfigError('sync "nccl" needs a CUDA device in the process that sends; use "fs" on a CPU')
        self._sender = sender or VllmSender
        self._on_update: OnUpdate = on_update
        self._ends: dict[str, Sender] = {}  # url -> its group
        self._label: Label | None = None
        self._state: dict[str, Tensor] = {}

    async def _prepare(self, label: Label, weights: Weights) -> None:
        self._state = await asyncio.to_thread(safetensors.torch.load, weights.data)
        self._label = label

    async def current_version(self, server: VllmClient) -> Label | None:
        return self.own(await server_label(server, self._on_update))

    async def paused(self, server: VllmClient) -> bool:
        return await is_paused(server)

    async def update(self, server: VllmClient, label: Label) -> None:
        if label != self._label:
            raise InfrastructureError(
                f"{server.url}: version {label} is gone, {self._label} is the newest here"
            )
        if (
            await self.current_version(server) is None
        ):  # new, or started again: the group of its predecessor is no use
            self._leave(server)
        try:
            await pause(server, label, self._on_update)
            end = self._ends.get(server.url) or await self._meet(server)
            await server.post("/start_weight_update")
            info = {
                "names": list(self._state),
                "dtype_names": [str(t.dtype).removeprefix("torch.") for t in self._state.values()],
                "shapes": [list(t.shape) for t in self._state.values()],
            }
            await asyncio.wait_for(
                _together(
                    server.post("/update_weights", {"update_info": info}),
                    asyncio.to_thread(end.send, self._state),
                ),
                self.timeout,
            )
            await server.post("/finish_weight_update", {"weight_version": str(label)})
            await relabel_and_resume(server, None, self._on_update)
        except BaseException:
            self._leave(server)  # after a failure the two ends may not agree any more
            raise

    async def _meet(self, server: VllmClient) -> Sender:
        world_size = 1 + int((await server.get("/get_world_size"))["world_size"])
        address, port = _rendezvous()
        end = self._sender()
        info = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": world_size,
            "packed": False,
        }
        await asyncio.wait_for(
            _together(
                server.post("/init_weight_transfer_engine", {"init_info": info}),
                asyncio.to_thread(end.open, address, port, world_size),
            ),
            self.timeout,
        )
        self._ends[server.url] = end
        return end

    def _leave(self, server: VllmClient) -> None:
        if end := self._ends.pop(server.url, None):
            end.close()


class VllmSender:
    """vLLM's trainer endpoint, tensor by tensor."""

    def __init__(self) -> None:
        self._group: Any = None

    def open(self, address: str, port: int, world_size: int) -> None:
        try:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init
        except ImportError as error:
            raise ConfigError(
                f'sync "nccl" needs vllm beside mgrpo in the process that sends: {error}'
            ) from None
        self._group = trainer_init({"master_address": address, "master_port": port, "world_size": world_size})

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        stream = torch.cuda.current_stream()
        for tensor in tensors.values():
            self._group.broadcast(tensor.cuda().contiguous(), src=0, stream=stream)
        stream.synchronize()

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()
            self._group = None


async def _together(*both: Any) -> None:
    """Await both; the first failure is raised at once, without waiting for the other, whose peer will not come."""
    await asyncio.gather(*both)


def _rendezvous() -> tuple[str, int]:
    """An address of this machine that others reach, and a free port on it."""
    found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    family, *_, (address, *_) = min(found, key=lambda entry: entry[0])  # IPv4 where there is one
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        return str(address), int(probe.getsockname()[1])
