"""How new weights reach a server: one small interface, one class a way, in the folder of the engine it is for."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from mgrpo.engines.client import ServerClient
from mgrpo.engines.labels import Label, label_of
from mgrpo.engines.weight_folder import WeightFolder
from mgrpo.errors import InfrastructureError
from mgrpo.weights.version import Weights

C = TypeVar("C", bound=ServerClient)


class WeightSync(ABC, Generic[C]):
    """Brings versions to servers of one policy. `prepare` comes once a version, `ensure_version` once a server and
    version."""

    labels_tokens = True
    """The server itself reports which weights sampled which token; false where a request names its weights."""

    def __init__(self, folder: Path, timeout: float) -> None:
        """folder: shared with the servers and with the other workers, which lock each server through it. timeout:
        seconds that one step of an update may take."""
        self.folder, self.timeout = WeightFolder(folder), timeout
        self.role = ""  # of the version prepared last

    def own(self, label: Label | None) -> Label | None:
        """`label`, unless it is that of another role."""
        return label if label is not None and label.role == self.role else None

    async def prepare(self, weights: Weights) -> Label:
        """Make a version ready for update(). Idempotent, also between workers. Raises ValueError when it does not
        fit, ConfigError for a label that is none."""
        label = label_of(weights)
        self.role = label.role
        await self._prepare(label, weights.data)
        return label

    @abstractmethod
    async def _prepare(self, label: Label, data: bytes) -> None:
        """See prepare(). data: safetensors."""

    @abstractmethod
    async def current_version(self, server: C) -> Label | None:
        """The newest version that the server has; None before the first."""

    @abstractmethod
    async def paused(self, server: C) -> bool:
        """An update of the server is under way, or was never ended."""

    @abstractmethod
    async def update(self, server: C, label: Label) -> None:
        """Make the server serve the prepared version. Raises InfrastructureError naming server and step."""

    def model_name(self, served: str, label: Label) -> str:
        """The name to ask for, of a server whose model is called `served`."""
        return served

    async def ensure_version(self, server: C, label: Label) -> Label:
        """The version that the server serves afterwards: `label`, or a newer one from another worker. One worker at a
        time: two updates at once would resume each other's half-read weights."""
        async with self.folder.lock(server.url, 4 * self.timeout):
            current = await self.current_version(server)
            if current is None or current < label or await self.paused(server):
                await self.update(server, label)
                current = await self.current_version(server)
        if current is None or current < label:
            raise InfrastructureError(f"{server.url}: serves {current} after an update to {label}")
        return current


class FolderSync(WeightSync[C]):
    """Whole weights through a folder, one model.safetensors a version."""

    async def _prepare(self, label: Label, data: bytes) -> None:
        await asyncio.to_thread(self.folder.write, label, {"model.safetensors": data})
