"""The two processes of bench_weights: a trainer that holds float32 weights and publishes them, and a receiver that
holds them in bfloat16, as an engine does. Each reads commands from its standard input, one JSON line each, and answers
with one: {"seconds": {part: s}, "bytes": n, "peak": bytes of RSS above where the command began, ...}.

    python -m bench.weights_parts trainer|receiver MODEL FOLDER
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo.engines.hf.load import WeightLoader
from mgrpo.transport.client import Client
from mgrpo.transport.server import Server
from mgrpo.weights.publisher import WeightPublisher
from mgrpo.weights.pull import Pull, fetch_weights
from mgrpo.weights.version import Weights

REAL = {"smollm2": Path(__file__).parent.parent / "models" / "smollm2" / "model.safetensors"}
RANDOM = {  # vocabulary, hidden, intermediate, layers, heads, key-value heads; head and embedding are tied
    "random-120m": (49152, 768, 2048, 12, 12, 4),
    "random-1.2b": (128256, 2048, 8192, 16, 32, 8),  # the shapes of Llama-3.2-1B
}
SEEN = 5  # gradients that Adam's moments have seen at each step, its own included
CHUNK = 1 << 17  # elements of a tensor that are stepped at a time, so that no moments are kept
BETAS, EPS = (0.9, 0.999), 1e-8
BLOCK = 4 << 20


def shapes_of(model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, as a checkpoint has them."""
    if model in REAL:
        with safetensors.safe_open(REAL[model], "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, tuple(file.get_slice(name).get_shape())
        return
    vocabulary, hidden, inner, layers, heads, kv_heads = RANDOM[model]
    kv = hidden // heads * kv_heads
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield at + "self_attn.q_proj.weight", (hidden, hidden)
        yield at + "self_attn.k_proj.weight", (kv, hidden)
        yield at + "self_attn.v_proj.weight", (kv, hidden)
        yield at + "self_attn.o_proj.weight", (hidden, hidden)
        yield at + "mlp.gate_proj.weight", (inner, hidden)
        yield at + "mlp.up_proj.weight", (inner, hidden)
        yield at + "mlp.down_proj.weight", (hidden, inner)
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def memory() -> dict[str, int]:
    """Bytes of this process's resident memory: now, and at most since forget_peak()."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:")}
    return {"now": found["VmRSS:"], "peak": found["VmHWM:"]}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def available() -> int:
    """Bytes of main memory that the machine has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class Clock:
    """Seconds of the parts of a way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._since
        self._since = now


class Part:
    """Commands by name are the methods."""

    def __init__(self, model: str, folder: str) -> None:
        self.model, self.folder = model, Path(folder)
        self.shapes = list(shapes_of(model))

    def serve(self) -> None:
        print(json.dumps(memory()), flush=True)
        for line in sys.stdin:
            name, arguments = json.loads(line)
            if name == "peak":  # since the last command began, what was served meanwhile included
                print(json.dumps(memory()), flush=True)
                continue
            forget_peak()
            before = memory()["now"]
            answer = getattr(self, name)(**arguments) or {}
            found = memory()
            answer |= {"peak": found["peak"] - before, "now": found["now"], "top": found["peak"]}
            print(json.dumps(answer), flush=True)

    def join(self, port: int, rank: int) -> None:
        """The group of two that gloo broadcasts in."""
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)


class Trainer(Part):
    """Float32 weights, and Adam steps of random gradients."""

    def __init__(self, model: str, folder: str) -> None:
        super().__init__(model, folder)
        noise = torch.Generator().manual_seed(0)
        self._pool = torch.randn(1 << 24, generator=noise)  # gradients are windows of it
        self._steps = 0
        self.weights = dict(self._made(noise))
        self.publisher = WeightPublisher(torch.bfloat16)
        self.server = Server("tcp://127.0.0.1:0", self.publisher.handlers())
        self.label = ""

    def _made(self, noise: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        if self.model in REAL:
            with safetensors.safe_open(REAL[self.model], "pt") as file:
                for name, _ in self.shapes:
                    yield name, file.get_tensor(name).float().clone()
            return
        for name, shape in self.shapes:
            tensor = torch.ones(shape)
            yield name, tensor.normal_(0.0, 0.02, generator=noise) if len(shape) > 1 else tensor

    def url(self) -> dict[str, Any]:
        return {"url": self.server.url, "size": 2 * sum(t.numel() for t in self.weights.values())}

    def step(self, lr: float) -> None:
        """One of Adam's. A gradient is a direction that stays and noise of the same size. Moments are those of the last
        SEEN gradients, computed for a few elements at a time: there is no room for those of all."""
        self._steps += 1
        for name, tensor in self.weights.items():
            flat = tensor.view(-1)
            for start in range(0, len(flat), CHUNK):
                part = flat[start : start + CHUNK]
                part.add_(self._update(f"{name} {start}", len(part)), alpha=-lr)

    def _update(self, place: str, size: int) -> Tensor:
        def window(step: int) -> Tensor:
            at = random.Random(f"{place} {step}").randrange(len(self._pool) - size + 1)
            return self._pool[at : at + size]

        b1, b2 = BETAS
        first, second, direction = torch.zeros(size), torch.zeros(size), window(0)
        for step in range(self._steps + 1, self._steps + SEEN + 1):
            gradient = direction + window(step)
            first.lerp_(gradient, 1 - b1)
            second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        scale = second.div_(1 - b2**SEEN).sqrt_().add_(EPS)
        return first.div_(1 - b1**SEEN).div_(scale)

    def publish(self, version: int) -> dict[str, Any]:
        clock = Clock()
        self.label = f"main.e1.v{version}"
        self.publisher.publish(self.label, version, self.weights.items())
        clock.lap("encode")
        size = self.publisher.size
        assert size is not None
        return {"seconds": clock.seconds, "bytes": size.nbytes, "whole": size.whole}

    def cast(self) -> dict[str, Any]:
        """What a whole version needs that no patch is made for."""
        clock = Clock()
        for tensor in self.weights.values():
            tensor.bfloat16()
        clock.lap("encode")
        return {"seconds": clock.seconds}

    def one_object(self, port: int) -> dict[str, Any]:
        """All of it as one float32 safetensors object, down a plain TCP stream."""
        clock = Clock()
        data = safetensors.torch.save(self.weights)
        clock.lap("encode")
        with socket.create_connection(("127.0.0.1", port)) as stream:
            stream.sendall(len(data).to_bytes(8, "little"))
            stream.sendall(data)
        return {"seconds": clock.seconds, "bytes": len(data)}

    def broadcast(self) -> dict[str, Any]:
        for tensor in self.weights.values():
            dist.broadcast(tensor.bfloat16().view(-1).view(torch.uint8), 0)
        return {"bytes": 2 * sum(tensor.numel() for tensor in self.weights.values())}

    def digest(self) -> dict[str, Any]:
        return {"digest": digest(tensor.bfloat16() for tensor in self.weights.values())}


class Receiver(Part):
    """An engine's memory, and what an engine does to it: mgrpo/engines/hf/load.py."""

    def __init__(self, model: str, folder: str) -> None:
        super().__init__(model, folder)
        self.weights = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in self.shapes}
        self.loader = WeightLoader(lambda shapes: self.weights)
        self.pull = Pull(folder=self.folder)
        self._listener = socket.create_server(("127.0.0.1", 0))

    def connect(self, url: str) -> dict[str, Any]:
        self.client = Client(url, peer="trainer main", timeout=300.0)
        return {"port": self._listener.getsockname()[1]}

    def fetch(self, version: int, patch: bool) -> dict[str, Any]:
        """Over the link, into memory."""
        clock = Clock()
        have = self.loader.label if patch else ""
        weights = self._pulled(version, self.pull if patch else Pull(folder=self.folder), have)
        clock.lap("transfer")
        self.loader.load(weights)
        clock.lap("apply")
        if not patch:
            self.pull.layout = weights.layout
        arrived = weights.nbytes
        weights.close()
        return {"seconds": clock.seconds, "bytes": arrived, "whole": weights.is_whole}

    def _pulled(self, version: int, pull: Pull, have: str) -> Weights:
        weights = fetch_weights(self.client, have, version, 60.0, pull, whole=not have)
        assert weights is not None and weights.version == version
        return weights

    def through_folder(self, version: int) -> dict[str, Any]:
        """Over the link into a folder, from where a server would read it."""
        clock = Clock()
        weights = self._pulled(version, Pull(folder=self.folder), "")
        clock.lap("transfer")
        path = self.folder / "version" / "model.safetensors"
        path.parent.mkdir()
        weights.write_safetensors(path)
        arrived = weights.nbytes
        weights.close()
        with safetensors.safe_open(path, "pt") as file:
            for name, tensor in self.weights.items():
                tensor.copy_(file.get_tensor(name))
        clock.lap("apply")
        shutil.rmtree(path.parent)
        return {"seconds": clock.seconds, "bytes": arrived}

    def one_object(self) -> dict[str, Any]:
        connection, _ = self._listener.accept()
        clock = Clock()
        with connection, connection.makefile("rb") as stream:
            data = stream.read(int.from_bytes(stream.read(8), "little"))
        clock.lap("transfer")
        for name, tensor in safetensors.torch.load(data).items():
            self.weights[name].copy_(tensor)
        clock.lap("apply")
        return {"seconds": clock.seconds, "bytes": len(data)}

    def broadcast(self) -> dict[str, Any]:
        clock = Clock()
        for tensor in self.weights.values():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0)
        clock.lap("transfer")
        return {"seconds": clock.seconds}

    def digest(self) -> dict[str, Any]:
        return {"digest": digest(self.weights.values())}


def digest(tensors: Any) -> int:
    """crc32c of all bytes."""
    crc = 0
    for tensor in tensors:
        data: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(data), BLOCK):
            crc = google_crc32c.extend(crc, data[start : start + BLOCK])
    return crc


if __name__ == "__main__":
    {"trainer": Trainer, "receiver": Receiver}[sys.argv[1]](*sys.argv[2:]).serve()
