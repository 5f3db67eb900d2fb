"""How new weights reach a vLLM server: one small interface, one class a way.

    copy   an HfEngine's own load(): the bytes are copied into the model in this process (no class here)
    fs     FolderSync: a safetensors folder a version, which the server reads again
    lora   LoraSync: an adapter folder a version, loaded beside the others
    nccl   mgrpo/engines/vllm/nccl.py: vLLM's weight transfer between GPUs

fs goes in this order, which leaves no moment at which a token could come from mixed weights or be mislabelled:

    /pause?mode=keep -> reload_weights -> /reset_prefix_cache (running requests included) -> /update_weight_version
    -> /resume -> /weight_info equals the label

A request that is under way stays: its tokens so far keep their label, its keys and values are computed again with the
new weights, the tokens that follow carry the new label. A push that fails leaves the server paused, so that torn
weights answer nobody, until a later push succeeds.

A label is what the trainer calls a version, `<role>.e<epoch>.v<version>`: labels are ordered, epoch first, because a
trainer that went back to a checkpoint publishes the same version numbers again. What another role's trainer has brought
to a server is never taken for a version of one's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch

from mgrpo.config.policy import LoraConfig
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.errors import ConfigError, DeadlineError, InfrastructureError
from mgrpo.weights import Weights

KEEP = 3  # versions on disk, and adapters in a server: a slower worker may still be at the one before


class Label(NamedTuple):
    """(epoch of the trainer, policy version); of one role the newer one is the greater one."""

    epoch: int
    version: int
    role: str = ""

    def __str__(self) -> str:
        return f"{self.role}{'.' if self.role else ''}e{self.epoch}.v{self.version}"


def parse_label(text: str) -> Label | None:
    """None for what is no label, such as a server's own before the first update."""
    match = re.fullmatch(r"(?:([^\s/]+)\.)?e(\d+)\.v(\d+)", text)
    return Label(int(match[2]), int(match[3]), match[1] or "") if match else None


class WeightSync(ABC):
    """Brings versions to servers. `prepare` comes once a version, `bring` once a server and version."""

    labels_tokens = True
    """The server itself says which weights sampled which token; false where a request names its weights."""

    def __init__(self, folder: Path, timeout: float) -> None:
        """folder: shared with the servers and with the other workers, which take turns at each server through it.
        timeout: seconds that one step of an update may take."""
        self.folder, self.timeout = folder, timeout
        self.role = ""  # of the version prepared last

    def own(self, label: Label | None) -> Label | None:
        """`label`, unless it is that of another role."""
        return label if label is not None and label.role == self.role else None

    @abstractmethod
    async def prepare(self, weights: Weights) -> None:
        """Make a version ready to be brought. Idempotent, also between workers. Raises ValueError when it does not
        fit."""

    @abstractmethod
    async def held(self, server: VllmClient) -> Label | None:
        """The newest version that the server holds; None before the first."""

    @abstractmethod
    async def stuck(self, server: VllmClient) -> bool:
        """An update of the server is under way, or was never ended."""

    @abstractmethod
    async def push(self, server: VllmClient, label: Label) -> None:
        """Make the server serve the prepared version. Raises InfrastructureError naming server and step."""

    def model(self, served: str, label: Label) -> str:
        """The name to ask for, of a server whose model is called `served`."""
        return served

    async def bring(self, server: VllmClient, label: Label) -> Label:
        """The version that the server serves afterwards: `label`, or a newer one that another worker brought."""
        async with self._turn(server):
            held = await self.held(server)
            if held is None or held < label or await self.stuck(server):
                await self.push(server, label)
                held = await self.held(server)
        if held is None or held < label:
            raise InfrastructureError(f"{server.url}: serves {held} after an update to {label}")
        return held

    @contextlib.asynccontextmanager
    async def _turn(self, server: VllmClient) -> AsyncIterator[None]:
        """One worker at a time: two updates at once would resume each other's half-read weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(server.url.encode()).hexdigest()[:12]
        deadline = time.monotonic() + 4 * self.timeout
        with (self.folder / f"{name}.turn").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DeadlineError(
                            f"{server.url}: another worker has been updating it for {4 * self.timeout:g} s"
                        ) from None
                await asyncio.sleep(0.05)
            yield

    def path(self, label: Label) -> Path:
        """Where a version lies."""
        return self.folder / str(label)

    def _place(self, label: Label, files: dict[str, bytes]) -> None:
        """Write a version's folder, complete or absent at every moment, and remove what nobody needs any more."""
        target = self.path(label)
        if target.exists():
            return
        # Engines of one process place versions side by side, so its number would not tell them apart.
        fresh = self.folder / f".{label}.{uuid.uuid4().hex}"
        fresh.mkdir(parents=True)
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        # Not synced to disk: a version is of use to servers that run now, and a power cut ends those too.
        try:
            fresh.rename(target)
        except OSError:  # another worker was faster
            shutil.rmtree(fresh)
            if not target.exists():
                raise
        self._clean()

    def _clean(self) -> None:
        """Remove all but the newest versions, and what a killed worker left unfinished of older ones."""
        there = sorted((label, p) for p in self.folder.iterdir() if (label := parse_label(p.name)))
        for _, old in there[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
        for unfinished in self.folder.glob(".*"):
            label = parse_label(unfinished.stem.removeprefix("."))
            if label is not None and there and label < there[-KEEP:][0][0]:
                shutil.rmtree(unfinished, ignore_errors=True)


class FolderSync(WeightSync):
    """Whole weights through a folder (see the module's docstring)."""

    async def prepare(self, weights: Weights) -> None:
        label = label_of(weights)
        self.role = label.role
        await asyncio.to_thread(self._place, label, {"model.safetensors": weights.data})

    async def held(self, server: VllmClient) -> Label | None:
        return self.own(await held_label(server))

    async def stuck(self, server: VllmClient) -> bool:
        return await is_paused(server)

    async def push(self, server: VllmClient, label: Label) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(self.path(label).resolve())}}
        await server.post("/pause", mode="keep")
        await server.post("/collective_rpc", call | {"timeout": self.timeout})
        await relabel_and_resume(server, label)


class LoraSync(WeightSync):
    """Adapters: each version is loaded under its label's name beside the older ones, so nothing is paused, and a
    request is answered by the version it named to its end."""

    labels_tokens = False

    def __init__(self, folder: Path, timeout: float, lora: LoraConfig) -> None:
        super().__init__(folder, timeout)
        self._lora = lora

    async def prepare(self, weights: Weights) -> None:
        label = label_of(weights)
        self.role = label.role
        if not self.path(label).exists():
            files = await asyncio.to_thread(adapter_files, weights.data, self._lora)
            await asyncio.to_thread(self._place, label, files)

    async def held(self, server: VllmClient) -> Label | None:
        return max(await self._adapters(server), default=None)

    async def stuck(self, server: VllmClient) -> bool:
        return False  # nothing is paused: an adapter is there or not

    async def push(self, server: VllmClient, label: Label) -> None:
        adapter = {"lora_name": str(label), "lora_path": str(self.path(label).resolve())}
        await server.post("/v1/load_lora_adapter", adapter)
        for old in sorted(await self._adapters(server))[:-KEEP]:
            await server.post("/v1/unload_lora_adapter", {"lora_name": str(old)})

    def model(self, served: str, label: Label) -> str:
        return str(label)

    async def _adapters(self, server: VllmClient) -> list[Label]:
        return [label for name in await server.models() if (label := self.own(parse_label(name)))]


async def held_label(server: VllmClient) -> Label | None:
    """The label of a server's weights; None when it has not been given any."""
    return parse_label(str((await server.get("/weight_info"))["weight_version"]))


async def is_paused(server: VllmClient) -> bool:
    return bool((await server.get("/is_paused"))["is_paused"])


async def relabel_and_resume(server: VllmClient, label: Label | None) -> None:
    """The end of an update of a paused server, up to the check; label None where the update itself has labelled it."""
    reset = await server.post("/reset_prefix_cache", reset_running_requests="true")
    if not (isinstance(reset, dict) and reset.get("success")):
        raise InfrastructureError(f"{server.url}: its prefix cache was not reset: {reset}")
    if label is not None:
        await server.post("/update_weight_version", {"new_version": str(label)})
    await server.post("/resume")


def adapter_files(data: bytes, lora: LoraConfig) -> dict[str, bytes]:
    """A peft adapter's folder from the adapter's tensors. Raises ValueError when there are none among them."""
    tensors = {}
    for name, tensor in safetensors.torch.load(data).items():
        if ".lora_A." in name or ".lora_B." in name:
            plain = name.replace(".default.", ".").removeprefix("base_model.model.")
            tensors[f"base_model.model.{plain}"] = tensor.contiguous()
    if not tensors:
        raise ValueError('sync "lora": the trainer\'s weights hold no adapter (no lora_A, lora_B)')
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return {
        "adapter_config.json": json.dumps(config, indent=2).encode(),
        "adapter_model.safetensors": safetensors.torch.save(tensors),
    }


def label_of(weights: Weights) -> Label:
    label = parse_label(weights.label)
    if label is None or label.version != weights.version:
        raise ConfigError(
            f"weights of version {weights.version} are labelled {weights.label!r}; expected <role>.e<epoch>.v<version>"
        )
    return label
