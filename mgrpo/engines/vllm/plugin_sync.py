"""New weights through our plug-in in the server (plugin/), which takes patches in place.

    /pause?mode=keep -> mgrpo_patch, for each version that the server has missed -> /reset_prefix_cache
    -> /update_weight_version -> /resume

The files lie in the shared folder; over HTTP go their names. A server that holds no version that patches lead on from
(it has just started, or was down for long) or that has refused one gets the version whole (mgrpo_load) in the same
pause; so does one whose probe differs afterwards. A patch that fails half way leaves torn weights, and the server
paused until it has a whole version.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from mgrpo.config.engine import OnUpdate
from mgrpo.engines.labels import Label
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.plugin_client import NoPluginError, held_version, load_patch, load_whole
from mgrpo.engines.vllm.weight_sync import VllmSync, pause, relabel_and_resume
from mgrpo.engines.weight_folder import REBASE, PatchFile
from mgrpo.errors import ConfigError
from mgrpo.weights.version import Weights

log = logging.getLogger("mgrpo.engines")


class PluginSync(VllmSync):
    """Patches and whole versions through the plug-in."""

    takes_patches = True

    def __init__(self, folder: Path, timeout: float, on_update: OnUpdate = "recompute") -> None:
        super().__init__(folder, timeout, on_update)
        self._rebase: asyncio.Future[Path] | None = None

    async def _prepare(self, label: Label, weights: Weights) -> None:
        await asyncio.to_thread(self.folder.add, weights)
        if self._rebase is not None and self._rebase.done():
            rebase, self._rebase = self._rebase, None
            if error := rebase.exception():
                log.warning("%s", error)
        if self._rebase is None and self.folder.patched(label) >= REBASE:
            # Beside the update: servers take patches, and only one that has none needs it.
            self._rebase = asyncio.ensure_future(asyncio.to_thread(self.folder.make_whole, label))

    async def update(self, server: VllmClient, label: Label) -> None:
        try:
            held = await held_version(server)
        except NoPluginError as error:
            raise ConfigError(f"{error}, or use another sync (docs/engines.md)") from None
        patches = self.folder.patches(held, label) if held else None
        if patches is None:
            await asyncio.to_thread(self.folder.make_whole, label)  # before the pause
        await pause(server, label, self.on_update)
        if patches is None or not await self._patch(server, patches):
            await self._load(server, label)
        await relabel_and_resume(server, label, self.on_update)

    async def repair(self, server: VllmClient, label: Label) -> bool:
        """Whole, where patches may have led to something else than the trainer's version."""
        self._event(f"{server.url}: wrong weights under {label}; taking it whole")
        await pause(server, label, self.on_update)
        await self._load(server, label)
        await relabel_and_resume(server, label, self.on_update)
        return True

    async def _patch(self, server: VllmClient, patches: list[PatchFile]) -> bool:
        for patch in patches:
            if error := await load_patch(server, patch, self.timeout):
                self._event(
                    f"{server.url}: refused the patch to {patch.label}: {error}; taking a whole version"
                )
                return False
        return True

    async def _load(self, server: VllmClient, label: Label) -> None:
        await asyncio.to_thread(self.folder.make_whole, label)
        await load_whole(server, self.folder, label, self.timeout)

    def _event(self, line: str) -> None:
        log.warning("%s", line)
        self.on_event(line)
