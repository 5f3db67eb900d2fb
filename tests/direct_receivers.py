"""A vLLM server of the tests' own whose workers are real processes that run the plug-in's receiving half.

The model in each worker is a double: its loader takes this tensor-parallel rank's part of dim 0, in place, as soon as a
tensor comes, so that a broken update leaves it torn.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mgrpo.engines.vllm.plugin.receive import DirectReceiving, Load
from tests.fake_vllm import FakeVllm

DTYPE = "bfloat16"


class Worker(DirectReceiving):
    """One worker of a server."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(dtype=getattr(torch, DTYPE)))
        self.weights: dict[str, Tensor] = {}
        self.trap: tuple[int, int] | None = None  # bucket and signal: what this process sends itself there
        self.refused = ""  # a tensor that its loader does not know

    def mgrpo_direct_receive(self, bucket: int) -> dict[str, object]:
        if self.trap is not None and self.trap[0] == bucket:
            number, self.trap = self.trap[1], None
            os.kill(os.getpid(), number)
        return super().mgrpo_direct_receive(bucket)

    @contextlib.contextmanager
    def _mgrpo_loading(self) -> Iterator[Load]:
        def load(tensors: Iterable[tuple[str, Tensor]]) -> None:
            for name, tensor in tensors:
                if name == self.refused:
                    raise KeyError(name)
                rows = tensor.chunk(self.size) if tensor.dim() else [tensor] * self.size
                self.weights[name] = rows[self.rank].clone() if self.rank < len(rows) else tensor[:0].clone()

        self.weights.clear()
        yield load

    def set_trap(self, rank: int, bucket: int, number: int) -> None:
        if rank == self.rank:
            self.trap = bucket, number

    def refuse(self, name: str) -> None:
        self.refused = name

    def held(self) -> dict[str, Any]:
        """As bytes, since bfloat16 has no numpy type."""
        return {
            name: (
                tuple(tensor.shape),
                str(tensor.dtype),
                tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
            for name, tensor in self.weights.items()
        }


def work(connection: Any, rank: int, size: int) -> None:
    """The life of a worker's process: calls by name."""
    torch.set_num_threads(1)
    worker = Worker(rank, size)
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(worker, method)(**arguments))


class DirectVllm(FakeVllm):
    """See the module's docstring. stop() kills the workers, start() brings new ones."""

    unrecorded = (*FakeVllm.unrecorded, "/collective_rpc")

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path)
        self.size = size
        self.steps: list[str] = []  # calls of its workers

    async def start(self) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(self.size)]
        self.processes = [
            context.Process(target=work, args=(theirs, rank, self.size), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        self.pipes = [(ours, threading.Lock()) for ours, _ in pipes]
        await self.ask("mgrpo_direct_info")
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    async def ask(self, method: str, **arguments: Any) -> list[Any]:
        """Of each worker at once. Raises ConnectionError when one has died."""
        return list(
            await asyncio.gather(*(asyncio.to_thread(_ask, *pipe, method, arguments) for pipe in self.pipes))
        )

    async def on_collective_rpc(self, body: dict[str, Any], query: str) -> Any:
        method, arguments = body["method"], body.get("kwargs", {})
        self.steps.append(method)
        changes = method not in ("mgrpo_direct_info", "mgrpo_direct_progress")
        assert not (changes and self.running.is_set()), f"{method} while tokens are sampled"
        if changes:
            self._change()
        try:
            return {"results": await self.ask(method, **arguments)}
        except (EOFError, OSError) as error:
            return 500, {"error": {"message": f"a worker has died: {error!r}"}}

    async def weights_of(self) -> dict[str, Tensor]:
        """What its workers hold, put together."""
        parts = await self.ask("held")
        out = {}
        for name, (shape, dtype, _) in parts[0].items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            rows = [_tensor(part[name][2], kind, part[name][0]) for part in parts]
            out[name] = torch.cat(rows) if shape else rows[0]
        return out


def _ask(pipe: Any, lock: threading.Lock, method: str, arguments: dict[str, Any]) -> Any:
    with lock:  # as an engine: one call after the other, also where nobody waits for the first any more
        pipe.send((method, arguments))
        return pipe.recv()


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(shape)
