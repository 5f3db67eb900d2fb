"""How new weights reach a vLLM server.

    patch  plugin_sync.py: our plug-in in the server takes what changed in place, or a whole version
    fs     VllmFolderSync: a safetensors folder a version, which the server reads again
    lora   LoraSync: an adapter folder a version, loaded beside the others
    nccl, gloo  direct_sync.py: the trainer sends them to the servers itself

fs goes in this order, which leaves no moment at which a token could come from mixed weights or be mislabelled:

    /pause?mode=keep -> mgrpo_load, or reload_weights where the server has no plug-in -> /reset_prefix_cache (running
    requests included) -> /update_weight_version -> /resume -> /weight_info equals the label

A request that is under way stays: its tokens so far keep their label, the tokens that follow carry the new one. Its
keys and values are computed again with the new weights (on_update "recompute"), or stay:

    on_update "keep"   /pause?mode=keep&clear_cache=false -> mgrpo_load -> /update_weight_version -> /resume

The prefix cache cannot be reset while a request holds blocks of it, so each request names the newest version that its
client knows as `cache_salt`: what older weights computed is found by nobody who asks under the new name. (A client
learns of another worker's update at its next look, seconds later; until then its requests may read older keys, and are
mixed as those that ran across the update.) vLLM 0.32 clears the cache, running requests included, at the end of every
pause but one with clear_cache=false.

An update that fails leaves the server paused, so that torn weights answer nobody, until a later one succeeds.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from mgrpo.config.engine import OnUpdate
from mgrpo.config.policy import LoraConfig
from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.plugin_client import NoPluginError, held_version, load_whole
from mgrpo.engines.weight_folder import KEEP, adapter_files
from mgrpo.engines.weight_sync import FolderSync, WeightSync
from mgrpo.errors import InfrastructureError
from mgrpo.weights.version import Weights


class VllmSync(WeightSync[VllmClient]):
    """What ways have in common that pause the server and label its weights."""

    def __init__(self, folder: Path, timeout: float, on_update: OnUpdate = "recompute") -> None:
        super().__init__(folder, timeout)
        self.on_update: OnUpdate = on_update

    async def current_version(self, server: VllmClient) -> Label | None:
        return self.own(await server_label(server, self.on_update))

    async def paused(self, server: VllmClient) -> bool:
        return await is_paused(server)

    async def stop(self, server: VllmClient) -> None:
        await server.post("/pause", mode="keep")


class VllmFolderSync(FolderSync[VllmClient], VllmSync):
    """Whole weights through a folder (see the module's docstring)."""

    wrong_hint = (
        "without our plug-in vLLM 0.32 does not reload the head of a tied model, or experts, on a CPU "
        "(docs/engines.md)"
    )

    async def update(self, server: VllmClient, label: Label) -> None:
        try:
            await held_version(server)
            plugin = True
        except NoPluginError:
            plugin = False
        await pause(server, label, self.on_update)
        if plugin:
            await load_whole(server, self.folder, label, self.timeout)
        else:
            call = {
                "method": "reload_weights",
                "kwargs": {"weights_path": str(self.folder.path(label).resolve())},
            }
            await server.post("/collective_rpc", call | {"timeout": self.timeout})
        await relabel_and_resume(server, label, self.on_update)


class LoraSync(WeightSync[VllmClient]):
    """Adapters: each version is loaded under its label's name beside the older ones, so nothing is paused, and a
    request is answered by the version it named to its end."""

    labels_tokens = False
    stopped = "the adapter was unloaded"

    def __init__(self, folder: Path, timeout: float, lora: LoraConfig) -> None:
        super().__init__(folder, timeout)
        self._lora = lora

    async def _prepare(self, label: Label, weights: Weights) -> None:
        if not self.folder.path(label).exists():
            files = await asyncio.to_thread(adapter_files, weights.data, self._lora)
            await asyncio.to_thread(self.folder.write, label, files)

    async def current_version(self, server: VllmClient) -> Label | None:
        return max(await self._adapters(server), default=None)

    async def paused(self, server: VllmClient) -> bool:
        return False  # nothing is paused: an adapter is there or not

    async def stop(self, server: VllmClient) -> None:
        """Unload the newest adapter, which is the one that was compared: other agents may be served beside it."""
        if (label := await self.current_version(server)) is not None:
            await server.post("/v1/unload_lora_adapter", {"lora_name": str(label)})

    async def update(self, server: VllmClient, label: Label) -> None:
        adapter = {"lora_name": str(label), "lora_path": str(self.folder.path(label).resolve())}
        await server.post("/v1/load_lora_adapter", adapter)
        for old in sorted(await self._adapters(server))[:-KEEP]:
            await server.post("/v1/unload_lora_adapter", {"lora_name": str(old)})

    def model_name(self, served: str, label: Label) -> str:
        return str(label)

    async def _adapters(self, server: VllmClient) -> list[Label]:
        return [label for name in await server.models() if (label := self.own(parse_label(name)))]


async def server_label(server: VllmClient, on_update: OnUpdate = "recompute") -> Label | None:
    """The label of a server's weights; None when it has not been given any. With "keep", also what its requests name
    from now on as the version whose keys they may share."""
    label = parse_label(str((await server.get("/weight_info"))["weight_version"]))
    if on_update == "keep" and label is not None:
        server.cache_salt = str(label)
    return label


async def is_paused(server: VllmClient) -> bool:
    return bool((await server.get("/is_paused"))["is_paused"])


async def pause(server: VllmClient, label: Label, on_update: OnUpdate) -> None:
    """The beginning of an update to `label`: requests stand still, and no token is sampled until
    relabel_and_resume()."""
    if on_update == "keep":
        await server.post("/pause", mode="keep", clear_cache="false")
        server.cache_salt = str(
            label
        )  # not earlier: what is sent before the pause is computed by the older weights
    else:
        await server.post("/pause", mode="keep")


async def relabel_and_resume(server: VllmClient, label: Label | None, on_update: OnUpdate) -> None:
    """The end of an update of a paused server, up to the check; label None where the update itself has labelled it."""
    if on_update == "recompute":
        reset = await server.post("/reset_prefix_cache", reset_running_requests="true")
        if not (isinstance(reset, dict) and reset.get("success")):
            raise InfrastructureError(f"{server.url}: its prefix cache was not reset: {reset}")
    if label is not None:
        await server.post("/update_weight_version", {"new_version": str(label)})
    await server.post("/resume")
