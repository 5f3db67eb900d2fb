"""Weights that the trainer itself sends to a server's workers (mgrpo/trainers/torch/direct.py), as a worker sees them.

A worker is told a version's label and no bytes. It never updates a server: it waits until the server serves the label.
A paused server is one that the trainer is updating; the workers' buckets that arrive there are what moves.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from mgrpo.config.engine import OnUpdate
from mgrpo.engines.client import ServerDown
from mgrpo.engines.labels import Label
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.weight_sync import VllmSync
from mgrpo.errors import InfrastructureError
from mgrpo.weights.version import Weights

IDLE_SECONDS = 5.0  # for a server to begin an update, which its trainer made before it announced the version
LOOK_SECONDS = 0.25  # between two looks at a server that is waited for


class DirectSync(VllmSync):
    """See the module's docstring. A server whose weights are wrong is paused; its trainer then sends them again."""

    def __init__(
        self, folder: Path, timeout: float, on_update: OnUpdate = "recompute", idle: float = IDLE_SECONDS
    ) -> None:
        """timeout: seconds without progress of an update that is under way. idle: for one to begin."""
        super().__init__(folder, timeout, on_update)
        self._idle = idle

    async def _prepare(self, label: Label, weights: Weights) -> None:
        """The trainer has sent it already."""

    async def update(self, server: VllmClient, label: Label) -> None:
        raise AssertionError("the trainer updates the server")

    async def ensure_version(self, server: VllmClient, label: Label) -> Label:
        """See WeightSync. Raises ServerDown where the trainer does not bring the version: it will, when it waits for
        rollouts, and the server is looked at again."""
        since, seen = time.monotonic(), None
        while True:
            current, paused = await self.current_version(server), await self.paused(server)
            if current is not None and current >= label and not paused:
                break
            self.forget(server)
            found = current, paused, await self._received(server) if paused else None
            if found != seen:
                since, seen = time.monotonic(), found
            bound = self.timeout if paused else self._idle
            if time.monotonic() - since > bound:
                raise ServerDown(
                    f"{server.url}: {'an update of it stands still' if paused else f'serves {current}'}; its trainer "
                    f"has not brought {label} within {bound:g} s"
                )
            await asyncio.sleep(LOOK_SECONDS)
        await self.confirm(server, current)
        return current

    async def _received(self, server: VllmClient) -> object:
        """What the workers have received; None where they do not answer."""
        call = {"method": "mgrpo_direct_progress", "kwargs": {}, "timeout": self.timeout}
        try:
            return await server.post("/collective_rpc", call)
        except (InfrastructureError, ValueError):
            return None
